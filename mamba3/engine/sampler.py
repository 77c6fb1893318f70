"""Choosing the next token of many sequences at once, each by its own settings and seed.

Penalties, bias and filters are those of `lm.generate`; the draw is a Gumbel maximum with noise that depends on a request's
seed and the draw's number alone (`engine.noise`): a row's result does not depend on the other rows.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mamba3.engine.noise import draw_key, gumbel
from mamba3.engine.request import SamplingParams, TokenLogprob
from mamba3.lm.generate import Sampling, filter_logits, penalize
from mamba3.ops.types import wide_dtype

_NARROW = 1024  # likeliest tokens that are looked at before all are
_PARTS = 64  # of a row of logits, whose likeliest tokens are compared


@dataclass
class Draws:
    """What the choice of one continuation's next token depends on, beside its logits.

    read: tokens of the prompt, wanted where there is a repetition penalty. chosen: how often each token was chosen, where a
    penalty asks for it.
    """

    params: SamplingParams
    seed: int
    continuation: int = 0
    count: int = 0
    read: set[int] = field(default_factory=set)
    chosen: Counter[int] = field(default_factory=Counter)
    plain: bool = field(init=False)  # whether it depends on temperature and noise alone, and nothing else is asked for
    _counts: bool = field(init=False)  # whether `chosen` is asked for

    def __post_init__(self):
        params, filters = self.params, self.params.filters
        self._counts = _adjusts(params)
        filtered = params.temperature > 0 and filters != Sampling(temperature=params.temperature)
        self.plain = not (filtered or self._counts or params.logprobs is not None)

    def note(self, token: int) -> None:
        """A token was chosen."""
        self.count += 1
        if self._counts:
            self.chosen[token] += 1

    def after(self, tokens: Sequence[int]) -> Draws:
        """What the choice after these tokens would depend on, if they were chosen; this one where there are none."""
        if not tokens:
            return self
        later = replace(self, chosen=self.chosen.copy())
        for token in tokens:
            later.note(token)
        return later

    @property
    def key(self) -> int:
        """The key of the next draw."""
        return draw_key(self.seed, self.continuation, self.count)


class Choice(NamedTuple):
    """A token, and its log probability where it was asked for."""

    token: int
    logprob: TokenLogprob | None = None


def sample(logits: Tensor, rows: Sequence[Draws]) -> list[Choice]:
    """The next token of each row from logits [b, v] of any floating dtype; logits are not changed."""
    adjusted = _adjust(logits, rows)
    tokens = adjusted.argmax(-1)
    groups: defaultdict[Sampling, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row.params.temperature > 0:
            groups[row.params.filters].append(i)
    for filters, members in groups.items():
        for part in _blocks(members, logits):
            index = torch.tensor(part, device=logits.device)
            keys = torch.tensor([rows[i].key for i in part], device=logits.device)
            tokens[index] = draw(adjusted[index], filters, keys)
    chosen = tokens.tolist()
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    found = dict(zip(wanted, _logprobs(logits, chosen, rows, wanted), strict=True))
    return [Choice(token, found.get(i)) for i, token in enumerate(chosen)]


def draw(logits: Tensor, filters: Sampling, keys: Tensor) -> Tensor:
    """Tokens [b] drawn from logits [b, v] with the noise of keys [b]. Without filters nothing waits for the device."""
    kept, names = kept_logits(logits.to(wide_dtype(logits.dtype)), filters)
    best = (kept + gumbel(keys, names)).argmax(-1, keepdim=True)
    return names.expand_as(kept).gather(1, best)[:, 0]


def likeliest(logits: Tensor) -> Tensor:
    """argmax of logits [b, v]: [b], the first of equal ones. In two stages, so that a single long row keeps a GPU busy."""
    vocabulary = logits.shape[1]
    if vocabulary < _PARTS:
        return logits.argmax(-1)
    rest = vocabulary % _PARTS
    values, places = logits[:, : vocabulary - rest].unflatten(1, (_PARTS, -1)).max(-1)
    places = places + torch.arange(_PARTS, device=logits.device) * (vocabulary // _PARTS)
    if rest:
        value, place = logits[:, vocabulary - rest :].max(-1, keepdim=True)
        values, places = torch.cat([values, value], 1), torch.cat([places, place + (vocabulary - rest)], 1)
    return places.gather(1, values.argmax(-1, keepdim=True))[:, 0]


def kept_logits(logits: Tensor, filters: Sampling) -> tuple[Tensor, Tensor]:
    """Logits after temperature and filters, and the tokens they are of: [b, k] and [b, k], or [b, v] and [v].

    The kept ones are those of `lm.generate.filter_logits` (but for ties at a cut). Where they are sure to be among the k
    likeliest, no more than these is sorted and given noise, which for a large vocabulary is most of the work.
    """
    vocabulary = logits.shape[1]
    everything = torch.arange(vocabulary, device=logits.device)
    count = filters.top_k if 0 < filters.top_k < _NARROW else _NARROW
    if count >= vocabulary or (filters.top_k == 0 and filters.top_p == 1 and filters.min_p == 0):
        return filter_logits(logits, filters), everything
    scaled = logits / filters.temperature
    values, names = scaled.topk(count)
    whole = values.logsumexp(-1, keepdim=True) if filters.top_k == count else scaled.logsumexp(-1, keepdim=True)
    probability = (values - whole).exp()
    before = probability.cumsum(-1) - probability
    least = values[:, :1] + math.log(filters.min_p) if filters.min_p else torch.full_like(values[:, :1], -math.inf)
    enough = filters.top_k == count or bool(((before[:, -1:] >= filters.top_p) | (values[:, -1:] < least)).all())
    if not enough or filters.top_k >= _NARROW:
        return filter_logits(logits, filters), everything
    beyond = (before >= filters.top_p) if filters.top_p < 1 else torch.zeros_like(before, dtype=torch.bool)
    return values.masked_fill(beyond | (values < least), -math.inf), names


def _blocks(members: list[int], logits: Tensor) -> list[list[int]]:
    """On a CPU one row after another, so that its numbers stay in the cache; elsewhere all at once."""
    return [[i] for i in members] if logits.device.type == "cpu" and logits.shape[1] > _NARROW else [members]


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log probabilities of tokens [b] under logits [b, v], and of the `top` likeliest."""
    logprobs = logits.double().log_softmax(-1)
    mine = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, indices = logprobs.topk(min(top, logits.shape[1]), dim=-1)
    best = zip(indices.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprob(token, value, tuple(zip(*pair, strict=True)))
        for token, value, pair in zip(tokens, mine, best, strict=True)
    ]


def _logprobs(logits: Tensor, chosen: list[int], rows: Sequence[Draws], wanted: list[int]) -> list[TokenLogprob]:
    if not wanted:
        return []
    tops = [rows[i].params.logprobs or 0 for i in wanted]
    found = token_logprobs(logits[wanted], [chosen[i] for i in wanted], max(tops))
    return [TokenLogprob(f.token, f.logprob, f.top[:top]) for f, top in zip(found, tops, strict=True)]


def _adjust(logits: Tensor, rows: Sequence[Draws]) -> Tensor:
    """Logits after penalties and bias; a copy where any row has some."""
    changed = [i for i, row in enumerate(rows) if _adjusts(row.params)]
    if not changed:
        return logits
    logits = logits.clone()
    for i in changed:
        row, params, v = rows[i], rows[i].params, logits[i]
        if params.repetition_penalty != 1:
            seen = torch.zeros_like(v, dtype=torch.bool)
            seen[sorted(row.read | row.chosen.keys())] = True
            v = penalize(v, seen, params.repetition_penalty)
        if row.chosen and (params.presence_penalty or params.frequency_penalty):
            tokens = list(row.chosen)
            counts = torch.tensor([row.chosen[t] for t in tokens], device=v.device, dtype=v.dtype)
            index = torch.tensor(tokens, device=v.device)
            v = v.index_add(0, index, -(params.presence_penalty + params.frequency_penalty * counts))
        if params.logit_bias:
            index = torch.tensor([token for token, _ in params.logit_bias], device=v.device)
            bias = torch.tensor([value for _, value in params.logit_bias], device=v.device, dtype=v.dtype)
            v = v.index_add(0, index, bias)
        logits[i] = v
    return logits


def _adjusts(params: SamplingParams) -> bool:
    penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    return bool(penalties or params.logit_bias)
