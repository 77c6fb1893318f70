"""The processes of torchrun: who they are, what they share, and how a model is spread over them.

A step's forward passes are numbered over accumulation and ranks alike, so that one process with four passes, two with two
and four with one take the same step (up to the rounding of sums). Gradients are means over ranks; ranks that share a
sequence each take the mean over their own tokens, and the mean of these is that of the sequence.
Sharding (FSDP2) keeps float32 everywhere and computes under autocast: the parameters of the recurrence are never rounded.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")
_PATIENCE = timedelta(minutes=10)  # for a rank that takes part in a sum
_PREPARING = timedelta(hours=24)  # while the first rank tokenises


class RankError(ConnectionError):
    """Another rank ended, so that this one cannot go on."""


@dataclass(frozen=True)
class Ranks:
    """This process among `size`. Neighbours in groups of `context` share a sequence."""

    rank: int = 0
    size: int = 1
    context: int = 1
    waiting: Any = None  # process groups: for what may take hours, for checkpoints, of the sequence
    saving: Any = None
    sequence: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the data is this rank's; the ranks of a sequence have the same."""
        return self.rank // self.context

    @property
    def data_size(self) -> int:
        return self.size // self.context

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over the ranks."""
        return self.total(value) / self.size

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks."""
        if self.size > 1:
            value = value.clone()
            with collective():
                dist.all_reduce(value)
        return value

    def agree(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self.size == 1:
            return flag
        asked = torch.tensor([flag], dtype=torch.int32)
        with collective():
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank, on all of them; a ValueError or OSError there is raised everywhere."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box = [make(), None]
            except (ValueError, OSError) as error:
                box = [None, error]
        with collective():
            dist.broadcast_object_list(box, src=0, group=self.waiting)
        if box[1] is not None:
            raise box[1]
        return box[0]


@contextmanager
def collective() -> Iterator[None]:
    """Within the block a failure of communication becomes a RankError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not _of_communication(error):
            raise
        raise RankError(
            f"every rank must take part, but rank {dist.get_rank()} of {dist.get_world_size()} lost another one ({error}); "
            "the job ends here. The checkpoints are whole: run the same command again to go on from the newest."
        ) from error


def _of_communication(error: RuntimeError) -> bool:
    """Whether an error is of the network: PyTorch's own kinds, and gloo's, which are RuntimeErrors with a text."""
    lost = ("Connection", "connection", "Timed out", "timed out", "Broken pipe", "reset by peer", "closed")
    return isinstance(error, dist.DistError) or ("gloo" in str(error) and any(word in str(error) for word in lost))


def join(context: int = 1, device: torch.device | str = "cpu") -> Ranks:
    """The ranks that torchrun started, or the one process that runs without it.

    Raises ValueError where `context` ranks cannot share a sequence.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1
    size = dist.get_world_size() if dist.is_initialized() else size
    if size % context:
        raise ValueError(
            f"context_parallel = {context} ranks share a sequence, but there are {size}; start a multiple of {context} with "
            "torchrun --nproc-per-node."
        )
    if size == 1:
        return Ranks()
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    rank, sequence = dist.get_rank(), None
    for first in range(0, size, context):
        group = dist.new_group(list(range(first, first + context))) if context > 1 else None
        sequence = group if first <= rank < first + context else sequence
    return Ranks(
        rank=rank, size=size, context=context, sequence=sequence,
        waiting=dist.new_group(backend="gloo", timeout=_PREPARING), saving=dist.new_group(backend="gloo"),
    )  # fmt: skip


def leave() -> None:
    """The end of a job that went well: all ranks let go of one another."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """`device`, or under torchrun the GPU of this rank."""
    if device.type == "cuda" and device.index is None and dist.is_torchelastic_launched():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def spread(
    objective: nn.Module, blocks: list[nn.Module], parallel: str, ranks: Ranks, device: torch.device
) -> nn.Module:
    """The objective as all ranks compute it: as it is, under DistributedDataParallel, or sharded by block (FSDP2)."""
    if ranks.size == 1:
        return objective
    if parallel == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        # Of sizes [2, 1, 64] two strides mean the same; torch 2.13 warns of the difference, once a rank.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
        own = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(objective, device_ids=own, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # Whole parameters must not stay behind after a validation: what is saved next are the shards.
    return cast(nn.Module, fully_shard(objective, mesh=mesh, reshard_after_forward=True))


@contextmanager
def gradients_summed(module: nn.Module, now: bool) -> Iterator[None]:
    """Within the block a backward pass sums the gradients over the ranks, or, with `now` False, leaves it to a later one."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(now)  # pyright: ignore[reportCallIssue]
        yield
    elif hasattr(module, "no_sync") and not now:
        with module.no_sync():  # pyright: ignore[reportCallIssue]
            yield
    else:
        yield


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor as one process has it: a sharded one is gathered."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()
