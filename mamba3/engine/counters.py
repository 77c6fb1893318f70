"""What an engine has done since it was made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Sums over all requests."""

    steps: int = 0
    prompt_tokens: int = 0  # read; those that a snapshot spared are not among them
    cached_tokens: int = 0
    chosen_tokens: int = 0
    preemptions: int = 0
    swaps: int = 0  # sequences whose state left the pages for others' sake
    guessed_tokens: int = 0
    right_guesses: int = 0
