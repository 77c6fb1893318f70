"""Every ValueError about shape, dtype, device and packing: the law, what came, what to do."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mamba3.ops.gate import OUT_NORMS
from mamba3.ops.types import Gate, Inputs, State

# The dimensions each argument must have; "b t" is absent from the arguments of one step.
INPUT_SHAPES = {
    "x": "b t h p", "dt": "b t h", "A": "b t h", "lam": "b t h", "theta": "b t a", "B": "b t r g n", "C": "b t r g n",
    "B_bias": "h r n", "C_bias": "h r n", "mimo_x": "h r p", "D": "h", "tick": "b t h",
}  # fmt: skip
GATE_SHAPES = {"z": "b t h p", "mimo_z": "h r p", "mimo_o": "h r p", "norm_weight": "h p"}
STATE_SHAPES = {"phi": "s h a", "S": "s h p n", "B_prev": "s r h n", "x_prev": "s h p"}


def _match(name: str, value: Tensor, letters: str, sizes: dict[str, int]) -> None:
    expected = letters.split()
    if value.ndim != len(expected):
        raise ValueError(
            f"{name} must have the {len(expected)} dimensions ({', '.join(expected)}); it came with shape "
            f"{tuple(value.shape)}."
        )
    for letter, size in zip(expected, value.shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            raise ValueError(
                f"{name} has {letter} = {size} in shape {tuple(value.shape)} ({', '.join(expected)}), but {letter} is "
                f"{sizes[letter]} elsewhere; the sizes named by one letter must agree."
            )


def _check_place(name: str, value: Tensor, like: Tensor) -> None:
    if not value.is_floating_point():
        raise ValueError(f"{name} must be of a floating dtype; it is {value.dtype}.")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but x is on {like.device}; move them to one device.")


def check_cu_seqlens(cu_seqlens: Tensor | list[int], batch: int, tokens: int) -> list[int]:
    """The boundaries as integers. They start at 0, increase strictly, and end at the number of tokens."""
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens must be a vector of int32 or int64; it is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}."
            )
        cu_seqlens = cu_seqlens.tolist()
    if batch != 1:
        raise ValueError(
            f"A pack has batch size 1, with its sequences one after another; x came with batch size {batch}."
        )
    if len(cu_seqlens) < 2 or cu_seqlens[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0 and name at least one sequence; it is {cu_seqlens[:8]}.")
    for i, (a, b) in enumerate(itertools.pairwise(cu_seqlens)):
        if b == a:
            raise ValueError(f"Sequence {i} of cu_seqlens is empty (from {a} to {b}); leave empty sequences out.")
        if b < a:
            raise ValueError(f"cu_seqlens must increase; entry {i + 1} is {b} after {a}.")
    if cu_seqlens[-1] != tokens:
        raise ValueError(f"cu_seqlens must end at the number of tokens, {tokens}; it ends at {cu_seqlens[-1]}.")
    return cu_seqlens


def _without_time(shapes: dict[str, str]) -> dict[str, str]:
    return {name: letters.replace("b t ", "b ") for name, letters in shapes.items()}


def check_inputs(
    inp: Inputs, gate: Gate, state: State | None, cu_seqlens: Tensor | list[int] | None, *, one_token: bool = False
) -> tuple[Inputs, Gate, State, list[int] | None]:
    """Inputs with coefficients in their wide dtype, the gate, a state (zero if None was given), and boundaries."""
    inp, gate, checked, boundaries, sizes = check(inp, gate, state, cu_seqlens, one_token=one_token)
    return inp, gate, checked or zero_state(inp, sizes), boundaries


def zero_state(inp: Inputs, sizes: dict[str, int]) -> State:
    """The state before the first token of inputs whose letters have these sizes."""
    return State.zeros(
        sizes["s"], nheads=sizes["h"], headdim=sizes["p"], d_state=sizes["n"], pairs=sizes["a"], rank=sizes["r"],
        device=inp.x.device, dtype=inp.x.dtype,
    )  # fmt: skip


def check(
    inp: Inputs, gate: Gate, state: State | None, cu_seqlens: Tensor | list[int] | None, *, one_token: bool = False
) -> tuple[Inputs, Gate, State | None, list[int] | None, dict[str, int]]:
    """`check_inputs` that makes no state where none was given; and the size of each letter."""
    sizes: dict[str, int] = {}
    strip = _without_time if one_token else dict
    for values, shapes in ((inp, strip(INPUT_SHAPES)), (gate, strip(GATE_SHAPES))):
        for name, letters in shapes.items():
            value = getattr(values, name)
            if value is not None:
                _check_place(name, value, inp.x)
                _match(name, value, letters, sizes)
    _check_laws(inp, gate, sizes)

    boundaries = None if cu_seqlens is None else check_cu_seqlens(cu_seqlens, sizes["b"], sizes["t"])
    sizes["s"] = sizes["b"] if boundaries is None else len(boundaries) - 1
    if state is not None:
        for name, letters in STATE_SHAPES.items():
            _check_place(f"state.{name}", getattr(state, name), inp.x)
            _match(f"state.{name}", getattr(state, name), letters, sizes)
    wide = inp.wide
    coefficients = {f: getattr(inp, f).to(wide) for f in ("dt", "A", "lam", "theta")}
    if inp.tick is not None:
        coefficients["tick"] = inp.tick.to(wide)
    inp = inp._replace(**coefficients, B=inp.B.to(inp.x.dtype), C=inp.C.to(inp.x.dtype))
    return inp, gate, state, boundaries, sizes


def sizes_of(inp: Inputs, boundaries: list[int] | None) -> dict[str, int]:
    """The size of each letter, of inputs that are known to be right."""
    sizes = dict(zip("bthp", inp.x.shape, strict=True)) | dict(zip("rgn", inp.B.shape[2:], strict=True))
    return sizes | dict(s=sizes["b"] if boundaries is None else len(boundaries) - 1, a=inp.theta.shape[-1])


def fits(inp: Inputs, state: State, sequences: int | None = None) -> bool:
    """Whether a state has the sizes and device of inputs, of one token or several, that are known to be right.

    sequences: of a pack; None where there are as many as rows.
    """
    (b, *_, h, p), (r, _, n) = inp.x.shape, inp.B.shape[-3:]
    b = b if sequences is None else sequences
    shapes = (state.phi.shape, state.S.shape, state.B_prev.shape, state.x_prev.shape)
    expected = ((b, h, inp.theta.shape[-1]), (b, h, p, n), (b, r, h, n), (b, h, p))
    return shapes == expected and all(v.device == inp.x.device and v.is_floating_point() for v in state[:4])


def _check_laws(inp: Inputs, gate: Gate, sizes: dict[str, int]) -> None:
    if sizes.get("t") == 0 or sizes["b"] == 0:
        raise ValueError(f"At least one sequence of at least one token is needed; x has shape {tuple(inp.x.shape)}.")
    if sizes["h"] % sizes["g"]:
        raise ValueError(
            f"B_btrgn has {sizes['g']} groups but x_bthp has {sizes['h']} heads; heads must be a multiple of groups."
        )
    if 2 * sizes["a"] > sizes["n"]:
        raise ValueError(
            f"theta_bta turns {sizes['a']} pairs, which need {2 * sizes['a']} state channels; B_btrgn has n = {sizes['n']}."
        )
    if sizes["r"] > 1 and inp.mimo_x is None:
        raise ValueError(
            f"B_btrgn has rank {sizes['r']}; more than one rank needs mimo_x_hrp, which says what each sees."
        )
    if gate.norm not in OUT_NORMS:
        raise ValueError(f"out_norm must be one of {', '.join(OUT_NORMS)}; it is {gate.norm!r}.")
    if (gate.norm != "none") != (gate.norm_weight is not None):
        raise ValueError(f"out_norm {gate.norm!r} and norm_weight go together; norm_weight is {gate.norm_weight!r}.")
    if gate.z is None and any(v is not None for v in (gate.mimo_z, gate.mimo_o, gate.norm_weight)):
        raise ValueError("mimo_z, mimo_o and out_norm belong to the gate; give z_bthp too.")
    if gate.z is not None and sizes["r"] > 1 and gate.mimo_o is None:
        raise ValueError(f"The gate sums {sizes['r']} ranks with the weights mimo_o_hrp, which are missing.")
