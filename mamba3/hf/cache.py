"""The cache that transformers carries from one forward to the next: the states of all layers, attention's included.

It also keeps which tokens it has read: 8 bytes each, so that a prompt given a second time is noticed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from mamba3.lm import LMState
from mamba3.lm.state import LayerState
from mamba3.nn.cache import AttentionState
from mamba3.ops import State

NOT_A_TOKEN = -1  # stands for a column that came as an embedding


class Mamba3LMCache(Cache):
    """What a `Mamba3LMForCausalLM` has read. Fork it with copy.deepcopy; `state` is the `LMState`, None before the first token.

    room: tokens that attention layers have room for from the start (a static cache: their tensors then stay where they
    are); the state of a Mamba-3 layer has a fixed size anyway.
    """

    def __init__(self, room: int = 0):
        super().__init__(layers=[])
        self.room = room
        self.state: LMState | None = None
        self.ids: Tensor | None = None  # [b, columns read, padding included]
        self.prompt = 0  # columns of the first call

    # -- what the model does with it

    def advance(self, state: LMState, ids: Tensor) -> None:
        """Take the state after `ids` [b, t] were read."""
        if self.ids is None:
            self.prompt = ids.shape[1]
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids.to(self.ids.device)], dim=1)
        if self.room:
            state.layers = [
                layer.grow(self.room) if isinstance(layer, AttentionState) else layer for layer in state.layers
            ]
        self.state = state

    def check_continues(self, input_ids: Tensor | None) -> None:
        """ValueError when `input_ids` repeat what was read: a state cannot tell that a token is the same as before."""
        read = self.get_seq_length()
        if input_ids is None or self.ids is None or input_ids.shape[0] != self.ids.shape[0] or read < 2:
            return
        ids = self.ids.to(input_ids.device)
        whole = input_ids.shape[1] >= read and torch.equal(input_ids[:, :read], ids)
        again = self.prompt > 1 and torch.equal(input_ids, ids[:, : self.prompt])
        if whole or again:
            raise ValueError(
                f"The cache has read {read} tokens, and input_ids begin with them: they would be read twice. Give only what "
                f"follows, input_ids[:, {read}:], which must be at least the last token chosen; or leave the cache out."
            )

    # -- what transformers asks for

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read, padding included."""
        return 0 if self.ids is None else self.ids.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no end to what a state can read."""
        return -1

    get_max_cache_shape = get_max_length

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether anything was read."""
        return self.state is not None

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    @property
    def batch_size(self) -> int:
        """Sequences held; -1 before the first token."""
        return -1 if self.state is None else self.state.batch_size

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        """False: `generate` shall not compile the forward by itself."""
        return False

    @property
    def is_croppable(self) -> bool:
        """False: a state cannot forget its last tokens."""
        return False

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences, in the order given; an index may repeat."""
        if self.state is not None and self.ids is not None:
            self.state = self.state.select(indices.to(self.state.tokens.device))
            self.ids = self.ids.index_select(0, indices.to(self.ids.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The same, as beam search calls it."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times: for beams, or for several continuations of one conversation."""
        self.batch_select_indices(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def reset(self) -> None:
        """As before the first token."""
        self.state, self.ids, self.prompt = None, None, 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """ValueError: see `is_croppable`."""
        raise ValueError(
            "A recurrent state cannot forget its last tokens; keep copy.deepcopy(cache) of the point to go back to."
        )

    def activate_past_recording(self) -> None:
        """ValueError: see `is_croppable`."""
        self.crop()

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """ValueError: this cache is no list of keys and values."""
        raise ValueError("A Mamba3LMCache holds states, not keys and values; only a Mamba3LM model can use it.")


def put(before: LayerState, rows: Tensor, after: LayerState) -> LayerState:
    """`before` with the sequences `rows` replaced by those of `after`."""
    rows = rows.to(after.S.device if isinstance(after, State) else after.k.device)
    if isinstance(before, State) and isinstance(after, State):
        new = after.tensors()
        return State(**{name: old.index_copy(0, rows, new[name]) for name, old in before.tensors().items()})
    assert isinstance(before, AttentionState) and isinstance(after, AttentionState)
    capacity = max(before.k.shape[1], after.k.shape[1])
    before, after = _sized(before, capacity), _sized(after, capacity)
    k, v, length = (
        getattr(before, n).index_copy(0, rows, getattr(after, n).to(getattr(before, n))) for n in ("k", "v", "length")
    )
    return AttentionState(k, v, length, max(before.used, after.used))


def _sized(state: AttentionState, capacity: int) -> AttentionState:
    missing = capacity - state.k.shape[1]
    pad = (0, 0, 0, 0, 0, missing)
    return state._replace(k=torch.nn.functional.pad(state.k, pad), v=torch.nn.functional.pad(state.v, pad))
