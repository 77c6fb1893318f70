"""The loss curve as a PNG. matplotlib is optional and imported when a curve is drawn."""

import importlib.util
from pathlib import Path

from mamba3.train.report import read_metrics


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot_loss(metrics: Path, image: Path) -> None:
    """Training loss of every step and validation loss, in nats per token, from a metrics.jsonl."""
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    steps = [line for line in lines if line["kind"] == "step"]
    validations = [line for line in lines if line["kind"] == "val"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], lw=0.8, alpha=0.7, label="training")
    if validations:
        axes.plot([v["step"] for v in validations], [v["loss"] for v in validations], "o-", ms=3, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    axes.grid(alpha=0.3)
    if steps or validations:
        axes.legend()
    figure.savefig(image, dpi=120)
