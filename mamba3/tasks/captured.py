"""The training step of many models as one CUDA graph: their parameters in one matrix, their data on the device.

    weights [m, P], step k:  losses [m] of the k-th sequences  ->  gradient [m, P]  ->  clip each row, AdamW with its own rate

The step counter, the sequences of a whole stage and the rates of all steps lie on the device, so that a step asks the host
for nothing and is replayed as it was captured. On a CPU the same function runs as it is. Law: `Stack.step`, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba3.nn.cuda_graph import record
from mamba3.tasks.settings import Settings
from mamba3.tasks.stack import BC_BIASES, NEVER_DECAYED

# (weights [m, P] as `Layout` joins them; tokens [b, t]; positions [b] or [b, q]) to logits [m, b, v] or [m, b, q, v]; of a
# group with `longest` also that, for (tokens [s]; positions [c]) to logits [m, c, v]
Forward = Callable[..., Tensor]


class Group(NamedTuple):
    """Sequences of similar length of every step of a stage: tokens [steps, b, t] of small integers, positions and answers
    [steps, b], or [steps, b, q] of several questions.

    longest > 0: sequences one behind another, tokens [steps, s], and positions [steps, c] of each one's last token, c >= b.
    """

    tokens: Tensor
    positions: Tensor
    answers: Tensor
    longest: int = 0

    def to(self, device: torch.device | str) -> Group:
        """The same on another device."""
        return Group(self.tokens.to(device), self.positions.to(device), self.answers.to(device), self.longest)


class Layout:
    """Where each parameter lies in a row of P numbers: in the order of `shapes`, which name the parameters of one model."""

    def __init__(self, shapes: dict[str, torch.Size]):
        self.shapes = shapes
        self.size = sum(shape.numel() for shape in shapes.values())

    def join(self, values: dict[str, Tensor]) -> Tensor:
        """[m, ...] of each parameter to [m, P]."""
        return torch.cat([values[name].flatten(1) for name in self.shapes], dim=1)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """The inverse of `join`; views."""
        pieces = rows.split([shape.numel() for shape in self.shapes.values()], dim=1)
        return {name: v.unflatten(1, shape) for (name, shape), v in zip(self.shapes.items(), pieces, strict=True)}

    def decayed(self, settings: Settings) -> Tensor:
        """[P]: 1 where weight decay acts."""

        def acts(name: str, shape: torch.Size) -> bool:
            leaf = name.rpartition(".")[2]
            if leaf in BC_BIASES:
                return settings.decay_bc_bias
            return leaf not in NEVER_DECAYED and len(shape) > 1

        return torch.cat([torch.full((s.numel(),), float(acts(n, s))) for n, s in self.shapes.items()])


class Captured:
    """m models in training.

    weights, first, second [m, P]: parameters and Adam's averages. exist [m, P]: 0 where a model has no such parameter.
    alive [m]: False once a loss or gradient was not finite. count: steps taken, on the device. losses [total, m].
    """

    def __init__(
        self,
        layout: Layout,
        weights: Tensor,
        exist: Tensor,
        peaks: list[float],
        settings: Settings,
        device: torch.device,
        *,
        kernels: bool = False,
    ):
        self.layout, self.settings, self.device, self.peaks = layout, settings, device, list(peaks)
        self.kernels = kernels  # the optimiser by `row_kernels`
        self.weights, self.exist = weights.to(device).clone(), exist.to(device)
        self.first, self.second = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.alive = torch.ones(len(peaks), dtype=torch.bool, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.losses = torch.full((settings.total, len(peaks)), float("nan"), device=device)
        self._decayed = layout.decayed(settings).to(device)
        self._replay: Callable[[], object] | None = None
        self._rates: Tensor | None = None

    def keep(self, rows: list[int]) -> None:
        """Go on with these models alone."""
        index = torch.tensor(rows, device=self.device)
        for name in ("weights", "exist", "first", "second", "alive"):
            setattr(self, name, getattr(self, name)[index].clone())
        self.losses, self.peaks = self.losses[:, index].clone(), [self.peaks[i] for i in rows]
        self._rates = self._replay = None

    def start_stage(self, forward: Forward, groups: list[Group], began: int) -> None:
        """Take the sequences of the stage that began at step `began`, and capture the step on a GPU."""
        self._began = began
        self._replay = None  # frees the memory of the last stage's graph
        if self._rates is None:
            rates = [[self.settings.rate(step, peak) for peak in self.peaks] for step in range(self.settings.total)]
            self._rates = torch.tensor(rates, dtype=self.weights.dtype, device=self.device)
            whole = [[1 - beta ** (step + 1) for beta in self.settings.betas] for step in range(self.settings.total)]
            self._whole = torch.tensor(whole, dtype=self.weights.dtype, device=self.device)
        self._groups = [group.to(self.device) for group in groups]
        self._forward = forward
        if self.device.type != "cuda":
            self._replay = self._step
            return
        self._replay = record(self._step, self._warm_up, self.device, beside_others=True)

    def _warm_up(self) -> None:
        self._gradient()
        if self.kernels:  # compiled, not taken
            rows = (torch.zeros(1, 1, device=self.device) for _ in range(4))
            ones, count = torch.ones(1, 2, device=self.device), self.count * 0
            self._adam(*rows, ones[:, :1], ones[0, :1], ones[0, :1], ones[0, :1] > 0, ones[:, :1], ones, count)

    def _adam(self, *tensors: Tensor) -> None:
        from mamba3.tasks.row_kernels import adam_step

        settings = self.settings
        adam_step(*tensors, betas=settings.betas, eps=settings.eps, decay=settings.weight_decay)

    def advance(self, steps: int) -> None:
        """Take so many steps of the stage."""
        assert self._replay is not None
        for _ in range(steps):
            self._replay()

    def parameters(self) -> dict[str, Tensor]:
        """By name, [m, ...], without gradients."""
        return self.layout.split(self.weights)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training goes on from, on the CPU; losses up to now."""
        names = ("weights", "first", "second", "alive", "count")
        values = {name: getattr(self, name).cpu() for name in names}
        return values | {"losses": self.losses[: int(self.count)].cpu()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`, for the same models."""
        for name in ("weights", "first", "second", "alive", "count"):
            getattr(self, name).copy_(tensors[name])
        self.losses[: len(tensors["losses"])] = tensors["losses"].to(self.device)

    def _gradient(self) -> tuple[Tensor, Tensor]:
        """Losses [m] of the next sequences and their gradient [m, P]."""
        at = (self.count - self._began).remainder(len(self._groups[0].tokens))
        weights = self.weights.detach().requires_grad_()
        total, gradient = None, None
        for group in self._groups:
            tokens, positions, answers = (v.index_select(0, at).squeeze(0).long() for v in group[:3])
            packed = (group.longest,) if group.longest else ()
            logits = self._forward(weights, tokens, positions, *packed)[:, : len(answers)]
            losses = answer_losses(logits, answers) / self.settings.batch
            (part,) = torch.autograd.grad(losses.sum(), weights)
            total = losses.detach() if total is None else total + losses.detach()
            gradient = part if gradient is None else gradient + part
        assert total is not None and gradient is not None
        return total, gradient

    def _step(self) -> None:
        losses, gradient = self._gradient()
        with torch.no_grad():
            settings, (slow, slower) = self.settings, self.settings.betas
            assert self._rates is not None
            norms = gradient.square().sum(1).sqrt()
            self.alive &= losses.isfinite() & norms.isfinite()
            scale = (settings.clip / (norms + 1e-6)).clamp(max=1) if settings.clip else torch.ones_like(norms)
            if self.kernels:
                self._adam(
                    self.weights, self.first, self.second, gradient, self.exist, self._decayed, scale, self.alive, self._rates,
                    self._whole, self.count,
                )  # fmt: skip
                self._after(losses)
                return
            alive, taken = self.alive.unsqueeze(1), (self.count + 1).double()
            gradient = (gradient * scale.unsqueeze(1)).masked_fill(~alive, 0) * self.exist
            self.first.lerp_(gradient, 1 - slow)
            self.second.mul_(slower).addcmul_(gradient, gradient, value=1 - slower)
            one = torch.ones_like(taken)
            correct = ((one - slow**taken).to(gradient.dtype), (one - slower**taken).to(gradient.dtype))
            change = self.first / correct[0] / ((self.second / correct[1]).sqrt() + settings.eps)
            change = change + settings.weight_decay * self._decayed * self.weights
            rates = self._rates.index_select(0, self.count).T
            self.weights.sub_((change * rates).masked_fill(~alive, 0))
            self._after(losses)

    def _after(self, losses: Tensor) -> None:
        self.losses.index_copy_(0, self.count, losses.to(self.losses.dtype).unsqueeze(0))
        self.count += 1


def answer_losses(logits: Tensor, answers: Tensor) -> Tensor:
    """Cross-entropy [m] of logits [m, b, v] or [m, b, q, v], summed over sequences, the mean of each one's questions."""
    m, v, questions = logits.shape[0], logits.shape[-1], answers[0].numel()
    losses = F.cross_entropy(
        logits.reshape(-1, v).float(), answers.expand(m, *answers.shape).flatten(), reduction="none"
    )
    return losses.view(m, -1).sum(1) / questions
