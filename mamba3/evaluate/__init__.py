"""Evaluation: lm-evaluation-harness over a `Mamba3LM`, its tasks from files that install offline, needles in haystacks.

`scoring` and `continuing` need PyTorch alone; `harness`, `bundled`, `needles` and `run` need `pip install 'mamba3[eval]'`.
"""

from mamba3.evaluate.continuing import continue_prompts
from mamba3.evaluate.scoring import Scored, log_likelihoods, rolling_log_likelihood

__all__ = ["Scored", "continue_prompts", "log_likelihoods", "rolling_log_likelihood"]
