"""Many models through one curriculum side by side: rates, seeds and kinds in one stack, the worst left behind stage by stage.

    FOLDER/checkpoint.safetensors    replaced whole at every stage's end, every `save_every` seconds and where the time ends
    FOLDER/results.json              scaled accuracy of every model, the models dropped, seconds
    FOLDER/best-KIND/                the best model of each kind

The sequences are those of `mamba3.tasks.plan`; what is judged at the end is fresh.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from mamba3.ops.state_file import replace_file
from mamba3.tasks import make_task
from mamba3.tasks.base import Batch, Task
from mamba3.tasks.captured import Captured, Forward
from mamba3.tasks.entrants import Entrants
from mamba3.tasks.fit import CHECKPOINT, RESULTS, require_same, seeded_generator
from mamba3.tasks.plan import Plan, stage_groups

TOKENS_AT_ONCE = {"cpu": 2**15, "cuda": 2**19}
AT_ONCE = 100  # steps between two looks at the clock
WINDOW = 500  # steps: models are dropped by the least mean loss of any such window of the stage that ends
# Sweeps of several threads replay their graphs side by side; all else, of which the precision of matrix products is the
# process's, is one thread's at a time.
ONE_AT_A_TIME = threading.RLock()
SELDOM = 4  # looks between two validations before the last two stages
VALIDATE_EVERY, VALIDATED = 500, 1024  # steps; sequences of the first range of lengths, none of them evaluated later


@torch.no_grad()
def accuracies(task: Task, forward: Forward, weights: Tensor, batch: Batch) -> list[float]:
    """Of each model; float32 products are not shortened."""
    sequences = len(batch.inputs)
    length = batch.inputs.shape[1]
    rows = max(1, TOKENS_AT_ONCE[weights.device.type] // (len(weights) * length * max(1, length // 512)))
    correct = torch.zeros(len(weights), dtype=torch.float64)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    for start in range(0, sequences, rows):
        part = batch.rows(start, start + rows).to(weights.device)
        one = part.positions.shape[1] == 1
        guesses = forward(weights, part.inputs, part.positions[:, 0] if one else part.positions).argmax(-1)
        right = (guesses == (part.answers[:, 0] if one else part.answers)).double()
        correct += right.view(*right.shape[:2], -1).mean(2).sum(1).cpu()
    torch.set_float32_matmul_precision(precision)
    return (correct / sequences).tolist()


class Sweep:
    """One plan in one folder; `run` goes on from where the folder is."""

    def __init__(
        self, plan: Plan, entrants: Entrants, folder: Path, device: torch.device, *,
        pool: Executor | None = None, save_every: float = 60.0, validate_every: int = VALIDATE_EVERY,
        validated: int = VALIDATED, say: Callable[[str], object] = sys.stderr.write,
    ):  # fmt: skip
        self.plan, self.entrants, self.folder, self.device = plan, entrants, folder, device
        self.pool, self.save_every, self.say = pool, save_every, say
        self.validate_every, self.at_once = validate_every, min(AT_ONCE, validate_every)
        self.task, self.rows = make_task(plan.task), list(range(len(plan.members)))
        self.begins = [0]  # the step at which each stage began, up to the one that it is in
        self.dropped: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.training = Captured(
            entrants.layout, entrants.weights, entrants.exist, [m.rate for m in plan.members], plan.settings, device,
            kernels=entrants.packed,
        )  # fmt: skip
        # Of each model the weights with which it validated best so far, that score (in %) and the step.
        self.chosen = self.training.weights.clone()
        self.best = torch.full((len(plan.members), 2), -torch.inf)
        ends = plan.settings.ranges[0]
        count = min(validated, plan.settings.sequences)
        self.validation = self.task.sample(count, *ends, seeded_generator(plan.task, "validation", *ends))

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
        """Train and evaluate; what results.json holds, or None where it was stopped. ValueError: another plan's folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / RESULTS).is_file():
            results = json.loads((self.folder / RESULTS).read_text())
            require_same(results["identity"], self.plan.identity(), self.folder)
            return results
        own = torch.cuda.stream(torch.cuda.Stream(self.device)) if self.device.type == "cuda" else nullcontext()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what __init__ made lies on another stream
        ahead = ThreadPoolExecutor(1)
        try:
            with own:
                self._resume()
                return self._curriculum(ahead, should_stop)
        finally:
            ahead.shutdown(
                wait=False, cancel_futures=True
            )  # who is stopped does not wait for the next stage's sequences

    def _curriculum(self, ahead: Executor, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        """`run` from the stage in which the training is; the sequences of the next stage are made during each."""
        stages = len(self.plan.settings.stages)
        begin = len(self.begins) - 1
        packed = self.entrants.packed
        coming = ahead.submit(stage_groups, self.plan, begin, self.pool, packed=packed) if begin < stages else None
        for stage in range(begin, stages):
            if self._taken() == self.begins[stage]:
                self._drop(stage)
            assert coming is not None
            groups = coming.result()
            more = stage + 1 < stages
            coming = ahead.submit(stage_groups, self.plan, stage + 1, self.pool, packed=packed) if more else None
            widths = [g.tokens.shape[-1] for g in groups]
            self.say(f"{self.folder.name}: stage {stage + 1}, {len(self.rows)} models, widths {widths}\n")
            began = time.perf_counter()
            last = stage + 1 == stages
            with ONE_AT_A_TIME:
                torch.set_float32_matmul_precision(self.plan.precision)
                self.training.start_stage(self.entrants.forward(self.rows, self.device), groups, self.begins[stage])
            self.say(f"{self.folder.name}: captured in {time.perf_counter() - began:.1f} s\n")
            if not self._train_stage(stage, should_stop):
                return None
            self.begins.append(self._taken())
            self._save()
            if not last and should_stop():
                return None
        with ONE_AT_A_TIME:
            return self._finish()

    def _taken(self) -> int:
        return int(self.training.count)

    def _train_stage(self, stage: int, should_stop: Callable[[], bool]) -> bool:
        """Whether it got to the stage's end; a checkpoint where not."""
        end, looks = self.plan.stage_end(stage), max(1, self.validate_every)
        taken, saved, began = self._taken(), time.perf_counter(), time.perf_counter()
        first, before = taken, self.seconds
        forward = self.entrants.forward(self.rows, self.device)
        while taken < end:
            now = min(end - taken, self.at_once - taken % self.at_once)
            if self.device.type == "cuda":
                self.training.advance(now)
                torch.cuda.current_stream(self.device).synchronize()
            else:
                with ONE_AT_A_TIME:
                    torch.set_float32_matmul_precision(self.plan.precision)
                    self.training.advance(now)
            taken += now
            late = should_stop()
            if taken % looks == 0 and self._learned(stage, taken):
                end = taken
            late_stage = stage + 2 >= len(self.plan.settings.stages)
            if taken % (looks if late_stage else SELDOM * looks) == 0 or taken == end:
                self._validate(forward, taken)
            self.seconds = before + time.perf_counter() - began
            if late or taken % 1000 == 0 or taken == end:
                recent = self.training.losses[max(0, taken - 100) : taken].mean(0).tolist()
                pace = 1e3 * (time.perf_counter() - began) / (taken - first)
                shown = " ".join(f"{loss:.3f}" for loss in recent)
                found = " ".join(f"{score:.0f}" for score in self.best[:, 0].tolist())
                self.say(f"{self.folder.name}: step {taken:,}, {pace:.2f} ms, losses {shown}, best {found}\n")
            if late and taken < end:
                self._save()
                return False
            if time.perf_counter() - saved > self.save_every:
                self._save()
                saved = time.perf_counter()
        return True

    def _learned(self, stage: int, taken: int) -> bool:
        """Whether the models' mean losses since the last look let the stage end; it has had a whole window."""
        first = taken - self.validate_every
        if first < self.begins[stage] or not self.plan.enough:
            return False
        return self.plan.learned(stage, self.training.losses[first:taken].mean(0).nan_to_num(torch.inf).tolist())

    def _validate(self, forward: Forward, taken: int) -> None:
        """Score the models as they are; keep the weights of those that were never better."""
        with ONE_AT_A_TIME:
            found = accuracies(self.task, forward, self.training.weights, self.validation)
        scores = torch.tensor([100 * self.task.scaled_accuracy(a) for a in found])
        better = scores > self.best[:, 0]
        self.best[better] = torch.stack([scores, torch.full_like(scores, taken)], dim=1)[better]
        rows = better.to(self.device).unsqueeze(1)
        self.chosen = torch.where(rows, self.training.weights, self.chosen)
        self.validations.append({"step": taken, "rows": self.rows, "scaled": [round(v, 2) for v in scores.tolist()]})

    def _drop(self, stage: int) -> None:
        """Keep the best of each kind by the least loss of the stage that ended; diverged ones go first."""
        taken, members = self._taken(), self.plan.members
        if taken == 0:
            return
        steps = self.training.losses[self.begins[stage - 1] : taken]
        recent = torch.stack([w.mean(0) for w in steps.split(WINDOW)]).nan_to_num(torch.inf).amin(0).tolist()
        alive = self.training.alive.tolist()
        ranks = [(recent[i] if alive[i] else torch.inf,) for i in range(len(self.rows))]
        if self.plan.whole_rates:
            of = [(members[row].kind, members[row].rate) for row in self.rows]
            middle = {
                key: statistics.median(r[0] for r, k in zip(ranks, of, strict=True) if k == key) for key in set(of)
            }
            ranks = [(middle[key], key[1], *own) for key, own in zip(of, ranks, strict=True)]
        order = sorted(range(len(self.rows)), key=lambda i: ranks[i])
        count: dict[str, int] = {}
        kept = []
        for i in order:
            kind = members[self.rows[i]].kind
            count[kind] = count.get(kind, 0) + 1
            if count[kind] <= self.plan.keep[stage]:
                kept.append(i)
            else:
                self.dropped.append(
                    {**asdict(members[self.rows[i]]), "before_stage": stage + 1, "steps": taken, "loss": recent[i]}
                )
        if len(kept) < len(self.rows):
            self._keep(sorted(kept))

    def _keep(self, places: list[int]) -> None:
        """Go on with the models at these places of `rows`."""
        self.training.keep(places)
        self.rows = [self.rows[i] for i in places]
        self.chosen, self.best = self.chosen[torch.tensor(places, device=self.device)], self.best[places]

    def _scores(self, ends: tuple[int, int], sequences: int, places: list[int]) -> list[float]:
        """Scaled accuracy in % of the weights chosen for the models at these places of `rows`, on the sequences of
        `fit.evaluate`."""
        batch = self.task.sample(sequences, *ends, seeded_generator(self.task.name, "evaluation", *ends))
        forward = self.entrants.forward([self.rows[i] for i in places], self.device)
        found = accuracies(self.task, forward, self.chosen[torch.tensor(places, device=self.device)], batch)
        return [100 * self.task.scaled_accuracy(a) for a in found]

    def _finish(self) -> dict[str, Any]:
        settings, members = self.plan.settings, self.plan.members
        recent = self.training.losses[-min(WINDOW, settings.total) :].mean(0).tolist()
        alive, scaled = self.training.alive.tolist(), [{} for _ in self.rows]
        for ends in settings.ranges:
            if ends[1] <= 256 or ends == settings.ranges[0]:
                for found, score in zip(
                    scaled, self._scores(ends, settings.sequences, [*range(len(self.rows))]), strict=True
                ):
                    found["{}-{}".format(*ends)] = score
        first = "{}-{}".format(*settings.ranges[0])
        best: dict[str, int] = {}
        for i, row in enumerate(self.rows):
            kind = members[row].kind
            if kind not in best or (alive[i], scaled[i][first]) > (alive[best[kind]], scaled[best[kind]][first]):
                best[kind] = i
        winners = sorted(best.values())
        for ends in settings.ranges:
            if ends[1] > 256 and ends != settings.ranges[0]:
                for i, score in zip(winners, self._scores(ends, settings.long_sequences, winners), strict=True):
                    scaled[i]["{}-{}".format(*ends)] = score
        named = self.entrants.layout.split(self.chosen)
        for kind, i in best.items():
            self.entrants.save(self.rows[i], {k: v[i] for k, v in named.items()}, self.folder / f"best-{kind}")
        results = {
            "identity": self.plan.identity(),
            "runs": [
                {**asdict(members[row]), "loss": recent[i], "diverged": not alive[i], "scaled": scaled[i],
                 "validated": self.best[i, 0].item(), "at_step": int(self.best[i, 1]),
                 "best_of_kind": best[members[row].kind] == i}
                for i, row in enumerate(self.rows)
            ],
            "dropped": self.dropped, "validations": self.validations, "stage_begins": self.begins[:-1],
            "training_seconds": round(self.seconds, 1),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "torch": str(torch.__version__),
        }  # fmt: skip
        replace_file(self.folder / RESULTS, (json.dumps(results, indent=1) + "\n").encode())
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        return results

    def _save(self) -> None:
        """What the run goes on from."""
        tensors = {k: v.contiguous() for k, v in self.training.tensors().items()}
        tensors |= {"chosen": self.chosen.cpu().contiguous(), "best": self.best.contiguous()}
        header = {
            "identity": json.dumps(self.plan.identity()), "rows": json.dumps(self.rows), "seconds": str(self.seconds),
            "dropped": json.dumps(self.dropped), "validations": json.dumps(self.validations),
            "begins": json.dumps(self.begins),
        }  # fmt: skip
        replace_file(self.folder / CHECKPOINT, save(tensors, metadata=header))

    def _resume(self) -> None:
        place = self.folder / CHECKPOINT
        if not place.is_file():
            return
        with safe_open(place, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        require_same(json.loads(header["identity"]), self.plan.identity(), self.folder)
        rows = json.loads(header["rows"])
        if len(rows) < len(self.rows):
            self._keep(rows)
        self.seconds, self.begins = float(header["seconds"]), json.loads(header["begins"])
        self.dropped, self.validations = json.loads(header["dropped"]), json.loads(header["validations"])
        self.chosen, self.best = tensors.pop("chosen").to(self.device), tensors.pop("best")
        self.training.load(tensors)
