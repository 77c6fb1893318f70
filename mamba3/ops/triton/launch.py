"""Block sizes and launch parameters, by what the device has: a table, not a search."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """Of one matrix stage: tokens a chunk, warps, how many chunks are in flight, and whether the copy engine loads."""

    tokens: int
    num_warps: int
    stages: int
    bulk: bool = False


class Device(NamedTuple):
    """What the choice depends on. capability is (0, 0) where the device is not NVIDIA's."""

    multiprocessors: int
    shared_bytes: int
    capability: tuple[int, int]
    memory_bytes: int = 80 * 2**30

    @property
    def nvidia(self) -> bool:
        return self.capability > (0, 0)


def device_limits(device: torch.device) -> Device:
    """Limits of a CUDA or ROCm device; of an imaginary one for the interpreter on a CPU."""
    if device.type != "cuda":
        return Device(multiprocessors=4, shared_bytes=99 * 1024, capability=(0, 0))
    return _limits(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _limits(index: int) -> Device:
    """Asked for at every launch: PyTorch takes 9 us to say what it knows."""
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
    capability = (0, 0) if torch.version.hip else torch.cuda.get_device_capability(index)
    return Device(properties.multi_processor_count, shared, capability, properties.total_memory)


def power_of_2(size: int) -> int:
    """The smallest power of two that holds `size` >= 1. Triton's own is a function of its language, and takes 7 us."""
    return 1 << (size - 1).bit_length()


def side_by_side(count: int, shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype) -> Sequence[Tensor]:
    """So many tensors of one shape that come and go together, in one piece of memory where their addresses stay multiples of
    16 bytes, which kernels are compiled for: an allocation takes the host longer than a view."""
    if math.prod(shape) * dtype.itemsize % 16:
        return [torch.empty(shape, device=device, dtype=dtype) for _ in range(count)]
    return torch.empty((count, *shape), device=device, dtype=dtype).unbind(0)


def cdiv(size: int, block: int) -> int:
    """Blocks that hold `size`; written out for the same reason."""
    return -(-size // block)


def padded(size: int) -> int:
    """The smallest power of two that holds `size` and that a matrix product takes."""
    return max(16, power_of_2(max(1, size)))


def piece(N: int, A: int) -> int:
    """Width of the pieces in which `channels` holds N channels with A rotated pairs."""
    return max(8, power_of_2(max(A, -(-(N - 2 * A) // 2), 1)))


def choose(limits: Device, dtype: torch.dtype, rank: int, bulk: bool) -> Launch:
    """The fused pass and the summary; `bulk` says whether sizes and addresses suit the bulk copy engine.

    64 rows fill a warp group's matrix instruction; float32 tiles take half as many. The next chunk is copied to shared
    memory while programs beside this one compute (two stages) where 88 KB are there for it; not in float32, whose time
    goes into products without matrix instructions. The copy engine is for one rank (with four it gains nothing: 1.84 against
    1.86 ms in batch, 2.37 against 2.30 on one sequence) and for Hopper, where it was measured.
    """
    tokens = max(16, (32 if dtype == torch.float32 else 64) // power_of_2(rank))
    ahead = limits.nvidia and limits.shared_bytes >= 96 * 1024 and dtype != torch.float32
    return Launch(
        tokens, num_warps=4, stages=2 if ahead else 1, bulk=ahead and bulk and rank == 1 and limits.capability[0] == 9
    )


class BackwardLaunch(NamedTuple):
    """Tokens a chunk; stages of `states_kernel`; of `gradient_bc_kernel` the channels that a program sums, and its stages."""

    tokens: int
    stages: int
    channels: int
    stages_bc: int


def choose_backward(limits: Device, dtype: torch.dtype, rank: int) -> BackwardLaunch:
    """The backward pass. 64 rows (32 in float32) need 112 KB of shared memory on Hopper and 66 on devices before it; where
    there is less, half as many.

    H200, (8, 2048), one rank: states 0.48 ms with two stages, 0.40 with three, for which two programs need 200 KB; gradient_bc
    0.34 and 0.24.
    """
    rows = 32 if dtype == torch.float32 or limits.shared_bytes < 96 * 1024 else 64
    ahead = limits.nvidia and limits.shared_bytes >= 96 * 1024 and dtype != torch.float32
    stages = (3 if limits.shared_bytes >= 200 * 1024 else 2) if ahead else 1
    return BackwardLaunch(max(16, rows // power_of_2(rank)), stages, 64, 3 if ahead else 1)


class Scratch(NamedTuple):
    """Bytes that the backward pass holds of chunk states, for each direction of time: of the whole batch, if they are no more
    than `whole`, else `part` at a time. And `piece` bytes of the rows of dB, and of those of dC."""

    whole: int
    part: int
    piece: int


def choose_scratch(limits: Device) -> Scratch:
    """Where the states of all sequences fit, none is cut that others keep company, and its states are made once instead of
    twice: H200, four ranks, (8, 2048): 11.6 ms with all 1 GiB, 13.8 with an eighth of it at a time. What does not fit is a
    long sequence, whose own tensors leave less room.
    """
    return Scratch(min(2**30, limits.memory_bytes // 64), 3 * 2**26, 2**28)


def segment_programs(limits: Device, nheads: int) -> int:
    """Segments in all, so that two programs, which is what registers allow, run on each multiprocessor."""
    return max(1, 2 * limits.multiprocessors // nheads)
