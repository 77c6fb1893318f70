"""The Triton kernels on this GPU: `mamba3 bench kernels` in a checkout. Runs only behind green checks; JSON and a plot.

Contestants take turns within each round, so that a clock that drifts drifts for all. Times are medians of CUDA events, with
the quarter points; `roofline` is the larger of two floors, bytes over the copy rate and products over the matrix rate, both
rates measured in the same run, divided by the time. `cold` is the first result on an empty cache of compiled kernels.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.plots import draw_kernels
from benchmarks.rivals import rivals
from mamba3 import ops
from mamba3.nn.mixer import Mamba3
from mamba3.ops.types import State

HEADS, HEADDIM, STATE, PAIRS = 64, 64, 128, 32
FORWARD = {
    1: [(8, 2048), (32, 2048), (1, 16384), (1, 131072), (128, 512), (1, 2048)],
    4: [(8, 2048), (1, 16384), (128, 512)],
}
DECODE = (1, 8, 32, 128, 512)


def inputs(b: int, t: int, r: int, dtype: torch.dtype, h=HEADS, p=HEADDIM, n=STATE, a=PAIRS) -> dict[str, torch.Tensor]:
    """Arguments of `scan` as a layer makes them: dt log-uniform in [1e-3, 1e-1], biases about 1."""
    new = dict(device="cuda", dtype=torch.float32)

    def normal(*shape):
        return torch.randn(*shape, **new)

    values = dict(
        x_bthp=normal(b, t, h, p).to(dtype), dt_bth=1e-3 * 100 ** torch.rand(b, t, h, **new),
        A_bth=-(0.5 + 4 * torch.rand(b, t, h, **new)), lam_bth=torch.rand(b, t, h, **new),
        theta_bta=3.14 * normal(b, t, a).tanh(), B_btrgn=normal(b, t, r, 1, n).to(dtype),
        C_btrgn=normal(b, t, r, 1, n).to(dtype), B_bias_hrn=1 + 0.3 * normal(h, r, n), C_bias_hrn=1 + 0.3 * normal(h, r, n),
        D_h=normal(h), z_bthp=normal(b, t, h, p).to(dtype),
    )  # fmt: skip
    if r > 1:
        values |= {name: 1 / r + 0.3 * normal(h, r, p) for name in ("mimo_x_hrp", "mimo_z_hrp", "mimo_o_hrp")}
    return values


def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error in the Frobenius norm; NaN compares as wrong."""
    return float((ours.double() - truth).norm() / truth.norm())


@torch.no_grad()
def checks() -> list[dict]:
    """y and S against float64, beside the chunked path's error in the same dtype; the kernels may have twice that."""
    rows = []
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for r, b, t, h, p, n, a in (
            (1, 2, 65, 3, 24, 20, 5), (1, 1, 4097, 2, 64, 128, 32), (3, 1, 64, 3, 24, 20, 5), (4, 1, 300, 2, 64, 128, 32),
            (1, 3, 1, 2, 64, 128, 32), (2, 1, 63, 2, 64, 128, 64), (1, 1, 130, 2, 64, 128, 0),
        ):  # fmt: skip
            values = inputs(b, t, r, dtype, h, p, n, a)
            truth, yardstick, ours, again = (
                ops.scan(**values, impl=impl) for impl in ("reference", "chunked", "triton", "triton")
            )
            row = dict(dtype=str(dtype), rank=r, batch=b, tokens=t, P=p, N=n, A=a, bitwise=torch.equal(ours.y, again.y))
            for name, pick in (("y", lambda o: o.y), ("S", lambda o: o.state.S)):
                row[name], row[name + "_chunked"] = error(pick(ours), pick(truth)), error(pick(yardstick), pick(truth))
            row["ok"] = row["bitwise"] and all(row[v] <= 2 * row[v + "_chunked"] + 3e-7 for v in ("y", "S"))
            rows.append(row)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    return rows


def interleaved(contestants: dict[str, Callable[[], object]], rounds: int = 9) -> dict[str, dict[str, float]]:
    """Median and quarter points in milliseconds; a contestant that runs out of memory is left out."""
    times = {}
    for name, run in contestants.items():
        try:
            for _ in range(2):
                run()
            torch.cuda.synchronize()
            times[name] = []
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    for _ in range(rounds):
        for name in times:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            contestants[name]()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop))
    quartiles = {name: statistics.quantiles(v, n=4) for name, v in times.items()}
    return {name: dict(ms=q[1], low=q[0], high=q[2]) for name, q in quartiles.items()}


def ceilings() -> dict[str, float]:
    """Copy rate in TB/s and bf16 matrix rate in TFLOP/s, measured."""
    a, m = torch.randn(2**28, device="cuda"), torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    t = interleaved({"copy": lambda: b.copy_(a), "matmul": lambda: m @ m}, rounds=10)
    return dict(copy_TBs=2 * a.nbytes / t["copy"]["ms"] / 1e9, matmul_TFLOPs=2 * 8192**3 / t["matmul"]["ms"] / 1e9)


def forward_bytes(b: int, t: int, r: int) -> int:
    """x, z, y, B, C, dt, A, lam, theta and the final state, each moved once."""
    token = 3 * HEADS * HEADDIM * 2 + 2 * r * STATE * 2 + 3 * HEADS * 4 + PAIRS * 4
    return b * t * token + b * HEADS * HEADDIM * STATE * 4


def forward_flops(b: int, t: int, r: int) -> int:
    """Scores, values, read-out and state of chunks of 64 rows: 4 products of 64 rows a token and rank."""
    return b * t * r * HEADS * 2 * (64 * STATE + 64 * HEADDIM + 2 * HEADDIM * STATE)


COLD = """
import time, torch
from benchmarks.kernels import inputs
from mamba3 import ops
times = []
for t in (2048, 2049, 4096):
    values = inputs(1, t, {rank}, torch.bfloat16)
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        ops.scan(**values, impl="triton")
    torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
print(*times)
"""


def cold_starts() -> list[dict]:
    """Seconds to the first result in a fresh process with an empty cache, and then at two lengths it has not seen."""
    rows = []
    for rank in FORWARD:
        with tempfile.TemporaryDirectory() as cache:
            code, env = COLD.format(rank=rank), os.environ | {"TRITON_CACHE_DIR": cache}
            done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"The cold start failed: {done.stderr[-500:]}")
        first, odd, longer = (float(v) for v in done.stdout.split()[-3:])
        rows.append(dict(rank=rank, first_s=first, odd_length_s=odd, longer_s=longer))
        say(f"cold start R={rank}: {first:.1f} s, then {odd:.2f} s at an odd length and {longer:.2f} s at a longer one")
    return rows


@torch.no_grad()
def forward(top: dict[str, float], chunked: bool) -> list[dict]:
    """The fused forward at the sizes of the 1.5B layer."""
    rows = []
    for r, shapes in FORWARD.items():
        for b, t in shapes:
            values = inputs(b, t, r, torch.bfloat16)
            eager = lambda v=values: ops.scan(**v, impl="triton")  # noqa: E731
            contestants = {"triton": graphed(eager, 1), "triton, launched from Python": eager}
            if chunked and b * t <= 16384:
                contestants["chunked"] = lambda v=values: ops.scan(**v, impl="chunked")
            others, left_out = rivals(r, b, t)
            contestants |= others
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            eager()
            peak = torch.cuda.max_memory_allocated() - before
            times = interleaved(contestants)
            floors = forward_bytes(b, t, r) / top["copy_TBs"] / 1e9, forward_flops(b, t, r) / top["matmul_TFLOPs"] / 1e9
            share = max(floors) / times["triton"]["ms"]
            rows.append(dict(rank=r, batch=b, tokens=t, times=times, left_out=left_out, floor_bytes_ms=floors[0],
                             floor_products_ms=floors[1], roofline=share, peak_GiB=peak / 2**30))  # fmt: skip
            say(f"forward R={r} ({b}, {t}): " + ", ".join(f"{k} {v['ms']:.3f} ms" for k, v in times.items())
                + f"; {share:.0%} of the roofline; peak {peak / 2**30:.2f} GiB")  # fmt: skip
    return rows


def graphed(run: Callable[[], object], repeats: int = 20) -> Callable[[], object]:
    """`repeats` calls as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    return graph.replay


@torch.no_grad()
def decode(rate: float) -> list[dict]:
    """One step of the 1.5B layer, projections included, in a CUDA graph."""
    rows = []
    for r in (1, 4):
        layer = Mamba3(2048, d_state=STATE, headdim=HEADDIM, mimo_rank=r, device="cuda", dtype=torch.bfloat16)
        for b in DECODE:
            for kept in (torch.float32, torch.float16, torch.bfloat16)[: 3 if r == 1 else 2]:
                state = State(*(torch.randn_like(v) for v in layer.init_state(b)[:4]))
                state, u = state._replace(S=state.S.to(kept)), torch.randn(b, 2048, device="cuda", dtype=torch.bfloat16)
                row = layer.in_proj(u)
                runs = {
                    "layer": graphed(lambda layer=layer, u=u, state=state: layer.step(u, state)),
                    "kernel": graphed(lambda layer=layer, row=row, state=state: layer._decode(row, state)),
                }
                times = {k: v["ms"] / 20 for k, v in interleaved(runs).items()}
                floor = (2 * state.S.nbytes + layer.in_proj.weight.nbytes + layer.out_proj.weight.nbytes) / rate / 1e9
                rows.append(dict(rank=r, batch=b, state=str(kept), floor=floor, **times))
                say(f"decode R={r} B={b} {str(kept)[6:]}: layer {times['layer']:.4f} ms, kernel {times['kernel']:.4f}, "
                    f"floor {floor:.4f}")  # fmt: skip
    return rows


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def run(folder: Path, chunked: bool = True) -> Path:
    """All measurements, written to <date>-<device>-kernels.json and .png in `folder`.

    Raises ValueError where there is no CUDA device or a check is red; then nothing is timed.
    """
    if not torch.cuda.is_available():
        raise ValueError("the kernels' benchmark needs a CUDA device, and torch finds none here; run it on a GPU.")
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    checked = checks()
    red = [row for row in checked if not row["ok"]]
    if red:
        raise ValueError(f"{len(red)} checks are red, so nothing is timed; the first: {red[0]}")
    say(f"{len(checked)} checks green on {device}")
    top = ceilings()
    say(f"ceilings: {top}")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = dict(device=device, torch=torch.__version__, commit=commit, date=time.strftime("%Y-%m-%d"), checks=checked,
                  ceilings=top, cold=cold_starts())  # fmt: skip
    result["forward"] = forward(top, chunked)
    result["decode"] = decode(top["copy_TBs"])
    out = folder / f"{result['date']}-{device.replace(' ', '-')}-kernels.json"
    folder.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    draw_kernels(result["forward"], out.with_suffix(".png"))
    say(f"written to {out.name} and {out.with_suffix('.png').name}")
    return out
