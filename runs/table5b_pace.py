"""Whether the kernels that train Table 5b are right on this device, how fast they are, how many plans gain side by side.

    python runs/table5b_pace.py --out pace.json        # half a minute on a GPU, most of it compilation

Errors: the packed kernels' logits and gradient, as norms relative to the padded models' by PyTorch in float64. Paces: steps a
second of 1, 2 and 3 sweeps at once, each on a stream and in a thread of its own. Prints what `runs/table5b.py` is best told:
`--side-by-side N`, with `--padded` where an error is too large.
"""

import argparse
import json
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

from mamba3.ops.state_file import replace_file
from mamba3.tasks import folded, make_task, widened
from mamba3.tasks.captured import Captured
from mamba3.tasks.entrants import Folded
from mamba3.tasks.models import model_config
from mamba3.tasks.plan import Member, Plan, stage_groups
from mamba3.tasks.settings import Settings

TASK = "arithmetic-brackets"
BOUNDS = {"highest": 1e-5, "high": 1e-2}  # of errors; PyTorch's own are 1e-6 and 1e-3
GAIN = 1.1  # by which one more plan at once must raise the steps of all


def members(count: int) -> list[Member]:
    return [Member("mamba3", 1e-3, seed) for seed in range(count)]


def built(count: int, headdim: int, device: torch.device, small: bool, **how: bool) -> Folded:
    task = make_task(TASK)
    sizes = {"d_model": 16, "d_state": 8, "layers": 1} if small else {"d_model": 64}
    config = model_config(TASK, task.vocab_size, "mamba3", headdim=headdim, **sizes)
    return Folded([config] * count, list(range(count)), kernels=device.type == "cuda", **how)


def stage(count: int, longest: int, steps: int, batch: int) -> Plan:
    settings = Settings(stages=(longest,), steps=steps, batch=batch)
    return Plan(TASK, 64, tuple(members(count)), settings, (count,), (2,))


def errors(headdim: int, device: torch.device, small: bool) -> dict[str, dict[str, float]]:
    """Of logits and gradient, for each precision of products."""
    from mamba3.tasks import packed

    entrants, chosen = built(2, headdim, device, small), stage(2, 20 if small else 160, 1, 4 if small else 64)
    (row,) = stage_groups(chosen, 0, None, packed=True)
    row, dense = row.to(device), replace(chosen, groups=(1,))
    (whole,) = stage_groups(dense, 0, None)
    whole, found = whole.to(device), {}
    start = entrants.weights + 0.02 * torch.randn(entrants.weights.shape, generator=torch.Generator().manual_seed(0))

    def run(dtype: torch.dtype, forward) -> tuple[torch.Tensor, torch.Tensor]:
        weights = start.to(device, dtype).requires_grad_()
        which = widened.switches(entrants.configs, device, dtype)
        logits = forward(which, entrants.layout.split(weights))
        seed = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        (gradient,) = torch.autograd.grad((logits * seed).sum(), weights)
        return logits.detach().double(), gradient.double()

    count = len(whole.answers[0])

    def by_pytorch(which, named):
        tokens, places = whole.tokens[0].long(), whole.positions[0].long()
        return folded.answer_logits(entrants.sizes, which, named, tokens, places)

    def by_kernels(which, named):
        ends = row.positions[0].long()
        return packed.answer_logits(entrants.sizes, which, named, row.tokens[0].long(), ends, row.longest)[:, :count]

    expected = run(torch.float64, by_pytorch)
    for precision in BOUNDS:
        torch.set_float32_matmul_precision(precision)
        pairs = zip(("logits", "gradient"), run(torch.float32, by_kernels), expected, strict=True)
        found[precision] = {name: float((a - b).norm() / b.norm()) for name, a, b in pairs}
    return found


def pace(trainings: list[Captured], seconds: float, device: torch.device) -> float:
    """Steps a second of all together."""
    begun, taken = time.perf_counter(), [0] * len(trainings)

    def go(i: int) -> None:
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(stream):  # None changes nothing
            while time.perf_counter() - begun < seconds:
                trainings[i].advance(20 if stream else 1)
                taken[i] += 20 if stream else 1
                if stream:
                    stream.synchronize()

    threads = [threading.Thread(target=go, args=(i,)) for i in range(len(trainings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(taken) / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("pace.json"))
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--errors-alone", action="store_true", help="no paces; ends with 1 where they are too large")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models; the kernels in Triton's interpreter on a CPU"
    )
    options = parser.parse_args()
    if options.quick and options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    device, small, begun = torch.device(options.device), options.quick, time.time()
    headdim, found = 16, {}
    if device.type == "cuda" or small:
        found["errors"] = errors(headdim, device, small)
    right = all(e <= BOUNDS[p] for p, each in found.get("errors", {}).items() for e in each.values())
    found["kernels"], found["seconds_of_errors"] = right, time.time() - begun
    if options.errors_alone:
        replace_file(options.out, (json.dumps(found, indent=1) + "\n").encode())
        sys.exit(0 if right else 1)
    torch.set_float32_matmul_precision("high")
    chosen = stage(3, 20 if small else 160, 40, 4 if small else 256)
    trainings: list[Captured] = []
    for path in ("padded", "packed", "packed", "packed"):
        if path == "packed" and not right:
            break
        entrants = built(3, headdim, device, small, packed=path == "packed")
        training = Captured(
            entrants.layout, entrants.weights, entrants.exist, [1e-3] * 3, replace(chosen.settings, steps=10**5), device,
            kernels=entrants.packed,
        )  # fmt: skip
        groups = stage_groups(chosen, 0, None, packed=entrants.packed)
        training.start_stage(entrants.forward([0, 1, 2], device), groups, 0)
        if path == "padded":
            found["padded"] = pace([training], options.seconds, device)
        else:
            trainings.append(training)
    paces = [pace(trainings[: n + 1], options.seconds, device) for n in range(len(trainings))]
    best = 1
    while best < len(paces) and paces[best] > GAIN * paces[best - 1]:
        best += 1
    found |= {"packed": paces, "side_by_side": best, "seconds": time.time() - begun, "torch": str(torch.__version__)}
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    replace_file(options.out, (json.dumps(found, indent=1) + "\n").encode())
    sys.stderr.write(json.dumps(found) + "\n")
    sys.stdout.write(f"--side-by-side {best}{'' if right else ' --padded'}\n")


if __name__ == "__main__":
    main()
