"""Memory of a process that reads a long text: the state's bytes and the process's, at chosen numbers of tokens.

`python -m mamba3.cli.memory MODEL TOKENS.npy 1000 200000` reads the tokens (repeated as often as needed) from one
state and prints a JSON list of [tokens read, bytes of the state, bytes of the process], one entry for each mark.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
import torch

from mamba3.lm import LMState, Mamba3LM

_PIECE = 500  # tokens read at a time


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM now; None where the system does not say (only Linux does).

    Free memory that the C library holds back for later, a few MiB that come and go, is given back to the system first.
    """
    pages = Path("/proc/self/statm")
    if not pages.is_file():
        return None
    import resource

    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if give_back is not None:
        give_back(0)
    return int(pages.read_text().split()[1]) * resource.getpagesize()


@torch.no_grad()
def measure(model: Mamba3LM, tokens: np.ndarray, marks: list[int]) -> list[tuple[int, int, int | None]]:
    """(tokens read, state bytes, resident bytes) at each mark; marks ascend.

    Ten times the first mark is read once before, from a state of its own: what libraries set aside when they are first
    used is not the memory of the tokens.
    """
    _read(model, model.init_state(1), tokens, 0, 10 * marks[0])
    state, read, found = model.init_state(1), 0, []
    for mark in marks:
        state, read = _read(model, state, tokens, read, mark), mark
        found.append((read, state.nbytes, resident_bytes()))
    return found


def _read(model: Mamba3LM, state: LMState, tokens: np.ndarray, start: int, end: int) -> LMState:
    for at in range(start, end, _PIECE):
        ids = np.take(tokens, range(at, min(at + _PIECE, end)), mode="wrap").astype(np.int64)
        _, state = model.prefill(torch.from_numpy(ids)[None], state, last_only=True)
    return state


def main() -> None:
    folder, tokens, *marks = sys.argv[1:]
    model = Mamba3LM.from_pretrained(folder).eval()
    found = measure(model, np.load(tokens), [int(mark) for mark in marks])
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
