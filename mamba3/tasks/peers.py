"""Other architectures as models of a task: gated DeltaNet of flash-linear-attention, Mamba-2.

Gated DeltaNet is the library's layer with its own first weights. Mamba-2 is the layer that its authors release (arXiv
2405.21060); its recurrence is Mamba-3's with lambda = 1 and no rotation, by `mamba3.ops.scan` or the mixing kernels. Law: the
layer of transformers, whose own PyTorch path would take hours.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3.nn import RMSNorm, init
from mamba3.nn.short_conv import ShortConv
from mamba3.ops import scan
from mamba3.tasks.layered import Layered

PEERS = ("gdn", "mamba2")
LIBRARY = "fla"  # of gated DeltaNet
REFUSAL = "TRITON_ABOVE_3_7_1"  # the library's flag that its backward pass asks whether it may run


def why_not(kind: str, device: torch.device | str = "cuda") -> str | None:
    """Why a peer cannot be built for a device; None where it can."""
    if kind not in PEERS:
        return f"a peer is one of {', '.join(PEERS)}; it is {kind!r}"
    if kind == "gdn" and torch.device(device).type == "cpu":
        return "the kernels of gated DeltaNet need a GPU"
    if kind == "gdn" and importlib.util.find_spec(LIBRARY) is None:
        return f"{LIBRARY} is not installed (pip install 'mamba3[peers]')"
    return None


@contextmanager
def one_configuration() -> Iterator[None]:
    """Kernels that are imported within are compiled for one of their configurations (4 warps, 2 stages, tiles of 64, where
    offered): to try all, dozens for each of ten kernels, takes longer than a sweep's training."""
    from triton.runtime.autotuner import Autotuner  # pyright: ignore[reportMissingImports]

    made = Autotuner.__init__

    def plain(config: Any) -> tuple:
        tile = [v for v in config.kwargs.values() if isinstance(v, int)]
        return abs(config.num_warps - 4), abs(config.num_stages - 2), sum(abs(v - 64) for v in tile)

    def fixed(self: Any, fn: Any, arg_names: Any, configs: list[Any], *more: Any, **named: Any) -> None:
        made(self, fn, arg_names, [min(configs, key=plain)] if configs else configs, *more, **named)

    Autotuner.__init__ = fixed
    try:
        yield
    finally:
        Autotuner.__init__ = made


@contextmanager
def sound_kernels(device: torch.device) -> Iterator[None]:
    """Where the library's kernels are compiled and run.

    flash-linear-attention 0.6.0 refuses the backward pass of its gated recurrences on Hopper under Triton 3.4 to 3.7.0, where
    they were wrong. What is wrong is the assembler (`mamba3.ops.triton.assembler`): where Triton brings a newer one, that
    compiles them within, and the refusal is lifted. Held by `test_the_kernels_of_gated_deltanet_compute_it_and_its_gradient`.
    """
    if device.type != "cuda":
        yield
        return
    from mamba3.ops.triton.assembler import replaced, sound_assembler

    refusing: Any = importlib.import_module(f"{LIBRARY}.ops.common.chunk_o")
    before = getattr(refusing, REFUSAL, None)
    with sound_assembler(device):
        if before is not None and replaced(device):
            setattr(refusing, REFUSAL, True)
        try:
            yield
        finally:
            if before is not None:
                setattr(refusing, REFUSAL, before)


def _library(module: str) -> Any:
    with one_configuration():
        return importlib.import_module(f"{LIBRARY}.{module}")


def peer(
    kind: str, vocab_size: int, d_model: int, layers: int, d_state: int = 64, headdim: int = 64,
    device: torch.device | str = "cuda",
) -> Layered:  # fmt: skip
    """A model of `layers` layers of a kind, for a device. ValueError says why it cannot be built there."""
    reason = why_not(kind, device)
    if reason:
        raise ValueError(f"this model cannot be built: {reason}.")
    make = {"gdn": _gated_deltanet, "mamba2": Mamba2}[kind]
    mixers = [make(d_model, d_state, headdim, i) for i in range(layers)]
    return Layered(mixers, vocab_size, d_model, in_16_bits=kind == "gdn")  # its kernels take 16 bits alone


def _gated_deltanet(d_model: int, d_state: int, headdim: int, index: int) -> nn.Module:
    """Keys of d_state and values of headdim channels, expand 2, short convolution and gate as the library has them; beta in
    [0, 2], that is eigenvalues in [-1, 1]."""
    return _library("layers.gated_deltanet").GatedDeltaNet(
        hidden_size=d_model, head_dim=d_state, expand_v=headdim / d_state, num_heads=max(1, 2 * d_model // headdim),
        allow_neg_eigval=True, layer_idx=index, mode="chunk",
    )  # fmt: skip


class Mamba2Weights(nn.Module):
    """What a layer of Mamba-2 learns: convolution of 4 over x, B and C, gated RMSNorm, A in [1, 16] at first, one group."""

    def __init__(self, d_model: int, d_state: int, headdim: int, index: int = 0):
        super().__init__()
        self.d_inner, self.n, self.headdim = 2 * d_model, d_state, headdim
        self.heads = self.d_inner // headdim
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + 2 * d_state + self.heads, bias=False)
        self.conv = ShortConv(self.d_inner + 2 * d_state, 4)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(self.heads)) for _ in range(3))
        init.dt_bias_(self.dt_bias.data, 1e-3, 1e-1, 1e-4)
        nn.init.uniform_(self.A_log, 1, 16).data.log_()
        nn.init.ones_(self.D)
        self.norm = RMSNorm(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)


class Mamba2(Mamba2Weights):
    """u [b, t, d_model] to the same."""

    def forward(self, u: Tensor, *, kernels: bool | None = None) -> Tensor:
        """kernels: None takes `mamba3.tasks.mixing_kernels` on a GPU."""
        z, rows, dt = self.in_proj(u).split([self.d_inner, self.d_inner + 2 * self.n, self.heads], dim=-1)
        rows, _ = self.conv(rows, self.conv.init_state(u.shape[0], u.device, rows.dtype))
        x, B, C = rows.split([self.d_inner, self.n, self.n], dim=-1)
        x, dt = x.unflatten(-1, (self.heads, self.headdim)), F.softplus(dt + self.dt_bias)
        mix = self._by_kernels if (u.is_cuda if kernels is None else kernels) else self._by_scan
        return self.out_proj(self.norm(mix(x, dt, -self.A_log.exp(), B, C, z)))

    def _by_scan(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        one, no_angles = torch.ones_like(dt), dt.new_empty(*dt.shape[:2], 0)
        y = scan(x, dt, A * one, one, no_angles, B[:, :, None, None], C[:, :, None, None]).y[:, :, 0]
        return (y + self.D[:, None] * x).flatten(-2) * F.silu(z)

    def _by_kernels(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        from mamba3.tasks.mixing_kernels import Mixed, tf32

        none, no_angles = dt.new_zeros(1), dt.new_empty(1, *dt.shape[:2], 0)
        bias = dt.new_zeros(1, self.heads, self.n)
        y = Mixed.apply(
            x[None], B[None], C[None], z.view_as(x)[None], no_angles, torch.zeros_like(dt)[None], none, none[:0],
            (A * dt)[None], dt[None], dt[None], bias, bias, self.D[None], tf32(),
        )  # fmt: skip
        return y[0].flatten(-2)
