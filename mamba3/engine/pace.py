"""How much is guessed for a sequence: as much as its last guesses were worth.

    all right: twice as many tokens the next time, and no pause        some right: one more than were, and half the pause
    none right: RESTART tokens the next time, after a pause twice as long, of at most LONGEST_PAUSE tokens

A wrong guess costs a part of a step, a right one saves a step: where text repeats itself nearly every token is guessed for, and
where it does not one in LONGEST_PAUSE. It depends on the sequence's own tokens alone, and never on time.
"""

from __future__ import annotations

from dataclasses import dataclass

RESTART, LONGEST_PAUSE = 2, 32


@dataclass(slots=True)
class Pace:
    """length: tokens to guess the next time, None for as many as may be. pause: tokens that were or will be chosen without a
    guess after the last failure. resumes: how many tokens will then have been chosen."""

    length: int | None = None
    pause: int = 0
    resumes: int = 0

    def wanted(self, chosen: int, most: int) -> int:
        """Tokens to guess, at most `most`, behind so many chosen ones; 0 in a pause."""
        if chosen < self.resumes:
            return 0
        return max(0, most if self.length is None else min(self.length, most))

    def note(self, guessed: int, right: int, chosen: int) -> None:
        """Of a guess the first tokens were right; so many tokens are chosen now."""
        if right == guessed:
            self.length = None if self.length is None else max(self.length, 2 * guessed)
            self.pause = 0
        elif right:
            self.length, self.pause = right + 1, self.pause // 2
        else:
            self.length, self.pause = RESTART, min(max(1, 2 * self.pause), LONGEST_PAUSE)
            self.resumes = chosen + self.pause
