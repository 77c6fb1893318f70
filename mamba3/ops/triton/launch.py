"""Block sizes and launch parameters, by what the device has: a table, not a search."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


class Launch(NamedTuple):
    """Of one matrix stage: tokens a chunk, warps, how many chunks' loads are in flight, and whether the copy engine loads."""

    tokens: int
    num_warps: int
    stages: int
    bulk: bool = False
    registers: int | None = None


class Device(NamedTuple):
    """What the choice depends on."""

    multiprocessors: int
    shared_bytes: int
    nvidia: bool


def device_limits(device: torch.device) -> Device:
    """Limits of a CUDA or ROCm device; of the interpreter's imaginary one for a CPU."""
    if device.type != "cuda":
        return Device(4, 99 * 1024, False)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
    return Device(properties.multi_processor_count, shared, torch.version.hip is None)


def padded(size: int) -> int:
    """The smallest power of two that holds `size` and that a matrix product takes."""
    return max(16, triton.next_power_of_2(size))


def choose(limits: Device, dtype: torch.dtype, rank: int) -> Launch:
    """The fused pass and the summary. 64 rows fill a warp group's matrix instruction; float32 tiles take half as many."""
    rows = 32 if dtype == torch.float32 else 64
    return Launch(tokens=max(16, rows // triton.next_power_of_2(rank)), num_warps=4, stages=1)


def segment_programs(limits: Device, nheads: int) -> int:
    """Segments in all so that two programs run on each multiprocessor."""
    return max(1, 2 * limits.multiprocessors // nheads)
