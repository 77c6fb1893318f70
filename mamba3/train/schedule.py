"""The learning rate as a pure function of the step: linear warm-up, then half a cosine down to a floor.

lr(k) = peak · (k + 1) / warmup                                          for k < warmup
lr(k) = floor + (peak − floor) · (1 + cos(π · progress)) / 2             after, progress = 0 → 1 at the last step
"""

import math


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, floor: float) -> float:
    """The rate of step `step` (0 is the first) of a run of `steps` steps, `warmup` < `steps` of which rise.

    `floor` is the rate of the last step, in the same unit as `peak`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(steps - 1 - warmup, 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
