"""One long sequence over several ranks: the state that enters each rank's part (mathematics.md, section 5).

Each rank summarises its part from the zero state; one all-gather a layer gives every rank all summaries, and rank r folds
those of ranks 0 to r - 1 into the state that enters its own part. The gradient of what rank r took from rank q's summary
goes back to q by one sum over the ranks. Where a document begins inside a part, what came before does not pass it.
Law: logits, loss and gradients are those of one process with the whole sequence, to float32 rounding.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Function

from mamba3.ops.segments import Summary, apply
from mamba3.ops.types import State
from mamba3.train.ranks import collective


class _Gather(Function):
    """local [n] to ([ranks, n], a zero that makes every rank take part in the backward pass, whatever it reads)."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.group = group
        everyone = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        with collective():
            dist.all_gather(everyone, local.contiguous(), group=group)
        return torch.stack(everyone), local.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grads[0].contiguous().clone()
        with collective():
            dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None


class Exchange:
    """`enter` of `Mamba3LM.forward_segment` for one batch.

    goes_on [ranks], fresh [ranks]: whether each rank's part begins within a document, and whether its last document began
    in that part.
    """

    def __init__(self, group: Any, goes_on: list[bool], fresh: list[bool]):
        self.group, self.rank = group, dist.get_rank(group)
        self.goes_on, self.fresh = goes_on, fresh

    def __call__(self, summary: Summary, mimo_x: torch.Tensor | None) -> State:
        wide = summary.S.dtype
        everyone, zero = _Gather.apply(torch.cat([v.to(wide).flatten() for v in summary]), self.group)
        state = State(*(torch.zeros_like(v) for v in (summary.phi, summary.S, summary.B_last, summary.x_last)))
        if self.goes_on[self.rank]:
            for rank in range(self.rank):
                before = _unflatten(everyone[rank], summary)
                if self.fresh[rank]:
                    state = State(before.phi, before.S, before.B_last, before.x_last)
                else:
                    state = apply(state, before, mimo_x)
        return state._replace(S=state.S + zero)


def _unflatten(flat: torch.Tensor, like: Summary) -> Summary:
    parts = flat.split([v.numel() for v in like])
    return Summary(*(part.view(v.shape).to(v.dtype) for part, v in zip(parts, like, strict=True)))
