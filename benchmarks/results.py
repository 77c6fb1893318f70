"""What a run leaves behind: its sections, a JSON file, a plot; and the bar that shows where it is."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.checks import Refused

FOLDER = Path(__file__).parent / "results"

Tell = Callable[[str], None]
Section = Callable[[Tell], Any]
Draw = Callable[[dict[str, Any], Path], None]


def run_sections(sections: Mapping[str, Section], tell: Tell, done: Callable[[], None]) -> dict[str, Any]:
    """Each section's result by name; {"refused": why} where its checks failed. The others run all the same."""
    results: dict[str, Any] = {}
    for name, section in sections.items():
        tell(name)
        try:
            results[name] = section(tell)
        except Refused as refusal:
            results[name] = {"refused": str(refusal)}
        gc.collect()
        done()
    return results


def refusals(results: Mapping[str, Any]) -> dict[str, str]:
    """Why sections were refused, by name."""
    return {
        name: result["refused"] for name, result in results.items() if isinstance(result, dict) and "refused" in result
    }


def write(
    subject: str,
    where: dict[str, Any],
    quick: bool,
    results: dict[str, Any],
    draw: Draw,
    folder: Path = FOLDER,
) -> Path:
    """Write <date>-<device>-<subject>.json and the plot beside it; quick runs carry "-quick" in their names."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{where['date'][:10]}-{environment.slug(where)}-{subject}{'-quick' if quick else ''}"
    path = folder / f"{name}.json"
    document = {"subject": subject, "quick": quick, "environment": where, "results": results}
    path.write_text(json.dumps(_rounded(document), indent=1) + "\n")
    draw(results, path.with_suffix(".png"))
    return path


def _rounded(value: Any) -> Any:
    """Numbers to six significant digits, which is more than any measurement here has."""
    if isinstance(value, Mapping):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
