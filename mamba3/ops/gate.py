"""The output stage (mathematics.md, section 6; Table 9).

    out norm "none":              o_{t,r} = y_{t,r} * silu(z_t * mimo_z_r)
    "pre_gate", "..._grouped":    o_{t,r} = norm(y_{t,r}) * silu(z_t * mimo_z_r)
    "post_gate", "..._grouped":   o_{t,r} = norm(y_{t,r} * silu(z_t * mimo_z_r))
    out_t = sum_r mimo_o_r * o_{t,r}

"grouped" normalises each head over its p channels; the others normalise over all h p channels of a token and rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba3.ops.ranks import per_rank
from mamba3.ops.types import Gate

OUT_NORMS = ("none", "pre_gate", "pre_gate_grouped", "post_gate", "post_gate_grouped")
EPS = 1e-5


def _rms_norm(y: Tensor, weight: Tensor, grouped: bool) -> Tensor:
    if grouped:
        return F.rms_norm(y, y.shape[-1:], eps=EPS) * weight
    return F.rms_norm(y, y.shape[-2:], eps=EPS) * weight


def apply_gate(y: Tensor, gate: Gate, out: Tensor | None = None) -> Tensor:
    """y [..., r, h, p] and z [..., h, p] to [..., h, p], in the dtype of y. norm_weight is [h, p], shared by ranks.

    out: written and returned instead, in its own dtype, where the last operation can; only without a gradient.
    """
    assert gate.z is not None
    placement = gate.norm
    z = F.silu(per_rank(gate.z.to(y.dtype), gate.mimo_z))
    if placement.startswith("pre"):
        assert gate.norm_weight is not None
        y = _rms_norm(y, gate.norm_weight, placement.endswith("grouped"))
    if out is not None and placement == "none" and gate.mimo_o is None and y.shape[-3] == 1:
        torch.mul(y, z, out=out.unsqueeze(-3))
        return out
    y = y * z if torch.is_grad_enabled() else z.mul_(y)
    if placement.startswith("post"):
        assert gate.norm_weight is not None
        y = _rms_norm(y, gate.norm_weight, placement.endswith("grouped"))
    if gate.mimo_o is None:
        return y.sum(-3) if y.shape[-3] > 1 else y.squeeze(-3)
    return (y * gate.mimo_o.transpose(0, 1)).sum(-3)
