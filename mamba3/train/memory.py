"""What a configuration takes, counted before it starts, against what the device has.

bytes = parameters · (4 master + 4 gradient + 8 AdamW's averages) / shards  +  what one forward pass keeps for its backward
The second term is counted, not guessed: a forward pass of one and of two blocks on the meta device, every tensor that
autograd saves summed once. The blocks are alike, so that the difference is what each takes.
"""

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import torch

from mamba3.lm import Mamba3Config, Mamba3LM
from mamba3.train.config import TrainConfig
from mamba3.train.objective import Objective
from mamba3.train.packing import Batch
from mamba3.train.ranks import Ranks

_STATES = 16  # bytes a parameter: float32 master, gradient and two averages


class Estimate(NamedTuple):
    """Bytes: of parameters with what the optimizer keeps for them, and of activations at the end of a forward pass."""

    states: int
    activations: int

    @property
    def total(self) -> int:
        return self.states + self.activations


def estimate(shape: Mamba3Config, config: TrainConfig, micro_tokens: int, ranks: Ranks | None = None) -> Estimate:
    """What one rank needs for a forward pass of `micro_tokens` tokens."""
    ranks = ranks or Ranks()
    with torch.device("meta"):
        parameters = Mamba3LM(shape).num_parameters()
    shards = ranks.size if config.parallel == "fsdp" else 1
    tokens = micro_tokens // ranks.context
    kinds = sorted(set(shape.layers))
    ends = 0
    each: dict[str, int] = {}
    for kind in kinds:
        one, two = (saved_bytes(dataclasses.replace(shape, layers=(kind,) * n), config, tokens) for n in (1, 2))
        each[kind] = two - one
        ends = max(ends, 2 * one - two)
    inputs = tokens * shape.d_model * 4  # what a recomputed block keeps
    blocks = [inputs if config.recompute else each[kind] for kind in shape.layers]
    again = max(each.values()) if config.recompute else 0
    return Estimate(parameters * _STATES // shards, ends + sum(blocks) + again)


def saved_bytes(shape: Mamba3Config, config: TrainConfig, tokens: int, device: str = "meta") -> int:
    """Bytes that autograd keeps of one forward pass over rows of seq_len tokens, the loss included, parameters not.

    The meta device has no autocast; a model in bfloat16 keeps the same activations, and the copies of weights are added.
    """
    half = config.dtype == "bfloat16"
    length = min(config.seq_len, tokens)
    with torch.device(device):
        model = Mamba3LM(shape, dtype=torch.bfloat16 if half else None)
        inputs = torch.zeros(max(1, tokens // length), length, dtype=torch.int64)
    batch = Batch(inputs, inputs.flatten(), None)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)  # so that no address is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = Objective(model)(batch)
    assert loss.requires_grad
    return sum(kept.values()) + (2 * model.num_parameters() if half else 0)


def free_bytes(device: torch.device) -> int | None:
    """Memory that a run may take, None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = []
    facts = Path("/proc/meminfo")
    if facts.is_file():
        lines = dict(line.split(":", 1) for line in facts.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip().isdigit():
        found.append(int(limit.read_text()))
    return min(found) if found else None


def _is_small(shape: Mamba3Config, tokens: int, free: int) -> bool:
    """Whether a bound that is several times too high still fits: counting takes seconds in a new process."""
    inner = shape.expand * shape.d_model * shape.mimo_rank
    width = (
        8 * shape.d_model + 8 * inner + 6 * shape.d_intermediate + 8 * shape.mimo_rank * shape.ngroups * shape.d_state
    )
    layers = len(shape.layers)
    parameters = shape.padded_vocab_size * shape.d_model + layers * shape.d_model * width
    return 4 * _STATES * parameters + 4 * tokens * (8 * layers * width + 8 * shape.padded_vocab_size) < free


def require(shape: Mamba3Config, config: TrainConfig, micro_tokens: int, ranks: Ranks, device: torch.device) -> None:
    """Raises ValueError, before anything is written, if the configuration needs more memory than the device has free."""
    free = free_bytes(device)
    if free is None or _is_small(shape, micro_tokens, free):
        return
    needed = estimate(shape, config, micro_tokens, ranks)
    if needed.total <= free:
        return
    remedies = []
    if needed.states < free:
        smaller = max(config.seq_len, int(micro_tokens * 0.8 * (free - needed.states) / needed.activations))
        divisor = next((n for n in range(smaller, 0, -1) if config.batch_tokens % n == 0), 1)
        remedies.append(f"micro_tokens = {divisor}")
        remedies += [] if config.recompute else ["recompute = true"]
    remedies += ["parallel = 'fsdp' on more GPUs", "fewer or narrower layers"]
    gb = 1e9
    raise ValueError(
        f"a run must fit into the memory of {device}, but this one needs about {needed.total / gb:.1f} GB "
        f"({needed.states / gb:.1f} for parameters, gradients and AdamW's averages, {needed.activations / gb:.1f} for the "
        f"activations of {micro_tokens:,} tokens) and {free / gb:.1f} GB are free; change one of: {'; '.join(remedies)}."
    )
