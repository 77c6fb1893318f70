# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""`mamba3.tasks.mixing` of one rank as Triton kernels: of each model, sequence and head one program, chunk after chunk.

    y_t = C_t . (sum_{s < t} exp(sums_t - sums_s) w_s B_s x_s + gamma_t B_t x_t) + D x_t,    gated by silu(z_t)

turn: B and C of each head with their biases, turned by phi, which adds up as integers, 2^32 a turn.
mix: the matrices; what earlier chunks left is the state S [n, p], decays are those within a chunk.
mix_back, turn_back: their gradients, from the last chunk to the first; kept are the inputs, turned B and C, the states.

Float32 in and out. Products take TF32, or three of them each ("tf32x3"), whose error is float32's. Laws: the results and the
gradients of `mixing.mix`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from mamba3.ops.triton.assembler import sound_assembler

TOKENS = 16  # of a chunk; on an H200 32 and 64 spill more registers than they save of the states
WARPS = 4
LENGTHS = ("T", "batch", "chunks")  # one compilation for all
SMALL = ("rope", "frequencies", "B_bias", "C_bias", "D")
TURN = tl.constexpr(2.0**32)
RADIANS = tl.constexpr(2 * math.pi / 2**32)
TURNS = tl.constexpr(1 / (2 * math.pi))


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _steps(theta, tick, rope, frequencies, row, m_t, i_h, o_a, H: tl.constexpr, A: tl.constexpr):
    """theta [l, a] and tick [l]; what the angle advances by, [l, a], of 2^32 a turn."""
    m_a = o_a < A
    b_theta = tl.load(theta + row[:, None] * A + o_a[None, :], mask=m_t[:, None] & m_a[None, :], other=0.0)
    b_tick = tl.load(tick + row * H + i_h, mask=m_t, other=0.0)
    b_rope = rope * tl.load(frequencies + o_a, mask=m_a, other=0.0)
    turns = (b_theta * b_tick[:, None] + tl.where(m_t[:, None], b_rope[None, :], 0.0)) * TURNS
    return b_theta, b_tick, ((turns - tl.floor(turns)) * TURN).to(tl.int64).to(tl.int32)


@triton.jit
def _store_turned(
    v, bias, out, row, p_out, m_t, cos, sin, o_a, o_u, N: tl.constexpr, A: tl.constexpr
):  # fmt: skip
    """Rows of v [t, n] with their head's bias, turned, to rows of out."""
    m_a, m_u = o_a < A, o_u < N - 2 * A
    one, two = m_t[:, None] & m_a[None, :], m_t[:, None] & m_u[None, :]
    p_v, p_o = v + row[:, None] * N, out + p_out[:, None]
    b_1 = tl.load(p_v + o_a[None, :], mask=one, other=0.0) + tl.load(bias + o_a, mask=m_a, other=0.0)[None, :]
    b_2 = tl.load(p_v + A + o_a[None, :], mask=one, other=0.0) + tl.load(bias + A + o_a, mask=m_a, other=0.0)[None, :]
    b_3 = tl.load(p_v + 2 * A + o_u[None, :], mask=two, other=0.0)
    b_3 += tl.load(bias + 2 * A + o_u, mask=m_u, other=0.0)[None, :]
    tl.store(p_o + o_a[None, :], b_1 * cos - b_2 * sin, mask=one)
    tl.store(p_o + A + o_a[None, :], b_1 * sin + b_2 * cos, mask=one)
    tl.store(p_o + 2 * A + o_u[None, :], b_3, mask=two)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=SMALL)
def turn_kernel(
    B, C, theta, tick, rope, frequencies, B_bias, C_bias, Bh, Ch, phases, T, batch, chunks, H: tl.constexpr,
    N: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, UP: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """B, C [m, b, t, n] to Bh, Ch [m, b, h, t, n]; phases [m, b, h, chunks, a] before each chunk."""
    i_m, i_b, i_h = tl.program_id(2), tl.program_id(1), tl.program_id(0)
    sequence = (i_m * batch + i_b).to(tl.int64)
    o_l, o_a, o_u = tl.arange(0, L), tl.arange(0, AP), tl.arange(0, UP)
    of_model, of_head = i_m * H + i_h, sequence * H + i_h
    b_rope, phase = tl.load(rope + i_m), tl.zeros((AP,), tl.int32)
    for k in range(chunks):
        t = k * L + o_l
        m_t, row, p_h = t < T, sequence * T + t, (of_head * T + t) * N
        tl.store(phases + (of_head * chunks + k) * A + o_a, phase, mask=o_a < A)
        _, _, step = _steps(theta, tick, b_rope, frequencies, row, m_t, i_h, o_a, H, A)
        phi = (tl.cumsum(step, axis=0).to(tl.int32) + phase[None, :]).to(tl.float32) * RADIANS
        phase = (phase + tl.sum(step, axis=0)).to(tl.int32)
        cos, sin = tl.cos(phi), tl.sin(phi)
        _store_turned(B, B_bias + of_model * N, Bh, row, p_h, m_t, cos, sin, o_a, o_u, N, A)
        _store_turned(C, C_bias + of_model * N, Ch, row, p_h, m_t, cos, sin, o_a, o_u, N, A)


@triton.jit
def _weights(log_alpha, w, gamma, p_h, m_t, L: tl.constexpr):
    """sums, w [l]; decay [l, l], zero but below the diagonal; what multiplies the scores [l, l]; the chunk's sum."""
    b_log = tl.load(log_alpha + p_h, mask=m_t, other=0.0)
    b_w, b_gamma = tl.load(w + p_h, mask=m_t, other=0.0), tl.load(gamma + p_h, mask=m_t, other=0.0)
    sums, o_l = tl.cumsum(b_log, axis=0), tl.arange(0, L)
    below = o_l[:, None] > o_l[None, :]
    decay = tl.exp(tl.where(below, sums[:, None] - sums[None, :], -float("inf")))
    weights = decay * b_w[None, :] + tl.where(o_l[:, None] == o_l[None, :], b_gamma[:, None], 0.0)
    return sums, b_w, decay, weights, tl.sum(b_log, axis=0)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=SMALL)
def mix_kernel(
    x, Bh, Ch, z, log_alpha, w, gamma, D, y, states, T, batch, chunks, H: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, L: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [m, b, t, h, p]; states [m, b, h, chunks, n, p] before each chunk, if KEEP."""
    i_m, i_b, i_h = tl.program_id(2), tl.program_id(1), tl.program_id(0)
    sequence = (i_m * batch + i_b).to(tl.int64)
    of_head = sequence * H + i_h
    o_l, o_n, o_p = tl.arange(0, L), tl.arange(0, NP), tl.arange(0, PP)
    p_S, m_S = o_n[:, None] * P + o_p[None, :], (o_n < N)[:, None] & (o_p < P)[None, :]
    b_D, S = tl.load(D + i_m * H + i_h), tl.zeros((NP, PP), tl.float32)
    for k in range(chunks):
        t = k * L + o_l
        m_t, row = t < T, sequence * T + t
        m_x, p_x = m_t[:, None] & (o_p < P)[None, :], (row[:, None] * H + i_h) * P + o_p[None, :]
        m_n, p_n = m_t[:, None] & (o_n < N)[None, :], (of_head * T + t)[:, None] * N + o_n[None, :]
        if KEEP:
            tl.store(states + (of_head * chunks + k) * (N * P) + p_S, S, mask=m_S)
        b_B, b_C = tl.load(Bh + p_n, mask=m_n, other=0.0), tl.load(Ch + p_n, mask=m_n, other=0.0)
        b_x = tl.load(x + p_x, mask=m_x, other=0.0)
        sums, b_w, _, weights, total = _weights(log_alpha, w, gamma, row * H + i_h, m_t, L)
        scores = _product(b_C, tl.trans(b_B), PRECISION) * weights
        b_y = tl.exp(sums)[:, None] * _product(b_C, S, PRECISION) + b_D * b_x + _product(scores, b_x, PRECISION)
        b_z = tl.load(z + p_x, mask=m_x, other=0.0)
        tl.store(y + p_x, b_y * b_z * tl.sigmoid(b_z), mask=m_x)
        out = (tl.exp(total - sums) * b_w)[:, None] * b_x
        S = tl.exp(total) * S + _product(tl.trans(b_B), out, PRECISION)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=SMALL)
def mix_back_kernel(
    x, Bh, Ch, z, log_alpha, w, gamma, D, states, dy, dx, dB, dC, dz, dlog_alpha, dw, dgamma, dD, T, batch, chunks,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, L: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dB, dC [m, b, h, t, n] of turned B and C; dD [m, b, h]."""
    i_m, i_b, i_h = tl.program_id(2), tl.program_id(1), tl.program_id(0)
    sequence = (i_m * batch + i_b).to(tl.int64)
    of_head = sequence * H + i_h
    o_l, o_n, o_p = tl.arange(0, L), tl.arange(0, NP), tl.arange(0, PP)
    p_S, m_S = o_n[:, None] * P + o_p[None, :], (o_n < N)[:, None] & (o_p < P)[None, :]
    b_D, dS, sum_D = tl.load(D + i_m * H + i_h), tl.zeros((NP, PP), tl.float32), tl.zeros((PP,), tl.float32)
    for i in range(chunks):
        k = chunks - 1 - i
        t = k * L + o_l
        m_t, row = t < T, sequence * T + t
        m_x, p_x = m_t[:, None] & (o_p < P)[None, :], (row[:, None] * H + i_h) * P + o_p[None, :]
        m_n, p_n = m_t[:, None] & (o_n < N)[None, :], (of_head * T + t)[:, None] * N + o_n[None, :]
        p_h = row * H + i_h
        b_B, b_C = tl.load(Bh + p_n, mask=m_n, other=0.0), tl.load(Ch + p_n, mask=m_n, other=0.0)
        b_x = tl.load(x + p_x, mask=m_x, other=0.0)
        sums, b_w, decay, weights, total = _weights(log_alpha, w, gamma, p_h, m_t, L)
        out, kept, into = tl.exp(total - sums), tl.exp(total), tl.exp(sums)
        scores = _product(b_C, tl.trans(b_B), PRECISION)
        S = tl.load(states + (of_head * chunks + k) * (N * P) + p_S, mask=m_S, other=0.0)
        read = _product(b_C, S, PRECISION)
        b_y = into[:, None] * read + b_D * b_x + _product(scores * weights, b_x, PRECISION)
        b_dy, b_z = tl.load(dy + p_x, mask=m_x, other=0.0), tl.load(z + p_x, mask=m_x, other=0.0)
        gate = tl.sigmoid(b_z)
        tl.store(dz + p_x, b_dy * b_y * gate * (1 + b_z * (1 - gate)), mask=m_x)
        b_dy = b_dy * b_z * gate
        sum_D += tl.sum(b_dy * b_x, axis=0)
        dsums = into * tl.sum(read * b_dy, axis=1)
        whole = tl.sum(tl.sum(dS * S, axis=1), axis=0)
        seen = _product(b_B, dS, PRECISION)
        leaving = out * tl.sum(seen * b_x, axis=1)
        b_dx = _product(tl.trans(scores * weights), b_dy, PRECISION) + b_D * b_dy + (out * b_w)[:, None] * seen
        tl.store(dx + p_x, b_dx, mask=m_x)
        dM = _product(b_dy, tl.trans(b_x), PRECISION)
        within = dM * scores
        tl.store(dgamma + p_h, tl.sum(tl.where(o_l[:, None] == o_l[None, :], within, 0.0), axis=1), mask=m_t)
        within = within * decay
        b_dw = tl.sum(within, axis=0) + leaving
        tl.store(dw + p_h, b_dw, mask=m_t)
        dsums += tl.sum(within * b_w[None, :], axis=1) - b_w * b_dw
        dtotal = kept * whole + tl.sum(b_w * leaving, axis=0)
        tl.store(dlog_alpha + p_h, tl.sum(dsums, axis=0) - tl.cumsum(dsums, axis=0) + dsums + dtotal, mask=m_t)
        dM = dM * weights
        b_in = into[:, None] * b_dy
        tl.store(dC + p_n, _product(dM, b_B, PRECISION) + _product(b_in, tl.trans(S), PRECISION), mask=m_n)
        b_out = (out * b_w)[:, None] * b_x
        b_dB = _product(tl.trans(dM), b_C, PRECISION) + _product(b_out, tl.trans(dS), PRECISION)
        tl.store(dB + p_n, b_dB, mask=m_n)
        dS = kept * dS + _product(tl.trans(b_C), b_in, PRECISION)
    tl.store(dD + of_head, tl.sum(sum_D, axis=0))


@triton.jit
def _turned_back(v, d, row, m_t, cos, sin, o_a, o_u, N: tl.constexpr, A: tl.constexpr):
    """d, the gradient of turned rows v, as that of the rows before, in place; its sums over tokens and the angles' [l, a]."""
    one, two = m_t[:, None] & (o_a < A)[None, :], m_t[:, None] & (o_u < N - 2 * A)[None, :]
    p_1, p_2, p_3 = row[:, None] + o_a[None, :], row[:, None] + A + o_a[None, :], row[:, None] + 2 * A + o_u[None, :]
    d_1, d_2 = tl.load(d + p_1, mask=one, other=0.0), tl.load(d + p_2, mask=one, other=0.0)
    d_3 = tl.load(d + p_3, mask=two, other=0.0)
    dphi = d_2 * tl.load(v + p_1, mask=one, other=0.0) - d_1 * tl.load(v + p_2, mask=one, other=0.0)
    b_1, b_2 = d_1 * cos + d_2 * sin, d_2 * cos - d_1 * sin
    tl.store(d + p_1, b_1, mask=one)
    tl.store(d + p_2, b_2, mask=one)
    return tl.sum(b_1, axis=0), tl.sum(b_2, axis=0), tl.sum(d_3, axis=0), dphi


@triton.jit
def _store_bias(v, b_1, b_2, b_3, o_a, o_u, N: tl.constexpr, A: tl.constexpr):
    tl.store(v + o_a, b_1, mask=o_a < A)
    tl.store(v + A + o_a, b_2, mask=o_a < A)
    tl.store(v + 2 * A + o_u, b_3, mask=o_u < N - 2 * A)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=SMALL)
def turn_back_kernel(
    theta, tick, rope, frequencies, Bh, Ch, phases, dB, dC, dtheta, dtick, dB_bias, dC_bias, T, batch, chunks,
    H: tl.constexpr, N: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, UP: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """dB, dC in place; dtheta [m, b, h, t, a], dtick [m, b, t, h]; dB_bias, dC_bias [m, b, h, n]."""
    i_m, i_b, i_h = tl.program_id(2), tl.program_id(1), tl.program_id(0)
    sequence = (i_m * batch + i_b).to(tl.int64)
    o_l, o_a, o_u = tl.arange(0, L), tl.arange(0, AP), tl.arange(0, UP)
    of_head = sequence * H + i_h
    b_rope, turned = tl.load(rope + i_m), tl.zeros((AP,), tl.float32)
    bB_1, bB_2, bB_3 = tl.zeros((AP,), tl.float32), tl.zeros((AP,), tl.float32), tl.zeros((UP,), tl.float32)
    bC_1, bC_2, bC_3 = tl.zeros((AP,), tl.float32), tl.zeros((AP,), tl.float32), tl.zeros((UP,), tl.float32)
    for i in range(chunks):
        k = chunks - 1 - i
        t = k * L + o_l
        m_t, row, of_row = t < T, sequence * T + t, of_head * T + t
        b_theta, b_tick, step = _steps(theta, tick, b_rope, frequencies, row, m_t, i_h, o_a, H, A)
        phase = tl.load(phases + (of_head * chunks + k) * A + o_a, mask=o_a < A, other=0)
        phi = (tl.cumsum(step, axis=0).to(tl.int32) + phase[None, :]).to(tl.float32) * RADIANS
        cos, sin = tl.cos(phi), tl.sin(phi)
        s_1, s_2, s_3, dphi = _turned_back(Bh, dB, of_row * N, m_t, cos, sin, o_a, o_u, N, A)
        bB_1, bB_2, bB_3 = bB_1 + s_1, bB_2 + s_2, bB_3 + s_3
        s_1, s_2, s_3, more = _turned_back(Ch, dC, of_row * N, m_t, cos, sin, o_a, o_u, N, A)
        bC_1, bC_2, bC_3 = bC_1 + s_1, bC_2 + s_2, bC_3 + s_3
        dphi += more
        whole = tl.sum(dphi, axis=0)
        dstep = (turned + whole)[None, :] - tl.cumsum(dphi, axis=0) + dphi
        turned += whole
        m_a = m_t[:, None] & (o_a < A)[None, :]
        tl.store(dtheta + of_row[:, None] * A + o_a[None, :], dstep * b_tick[:, None], mask=m_a)
        tl.store(dtick + row * H + i_h, tl.sum(dstep * b_theta, axis=1), mask=m_t)
    _store_bias(dB_bias + of_head * N, bB_1, bB_2, bB_3, o_a, o_u, N, A)
    _store_bias(dC_bias + of_head * N, bC_1, bC_2, bC_3, o_a, o_u, N, A)


def padded(size: int) -> int:
    """What a tile's side of so many channels is."""
    return max(16, triton.next_power_of_2(size))


def tf32() -> str:
    """How `tl.dot` names the precision that PyTorch's matrix products of float32 have now."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


class Mixed(Function):
    """y [m, b, t, h, p] of x, z [m, b, t, h, p]; B, C [m, b, t, n]; theta [m, b, t, a] and tick, log_alpha, w, gamma
    [m, b, t, h]; rope [m], frequencies [a]; B_bias, C_bias [m, h, n]; D [m, h]. precision: of products, as tl.dot names it.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, B: Tensor, C: Tensor, z: Tensor, theta: Tensor, tick: Tensor, rope: Tensor,
        frequencies: Tensor, log_alpha: Tensor, w: Tensor, gamma: Tensor, B_bias: Tensor, C_bias: Tensor, D: Tensor,
        precision: str,
    ):  # fmt: skip
        angles = [v.contiguous() for v in (theta, tick, rope, frequencies)]
        x, z, log_alpha, w, gamma, D = (v.contiguous() for v in (x, z, log_alpha, w, gamma, D))
        m, b, t, h, p = x.shape
        n, a, chunks, keep = B.shape[-1], theta.shape[-1], -(-t // TOKENS), any(ctx.needs_input_grad)
        Bh, Ch = (x.new_empty(m, b, h, t, n) for _ in range(2))
        phases = x.new_empty((m, b, h, chunks, a), dtype=torch.int32)
        states, y = x.new_empty((m, b, h, chunks, n, p) if keep else (0,)), torch.empty_like(x)
        grid, sizes = (h, b, m), (t, b, chunks)
        ctx.turns = dict(H=h, N=n, A=a, AP=padded(a), UP=padded(n - 2 * a), L=TOKENS, num_warps=WARPS)
        ctx.mixes = dict(
            H=h, P=p, N=n, PP=padded(p), NP=padded(n), L=TOKENS, PRECISION=precision, num_warps=WARPS, num_stages=1
        )
        with sound_assembler(x.device):
            turn_kernel[grid](
                B.contiguous(), C.contiguous(), *angles, B_bias.contiguous(), C_bias.contiguous(), Bh, Ch, phases,
                *sizes, **ctx.turns,
            )  # fmt: skip
            mix_kernel[grid](x, Bh, Ch, z, log_alpha, w, gamma, D, y, states, *sizes, KEEP=keep, **ctx.mixes)
        ctx.save_for_backward(*angles, x, Bh, Ch, z, log_alpha, w, gamma, D, states, phases)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        *angles, x, Bh, Ch, z, log_alpha, w, gamma, D, states, phases = ctx.saved_tensors
        m, b, t, h, _ = x.shape
        n, a, new = Bh.shape[-1], phases.shape[-1], x.new_empty
        dx, dz, dB, dC = (torch.empty_like(v) for v in (x, z, Bh, Ch))
        dtheta, dD = new(m, b, h, t, a), new(m, b, h)
        dtick, dlog_alpha, dw, dgamma = (torch.empty_like(w) for _ in range(4))
        dB_bias, dC_bias = (new(m, b, h, n) for _ in range(2))
        grid, sizes = (h, b, m), (t, b, states.shape[3])
        with sound_assembler(x.device):
            mix_back_kernel[grid](
                x, Bh, Ch, z, log_alpha, w, gamma, D, states, dy.contiguous(), dx, dB, dC, dz, dlog_alpha, dw, dgamma,
                dD, *sizes, **ctx.mixes,
            )  # fmt: skip
            turn_back_kernel[grid](
                *angles, Bh, Ch, phases, dB, dC, dtheta, dtick, dB_bias, dC_bias, *sizes, **ctx.turns
            )
        return (
            dx, dB.sum(2), dC.sum(2), dz, dtheta.sum(2), dtick, None, None, dlog_alpha, dw, dgamma, dB_bias.sum(1),
            dC_bias.sum(1), dD.sum(1), None,
        )  # fmt: skip
