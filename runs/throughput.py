"""What a training step costs: tokens/s, host time, memory and the first step's seconds of each kind at several batch sizes.

    python runs/throughput.py --out throughput.json --kinds mamba3-siso transformer --micro-tokens 16384 65536     # a GPU
    python runs/throughput.py --out smoke.json --quick                                  # that it runs, on a CPU

A step is a forward and a backward pass over rows of --seq-len random tokens, clipping and AdamW, as the trainer takes it.
`host_seconds` is how long the processor needs to launch it: where that is near `seconds`, the GPU waits. `first_seconds` is
the first step, which compiles. --graph also captures forward and backward as one CUDA graph: what the GPU alone takes.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from contestants import KINDS, MAIN, Contestant, Size, sound_kernels, why_not
from ship import shape as shape_that_ships

from mamba3 import Mamba3LM
from mamba3.cli.train import model_config
from mamba3.ops import triton as kernels
from mamba3.ops.state_file import replace_file
from mamba3.train import TrainConfig
from mamba3.train.objective import Objective
from mamba3.train.optim import build_optimizer
from mamba3.train.packing import Batch
from mamba3.train.recipes import RECIPES, recipe

SHIPS = {"ship-siso": 1, "ship-mimo": 4}
PLANS = {f"recipe-{name}": name for name in RECIPES if name != "laptop"}
VOCABULARY = 8192
QUICK = Size(vocab_size=64, d_model=32, layers=2, inner=64, headdim=16, d_state=8)


def build(kind: str, quick: bool) -> Any:
    """A contestant of runs/compare.py, the model of runs/ship.py or that of a recipe of `mamba3 train`."""
    if kind in PLANS:
        chosen = recipe(PLANS[kind])
        return Mamba3LM(model_config(64 if quick else chosen.train.vocab_size or VOCABULARY, chosen.model))
    if kind in SHIPS:
        return Mamba3LM(shape_that_ships(64 if quick else VOCABULARY, SHIPS[kind], quick))
    return Contestant(kind, QUICK if quick else Size(vocab_size=VOCABULARY))


def synchronized(device: torch.device) -> float:
    """Now, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(kind: str, tokens: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One kind at one number of tokens a step."""
    began = time.perf_counter()
    torch.compiler.reset()  # what was compiled for another number of tokens would be compiled again for any number
    torch.manual_seed(0)
    model = build(kind, options.quick).to(device)
    if not options.eager:
        model.compile_around_scan()
    config = TrainConfig(seq_len=options.seq_len, batch_tokens=tokens, dtype=options.dtype)
    objective, optimizer = Objective(model, getattr(torch, options.dtype)), build_optimizer(model, config)
    ids = torch.randint(64 if options.quick else VOCABULARY, (tokens // options.seq_len, options.seq_len + 1))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].flatten(), None).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, hosts = [], []
    for _ in range(options.warm_up + options.steps):
        start = synchronized(device)
        objective(batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        hosts.append(time.perf_counter() - start)
        times.append(synchronized(device) - start)
    timed = times[options.warm_up :]
    seconds = statistics.median(timed)
    row = {
        "kind": kind, "micro_tokens": tokens, "seq_len": options.seq_len, "impl": options.impl, "eager": options.eager,
        "tokens_per_second": tokens / seconds, "seconds": seconds, "fastest_and_slowest": [min(timed), max(timed)],
        "host_seconds": statistics.median(hosts[options.warm_up :]), "first_seconds": times[0], "second_seconds": times[1],
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }  # fmt: skip
    if options.graph and device.type == "cuda":
        row |= graphed(objective, batch, options.steps)
    return row | {"all_seconds": time.perf_counter() - began}


def graphed(objective: Objective, batch: Batch, steps: int) -> dict[str, Any]:
    """Seconds of forward and backward as one CUDA graph, or why they cannot be captured."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                objective(batch)[0].backward()
        torch.cuda.current_stream().wait_stream(stream)
        objective.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            objective(batch)[0].backward()
        times = []
        for _ in range(steps):
            start = synchronized(torch.device("cuda"))
            graph.replay()
            times.append(synchronized(torch.device("cuda")) - start)
        return {"graph_seconds": statistics.median(times)}
    except Exception as error:  # noqa: BLE001  # whatever it is, it is what is to be known
        torch.cuda.synchronize()
        return {"graph_failed": str(error)[:500]}


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("throughput.json"), help="rows are added to those it holds")
    parser.add_argument("--kinds", nargs="+", choices=(*SHIPS, *PLANS, *KINDS), default=(*SHIPS, *MAIN))
    parser.add_argument("--micro-tokens", nargs="+", type=int, default=[16_384, 65_536])
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument(
        "--impl",
        choices=("auto", "triton", "chunked"),
        default="auto",
        help="of Mamba-3's scan while gradients are recorded",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--graph", action="store_true", help="also time forward and backward as a CUDA graph")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before the timed ones, two at least")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that all of it runs")
    options = parser.parse_args()
    if options.quick:
        options.micro_tokens, options.seq_len, options.dtype, options.eager, options.steps = (
            [128],
            32,
            "float32",
            True,
            2,
        )
    return options


def main() -> None:
    options = options_of()
    device = torch.device(options.device)
    if options.impl != "auto":
        kernels.TRAINS = kernels.DTYPES if options.impl == "triton" else ()
    rows = json.loads(options.out.read_text())["rows"] if options.out.is_file() else []
    for kind in options.kinds:
        for tokens in options.micro_tokens:
            reason = why_not(kind, device)
            if reason is not None:
                sys.stdout.write(f"{kind} is left out: {reason}.\n")
                break
            try:
                with sound_kernels(kind, device):
                    row = measure(kind, tokens, options, device)
            except Exception as error:  # noqa: BLE001  # another kind's or size's failure is a result too
                traceback.print_exc()
                row = {"kind": kind, "micro_tokens": tokens, "impl": options.impl, "failed": str(error)[:500]}
            gpu = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
            rows.append(row | {"device": gpu, "torch": torch.__version__, "quick": options.quick})
            replace_file(options.out, (json.dumps({"rows": rows}, indent=1) + "\n").encode())
            sys.stdout.write(json.dumps({k: v for k, v in row.items() if k != "parameters"}) + "\n")


if __name__ == "__main__":
    main()
