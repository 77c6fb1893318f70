"""What a run tells while it goes: a reporter to listen with, and metrics.jsonl to read afterwards."""

import json
from dataclasses import dataclass
from pathlib import Path

from mamba3.ops.state_file import replace_file
from mamba3.train.evaluate import Evaluation

METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimizer step. `step` counts from 1; `seconds` is the step's own wall time.

    skipped: why the parameters were left as they were, None for a step that was taken; skips: how many so far.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    skipped: str | None = None
    skips: int = 0


class Reporter:
    """Hears of a run's events; does nothing with them. Override what you want to know."""

    def note(self, message: str) -> None:
        """A sentence for the user."""

    def tokenising(self, done: int, total: int) -> None:
        """Bytes of the corpus that are tokenised."""

    def started(self, step: int, steps: int) -> None:
        """Training begins after `step` of `steps`."""

    def stepped(self, report: StepReport) -> None: ...

    def evaluated(self, step: int, evaluation: Evaluation) -> None: ...

    def saved(self, step: int, place: Path) -> None: ...

    def finished(self, step: int) -> None:
        """Training ended, was stopped or failed after `step`."""


class TensorBoard(Reporter):
    """Writes a run's figures as TensorBoard reads them and hands every event on to another reporter.

    Figures beyond the step that a run resumes from are dropped. Raises ValueError where tensorboard is not installed.
    """

    def __init__(self, folder: Path, then: Reporter):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("tensorboard = true needs the library: pip install 'mamba3[train]'.") from error
        self._make, self._then = lambda step: SummaryWriter(str(folder), purge_step=step + 1), then

    def note(self, message: str) -> None:
        self._then.note(message)

    def started(self, step: int, steps: int) -> None:
        self._writer = self._make(step)
        self._then.started(step, steps)

    def stepped(self, report: StepReport) -> None:
        figures = {"loss": report.loss, "lr": report.lr, "gradient norm": report.grad_norm, "skips": report.skips}
        figures["tokens per second"] = report.tokens / report.seconds
        for name, value in figures.items():
            self._writer.add_scalar(f"train/{name}", value, report.step)
        self._then.stepped(report)

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        self._writer.add_scalar("val/loss", evaluation.loss, step)
        self._writer.add_scalar("val/perplexity", evaluation.perplexity, step)
        self._then.evaluated(step, evaluation)

    def saved(self, step: int, place: Path) -> None:
        self._then.saved(step, place)

    def finished(self, step: int) -> None:
        self._writer.close()
        self._then.finished(step)


class Metrics:
    """metrics.jsonl: one line for each step and each validation, written as it happens.

    A run that resumes after step k drops the lines beyond k first: what is read is the history of one run. The first
    validation is of step 0, so `after_step` = -1 drops all.
    """

    def __init__(self, path: Path, *, after_step: int):
        lines = [line for line in read_metrics(path) if line["step"] <= after_step]
        replace_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        self._path, self._file = path, path.open("ab", buffering=0)

    def step(self, report: StepReport) -> None:
        self._write({"kind": "step", **vars(report)})

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        values = {"loss": evaluation.loss, "perplexity": evaluation.perplexity, "tokens": evaluation.tokens}
        self._write({"kind": "val", "step": step, **values, "bits_per_byte": evaluation.bits_per_byte})

    def close(self) -> None:
        self._file.close()

    def _write(self, values: dict) -> None:
        left = json.dumps(values).encode() + b"\n"
        try:
            while left:  # unbuffered: what fits is written, and the rest raises
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self._path} could not be written at step {values['step']} ({error.strerror}); the checkpoints are "
                "intact: free some space and run the same command again",
            ) from error


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
