"""The Mamba-3 layer: projections, activations and norms around the recurrence (mathematics.md, sections 1 and 6).

in_proj(u) = z, x, B, C, dt_raw, A_raw, lambda_raw, theta_raw        (what a setting fixes is not projected)
dt = softplus(dt_raw + dt_bias)   A = -max(f(A_raw), A_floor)   lam = sigmoid(lambda_raw)   theta = pi tanh(theta_raw)
out = out_proj(sum_r mimo_o_r * gate(y_r, z))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3.nn import init
from mamba3.nn.fused import fused_rows
from mamba3.nn.linear import outputs_from, project, project_aligned
from mamba3.nn.norm import RMSNorm
from mamba3.nn.short_conv import ShortConv
from mamba3.ops import draft
from mamba3.ops import triton as kernels
from mamba3.ops.discretize import DECAYS, decay_rate
from mamba3.ops.gate import OUT_NORMS
from mamba3.ops.scan import run_scan, run_state, run_step, run_verify
from mamba3.ops.segments import Summary, summarize
from mamba3.ops.types import Gate, Inputs, State, wide_dtype
from mamba3.ops.validation import check_cu_seqlens

ROTATIONS = ("data_dependent", "standard", "none")
BiasInit = float | tuple[float, float] | None


T = TypeVar("T")


class Projected(NamedTuple, Generic[T]):
    """The in_proj row, cut: z, x [..., h p]; B, C [..., r g n]; dt, A, lam [..., h] and theta [..., a], raw or empty."""

    z: T
    x: T
    B: T
    C: T
    dt: T
    A: T
    lam: T
    theta: T


class Read(NamedTuple):
    """Tokens that were read and may be taken back: the recurrence's factors, and what the short convolution saw, [b, width - 1
    + t, channels]."""

    factors: draft.Factors
    window: Tensor | None


class Mamba3(nn.Module):
    """One Mamba-3 layer: [b, t, d_model] to [b, t, d_model], with a state of fixed size.

    Args:
        d_model: channels of the model (d).
        d_state: state channels of a head (n).
        expand: inner channels h p = expand * d_model.
        headdim: channels of a head (p); must divide the inner channels.
        ngroups: groups of heads that share B and C (g); must divide the heads.
        mimo_rank: rank of the update (r); 1 is SISO.
        rope_fraction: share of the state channels that rotate, in (0, 1]; the paper uses 0.5 and 1.
        decay: f of A, "heavy_tail" or "softplus". Both exist in published weights under the same parameter names.
        out_norm: "none", "pre_gate", "pre_gate_grouped", "post_gate", "post_gate_grouped" (Table 9).
        lam: weight of the current token in the trapezoid: "learned", or fixed, as 0.5 (trapezoid) or 1.0 (Euler) (Table 8).
        rotation: "data_dependent", "standard" (RoPE: frequencies 10000^(-i/a) per token) or "none" (Table 5b).
        B_bias, C_bias: initial value of the biases, a (low, high) range to draw from, or None for no bias (Tables 5a, 10).
        bc_bias_trainable: whether the biases are parameters or constants.
        d_conv: width of a short convolution over x, B and C; 0 for none (Table 5a).
        A_floor: smallest decay rate. dt_min, dt_max, dt_init_floor: range of the initial step sizes.
        mimo: whether mimo_x, mimo_z, mimo_o exist; by default when mimo_rank > 1.
        device, dtype: of the projections and norms. The parameters of the recurrence itself are at least float32.

    Raises ValueError where sizes do not fit or a setting is unknown.
    Source: arXiv 2603.15569, section 3; parameter names are those of the official release.
    """

    omega_base = 10000.0

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        *,
        mimo_rank: int = 1,
        rope_fraction: float = 0.5,
        decay: str = "heavy_tail",
        out_norm: str = "none",
        lam: str | float = "learned",
        rotation: str = "data_dependent",
        B_bias: BiasInit = 1.0,
        C_bias: BiasInit = 1.0,
        bc_bias_trainable: bool = True,
        d_conv: int = 0,
        A_floor: float = 1e-4,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_init_floor: float = 1e-4,
        mimo: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.d_model, self.d_state, self.headdim, self.ngroups = d_model, d_state, headdim, ngroups
        self.mimo_rank, self.decay, self.out_norm, self.lam, self.rotation = mimo_rank, decay, out_norm, lam, rotation
        self.A_floor, self.d_conv = A_floor, d_conv
        self.dt_range = (dt_min, dt_max, dt_init_floor)
        self.bias_init = {"B_bias": B_bias, "C_bias": C_bias}
        self._check(expand, rope_fraction)
        self.d_inner = round(expand * d_model)
        self.nheads = self.d_inner // headdim
        self.pairs = 0 if rotation == "none" else int(d_state * rope_fraction) // 2

        factory = {"device": device, "dtype": dtype}
        recurrent = {"device": device, "dtype": wide_dtype(dtype or torch.get_default_dtype())}
        h, r = self.nheads, mimo_rank
        self.splits = Projected(
            z=self.d_inner, x=self.d_inner, B=r * ngroups * d_state, C=r * ngroups * d_state, dt=h, A=h,
            lam=h if lam == "learned" else 0, theta=self.pairs if rotation == "data_dependent" else 0,
        )  # fmt: skip
        self.in_proj = nn.Linear(d_model, sum(self.splits), bias=False, **factory)
        self.dt_bias = nn.Parameter(torch.empty(h, **recurrent))
        self.B_bias: Tensor | None
        self.C_bias: Tensor | None
        for name, value in self.bias_init.items():
            bias = None if value is None else torch.empty(h, r, d_state, **recurrent)
            if bias is None or bc_bias_trainable:
                self.register_parameter(name, None if bias is None else nn.Parameter(bias))
            else:
                self.register_buffer(name, bias)
        self.B_norm, self.C_norm = RMSNorm(d_state, **factory), RMSNorm(d_state, **factory)
        self.D = nn.Parameter(torch.empty(h, **recurrent))
        mimo = r > 1 if mimo is None else mimo
        self.mimo_x, self.mimo_z, self.mimo_o = (
            nn.Parameter(torch.empty(h, r, headdim, **recurrent)) if mimo else None for _ in range(3)
        )
        self.norm = None if out_norm == "none" else RMSNorm(self.d_inner, **factory)
        self.conv = ShortConv(self.splits.x + 2 * self.splits.B, d_conv, **factory) if d_conv else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False, **factory)
        self.reset_parameters()

    def _check(self, expand: float, rope_fraction: float) -> None:
        inner = expand * self.d_model
        for name in ("d_model", "d_state", "headdim", "ngroups", "mimo_rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer; it is {value!r}.")
        if abs(inner - round(inner)) > 1e-6 or round(inner) < 1 or round(inner) % self.headdim:
            raise ValueError(
                f"expand * d_model = {inner:g} inner channels must be a positive multiple of headdim = {self.headdim}; "
                "change headdim, expand or d_model."
            )
        nheads = round(inner) // self.headdim
        if nheads % self.ngroups:
            raise ValueError(f"{nheads} heads must be a multiple of ngroups = {self.ngroups}.")
        if self.rotation not in ROTATIONS:
            raise ValueError(f"rotation must be one of {', '.join(ROTATIONS)}; it is {self.rotation!r}.")
        if not 0 < rope_fraction <= 1 or (self.rotation != "none" and int(self.d_state * rope_fraction) < 2):
            raise ValueError(
                f"rope_fraction must lie in (0, 1] and leave at least one pair of the {self.d_state} state channels to "
                f"rotate; it is {rope_fraction}. For no rotation set rotation='none'."
            )
        if self.decay not in DECAYS:
            raise ValueError(f"decay must be one of {', '.join(DECAYS)}; it is {self.decay!r}.")
        if self.out_norm not in OUT_NORMS:
            raise ValueError(f"out_norm must be one of {', '.join(OUT_NORMS)}; it is {self.out_norm!r}.")
        fixed = isinstance(self.lam, float | int) and not isinstance(self.lam, bool) and 0 <= self.lam <= 1
        if self.lam != "learned" and not fixed:
            raise ValueError(f"lam must be 'learned' or a number in [0, 1]; it is {self.lam!r}.")
        if not isinstance(self.d_conv, int) or self.d_conv < 0 or self.d_conv == 1:
            raise ValueError(f"d_conv must be 0 (no convolution) or an integer of at least 2; it is {self.d_conv!r}.")
        if self.A_floor <= 0:
            raise ValueError(f"A_floor must be positive, so that the state decays; it is {self.A_floor}.")
        if not 0 < self.dt_range[0] <= self.dt_range[1]:
            raise ValueError(f"0 < dt_min <= dt_max must hold; they are {self.dt_range[0]} and {self.dt_range[1]}.")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of mathematics.md, section 7."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        init.dt_bias_(self.dt_bias, *self.dt_range)
        for name, value in self.bias_init.items():
            if value is not None:
                init.bias_(getattr(self, name), value)
        for norm in (self.B_norm, self.C_norm, self.norm):
            if norm is not None:
                norm.weight.fill_(1)
        self.D.fill_(1)
        for weight, value in ((self.mimo_x, 1 / self.mimo_rank), (self.mimo_z, 1), (self.mimo_o, 1 / self.mimo_rank)):
            if weight is not None:
                weight.fill_(value)
        if self.conv is not None:
            self.conv.reset_parameters()

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token, on the layer's device and in the dtype of its activations unless told."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer; it is {batch_size!r}.")
        device, dtype = device or self.in_proj.weight.device, dtype or self.in_proj.weight.dtype
        state = State.zeros(
            batch_size, nheads=self.nheads, headdim=self.headdim, d_state=self.d_state, pairs=self.pairs,
            rank=self.mimo_rank, device=device, dtype=dtype,
        )  # fmt: skip
        return state if self.conv is None else state._replace(conv=self.conv.init_state(batch_size, device, dtype))

    def forward(self, u: Tensor, cu_seqlens: Tensor | list[int] | None = None) -> Tensor:
        """u [b, t, d_model] to the same shape. cu_seqlens [s + 1]: u [1, t, d_model] holds s sequences, one after another."""
        return self.prefill(u, None, cu_seqlens)[0]

    def prefill(
        self, u: Tensor, state: State | None = None, cu_seqlens: Tensor | list[int] | None = None
    ) -> tuple[Tensor, State]:
        """Any number of tokens from any state: (y [b, t, d_model], the state after each sequence).

        prefill(a + b) = prefill(b, state of prefill(a)). The given state is not changed.
        """
        self._check_input(u, 3)
        if cu_seqlens is not None:
            cu_seqlens = check_cu_seqlens(cu_seqlens, u.shape[0], u.shape[1])
        batch = u.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        row, conv = self._project(u), None
        if self.conv is not None:
            before = (
                self._conv_state(state) if state is not None else self.conv.init_state(batch, u.device, row.x.dtype)
            )
            mixed, conv = self.conv(torch.cat([row.x, row.B, row.C], dim=-1), before, cu_seqlens)
            row = self._replace_conv(row, mixed)
        y, after = run_scan(self._inputs(row), self._gate(row.z), state, cu_seqlens, trusted=True)
        return self.out_proj(y.flatten(-2)), after._replace(conv=conv)

    @torch.no_grad()
    def verify(self, u: Tensor, state: State) -> tuple[Tensor, Read]:
        """`prefill` of a few tokens of which the last ones may be taken back: (y [b, t, d_model], what `accept` needs).

        The given state is not changed.
        """
        self._check_input(u, 3)
        row, window = self._project(u), None
        if self.conv is not None:
            before, entering = self._conv_state(state), torch.cat([row.x, row.B, row.C], dim=-1)
            window = torch.cat([before.to(entering.dtype), entering], dim=1)
            row = self._replace_conv(row, self.conv(entering, before)[0])
        y, factors = run_verify(self._inputs(row), self._gate(row.z), state)
        return project(self.out_proj, y.flatten(-2)), Read(factors, window)

    @torch.no_grad()
    def accept(self, read: Read, state: State, counts: Tensor) -> None:
        """Move the state on, in place, by the first counts[i] of the tokens that `verify` read of each sequence i.

        The state after them is computed from each token's factors, which take r (p + n) numbers a head where a state takes
        p n. counts [b] int64, on the state's device.
        """
        draft.accept(read.factors, state, counts)
        if read.window is not None:
            held = self._conv_state(state)
            places = counts[:, None] + torch.arange(held.shape[1], device=counts.device)
            held.copy_(read.window.gather(1, places.unsqueeze(2).expand_as(held)))

    def forward_segment(
        self, u: Tensor, enter: Callable[[Summary, Tensor | None], State], cu_seqlens: list[int] | None = None
    ) -> Tensor:
        """One rank's part of a sequence that is spread over several: u [1, t, d_model] to the same shape.

        enter(summary of the last sequence in u, mimo_x) -> the state of batch size 1 that enters u's first token; the other
        sequences of a pack start from the zero state. Raises ValueError for a layer with a short convolution, whose window
        reaches back to the rank before.
        """
        self._check_input(u, 3)
        if self.conv is not None:
            raise ValueError("A sequence spread over ranks needs layers without a short convolution; set d_conv=0.")
        row = self._project(u)
        inp = self._inputs(row)
        first, tokens = (0, u.shape[1]) if cu_seqlens is None else cu_seqlens[-2:]
        last = [v[:, first:tokens] for v in (inp.x, inp.dt, inp.A, inp.lam, inp.theta, inp.B)]
        tick = None if inp.tick is None else inp.tick[:, first:tokens]
        summary = summarize(*last, B_bias_hrn=inp.B_bias, mimo_x_hrp=inp.mimo_x, tick_bth=tick)
        state = enter(summary, inp.mimo_x)
        pieces = 1 if cu_seqlens is None else len(cu_seqlens) - 1
        if pieces > 1:
            rest = self.init_state(pieces - 1, u.device, inp.x.dtype)
            state = State(*(torch.cat(pair) for pair in zip(state[:4], rest[:4], strict=True)))
        y, _ = run_scan(inp, self._gate(row.z), state, cu_seqlens)
        return self.out_proj(y.flatten(-2))

    def compile_coefficients(self) -> None:
        """torch.compile what lies between in_proj and the scan: activations, norms of B and C."""
        self._inputs = torch.compile(self._inputs)

    def prefill_last(self, u: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """`prefill` where y of the last token is all that is wanted: (y [b, 1, d_model], the state).

        Of the tokens before it the state alone is computed: no z, no readout, no out_proj.
        """
        self._check_input(u, 3)
        if u.shape[1] > 1 and self.conv is None:
            row = outputs_from(self.in_proj, u[:, :-1], self.splits.z).split(self.splits[1:], dim=-1)
            state = run_state(self._inputs(Projected(row[0][..., :0], *row)), state)
            u = u[:, -1:]
        y, state = self.prefill(u, state)
        return y[:, -1:], state

    def step(self, u: Tensor, state: State, live: Tensor | None = None) -> tuple[Tensor, State]:
        """One token: u [b, d_model] to (y [b, d_model], state).

        The given state is updated in place and returned. While gradients are recorded it is left alone, and a new one
        is returned. live [1] int32: how many of the sequences, the first ones, there are; the others are padding, whose state
        stays and whose y is 0.
        """
        self._check_input(u, 2)
        return self.step_row(project(self.in_proj, u), state, live)

    def step_row(self, projected: Tensor, state: State, live: Tensor | None = None) -> tuple[Tensor, State]:
        """`step` from what in_proj gives, [b, projected]."""
        inplace = not torch.is_grad_enabled()
        if inplace and self._decodes(projected, state):
            return project(self.out_proj, self._decode(projected, state, live, ahead=True).flatten(-2)), state
        row, conv = Projected(*projected.split(self.splits, dim=-1)), None
        if self.conv is not None:
            mixed, conv = self.conv.step(torch.cat([row.x, row.B, row.C], dim=-1), self._conv_state(state))
            row = self._replace_conv(row, mixed)
        alone = inplace and live is None
        y, after = run_step(self._inputs(row), self._gate(row.z), state, inplace=alone, trusted=True)
        if conv is not None:
            after = after._replace(conv=state.conv.copy_(conv) if alone and state.conv is not None else conv)
        if live is not None:
            rows = torch.arange(len(projected), device=live.device) < live
            y, after = y.masked_fill(~rows[:, None, None], 0), after.where(rows, state)
            after = state.copy_(after) if inplace else after
        return project(self.out_proj, y.flatten(-2)), after

    def why_no_kernel(self) -> str | None:
        """Why the fused decode kernel does not do this layer's step; None where it does."""
        if self.conv is not None or self.norm is not None or self.rotation == "standard":
            return "a layer with a short convolution, an output norm or RoPE has no decode kernel"
        weight = self.in_proj.weight
        why = kernels.why_not(weight.device, weight.dtype)
        return why or (None if weight.is_cuda else f"the kernels need a CUDA or ROCm device, not {weight.device.type}")

    def _decodes(self, row: Tensor, state: State) -> bool:
        return row.is_cuda and self.why_no_kernel() is None and all(v.is_contiguous() for v in state[:4])

    def _decode(self, row: Tensor, state: State, live: Tensor | None = None, *, ahead: bool = False) -> Tensor:
        """One token between the projections, by `mamba3.ops.triton.decode`; the state moves on in place."""
        from mamba3.ops.triton.decode import Parameters, decode

        def parameter(v: Tensor | None) -> Tensor | None:
            return None if v is None else v.float().contiguous()

        shared = Parameters(
            self.dt_bias.float(), self.B_norm.weight, self.C_norm.weight, parameter(self.B_bias), parameter(self.C_bias),
            parameter(self.mimo_x), parameter(self.mimo_z), parameter(self.mimo_o), parameter(self.D), self.ngroups,
            self.mimo_rank, self.decay, self.A_floor, None if self.lam == "learned" else float(self.lam),
        )  # fmt: skip
        return decode(row, shared, state, live, ahead=ahead)

    def _check_input(self, u: Tensor, dimensions: int) -> None:
        letters = "[b, t, d_model]" if dimensions == 3 else "[b, d_model]"
        if u.ndim != dimensions or u.shape[-1] != self.d_model:
            raise ValueError(f"u must be {letters} with d_model = {self.d_model}; it came with shape {tuple(u.shape)}.")

    def _conv_state(self, state: State) -> Tensor:
        if state.conv is None:
            raise ValueError(
                "This layer has a short convolution, but the state has no conv; use the layer's init_state."
            )
        return state.conv

    def _project(self, u: Tensor) -> Projected[Tensor]:
        row = project_aligned(self.in_proj, u)
        spare = row.shape[-1] - sum(self.splits)
        sizes = [*self.splits, spare] if spare else self.splits
        return Projected(*row.split(sizes, dim=-1)[: len(self.splits)])

    def _replace_conv(self, row: Projected[Tensor], mixed: Tensor) -> Projected[Tensor]:
        x, B, C = mixed.split([self.splits.x, self.splits.B, self.splits.C], dim=-1)
        return row._replace(x=x, B=B, C=C)

    def _inputs(self, row: Projected[Tensor]) -> Inputs:
        """The arguments of the recurrence: every nonlinearity and norm of section 1 applied."""
        if self._fuses(row):
            return self._fused_inputs(row)
        wide = wide_dtype(row.x.dtype)
        dt = F.softplus(row.dt.to(wide) + self.dt_bias.to(wide))
        A = decay_rate(row.A.to(wide), self.decay, self.A_floor)
        lam = torch.full_like(dt, self.lam) if isinstance(self.lam, float | int) else row.lam.to(wide).sigmoid()
        theta, tick = math.pi * row.theta.to(wide).tanh(), None
        if self.rotation == "standard":
            exponent = torch.arange(self.pairs, device=dt.device, dtype=wide) / self.pairs
            theta, tick = (self.omega_base**-exponent).expand(*dt.shape[:-1], -1), torch.ones_like(dt)
        groups, heads = (self.mimo_rank, self.ngroups, self.d_state), (self.nheads, self.headdim)
        B, C = self.B_norm(row.B.unflatten(-1, groups)), self.C_norm(row.C.unflatten(-1, groups))
        x = row.x.unflatten(-1, heads)
        return Inputs(x, dt, A, lam, theta, B, C, self.B_bias, self.C_bias, self.mimo_x, self.D, tick)

    def _fuses(self, row: Projected[Tensor]) -> bool:
        """Whether one kernel does what `_inputs` does: of a sequence, whose columns lie at one distance from token to token."""
        if (
            self.rotation == "standard"
            or row.dt.ndim != 3
            or not fused_rows(row.x, row.dt, self.dt_bias, self.B_norm.weight)
        ):
            return False
        columns = [v for v in (row.B, row.C, row.dt, row.A, row.lam, row.theta) if v.shape[-1]]
        return all(v.stride(-1) == 1 and (v.shape[0] == 1 or v.stride(0) == v.shape[1] * v.stride(1)) for v in columns)

    def _fused_inputs(self, row: Projected[Tensor]) -> Inputs:
        """`_inputs` by `mamba3.ops.triton.block.activations`."""
        from mamba3.ops.triton.block import activations

        fixed = None if self.lam == "learned" else float(self.lam)
        dt, A, lam, theta, B, C = activations(
            row.B, row.C, row.dt, row.A, row.lam, row.theta, self.dt_bias, self.B_norm.weight, self.C_norm.weight,
            groups=(self.mimo_rank, self.ngroups, self.d_state), decay=self.decay, A_floor=self.A_floor, fixed_lam=fixed,
        )  # fmt: skip
        x = row.x.unflatten(-1, (self.nheads, self.headdim))
        return Inputs(x, dt, A, lam, theta, B, C, self.B_bias, self.C_bias, self.mimo_x, self.D, None)

    def _gate(self, z: Tensor) -> Gate:
        """The arguments of the output stage."""
        heads = (self.nheads, self.headdim)
        weight = None if self.norm is None else self.norm.weight.view(heads)
        return Gate(z.unflatten(-1, heads), self.mimo_z, self.mimo_o, self.out_norm, weight)

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, heads={self.nheads}x{self.headdim}, groups={self.ngroups}, "
            f"rank={self.mimo_rank}, pairs={self.pairs}, decay={self.decay}, out_norm={self.out_norm}, lam={self.lam}, "
            f"rotation={self.rotation}"
        )
