"""A trained parity model made exact: what its turning head does on a one and on a zero is set to what training came near to.

    python runs/exact.py --model RUN/parity.allturn.d64/best-mamba3-allturn --out exact

On a one the state turns by π (theta saturated, dt = 1), its decay is the least that the layer allows, and lambda = 1: what was
added to the state by one token does not depend on the token before. A zero does nothing (dt = 0). Each is one or more rows of
in_proj, changed by the least that gives the two tokens these values; all else stays as it was trained. Channels that do not
turn count the ones instead; the part "rest" (not among the default ones) takes them out.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from mamba3.lm import Mamba3LM
from mamba3.nn import Mamba3
from mamba3.tasks import make_task
from mamba3.tasks.fit import seeded_generator

PARTS = ("turn", "zero", "decay", "lambda")
SATURATED, NOTHING, EVERYTHING = 6.0, -14.0, 16.0  # tanh is 1 - 1e-5, softplus 1e-6, sigmoid 1 - 1e-7
TOKENS_AT_ONCE = 2**16


def two_tokens(model: Mamba3LM) -> Tensor:
    """What the first layer reads of a zero and of a one, [2, d]."""
    return model.layers[0].norm(model.embedding.weight[1:3])  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def turning_head(mixer: Mamba3, tokens: Tensor) -> int:
    """The head that turns farthest on a one."""
    inputs = mixer._inputs(mixer._project(tokens[1:].unsqueeze(0)))
    return int((inputs.dt[0, 0] * inputs.theta[0, 0].abs().mean()).argmax())


@torch.no_grad()
def set_rows(weight: Tensor, first: int, targets: Tensor, tokens: Tensor) -> None:
    """The least change of rows first, first + 1, ... of `weight` that makes them give `targets` [rows, 2] on the tokens."""
    rows, tokens = weight[first : first + len(targets)], tokens.double()
    missing = targets.double() - rows.double() @ tokens.T
    rows += (torch.linalg.solve(tokens @ tokens.T, missing.T).T @ tokens).to(rows.dtype)


@torch.no_grad()
def make_exact(model: Mamba3LM, parts: tuple[str, ...] = PARTS) -> int:
    """Change a model of one layer in place; the head that was changed."""
    mixer, tokens = model.layers[0].mixer, two_tokens(model)
    head, sizes = turning_head(mixer, tokens), mixer.splits._asdict()
    start = {name: sum(list(sizes.values())[:i]) for i, name in enumerate(sizes)}
    weight, bias = mixer.in_proj.weight, float(mixer.dt_bias[head])
    raw = (weight.double() @ tokens.double().T)[start["dt"] :]
    now = {name: raw[start[name] - start["dt"] :] for name in ("dt", "A", "lam", "theta")}
    zero, one = now["dt"][head].tolist()
    if "turn" in parts:
        theta = now["theta"][: mixer.pairs]
        set_rows(weight, start["theta"], torch.stack([theta[:, 0], SATURATED * theta[:, 1].sign()], dim=1), tokens)
        one = math.log(math.expm1(1 / math.tanh(SATURATED))) - bias
    if "zero" in parts:
        zero = NOTHING - bias
    set_rows(weight, start["dt"] + head, torch.tensor([[zero, one]]), tokens)
    if "decay" in parts:
        set_rows(weight, start["A"] + head, torch.full((1, 2), NOTHING), tokens)
    if "rest" in parts:
        mixer.B_norm.weight[2 * mixer.pairs :] = 0
        mixer.B_bias[..., 2 * mixer.pairs :] = 0
    if "lambda" in parts:
        set_rows(weight, start["lam"] + head, torch.tensor([[float(now["lam"][head, 0]), EVERYTHING]]), tokens)
    return head


@torch.no_grad()
def scaled_accuracy(model: Mamba3LM, shortest: int, longest: int, sequences: int) -> float:
    """In %, on the sequences of `mamba3.tasks.fit.evaluate`."""
    task = make_task("parity")
    batch = task.sample(sequences, shortest, longest, seeded_generator(task.name, "evaluation", shortest, longest))
    step, right = max(1, TOKENS_AT_ONCE // longest), 0
    for start in range(0, sequences, step):
        part = batch.rows(start, start + step)
        hidden = model.hidden(part.inputs)
        asked = hidden.gather(1, part.positions.unsqueeze(2).expand(-1, -1, hidden.shape[2]))[:, 0]
        right += int((model.head(asked)[:, : task.vocab_size].argmax(-1) == part.answers[:, 0]).sum())
    return 100 * task.scaled_accuracy(right / sequences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("exact"))
    parser.add_argument("--parts", nargs="*", choices=(*PARTS, "rest"), default=PARTS)
    parser.add_argument("--lengths", nargs="*", type=int, default=(256, 512, 1024, 2048, 4096))
    parser.add_argument("--sequences", type=int, default=1024)
    options = parser.parse_args()
    model = Mamba3LM.from_pretrained(options.model).eval()
    if len(model.config.layers) != 1 or model.config.layers[0] != "mamba3":
        raise SystemExit(f"--model must have one Mamba-3 layer; {options.model} has {', '.join(model.config.layers)}.")
    if options.parts:
        sys.stdout.write(f"head {make_exact(model, tuple(options.parts)) + 1}: {', '.join(options.parts)}\n")
    model.save_pretrained(options.out)
    for length in options.lengths:
        score = scaled_accuracy(model, length, length, options.sequences)
        sys.stdout.write(f"{length:,} tokens: {score:.1f} of {options.sequences:,} sequences\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
