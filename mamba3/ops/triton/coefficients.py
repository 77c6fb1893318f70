# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""The coefficients of each chunk, from which the matrix stages need no scan over tokens.

    decay_l = sum_{i <= l} log2(e) A_i dt_i           (from the chunk's start)
    source_l = decay_l - log2(w_l)                    w_l = gamma_l + (1 - lam_{l+1}) dt_{l+1}, gamma alone at a sequence's end

so that decay(s -> t) w_s = 2^(decay_t - source_s). The backward pass takes w itself, `weight`.
Rows are [h, t], the order in which a program of one head reads them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba3.ops.triton.angles import LOG2_E


@triton.jit
def coefficients_kernel(
    dt, A_rate, lam, chunks, decay, decay_low, source, source_low, weight, gamma, T,
    H: tl.constexpr, L: tl.constexpr, HB: tl.constexpr, EXACT: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """One program a (chunk, HB heads). chunks [c, 2]: first token, end of its sequence. `*_low`: what float32 rounds off."""
    i_c, i_hb = tl.program_id(0), tl.program_id(1)
    i_t, end = tl.load(chunks + i_c * 2), tl.load(chunks + i_c * 2 + 1)
    o_l, o_h = tl.arange(0, L), i_hb * HB + tl.arange(0, HB)
    m_h = o_h < H
    m = (i_t + o_l < end)[:, None] & m_h[None, :]
    m_next = (i_t + o_l + 1 < end)[:, None] & m_h[None, :]
    o_in = i_t.to(tl.int64) * H + (o_l[:, None] * H + o_h[None, :])
    o_out = i_t.to(tl.int64) + (o_l[:, None] + o_h.to(tl.int64)[None, :] * T)

    b_dt = tl.load(dt + o_in, mask=m, other=0.0)  # [l, h]
    b_lam = tl.load(lam + o_in, mask=m, other=0.0)
    b_halo = (1.0 - tl.load(lam + o_in + H, mask=m_next, other=1.0)) * tl.load(dt + o_in + H, mask=m_next, other=0.0)
    b_gamma = b_lam * b_dt
    b_w = b_gamma + b_halo
    b_log = (tl.load(A_rate + o_in, mask=m, other=0.0) * b_dt).to(tl.float64) * LOG2_E
    b_decay = tl.cumsum(b_log, axis=0)
    tl.store(decay + o_out, b_decay.to(tl.float32), mask=m)
    tl.store(gamma + o_out, b_gamma, mask=m)
    if EXACT:
        tl.store(decay_low + o_out, b_decay - b_decay.to(tl.float32).to(tl.float64), mask=m)
    if BACKWARD:
        tl.store(weight + o_out, b_w, mask=m)
    elif EXACT:
        b_source = b_decay - tl.log2(b_w.to(tl.float64))
        tl.store(source_low + o_out, tl.where(b_w > 0, b_source - b_source.to(tl.float32).to(tl.float64), 0.0), mask=m)
        tl.store(source + o_out, b_source.to(tl.float32), mask=m)
    else:
        tl.store(source + o_out, b_decay.to(tl.float32) - tl.log2(b_w), mask=m)
