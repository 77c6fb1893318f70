"""A decode step that was launched and is not looked at yet: on a GPU it runs while the host does other things.

Rows change hands behind it on the same stream: what it read and wrote is that of the sequences that had the rows when it was
launched. One that was aborted since hears nothing of it; one that lost its row took along a state that has read its token.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Several

from torch import Tensor

from mamba3.engine.sampler import Choice, sample
from mamba3.engine.sequence import Sequence, Stage


class Flight:
    """logits [n, v]: row i was that of sequences[i]. tokens: waits for what the device chose; None: `sample` is to choose."""

    def __init__(self, sequences: Several[Sequence], logits: Tensor, tokens: Callable[[], list[int]] | None = None):
        self._sequences, self._logits, self._tokens = tuple(sequences), logits, tokens

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for it."""
        return any(sequence.stage is not Stage.DONE for sequence in self._sequences)

    def land(self) -> list[tuple[Sequence, Choice]]:
        """The next token of each sequence that is still under way."""
        if self._tokens is not None:
            pairs = zip(self._sequences, self._tokens(), strict=True)
            return [(sequence, Choice(token)) for sequence, token in pairs if sequence.stage is not Stage.DONE]
        rows = [row for row, sequence in enumerate(self._sequences) if sequence.stage is not Stage.DONE]
        if not rows:
            return []
        sequences = [self._sequences[row] for row in rows]
        logits = self._logits if len(rows) == len(self._sequences) else self._logits[rows]
        return list(zip(sequences, sample(logits, [sequence.draws for sequence in sequences]), strict=True))
