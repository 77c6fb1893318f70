"""Kernels of other projects at the sizes of `kernel_sizes`, where they can be imported; called as their authors call them.

Their results are timed and not checked: random inputs in the ranges their models feed them. Each tunes itself before it is
timed: `kernel_jobs.tune` shares its authors' grid of configurations among processes, and the winners meet again here. One
that cannot be built or run, or not in time, is left out, and the results say why.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compilation import time_limit
from benchmarks.cuda import Contestant
from benchmarks.kernel_sizes import HEADDIM, HEADS, PAIRS, STATE

Built = tuple[Callable[..., Tensor], list[Tensor]]


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def _uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, device="cuda")


def sdpa(b: int, t: int) -> Built:
    """Causal attention of 32 heads of 64 in PyTorch: the width of the model, half our inner width."""
    return functools.partial(F.scaled_dot_product_attention, is_causal=True), [_normal(b, 32, t, 64) for _ in range(3)]


def mamba2(b: int, t: int) -> Built:
    """Mamba-2's scan at its own chunk size of 256."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # type: ignore[import-not-found]

    x, z, B, C = (_normal(b, t, *s) for s in ((HEADS, HEADDIM), (HEADS, HEADDIM), (1, STATE), (1, STATE)))
    dt, A, D = 0.1 * _uniform(b, t, HEADS), -1 - _uniform(HEADS), _uniform(HEADS)
    return (lambda x, z, B, C, dt, A, D: mamba_chunk_scan_combined(x, dt, A, B, C, 256, D=D, z=z)), [
        x,
        z,
        B,
        C,
        dt,
        A,
        D,
    ]


def official_siso(b: int, t: int) -> Built:
    """The official Mamba-3 of one rank, in Triton."""
    from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import mamba3_siso_combined  # type: ignore[import-not-found]

    C, B, x, z = (_normal(b, t, *s) for s in ((1, STATE), (1, STATE), (HEADS, HEADDIM), (HEADS, HEADDIM)))
    dt, lam = 0.1 * _uniform(b, HEADS, t), _uniform(b, HEADS, t)
    bias, D = [1 + 0.3 * _uniform(HEADS, STATE) for _ in range(2)], _uniform(HEADS)
    return mamba3_siso_combined, [C, B, x, -dt, dt, lam, *bias, _normal(b, t, HEADS, PAIRS), D, z]


def official_mimo(b: int, t: int) -> Built:
    """The official Mamba-3 of four ranks, in TileLang."""
    from mamba_ssm.ops.tilelang.mamba3.mamba3_mimo import mamba3_mimo  # type: ignore[import-not-found]

    C, B, x, z = (_normal(b, t, *s) for s in ((4, 1, STATE), (4, 1, STATE), (HEADS, HEADDIM), (HEADS, HEADDIM)))
    dt, lam = 0.1 * _uniform(b, HEADS, t), _normal(b, HEADS, t)
    bias = [1 + 0.3 * _uniform(HEADS, 4, STATE) for _ in range(2)]
    mimo = [0.25 + 0.3 * _uniform(HEADS, 4, HEADDIM) for _ in range(3)]
    angles, D = _normal(b, t, HEADS, PAIRS, dtype=torch.float32), _uniform(HEADS)

    def run(*v: Tensor) -> Tensor:
        return mamba3_mimo(*v, chunk_size=16, rotary_dim_divisor=4, dtype=torch.bfloat16)

    return run, [C, B, x, -dt, dt, lam, *bias, *mimo, angles, D, z]


def gated_delta_rule(b: int, t: int) -> Built:
    """flash-linear-attention's gated delta rule as the paper sizes it, 16 heads with keys of 128 and values of 256: a state
    of the same size, and the same inner width."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found]

    q, k = (F.normalize(_normal(b, t, 16, 128), dim=-1) for _ in range(2))
    g, beta = -0.1 * _uniform(b, t, 16), _uniform(b, t, 16).bfloat16()
    return (lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g=g, beta=beta)[0]), [
        q, k, _normal(b, t, 16, 256), g, beta,
    ]  # fmt: skip


class Rival(NamedTuple):
    """The rank it stands beside, the most tokens of a sequence it is asked for, and how many processes share its grid of
    configurations when it is compiled ahead (0: nothing to compile; -1: it compiles anew for every shape)."""

    name: str
    build: Callable[[int, int], Built]
    rank: int
    longest: int
    parts: int


RIVALS = (
    Rival("official MIMO", official_mimo, 4, 16384, -1),
    Rival("SDPA, 32 heads of 64", sdpa, 1, 16384, 0),
    Rival("Mamba-2", mamba2, 1, 131072, 4),
    Rival("gated delta rule", gated_delta_rule, 1, 131072, 4),
    Rival("official SISO", official_siso, 1, 131072, 8),
)


def passes(call: Callable[..., Tensor], tensors: list[Tensor], backward: bool) -> Contestant:
    """A forward pass that records nothing, or a forward and a backward pass to every tensor."""
    held = sum(v.nbytes for v in tensors)
    if not backward:
        return Contestant(torch.no_grad()(lambda: call(*tensors)), held)
    leaves = [v.detach().requires_grad_() for v in tensors]
    with torch.no_grad():
        dy = torch.randn_like(call(*tensors))
    return Contestant(lambda: torch.autograd.grad(call(*leaves), leaves, dy, allow_unused=True), held + dy.nbytes)


def failures() -> tuple[type[Exception], ...]:
    """What other projects' kernels raise where they do not fit the machine: a result, which must not end ours."""
    from triton.errors import TritonError  # Triton is only where there is a GPU for it

    known = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, OSError)
    return (*known, TimeoutError, TritonError)


class Prepared(NamedTuple):
    """What came of compiling rivals ahead: the configurations that won a part of their grid, by kernel, and why a rival is
    not ready at a shape and pass (forward, or backward too)."""

    finalists: Mapping[str, Collection[str]] = {}
    unready: Mapping[tuple[str, int, int, bool], str] = {}


def shorten_tuning(part: int = 0, parts: int = 1, finalists: Mapping[str, Collection[str]] = {}) -> None:
    """Autotuners that exist measure for 20 ms instead of 100, and try every `parts`-th of their configurations, or the
    finalists where there are any."""
    from triton.testing import do_bench

    for tuner in _autotuners():
        tuner._do_bench = functools.partial(do_bench, warmup=5, rep=20)  # Autotuner has no public way to say so later
        chosen = [c for c in tuner.configs if str(c) in finalists.get(_name(tuner), ())]
        tuner.configs = chosen or tuner.configs[part::parts] or tuner.configs[:1]


def winners() -> dict[str, list[str]]:
    """What each autotuner that has run found best."""
    found: dict[str, list[str]] = {}
    for tuner in _autotuners():
        if tuner.cache:
            found.setdefault(_name(tuner), []).extend(str(c) for c in tuner.cache.values())
    return found


def _autotuners() -> list[Any]:
    from triton.runtime.autotuner import Autotuner

    # By its type: an object may answer for its class itself, and PyTorch has one that warns when it is asked.
    return [v for v in gc.get_objects() if issubclass(type(v), Autotuner)]


def _name(tuner: Any) -> str:
    return f"{tuner.base_fn.__module__}.{tuner.base_fn.__name__}"


def rivals(
    rank: int, b: int, t: int, backward: bool, limit_s: float, prepared: Prepared
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those that run here, warm, and why the others do not. limit_s: seconds each may take to be ready."""
    runs, left_out = {}, {}
    for rival in RIVALS:
        if rival.rank != rank:
            continue
        if t > rival.longest:
            left_out[rival.name] = f"asked for {rival.longest} tokens at most"
            continue
        if why := prepared.unready.get((rival.name, b, t, backward)):
            left_out[rival.name] = why
            continue
        try:
            with time_limit(limit_s):
                built = rival.build(b, t)
                shorten_tuning(finalists=prepared.finalists)
                contestant = passes(*built, backward)
                contestant.run()
                torch.cuda.synchronize()
            runs[rival.name] = contestant
        except torch.OutOfMemoryError:
            left_out[rival.name] = "the device's memory does not suffice"
        except failures() as error:
            left_out[rival.name] = f"{type(error).__name__}: {str(error).strip()[-300:]}"
        torch.cuda.empty_cache()
    return runs, left_out
