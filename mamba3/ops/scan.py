"""The public recurrence: `scan` over tokens, `step` over one, and the choice of implementation."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from mamba3.ops import chunked, draft, reference
from mamba3.ops import step as one_step
from mamba3.ops import triton as kernels
from mamba3.ops.types import Gate, Inputs, ScanOutput, State, transformed
from mamba3.ops.validation import check, check_inputs, fits, sizes_of, zero_state

Implementation = Literal["auto", "reference", "chunked", "triton"]
IMPLEMENTATIONS = {"reference": reference.scan, "chunked": chunked.scan}  # and triton, which is imported where it runs


def implementations(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Each implementation with, in words, whether it runs on `device` with inputs of `dtype`, and what `auto` takes."""
    device, name = torch.device(device), str(dtype).removeprefix("torch.")
    reason = kernels.why_not(device, dtype)
    if reason or device.type != "cuda":
        picked, taken = "; auto takes it", ""
    elif dtype in kernels.TRAINS:
        picked, taken = "", "; auto takes it"
    else:
        picked, taken = (f"; auto takes it where {where}" for where in ("gradients are recorded", "no gradient is"))
    fused = f"does not run: {reason}" if reason else f"runs on {device.type} in {name}: fused, with gradients{taken}"
    return {
        "reference": f"runs on {device.type}: float64, token by token, the definition; never chosen by auto",
        "chunked": f"runs on {device.type} in {name}: chunk-parallel PyTorch{picked}",
        "triton": fused,
    }


def scan(
    x_bthp: Tensor,
    dt_bth: Tensor,
    A_bth: Tensor,
    lam_bth: Tensor,
    theta_bta: Tensor,
    B_btrgn: Tensor,
    C_btrgn: Tensor,
    *,
    B_bias_hrn: Tensor | None = None,
    C_bias_hrn: Tensor | None = None,
    mimo_x_hrp: Tensor | None = None,
    D_h: Tensor | None = None,
    tick_bth: Tensor | None = None,
    z_bthp: Tensor | None = None,
    mimo_z_hrp: Tensor | None = None,
    mimo_o_hrp: Tensor | None = None,
    out_norm: str = "none",
    norm_weight_hp: Tensor | None = None,
    state: State | None = None,
    cu_seqlens: Tensor | list[int] | None = None,
    impl: Implementation = "auto",
) -> ScanOutput:
    """Scan the Mamba-3 recurrence over sequences of tokens.

        S_t = alpha_t S_{t-1} + beta_t sum_r x_{t-1,r} (x) B_{t-1,r} + gamma_t sum_r x_{t,r} (x) B_{t,r}
        y_{t,r} = S_t C_{t,r} + D x_{t,r}

    The caller has applied every nonlinearity of the coefficients (softplus, sigmoid, pi tanh) and the norms of B and C;
    scan adds the biases, rotates, and applies silu to z. SISO is r = 1; Euler is lam = 1; no rotation is a = 0.

    Args:
        x_bthp: input of each head; float32, float64, bfloat16 or float16. Its dtype is that of the products and of y.
        dt_bth: step size, > 0; kept in float32 (float64 for float64 x), like the three that follow.
        A_bth: decay rate, < 0.
        lam_bth: weight of the current token in the trapezoid, in [0, 1]; 1 is Euler's rule.
        theta_bta: rotation in radians per unit of tick; 2 a <= n.
        B_btrgn, C_btrgn: input and output vectors, normalised, shared by the h / g heads of a group.
        B_bias_hrn, C_bias_hrn: added to B and C for each head, before rotation.
        mimo_x_hrp: x_r = x * mimo_x_r; needed when r > 1.
        D_h: skip connection.
        tick_bth: what the angle advances by; dt when None. Ones make theta radians per token (standard RoPE).
        z_bthp, mimo_z_hrp, mimo_o_hrp, out_norm, norm_weight_hp: the output stage, see `mamba3.ops.gate`; without z, y
            comes out for each rank.
        state: where each sequence starts, [b, ...] or [s, ...] for a pack; zeros when None.
        cu_seqlens: boundaries [s + 1] of s sequences packed along t, with b = 1: 0, ..., t.
        impl: "auto" (see `implementations`), "triton" (fused kernels; no second derivatives), "chunked" or "reference" (float64
            results).

    Returns:
        ScanOutput(y, state): y [b, t, h, p], or [b, t, r, h, p] without z; the state after each sequence. Differentiable
        in every tensor, the state included.

    Raises:
        ValueError: shapes, dtypes, devices, boundaries or an unknown implementation; the text says which and what to do.

    Source: arXiv 2603.15569, sections 3.1 to 3.3 and Table 1.
    """
    inp = Inputs(
        x_bthp, dt_bth, A_bth, lam_bth, theta_bta, B_btrgn, C_btrgn, B_bias_hrn, C_bias_hrn, mimo_x_hrp, D_h, tick_bth
    )
    gate = Gate(z_bthp, mimo_z_hrp, mimo_o_hrp, out_norm, norm_weight_hp)
    return run_scan(inp, gate, state, cu_seqlens, impl)


def run_scan(
    inp: Inputs,
    gate: Gate,
    state: State | None = None,
    cu_seqlens: Tensor | list[int] | None = None,
    impl: Implementation = "auto",
    *,
    trusted: bool = False,
) -> ScanOutput:
    """`scan` for callers that hold its arguments as `Inputs` and `Gate`.

    trusted: the inputs and the list of boundaries are right by construction, coefficients in their wide dtype; only the state
    is looked at.
    """
    sequences = None if cu_seqlens is None else len(cu_seqlens) - 1
    if trusted and inp.x.numel() and (state is None or fits(inp, state, sequences)):
        boundaries, sizes = cast("list[int] | None", cu_seqlens), None
    else:
        inp, gate, state, boundaries, sizes = check(inp, gate, state, cu_seqlens)
    reason = _why_not(inp, impl)
    if impl == "triton" or (impl == "auto" and reason is None and _takes_triton(inp, gate, state)):
        from mamba3.ops.triton import library

        return library.scan(inp, gate, state, boundaries)
    if state is None:
        state = zero_state(inp, sizes or sizes_of(inp, boundaries))
    return IMPLEMENTATIONS["chunked" if impl == "auto" else impl](inp, gate, state, boundaries)


def run_state(inp: Inputs, state: State | None = None) -> State:
    """The state after a batch of sequences, where y is not wanted: `run_scan` without its readout."""
    inp, gate, state, _, sizes = check(inp, Gate(), state, None)
    if _why_not_triton(inp) is None and _takes_triton(inp, gate, state):
        return run_scan(inp, gate, state).state
    return chunked.final_state(inp, state or zero_state(inp, sizes))


def final_state(inp: Inputs, impl: Implementation = "auto") -> State:
    """The state after a dense batch of sequences from the zero state, without a readout; inputs as `check` gives them.

    Raises ValueError where `impl` is unknown or cannot run.
    """
    reason = _why_not(inp, impl)
    if impl == "triton" or (impl == "auto" and reason is None and _takes_triton(inp, Gate(), None) and _plain(inp.x)):
        from mamba3.ops.triton import library

        return library.final_state(inp, None)
    zero = zero_state(inp, sizes_of(inp, None))
    if impl == "reference":
        return reference.scan(inp, Gate(), zero, None).state
    return chunked.final_state(inp, zero)


def run_verify(inp: Inputs, gate: Gate, state: State) -> tuple[Tensor, draft.Factors]:
    """`draft.verify` of inputs that are right by construction; the state is looked at."""
    if not fits(inp, state):
        inp, gate, state, _ = check_inputs(inp, gate, state, None)
    return draft.verify(inp, gate, state)


def _plain(v: Tensor) -> bool:
    """Whether an autograd function may see v: no subclass that knows ops alone, and nothing that is being compiled."""
    return type(v) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _why_not(inp: Inputs, impl: str) -> str | None:
    """Why the kernels cannot run, or None. Raises ValueError where they must, or `impl` is unknown."""
    if impl not in ("auto", "triton", *IMPLEMENTATIONS):
        raise ValueError(f"impl must be auto, triton, {' or '.join(IMPLEMENTATIONS)}; it is {impl!r}.")
    reason = _why_not_triton(inp)
    if impl == "triton" and reason:
        raise ValueError(f"impl='triton' cannot run here: {reason}. Use impl='auto' or 'chunked'.")
    return reason


def _why_not_triton(inp: Inputs) -> str | None:
    if transformed(inp.x):
        return "the inputs are inside a torch.func transform, which the kernels cannot address"
    return kernels.why_not(inp.x.device, inp.x.dtype)


def _takes_triton(inp: Inputs, gate: Gate, state: State | None) -> bool:
    """Whether `auto` takes the kernels, which can run."""
    if inp.x.device.type != "cuda" or inp.x.dtype in kernels.TRAINS:
        return inp.x.device.type == "cuda"
    tensors = (v for v in (*inp, *gate, *(state or ())) if isinstance(v, Tensor))
    return not (torch.is_grad_enabled() and any(v.requires_grad for v in tensors))


def step(
    x_bhp: Tensor,
    dt_bh: Tensor,
    A_bh: Tensor,
    lam_bh: Tensor,
    theta_ba: Tensor,
    B_brgn: Tensor,
    C_brgn: Tensor,
    *,
    state: State,
    B_bias_hrn: Tensor | None = None,
    C_bias_hrn: Tensor | None = None,
    mimo_x_hrp: Tensor | None = None,
    D_h: Tensor | None = None,
    tick_bh: Tensor | None = None,
    z_bhp: Tensor | None = None,
    mimo_z_hrp: Tensor | None = None,
    mimo_o_hrp: Tensor | None = None,
    out_norm: str = "none",
    norm_weight_hp: Tensor | None = None,
    inplace: bool = False,
) -> ScanOutput:
    """One token of `scan`: the same arguments without the token axis, y [b, h, p] or [b, r, h, p], and the next state.

    inplace: update `state` itself, which saves copying S; gradients must be off (ValueError otherwise).
    """
    inp = Inputs(x_bhp, dt_bh, A_bh, lam_bh, theta_ba, B_brgn, C_brgn, B_bias_hrn, C_bias_hrn, mimo_x_hrp, D_h, tick_bh)
    gate = Gate(z_bhp, mimo_z_hrp, mimo_o_hrp, out_norm, norm_weight_hp)
    return run_step(inp, gate, state, inplace=inplace)


def run_step(inp: Inputs, gate: Gate, state: State, *, inplace: bool = False, trusted: bool = False) -> ScanOutput:
    """`step` for callers that hold its arguments as `Inputs` and `Gate`.

    trusted: the inputs are right by construction, coefficients in their wide dtype; only the state is looked at. A decode
    step is so short that checking fifteen shapes would show.
    """
    if trusted and fits(inp, state):
        return one_step.step(inp, gate, state, inplace=inplace)
    if inplace and torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (*inp, *state)):
        raise ValueError(
            "A state cannot be updated in place while gradients are recorded; use inplace=False or no_grad."
        )
    inp, gate, checked, _ = check_inputs(inp, gate, state, None, one_token=True)
    return one_step.step(inp, gate, checked, inplace=inplace)
