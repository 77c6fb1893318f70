"""What a run leaves behind: its sections, a JSON file, a plot; and the bar that shows where it is."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.checks import Refused
from mamba3.ops.state_file import replace_file

FOLDER = Path(__file__).parent / "results"

Tell = Callable[[str], None]
Section = Callable[[Tell], Any]
Draw = Callable[[dict[str, Any], Path], None]


def run_sections(
    sections: Mapping[str, Section],
    tell: Tell,
    done: Callable[[], None],
    keep: Callable[[dict[str, Any]], object] = lambda results: None,
    earlier: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Each section's result by name; {"refused": why} where its checks failed. The others run all the same.

    keep: gets all results so far after each section. earlier: results that are there already; those sections are not run.
    """
    results: dict[str, Any] = dict(earlier or {})
    for name, section in sections.items():
        if name not in results:
            tell(name)
            try:
                results[name] = section(tell)
            except Refused as refusal:
                results[name] = {"refused": str(refusal)}
            gc.collect()
            keep(results)
        done()
    return results


def refusals(results: Mapping[str, Any]) -> dict[str, str]:
    """Why sections were refused, by name."""
    return {
        name: result["refused"] for name, result in results.items() if isinstance(result, dict) and "refused" in result
    }


def path_of(subject: str, where: dict[str, Any], quick: bool, folder: Path = FOLDER) -> Path:
    """<date>-<device>-<subject>.json; quick runs carry "-quick" in their names."""
    name = f"{where['date'][:10]}-{environment.slug(where)}-{subject}{'-quick' if quick else ''}"
    return folder / f"{name}.json"


def write(
    subject: str,
    where: dict[str, Any],
    quick: bool,
    results: dict[str, Any],
    draw: Draw | None,
    folder: Path = FOLDER,
) -> Path:
    """Write <date>-<device>-<subject>.json, whole or not at all, and the plot beside it, if any; quick runs carry "-quick"."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(subject, where, quick, folder)
    document = {"subject": subject, "quick": quick, "environment": where, "results": results}
    replace_file(path, (json.dumps(_rounded(document), indent=1) + "\n").encode())
    if draw is not None:
        draw(results, path.with_suffix(".png"))
    return path


def read_earlier(path: Path, where: dict[str, Any]) -> dict[str, Any]:
    """The results in a file that were not refused; none if there is no file. ValueError if other code was measured."""
    if not path.exists():
        return {}
    document = json.loads(path.read_text())
    known, now = document["environment"]["commit"], where["commit"]
    if known != now:
        raise ValueError(
            f"{path.name} was measured at commit {known}, this is {now}; measure it anew, without --resume."
        )
    refused = refusals(document["results"])
    return {name: result for name, result in document["results"].items() if name not in refused}


def _rounded(value: Any) -> Any:
    """Numbers to six significant digits, which is more than any measurement here has."""
    if isinstance(value, Mapping):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
