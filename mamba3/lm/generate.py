"""The plain loop: read the prompt, then choose and read one token after another. The engine's oracle.

The state that comes back has read every token but the last one chosen: to go on, pass that one as the next prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mamba3.lm.state import LMState

if TYPE_CHECKING:
    from mamba3.lm.model import Mamba3LM


class Generation(NamedTuple):
    """tokens [b, n]: what was chosen, stop tokens included, then the sequence's last token repeated once it has stopped.

    lengths [b]: how many of them count. finished [b]: whether a stop token ended the sequence. state: has read the prompt
    and all tokens but the last.
    """

    tokens: Tensor
    lengths: Tensor
    finished: Tensor
    state: LMState


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen. The filters apply in the order of the fields; temperature 0 is greedy."""

    repetition_penalty: float = 1.0  # > 1: logits of tokens seen (prompt included) are divided (if > 0) or multiplied
    temperature: float = 0.0  # >= 0
    top_k: int = 0  # keep the k likeliest; 0: all
    top_p: float = 1.0  # keep the likeliest whose mass reaches p, in (0, 1]
    min_p: float = 0.0  # keep those at least min_p times as likely as the likeliest, in [0, 1]

    def __post_init__(self):
        laws = {
            "temperature must be >= 0": self.temperature >= 0,
            "top_k must be >= 0 (0 keeps all)": self.top_k >= 0,
            "top_p must lie in (0, 1]": 0 < self.top_p <= 1,
            "min_p must lie in [0, 1]": 0 <= self.min_p <= 1,
            "repetition_penalty must be > 0": self.repetition_penalty > 0,
        }
        for law, holds in laws.items():
            if not holds:
                raise ValueError(f"{law}; it is {getattr(self, law.split()[0])}.")


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [b, v] after temperature, with -inf where top_k, top_p or min_p rule a token out; one always stays."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), -torch.inf)
    if sampling.min_p > 0:
        probability = logits.softmax(-1)
        logits = logits.masked_fill(probability < sampling.min_p * probability.amax(-1, keepdim=True), -torch.inf)
    return logits


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """The repetition penalty of Keskar et al. (2019): towards less likely for each token in `seen` [b, v]."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Tokens [b] from logits [b, v]: the likeliest, or drawn with `generator`."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probability = filter_logits(logits.float(), sampling).softmax(-1)
    return torch.multinomial(probability, 1, generator=generator).squeeze(-1)


def _check(model: Mamba3LM, input_ids: Tensor, max_new_tokens: int, state: LMState | None) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; it is {max_new_tokens}.")
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids must be [b, t] with at least one token; it came with shape {tuple(input_ids.shape)}. To go on from "
            "a state, give the last token chosen."
        )
    if state is not None and state.batch_size != input_ids.shape[0]:
        raise ValueError(f"The state holds {state.batch_size} sequences but input_ids {input_ids.shape[0]}.")


@torch.no_grad()
def generate(
    model: Mamba3LM,
    input_ids: Tensor,
    *,
    max_new_tokens: int = 128,
    state: LMState | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop_tokens: Iterable[int] = (),
    seed: int | None = None,
    on_token: Callable[[Tensor], None] | None = None,
    prefill_chunk: int = 2048,
) -> Generation:
    """Continue each prompt.

    Args:
        input_ids: [b, t] prompts of equal length, or, with `state`, what follows what the state has read.
        max_new_tokens: tokens to choose at most.
        state: where to start; it is not changed. None: before the first token.
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`; temperature 0 is greedy. Tokens count as
            seen for the penalty when they are in input_ids or were chosen since.
        stop_tokens: a sequence ends after choosing one of these; all ended: the loop stops.
        seed: of the draws; the same seed gives the same tokens. None: PyTorch's default generator.
        on_token: called with the tokens [b] as they are chosen (streaming).
        prefill_chunk: prompt tokens read at a time, which bounds memory; the result does not depend on it but for rounding.

    Raises ValueError for settings out of range, empty prompts and a state of another batch size.
    """
    _check(model, input_ids, max_new_tokens, state)
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    vocabulary, device = model.config.vocab_size, input_ids.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    stops = torch.tensor(sorted(set(stop_tokens)), dtype=torch.long, device=device)
    state = model.init_state(input_ids.shape[0]) if state is None else state.clone()
    for piece in input_ids.split(max(1, prefill_chunk), dim=1):
        logits, state = model.prefill(piece, state, last_only=True)
    logits = logits[:, -1]
    seen = torch.zeros(input_ids.shape[0], vocabulary, dtype=torch.bool, device=device)
    seen.scatter_(1, input_ids, True)
    finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=device)
    lengths = torch.zeros(input_ids.shape[0], dtype=torch.long, device=device)
    chosen: list[Tensor] = []
    while True:
        logits = logits[:, :vocabulary]
        if repetition_penalty != 1:
            logits = penalize(logits, seen, repetition_penalty)
        token = choose(logits, sampling, generator)
        if chosen:
            token = torch.where(finished, chosen[-1], token)
        lengths += ~finished
        chosen.append(token)
        seen.scatter_(1, token.unsqueeze(1), True)
        if on_token is not None:
            on_token(token)
        if len(stops):
            finished = finished | torch.isin(token, stops)
        if len(chosen) == max_new_tokens or (len(stops) and bool(finished.all())):
            return Generation(torch.stack(chosen, dim=1), lengths, finished, state)
        logits, state = model.step(token, state)
