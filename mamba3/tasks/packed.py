# type: ignore  what launches kernels is Triton, which only looks like Python
"""`folded.answer_logits` of sequences that lie one behind another, for training on a GPU: every pass over memory is a kernel.

    tokens [s],  ends [c]  ->  logits [m, c, v] at each end,        sequence i is tokens ends[i - 1] + 1 ... ends[i]

Each sequence ends at the token that is asked, so nothing is padded but the row itself, and the last layer answers at the ends
alone (`read_kernels`). One rank, float32. Law: the logits and gradients of `folded.answer_logits`, to rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import Function

from mamba3.ops.triton.assembler import sound_assembler
from mamba3.tasks import read_kernels, turn_kernels, weigh_kernels
from mamba3.tasks.coefficient_kernels import Coefficients
from mamba3.tasks.folded import PARTS, Product, Spread, _normed, _precision
from mamba3.tasks.mixing import _frequencies
from mamba3.tasks.mixing_kernels import padded, tf32
from mamba3.tasks.row_kernels import Normed
from mamba3.tasks.widened import Sizes, Switches

TILE = 64  # tokens of a program of weigh_kernels
SERIAL = 32  # heads times tokens of a step of turn_kernels and read_kernels


class Projected(Function):
    """u [m, s, d] times weight [m, d, c] and, exactly, angles [m, d, k]; the weights' gradients as sums over `parts` parts."""

    @staticmethod
    def forward(ctx, u: Tensor, weight: Tensor, angles: Tensor, parts: int):
        ctx.save_for_backward(u, weight, angles)
        ctx.parts = parts
        with _precision(True):
            raw = u @ angles
        return u @ weight, raw

    @staticmethod
    def backward(ctx, drows: Tensor, draw: Tensor):
        u, weight, angles = ctx.saved_tensors
        cut = (ctx.parts, u.shape[1] // ctx.parts)
        du, of_part = drows @ weight.mT, u.unflatten(1, cut).mT
        dweight = (of_part @ drows.unflatten(1, cut)).sum(1)
        with _precision(True):
            return torch.baddbmm(du, draw, angles.mT), dweight, (of_part @ draw.unflatten(1, cut)).sum(1), None


def _serial(sizes: Sizes) -> dict[str, int]:
    """How many tokens a step of the kernels takes that go through a sequence, and the tiles' sides."""
    heads, free = _power(sizes.heads), sizes.n - 2 * sizes.pairs
    tokens = max(4, SERIAL // heads)
    return {
        "H": sizes.heads, "HP": heads, "N": sizes.n, "A": sizes.pairs, "AP": _power(sizes.pairs), "UP": _power(free),
        "L": tokens, "num_warps": 4,
    }  # fmt: skip


def _power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


class Mixed(Function):
    """What out_proj reads, [m, s, h p], of rows [m, s, (z, x, B, C)] as projected and their coefficients; longest: tokens of
    the longest sequence."""

    @staticmethod
    def forward(
        ctx, rows: Tensor, theta: Tensor, tick: Tensor, log_alpha: Tensor, w: Tensor, gamma: Tensor, B_norm: Tensor,
        C_norm: Tensor, B_bias: Tensor, C_bias: Tensor, D: Tensor, rope: Tensor, frequencies: Tensor, starts: Tensor,
        sizes: Sizes, longest: int,
    ):  # fmt: skip
        (m, s, width), count, (h, p, n) = rows.shape, len(starts) - 1, (sizes.heads, sizes.p, sizes.n)
        B_norm, C_norm, B_bias, C_bias, D = (v.contiguous() for v in (B_norm, C_norm, B_bias, C_bias, D))
        z, x, B, C = rows.split((h * p, h * p, n, n), dim=2)
        Bh, Ch = (rows.new_empty(m, h, s, n) for _ in range(2))
        sums, phases = torch.empty_like(w), torch.empty((m, count, h, sizes.pairs), dtype=torch.int32, device=w.device)
        inner, y = (rows.new_empty(m, s, h * p) for _ in range(2))
        ctx.turns = {"EPS": sizes.eps, "W": width, **_serial(sizes)}
        ctx.weighs = dict(
            W=width,
            H=h,
            P=p,
            N=n,
            PP=padded(p),
            NP=padded(n),
            L=TILE,
            PRECISION=tf32(),
            num_warps=8 if p > 32 else 4,
            num_stages=1,
        )
        ctx.grids = ((count, m), (-(-longest // TILE), h, m * count))
        norms = (B_norm, C_norm, B_bias, C_bias)
        with sound_assembler(rows.device):
            turn_kernels.turn_kernel[ctx.grids[0]](
                B,
                C,
                theta,
                tick,
                log_alpha,
                rope,
                frequencies,
                *norms,
                starts,
                Bh,
                Ch,
                sums,
                phases,
                s,
                count,
                **ctx.turns,
            )
            weigh_kernels.weigh_kernel[ctx.grids[1]](
                x, z, Bh, Ch, sums, w, gamma, D, starts, inner, y, s, count, **ctx.weighs
            )
        ctx.save_for_backward(
            rows, theta, tick, w, gamma, *norms, D, rope, frequencies, starts, Bh, Ch, sums, phases, inner
        )
        ctx.sizes = sizes
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        rows, theta, tick, w, gamma, *norms, D, rope, frequencies, starts, Bh, Ch, sums, phases, inner = (
            ctx.saved_tensors
        )
        m, s, _ = rows.shape
        sizes, count, dy = ctx.sizes, len(starts) - 1, dy.contiguous()
        h, p, n = sizes.heads, sizes.p, sizes.n
        drows, dBh, dCh = torch.empty_like(rows), torch.empty_like(Bh), torch.empty_like(Ch)
        z, x, B, C = rows.split((h * p, h * p, n, n), dim=2)
        dz, dx, dB, dC = drows.split((h * p, h * p, n, n), dim=2)
        drow, dw, dgamma, dlog_alpha, dtick = (torch.empty_like(w) for _ in range(5))
        dtheta, dD = torch.empty_like(theta), rows.new_empty(m, count, h, ctx.grids[1][0])
        parts = rows.new_empty(m, count, 2 * h * n + 2 * n)
        with sound_assembler(rows.device):
            weigh_kernels.weigh_back_rows_kernel[ctx.grids[1]](
                x, z, Bh, Ch, sums, w, gamma, inner, dy, starts, dz, dCh, drow, dgamma, dD, s, count, **ctx.weighs
            )
            weigh_kernels.weigh_back_columns_kernel[ctx.grids[1]](
                x, z, Bh, Ch, sums, w, gamma, D, dy, starts, dx, dBh, dw, s, count, **ctx.weighs
            )
            turn_kernels.turn_back_kernel[ctx.grids[0]](
                B, C, theta, tick, w, rope, frequencies, *norms, starts, phases, dBh, dCh, drow, dw, dB, dC, dtheta, dtick,
                dlog_alpha, parts, s, count, **ctx.turns,
            )  # fmt: skip
        dB_bias, dC_bias, dB_norm, dC_norm = parts.sum(1).split((h * n, h * n, n, n), dim=1)
        return (
            drows, dtheta, dtick, dlog_alpha, dw, dgamma, dB_norm, dC_norm, dB_bias.unflatten(1, (h, n)),
            dC_bias.unflatten(1, (h, n)), dD.sum((1, 3)), None, None, None, None, None,
        )  # fmt: skip


class Read(Function):
    """What the last layer's out_proj reads at each end, [m, c, h p], of rows [m, s, (x, B)], their coefficients and the asked
    tokens' rows [m, c, (z, x, B, C)]."""

    @staticmethod
    def forward(
        ctx, rows: Tensor, asked: Tensor, theta: Tensor, tick: Tensor, log_alpha: Tensor, w: Tensor, gamma: Tensor,
        B_norm: Tensor, C_norm: Tensor, B_bias: Tensor, C_bias: Tensor, D: Tensor, rope: Tensor, frequencies: Tensor,
        starts: Tensor, sizes: Sizes,
    ):  # fmt: skip
        (m, s, width), count, (h, p, n) = rows.shape, len(starts) - 1, (sizes.heads, sizes.p, sizes.n)
        norms = [v.contiguous() for v in (B_norm, C_norm, B_bias, C_bias, D)]
        (x, B), (z, _, C) = rows.split((h * p, n), dim=2), asked.split((h * p, h * p + n, n), dim=2)
        inner, y = (rows.new_empty(m, count, h * p) for _ in range(2))
        phases = torch.empty((m, count, h, sizes.pairs), dtype=torch.int32, device=w.device)
        totals = rows.new_empty(m, count, h)
        ctx.constants = {
            "EPS": sizes.eps, "W": width, "V": asked.shape[2], "P": p, "PP": _power(p), **_serial(sizes)
        }  # fmt: skip
        with sound_assembler(rows.device):
            read_kernels.read_kernel[(count, m)](
                x, B, z, C, theta, tick, log_alpha, w, gamma, rope, frequencies, *norms, starts, inner, y, phases, totals, s,
                count, **ctx.constants,
            )  # fmt: skip
        ctx.save_for_backward(
            rows, asked, theta, tick, log_alpha, w, gamma, rope, frequencies, *norms, starts, inner, phases, totals
        )
        ctx.sizes = sizes
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        rows, asked, *coefficients = ctx.saved_tensors[:7]
        (m, s, _), count, sizes = rows.shape, asked.shape[1], ctx.sizes
        h, p, n = sizes.heads, sizes.p, sizes.n
        (x, B), (z, _, C) = rows.split((h * p, n), dim=2), asked.split((h * p, h * p + n, n), dim=2)
        drows, dasked = torch.empty_like(rows), torch.zeros_like(asked)
        (dx, dB), (dz, _, dC) = drows.split((h * p, n), dim=2), dasked.split((h * p, h * p + n, n), dim=2)
        dtheta, dtick, dlog_alpha, dw, dgamma = (torch.empty_like(v) for v in coefficients)
        parts = rows.new_empty(m, count, 2 * h * n + 2 * n + h)
        with sound_assembler(rows.device):
            read_kernels.read_back_kernel[(count, m)](
                x, B, z, C, *ctx.saved_tensors[2:], dy.contiguous(), dx, dB, dz, dC, dtheta, dtick, dlog_alpha, dw, dgamma,
                parts, s, count, **ctx.constants,
            )  # fmt: skip
        dB_bias, dC_bias, dB_norm, dC_norm, dD = parts.sum(1).split((h * n, h * n, n, n, h), dim=1)
        return (
            drows, dasked, dtheta, dtick, dlog_alpha, dw, dgamma, dB_norm, dC_norm, dB_bias.unflatten(1, (h, n)),
            dC_bias.unflatten(1, (h, n)), dD, None, None, None, None,
        )  # fmt: skip


def answer_logits(
    sizes: Sizes, which: Switches, parameters: dict[str, Tensor], tokens: Tensor, ends: Tensor, longest: int
) -> Tensor:
    """Logits [m, c, v] at the tokens `ends` [c] (the last of each sequence, increasing; equal to the one before for an empty
    one) of the row `tokens` [s]. longest: tokens of the longest sequence; PARTS divides s, where it is to be fast."""
    table, s = parameters["embedding.weight"], len(tokens)
    parts = math.gcd(PARTS, s)
    one_hot = tokens.unsqueeze(-1) == torch.arange(sizes.vocab, device=tokens.device)
    one_hot = one_hot.view(parts, s // parts, sizes.vocab).to(table.dtype)
    starts = torch.cat([ends.new_zeros(1), ends + 1]).to(torch.int32)
    firsts = torch.zeros(s + 1, dtype=torch.uint8, device=tokens.device)
    firsts = firsts.index_fill_(0, starts.long(), 1)[:s]
    h = Spread.apply(table, tokens, one_hot)
    frequencies, asked_at = _frequencies(sizes, table), ends.clamp(min=0)
    inner = sizes.heads * sizes.p
    for i in range(sizes.layers):
        own = f"layers.{i}."
        layer = {k.removeprefix(own): v for k, v in parameters.items() if k.startswith(own)}
        out = layer["mixer.out_proj.weight"].mT
        weight = layer["mixer.in_proj.weight"].mT * layer["norm.weight"].unsqueeze(2)
        to_rows, to_raw = weight.split((2 * inner + 2 * sizes.n, 3 * sizes.heads + sizes.pairs), dim=2)
        final = i + 1 == sizes.layers
        u, h = Normed.apply(h, sizes.eps)
        u_asked = u.index_select(1, asked_at) if final else None
        needed = to_rows[:, :, inner : 2 * inner + sizes.n] if final else to_rows
        rows, raw = Projected.apply(u, needed, to_raw, parts)
        log_alpha, w, gamma, tick, theta = Coefficients.apply(
            raw, layer["mixer.dt_bias"], which.turns, which.fixed, which.lam, which.heavy, sizes.A_floor, firsts
        )
        coefficients = (theta, tick, log_alpha, w, gamma)
        norms = [layer[f"mixer.{name}.weight"] for name in ("B_norm", "C_norm")]
        biases = [layer[f"mixer.{name}"].squeeze(2) for name in ("B_bias", "C_bias")]
        rest = (*norms, *biases, layer["mixer.D"], which.rope, frequencies, starts, sizes)
        if not final:
            y = Mixed.apply(rows, *coefficients, *rest, longest)
            h = h + Product.apply(y, out, parts, False)
            continue
        h = h.index_select(1, asked_at)
        h = h + Read.apply(rows, u_asked @ to_rows, *coefficients, *rest) @ out
        return (_normed(h, parameters["norm_f.weight"], sizes.eps) @ table.mT)[..., : sizes.answers]
    raise AssertionError("a model has at least one layer")
