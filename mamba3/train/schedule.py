"""The learning rate as a pure function of the step: a linear warm-up, then a cosine, or a plateau and a linear fall.

lr(k) = peak · (k + 1) / warmup                                          for k < warmup
cosine  lr(k) = floor + (peak − floor) · (1 + cos(π · progress)) / 2     after, progress = 0 → 1 at the last step
wsd     lr(k) = peak, then floor + (peak − floor) · left                 left = 1 → 0 over the last `decay` steps
(wsd: warm-up, stable, decay; Hu et al., arXiv 2404.06395)
"""

import math

from mamba3.train.config import TrainConfig


def learning_rate(
    step: int, *, peak: float, warmup: int, steps: int, floor: float, schedule: str = "cosine", decay: int = 0
) -> float:
    """The rate of step `step` (0 is the first) of a run of `steps` steps, `warmup` < `steps` of which rise.

    `floor` is the rate of the last step, in the same unit as `peak`; `decay` counts the steps in which "wsd" falls.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "wsd":
        left = (steps - 1 - step) / max(min(decay, steps - 1 - warmup), 1)
        return floor + (peak - floor) * min(left, 1.0)
    progress = (step - warmup) / max(steps - 1 - warmup, 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def configured_rate(config: TrainConfig, step: int) -> float:
    """`learning_rate` with the settings of a run."""
    return learning_rate(
        step,
        peak=config.lr,
        warmup=config.warmup_steps,
        steps=config.steps,
        floor=config.lr * config.min_lr_fraction,
        schedule=config.schedule,
        decay=round(config.decay_fraction * config.steps),
    )
