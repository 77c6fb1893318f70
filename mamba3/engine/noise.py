"""Random numbers that depend on nothing but a seed and a place: the noise of token v at draw n of a request.

    argmax_v (logits_v + g_v),  g_v = -log(-log u_v),  draws v with probability softmax(logits)_v      (Gumbel 1954)
    u_v = mix(key + (v + 1) 0x9E3779B97F4A7C15) / 2^64,  key = BLAKE2b(seed, continuation, n)           (SplitMix64)

There is no generator to carry along, so that batches, preemption, forks and rejected drafts cannot shift the draws.
Source of mix: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = (v - 2**64 for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def draw_key(seed: int, continuation: int, draw: int) -> int:
    """The key of one draw, a signed 64-bit integer."""
    text = f"{seed} {continuation} {draw}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def _xor_shift(z: Tensor, bits: int) -> Tensor:
    return z ^ ((z >> bits) & (2 ** (64 - bits) - 1))  # >> of a signed integer repeats the sign; the mask takes it off


def uniform(keys: Tensor, count: int) -> Tensor:
    """float64 [b, count] in (0, 1) from keys [b] int64."""
    z = keys[:, None] + torch.arange(1, count + 1, device=keys.device) * _GOLDEN
    z = _xor_shift(z, 30) * _FIRST
    z = _xor_shift(z, 27) * _SECOND
    z = _xor_shift(z, 31)
    return (((z >> 11) & (2**53 - 1)).double() + 0.5) * 2.0**-53


def gumbel(keys: Tensor, count: int) -> Tensor:
    """Standard Gumbel noise, float64 [b, count]."""
    return -(-uniform(keys, count).log()).log()
