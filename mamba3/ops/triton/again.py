# type: ignore  Triton's modules differ from version to version
"""Launches of what was launched before, without what Triton works out anew each time.

At every launch Triton binds some forty arguments to names, says of each what kernels are compiled for, makes a text of that,
and looks the kernel up by it. Here the compiled kernel is remembered by the same facts, and called by addresses: the driver is
not asked again whether an address is one of the device's.

Law: what is launched is what Triton would launch. The facts are those of Triton on NVIDIA's devices: dtype and alignment of a
tensor, whether a number is 1 or a multiple of 16, and every constant and option. Whatever is not told by them
goes the way through Triton: another kind of argument, AMD's devices, hooks, tensors on two devices, a kernel whose cache was
cleared. A setting of Triton's environment that changes what is compiled counts until a kernel's first launch.

Off unless MAMBA3_REMEMBER_LAUNCHES=1: held to Triton's own path without a device (`tests/ops/test_triton_again.py`), and not
yet run on one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

REMEMBERS = os.environ.get("MAMBA3_REMEMBER_LAUNCHES") == "1"
PLAIN = frozenset((Tensor, torch.nn.Parameter))  # what has an address; a subclass may have none
BYTES = 16  # an address that is a multiple of them is what kernels are compiled for
NUMBER = ("number", "multiple of 16")


class Known(NamedTuple):
    """A kernel that was launched. caches: Triton's own of it; rest: what follows the arguments at a launch."""

    caches: Any
    run: Callable
    function: Any
    metadata: Any
    rest: tuple


_known: dict[tuple, Known] = {}


def launcher(kernel, grid: tuple[int, ...]) -> Callable:
    """kernel[grid]: its arguments in order, its constants and options by name."""
    # An interpreted kernel is none of Triton's JIT functions.
    return functools.partial(_launch, kernel, grid) if REMEMBERS and isinstance(kernel, JITFunction) else kernel[grid]


def _launch(kernel, grid, *arguments, **constants) -> None:
    active = driver.active
    device = active.get_current_device()
    told, values = _told(arguments)
    if told is None:
        kernel[grid](*arguments, **constants)
        return
    key = (id(kernel), device, *told, *constants, *constants.values())
    known = _known.get(key)
    if known is None or known.caches is not kernel.device_caches.get(device) or _watched(kernel):
        compiled = kernel[grid](*arguments, **constants)
        _remember(key, kernel, device, compiled, len(arguments), constants)
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    known.run(x, y, z, stream, known.function, known.metadata, None, None, None, *values, *known.rest)


def _told(arguments: tuple) -> tuple[list | None, list]:
    """The facts about arguments that kernels are compiled for, None where there are others; and the arguments as numbers."""
    told, values, place = [], [], None
    for v in arguments:
        kind = type(v)
        if kind in PLAIN:
            where, address = v.get_device(), v.data_ptr()
            if place is None:
                place = where
                told.append(where)
            elif where != place:
                return None, values
            told.append(v.dtype if not address % BYTES else (v.dtype,))
            values.append(address)
        elif v is None:
            told.append(None)
            values.append(None)
        elif kind is int and -(2**31) <= v < 2**31:
            told.append(1 if v == 1 else NUMBER[v % 16 == 0])
            values.append(v)
        elif kind is float:
            told.append(kind)
            values.append(v)
        else:
            return None, values
    return told, values


def _watched(kernel) -> bool:
    """Whether somebody has asked Triton to be told of launches, or of compilations."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    hooks = getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks
    return bool(hooks) or getattr(runtime, "add_stages_inspection_hook", None) is not None


def _remember(key: tuple, kernel, device: int, compiled, count: int, constants: dict) -> None:
    """Keep what a launch with `count` arguments found, if the facts in `key` are all that it depends on."""
    rest = kernel.params[count:]
    numbered = any(p.is_constexpr for p in kernel.params[:count]) or any(p.name not in constants for p in rest)
    if numbered or driver.active.get_current_target().backend != "cuda":
        return
    _known[key] = Known(
        kernel.device_caches[device], compiled.run, compiled.function, compiled.packed_metadata,
        tuple(constants[p.name] for p in rest),
    )  # fmt: skip
