# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""The coefficients of each chunk, from which the matrix stages need no scan over tokens.

    decay_l = sum_{i <= l} log2(e) A_i dt_i           (from the chunk's start)
    source_l = decay_l - log2(w_l)                    w_l = gamma_l + (1 - lam_{l+1}) dt_{l+1}, gamma alone at a sequence's end
    turned = sum_l theta_l tick_l                     phase = its exclusive sum over a sequence's chunks, in fixed point

so that decay(s -> t) w_s = 2^(decay_t - source_s). The backward pass takes w itself, `weight`.
Rows are [h, t], the order in which a program of one head reads them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba3.ops.triton.angles import (
    LOG2_E,
    RADIANS_PER_TURN,
    TURNS_PER_RADIAN,
    from_fixed,
    to_fixed,
    turned_by,
    wrapped,
)


@triton.jit
def coefficients_kernel(
    dt, A_rate, lam, tick_bth, theta, chunks, decay, decay_low, source, source_low, weight, gamma, tick, turned, T,
    H: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, L: tl.constexpr, HB: tl.constexpr, EXACT: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """One program a (chunk, HB heads). chunks [c, 2]: first token, end of its sequence. `*_low`: what float32 rounds off."""
    i_c, i_hb = tl.program_id(0), tl.program_id(1)
    i_t, end = tl.load(chunks + i_c * 2), tl.load(chunks + i_c * 2 + 1)
    o_l, o_h, o_a = tl.arange(0, L), i_hb * HB + tl.arange(0, HB), tl.arange(0, AP)
    m_h, m_a = o_h < H, o_a < A
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

    if A > 0:
        tl.store(tick + o_out, tl.load(tick_bth + o_in, mask=m, other=0.0), mask=m)
        b_turned = tl.zeros((HB, AP), tl.int32)
        o_j = tl.arange(0, 8)
        for i in tl.static_range(0, L, 8):
            m_j = i_t + i + o_j < end
            o_theta = i_t.to(tl.int64) * A + ((i + o_j)[:, None] * A + o_a[None, :])
            o_tick = i_t.to(tl.int64) * H + ((i + o_j)[:, None] * H + o_h[None, :])
            b_theta = tl.load(theta + o_theta, mask=m_j[:, None] & m_a[None, :], other=0.0)
            b_tick = tl.load(tick_bth + o_tick, mask=m_j[:, None] & m_h[None, :], other=0.0)
            b_turned += tl.sum(to_fixed(turned_by(b_theta[:, None, :], b_tick[:, :, None], EXACT)), axis=0)
        p_turned = turned + i_c.to(tl.int64) * (H * A) + (o_h[:, None] * A + o_a[None, :])
        tl.store(p_turned, b_turned, mask=m_h[:, None] & m_a[None, :])


@triton.jit
def phases_kernel(
    turned, phi_in, sequences, phi_out, HA: tl.constexpr, CB: tl.constexpr, BLOCK: tl.constexpr, HAS_PHI: tl.constexpr
):
    """turned [c, h a] becomes the phase at each chunk's start, in place; phi_in, phi_out [s, h a] in radians.

    One program a (sequence, BLOCK angles). sequences [s, 4]: first chunk, chunks, first token, end.
    """
    i_s, i_b = tl.program_id(0), tl.program_id(1)
    first, count = tl.load(sequences + i_s * 4), tl.load(sequences + i_s * 4 + 1)
    o_c, o_j = tl.arange(0, CB), i_b * BLOCK + tl.arange(0, BLOCK)
    m_j = o_j < HA
    p_phi = i_s.to(tl.int64) * HA + o_j
    if HAS_PHI:
        b_start = to_fixed(wrapped(tl.load(phi_in + p_phi, mask=m_j, other=0.0).to(tl.float32) * TURNS_PER_RADIAN))
    else:
        b_start = tl.zeros((BLOCK,), tl.int32)
    for i_c in range(0, count, CB):
        p_turned = turned + (first + i_c).to(tl.int64) * HA + (o_c[:, None] * HA + o_j[None, :])
        m = (i_c + o_c < count)[:, None] & m_j[None, :]
        b_turned = tl.load(p_turned, mask=m, other=0)
        b_sum = tl.cumsum(b_turned, axis=0)
        tl.store(p_turned, b_start[None, :] + b_sum - b_turned, mask=m)
        b_start += tl.sum(b_turned, axis=0)
    tl.store(phi_out + p_phi, from_fixed(b_start) * RADIANS_PER_TURN, mask=m_j)
