"""The loop: batch, loss, gradient, step; validation, checkpoints and what is reported about them.

Law: the state after step k is a function of (model, data, configuration, k) alone, so a run that was killed and resumed
has bitwise the losses of one that was not (same machine, same number of threads; on a GPU where PyTorch's operations are
deterministic, which `torch.use_deterministic_algorithms(True)` makes them).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mamba3.train import checkpoint
from mamba3.train.config import TrainConfig
from mamba3.train.evaluate import Evaluation, batch_loss, evaluate
from mamba3.train.optim import build_optimizer
from mamba3.train.packing import Packing
from mamba3.train.plot import can_plot, plot_loss
from mamba3.train.report import METRICS, Metrics, Reporter, StepReport
from mamba3.train.schedule import learning_rate

CURVE = "loss.png"


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is not a number: the step was not taken."""


@dataclass(frozen=True)
class Outcome:
    """How `Trainer.run` ended: steps done, whether it was asked to stop, the last training loss and validation."""

    step: int
    stopped: bool
    loss: float | None
    validation: Evaluation | None


class Trainer:
    """Trains `model` on `train`, from step `step` on, into the folder `run`.

    Args:
        model: called as model(ids [1, T], cu_seqlens=...) -> logits [1, T, V]; `save_pretrained(folder)`.
        train, val: packed documents; `val` None trains without validation.
        token_sizes: UTF-8 bytes of each token, for bits per byte.
        identity: what makes the run this run; a checkpoint carries it.
        extra_files: copied into each checkpoint (the tokenizer).
        resume_from: the checkpoint, verified, that `model` was loaded from.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        run: Path,
        *,
        train: Packing,
        val: Packing | None = None,
        token_sizes: np.ndarray | None = None,
        identity: dict[str, Any] | None = None,
        extra_files: tuple[Path, ...] = (),
        device: torch.device | str = "cpu",
        reporter: Reporter | None = None,
        resume_from: Path | None = None,
    ):
        self.model, self.config, self.folder = model.to(device), config, run
        self.train, self.val, self.token_sizes = train, val, token_sizes
        self.identity, self.extra_files = identity or {}, extra_files
        self.device, self.dtype = torch.device(device), getattr(torch, config.dtype)
        self.reporter = reporter or Reporter()
        self.optimizer = build_optimizer(model, config)
        self.step = 0
        self.saved_step: int | None = None
        if resume_from is not None:
            self._restore(resume_from)

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Train to the end, or until `should_stop()` is true between two steps; a checkpoint is saved either way.

        Raises NonFiniteError before a step that would spoil the model, CheckpointError if the disk takes no checkpoint;
        the checkpoints that were there are intact.
        """
        config, loss, validation, stopped = self.config, None, None, False
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = Metrics(self.folder / METRICS, after_step=self.step or -1)  # a new run keeps nothing
        self.model.train()
        self.reporter.started(self.step, config.steps)
        try:
            if self.step == 0:
                validation = self._validate()
            while self.step < config.steps:
                stopped = should_stop()
                if stopped:
                    break
                loss = self._take_step()
                if self._due(config.eval_every):
                    validation = self._validate()
                if self._due(config.save_every):
                    self._save()
            if self.step and self.saved_step != self.step:
                self._save()
        finally:
            self.metrics.close()
            self.reporter.finished(self.step)
        self._draw()
        return Outcome(self.step, stopped, loss, validation)

    def _take_step(self) -> float:
        began = time.perf_counter()
        config = self.config
        rate = learning_rate(
            self.step,
            peak=config.lr,
            warmup=config.warmup_steps,
            steps=config.steps,
            floor=config.lr * config.min_lr_fraction,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.train.batch(self.step).to(self.device)
        loss = batch_loss(self.model, batch, self.dtype)
        value = loss.item()
        self._require_finite("loss", value)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm or math.inf).item()
        self._require_finite("gradient norm", norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        report = StepReport(
            step=self.step,
            loss=value,
            lr=rate,
            grad_norm=norm,
            tokens=batch.targets.numel(),
            seconds=time.perf_counter() - began,
        )
        self.metrics.step(report)
        self.reporter.stepped(report)
        return value

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            kept = "no checkpoint was written yet" if self.saved_step is None else f"step {self.saved_step} is saved"
            raise NonFiniteError(
                f"the {what} must be finite, but is {value} at step {self.step + 1}; the step was not taken and {kept}. "
                f"Lower the learning rate (now at most {self.config.lr:g}) or lengthen the warm-up, and restart."
            )

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _validate(self) -> Evaluation | None:
        if self.val is None:
            return None
        batches = self.val.sample(self.config.eval_tokens)
        result = evaluate(self.model, batches, device=self.device, dtype=self.dtype, sizes=self.token_sizes)
        self.metrics.evaluation(self.step, result)
        self.reporter.evaluated(self.step, result)
        return result

    def _save(self) -> None:
        place = checkpoint.save(
            self.folder,
            step=self.step,
            model=self.model,
            optimizer=self.optimizer,
            identity=self.identity,
            extra_files=self.extra_files,
            keep=self.config.keep,
        )
        self.saved_step = self.step
        self.reporter.saved(self.step, place)

    def _restore(self, place: Path) -> None:
        card = checkpoint.read_card(place)
        self.step = self.saved_step = card.step
        checkpoint.restore_training(place, self.model, self.optimizer)
        if card.threads != torch.get_num_threads():
            self.reporter.note(
                f"{place.name} was written with {card.threads} CPU threads, this process has {torch.get_num_threads()}: "
                "the losses go on equal to rounding, not to the bit."
            )

    def _draw(self) -> None:
        if can_plot():
            try:
                plot_loss(self.folder / METRICS, self.folder / CURVE)
            except OSError as error:  # the run is complete without it
                self.reporter.note(f"No loss curve was drawn: {error}.")
        else:
            self.reporter.note("No loss curve was drawn: matplotlib is not installed (pip install 'mamba3[train]').")
