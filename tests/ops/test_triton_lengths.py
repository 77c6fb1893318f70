"""A new length compiles nothing: what Triton compiles for a launch depends on sizes, dtypes and what is present alone.

Told without a device, in a process of its own (`launches`), by the key that Triton looks compiled kernels up by.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")
# Neither is cut into segments nor is its copy engine's; one sequence that is; a batch for the copy engine; both.
FIRST = [(1, 1), (1, 4097), (8, 2048), (1, 16384)]
LENGTHS = [1, 63, 64, 65, 1000, 2048, 2049, 4097, 16384, 131072]
PACKS = [[0, 1, 2, 70, 149, 150], [0, 64, 128], [0, 2048, 16384], [0, 1000, 4097]]
# Of one mode and rank, in bfloat16, whatever the length; `bulk`: the copy engine's kernel beside it, with one rank.
VARIANTS = {
    "coefficients": 2,  # for the forward pass and for the backward
    "turns": 1, "phases": 1, "merge": 1, "last_token": 1, "reverse_merge": 1, "gradient_rows": 1, "gradient_bc": 1,
    "gradient_dt": 1,
    "states": 4,  # in both directions, and the summaries of segments
    "output": 1, "summary": 1,
}  # fmt: skip
BULK = {"output", "summary"}
MODES = [(state, last) for state in (False, True) for last in (False, True)]
CASES = ["siso", "mimo", "odd"]


def test_a_new_length_compiles_nothing():
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == CASES
    for case, told in found.items():
        assert not told["later"], case
        assert len(told["modes"]) == len(MODES)
        for mode in told["modes"]:
            assert mode == {name: n + (case == "siso" and name in BULK) for name, n in VARIANTS.items()}, case
        assert set(told["decode"].values()) == {1}, case


def report(case: str) -> dict:
    """Of one case: kernels compiled for each mode, those that only later lengths need, those of the decode step."""
    import torch

    from tests.ops import launches
    from tests.ops.launches import Sizes, compiled, scan

    launches.imagine()
    sizes = {"siso": Sizes(), "mimo": Sizes(r=4), "odd": Sizes(r=3, h=3, p=24, n=20, a=5)}[case]

    def forget():
        for entry in compiled:
            entry.kernel.device_caches.clear()
        compiled.clear()

    modes, later = [], []
    for state, last in MODES:
        forget()
        for b, t in FIRST:
            scan(b, t, sizes, state=state, last=last)
        modes.append(Counter(entry.name for entry in compiled))
        known = len(compiled)
        for t in LENGTHS:
            for b in (1, 8) if t < 100_000 else (1,):
                scan(b, t, sizes, state=state, last=last)
        for cu_seqlens in PACKS:
            scan(1, cu_seqlens[-1], sizes, cu_seqlens=cu_seqlens, state=state, last=last)
        later += [entry.name for entry in compiled[known:]]
    forget()
    decode(sizes, torch)
    return {"modes": modes, "later": later, "decode": Counter(entry.name for entry in compiled)}


def decode(s, torch) -> None:
    """A layer's step for several numbers of sequences."""
    from mamba3.ops.triton.decode import Parameters, decode
    from mamba3.ops.types import State

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, device="meta", dtype=dtype)

    vectors = [empty(s.h, s.r, s.n) for _ in range(2)]
    mimo = [empty(s.h, s.r, s.p) if s.r > 1 else None for _ in range(3)]
    parameters = Parameters(
        empty(s.h), empty(s.n), empty(s.n), *vectors, *mimo, empty(s.h), ngroups=s.g, rank=s.r, decay="softplus",
        A_floor=1e-4, lam=None,
    )  # fmt: skip
    width = 2 * s.h * s.p + 2 * s.r * s.g * s.n + 3 * s.h + s.a
    for b in (1, 2, 3, 8, 17, 128):
        state = State(
            empty(b, s.h, s.a), empty(b, s.h, s.p, s.n), empty(b, s.r, s.h, s.n, dtype=torch.bfloat16),
            empty(b, s.h, s.p, dtype=torch.bfloat16),
        )  # fmt: skip
        decode(empty(b, width, dtype=torch.bfloat16), parameters, state)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    print(json.dumps({case: report(case) for case in CASES}))  # noqa: T201
