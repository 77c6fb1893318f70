"""Prompts made up and read before requests come: what would else be compiled, or not fit, while somebody waits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mamba3.engine.config import EngineConfig
from mamba3.lm import Mamba3LM

TILE = 64  # tokens: kernels differ by whether all pieces of a pack end with a chunk


def packs(config: EngineConfig) -> list[list[int]]:
    """Tokens of each sequence of the packs that are read, as a busy engine of these sizes reads them: one prompt, as many as
    are read side by side, lengths that end with a chunk and some that do not, and one token."""
    longest = min(config.prefill_chunk, config.step_tokens)
    found = [*_lengths(longest, 1)]
    if config.prompts > 1 and not config.exact:
        count = min(config.prompts, config.step_tokens)
        found += _lengths(min(longest, config.step_tokens // count), count)
    return [pack for i, pack in enumerate(found) if pack not in found[:i]]


def _lengths(longest: int, count: int) -> list[list[int]]:
    whole = max(1, longest // TILE * TILE or longest)
    return [[whole] * count, [whole] * (count - 1) + [max(1, whole - 1)], [1] * count]


@torch.no_grad()
def rehearse(model: Mamba3LM, config: EngineConfig) -> Iterator[tuple[int, int]]:
    """Read each pack, begun and continued: (done, of how many) after each. ValueError where the largest does not fit."""
    pieces = [(pack, continued) for pack in packs(config) for continued in (False, True)]
    for done, (pack, continued) in enumerate(pieces, 1):
        state = model.init_state(len(pack)) if continued else None
        bounds = torch.tensor([0, *pack]).cumsum(0).tolist() if len(pack) > 1 else None
        try:
            model.prefill(
                model.embedding.weight.new_zeros(1, sum(pack), dtype=torch.int64), state, bounds, last_only=True
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"a step reads up to step_tokens tokens of prompts, and {sum(pack):,} of {len(pack)} prompts do not fit into "
                f"what weights, {config.rows} rows and caches leave of the device's memory: lower step_tokens, prefill_chunk "
                f"or rows. {error}"
            ) from error
        yield done, len(pieces)
