"""python -m benchmarks.onnx_int8: what dynamic int8 costs an exported model and what it gives: size, speed, perplexity.

A byte-level model is trained on Python's own source until it predicts something, so that its perplexity on files it has
not seen means something; step and prefill are timed against PyTorch's, contestants interleaved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import environment, results
from mamba3 import Mamba3Config, Mamba3LM
from mamba3.export import OnnxLM, export_onnx, quantize_onnx

LENGTH, PREFILL = 256, 64
SETTLING, TIMED = 10, 20  # calls of a block: not timed, timed


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on and bytes to measure on, of different files."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = [b"".join(f.read_bytes() for f in files[i::2]) for i in range(2)]
    return torch.tensor(list(text[0])), torch.tensor(list(text[1]))


def trained(steps: int, data: torch.Tensor) -> Mamba3LM:
    """The model after `steps` steps on windows drawn from `data`."""
    torch.manual_seed(0)
    config = Mamba3Config(
        vocab_size=256, d_model=256, layers=("mamba3",) * 4, d_intermediate=512, d_state=64, headdim=64, mimo_rank=2
    )
    model = Mamba3LM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        at = torch.randint(0, len(data) - LENGTH - 1, (8,))
        window = torch.stack([data[i : i + LENGTH + 1] for i in at.tolist()])
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def perplexity(step: Callable[[np.ndarray, Any], tuple[np.ndarray, Any]], state: Any, windows: torch.Tensor) -> float:
    """exp of the mean loss over windows [b, t + 1], a token at a time."""
    losses = []
    for t in range(windows.shape[1] - 1):
        logits, state = step(windows[:, t].numpy(), state)
        losses.append(F.cross_entropy(torch.from_numpy(logits), windows[:, t + 1]).item())
    return float(np.exp(np.mean(losses)))


def timed(contestants: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each: the median and the quartiles. They take turns in blocks of calls.

    The first calls of a block are left out: onnxruntime's threads spin for a while after a call and would slow whoever is next.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(-(-repeats // TIMED)):
        for name, f in contestants.items():
            for i in range(SETTLING + TIMED):
                start = time.perf_counter()
                f()
                if i >= SETTLING:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: dict(zip(("low", "median", "high"), statistics.quantiles(v, n=4), strict=True))
        for name, v in times.items()
    }


def measure(steps: int, windows: int, repeats: int) -> dict[str, Any]:
    """Everything, as one JSON object."""
    seen, unseen = corpus()
    lm = trained(steps, seen)
    at = torch.linspace(0, len(unseen) - LENGTH - 2, windows).long().tolist()
    text = torch.stack([unseen[i : i + LENGTH + 1] for i in at])
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        export_onnx(lm, f"{folder}/float", prefill_tokens=PREFILL)
        quantize_onnx(f"{folder}/float", f"{folder}/int8")
        threads = torch.get_num_threads()
        models = {name: OnnxLM(f"{folder}/{name}", threads=threads) for name in ("float", "int8")}
        size = {name: (Path(folder) / name / "step.onnx").stat().st_size for name in models}

        def torch_step(token: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
            logits, state = lm.step(torch.from_numpy(token), state)
            return logits.numpy(), state

        ppl = {"torch": perplexity(torch_step, lm.init_state(windows), text)}
        ppl |= {f"onnx {name}": perplexity(m.step, m.init_state(windows), text) for name, m in models.items()}
        one, prompt = np.array([65]), text[:1, :PREFILL].numpy()
        state = lm.init_state(1)
        step: dict[str, Callable[[], object]] = {"torch": lambda: lm.step(torch.from_numpy(one), state)}
        prefill: dict[str, Callable[[], object]] = {
            "torch": lambda: lm.prefill(torch.from_numpy(prompt), last_only=True)
        }
        for name, model in models.items():
            first = model.init_state(1)
            step[f"onnx {name}"] = lambda m=model, s=first: m.step(one, s)
            prefill[f"onnx {name}"] = lambda m=model: m.prefill(prompt)
        return {
            "where": environment.describe(), "parameters": lm.num_parameters(), "training steps": steps,
            "perplexity of bytes": ppl, "tokens": text[:, 1:].numel(), "bytes of step.onnx": size,
            "ms of a step, batch 1": timed(step, repeats), f"ms of a prefill of {PREFILL}": timed(prefill, repeats),
        }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="does everything run? Not to be quoted.")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = measure(*((3, 2, 3) if arguments.quick else (400, 16, 300)))
    text = json.dumps(found, indent=2)
    if not arguments.quick:
        (results.FOLDER / f"{time.strftime('%Y-%m-%d')}-onnx-int8.json").write_text(text + "\n")
    print(text)  # noqa: T201 (a script)
