"""The loop: batch, loss, gradient, step; validation, checkpoints and what is reported about them.

Law: the state after step k is a function of (model, data, configuration, ranks, k) alone, so a run that was killed and
resumed has bitwise the losses of one that was not (same machine, same number of threads; on a GPU where PyTorch's operations
are deterministic, which `torch.use_deterministic_algorithms(True)` makes them).
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from mamba3.lm.state import LMState
from mamba3.train import captured, checkpoint, saver
from mamba3.train.captured import CapturedPass, NotCaptured
from mamba3.train.carried import empty_carried, pack_carried, unpack_carried
from mamba3.train.config import TrainConfig
from mamba3.train.data import Data
from mamba3.train.evaluate import Evaluation, evaluate
from mamba3.train.objective import Objective
from mamba3.train.optim import build_optimizer, empty_optimizer_tensors, optimizer_tensors, restore_optimizer
from mamba3.train.packing import Batch
from mamba3.train.plot import can_plot, plot_loss
from mamba3.train.ranks import Ranks, collective, gradients_summed, spread, whole
from mamba3.train.report import METRICS, Metrics, Reporter, StepReport, TensorBoard
from mamba3.train.saver import Saver
from mamba3.train.schedule import configured_rate
from mamba3.train.watch import Watch

CURVE = "loss.png"


class NonFiniteError(ArithmeticError):
    """Too many steps in a row that would have spoilt the model: none of them was taken."""


@dataclass(frozen=True)
class Outcome:
    """How `Trainer.run` ended: steps done, whether it was asked to stop, the last training loss and validation."""

    step: int
    stopped: bool
    loss: float | None
    validation: Evaluation | None


class Trainer:
    """Trains `model` on `data`, from step `step` on, into the folder `run`.

    Args:
        model: called as model(ids [b, t]) or model(ids [1, t], cu_seqlens=...) -> logits [b, t, V]; `save_pretrained(folder)`;
            its blocks in `layers`. A `Mamba3LM`, or what behaves so; layouts that carry a state need a `Mamba3LM`.
        data: the batches of each step, and what is held out.
        token_sizes: UTF-8 bytes of each token, for bits per byte.
        identity: what makes the run this run; a checkpoint carries it.
        extra_files: copied into each checkpoint (the tokenizer).
        resume_from: the checkpoint, verified, to go on from.
        ranks: the processes that train together; each makes its own Trainer.

    Raises ValueError for parameters that are not float32 masters.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        run: Path,
        *,
        data: Data,
        token_sizes: np.ndarray | None = None,
        identity: dict[str, Any] | None = None,
        extra_files: tuple[Path, ...] = (),
        device: torch.device | str = "cpu",
        reporter: Reporter | None = None,
        resume_from: Path | None = None,
        ranks: Ranks | None = None,
    ):
        self.config, self.folder, self.data, self.token_sizes = config, run, data, token_sizes
        self.device, self.ranks, self.extra_files = torch.device(device), ranks or Ranks(), extra_files
        self.reporter = reporter or Reporter()
        self.saver = Saver(
            run, model, identity=identity or {}, extra_files=extra_files, keep=config.keep, ranks=self.ranks,
            on_saved=self._saved,
        )  # fmt: skip
        if config.tensorboard and self.ranks.first:
            self.reporter = TensorBoard(run / "tensorboard", self.reporter)
        self.model = model.to(self.device)
        objective = Objective(model, getattr(torch, config.dtype), self.ranks)
        self.objective = self._spread(objective)
        self.optimizer = build_optimizer(model, config)
        self.step, self.watch = 0, Watch(config.spike)
        self.carried: dict[int, LMState] = {}  # by the number of the forward pass within a step
        self.saved_step: int | None = None
        self.captured: CapturedPass | None = None  # made at the first step, from its batch
        self._wanted = config.graph
        self._coming: tuple[int, list[tuple[int, Batch]]] | None = (
            None  # the next step's batches, made while the GPU works
        )
        if resume_from is not None:
            self._restore(resume_from)

    def _spread(self, objective: Objective) -> nn.Module:
        """Recompute, compile, spread over ranks: in this order, so that each takes hold of the one before."""
        blocks: list[nn.Module] = list(getattr(self.model, "layers", ()))
        if self.config.recompute:
            for block in blocks:
                block.forward = functools.partial(
                    recompute, block.forward, use_reentrant=False, preserve_rng_state=False
                )
        if self.config.compile:
            self.model.compile_around_scan()  # pyright: ignore[reportCallIssue]
        return spread(objective, blocks, self.config.parallel, self.ranks, self.device)

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Train to the end, or until `should_stop()` is true between two steps; a checkpoint is saved either way.

        Raises NonFiniteError where steps are skipped one after another, CheckpointError if the disk takes no checkpoint,
        RankError if another rank ended; the checkpoints that were there are intact.
        """
        config, loss, validation, stopped = self.config, None, None, False
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = None
        if self.ranks.first:
            self.metrics = Metrics(self.folder / METRICS, after_step=self.step or -1)  # a new run keeps nothing
        self.objective.train()
        self.reporter.started(self.step, config.steps)
        try:
            with collective():
                if self.step == 0:
                    validation = self._validate()
                while self.step < config.steps:
                    stopped = self.ranks.agree(should_stop())
                    if stopped:
                        break
                    loss = self._take_step()
                    self.saver.poll()
                    if self._due(config.eval_every):
                        validation = self._validate()
                    if self._due(config.save_every):
                        self._save()
                self.saver.wait()
                if self.step and self.saved_step != self.step:
                    self._save()
                    self.saver.wait()
        finally:
            self.saver.close()
            if self.metrics is not None:
                self.metrics.close()
            self.reporter.finished(self.step)
        if self.ranks.first:
            self._draw()
        return Outcome(self.step, stopped, loss, validation)

    def replan(self, config: TrainConfig) -> None:
        """Go on to another end: `config` may differ in `steps`, `decay_fraction` and bookkeeping, as a plateau may fall
        sooner or later.

        Raises ValueError if the rate of a step that was taken would have been another one, or another field differs.
        """
        length = ("steps", "decay_fraction")
        old, new = ({k: v for k, v in c.trajectory().items() if k not in length} for c in (self.config, config))
        differing = [name for name in old if old[name] != new[name]]
        if differing:
            raise ValueError(
                f"a run that goes on to another end stays what it was, but {differing[0]} was {old[differing[0]]!r} and is "
                f"{new[differing[0]]!r}; change {', '.join(length)} alone."
            )
        for step in range(self.step):
            if configured_rate(config, step) != configured_rate(self.config, step):
                raise ValueError(
                    f"a run that goes on to another end keeps the rates that it has had, but step {step} had "
                    f"{configured_rate(self.config, step):g}, not {configured_rate(config, step):g}; let the fall begin at "
                    f"step {self.step} or later."
                )
        self.config = config

    def _take_step(self) -> float:
        began = time.perf_counter()
        rate = configured_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses, carried = self._gradients()
        limit = self.config.clip_norm or math.inf
        total = whole(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        if self.step + 1 < self.config.steps:
            self._coming = self.step + 1, self.data.passes(self.step + 1)
        mean = torch.zeros((), dtype=torch.float64)
        for loss in losses:  # the host waits here
            mean += loss.cpu().double() / len(losses)
        loss, norm = self.ranks.mean(mean).item(), total.item()
        skipped = self.watch.judge(loss, norm)
        if skipped is None:
            self.optimizer.step()
        if self.captured is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.captured.clear()
        self.step += 1
        self.carried = carried if skipped is None else {}  # a state of such a step may not be a number either
        self._report(loss, rate, norm, skipped, time.perf_counter() - began)
        return loss

    def _gradients(self) -> tuple[list[torch.Tensor], dict[int, LMState]]:
        """The losses of the step's passes on this rank, their mean's gradient left in the parameters; the rows' states."""
        losses, carried = [], {}
        ahead = self._coming
        passes = ahead[1] if ahead is not None and ahead[0] == self.step else self.data.passes(self.step)
        self._coming = None
        if self._wanted:
            self._capture(passes[0][1], len(passes))
        for i, (number, batch) in enumerate(passes):
            if self.captured is not None:
                losses.append(self.captured(batch))
                continue
            with gradients_summed(self.objective, i == len(passes) - 1):
                loss, state = self.objective(batch.to(self.device), self.carried.get(number))
                (loss / len(passes)).backward()
            losses.append(loss.detach())
            if state is not None:
                carried[number] = state
        return losses, carried

    def _capture(self, batch: Batch, passes: int) -> None:
        """Make the pass a CUDA graph, or say why it is none."""
        self._wanted = False
        why = captured.why_not(self.config, self.device, self.ranks)
        if why is None:
            try:
                self.captured = CapturedPass(self.objective, batch, passes, self.device)
            except NotCaptured as error:
                why = str(error)
        if why is not None:
            self.reporter.note(f"Steps are taken without a CUDA graph: {why}.")

    def _report(self, loss: float, rate: float, norm: float, skipped: str | None, seconds: float) -> None:
        report = StepReport(
            step=self.step, loss=loss, lr=rate, grad_norm=norm, tokens=self.config.batch_tokens, seconds=seconds,
            skipped=skipped, skips=self.watch.skipped,
        )  # fmt: skip
        if self.metrics is not None:
            self.metrics.step(report)
        self.reporter.stepped(report)
        if self.watch.in_a_row >= self.config.max_skipped:
            self.saver.wait()  # what it says of the last checkpoint is to be true
            kept = "no checkpoint was written yet" if self.saved_step is None else f"step {self.saved_step} is saved"
            many = (
                f"{self.watch.in_a_row} steps in a row were not taken"
                if self.watch.in_a_row > 1
                else "it was not taken"
            )
            raise NonFiniteError(
                f"a step must lead on, but at step {self.step} {skipped}; {many} and {kept}. Lower the learning rate "
                f"(now at most {self.config.lr:g}) or lengthen the warm-up, and restart."
            )

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _validate(self) -> Evaluation | None:
        batches = self.data.held_out()
        if batches is None:
            return None
        result = evaluate(self.objective, batches, device=self.device, sizes=self.token_sizes, ranks=self.ranks)
        if self.metrics is not None:
            self.metrics.evaluation(self.step, result)
        self.reporter.evaluated(self.step, result)
        return result

    def _save(self) -> None:
        tensors = optimizer_tensors(self.model, self.optimizer) | checkpoint.random_state()
        tensors |= {"watch": self.watch.tensor()} | pack_carried(self.carried)
        self.saver.save(self.step, self.model, tensors)

    def _saved(self, step: int, place: Path) -> None:
        self.saved_step = step
        self.reporter.saved(step, place)

    def _restore(self, place: Path) -> None:
        card = checkpoint.read_card(place)
        self.step = self.saved_step = card.step
        held = saver.stored_tensors(place)
        tensors = empty_optimizer_tensors(self.model) | checkpoint.random_state() | {"watch": self.watch.tensor()}
        # Where no step was taken yet there are no averages, and a run on a CPU left no generator of a GPU.
        tensors = {name: v for name, v in tensors.items() if name in held}
        carried = empty_carried(held, self.data.numbers())
        saver.restore(place, tensors | carried, self.ranks, self.model)
        self.carried = unpack_carried(carried, self.device)
        self.watch.restore(tensors.pop("watch"))
        restore_optimizer(self.model, self.optimizer, {k: v for k, v in tensors.items() if not k.startswith("random/")})
        checkpoint.restore_random_state(tensors)
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
