"""Models that an engine cannot run as configured, and requests that it cannot serve, told before they wait."""

from __future__ import annotations

import numpy as np

from mamba3.engine.config import EngineConfig
from mamba3.engine.request import Request
from mamba3.lm import Mamba3LM
from mamba3.nn import Mamba3


def check_model(model: Mamba3LM, config: EngineConfig) -> None:
    """ValueError for states in a dtype that the model's step cannot compute with."""
    mixers = [block.mixer for block in model.layers if isinstance(block.mixer, Mamba3)]
    reasons = {why for mixer in mixers if (why := mixer.why_no_kernel()) is not None}
    if config.state_dtype and reasons:
        raise ValueError(
            f"state_dtype = {config.state_dtype!r} needs the decode kernel, which alone computes with such states, but "
            f"{'; '.join(sorted(reasons))}."
        )


def check_request(request: Request, model: Mamba3LM, longest: int | None, *, has_text: bool) -> None:
    """ValueError for tokens, biases, states, lengths and stop strings that do not fit the model and its engine.

    longest: tokens that a sequence may have, None for any number.
    """
    vocabulary, tokens, start = model.config.vocab_size, np.asarray(request.tokens, dtype=np.int64), request.start
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError("A prompt needs at least one token; to go on from a state, give the last token chosen.")
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(f"Tokens must lie in [0, {vocabulary}); they go from {tokens.min()} to {tokens.max()}.")
    if start is not None and start.batch_size != 1:
        raise ValueError(f"A request starts from the state of one sequence; this one holds {start.batch_size}.")
    if start is not None and start.fingerprint != model.fingerprint():
        raise ValueError("The state to start from was made by other weights; use the model that made it.")
    if request.params.stop and not has_text:
        raise ValueError("Stop strings need text; make the engine with a tokenizer, or give stop_tokens.")
    outside = [token for token, _ in request.params.logit_bias if not 0 <= token < vocabulary]
    if outside:
        raise ValueError(f"logit_bias names tokens outside [0, {vocabulary}): {', '.join(map(str, outside[:5]))}.")
    length = len(request.history) + len(tokens)
    if longest is not None and length > longest:
        raise ValueError(
            f"The prompt has {length} tokens, and a sequence at most {longest} (max_length, and what attention_bytes hold)."
        )
