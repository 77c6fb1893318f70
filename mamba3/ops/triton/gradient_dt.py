# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""From the gradients of log alpha, w and gamma to those of dt, A and lambda (and tick, or dt through the angle).

log alpha_t = A_t dt_t      gamma_t = lam_t dt_t      halo_t = (1 - lam_t) dt_t      w_t = gamma_t + halo_{t+1}
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba3.ops.triton.angles import rounded_product


@triton.jit
def gradient_dt_kernel(
    dt, A_rate, lam, weight, chunks, d_row, d_column, d_state, d_gamma, d_kept, d_turn, d_halo, d_dt, d_A, d_lam, d_tick,
    T, H: tl.constexpr, L: tl.constexpr, HB: tl.constexpr, HAS_STATE: tl.constexpr, TURNS: tl.constexpr,
    HAS_TICK: tl.constexpr, EXACT: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """One program a (chunk, HB heads). Rows [h, t] in, [t, h] out. d_halo [s, h]: of each sequence's first token;
    d_turn [h, t]: of tick."""
    i_c, i_hb = tl.program_id(0), tl.program_id(1)
    i_t, end = tl.load(chunks + i_c * 5), tl.load(chunks + i_c * 5 + 1)
    begin, i_s = tl.load(chunks + i_c * 5 + 2), tl.load(chunks + i_c * 5 + 3)
    o_t, o_h = i_t + tl.arange(0, L), i_hb * HB + tl.arange(0, HB)
    m_h = o_h < H
    m = (o_t < end)[:, None] & m_h[None, :]
    o_rows = o_t[:, None] + o_h.to(tl.int64)[None, :] * T
    o_out = o_t.to(tl.int64)[:, None] * H + o_h[None, :]
    b_dt = tl.load(dt + o_out, mask=m, other=0.0)  # [l, h]
    b_lam = tl.load(lam + o_out, mask=m, other=0.0)
    b_column, b_state = tl.load(d_column + o_rows, mask=m, other=0.0), tl.load(d_state + o_rows, mask=m, other=0.0)
    b_w, b_kept = tl.load(weight + o_rows, mask=m, other=0.0), tl.load(d_kept + i_c * H + o_h, mask=m_h, other=0.0)
    b_own = tl.load(d_row + o_rows, mask=m, other=0.0) - b_column * b_w
    b_past = rounded_product(b_state, b_w, HARDWARE)
    if EXACT:
        b_own, b_past = b_own.to(tl.float64), b_past.to(tl.float64)
    b_log = tl.cumsum(b_own, axis=0, reverse=True) + (tl.cumsum(b_past, axis=0) - b_past) + b_kept[None, :]
    b_log = b_log.to(tl.float32)
    b_gamma = tl.load(d_gamma + o_rows, mask=m, other=0.0) + b_column + b_state
    m_before = m & (o_t > begin)[:, None]
    b_halo = tl.load(d_column + o_rows - 1, mask=m_before, other=0.0)
    b_halo += tl.load(d_state + o_rows - 1, mask=m_before, other=0.0)
    if HAS_STATE:
        b_first = tl.load(d_halo + i_s * H + o_h, mask=m_h, other=0.0)
        b_halo += tl.where((o_t == begin)[:, None], b_first[None, :], 0.0)
    b_d_dt = b_log * tl.load(A_rate + o_out, mask=m, other=0.0) + b_lam * b_gamma + (1.0 - b_lam) * b_halo
    if TURNS:
        b_tick = tl.load(d_turn + o_rows, mask=m, other=0.0)
        if HAS_TICK:
            tl.store(d_tick + o_out, b_tick, mask=m)
        else:
            b_d_dt += b_tick
    tl.store(d_dt + o_out, b_d_dt, mask=m)
    tl.store(d_A + o_out, b_log * b_dt, mask=m)
    tl.store(d_lam + o_out, b_dt * (b_gamma - b_halo), mask=m)
