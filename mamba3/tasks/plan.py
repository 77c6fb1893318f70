"""What a sweep is, and the sequences that it trains on.

The sequences of step k are those of `mamba3.tasks.fit`; within a step they are sorted by length and cut into groups that are
padded to the longest of their own stage, which changes no sum but the order of its terms. Recall's have one length and,
a part of the step's sequences each, K = T / 4, T / 8, ... pairs, as many numbers as the plan has groups.
"""

from __future__ import annotations

import json
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from mamba3.tasks import MQAR, make_task
from mamba3.tasks.captured import Group
from mamba3.tasks.fit import STEPS_A_DRAW, seeded_generator
from mamba3.tasks.settings import Settings

WIDTH_MULTIPLE, ROW_MULTIPLE = 8, 256
AT_ONCE = 64  # steps whose sequences are put into rows together


@dataclass(frozen=True)
class Member:
    """One model of a sweep."""

    kind: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Plan:
    """What a sweep is. settings: rates and seeds in it are not read, the members' are. keep: how many models of each kind
    enter each stage, the best by training loss. groups: into how many a step's sequences are cut, stage by stage. data_seed:
    of the training sequences, which all models share. A stage that takes more than settings.steps steps reads its sequences
    again from the first."""

    task: str
    d_model: int
    members: tuple[Member, ...]
    settings: Settings
    keep: tuple[int, ...]
    groups: tuple[int, ...]
    data_seed: int = 0
    precision: str = "high"  # of matrix products in training: "high" lets a GPU shorten them to TF32
    enough: float = 0.0  # loss at which a stage ends early; 0: every stage takes settings.steps steps
    least: int = 0  # steps that each later stage keeps, however long the ones before it take
    headdim: int = 64  # channels of a head
    whole_rates: bool = False  # the seeds of a rate stay or go together, by the median of their losses

    def stage_end(self, stage: int) -> int:
        """The step before which a stage ends at the latest. All stages together always take settings.total steps."""
        stages = len(self.settings.stages)
        if not self.enough:
            return (stage + 1) * self.settings.steps
        return self.settings.total - self.least * (stages - stage - 1)

    def learned(self, stage: int, losses: list[float]) -> bool:
        """Whether a stage may end early: half of the models that enter the next one have a loss of at most `enough`."""
        if not self.enough or stage + 1 == len(self.settings.stages):
            return False
        half = -(-min(self.keep[stage + 1], len(losses)) // 2)
        return sum(loss <= self.enough for loss in losses) >= half

    def __post_init__(self):
        stages = len(self.settings.stages)
        if len(self.keep) != stages or len(self.groups) != stages or any(self.settings.batch % g for g in self.groups):
            raise ValueError(
                f"keep and groups need a number for each stage, and groups divide the batch; they are {self.keep} and "
                f"{self.groups} for stages {self.settings.stages} and a batch of {self.settings.batch}."
            )
        if self.enough and not 1 <= self.least <= self.settings.steps:
            raise ValueError(
                f"a plan whose stages end when they are learned keeps at least 1 and at most steps = {self.settings.steps} "
                f"steps for each later one; least is {self.least}."
            )

    def identity(self) -> dict[str, Any]:
        """As JSON holds it."""
        return json.loads(json.dumps({"plan": asdict(self)}))


def draw_block(task: str, settings: Settings, seed: int, stage: int, block: int) -> tuple:
    """The sequences of STEPS_A_DRAW steps, each step's sorted by length: arrays [steps, batch, ...] of small integers."""
    longest = settings.stages[stage]
    generator = seeded_generator(task, "training", seed, stage, block)
    batch = make_task(task).sample(STEPS_A_DRAW * settings.batch, settings.shortest, longest, generator)
    by_step = (STEPS_A_DRAW, settings.batch)
    places = batch.positions[:, 0].view(by_step)
    order = places.argsort(dim=1, stable=True)
    tokens = batch.inputs.to(torch.uint8).view(*by_step, -1)
    tokens = tokens.gather(1, order.unsqueeze(2).expand_as(tokens))
    answers = batch.answers[:, 0].view(by_step).gather(1, order)
    return tokens.numpy(), places.gather(1, order).short().numpy(), answers.to(torch.uint8).numpy()


def draw_recall(settings: Settings, seed: int, stage: int, block: int, divisor: int, sequences: int) -> tuple:
    """The sequences of STEPS_A_DRAW steps with K = T / divisor pairs: arrays [steps, sequences, t or K]."""
    length, task = settings.stages[stage], MQAR(pairs_divisor=divisor)
    generator = seeded_generator(task.name, "training", seed, stage, block, divisor)
    batch = task.sample(STEPS_A_DRAW * sequences, length, length, generator)
    parts = (batch.inputs, batch.positions, batch.answers)
    return tuple(v.to(torch.int16).view(STEPS_A_DRAW, sequences, -1).numpy() for v in parts)


_recalled: dict[tuple, Group] = {}  # the last ones made, which plans of other models ask for again


def _recall_group(plan: Plan, stage: int, pool: Executor | None) -> Group:
    """Every step's sequences, the numbers of pairs one after another; a sequence of fewer pairs is asked each of its questions
    several times, so that all are asked as many: the mean over a sequence's questions stays what it is."""
    key = (plan.settings, plan.groups, plan.data_seed, stage)
    if key not in _recalled:
        _recalled.clear()
        _recalled[key] = _draw_group(plan, stage, pool)
    return _recalled[key]


def _draw_group(plan: Plan, stage: int, pool: Executor | None) -> Group:
    count, kinds, pairs = -(-plan.settings.steps // STEPS_A_DRAW), [], plan.settings.stages[stage] // 4
    for i in range(plan.groups[stage]):
        share = (4 * 2**i, plan.settings.batch // plan.groups[stage])
        arguments = [(plan.settings, plan.data_seed, stage, block, *share) for block in range(count)]
        drawn = pool.map(draw_recall, *zip(*arguments, strict=True)) if pool else (draw_recall(*a) for a in arguments)
        tokens, *asked = (torch.cat([torch.from_numpy(v) for v in part]) for part in zip(*drawn, strict=True))
        kinds.append((tokens, *(v.repeat(1, 1, -(-pairs // v.shape[2]))[..., :pairs] for v in asked)))
    tokens, places, answers = (torch.cat(part, dim=1)[: plan.settings.steps] for part in zip(*kinds, strict=True))
    return Group(tokens, places, answers)


def _in_one_row(tokens: torch.Tensor, places: torch.Tensor, answers: torch.Tensor) -> Group:
    """Sequences [steps, b, t] one behind another, without what follows the token that is asked. What is left of the longest
    row is sequences too, of at most the longest one's tokens, that nobody asks."""
    lengths = places.long() + 1
    steps, _, t = tokens.shape
    longest, sums = int(lengths.max()), lengths.sum(1)
    size = -(-int(sums.max()) // ROW_MULTIPLE) * ROW_MULTIPLE
    more = -(-(size - int(sums.min())) // longest)
    ends = (
        torch.cat([lengths.cumsum(1), sums[:, None] + longest * torch.arange(1, more + 1)], dim=1).clamp(max=size) - 1
    )
    row, at, place = np.zeros((steps, size), np.uint8), np.arange(size), np.arange(t)
    for k in range(0, steps, AT_ONCE):
        part = slice(k, k + AT_ONCE)
        row[part][at < sums[part, None].numpy()] = tokens[part].numpy()[place < lengths[part, :, None].numpy()]
    return Group(torch.from_numpy(row), ends.int(), answers.contiguous(), longest)


def stage_groups(plan: Plan, stage: int, pool: Executor | None, *, packed: bool = False) -> list[Group]:
    """All sequences of a stage, cut into groups of similar length; recall's in one. packed: one behind another, in one."""
    if plan.task == MQAR.name:
        return [_recall_group(plan, stage, pool)]
    blocks = range(-(-plan.settings.steps // STEPS_A_DRAW))
    arguments = [(plan.task, plan.settings, plan.data_seed, stage, block) for block in blocks]
    if pool is None:
        drawn = [draw_block(*a) for a in arguments]
    else:
        drawn = list(pool.map(draw_block, *zip(*arguments, strict=True), chunksize=4))
    parts = zip(*drawn, strict=True)
    tokens, places, answers = (torch.cat([torch.from_numpy(v) for v in part])[: plan.settings.steps] for part in parts)
    if packed:
        return [_in_one_row(tokens, places, answers)]
    groups = []
    for t, p, a in zip(*(v.chunk(plan.groups[stage], dim=1) for v in (tokens, places, answers)), strict=True):
        width = -(-(int(p.max()) + 1) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        t = torch.nn.functional.pad(t, (0, max(0, width - t.shape[2])))[..., :width]
        groups.append(Group(t.contiguous(), p.contiguous(), a.contiguous()))
    return groups
