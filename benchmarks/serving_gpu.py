"""The engine on a GPU: `mamba3 bench serving-gpu` in a checkout. Tokens a second and latencies by concurrent streams, memory a
stream, the share of the memory roofline, a step of one sequence, and what the verification of guesses costs.

Weights and prompts are random, every choice greedy. All streams of a number arrive at once: the time of a first token is that
from there, reading everybody's prompt included; between tokens lies one step of all of them. The floor of a step is the time in
which its weights are read, and its states read and written, at the measured rate of a copy.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, results
from benchmarks.checks import AGREE, Check, agree, require
from benchmarks.timer import percentiles
from mamba3 import Mamba3LM
from mamba3.engine import Engine, EngineConfig, Request, SamplingParams
from mamba3.engine.verify_graphs import MOST_ROWS, VerifyGraphs
from mamba3.lm import preset
from mamba3.lm.config import Mamba3Config

Say = Callable[[str], None]
# What a Transformer of the same width and layers keeps of a token: keys and values of so many heads in 16 bits.
TRANSFORMER_HEADS = {"as many key heads as query heads": 32, "8 key heads": 8}
TRANSFORMER_HEADDIM = 64
TOKENS = (2_048, 32_768, 1_048_576)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The model, and how many of everything."""

    config: Mamba3Config
    vocabularies: tuple[int, ...]  # of a step of one sequence; the first is that of earlier measurements
    streams: tuple[int, ...] = (1, 8, 32, 128, 256, 512, 1024)
    states: tuple[str, ...] = ("float32", "float16")
    prompt: int = 128
    tokens: int = 32  # chosen by each stream while steps are timed
    guesses: tuple[int, ...] = (2, 4, 8)
    batches: tuple[int, ...] = (1, 8)  # of the verification
    rounds: int = 9


FULL = Sizes(config=preset("siso-1.5b"), vocabularies=(32_000, 128_256))
QUICK = Sizes(
    config=preset("siso-180m", vocab_size=300, d_model=64, layers=("mamba3",) * 2, d_intermediate=128), streams=(1, 3),
    vocabularies=(100, 300), states=("float32",), prompt=16, tokens=4, guesses=(2,), batches=(1,), rounds=3,
)  # fmt: skip


def _sync(model: Mamba3LM) -> float:
    if model.embedding.weight.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(model: Mamba3LM, run: Callable[[], object], rounds: int, repeats: int = 1) -> float:
    """Median time of one call, launches and waiting included, of `repeats` calls in a row."""
    run()
    taken = []
    for _ in range(rounds):
        began = _sync(model)
        for _ in range(repeats):
            run()
        taken.append((_sync(model) - began) / repeats)
    return statistics.median(taken)


def copy_rate(device: str, rounds: int) -> float:
    """Bytes a second that a copy reads and writes."""
    a = torch.empty(2**28 if device == "cuda" else 2**24, device=device)
    b = torch.empty_like(a)
    model = _Anything(a)
    return 2 * a.nbytes / seconds(model, lambda: b.copy_(a), rounds, 4)  # pyright: ignore[reportArgumentType]


class _Anything:
    """A tensor in the place of a model, for `seconds`."""

    def __init__(self, weight: torch.Tensor):
        self.embedding = torch.nn.Embedding.from_pretrained(weight[:1, None])


def weight_bytes(model: Mamba3LM) -> int:
    """What a step reads of the weights: everything but the embedding, of which it reads a row a token, but for a tied head."""
    total = sum(p.nbytes for p in model.parameters())
    return total if model.lm_head is None else total - model.embedding.weight.nbytes


def floor_seconds(model: Mamba3LM, streams: int, state_bytes: float, rate: float) -> float:
    return (weight_bytes(model) + 2 * streams * state_bytes) / rate


# -- sections


def memory(model: Mamba3LM) -> dict[str, Any]:
    """Bytes of a stream by tokens read: ours, counted from its tensors, and a Transformer's cache, computed."""
    state = model.init_state(1)
    layers, kept = len(model.layers), sum(layer.nbytes for layer in state.layers)
    found: dict[str, Any] = {"state_bytes": kept, "tokens": list(TOKENS)}
    for name, heads in TRANSFORMER_HEADS.items():
        token = 2 * layers * heads * TRANSFORMER_HEADDIM * 2
        found[name] = {"bytes_a_token": token, "bytes": [token * n for n in TOKENS], "equal_at_tokens": kept / token}
    return found


def one_sequence(model: Mamba3LM, sizes: Sizes, rate: float, say: Say) -> list[dict[str, Any]]:
    """A step of one sequence: the graph alone, and the engine's step with the choice of a token; what its kernels take."""
    found = []
    for vocabulary in sizes.vocabularies:
        built = with_vocabulary(model, vocabulary)
        engine = Engine(built, EngineConfig(rows=1, cache_bytes=0))
        fill(engine, 1, sizes.prompt, vocabulary)
        step, graphs = seconds(built, engine.step, sizes.rounds, 16), engine._runner.graphs
        floor = floor_seconds(built, 1, engine.pool.nbytes, rate)
        row: dict[str, Any] = {"vocabulary": vocabulary, "step_s": step, "floor_s": floor, "share": floor / step}
        if graphs is not None:
            row["graph_s"] = seconds(built, lambda g=graphs: g.step([1]), sizes.rounds, 16)
            row |= kernels(engine)
        say(f"one sequence, {vocabulary} tokens: {row}")
        found.append(row)
    return found


def with_vocabulary(model: Mamba3LM, vocabulary: int) -> Mamba3LM:
    """The same layers below another embedding."""
    if vocabulary == model.config.vocab_size:
        return model
    with torch.device("meta"):
        other = Mamba3LM(replace(model.config, vocab_size=vocabulary))
    other.layers, other.norm_f = model.layers, model.norm_f
    weight = model.embedding.weight
    rows = other.config.padded_vocab_size
    other.embedding = torch.nn.Embedding.from_pretrained(weight[:rows].clone())
    return other.eval()


def kernels(engine: Engine) -> dict[str, Any]:
    """Kernels of a step without a graph: how many, their time, and the longest ones' (calls, microseconds in all)."""
    tokens = torch.ones(1, dtype=torch.int64, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen, torch.no_grad():
        engine.model.step(tokens, engine.pool.view(1))
        torch.cuda.synchronize()
    events = [e for e in seen.key_averages() if e.self_device_time_total]
    events.sort(key=lambda e: -e.self_device_time_total)
    return {
        "kernels": sum(e.count for e in events),
        "kernels_us": sum(e.self_device_time_total for e in events),
        "longest_us": {e.key[:60]: [e.count, e.self_device_time_total] for e in events[:12]},
    }


def fill(engine: Engine, count: int, prompt: int, vocabulary: int) -> dict[str, Any]:
    """Let so many streams arrive at once, and step until each has said something: seconds to the first token."""
    for i in range(count):
        tokens = [(7 * i + 13 * j) % vocabulary for j in range(prompt)]
        engine.add(Request(id=str(i), tokens=tokens, params=SamplingParams(max_tokens=10**6)))
    began, first = time.perf_counter(), {}
    while len(first) < count:
        for output in engine.step():
            first.setdefault(output.request_id, time.perf_counter() - began)
    return percentiles(list(first.values()))


def streams(model: Mamba3LM, state: str, sizes: Sizes, rate: float, say: Say) -> Iterator[dict[str, Any]]:
    """Every number of streams in one engine; the rows so far after each."""
    most = max(sizes.streams)
    before = _allocated(model)
    engine = Engine(model, EngineConfig(
        rows=most, queue=most, cache_bytes=0, prompts=64, prefill_chunk=sizes.prompt, step_tokens=most + 64 * sizes.prompt,
        state_dtype=None if state == "float32" else state,
    ))  # fmt: skip
    held = (_allocated(model) - before or engine.pool.nbytes) / most
    began = time.perf_counter()
    list(engine.rehearse())
    rehearsed = time.perf_counter()
    captured = sum(1 for _ in engine.capture())
    found: dict[str, Any] = {
        "state": state, "bytes_a_stream": held, "rehearse_s": rehearsed - began, "graphs": captured,
        "capture_s": time.perf_counter() - rehearsed,
        "graphs_bytes": _allocated(model) - before - held * most, "why_no_graphs": engine.why_no_graphs, "rows": [],
    }  # fmt: skip
    for count in sizes.streams:
        first = fill(engine, count, sizes.prompt, model.config.vocab_size)
        walls = []
        for _ in range(sizes.tokens):
            start = time.perf_counter()
            assert len(engine.step()) == count
            walls.append(time.perf_counter() - start)
        step, floor = statistics.median(walls), floor_seconds(model, count, held, rate)
        row = {
            "streams": count, "tokens_per_s": count * len(walls) / sum(walls), "first_token_s": first,
            "between_tokens_s": percentiles(walls), "floor_s": floor, "share": floor / step,
        }  # fmt: skip
        if engine._runner.graphs is not None:
            graphs = engine._runner.graphs
            row["graph_s"] = seconds(model, lambda g=graphs, n=count: g.step([1] * n), 3, 4)
            row["graph_share"] = floor / row["graph_s"]
        say(f"{state} state, {count} streams: {row['tokens_per_s']:.0f} tokens/s, step {1e3 * step:.2f} ms, floor "
            f"{1e3 * floor:.2f}, graph {1e3 * row.get('graph_s', 0):.2f}, first token {first}")  # fmt: skip
        for i in range(count):
            engine.abort(str(i))
        found["rows"].append(row)
        yield found


def _allocated(model: Mamba3LM) -> int:
    return torch.cuda.memory_allocated() if model.embedding.weight.is_cuda else 0


@torch.no_grad()
def verification(model: Mamba3LM, sizes: Sizes, say: Say) -> list[dict[str, Any]]:
    """Reading a token and its guesses at once, and keeping all of them, against as many steps: what right guesses save at
    most. How many are right depends on weights and text, which random ones say nothing about."""
    found = []
    for batch in sizes.batches:
        engine = Engine(model, EngineConfig(rows=batch, cache_bytes=0))
        fill(engine, batch, sizes.prompt, model.config.vocab_size)
        step = seconds(model, engine.step, sizes.rounds, 4)
        for count in sizes.guesses:
            tokens = torch.ones(batch, count, dtype=torch.int64, device=model.embedding.weight.device)
            graphs = None
            if engine._runner.graphs is not None and batch <= MOST_ROWS:
                graphs = VerifyGraphs(model, engine.pool, count - 1)

            def read(tokens=tokens, engine=engine, graphs=graphs) -> None:
                if graphs is not None:
                    logits, accept = graphs.verify(tokens.tolist())
                else:
                    logits, draft = model.verify(tokens, engine.pool.view(len(tokens), room=tokens.shape[1]))
                    accept = draft.accept
                logits.argmax(-1).tolist()
                accept([tokens.shape[1]] * len(tokens))

            taken = seconds(model, read, sizes.rounds)
            found.append({
                "streams": batch, "tokens": count, "verify_s": taken, "steps_s": count * step,
                "most_gain": count * step / taken, "graphs": graphs is not None,
            })  # fmt: skip
            say(f"verification: {found[-1]}")
    return found


def check_rows(model: Mamba3LM) -> Check:
    """A step of one sequence, whose products are other kernels', against the same one among three."""
    device = model.embedding.weight.device
    ids = torch.arange(1, 1 + 3 * 20, device=device).view(3, 20)
    _, state = model.prefill(ids[:, :-1], last_only=True)
    alone, _ = model.step(ids[:1, -1], state.select([0]))
    return agree("a step alone is the step among three", alone, model.step(ids[:, -1], state)[0][:1], alone.dtype)


def check_tokens(model: Mamba3LM) -> Check:
    """The engine's tokens, in graphs where there are some, against the plain forward pass over them: how far, in standard
    deviations of the logits, a token that was chosen lies below the likeliest one."""
    prompts = [[(5 * i + 11 * j) % model.config.vocab_size for j in range(20 + i)] for i in range(3)]
    engine, said = Engine(model, EngineConfig(rows=3, cache_bytes=0)), {str(i): [] for i in range(3)}
    for i, prompt in enumerate(prompts):
        engine.add(Request(id=str(i), tokens=prompt, params=SamplingParams(max_tokens=8)))
    while engine.busy:
        for output in engine.step():
            said[output.request_id].append(output.token)
    device, worst = model.embedding.weight.device, 0.0
    for i, prompt in enumerate(prompts):
        logits = model(torch.tensor([prompt + said[str(i)]], device=device))[0, len(prompt) - 1 : -1].float()
        logits = logits[:, : model.config.vocab_size]
        chosen = logits.gather(1, torch.tensor(said[str(i)], device=device)[:, None])
        worst = max(worst, float(((logits.amax(1, keepdim=True) - chosen) / logits.std()).max()))
    return Check("the engine chooses the likeliest tokens", worst, 3 * AGREE[model.embedding.weight.dtype])


@torch.no_grad()
def run(folder: Path, *, quick: bool, device: str, say: Say, sizes: Sizes | None = None) -> Path:
    """Every section, written to <date>-<device>-serving-gpu.json and .png in `folder` as it is finished.

    Raises ValueError where there is no such device, and Refused where the engine's tokens are not the plain loop's.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "this benchmark needs a CUDA device, and torch finds none here; --device cpu --quick tries it out."
        )
    sizes = sizes or (QUICK if quick else FULL)
    torch.manual_seed(0)
    where, found = environment.describe(device), {}

    def note(name: str, value: Any) -> None:
        found[name] = value
        write(found, where, quick, folder)

    rate = copy_rate(device, sizes.rounds)
    note("copy_bytes_per_s", rate)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = Mamba3LM(sizes.config, device=device, dtype=dtype).eval().requires_grad_(False)
    say(f"{where['device']}, commit {where['commit']}, copy rate {rate / 1e12:.3f} TB/s")
    tested = [check_rows(model), check_tokens(model)]
    note("checks", [{"law": c.law, "error": c.error, "bound": c.bound} for c in tested])
    require(tested)
    note("weight_bytes", weight_bytes(model))
    for name, section in sections(model, sizes, rate, say).items():
        for value in section():
            note(name, value)
        if device == "cuda":
            torch.cuda.empty_cache()
    return write(found, where, quick, folder)


def sections(model: Mamba3LM, sizes: Sizes, rate: float, say: Say) -> dict[str, Callable[[], Iterable[Any]]]:
    """What is measured, by name, what matters most first; each yields what it has found so far."""
    first, *others = sizes.states
    return {
        "memory": lambda: [memory(model)],
        "one sequence": lambda: [one_sequence(model, sizes, rate, say)],
        f"streams, {first} state": lambda: streams(model, first, sizes, rate, say),
        "verification": lambda: [verification(model, sizes, say)],
        **{f"streams, {state} state": lambda s=state: streams(model, s, sizes, rate, say) for state in others},
    }


def write(found: dict[str, Any], where: dict[str, Any], quick: bool, folder: Path) -> Path:
    return results.write("serving-gpu", where, quick, found, draw, folder)


def draw(found: dict[str, Any], path: Path) -> None:
    """Tokens a second and the time between tokens, over streams; nothing where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    series = {name.removeprefix("streams, "): v["rows"] for name, v in found.items() if name.startswith("streams")}
    if not series:
        return
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, rows in series.items():
        counts = [row["streams"] for row in rows]
        left.plot(counts, [row["tokens_per_s"] for row in rows], marker="o", label=name)
        left.plot(counts, [row["streams"] / row["floor_s"] for row in rows], ls=":", c=left.lines[-1].get_color())
        for at, style in (("p50", "-"), ("p99", "--")):
            line = [1e3 * row["between_tokens_s"][at] for row in rows]
            right.plot(counts, line, ls=style, c=left.lines[-1].get_color(), label=f"{name}, {at}")
    left.set(xscale="log", yscale="log", xlabel="streams", ylabel="tokens/s", title="dotted: memory roofline")
    right.set(xscale="log", yscale="log", xlabel="streams", ylabel="ms between tokens")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)
