"""Random inputs of the recurrence for the laws, and the distance they are measured in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from mamba3.ops import State

PER_TOKEN = ("x_bthp", "dt_bth", "A_bth", "lam_bth", "theta_bta", "B_btrgn", "C_btrgn", "z_bthp", "tick_bth")


@dataclass(frozen=True)
class Sizes:
    """Letters as everywhere; heads are groups * per_group."""

    b: int = 2
    t: int = 65
    g: int = 1
    per_group: int = 2
    p: int = 5
    n: int = 8
    a: int = 2
    r: int = 1

    @property
    def h(self) -> int:
        return self.g * self.per_group


@st.composite
def sizes(draw, max_tokens: int = 150) -> Sizes:
    n = draw(st.integers(1, 9))
    return Sizes(
        b=draw(st.integers(1, 3)),
        t=draw(st.sampled_from([t for t in (1, 2, 15, 16, 17, 63, 64, 65, 129, 150) if t <= max_tokens])),
        g=draw(st.integers(1, 2)),
        per_group=draw(st.integers(1, 3)),
        p=draw(st.integers(1, 6)),
        n=n,
        a=draw(st.integers(0, n // 2)),
        r=draw(st.integers(1, 4)),
    )


def inputs(s: Sizes, *, dtype=torch.float64, gate: bool = True, tick: bool = False, device="cpu") -> dict[str, Tensor]:
    """Keyword arguments of `scan`; coefficients are at least float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lead, ranks = (s.b, s.t), (s.h, s.r)

    def normal(*shape):
        return torch.randn(*shape, dtype=wide, device=device).to(dtype)

    def uniform(*shape):
        return torch.rand(*shape, dtype=wide, device=device)

    values = {
        "x_bthp": normal(*lead, s.h, s.p),
        "dt_bth": 0.01 + uniform(*lead, s.h),
        "A_bth": -0.01 - 2 * uniform(*lead, s.h),
        "lam_bth": uniform(*lead, s.h),
        "theta_bta": 3 * torch.randn(*lead, s.a, dtype=wide, device=device),
        "B_btrgn": normal(*lead, s.r, s.g, s.n),
        "C_btrgn": normal(*lead, s.r, s.g, s.n),
        "B_bias_hrn": normal(*ranks, s.n).to(wide),
        "C_bias_hrn": normal(*ranks, s.n).to(wide),
        "D_h": normal(s.h).to(wide),
    }
    if s.r > 1:
        values["mimo_x_hrp"] = normal(*ranks, s.p).to(wide)
    if gate:
        values["z_bthp"] = normal(*lead, s.h, s.p)
    if gate and s.r > 1:
        values["mimo_z_hrp"], values["mimo_o_hrp"] = normal(*ranks, s.p).to(wide), normal(*ranks, s.p).to(wide)
    if tick:
        values["tick_bth"] = uniform(*lead, s.h)
    return values


def random_state(s: Sizes, batch: int | None = None, dtype=torch.float64, device="cpu") -> State:
    """A state that some prefix might have left."""
    batch = batch or s.b
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return State(
        phi=torch.randn(batch, s.h, s.a, dtype=wide, device=device),
        S=torch.randn(batch, s.h, s.p, s.n, dtype=wide, device=device),
        B_prev=torch.randn(batch, s.r, s.h, s.n, dtype=wide, device=device).to(dtype),
        x_prev=torch.randn(batch, s.h, s.p, dtype=wide, device=device).to(dtype),
    )


def tokens(values: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Arguments for a span of tokens."""
    return {name: v[:, start:stop] if name in PER_TOKEN else v for name, v in values.items()}


def token(values: dict[str, Tensor], t: int) -> dict[str, Tensor]:
    """Arguments of `step` for one token."""
    return {name.replace("_bt", "_b"): v[:, t] if name in PER_TOKEN else v for name, v in values.items()}


def distance(ours: Tensor, truth: Tensor) -> float:
    """Relative error; absolute where the truth is zero or empty. NaN is infinitely far."""
    if truth.numel() == 0:
        return 0.0
    ours, truth = ours.detach().double(), truth.detach().double()
    error, size = (ours - truth).norm(), truth.norm()
    value = float(error / size) if size > 0 else float(error)
    return value if value == value else float("inf")


def state_distance(ours: State, truth: State) -> float:
    """The largest distance of the four tensors; angles are compared on the circle."""
    ours, truth = ours.detach(), truth.detach()
    turn = torch.polar(torch.ones_like(ours.phi.double()), ours.phi.double())
    true_turn = torch.polar(torch.ones_like(truth.phi.double()), truth.phi.double())
    angle = float((turn - true_turn).abs().max()) if turn.numel() else 0.0
    return max(angle, *(distance(o, t) for o, t in zip(ours[1:4], truth[1:4], strict=True)))
