"""Pages: the caches of a hybrid's attention layers, of all sequences, in one piece of memory given out PAGE tokens at a time.

A page holds keys and values of PAGE tokens in every attention layer. It has holders: the row that writes behind its tokens, and
whoever keeps a state (a sequence that waits, a fork, a snapshot). A page that is full is shared by all who have read its
tokens; of the last one, which has places left, each row has a copy of its own. A page without holders is free. It is zeroed
when it is given out: whatever it held reaches nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mamba3.lm import LMState, Mamba3LM
from mamba3.nn import Attention, AttentionState
from mamba3.nn.cache import PAGE


class OutOfPages(RuntimeError):
    """More pages are wanted than are free."""


def pages_of(tokens: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // PAGE)


def attention_layers(model: Mamba3LM) -> list[int]:
    """Which layers are attention."""
    return [i for i, kind in enumerate(model.config.layers) if kind == "attention"]


def page_bytes(model: Mamba3LM) -> int:
    """Bytes of a page: PAGE tokens in every attention layer."""
    cache = _empty_cache(model)
    return 2 * len(attention_layers(model)) * PAGE * cache.k.shape[2:].numel() * cache.k.element_size()


def _empty_cache(model: Mamba3LM) -> AttentionState:
    mixer = next(block.mixer for block in model._blocks() if isinstance(block.mixer, Attention))
    return mixer.init_state(1)


class Pages:
    """kv [2, attention layers, pages, PAGE, n_kv_heads, head_dim]: keys, then values. Page 0 is nobody's (`PagedState`)."""

    def __init__(self, model: Mamba3LM, count: int):
        self.layers, cache = attention_layers(model), _empty_cache(model)
        shape = (2, len(self.layers), count, PAGE, *cache.k.shape[2:])
        self.kv = torch.empty(
            shape, device=cache.k.device, dtype=cache.k.dtype
        )  # on a CPU, pages cost when they are written
        self._begin()

    def _begin(self) -> None:
        self.kv[:, :, 0] = 0
        self._holders = [1] + [0] * (self.kv.shape[2] - 1)
        self._free = list(range(self.count, 0, -1))

    def renewed(self) -> Pages:
        """The same memory, all of it free. What the states of before hold is nothing any more."""
        other = object.__new__(Pages)
        other.layers, other.kv = self.layers, self.kv
        other._begin()
        return other

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def count(self) -> int:
        """All pages that can be held."""
        return len(self._holders) - 1

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.kv.nbytes

    def take(self, count: int) -> list[int]:
        """Free pages, zeroed, with one holder each. Raises OutOfPages."""
        if count > len(self._free):
            raise OutOfPages(f"{count} pages are wanted, and {len(self._free)} of {self.count} are free.")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        if taken:
            self.kv[:, :, taken] = 0
        return taken

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder of each."""
        for page in pages:
            self._holders[page] += 1

    def drop(self, pages: Sequence[int]) -> None:
        """One holder less of each; those without any are free."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._release(page)

    def _release(self, page: int) -> None:
        self._free.append(page)

    def continued(self, pages: Sequence[int], tokens: int) -> list[int]:
        """Pages to write behind the first `tokens` of: the full ones shared, of the last one a copy. Raises OutOfPages."""
        full = tokens // PAGE
        last = self.take(pages_of(tokens) - full)
        self.hold(pages[:full])
        if last:
            self.kv[:, :, last] = self.kv[:, :, pages[full : full + 1]]
        return [*pages[:full], *last]

    # -- states outside rows

    @torch.no_grad()
    def store(self, state: LMState, before: LMState | None = None) -> StoredState:
        """A state of one sequence with its caches in pages; those that `before`, of a beginning of it, fills are shared.

        Raises OutOfPages.
        """
        if isinstance(state, StoredState):
            return state
        tokens = int(state.tokens)
        caches = [cache for cache in state.layers if isinstance(cache, AttentionState)]
        shared = before.held.pages[: int(before.tokens) // PAGE] if isinstance(before, StoredState) else []
        pages = self.take(pages_of(tokens) - len(shared))
        self.hold(shared)
        first = len(shared) * PAGE
        for i, cache in enumerate(caches):
            self._write(i, pages, cache.k[0, first:tokens], cache.v[0, first:tokens])
        rest = [layer for layer in state.layers if not isinstance(layer, AttentionState)]
        return StoredState(rest, state.tokens, state.fingerprint, Held(self, [*shared, *pages]))

    def _write(self, layer: int, pages: list[int], k: Tensor, v: Tensor) -> None:
        """k, v [t, ...] from the first place of the pages on."""
        for target, source in ((self.kv[0, layer], k), (self.kv[1, layer], v)):
            whole = source.new_zeros(len(pages) * PAGE, *source.shape[1:])
            whole[: len(source)] = source
            target[pages] = whole.unflatten(0, (len(pages), PAGE)).to(target.device, target.dtype)

    def fetch(self, state: LMState) -> LMState:
        """The same state as the model takes it, its caches in one piece: a copy. What is no `StoredState` as it is."""
        if not isinstance(state, StoredState):
            return state
        return self.assemble(state.layers, state.held.pages, state.tokens, state.fingerprint)

    def assemble(self, rest: Sequence, pages: Sequence[int], tokens: Tensor, fingerprint: str | None) -> LMState:
        """The state of one sequence from its layers without attention and its pages."""
        used = int(tokens)
        kv = self.kv[:, :, list(pages[: pages_of(used)])].flatten(2, 3)[:, :, None]  # [2, layers, 1, t, heads, e]
        caches = iter([AttentionState(kv[0, i], kv[1, i], tokens.clone(), used) for i in range(len(self.layers))])
        others, layers = iter(rest), []
        for i in range(len(rest) + len(self.layers)):
            layers.append(next(caches) if i in self.layers else next(others))
        return LMState(layers, tokens.clone(), fingerprint)


class Held:
    """Pages held by a state outside a row, as long as anybody has the state."""

    def __init__(self, owner: Pages, pages: list[int]):
        self.pages = pages
        self._drop: Callable[[Sequence[int]], None] = owner.drop

    def __del__(self):
        self._drop(self.pages)


class StoredState(LMState):
    """A state whose caches lie in pages; `layers` are the others. It is never changed, and so a clone shares the pages.

    The model does not take it: see `Pages.fetch`.
    """

    def __init__(self, layers: list, tokens: Tensor, fingerprint: str | None, held: Held):
        super().__init__(layers, tokens, fingerprint)
        self.held = held

    def _map(self, f: Callable, tokens: Tensor) -> StoredState:
        return StoredState([f(layer) for layer in self.layers], tokens, self.fingerprint, self.held)
