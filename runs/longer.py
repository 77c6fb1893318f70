"""Go on with a trained model of a task on longer sequences: what it does per token is right, and has to become exact.

    python runs/longer.py --task parity --model RUN/best-mamba3 --out longer --stages 512 1024 --steps 250 --batch 32

Each rate is one copy of the model; the copy and the step that validate best, at the longest length or --validate-at, are kept,
in OUT/best-mamba3. May be stopped: the same command goes on. The folder must hold a plain Mamba-3 model (no attention, no MLP).
"""

import argparse
import sys
from pathlib import Path

import torch

from mamba3.lm import Mamba3LM
from mamba3.tasks import TASKS
from mamba3.tasks.entrants import Folded
from mamba3.tasks.plan import Member, Plan
from mamba3.tasks.settings import Settings
from mamba3.tasks.sweep import Sweep
from mamba3.tasks.widened import widened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--task", default="parity", choices=[name for name, task in TASKS.items() if not task.one_length]
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("longer"))
    parser.add_argument("--stages", nargs="+", type=int, default=(512, 1024))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rates", nargs="+", type=float, default=(3e-5, 1e-4))
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument(
        "--groups", type=int, default=4, help="of similar length, into which a step's sequences are cut"
    )
    parser.add_argument("--sequences", type=int, default=512, help="evaluated at each length; half of them validate")
    parser.add_argument("--validate-at", type=int, help="tokens (default: of the longest stage)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model = Mamba3LM.from_pretrained(options.model)
    entrants = Folded([model.config] * len(options.rates), [0] * len(options.rates), kernels=options.device != "cpu")
    wide, _ = widened(model.config, {k: v.detach() for k, v in model.state_dict().items()})
    entrants.weights = entrants.layout.join({k: torch.stack([v] * len(options.rates)) for k, v in wide.items()})
    longest = max(options.stages)
    judged = options.validate_at or longest
    settings = Settings(
        stages=options.stages, steps=options.steps, batch=options.batch, weight_decay=options.weight_decay,
        ranges=tuple((n, n) for n in dict.fromkeys((judged, longest, 256, *options.stages, 2 * longest, 4 * longest))),
        sequences=options.sequences,
        long_sequences=options.sequences,
    )  # fmt: skip
    members = tuple(Member("mamba3", rate, 0) for rate in options.rates)
    count = len(options.stages)
    plan = Plan(
        options.task,
        model.config.d_model,
        members,
        settings,
        (len(members),) * count,
        (options.groups,) * count,
        data_seed=7,
    )
    results = Sweep(
        plan, entrants, options.out, torch.device(options.device), validate_every=max(1, options.steps // 20),
        validated=options.sequences // 2,
    ).run()  # fmt: skip
    assert results is not None  # nothing asks it to stop
    for run in results["runs"]:
        scores = ", ".join(f"{name.split('-')[0]} tokens {score:.2f}" for name, score in run["scaled"].items())
        sys.stdout.write(f"rate {run['rate']:.1e}, chosen at step {run['at_step']}: {scores}\n")


if __name__ == "__main__":
    main()
