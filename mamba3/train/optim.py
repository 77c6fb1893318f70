"""AdamW with the paper's parameter groups (mathematics.md, section 7)."""

import torch
from torch import nn

from mamba3.train.config import TrainConfig

_NEVER_DECAYED = ("dt_bias", "D")
_BC_BIASES = ("B_bias", "C_bias")
# What the recurrence sums over a sequence: rounding one of these to 16 bits is a drift, not noise (numerics.md).
RECURRENT = (*_NEVER_DECAYED, *_BC_BIASES, "mimo_x", "mimo_z", "mimo_o")


def decays(name: str, parameter: torch.Tensor, *, bc_bias: bool = False) -> bool:
    """Whether weight decay acts on a parameter.

    Never on dt_bias and D, nor on vectors (norm weights, biases); on B_bias and C_bias, which are (h, r, n), only if
    `bc_bias`.
    """
    leaf = name.rpartition(".")[2]
    if leaf in _BC_BIASES:
        return bc_bias
    return leaf not in _NEVER_DECAYED and parameter.ndim >= 2


def parameter_groups(model: nn.Module, *, weight_decay: float, decay_bc_bias: bool) -> list[dict]:
    """Two groups, decayed and not, that hold each trainable parameter exactly once."""
    decayed, exempt = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if decays(name, parameter, bc_bias=decay_bc_bias) else exempt).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def require_float32(model: nn.Module) -> None:
    """The rule of mixed precision: parameters are float32 masters, those of the recurrence above all; autocast rounds copies.

    Raises ValueError naming the first parameter that is not; a model in float64 is as good.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            recurrent = name.rpartition(".")[2] in RECURRENT
            kind = "a parameter of the recurrence" if recurrent else "a parameter"
            raise ValueError(
                f"{kind} must be float32 while it is trained, but {name} is {str(parameter.dtype).removeprefix('torch.')}; "
                "leave the model in float32 (model.float()) and set dtype to 'bfloat16', which computes under autocast."
            )


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    require_float32(model)
    groups = parameter_groups(model, weight_decay=config.weight_decay, decay_bc_bias=config.decay_bc_bias)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's averages by parameter name: `exp_avg/layers.0...`, as safetensors can hold them."""
    return {
        f"{kind}/{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`, into a fresh optimizer of the same model; no tensors are those of no step taken.

    Raises ValueError if the tensors are not those of this model.
    """
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        states.setdefault(name, {})[kind] = value
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    if states and set(states) != trainable:
        odd = sorted(set(states) ^ trainable)
        raise ValueError(
            f"an optimizer's state must cover the model's parameters, but differs in {', '.join(odd[:4])}"
            f"{' and others' if len(odd) > 4 else ''}; it belongs to another model."
        )
    for name, state in states.items():
        parameter = parameters[name]
        for kind, value in state.items():
            if kind != "step" and value.shape != parameter.shape:
                raise ValueError(
                    f"{kind} of {name} must have the shape {tuple(parameter.shape)} but has {tuple(value.shape)}; "
                    "it belongs to another model."
                )
        optimizer.state[parameter] = {kind: value.to(device=parameter.device).clone() for kind, value in state.items()}


def empty_optimizer_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Zeros in the shapes (and shards) of AdamW's averages, by the names of `optimizer_tensors`: to load a checkpoint into."""
    empty: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            empty[f"step/{name}"] = torch.zeros((), dtype=torch.float32)
            empty |= {f"{kind}/{name}": torch.zeros_like(parameter.detach()) for kind in ("exp_avg", "exp_avg_sq")}
    return empty
