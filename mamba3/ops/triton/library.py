"""The scan and its gradient as one node each: torch.library ops for torch.compile, autograd functions otherwise.

What is kept between the two is the inputs. An out norm is applied around the node, in PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mamba3.ops.gate import apply_gate
from mamba3.ops.triton import ahead, backward, forward
from mamba3.ops.triton.ahead import compile_side_by_side, first_of_its_kind, lengthened
from mamba3.ops.triton.launch import device_limits
from mamba3.ops.types import Gate, Inputs, ScanOutput, State, without_autocast

TENSORS = 19  # of scan_op's arguments, those before the options
LONG = 2**15  # tokens of a sequence that is cut into segments, and that the copy engine suits
MANY_CORES = 8  # on fewer, what other lengths need is compiled when they come


def _unpacked(
    tensors: Sequence[Tensor | None], cu_seqlens: Sequence[int] | None
) -> tuple[Inputs, Gate, State | None, list[int] | None]:
    """The arguments of an implementation from those of the op."""
    inp, gate, fields = Inputs(*tensors[:12]), Gate(*tensors[12:15]), tensors[15:19]  # pyright: ignore[reportArgumentType]
    state = None if fields[0] is None else State(*fields)  # pyright: ignore[reportArgumentType]
    return inp, gate, state, None if cu_seqlens is None else list(cu_seqlens)


def compile_ahead(
    inp: Inputs, gate: Gate, state: State | None, cu_seqlens: list[int] | None, *, wide: bool, recorded: bool
) -> None:
    """Compile what a call launches, side by side: forward and, where a gradient is `recorded`, backward, of y alone.

    Where there are cores for it, also what calls of other lengths launch: a sequence that is cut into segments, and one that
    ends with a chunk, whose tiles the copy engine may load.
    """
    limits = device_limits(inp.x.device)

    def onward(inp: Inputs, gate: Gate, state: State | None, cu_seqlens: list[int] | None = cu_seqlens) -> None:
        forward.scan(inp, gate, state, cu_seqlens, limits=limits, wide=wide)

    def back(inp: Inputs, gate: Gate, state: State | None, cu_seqlens: list[int] | None = cu_seqlens) -> None:
        (b, t, h, p), dtype = inp.x.shape, torch.float32 if wide else inp.x.dtype
        dy = inp.x.new_empty((b, t, h, p) if gate.z is not None else (b, t, inp.rank, h, p), dtype=dtype)
        backward.backward(inp, gate, state, cu_seqlens, dy, backward.LastState(), limits=limits)

    # The longest compilation, of gradient_rows, is to begin early.
    passes = [back] if recorded else []
    others = [
        functools.partial(_at_length, run, t)
        for run, t in ((onward, LONG), (onward, LONG + 1), *((p, LONG) for p in passes))
    ]
    compile_side_by_side(inp, gate, state, *passes, onward, *(others if ahead.cores() >= MANY_CORES else ()))


def _at_length(run: Callable[..., None], tokens: int, inp: Inputs, gate: Gate, state: State | None) -> None:
    run(*lengthened(inp, gate, state, tokens), None)


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, lam: Tensor, theta: Tensor, B: Tensor, C: Tensor, B_bias: Tensor | None,
    C_bias: Tensor | None, mimo_x: Tensor | None, D: Tensor | None, tick: Tensor | None, z: Tensor | None,
    mimo_z: Tensor | None, mimo_o: Tensor | None, phi: Tensor | None, S: Tensor | None, B_prev: Tensor | None,
    x_prev: Tensor | None, cu_seqlens: Sequence[int] | None, wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`mamba3.ops.scan` after validation, out norm "none": y (in float32 if `wide`) and the state's phi, S, B_prev, x_prev."""
    tensors = (
        x, dt, A, lam, theta, B, C, B_bias, C_bias, mimo_x, D, tick, z, mimo_z, mimo_o, phi, S, B_prev, x_prev,
    )  # fmt: skip
    y, after = forward.scan(*_unpacked(tensors, cu_seqlens), wide=wide)
    return y, *after[:4]


scan_op = torch.library.custom_op("mamba3::scan", _scan, mutates_args=())


@scan_op.register_fake
def _(
    x, dt, A, lam, theta, B, C, B_bias, C_bias, mimo_x, D, tick, z, mimo_z, mimo_o, phi, S, B_prev, x_prev, cu_seqlens,
    wide,
):  # fmt: skip
    b, t, h, p = x.shape
    r, n = B.shape[-3], B.shape[-1]
    s = b if cu_seqlens is None else len(cu_seqlens) - 1
    single = {"dtype": torch.float32}
    y = x.new_empty((b, t, r, h, p) if z is None else (b, t, h, p), **(single if wide else {}))
    return (
        y, x.new_empty((s, h, theta.shape[-1]), **single), x.new_empty((s, h, p, n), **single),
        x.new_empty((s, r, h, n)), x.new_empty((s, h, p)),
    )  # fmt: skip


def _scan_backward(
    x: Tensor, dt: Tensor, A: Tensor, lam: Tensor, theta: Tensor, B: Tensor, C: Tensor, B_bias: Tensor | None,
    C_bias: Tensor | None, mimo_x: Tensor | None, D: Tensor | None, tick: Tensor | None, z: Tensor | None,
    mimo_z: Tensor | None, mimo_o: Tensor | None, phi: Tensor | None, S: Tensor | None, B_prev: Tensor | None,
    x_prev: Tensor | None, cu_seqlens: Sequence[int] | None, dy: Tensor, d_phi: Tensor | None, dS: Tensor | None,
    dB_prev: Tensor | None, dx_prev: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of those tensors of `scan_op` that are given, from those of its results."""
    tensors = (
        x, dt, A, lam, theta, B, C, B_bias, C_bias, mimo_x, D, tick, z, mimo_z, mimo_o, phi, S, B_prev, x_prev,
    )  # fmt: skip
    last = backward.LastState(d_phi, dS, dB_prev, dx_prev)
    found = backward.backward(*_unpacked(tensors, cu_seqlens), dy, last)
    every = (*found.inp, *found.gate[:3], *(found.state or State(None, None, None, None))[:4])  # pyright: ignore[reportArgumentType]
    return [grad for grad, v in zip(every, tensors, strict=True) if v is not None and grad is not None]


scan_backward_op = torch.library.custom_op("mamba3::scan_backward", _scan_backward, mutates_args=())


@scan_backward_op.register_fake
def _(*arguments):
    return [v.new_empty(v.shape) for v in arguments[:TENSORS] if v is not None]


def _keep(ctx, inputs, output) -> None:
    *tensors, cu_seqlens, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.cu_seqlens, ctx.like_y = cu_seqlens, (output[0].shape, output[0].dtype)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, *last, backward_node: Callable[..., Sequence[Tensor]] = scan_backward_op):
    tensors = ctx.saved_tensors
    if dy is None:
        shape, dtype = ctx.like_y
        dy = torch.zeros(shape, dtype=dtype, device=tensors[0].device)
    found = iter(backward_node(*tensors, ctx.cu_seqlens, dy, *last))
    return *(None if v is None else next(found) for v in tensors), None, None


def _refuse(ctx, *grads):
    raise RuntimeError(
        "The Triton kernels have no gradient of their gradient; take impl='chunked' where one is needed."
    )


class _Scan(torch.autograd.Function):
    """`scan_op` without what torch.library does around an op: 0.55 of the 1.9 ms that forward and backward
    take the host, launches apart."""

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, cu_seqlens, wide = inputs
        call = _unpacked(tensors, cu_seqlens)
        if first_of_its_kind(*call[:3], wide, True):
            compile_ahead(*call, wide=wide, recorded=True)
        output = _scan(*inputs)
        _keep(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *grads):
        return _differentiate(ctx, *grads, backward_node=_ScanBackward.apply)


class _ScanBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        return tuple(_scan_backward(*inputs))

    @staticmethod
    def backward(ctx, *grads):
        _refuse(ctx, *grads)


class _FinalState(torch.autograd.Function):
    """phi, S, B_prev, x_prev after each sequence of a dense batch, without a readout; the gradient is that of a scan of which
    nobody looks at y."""

    @staticmethod
    def forward(ctx, *tensors):
        inp, _, state, _ = _unpacked(tensors, None)
        ctx.save_for_backward(*tensors)
        ctx.cu_seqlens, ctx.like_y = None, ((*inp.x.shape[:2], inp.rank, *inp.x.shape[2:]), inp.x.dtype)
        ctx.set_materialize_grads(False)
        return tuple(forward.final_state(inp, state)[:4])

    @staticmethod
    def backward(ctx, *last):
        return _differentiate(ctx, None, *last, backward_node=_ScanBackward.apply)[:TENSORS]


torch.library.register_autograd("mamba3::scan", _differentiate, setup_context=_keep)
torch.library.register_autograd("mamba3::scan_backward", _refuse)


def scan(inp: Inputs, gate: Gate, state: State | None, cu_seqlens: list[int] | None) -> ScanOutput:
    """The arguments of an implementation; state None is the zero state, which then costs nothing.

    Where nothing is compiled and no gradient recorded, the kernels are launched without a node around them, which would take
    longer than they do.
    """
    fields = (None,) * 4 if state is None else state[:4]
    tensors = (*inp, *gate[:3], gate.norm_weight, *fields)
    recorded = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)
    if not recorded and not torch.compiler.is_compiling():
        if first_of_its_kind(inp, gate, state, gate.norm != "none", False):
            compile_ahead(inp, gate, state, cu_seqlens, wide=False, recorded=False)
        return forward.scan(inp, gate, state, cu_seqlens)
    normed = gate.norm != "none"
    inner = Gate() if normed else gate
    # Subclasses of Tensor, such as those that hold no data, know the op and not what is inside it.
    plain = type(inp.x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    node = _Scan.apply if plain else scan_op
    y, *after = node(*inp, *inner[:3], *fields, cu_seqlens, normed)
    if normed:
        with without_autocast(inp.x.device):
            y = apply_gate(y, gate).to(inp.x.dtype)
    return ScanOutput(y, State(*after, conv=None if state is None else state.conv))


def final_state(inp: Inputs, state: State | None) -> State:
    """The state after a dense batch of sequences; state None is the zero state. C, its bias and D are not looked at."""
    inp = inp._replace(C=inp.B, C_bias=None, D=None)
    fields = (None,) * 4 if state is None else state[:4]
    tensors = (*inp, *Gate()[:3], *fields)
    if not (torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)):
        return forward.final_state(inp, state)
    return State(*_FinalState.apply(*tensors), conv=None if state is None else state.conv)
