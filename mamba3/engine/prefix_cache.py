"""States of token sequences that were read before, so that they need not be read again.

A state is constant in size, and it is exact for the tokens it has read, not for blocks of them: the cache maps whole
sequences of tokens (by BLAKE2b, with their owner) to states. `find` gives the longest one that the prompt begins with.
With the last logits kept, a prompt that repeats exactly is not read at all.

Least recently used snapshots go first when the bytes exceed the budget.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mamba3.lm import LMState

_BRANCHES = 64  # snapshots compared with a prompt to find where it branches off


@dataclass(frozen=True)
class Snapshot:
    """The state after `tokens`, and the logits [v] of what follows where they are known. Neither may be changed."""

    tokens: np.ndarray
    state: LMState
    logits: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + self.tokens.nbytes + (0 if self.logits is None else self.logits.nbytes)


class PrefixCache:
    """At most `budget` bytes of snapshots; 0 keeps none."""

    def __init__(self, budget: int):
        self.budget, self.nbytes = budget, 0
        self.hits, self.misses, self.evictions = 0, 0, 0
        self._snapshots: OrderedDict[tuple[str, int, bytes], Snapshot] = OrderedDict()
        self._lengths: Counter[tuple[str, int]] = Counter()

    def __len__(self) -> int:
        return len(self._snapshots)

    def put(self, owner: str, tokens: Sequence[int] | np.ndarray, state: LMState, logits: Tensor | None = None) -> None:
        """Keep a copy of the state that has read the tokens. The cache of another owner is another cache."""
        if self.budget == 0 or not len(tokens):
            return
        array = np.asarray(tokens, dtype=np.int64)
        key = (owner, len(array), _digest(owner, array))
        known = self._snapshots.get(key)
        if known is not None and (logits is None or known.logits is not None):
            self._snapshots.move_to_end(key)
            return
        self._drop(key)
        snapshot = Snapshot(array, state.clone(), None if logits is None else logits.clone())
        if snapshot.nbytes > self.budget:
            return
        self._snapshots[key] = snapshot
        self._lengths[owner, len(array)] += 1
        self.nbytes += snapshot.nbytes
        while self.nbytes > self.budget:
            self.drop_oldest()

    def find(
        self, owner: str, tokens: Sequence[int], usable: Callable[[int], bool] = lambda length: True
    ) -> Snapshot | None:
        """The longest snapshot that the tokens begin with, of a usable length; of all of them only one with logits."""
        array = np.asarray(tokens, dtype=np.int64)
        lengths = sorted(length for (o, length) in self._lengths if o == owner and length <= len(array))
        best = None
        for length, digest in zip(lengths, _digests(owner, array, lengths), strict=True):
            snapshot = self._snapshots.get((owner, length, digest))
            if snapshot is None or not usable(length) or (length == len(array) and snapshot.logits is None):
                continue
            best = (owner, length, digest)
        if best is None:
            self.misses += 1
            return None
        self.hits += 1
        self._snapshots.move_to_end(best)
        return self._snapshots[best]

    def branch(self, owner: str, tokens: Sequence[int]) -> int:
        """How many of the tokens the recently used snapshot shares that shares most: where a third prompt may branch too."""
        array, longest = np.asarray(tokens, dtype=np.int64), 0
        for _, ((whose, _, _), snapshot) in zip(range(_BRANCHES), reversed(self._snapshots.items()), strict=False):
            if whose == owner:
                longest = max(longest, common_prefix(array, snapshot.tokens))
        return longest

    def drop_oldest(self) -> bool:
        """Forget the snapshot least recently used; whether there was one."""
        if not self._snapshots:
            return False
        self._drop(next(iter(self._snapshots)))
        self.evictions += 1
        return True

    def clear(self) -> None:
        """Forget everything."""
        self._snapshots.clear()
        self._lengths.clear()
        self.nbytes = 0

    def _drop(self, key: tuple[str, int, bytes]) -> None:
        snapshot = self._snapshots.pop(key, None)
        if snapshot is None:
            return
        self.nbytes -= snapshot.nbytes
        self._lengths[key[:2]] -= 1
        if not self._lengths[key[:2]]:
            del self._lengths[key[:2]]


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading elements are equal."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _digests(owner: str, tokens: np.ndarray, lengths: Sequence[int]) -> Iterable[bytes]:
    """The digest of each prefix, lengths ascending, in one pass over the tokens."""
    state, start = hashlib.blake2b(owner.encode(), digest_size=16), 0
    for length in lengths:
        state.update(tokens[start:length].tobytes())
        start = length
        yield state.digest()


def _digest(owner: str, tokens: np.ndarray) -> bytes:
    return next(iter(_digests(owner, tokens, [len(tokens)])))
