# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""A token's activations, its angle, the state's narrow dtypes, rows of padding: what the decode kernels and `block` share."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from mamba3.ops.triton.angles import LOG2_E, TURNS_PER_RADIAN, cos_sin

EPS, PI = tl.constexpr(1e-5), tl.constexpr(3.141592653589793)


@triton.jit
def softplus(v):
    """log(1 + exp(v)); what 1 + exp(v) rounds off is made good by the second factor, so that small results keep their bits."""
    power = tl.exp2(tl.minimum(v, 20.0) * LOG2_E)
    whole = 1.0 + power
    taken = whole - 1.0
    small = tl.where(taken == 0.0, power, tl.log2(whole) * (power / tl.where(taken == 0.0, 1.0, taken)) / LOG2_E)
    return tl.where(v > 20.0, v, small)


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp2(-v * LOG2_E))


@triton.jit
def tanh(v):
    """By its series where 1 - 2 / (1 + exp(2 v)) would cancel; relative error 2e-7."""
    v2 = v * v
    series = v * (1.0 + v2 * (-0.33333333 + v2 * (0.13333333 + v2 * (-0.053968254 + v2 * 0.021869489))))
    return tl.where(tl.abs(v) < 0.25, series, 1.0 - 2.0 / (1.0 + tl.exp2(2.0 * v * LOG2_E)))


@triton.jit
def decay_rate(raw, A_FLOOR: tl.constexpr, HEAVY_TAIL: tl.constexpr):
    """-A of the raw A, at least A_FLOOR."""
    if HEAVY_TAIL:  # noqa: SIM108, the compiler drops the other branch
        rate = tl.maximum(raw, 0.0) + 1.0 / (1.0 - tl.minimum(raw, 0.0))
    else:
        rate = softplus(raw)
    return tl.maximum(rate, A_FLOOR)


@triton.jit
def activations(
    p_dt, dt_bias, i_h, H: tl.constexpr, A_FLOOR: tl.constexpr, HEAVY_TAIL: tl.constexpr, LAM: tl.constexpr
):
    """alpha, beta, gamma and dt of a head from the raw dt, A, lam at p_dt [3 or 2, h]. LAM: a fixed lam, or -1."""
    dt = softplus(tl.load(p_dt + i_h).to(tl.float32) + tl.load(dt_bias + i_h))
    rate = decay_rate(tl.load(p_dt + H + i_h).to(tl.float32), A_FLOOR, HEAVY_TAIL)
    alpha = tl.exp2(-rate * dt * LOG2_E)
    lam = LAM
    if LAM < 0:
        lam = sigmoid(tl.load(p_dt + 2 * H + i_h).to(tl.float32))
    return alpha, (1.0 - lam) * dt * alpha, lam * dt, dt


@triton.jit
def moved_angle(p_phi, p_theta, dt, m_a):
    """phi + pi tanh(theta) dt in [-pi, pi], its cosine and sine.

    Where no turn comes off nothing is rounded but the sum: a unit of phi that changed with every step would carry an error
    of its conversion through all of them.
    """
    b_phi = tl.load(p_phi, mask=m_a, other=0.0)
    b_phi += PI * tanh(tl.load(p_theta, mask=m_a, other=0.0).to(tl.float32)) * dt
    b_turns = tl.floor(b_phi * TURNS_PER_RADIAN + 0.5)
    b_phi = (b_phi - b_turns * 6.28125) - b_turns * 0.0019353071795864769  # 2 pi in two terms, the first exact
    b_cos, b_sin = cos_sin(b_phi * TURNS_PER_RADIAN, False)
    return b_phi, b_cos, b_sin


@triton.jit
def narrow(b_S, dtype: tl.constexpr):
    """float32 to the dtype of the state; bfloat16 by stochastic rounding."""
    if dtype == tl.bfloat16:
        bits = b_S.to(tl.uint32, bitcast=True)
        noise = (bits ^ (bits >> 15)) * 0x2C1B3C6D
        noise = (noise ^ (noise >> 12)) * 0x297A2D39
        return ((bits + (noise >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return b_S.to(dtype)


@triton.jit
def padding(y, live, i_bh, i_b, P: tl.constexpr, PP: tl.constexpr, AHEAD: tl.constexpr):
    """Whether sequence i_b is none of the first `live` ones; its y [p] is then set to 0."""
    beyond = i_b >= tl.load(live)
    if beyond:
        if AHEAD:
            cuda.gdc_wait()
        o_p = tl.arange(0, PP)
        tl.store(y + i_bh * P + o_p, tl.zeros((PP,), y.dtype.element_ty), mask=o_p < P)
    return beyond
