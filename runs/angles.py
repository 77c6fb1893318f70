"""What angles a model of a task learned: how far each token turns the state, for every layer, head and pair of channels.

    python runs/angles.py --task parity --out angles.png                          # the parity model that comes with the package
    python runs/angles.py --task arithmetic --model RUN/best-mamba3 --out angles.png

One panel a layer; a row a token, a column a pair of channels; the signs of arithmetic without brackets by what the product
before them is worth. Colour is the circular mean of the turn over 64 sequences, in units of pi; where tokens of a kind do not
turn alike (deeper layers see the context), it fades to grey.
"""

import argparse
import math
from pathlib import Path

import torch

from mamba3.lm import Mamba3LM
from mamba3.tasks import ModularArithmetic, Task, make_task
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


def kinds_of(task: Task, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[int, str]]:
    """The kind of each token [b, t], and the kinds' names: the token, and of a sign what was multiplied before it, mod 5."""
    kinds, names = tokens.clone(), dict(enumerate(task.symbols))
    if task.name == ModularArithmetic.name:
        signs = [task.symbols.index(sign) for sign in "+-"]
        names |= {task.vocab_size + value: f"± after {value}" for value in range(5)}
        for sequence, found in zip(tokens.tolist(), kinds, strict=True):
            product = 1
            for place, token in enumerate(sequence):
                if token in signs:
                    found[place], product = task.vocab_size + product % 5, 1
                elif task.symbols[token].isdigit():
                    product *= int(task.symbols[token])
    return kinds, {kind: name for kind, name in names.items() if (kinds == kind).any()}


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
    kinds, names = kinds_of(task, inside)
    found = turns_by_token(model, inside, kinds)
    draw(found, names, options.title or options.task, options.out)
    for layer, (mean, agreement) in found.items():
        for v, name in names.items():
            flat = int((agreement[v] * (mean[v] / 2).sin().abs()).argmax())
            head, pair = divmod(flat, mean.shape[2])
            print(  # noqa: T201 (a script's output)
                f"layer {layer + 1}, {name}: farthest turn {math.degrees(mean[v, head, pair]):+.2f}° "
                f"(head {head + 1}, pair {pair + 1}), agreement {agreement[v, head, pair]:.3f}"
            )


if __name__ == "__main__":
    main()
