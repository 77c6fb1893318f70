"""The plans of runs/table5b.py: which models learn which task, at which rates, for how long."""

from dataclasses import replace

from table5b_figure import TASKS

from mamba3.tasks.plan import Member, Plan
from mamba3.tasks.settings import PAPER_RATES, Settings

PARITY_STEPS = 2_500  # of each stage; the paper's 10,000 are --steps 10000
ROTATION = ("mamba3", "mamba3-rope", "mamba3-norotation")
ABLATIONS = ("mamba3-euler", "mamba3-trapezoid", "mamba3-nobias", "mamba3-heavytail")
WINNERS = {4: (8, 5, 3, 3), 2: (8, 4)}  # models of a kind that enter each stage, by the number of stages
OTHERS = {4: (8, 4, 2, 2), 2: (8, 4)}


def plans(settings: Settings, rates: tuple[float, ...], parity_steps: int) -> dict[str, Plan]:
    """All plans by name, the most wanted first."""
    found: dict[str, Plan] = {}

    def add(name: str, task: str, d_model: int, kinds: tuple[str, ...], keep: dict[int, tuple[int, ...]]) -> None:
        members = tuple(Member(kind, rate, 0) for kind in kinds for rate in rates)
        stages = len(settings.stages)
        # Grazzi et al.'s repository: no weight decay on parity, 0.1 on arithmetic.
        own = replace(settings, weight_decay=0.0, steps=parity_steps) if task == "parity" else settings
        found[f"{task}.{name}.d{d_model}"] = Plan(
            task, d_model, members, own, keep.get(stages, (8,) * stages), (1,) + (2,) * (stages - 1)
        )

    hard = TASKS[1:]
    for task in hard:
        add("mamba3", task, 64, ("mamba3",), WINNERS)
    add("rotation", "parity", 64, ROTATION, WINNERS)
    for task in hard:
        add("without", task, 64, ROTATION[1:], OTHERS)
    add("rotation", "parity", 32, ROTATION, WINNERS)
    for task in hard:
        add("mamba3", task, 32, ("mamba3",), WINNERS)
    for d_model in (64, 32):
        add("mimo", "parity", d_model, ("mamba3-mimo",), WINNERS)
    for task in hard:
        add("mimo", task, 64, ("mamba3-mimo",), OTHERS)
    for kind in ("transformer", "gdn", "mamba2"):
        for task in TASKS:
            add(kind, task, 64, (kind,), OTHERS)
    for task in TASKS:
        add("allturn", task, 64, ("mamba3-allturn",), OTHERS)
    add("allturn", "parity", 32, ("mamba3-allturn",), OTHERS)
    add("ablations", "parity", 64, ABLATIONS, OTHERS)
    for task in hard:
        add("ablations", task, 64, ABLATIONS, OTHERS)
    for task in hard:
        add("without", task, 32, ROTATION[1:], OTHERS)
        add("mimo", task, 32, ("mamba3-mimo",), OTHERS)
    return found


# What a stage must reach before the sequences grow, in the plans that go on until it is learned, and what the later ones keep.
ENOUGH, LEAST = 0.1, 5_500
SOONER = 0.2  # in the plans that spend more of their steps on the longest sequences
LENGTHS = (40, 60, 80, 100, 120, 140, 160)
HEAD = 16  # channels; see docs/results/state-tracking.md


def finishing(settings: Settings, steps: int | None = None) -> dict[str, Plan]:
    """What the grid left open, the most wanted first; heads of 16 channels on arithmetic.

    Mamba-3 on arithmetic: three seeds of two rates, lengths that grow by 20 tokens when half of the models that go on have a
    loss of 0.1, in 63,000 and 56,000 steps. `nodecay` are the same seeds of the better rate with the same steps and schedule,
    without weight decay, and lengths grow at a loss of 0.2. The others: every row of the table that is missing, to its end, in
    stages of 2,500 steps, parity with three seeds; ablations beside the whole model, which has as many steps there as they.
    """
    found: dict[str, Plan] = {}
    low, middle, high, higher = PAPER_RATES[2:6]

    def add(
        name: str, task: str, kinds: tuple[str, ...], rates: tuple[float, ...], keep: tuple[int, ...], seeds: int = 1,
        stages: tuple[int, ...] = settings.stages, each: int = 2_500, headdim: int = HEAD,
        decay: float | None = None, **more: float,
    ) -> None:  # fmt: skip
        members = tuple(Member(kind, rate, seed) for kind in kinds for rate in rates for seed in range(seeds))
        own = replace(settings, stages=stages, steps=steps or each)
        decay = 0.0 if task == "parity" else decay
        own = own if decay is None else replace(own, weight_decay=decay)
        whole = seeds > 1  # so that the best rate has all of its seeds
        more = {k: min(v, own.steps) if k == "least" else v for k, v in more.items()}
        kept = keep + keep[-1:] * (len(stages) - len(keep))
        groups = (1,) + (2,) * (len(stages) - 1)
        kept = kept[: len(stages)]
        found[f"{task}.{name}"] = Plan(task, 64, members, own, kept, groups, headdim=headdim, whole_rates=whole, **more)  # pyright: ignore

    grown = {"stages": LENGTHS if len(settings.stages) > 2 else settings.stages, "enough": ENOUGH, "least": LEAST}
    hard = TASKS[1:]
    add("mamba3.learned", hard[1], ("mamba3",), (middle, high), (6, 6, 3), 3, each=9_000, **grown)
    add("mamba3.learned", hard[0], ("mamba3",), (middle, high), (6, 6, 3), 3, each=8_000, **grown)
    sooner = grown | {"enough": SOONER, "decay": 0.0}
    add("mamba3.nodecay", hard[1], ("mamba3",), (high,), (3,), 3, each=9_000, **sooner)
    add("mamba3.nodecay", hard[0], ("mamba3",), (middle,), (3,), 3, each=8_000, **sooner)
    for name, kind in (("allturn.seeds", "mamba3-allturn"), ("seeds", "mamba3")):
        add(name, "parity", (kind,), (middle, high, higher), (9, 6, 3, 3), 3, headdim=64)
    for task in hard:
        add("without.short", task, ROTATION[1:], (middle, high), (2, 1))
    for task in ("parity", *hard):
        add("gdn.short", task, ("gdn",), (middle, higher), (2, 1), headdim=64)
    for task in hard:
        add("mamba2.short", task, ("mamba2",), (middle, higher), (2, 1), headdim=64)
    for task in hard:
        add("ablations.short", task, ("mamba3", *ABLATIONS), (middle,), (1,))
    add("ablations.short", "parity", ("mamba3", *ABLATIONS), (middle, high), (2, 2, 1, 1), headdim=64)
    for task in hard:
        add("transformer.short", task, ("transformer",), (low, high), (2, 1), headdim=64)
    for task in hard:
        add("mimo.short", task, ("mamba3-mimo",), (middle,), (1,), headdim=64)
    return found
