"""What a training run looks like in a terminal: one bar, a line for each validation."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mamba3.train.evaluate import Evaluation
from mamba3.train.report import Reporter, StepReport

_SMOOTHING = 0.95


class ProgressReporter(Reporter):
    """Shows loss, tokens per second and the time left; prints validations above the bar."""

    def __init__(self, console: Console):
        self.console = console
        self.validations: list[Evaluation] = []
        self.tokens, self.seconds = 0, 0.0
        self._loss: float | None = None
        self._bar: Progress | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of the optimizer steps that this process took, validation and checkpoints not counted."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def note(self, message: str) -> None:
        self.console.print(f"[dim]{escape(message)}[/]", soft_wrap=True)

    def tokenising(self, done: int, total: int) -> None:
        if not self.console.is_terminal:
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("tokenising"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), console=self.console,
                transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("", total=total)
        self._bar.update(self._task, completed=done)
        if done >= total:
            self.finished(0)

    def started(self, step: int, steps: int) -> None:
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task("", total=steps, completed=step, figures="")
        self._bar.start()

    def stepped(self, report: StepReport) -> None:
        self.tokens += report.tokens
        self.seconds += report.seconds
        before = report.loss if self._loss is None else self._loss
        if report.skipped:
            report = replace(report, loss=before)
        self._loss = _SMOOTHING * before + (1 - _SMOOTHING) * report.loss
        figures = f"loss {self._loss:.3f}  {self.tokens_per_second:,.0f} tokens/s"
        if report.skips:
            figures += f"  {report.skips} skipped"
        if report.skipped:
            self.console.print(f"step {report.step:>6,}  not taken: {report.skipped}", soft_wrap=True)
        assert self._bar is not None
        self._bar.update(self._task, completed=report.step, figures=figures)

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        self.validations.append(evaluation)
        line = f"step {step:>6,}  validation loss {evaluation.loss:.4f}  perplexity {evaluation.perplexity:,.2f}"
        if evaluation.bits_per_byte is not None:
            line += f"  {evaluation.bits_per_byte:.3f} bits per byte"
        self.console.print(line)

    def saved(self, step: int, place: Path) -> None:
        self.console.print(f"[dim]step {step:>6,}  saved {place}[/]", soft_wrap=True)

    def finished(self, step: int) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
