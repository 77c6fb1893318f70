"""Which of the assemblers that Triton brings compiles the kernels.

ptxas 12.8, which Triton 3.6 takes for Hopper (sm_90), miscompiles kernels of the backward pass: wrong sums, or addresses
that fault, in kernels that the same Triton's ptxas 12.9, and ptxas 12.8 without optimisation, compile rightly (seen on an
H100). Later versions of Triton take the newer one for Hopper themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from triton import knobs

FIRST_SOUND = (12, 9)
UNSET = object()


def _version(tool: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in tool.version.split("."))


@lru_cache
def _replacement(device: torch.device) -> Any:
    """The newer assembler, where the device is Hopper and the one that would be taken is too old."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    newer = getattr(knobs.nvidia, "ptxas_blackwell", None)
    if newer is None or _version(knobs.nvidia.ptxas) >= FIRST_SOUND or _version(newer) < FIRST_SOUND:
        return None
    return newer


def replaced(device: torch.device) -> bool:
    """Whether `sound_assembler` takes another assembler than Triton would."""
    return _replacement(device) is not None


@contextmanager
def sound_assembler(device: torch.device) -> Iterator[None]:
    """Kernels that are compiled inside are compiled by an assembler that is known to be right for them."""
    newer = _replacement(device)
    if newer is None:
        yield
        return
    # As knobs.nvidia.scope() does, which also reads and writes every variable of the environment: 60 us of each call.
    settings = vars(knobs.nvidia)
    before = settings.get("ptxas", UNSET)
    settings["ptxas"] = newer.path
    try:
        yield
    finally:
        settings.pop("ptxas")
        if before is not UNSET:
            settings["ptxas"] = before
