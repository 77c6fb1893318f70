# type: ignore  Triton's modules differ from version to version
"""Kernels that a call will need, compiled side by side before the first of them is launched.

A call launches its kernels one after another, and each is compiled when it is first launched: with an empty cache a training
step waits for the sum of a dozen compilations. Here the call is first gone through with tensors that have no data and with
launches that only compile, in threads: Triton's compiler leaves Python's lock free (its passes, LLVM and the assembler),
so that the wait is that of the longest, where there are cores.

Law: what a call compiles ahead is what it would compile itself, no less and no more; a second call of the same kind
compiles and goes through nothing; a kernel that does not compile says so where it is launched, as without.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import torch
from torch import Tensor
from triton.runtime import driver

try:  # Triton 3.5 and later
    from triton.runtime._async_compile import AsyncCompileMode, active_mode
except ImportError:
    AsyncCompileMode = active_mode = None

from mamba3.ops.triton.again import launcher
from mamba3.ops.triton.assembler import sound_assembler
from mamba3.ops.types import Gate, Inputs, State

MOST_THREADS = 16  # no call has more kernels that are worth a thread
_compiling_alone = ContextVar("compiling_alone", default=False)
_gone_through: set[tuple] = set()


def at(kernel, grid: tuple[int, ...]) -> Callable:
    """kernel[grid]; where a call is gone through ahead, what compiles the kernel for the arguments and launches nothing."""
    return functools.partial(kernel.warmup, grid=grid) if _compiling_alone.get() else launcher(kernel, grid)


def without_data(v: Tensor | None) -> Tensor | None:
    """A tensor of the same shape, strides and dtype that holds nothing."""
    return None if v is None else torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta")


def lengthened(inp: Inputs, gate: Gate, state: State | None, tokens: int) -> tuple[Inputs, Gate, State | None]:
    """The call of one sequence of so many tokens that would be made in the place of a call without data."""

    def longer(v: Tensor | None) -> Tensor | None:
        if v is None:
            return None
        token = v.stride(1)
        return torch.empty_strided(
            (1, tokens, *v.shape[2:]), (tokens * token, token, *v.stride()[2:]), dtype=v.dtype, device="meta"
        )

    of_tokens = {name: longer(getattr(inp, name)) for name in ("x", "dt", "A", "lam", "theta", "B", "C", "tick")}
    state = None if state is None else State(*(v[:1] for v in state[:4]))
    return inp._replace(**of_tokens), gate._replace(z=longer(gate.z)), state


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first_of_its_kind(inp: Inputs, gate: Gate, state: State | None, *more: bool) -> bool:
    """Whether no call yet was compiled for the same sizes and dtypes, lengths apart, and `more`; and it can be ahead.

    Never off a GPU, with one core, with a Triton that compiles in no threads, or inside an AsyncCompileMode of the caller's.
    """
    if inp.x.device.type != "cuda" or AsyncCompileMode is None:
        return False
    dtypes = tuple(None if v is None else v.dtype for v in (*inp, *gate[:3]))
    kind = (inp.x.device, dtypes, inp.x.shape[2:], inp.B.shape[2:], inp.theta.shape[-1], state is None, *more)
    if kind in _gone_through or active_mode.get() is not None or cores() == 1:
        return False
    _gone_through.add(kind)
    return True


@torch.no_grad()
def compile_side_by_side(inp: Inputs, gate: Gate, state: State | None, *passes: Callable) -> None:
    """Call each pass with inp, gate and state without data, and wait until what they launch is compiled."""
    with sound_assembler(inp.x.device):
        inp = Inputs(*map(without_data, inp))
        gate = Gate(*map(without_data, gate[:3]), gate.norm, without_data(gate.norm_weight))
        state = None if state is None else State(*map(without_data, state[:4]))
        # A kernel that fails is left to its launch, which compiles it again and raises what there is to raise.
        with ThreadPoolExecutor(min(MOST_THREADS, cores())) as pool:
            with AsyncCompileMode(pool, ignore_errors=True) as mode:
                before = _compiling_alone.set(True)
                try:
                    for each in passes:
                        each(inp, gate, state)
                finally:
                    _compiling_alone.reset(before)
                coming = list(mode.future_kernels.values())
            list(pool.map(build_launcher, [each.kernel for each in coming if each.kernel is not None]))


def build_launcher(kernel) -> None:
    """Let the C compiler make what launches a compiled kernel, which its first launch else waits for (half a second each);
    it is found again on disk. One that cannot be made says so at the launch."""
    build = getattr(driver.active, "launcher_cls", None)
    if build is not None:
        with contextlib.suppress(Exception):
            build(kernel.src, kernel.metadata)
