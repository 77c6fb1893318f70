"""What a pass launches, and what Triton would compile for it, without a device: on tensors without data.

For processes of their own, in which kernels are not defined for the interpreter. `compiled` has an entry for each kernel
that Triton would compile: what it finds new in a launch's signature, constants, alignments and options.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mamba3.ops.triton import backward, decode, few_rows, forward, library
from mamba3.ops.triton.launch import Device
from mamba3.ops.types import Gate, Inputs, State

H100 = Device(multiprocessors=132, shared_bytes=227 * 1024, capability=(9, 0))


class Sizes(NamedTuple):
    """Letters as everywhere."""

    r: int = 1
    h: int = 64
    p: int = 64
    n: int = 128
    a: int = 32
    g: int = 1


class Entry(NamedTuple):
    """What Triton would compile, as its ASTSource takes it."""

    kernel: Any
    signature: dict
    constants: dict
    options: Any
    attributes: dict

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")


launchers: list[Any] = []  # of which compiled kernels a launcher was made


class _Imagined:
    """A driver of one H100 that nobody calls."""

    def launcher_cls(self, src, metadata):
        launchers.append(metadata)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")


class Launched:
    """A compiled kernel that does nothing."""

    function = packed_metadata = src = None

    @property
    def metadata(self):
        return self

    def run(self, *_):
        pass

    def launch_metadata(self, *_):
        pass


compiled: list[Entry] = []


def _record(self, key, signature, device, constexprs, options, attrs, warmup):
    compiled.append(Entry(self, signature, constexprs, options, attrs))
    self.device_caches[device][0][key] = Launched()
    return self.device_caches[device][0][key]


def imagine(*, recorded: bool = True) -> None:
    """From here on an H100 is imagined and, where `recorded`, nothing compiled."""
    driver.set_active(_Imagined())
    if recorded:
        JITFunction._do_compile = _record
    for module in (decode, few_rows, library):
        module.device_limits = lambda _: H100


def arguments(b: int, t: int, s: Sizes, dtype=torch.bfloat16, sequences: int | None = None):
    """Inputs, gate and the state before `sequences` (None: no state), as a layer hands them over: z and x columns of one
    projection."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, device="meta", dtype=dtype)

    z, x = empty(b, t, 2 * s.h * s.p, dtype=dtype).unflatten(-1, (2 * s.h, s.p)).chunk(2, dim=2)
    vectors = [empty(b, t, s.r, s.g, s.n, dtype=dtype) for _ in range(2)]
    mimo = [empty(s.h, s.r, s.p) if s.r > 1 else None for _ in range(3)]
    scalars = [empty(b, t, s.h) for _ in range(3)]
    biases = [empty(s.h, s.r, s.n) for _ in range(2)]
    inp = Inputs(x, *scalars, empty(b, t, s.a), *vectors, *biases, mimo[0], empty(s.h))
    state = None
    if sequences is not None:
        state = State(
            empty(sequences, s.h, s.a), empty(sequences, s.h, s.p, s.n),
            empty(sequences, s.r, s.h, s.n, dtype=dtype), empty(sequences, s.h, s.p, dtype=dtype),
        )  # fmt: skip
    return inp, Gate(z, *mimo[1:]), state


def scan(
    b: int,
    t: int,
    s: Sizes,
    *,
    dtype=torch.bfloat16,
    cu_seqlens: list[int] | None = None,
    state: bool = False,
    last: bool = False,
    gradients: bool = True,
) -> None:
    """Forward and, with `gradients`, backward; `last`: the last state has gradients too. And the state alone of a batch."""
    sequences = b if cu_seqlens is None else len(cu_seqlens) - 1
    inp, gate, given = arguments(b, t, s, dtype, sequences if state else None)
    out = forward.scan(inp, gate, given, cu_seqlens, limits=H100)
    if cu_seqlens is None:
        forward.final_state(inp, given, limits=H100)
    if gradients:
        ends = backward.LastState(*out.state[:4]) if last else backward.LastState()
        backward.backward(inp, gate, given, cu_seqlens, torch.empty_like(out.y), ends, limits=H100)
