"""Several models of one shape, trained side by side as one: their parameters stacked, the model mapped over the stack.

    p [m, ...] of every parameter;   losses [m] = vmap(loss)(p, sequences [m, b, t]);   AdamW on p with a rate [m]

A GPU waits for the launch of small kernels, and m models launch as many as one. Nothing is shared: the models' losses are added
up before the backward pass, so each parameter's gradient is that of its own model. Law: stacked = separate, to rounding.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.attention import SDPBackend, sdpa_kernel

from mamba3.lm import Mamba3Config, Mamba3LM
from mamba3.tasks.settings import Settings

# Parameters that weight decay leaves alone whatever their shape; vectors are left alone too.
NEVER_DECAYED, BC_BIASES = ("dt_bias", "D"), ("B_bias", "C_bias")


class Answers(nn.Module):
    """A language model that is read at some positions only: (tokens [b, t], positions [b, q]) to logits [b, q, v]."""

    def __init__(self, model: Mamba3LM):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, positions: Tensor) -> Tensor:
        hidden = self.model.hidden(inputs)
        asked = hidden.gather(1, positions.unsqueeze(2).expand(-1, -1, hidden.shape[2]))
        return self.model.head(asked)[..., : self.model.config.vocab_size]


class Stack:
    """m models of one configuration with an optimizer each; model i starts from the weights of seed `seeds[i]`.

    parameters, first, second: name to [m, ...], first and second being Adam's averages. alive [m]: False for a model
    whose loss or gradient was once not finite; its parameters stay as they were before that.
    """

    def __init__(self, config: Mamba3Config, seeds: tuple[int, ...], settings: Settings, device: torch.device | str):
        self.config, self.settings = config, settings
        models = []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                models.append(Answers(Mamba3LM(config)))
        self._template = models[0].to(device)
        stacked, buffers = stack_module_state(cast("list[nn.Module]", models))
        self.parameters = {name: v.detach().to(device).requires_grad_() for name, v in stacked.items()}
        self.buffers = {name: v.to(device) for name, v in buffers.items()}
        self.first = {name: torch.zeros_like(v, requires_grad=False) for name, v in self.parameters.items()}
        self.second = {name: v.clone() for name, v in self.first.items()}
        self.alive = torch.ones(len(seeds), dtype=torch.bool, device=device)
        # The fused attention of CPUs has no rule for torch.vmap; the plain formula has.
        attention = "attention" in config.layers
        self._backend = (lambda: sdpa_kernel(SDPBackend.MATH)) if attention else nullcontext

    def __len__(self) -> int:
        return len(self.alive)

    def logits(self, inputs: Tensor, positions: Tensor) -> Tensor:
        """[m, b, q, v] of all models for the same sequences [b, t]; no gradient is kept."""
        plain = {name: v.detach() for name, v in self.parameters.items()}
        # Recording is on, though nothing here needs a gradient: without it the scan writes in place, which vmap cannot.
        with torch.enable_grad(), self._backend():
            return torch.vmap(self._logits, in_dims=(0, 0, None, None))(plain, self.buffers, inputs, positions)

    def losses(self, inputs: Tensor, positions: Tensor, answers: Tensor) -> Tensor:
        """Mean cross-entropy of each model, [m], on sequences of its own: each argument [m, b, ...]."""
        with self._backend():
            return torch.vmap(self._loss)(self.parameters, self.buffers, inputs, positions, answers)

    def step(self, inputs: Tensor, positions: Tensor, answers: Tensor, rates: Tensor, count: int) -> Tensor:
        """One AdamW step of every model with its own rate [m]; the losses before it. count: 1 for the first step."""
        losses = self.losses(inputs, positions, answers)
        gradients = torch.autograd.grad(losses.sum(), list(self.parameters.values()))
        with torch.no_grad():
            squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients])
            norms = squares.sum(0).sqrt()
            self.alive &= losses.isfinite() & norms.isfinite()
            clip = self.settings.clip
            scale = (clip / (norms + 1e-6)).clamp(max=1) if clip else torch.ones_like(norms)
            for (name, p), gradient in zip(self.parameters.items(), gradients, strict=True):
                self._update(name, p, gradient, scale, rates, count)
        return losses.detach()

    def _update(self, name: str, p: Tensor, gradient: Tensor, scale: Tensor, rates: Tensor, count: int) -> None:
        """Decoupled weight decay (Loshchilov and Hutter), where the model is alive; a dead one's averages stop too."""
        shape = (-1,) + (1,) * (p.ndim - 1)
        alive, (slow, slower) = self.alive.view(shape), self.settings.betas
        gradient = torch.where(alive, gradient * scale.view(shape), 0)
        first, second = self.first[name], self.second[name]
        first.lerp_(gradient, 1 - slow)
        second.mul_(slower).addcmul_(gradient, gradient, value=1 - slower)
        change = first / (1 - slow**count) / ((second / (1 - slower**count)).sqrt() + self.settings.eps)
        if self.decays(name):
            change = change + self.settings.weight_decay * p
        p.sub_(torch.where(alive, change * rates.view(shape), 0))

    def decays(self, name: str) -> bool:
        """Whether weight decay acts on a parameter."""
        leaf = name.rpartition(".")[2]
        if leaf in BC_BIASES:
            return self.settings.decay_bc_bias
        return leaf not in NEVER_DECAYED and self.parameters[name].ndim > 2  # of the stack: a matrix or more

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training goes on from, by name."""
        kinds = {"parameters": self.parameters, "first": self.first, "second": self.second, "buffers": self.buffers}
        named = {f"{kind}/{name}": v.detach() for kind, values in kinds.items() for name, v in values.items()}
        return named | {"alive": self.alive}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`. ValueError where they are those of another stack."""
        mine = self.tensors()
        odd = sorted(k for k in mine.keys() | tensors.keys() if k not in mine or k not in tensors)
        odd += [k for k in mine if k in tensors and mine[k].shape != tensors[k].shape]
        if odd:
            raise ValueError(
                f"a checkpoint must hold the tensors of these models, but differs in {', '.join(odd[:4])}."
            )
        for name, value in mine.items():
            value.copy_(tensors[name])

    def model(self, index: int) -> Mamba3LM:
        """One of the models, on its own."""
        both = self.parameters | self.buffers
        weights = {name.removeprefix("model."): v[index].detach().cpu().clone() for name, v in both.items()}
        return Mamba3LM.from_weights(self.config, weights)

    def _logits(self, parameters: dict, buffers: dict, inputs: Tensor, positions: Tensor) -> Tensor:
        return functional_call(self._template, (parameters, buffers), (inputs, positions))

    def _loss(self, parameters: dict, buffers: dict, inputs: Tensor, positions: Tensor, answers: Tensor) -> Tensor:
        logits = self._logits(parameters, buffers, inputs, positions)
        return F.cross_entropy(logits.flatten(0, 1).float(), answers.flatten())
