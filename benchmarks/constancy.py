"""Time and memory of one more token after many tokens and after few.

Two states of one model, at token `early` and at token `late`, are stepped in turns with the same tokens. The state has a
fixed size, so neither time nor memory should know which is which.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.checks import Check, agree
from benchmarks.results import Tell
from benchmarks.timer import race
from mamba3 import LMState, Mamba3Config, Mamba3LM

GOAL = 0.02


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A model of mixers alone, of the 180M models' width and depth."""

    early: int = 100
    late: int = 100_000
    chunk: int = 2048
    steps: int = 200
    d_model: int = 768
    layers: int = 12
    d_state: int = 128
    headdim: int = 64
    vocab_size: int = 32_000


def resident_bytes() -> int | None:
    """Memory that this process holds, once the C library has given back what is free; None where the system does not say.

    glibc keeps freed blocks of a prefill's working memory, more or fewer of them from one call to the next.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else None


def held_bytes(state: LMState) -> int:
    """What the state keeps alive: more than its own bytes when one of its tensors is a view of something larger."""
    tensors = (v for layer in state.layers for v in layer.tensors().values())
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in tensors}
    return sum(storages.values()) + state.tokens.nbytes


@torch.no_grad()
def measure(sizes: Sizes, tell: Tell) -> dict[str, Any]:
    """Seconds of a step, bytes of the state and of the process at both positions, and their ratios late over early."""
    torch.manual_seed(0)
    config = Mamba3Config(
        vocab_size=sizes.vocab_size, d_model=sizes.d_model, layers=("mamba3",) * sizes.layers, d_state=sizes.d_state,
        headdim=sizes.headdim,
    )  # fmt: skip
    model = Mamba3LM(config)
    ids = torch.randint(sizes.vocab_size, (1, sizes.late))
    token = torch.randint(sizes.vocab_size, (1,))
    _read(model, ids[:, : 2 * sizes.chunk], None, sizes.chunk)

    early = _read(model, ids[:, : sizes.early], None, sizes.chunk)
    late = early.clone()
    model.step(token, early.clone())
    resident = {"early": resident_bytes()}
    for start in range(sizes.early, sizes.late, sizes.chunk):
        tell(f"reading: token {start:,} of {sizes.late:,}")
        late = _read(model, ids[:, start : start + sizes.chunk], late, sizes.chunk)
    model.step(token, late.clone())
    resident["late"] = resident_bytes()
    assert late.tokens.item() == sizes.late

    tell(f"decoding at token {sizes.early:,} and at token {sizes.late:,}")
    held = {"early": held_bytes(early), "late": held_bytes(late)}
    checks = [_step_is_prefill(model, token, early, "early"), _step_is_prefill(model, token, late, "late")]
    result = race(
        {"early": lambda: model.step(token, early), "late": lambda: model.step(token, late)},
        lambda outputs: checks,
        sizes.steps,
    )
    ratio = result.ratio("late", "early")
    memory_ratio = None if not resident["early"] or not resident["late"] else resident["late"] / resident["early"]
    return {
        "early": sizes.early,
        "late": sizes.late,
        "early_s": result.seconds["early"].to_dict(),
        "late_s": result.seconds["late"].to_dict(),
        "ratio": ratio.to_dict(),
        "state_bytes": {"early": early.nbytes, "late": late.nbytes},
        "state_held_bytes": held,
        "resident_bytes": resident,
        "resident_ratio": memory_ratio,
        "goal": GOAL,
        "met": abs(ratio.median - 1) <= GOAL
        and held["late"] <= (1 + GOAL) * held["early"]
        and (memory_ratio is None or memory_ratio <= 1 + GOAL),
        "checks": [check._asdict() for check in result.checks],
    }


def _read(model: Mamba3LM, ids: torch.Tensor, state: LMState | None, chunk: int) -> LMState:
    state = model.init_state(1) if state is None else state
    for piece in ids.split(chunk, dim=1):
        _, state = model.prefill(piece, state, last_only=True)
    return state


def _step_is_prefill(model: Mamba3LM, token: torch.Tensor, state: LMState, name: str) -> Check:
    stepped, _ = model.step(token, state.clone())
    read, _ = model.prefill(token.unsqueeze(1), state)
    return agree(f"step = prefill of one token, {name}", stepped, read[:, 0], torch.float32)
