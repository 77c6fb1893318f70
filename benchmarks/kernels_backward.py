"""Forward and backward of the Triton kernels on this GPU: `python -m benchmarks.kernels_backward`.

Runs only behind green checks: every gradient's error against float64 beside that of the chunked path in the same dtype.
Times are medians of CUDA-graph replays where the graph fits in memory, of launches from Python otherwise; peak memory
counts inputs, outputs and gradients.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernels import HEADDIM, HEADS, PAIRS, STATE, ceilings, error, graphed, inputs, interleaved, say
from mamba3 import ops

SHAPES = {
    1: [(8, 2048), (32, 2048), (1, 16384), (1, 131072), (128, 512), (1, 2048)],
    4: [(8, 2048), (1, 16384), (1, 131072), (128, 512)],
}


def gradients(values: dict[str, Tensor], dy: Tensor, impl: str) -> dict[str, Tensor]:
    """Of every argument, from that of y."""
    exact = impl == "reference"
    leaves = {name: (v.double() if exact else v.detach()).requires_grad_() for name, v in values.items()}
    y = ops.scan(**leaves, impl=impl).y
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype)), strict=True))


def checks(dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)) -> list[dict]:
    """Gradients against float64; the kernels may have twice the chunked path's error, and must repeat bit for bit."""
    rows = []
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    for dtype in dtypes:
        for r, b, t, h, p, n, a in (
            (1, 2, 65, 3, 24, 20, 5), (1, 1, 193, 2, 64, 128, 32), (3, 1, 64, 3, 24, 20, 5), (4, 1, 300, 4, 64, 128, 32),
            (1, 3, 1, 2, 64, 128, 32),
        ):  # fmt: skip
            values = inputs(b, t, r, dtype, h, p, n, a)
            dy = torch.randn_like(values["x_bthp"])
            truth, yardstick, ours, again = (
                gradients(values, dy, impl) for impl in ("reference", "chunked", "triton", "triton")
            )
            row = dict(dtype=str(dtype), rank=r, batch=b, tokens=t, heads=h, P=p, N=n, A=a)
            row["errors"] = {k: (error(ours[k], v), error(yardstick[k], v)) for k, v in truth.items()}
            row["bitwise"] = all(torch.equal(ours[k], again[k]) for k in ours)
            row["worst"] = max(ours_ / (2 * theirs + 3e-7) for ours_, theirs in row["errors"].values())
            row["ok"] = row["bitwise"] and row["worst"] <= 1
            rows.append(row)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    return rows


def moved_bytes(b: int, t: int, r: int) -> int:
    """Of forward and backward, each tensor once a pass: x, z twice read, y, dy, dx, dz; B, C and coefficients likewise."""
    token = 8 * HEADS * HEADDIM * 2 + 6 * r * STATE * 2 + 9 * HEADS * 4 + 3 * PAIRS * 4
    return b * t * token


def race(rate: float, shapes: dict[int, list[tuple[int, int]]], chunked: bool) -> list[dict]:
    """Forward and backward at the sizes of the 1.5B layer."""
    rows = []
    for r, sizes in shapes.items():
        for b, t in sizes:
            values = {k: v.requires_grad_() for k, v in inputs(b, t, r, torch.bfloat16).items()}
            leaves, dy = list(values.values()), torch.randn_like(values["x_bthp"])
            held = sum(v.nbytes for v in leaves) + dy.nbytes

            def train(impl="triton", values=values, leaves=leaves, dy=dy):
                y = ops.scan(**values, impl=impl).y
                return torch.autograd.grad(y, leaves, dy)

            train()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() - held
            train()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            contestants = {"triton": graphed(train, 1)}
            if b * t <= 16384:
                contestants["triton, launched from Python"] = train
            if chunked and b * t <= 16384:
                contestants["chunked"] = lambda train=train: train("chunked")
            times = interleaved(contestants)
            share = moved_bytes(b, t, r) / rate / 1e9 / times["triton"]["ms"]
            rows.append(dict(rank=r, batch=b, tokens=t, times=times, roofline=share, peak_GiB=peak))
            say(f"forward + backward R={r} ({b}, {t}): "
                + ", ".join(f"{k} {v['ms']:.3f} ms" for k, v in times.items())
                + f"; {share:.0%} of the copy rate; peak {peak:.2f} GiB")  # fmt: skip
            del contestants, train, values, leaves, dy
            torch.cuda.empty_cache()
    return rows


def profile(b: int, t: int, r: int) -> dict[str, float]:
    """Microseconds of each kernel in one forward and backward, launched from Python."""
    values = {k: v.requires_grad_() for k, v in inputs(b, t, r, torch.bfloat16).items()}
    leaves, dy = list(values.values()), torch.randn_like(values["x_bthp"])
    for _ in range(3):
        torch.autograd.grad(ops.scan(**values, impl="triton").y, leaves, dy)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(3):
            torch.autograd.grad(ops.scan(**values, impl="triton").y, leaves, dy)
        torch.cuda.synchronize()
    times = {e.key[:60]: e.self_device_time_total / 3 for e in seen.key_averages() if e.self_device_time_total}
    return dict(sorted(times.items(), key=lambda item: -item[1])[:14])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a JSON file; by default under benchmarks/results/")
    parser.add_argument("--chunked", action="store_true", help="time the PyTorch path too")
    parser.add_argument("--profile", action="store_true", help="only each kernel's time, at (8, 2048)")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    if options.profile:
        for r in SHAPES:
            say(f"(8, 2048) R={r}, microseconds: {json.dumps(profile(8, 2048, r), indent=1)}")
        return
    checked = checks()
    for row in checked:
        if not row["ok"]:
            say(f"CHECK FAILED {row}")
    if not all(row["ok"] for row in checked):
        raise SystemExit("The checks are red; nothing is timed.")
    say(f"{len(checked)} checks green on {device}")
    top = ceilings()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = dict(device=device, torch=torch.__version__, commit=commit, date=time.strftime("%Y-%m-%d"), checks=checked,
                  ceilings=top, training=race(top["copy_TBs"], SHAPES, options.chunked))  # fmt: skip
    name = f"{result['date']}-{device.replace(' ', '-')}-kernels-backward.json"
    out = options.out or Path(__file__).parent / "results" / name
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1))
    say(f"written to {out}")


if __name__ == "__main__":
    main()
