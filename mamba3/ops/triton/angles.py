# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""Angles inside kernels: fixed-point turns, and their cosine and sine.

A turn is 2 pi radians. Phases are int32 with 2^32 = one turn: addition wraps by itself, is exact and associative, so sums
along a sequence do not depend on how it is cut into chunks and segments, and never lose precision however long it is.
"""

from __future__ import annotations

import triton
import triton.language as tl

TURNS_PER_RADIAN = tl.constexpr(0.15915494309189535)
RADIANS_PER_TURN = tl.constexpr(6.283185307179586)


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def wrapped(turns):
    """Turns reduced to [-1/2, 1/2]."""
    return turns - tl.floor(turns + 0.5)


@triton.jit
def turned_by(theta, tick, EXACT: tl.constexpr):
    """theta tick, radians, as wrapped turns. EXACT multiplies in float64, so that no rounding runs along a sequence."""
    if EXACT:
        return wrapped(theta.to(tl.float64) * tick.to(tl.float64) * TURNS_PER_RADIAN)
    else:
        return wrapped(theta * (tick * TURNS_PER_RADIAN))


@triton.jit
def to_fixed(turns):
    """Wrapped turns as fixed point; 2^31 and a shift, because 1/2 turn itself does not fit."""
    return tl.floor(turns * 2147483648.0 + 0.5).to(tl.int32) << 1


@triton.jit
def from_fixed(phase):
    """Fixed point as turns in [-1/2, 1/2)."""
    return phase.to(tl.float32) * 2.3283064365386963e-10


@triton.jit
def exp2(v, HARDWARE: tl.constexpr):
    """2^v; HARDWARE flushes results below 2^-126 to zero, which saves the three instructions that would keep them."""
    if HARDWARE:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [v], tl.float32, True, 1)
    else:
        return tl.exp2(v)


@triton.jit
def rounded_product(a, b, HARDWARE: tl.constexpr):
    """a b, rounded before anything is added to it.

    A compiler that fuses a product into the sum across threads which follows rounds a thread's own term and not its
    partner's: threads that hold the same element then differ in its last bit, and which of them is kept is up to the device.
    """
    if HARDWARE:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1)
    else:
        return a * b


@triton.jit
def sigmoid(v, HARDWARE: tl.constexpr, COARSE: tl.constexpr):
    """1 / (1 + exp(-v)); HARDWARE takes the approximate reciprocal, whose relative error is 2^-23.

    COARSE, with HARDWARE: by tanh.approx, one instruction of relative error 2^-11, for bfloat16's 2^-9.
    """
    if HARDWARE and COARSE:
        return 0.5 + 0.5 * tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * v], tl.float32, True, 1
        )  # fmt: skip
    power = exp2(v * -LOG2_E, HARDWARE)
    if HARDWARE:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], tl.float32, True, 1)
    else:
        return 1.0 / (1.0 + power)


@triton.jit
def silu(v, HARDWARE: tl.constexpr, COARSE: tl.constexpr):
    """v sigmoid(v); COARSE as there."""
    if HARDWARE and COARSE:
        half = 0.5 * v
        return half + half * tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [half], tl.float32, True, 1)
    else:
        return v * sigmoid(v, HARDWARE, COARSE)


@triton.jit
def cos_sin(angle, HARDWARE: tl.constexpr):
    """cos and sin.

    HARDWARE: the special function unit of NVIDIA's GPUs, of an angle in radians; absolute error 1e-6 + 1e-7 |angle|.
    Otherwise polynomials on a quarter of a turn, of an angle in turns, at float32's precision, on any device.
    """
    if HARDWARE:
        cos = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        sin = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        return cos, sin
    else:
        quarter = tl.floor(angle * 4.0 + 0.5)
        v = (angle - quarter * 0.25) * RADIANS_PER_TURN
        v2 = v * v
        sin_v = v + v * v2 * (-1.6666667e-1 + v2 * (8.3333333e-3 + v2 * (-1.98412698e-4 + v2 * 2.7557319e-6)))
        cos_v = 1.0 + v2 * (
            -0.5 + v2 * (4.16666667e-2 + v2 * (-1.38888889e-3 + v2 * (2.48015873e-5 + v2 * -2.7557e-7)))
        )
        quadrant = quarter.to(tl.int32) & 3
        odd = (quadrant & 1) == 1
        cos = tl.where(odd, sin_v, cos_v)
        sin = tl.where(odd, cos_v, sin_v)
        cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos)
        sin = tl.where(quadrant >= 2, -sin, sin)
        return cos, sin
