"""Continuations of prompts in batches, each ended by its own stop text.

Prompts of different lengths are read as one pack, without padding, and their states then step side by side: a state has the
same size whatever it has read. Law: a greedy continuation does not depend on what else is in the batch, to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mamba3.lm import LMState, Mamba3LM
from mamba3.lm.generate import Sampling, choose

PREFILL = 2048  # tokens of a single prompt read at a time, which bounds memory
PACK = 16384  # tokens of several prompts read at a time


@torch.no_grad()
def continue_prompts(
    model: Mamba3LM,
    prompts: Sequence[Sequence[int]],
    decode: Callable[[list[int]], str],
    *,
    stops: Sequence[str] = (),
    end: int | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> Iterator[tuple[int, str]]:
    """(index, text) of each prompt, the longest first. The text ends before the first stop text, or the token `end`.

    decode: text of the tokens chosen so far. sampling: greedy when None.
    """
    if any(not prompt for prompt in prompts):
        raise ValueError("A prompt needs at least one token, such as the end of a text; one has none.")
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"batch_size and max_new_tokens must be at least 1; they are {batch_size} and {max_new_tokens}."
        )
    if "" in stops:
        raise ValueError("A stop text must have at least one character, but an empty one came; leave it out.")
    generator = torch.Generator(model.embedding.weight.device).manual_seed(seed)
    for batch in _batches([len(prompt) for prompt in prompts], batch_size):
        logits, state = _read(model, [prompts[i] for i in batch])
        chosen: list[list[int]] = [[] for _ in batch]
        texts: dict[int, str] = {}
        rows = list(range(len(batch)))  # of `batch`, those that go on
        for count in range(1, max_new_tokens + 1):
            tokens = choose(logits[:, : model.config.vocab_size], sampling or Sampling(), generator)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if token != end:
                    chosen[row].append(token)
                text = decode(chosen[row])
                cut = min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=None)
                if token == end or cut is not None or count == max_new_tokens:
                    texts[row] = text[:cut]
            going = [i for i, row in enumerate(rows) if row not in texts]
            if not going:
                break
            if len(going) < len(rows):
                rows, tokens, state = [rows[i] for i in going], tokens[going], state.select(going)
            logits, state = model.step(tokens, state)
        yield from ((batch[row], texts[row]) for row in range(len(batch)))


def _batches(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Indices, the longest first: at most batch_size at a time, and at most PACK tokens unless there is but one."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == batch_size or sum(lengths[j] for j in batch) + lengths[i] > PACK):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _read(model: Mamba3LM, prompts: list[Sequence[int]]) -> tuple[Tensor, LMState]:
    """(logits [b, v] after each prompt, their states)."""
    device = model.embedding.weight.device
    if len(prompts) > 1:
        ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=device)
        bounds = [0, *itertools.accumulate(len(prompt) for prompt in prompts)]
        logits, state = model.prefill(ids, cu_seqlens=bounds, last_only=True)
        return logits[:, -1], state
    logits, state = torch.empty(0), model.init_state(1)
    for piece in torch.tensor([list(prompts[0])], device=device).split(PREFILL, dim=1):
        logits, state = model.prefill(piece, state, last_only=True)
    return logits[:, -1], state
