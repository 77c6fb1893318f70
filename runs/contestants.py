"""Language models that differ in one thing, the mixer: what runs/compare.py compares.

h += mixer(RMSNorm(h));  h += SwiGLU(RMSNorm(h));  head tied to the embedding: the same skeleton, the same initial values and
the same number of parameters for all, matched by the inner width of the MLP, in steps of 8 channels (0.3 % of a layer).

The mixers: `mamba3.Mamba3` in every setting of the paper's ablations; attention with rotary positions (the Transformer) or
without (the hybrid's); Mamba-2, whose scan is mamba_ssm's kernel where it is installed, else flash-linear-attention's
`chunk_simple_gla`, else, on a CPU, `mamba3.ops.scan` with lambda = 1 and no rotation, which is the same recurrence; gated
DeltaNet, the layer of flash-linear-attention (`pip install flash-linear-attention`; needs a GPU).
"""

import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mamba3 import Mamba3
from mamba3.nn import Attention, RMSNorm, init
from mamba3.ops import scan
from mamba3.ops import triton as kernels
from mamba3.tasks import peers

STEP = 8


@dataclass(frozen=True, kw_only=True)
class Size:
    """The skeleton: `inner` is the MLP's width of Mamba-3 SISO, which the other kinds' parameters are matched to."""

    vocab_size: int
    d_model: int = 512
    layers: int = 12
    inner: int = 512
    headdim: int = 64
    d_state: int = 128


class RotaryAttention(Attention):
    """Causal attention of rotary positions, base 10,000 (Llama's pairing of channels)."""

    def forward(self, u: Tensor, cu_seqlens: Any = None) -> Tensor:
        assert cu_seqlens is None
        q, k, v = (w.transpose(1, 2) for w in self._project(u))
        angle = torch.arange(u.shape[1], device=u.device)[:, None] * 10_000.0 ** (
            -torch.arange(0, self.head_dim, 2, device=u.device) / self.head_dim
        )
        cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)

        def turn(w: Tensor) -> Tensor:
            a, b = w.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

        return self._out(F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True).transpose(1, 2))


class Mamba2(peers.Mamba2Weights):
    """The layer with a scan of its authors', and everything else in float32 under autocast or in one kernel."""

    def forward(self, u: Tensor) -> Tensor:
        z, x, B, C, dt = self.before(u)
        with torch.autocast(u.device.type, enabled=False):
            y = SCANS[scan_of(u.device)](x, dt, -self.A_log.float().exp(), B, C)
        return self.out_proj(self.after(y, x, z))

    def before(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """z, x, B, C and dt; the convolution as four shifted products, which torch.compile makes one kernel of."""
        z, row, dt = self.in_proj(u).split([self.d_inner, self.d_inner + 2 * self.n, self.heads], dim=-1)
        rows, weight = F.pad(row, (0, 0, 3, 0)), self.conv.weight.to(row.dtype)
        shifted = (rows[:, k : k + row.shape[1]] * weight[:, k] for k in range(4))
        row = F.silu(sum(shifted, self.conv.bias.to(row.dtype)))
        x, B, C = row.split([self.d_inner, self.n, self.n], dim=-1)
        return z, x.unflatten(-1, (self.heads, self.headdim)), B, C, F.softplus(dt.float() + self.dt_bias)

    def after(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """The skip, and RMSNorm of what the gate left."""
        y = (y + self.D[:, None] * x).flatten(-2)
        return self.norm(y.float() * F.silu(z.float()), z.dtype)


def _scan_by_ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    one = torch.ones_like(dt)
    return scan(x, dt, A * one, one, dt.new_empty(*dt.shape[:2], 0), B[:, :, None, None], C[:, :, None, None]).y[
        :, :, 0
    ]


def _scan_by_fla(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    heads = x.shape[2]
    B, C = (v[:, :, None].expand(-1, -1, heads, -1).contiguous() for v in (B, C))
    return chunk_simple_gla(C, B, (x * dt[..., None]).to(x.dtype), g=A * dt, scale=1.0)[0]


def _scan_by_mamba_ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # pyright: ignore[reportMissingImports]

    return mamba_chunk_scan_combined(x, dt, A, B[:, :, None], C[:, :, None], chunk_size=256)


SCANS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "ours": _scan_by_ours, "fla": _scan_by_fla, "mamba_ssm": _scan_by_mamba_ssm,
}  # fmt: skip


def scan_of(device: torch.device) -> str:
    """Whose kernel Mamba-2's scan is on this device."""
    if device.type == "cuda":
        for name in ("mamba_ssm", "fla"):
            if importlib.util.find_spec(name) is not None:
                return name
    return "ours"


def kernel_of(kind: str, device: torch.device, dtype: torch.dtype) -> str:
    """What computes a kind's sequence mixing while it is trained here."""
    if kind == "transformer":
        return "torch's scaled_dot_product_attention"
    if kind.startswith("mamba2"):
        return scan_of(device)
    if kind == "gdn":
        return "fla"
    taken = device.type == "cuda" and kernels.why_not(device, dtype) is None and dtype in kernels.TRAINS
    return "mamba3 triton" if taken else "mamba3 chunked"


class GatedDelta(nn.Module):
    """Gated DeltaNet (arXiv 2412.06464): keys of 128, values of 256 channels a head, as the paper's baseline has it."""

    def __init__(self, d_model: int, **settings: Any):
        super().__init__()
        from fla.layers import GatedDeltaNet  # pyright: ignore[reportMissingImports]

        self.layer = GatedDeltaNet(hidden_size=d_model, expand_v=2, **settings)

    @property
    def out_proj(self) -> nn.Module:
        """The layer's own; registered here too, its weight would be saved twice."""
        return self.layer.o_proj

    def forward(self, u: Tensor) -> Tensor:
        return self.layer(u)[0]


class Block(nn.Module):
    """A mixer and a SwiGLU of any inner width, each behind its norm."""

    def __init__(self, mixer: nn.Module, d_model: int, inner: int):
        super().__init__()
        self.norm, self.mixer, self.norm2 = RMSNorm(d_model), mixer, RMSNorm(d_model)
        self.fc1 = nn.Linear(d_model, 2 * inner, bias=False)
        self.fc2 = nn.Linear(inner, d_model, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.mixer(self.norm(h))
        return h + self.mlp(h)

    def mlp(self, h: Tensor) -> Tensor:
        value, gate = self.fc1(self.norm2(h)).chunk(2, dim=-1)
        return self.fc2(value * F.silu(gate))


class Contestant(nn.Module):
    """Tokens [b, t] to logits [b, t, vocabulary]."""

    def __init__(self, kind: str, size: Size, inner: int | None = None):
        super().__init__()
        self.kind, self.size = kind, size
        mixers = [make_mixer(kind, size, i) for i in range(size.layers)]
        self.inner = matched_inner(kind, size) if inner is None else inner
        self.embedding = nn.Embedding(size.vocab_size, size.d_model)
        self.layers = nn.ModuleList(Block(mixer, size.d_model, self.inner) for mixer in mixers)
        self.norm_f = RMSNorm(size.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self.layers:
            for last in (block.mixer.out_proj, block.fc2):  # pyright: ignore[reportAttributeAccessIssue]
                init.residual_(last, 2 * size.layers)  # pyright: ignore[reportArgumentType]

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for block in self.layers:
            h = block(h)
        return F.linear(self.norm_f(h), self.embedding.weight)

    def compile_around_scan(self) -> None:
        """torch.compile norms and MLPs, and what of a mixer has no kernel of its own."""
        for block in self.layers:
            block.norm.compile()  # pyright: ignore[reportCallIssue]
            block.mlp = torch.compile(block.mlp)
            if isinstance(block.mixer, Mamba3):
                block.mixer.compile_coefficients()
            elif isinstance(block.mixer, Attention):
                block.mixer.compile()
            elif isinstance(block.mixer, Mamba2):
                block.mixer.before, block.mixer.after = (
                    torch.compile(f) for f in (block.mixer.before, block.mixer.after)
                )

    def num_parameters(self) -> int:
        """Parameters besides the embedding."""
        return sum(p.numel() for p in self.parameters()) - self.embedding.weight.numel()

    def memory_bytes(self, tokens: int) -> int:
        """What a sequence of so many tokens leaves in memory for the next one: float32 states, bfloat16 for the rest."""
        return sum(_memory(block.mixer, tokens) for block in self.layers)

    def save_pretrained(self, folder: Path) -> None:
        """model.safetensors and what it is."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: v.contiguous() for name, v in self.state_dict().items()}, folder / "model.safetensors")
        facts = {"kind": self.kind, "inner": self.inner, **asdict(self.size)}
        (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")


_MAMBA3: dict[str, dict[str, Any]] = {
    "mamba3-siso": {},
    "mamba3-mimo": {"mimo_rank": 4},
    # Table 5a, 8 and 10 at this size, one setting away from mamba3-siso.
    "mamba3-no-bias": {"B_bias": None, "C_bias": None},
    "mamba3-no-bias-no-trapezoid": {"B_bias": None, "C_bias": None, "lam": 1.0},
    "mamba3-conv": {"d_conv": 4},
    "mamba3-lambda-half": {"lam": 0.5},
    "mamba3-euler": {"lam": 1.0},
    "mamba3-bias-0": {"B_bias": 0.0, "C_bias": 0.0},
    "mamba3-bias-fixed": {"bc_bias_trainable": False},
    "mamba3-bias-b": {"C_bias": None},
    "mamba3-bias-c": {"B_bias": None},
    "mamba3-no-rotation": {"rotation": "none"},
}
MAIN = ("mamba3-siso", "mamba3-mimo", "mamba3-hybrid", "transformer", "mamba2", "gdn")
STATES = tuple(f"{kind}-n{n}" for n in (32, 64) for kind in ("mamba3-siso", "mamba3-mimo", "mamba2"))
ABLATIONS = tuple(_MAMBA3)[2:]
KINDS = (*MAIN, *STATES, *ABLATIONS)


def why_not(kind: str, device: torch.device) -> str | None:
    """Why a kind cannot be trained here; None where it can."""
    if kind == "gdn" and device.type != "cuda":
        return "gated DeltaNet's kernels need a GPU"
    if kind == "gdn" and importlib.util.find_spec("fla") is None:
        return "gated DeltaNet needs flash-linear-attention (pip install flash-linear-attention)"
    if kind.startswith("mamba2") and device.type == "cuda" and scan_of(device) == "ours":
        return "Mamba-2 needs the kernels of mamba_ssm or of flash-linear-attention"
    return None


@contextmanager
def sound_kernels(kind: str, device: torch.device) -> Iterator[None]:
    """Where a kind is trained: flash-linear-attention's kernels compiled by an assembler that is right for them."""
    taken = kind == "gdn" or (kind.startswith("mamba2") and scan_of(device) == "fla")
    with peers.sound_kernels(device) if taken else nullcontext():
        yield


def make_mixer(kind: str, size: Size, layer: int) -> nn.Module:
    """The mixer of one layer."""
    base, _, states = kind.partition("-n") if kind in STATES else (kind, "", "")
    n, d = int(states) if states else size.d_state, size.d_model
    heads = d // size.headdim
    if base == "mamba3-hybrid" and (layer + 1) % min(6, size.layers) == 0:
        wide = math.floor(
            _layer_parameters("mamba3-siso", size) / (4 * d * size.headdim)
        )  # as large as what it replaces
        return Attention(d, max(wide, 1), head_dim=size.headdim)
    if base == "transformer":
        return RotaryAttention(d, heads)
    if base == "mamba2":
        return Mamba2(d, n, size.headdim)
    if base == "gdn":
        keys = 2 * size.headdim
        return GatedDelta(d, head_dim=keys, num_heads=max(1, 3 * d // (4 * keys)), layer_idx=layer)
    settings = _MAMBA3["mamba3-siso" if base == "mamba3-hybrid" else base]
    return Mamba3(d, n, headdim=size.headdim, **settings)


def _layer_parameters(kind: str, size: Size, layer: int = 0) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make_mixer(kind, size, layer).parameters())


def matched_inner(kind: str, size: Size) -> int:
    """The MLP width at which a kind has as many parameters as Mamba-3 SISO with `size.inner`."""
    if kind == "mamba3-siso":
        return size.inner
    theirs = sum(_layer_parameters(kind, size, i) for i in range(size.layers))
    ours = size.layers * (_layer_parameters("mamba3-siso", size) + 3 * size.d_model * size.inner)
    inner = (ours - theirs) / (3 * size.d_model * size.layers)
    return max(STEP, STEP * round(inner / STEP))


def _memory(mixer: Any, tokens: int) -> int:
    if isinstance(mixer, Mamba3):
        return mixer.init_state(1, "cpu", torch.bfloat16).nbytes
    if isinstance(mixer, Attention):
        return 2 * 2 * tokens * mixer.n_kv_heads * mixer.head_dim
    if isinstance(mixer, Mamba2):
        return 4 * mixer.d_inner * mixer.n + 2 * 3 * mixer.conv.weight.shape[0]
    layer = mixer.layer
    return 4 * layer.num_heads * layer.head_k_dim * layer.head_v_dim + 2 * 3 * (2 * layer.key_dim + layer.value_dim)
