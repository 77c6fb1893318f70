"""Random numbers that depend on nothing but a seed and a place: the noise of token v at draw n of a request.

    argmax_v (logits_v + g_v),  g_v = -log(-log u_v),  draws v with probability softmax(logits)_v      (Gumbel 1954)
    u_v = mix(key + (v + 1) 0x9E3779B97F4A7C15) / 2^64,  key = BLAKE2b(seed, continuation, n)           (SplitMix64)

There is no generator to carry along, so that batches, preemption, forks and rejected drafts cannot shift the draws.
Source of mix: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
"""

from __future__ import annotations

import hashlib

from torch import Tensor

_GOLDEN, _FIRST, _SECOND = (v - 2**64 for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def draw_key(seed: int, continuation: int, draw: int) -> int:
    """The key of one draw, a signed 64-bit integer."""
    text = f"{seed} {continuation} {draw}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def uniform(keys: Tensor, tokens: Tensor) -> Tensor:
    """float64 in (0, 1) for keys [b] int64 and tokens [v] or [b, v] int64: [b, v]."""
    z = (tokens + 1).mul_(_GOLDEN) + keys[:, None]
    for bits, factor in ((30, _FIRST), (27, _SECOND), (31, None)):
        z ^= (z >> bits).bitwise_and_(
            2 ** (64 - bits) - 1
        )  # >> of a signed integer repeats the sign; the mask takes it off
        if factor is not None:
            z *= factor
    return (z >> 11).bitwise_and_(2**53 - 1).double().add_(0.5).mul_(2.0**-53)


def gumbel(keys: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, of tokens as in `uniform`."""
    return uniform(keys, tokens).log_().neg_().log_().neg_()
