"""Kernels of other projects at the sizes of `kernel_sizes`, where they can be imported; called as their authors call them.

Their results are timed and not checked: random inputs in the ranges their models feed them. Each tunes itself before it is
timed, among `candidates` of its authors' grid, which processes of `kernel_jobs` have compiled by then. All are compiled by the
assembler that ours take: on Hopper their backward passes too may be wrong with Triton 3.6's own. One that cannot be built or
run, or not in time, is left out, and the results say why.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compilation import time_limit
from benchmarks.cuda import Contestant
from benchmarks.kernel_sizes import HEADDIM, HEADS, PAIRS, STATE
from mamba3.ops.triton.assembler import replaced, sound_assembler

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


def compile_official_mimo(kernel: str, b: int, t: int) -> None:
    """One of MIMO_KERNELS for a shape, into TileLang's own cache; needs a CUDA compiler and no GPU."""
    from mamba_ssm.ops.tilelang.mamba3 import mamba3_mimo_bwd, mamba3_mimo_fwd  # type: ignore[import-not-found]

    # batch, tokens, heads, groups, state, channels, rank; z, D and mimo_o are given; no norm
    given = (b, t, HEADS, 1, STATE, HEADDIM, 4, True, True, True, False)
    if kernel == "forward":
        mamba3_mimo_fwd.mamba_mimo_fwd(*given, chunk_size=16, rotary_dim_divisor=4, dtype="bfloat16")
    elif kernel == "states of the backward pass":
        mamba3_mimo_bwd.mamba_mimo_bwd_fwd(*given, 16, 4, "bfloat16", 1e-5, 128, 0, states_dtype=torch.bfloat16)
    else:
        mamba3_mimo_bwd.mamba_mimo_bwd_bwd(*given, 16, 4, "bfloat16", 256, 0, states_dtype=torch.bfloat16)


def gated_delta_rule(b: int, t: int) -> Built:
    """flash-linear-attention's gated delta rule as the paper sizes it, 16 heads with keys of 128 and values of 256: a state
    of the same size, and the same inner width. It refuses its backward pass on Hopper under Triton 3.4 to 3.7.0, whose
    assembler is at fault; where `sound_assembler` replaces that, the refusal is lifted."""
    from fla.ops.common import chunk_o  # type: ignore[import-not-found]
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found]

    if replaced(torch.device("cuda")):
        chunk_o.TRITON_ABOVE_3_7_1 = True

    q, k = (F.normalize(_normal(b, t, 16, 128), dim=-1) for _ in range(2))
    g, beta = -0.1 * _uniform(b, t, 16), _uniform(b, t, 16).bfloat16()
    return (lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g=g, beta=beta)[0]), [
        q, k, _normal(b, t, 16, 256), g, beta,
    ]  # fmt: skip


# What the official MIMO compiles anew for every shape, the longest first; its forward pass needs the last alone.
MIMO_KERNELS = ("backward", "states of the backward pass", "forward")


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
    Rival("Mamba-2", mamba2, 1, 131072, 6),
    Rival("gated delta rule", gated_delta_rule, 1, 131072, 6),
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


Unready = Mapping[tuple[str, int, int, bool], str]  # why a rival is not ready at a shape, forward or backward too
CANDIDATES = 12


def candidates(configs: list[Any]) -> list[Any]:
    """At most CANDIDATES of an authors' grid, spread over it, and of those that cap registers the uncapped ones. Only the
    official SISO's grids are longer: 27 to 81 configurations a kernel, a third of which cap at 256, which is no cap."""
    plain = [c for c in configs if c.maxnreg is None] or configs
    most = min(len(plain), CANDIDATES)
    return [plain[i * len(plain) // most] for i in range(most)]


def once(kernel: Callable[[], object], quantiles: tuple[float, ...]) -> list[float]:
    """In the place of a measurement: what is called is compiled."""
    kernel()
    return [0.0] * len(quantiles)


def shorten_tuning(part: int = 0, parts: int = 1, measure: bool = True) -> None:
    """Autotuners that exist try `candidates`, or every `parts`-th of them, for 10 ms each instead of 100, or call each once."""
    from triton.testing import do_bench

    for tuner in _autotuners():
        # Autotuner has no public way to say so later.
        tuner._do_bench = functools.partial(do_bench, warmup=2, rep=10) if measure else once
        chosen = candidates(tuner.configs)
        tuner.configs = chosen[part::parts] or chosen[:1]


def winners() -> dict[str, str]:
    """What each autotuner that has run found best, by kernel."""
    return {
        _name(tuner): "; ".join(sorted(set(map(str, tuner.cache.values())))) for tuner in _autotuners() if tuner.cache
    }


def _autotuners() -> list[Any]:
    from triton.runtime.autotuner import Autotuner

    # By its type: an object may answer for its class itself, and PyTorch has one that warns when it is asked.
    return [v for v in gc.get_objects() if issubclass(type(v), Autotuner)]


def _name(tuner: Any) -> str:
    return f"{tuner.base_fn.__module__}.{tuner.base_fn.__name__}"


def rivals(
    rank: int, b: int, t: int, backward: bool, limit_s: float, unready: Unready
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those that run here, warm, and why the others do not. limit_s: seconds each may take to be ready."""
    runs, left_out = {}, {}
    for rival in RIVALS:
        if rival.rank != rank:
            continue
        if t > rival.longest:
            left_out[rival.name] = f"asked for {rival.longest} tokens at most"
            continue
        if why := unready.get((rival.name, b, t, backward)):
            left_out[rival.name] = why
            continue
        try:
            with time_limit(limit_s), sound_assembler(torch.device("cuda")):
                built = rival.build(b, t)
                shorten_tuning()
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
