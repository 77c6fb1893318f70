"""What angles a model of a task learned: how far each token turns the state, for every layer, head and pair of channels.

    python runs/angles.py --task parity --out angles.png                          # the parity model that comes with the package
    python runs/angles.py --task arithmetic --model RUN/best-mamba3 --out angles.png

One panel a layer; a row a token, a column a pair of channels. Colour is the circular mean of the turn over 64 sequences, in
units of pi; where tokens of a kind do not turn alike (deeper layers see the context), it fades to grey.
"""

import argparse
import math
from pathlib import Path

import torch

from mamba3.lm import Mamba3LM
from mamba3.tasks import make_task
from mamba3.tasks.phase import shipped_parity, turns_by_token

SEQUENCES, LENGTH = 64, 80


def draw(found: dict[int, tuple[torch.Tensor, torch.Tensor]], names: dict[int, str], title: str, out: Path) -> None:
    """The figure; names: of the tokens that are drawn."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    tokens, wheel = list(names), colormaps["twilight_shifted"]
    figure = Figure(figsize=(9, 1 + len(found) * (0.6 + 0.28 * len(tokens))), layout="constrained")
    panels = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    for axes, (layer, (mean, agreement)) in zip(panels, found.items(), strict=True):
        angle, alike = mean[tokens].flatten(1), agreement[tokens].flatten(1)
        colour = torch.from_numpy(wheel((angle / (2 * math.pi) + 0.5).numpy())[..., :3])
        faded = alike.unsqueeze(-1) * colour + (1 - alike.unsqueeze(-1)) * 0.85
        axes.imshow(faded.numpy(), aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(tokens)), names.values())
        axes.set_title(f"layer {layer + 1}: {mean.shape[1]} heads of {mean.shape[2]} pairs", fontsize=9)
        for head in range(1, mean.shape[1]):
            axes.axvline(head * mean.shape[2] - 0.5, color="white", linewidth=2)
    figure.colorbar(ScalarMappable(Normalize(-1, 1), wheel), ax=list(panels), label="turn / π")
    figure.suptitle(title)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="parity", choices=("parity", "arithmetic", "arithmetic-brackets"))
    parser.add_argument("--model", type=Path, help="folder of a trained model (default: the parity model shipped)")
    parser.add_argument("--out", type=Path, default=Path("angles.png"))
    parser.add_argument("--title", default="")
    options = parser.parse_args()
    task = make_task(options.task)
    if options.model is None and options.task != "parity":
        raise SystemExit("--model must name a trained model: only parity's comes with the package.")
    model = shipped_parity() if options.model is None else Mamba3LM.from_pretrained(options.model).eval()
    batch = task.sample(SEQUENCES, LENGTH, LENGTH, torch.Generator().manual_seed(0))
    inside = batch.inputs[:, : int(batch.positions.min()) + 1]
    found = turns_by_token(model, inside)
    here = [v for v in range(task.vocab_size) if (inside == v).any()]
    draw(found, {v: task.symbols[v] for v in here}, options.title or options.task, options.out)
    for layer, (mean, agreement) in found.items():
        for v in here:
            flat = int((agreement[v] * (mean[v] / 2).sin().abs()).argmax())
            head, pair = divmod(flat, mean.shape[2])
            print(  # noqa: T201 (a script's output)
                f"layer {layer + 1}, {task.symbols[v]}: farthest turn {math.degrees(mean[v, head, pair]):+.2f}° "
                f"(head {head + 1}, pair {pair + 1}), agreement {agreement[v, head, pair]:.3f}"
            )


if __name__ == "__main__":
    main()
