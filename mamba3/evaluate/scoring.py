"""Log-likelihoods of continuations.

    log p(continuation | context) = Σ_i log softmax(logits_i)[continuation_i],   logits_i after context + continuation[:i]

Batches are padded on the right: a causal model's outputs do not depend on what follows, so padding changes nothing but the
order of a sum. Law: any batch gives what each pair gives alone, to rounding. Only the positions that are asked for go
through the head. No length is too long: a state has a fixed size, so nothing is cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mamba3.lm import Mamba3LM


class Scored(NamedTuple):
    """index: of the pair. log_likelihood: in nats. greedy: whether each token of the continuation is the likeliest."""

    index: int
    log_likelihood: float
    greedy: bool


@torch.no_grad()
def log_likelihoods(
    model: Mamba3LM, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 16
) -> Iterator[Scored]:
    """Score (context, continuation) pairs of tokens, the longest first; each result comes with the pair's index.

    ValueError for a pair without context: there is nothing that its first token follows. An empty continuation is certain.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; it is {batch_size}.")
    empty = [i for i, (context, _) in enumerate(pairs) if not context]
    if empty:
        raise ValueError(
            f"A context needs at least one token, such as the end of a text; that of pair {empty[0]} has none."
        )
    yield from (Scored(i, 0.0, True) for i, (_, continuation) in enumerate(pairs) if not continuation)
    lengths = {i: len(a) + len(b) for i, (a, b) in enumerate(pairs) if b}
    order = sorted(lengths, key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        yield from map(Scored, batch, *_score(model, [pairs[i] for i in batch]))


def _score(model: Mamba3LM, pairs: list[tuple[Sequence[int], Sequence[int]]]) -> tuple[list[float], list[bool]]:
    device = model.embedding.weight.device
    rows = [[*context, *continuation][:-1] for context, continuation in pairs]
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    hidden = model.hidden(ids)
    asked = [hidden[i, len(context) - 1 : len(rows[i])] for i, (context, _) in enumerate(pairs)]
    targets = torch.tensor([token for _, continuation in pairs for token in continuation], device=device)
    scores, greedy = _follow(model, torch.cat(asked), targets)
    counts = [len(continuation) for _, continuation in pairs]
    sums = [part.sum().item() for part in scores.split(counts)]
    return sums, [bool(part.all()) for part in greedy.split(counts)]


def _follow(model: Mamba3LM, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [n, d], targets [n]: (log p of each target in float64, whether it is the likeliest)."""
    logits = model.head(hidden)[:, : model.config.vocab_size]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    scores = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    return scores.double(), logits.argmax(-1) == targets


@torch.no_grad()
def rolling_log_likelihood(model: Mamba3LM, tokens: Sequence[int], prefix: int, window: int = 1024) -> float:
    """log p(tokens | prefix) in nats: every token given all that come before it, however many.

    The text is read `window` tokens at a time, the state carried from one to the next: this bounds memory and changes
    nothing else. The harness's own models cut a text into windows that do not know of each other.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1; it is {window}.")
    row, total, state = [prefix, *tokens], 0.0, None
    device = model.embedding.weight.device
    for start in range(0, len(tokens), window):
        ids = torch.tensor([row[start : start + window + 1]], device=device)
        logits, state = model.prefill(ids[:, :-1], state)
        logits = logits[0, :, : model.config.vocab_size]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        total += -torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").double().sum().item()
    return total
