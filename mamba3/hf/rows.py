"""What a batch of transformers means as sequences: which columns are tokens, and where each sequence begins.

The recurrence has no mask: a padding token would move the state. Wherever a batch is not dense its tokens are laid one
after another and read as a pack, which the recurrence does exactly, so that padding on either side, documents packed in
a row and rows without any token are one case.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Boundaries = Tensor | list[int]


class Rows(NamedTuple):
    """index [n]: the tokens among the b t columns, or None when all are. boundaries [s + 1]: of the pack, None when dense.

    owners: the rows that have a token, in order. packed: some row holds more than one sequence.
    """

    index: Tensor | None
    boundaries: list[int] | None
    owners: list[int]
    packed: bool

    def pack(self, h: Tensor) -> Tensor:
        """h [b, t, ...] to the pack [1, n, ...]; as it is when dense."""
        if self.boundaries is None:
            return h
        flat = h.flatten(0, 1)
        return (flat if self.index is None else flat.index_select(0, self.index.to(h.device))).unsqueeze(0)

    def unpack(self, h: Tensor, batch: int, tokens: int) -> Tensor:
        """The inverse of `pack`; zeros in columns of padding."""
        if self.boundaries is None:
            return h
        flat = h[0]
        if self.index is not None:
            flat = flat.new_zeros(batch * tokens, *flat.shape[1:]).index_copy(0, self.index.to(h.device), flat)
        return flat.unflatten(0, (batch, tokens))


def rows_of(
    batch: int,
    tokens: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Boundaries | None = None,
) -> Rows:
    """The sequences of a [batch, tokens] batch.

    Args:
        attention_mask: [batch, at least tokens], the last columns count; 0 is padding.
        position_ids: [1 or batch, tokens]; a token that does not follow its predecessor's position begins a sequence.
        seq_idx: [1 or batch, tokens]; the number of the sequence that a token is of.
        cu_seqlens: boundaries of sequences packed in one row; they take precedence over the two above.

    Raises ValueError for shapes that do not fit, and for boundaries beside padding.
    """
    real = None if attention_mask is None else _real(attention_mask, batch, tokens)
    if cu_seqlens is not None:
        boundaries = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
        if batch != 1 or real is not None:
            raise ValueError(
                f"cu_seq_lens_q packs sequences into one row without padding; {batch} rows came"
                f"{' with an attention_mask that has zeros' if real is not None else ''}. Leave the mask out or give one row."
            )
        return Rows(None, boundaries, list(range(len(boundaries) - 1)), len(boundaries) > 2)
    marks = [(_spread(batch, tokens, v), step) for v, step in ((position_ids, 1), (seq_idx, 0)) if v is not None]
    if real is None and not any(bool((v.diff() != step).any()) for v, step in marks):
        return Rows(None, None, list(range(batch)), False)
    if real is None:
        real = torch.ones(batch, tokens, dtype=torch.bool, device=marks[0][0].device)
    counts = real.sum(1).tolist()
    index = real.flatten().nonzero().squeeze(1)
    first, owners = [], []
    at = 0
    for row, count in enumerate(counts):
        if count:
            owners.append(row)
            first.append(at)
        at += count
    # What follows what is a matter of tokens: the columns of padding between them count no positions.
    inner = [
        i + 1
        for v, step in marks
        for i in (v.flatten().index_select(0, index.to(v.device)).diff() != step).nonzero().flatten().tolist()
    ]
    boundaries = sorted({*first, *inner, at})
    return Rows(None if at == batch * tokens else index, boundaries, owners, len(boundaries) - 1 > len(owners))


def _real(attention_mask: Tensor, batch: int, tokens: int) -> Tensor | None:
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask must be [{batch}, at least {tokens}], with zeros at padding; it came with shape "
            f"{tuple(attention_mask.shape)}."
        )
    real = attention_mask[:, -tokens:].bool()
    if bool(real.all()):
        return None
    if not bool(real.any()):
        raise ValueError("attention_mask is zero everywhere: there is no token to read.")
    return real


def _spread(batch: int, tokens: int, v: Tensor) -> Tensor:
    if v.ndim != 2 or v.shape[0] not in (1, batch) or v.shape[1] != tokens:
        raise ValueError(
            f"position_ids and seq_idx must be [1 or {batch}, {tokens}]; one came with shape {tuple(v.shape)}."
        )
    return v.expand(batch, -1)
