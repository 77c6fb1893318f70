"""Train one architecture on one task, every rate and seed side by side, and evaluate all of them on fresh sequences.

    OUT/checkpoint.safetensors    the stack, all losses so far, what the run is; replaced whole every `save_every` steps
    OUT/results.json              scaled accuracy of each model in each range of lengths
    OUT/best/                     config.json and model.safetensors of the model that is best in the first range

Law: step k is a function of (task, configuration, settings, k) and the state after step k - 1, so a run that was killed and
resumed has bitwise the losses of one that was not (same machine and threads; on a GPU with deterministic algorithms).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mamba3.lm import Mamba3Config
from mamba3.ops.state_file import replace_file
from mamba3.tasks.base import Batch, Task
from mamba3.tasks.settings import Settings
from mamba3.tasks.stack import Stack

CHECKPOINT, RESULTS, BEST = "checkpoint.safetensors", "results.json", "best"
STEPS_A_DRAW = 16  # the sequences of so many steps are made at once, which costs little more than those of one
TOKENS_AT_ONCE = {"cpu": 2**15, "cuda": 2**21}  # read by all models of a stack together in an evaluation
LISTEN_EVERY = 20
Listener = Callable[[int, int, list[float]], None]


class NonFiniteError(ArithmeticError):
    """No model is left whose losses and gradients were all finite."""


def fit(
    task: Task,
    config: Mamba3Config,
    settings: Settings,
    out: str | Path,
    *,
    device: torch.device | str = "cpu",
    listen: Listener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Train and evaluate, from where the folder `out` left off; what results.json holds, or None if it was stopped.

    listen(step, steps, losses of the models) is told how far training is. A finished folder is answered at once.
    Raises ValueError if `out` holds another run, NonFiniteError if every model diverged.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    identity = json.loads(
        json.dumps({"task": task_identity(task), "model": config.to_dict(), "fit": settings.to_dict()})
    )
    if (out / RESULTS).is_file():
        results = json.loads((out / RESULTS).read_text())
        require_same(results["identity"], identity, out)
        return results
    stack = Stack(config, tuple(seed for _, seed in settings.runs), settings, device)
    losses, seconds = _resume(stack, identity, out)
    step, began = len(losses), time.perf_counter() - seconds
    while step < settings.total:
        if should_stop():
            _save(stack, losses, time.perf_counter() - began, identity, out)
            return None
        batch = training_batch(task, settings, step, str(device))
        rates = torch.tensor([settings.rate(step, peak) for peak, _ in settings.runs], device=stack.alive.device)
        losses.append(stack.step(batch.inputs, batch.positions, batch.answers, rates, step + 1))
        step += 1
        if step % LISTEN_EVERY == 0 or step == settings.total:
            _require_one_alive(stack, step, out)
            if listen is not None:
                listen(step, settings.total, losses[-1].tolist())
        if step % settings.save_every == 0 or step == settings.total:
            _save(stack, losses, time.perf_counter() - began, identity, out)
    return _finish(task, stack, settings, losses, time.perf_counter() - began, identity, out)


def task_identity(task: Task) -> dict[str, Any]:
    """What makes a task this task: its name and its plain fields."""
    return {"name": task.name} | {k: v for k, v in vars(task).items() if isinstance(v, int | float | str)}


def require_same(stored: dict[str, Any], current: dict[str, Any], out: Path) -> None:
    """ValueError naming each field in which the run of a folder differs from the one that is asked for."""
    changes = [
        f"{part}.{key} was {stored[part].get(key)!r}, is {current[part].get(key)!r}"
        for part in current
        for key in sorted(stored[part].keys() | current[part].keys())
        if stored[part].get(key) != current[part].get(key)
    ]
    if changes:
        raise ValueError(
            f"a folder holds one run, but {out} differs in {'; '.join(changes)}. Give the earlier values or another folder."
        )


def seeded_generator(*names: object) -> torch.Generator:
    """A generator whose seed is a hash of what the sequences are for: no two uses share one."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


_drawn: dict[tuple, Batch] = {}


def training_batch(task: Task, settings: Settings, step: int, device: str) -> Batch:
    """The sequences of a step, [m, batch, ...]: models of the same seed read the same ones."""
    stage, within = divmod(step, settings.steps)
    block, at = divmod(within, STEPS_A_DRAW)
    longest = settings.stages[stage]
    shortest = longest if task.one_length else settings.shortest
    key = (json.dumps(task_identity(task)), settings, stage, block, device)
    if key not in _drawn:
        _drawn.clear()
        count = STEPS_A_DRAW * settings.batch
        seeds = {
            seed: task.sample(count, shortest, longest, seeded_generator(task.name, "training", seed, stage, block))
            for seed in settings.seeds
        }
        models = [seeds[seed] for _, seed in settings.runs]
        fields = ("inputs", "positions", "answers", "lengths")
        _drawn[key] = Batch(*(torch.stack([getattr(b, f) for b in models], dim=1) for f in fields)).to(device)
    rows = _drawn[key].rows(at * settings.batch, (at + 1) * settings.batch)
    return Batch(*(v.transpose(0, 1) for v in (rows.inputs, rows.positions, rows.answers, rows.lengths)))


def evaluate(task: Task, stack: Stack, shortest: int, longest: int, sequences: int) -> list[float]:
    """Accuracy of each model on fresh sequences, the same for all models and all runs of this task and range."""
    batch = task.sample(sequences, shortest, longest, seeded_generator(task.name, "evaluation", shortest, longest))
    at_once = TOKENS_AT_ONCE["cuda" if stack.alive.is_cuda else "cpu"]
    rows = max(1, at_once // (len(stack) * batch.inputs.shape[1]))
    correct = torch.zeros(len(stack), dtype=torch.float64)
    for start in range(0, sequences, rows):
        part = batch.rows(start, start + rows).to(stack.alive.device)
        guesses = stack.logits(part.inputs, part.positions).argmax(-1)
        correct += (guesses == part.answers).double().mean(2).sum(1).cpu()
    return (correct / sequences).tolist()


def _finish(
    task: Task,
    stack: Stack,
    settings: Settings,
    losses: list[Tensor],
    seconds: float,
    identity: dict[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Evaluate, save the best model, write results.json."""
    runs: list[dict[str, Any]] = [
        {"rate": rate, "seed": seed, "loss": float(losses[-1][i]), "diverged": not bool(stack.alive[i]), "scaled": {}}
        for i, (rate, seed) in enumerate(settings.runs)
    ]
    for shortest, longest in settings.ranges:
        count = settings.sequences if longest <= 256 else settings.long_sequences
        accuracies = evaluate(task, stack, shortest, longest, count)
        for run, accuracy in zip(runs, accuracies, strict=True):
            run["scaled"][f"{shortest}-{longest}"] = 100 * task.scaled_accuracy(accuracy)
    first = "{}-{}".format(*settings.ranges[0])
    best = max(range(len(runs)), key=lambda i: (not runs[i]["diverged"], runs[i]["scaled"][first]))
    stack.model(best).save_pretrained(out / BEST)
    results = {
        "identity": identity, "best": best, "runs": runs, "training_seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name(stack.alive.device) if stack.alive.is_cuda else "cpu",
        "torch": str(torch.__version__),
    }  # fmt: skip
    replace_file(out / RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    return results


def _require_one_alive(stack: Stack, step: int, out: Path) -> None:
    if not stack.alive.any():
        raise NonFiniteError(
            f"a loss or gradient must be finite, but none of the {len(stack)} models of {out} was so up to step {step}. "
            "Lower the learning rates and give another folder."
        )


def _save(stack: Stack, losses: list[Tensor], seconds: float, identity: dict[str, Any], out: Path) -> None:
    history = torch.stack(losses) if losses else torch.zeros(0, len(stack))
    tensors = {name: v.cpu().contiguous() for name, v in (stack.tensors() | {"losses": history}).items()}
    header = {"identity": json.dumps(identity), "seconds": str(seconds)}
    replace_file(out / CHECKPOINT, save(tensors, metadata=header))


def read_losses(out: str | Path) -> Tensor:
    """The losses [steps, m] of a run, as far as its checkpoint goes."""
    with safe_open(Path(out) / CHECKPOINT, framework="pt") as file:
        return file.get_tensor("losses")


def _resume(stack: Stack, identity: dict[str, Any], out: Path) -> tuple[list[Tensor], float]:
    """The losses and seconds so far, with the stack put back; none for a new run."""
    place = out / CHECKPOINT
    if not place.is_file():
        return [], 0.0
    try:
        with safe_open(place, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{place} must be a whole checkpoint, but cannot be read ({error}); remove it.") from error
    require_same(json.loads(header["identity"]), identity, out)
    losses = tensors.pop("losses").to(stack.alive.device)
    stack.load(tensors)
    return list(losses), float(header["seconds"])
