"""The PNG beside each results file: one figure a subject, one panel a section that was not refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Panel = tuple[str, Callable[[Axes], None]]


def draw_cpu(results: dict[str, Any], path: Path) -> None:
    """Ratios and tokens/s with the range of the rounds, memory by tokens, and time by position."""
    constancy, loop, cost, memory, peer = results.values()
    panels: list[Panel] = []
    if "refused" not in loop:
        panels.append(("token loop / prefill", lambda axes: _ratios(axes, loop)))
    if "refused" not in cost:
        panels.append(("(forward + backward) / forward", lambda axes: _costs(axes, cost)))
    if "refused" not in memory:
        panels.append(("memory of the gradient", lambda axes: _memory(axes, memory)))
    if "refused" not in peer:
        for verb in ("prefill", "decode"):
            panels.append((f"{verb}, tokens/s", lambda axes, verb=verb: _speeds(axes, peer, verb)))
    if "refused" not in constancy:
        panels.append(("milliseconds of one more token", lambda axes: _constancy(axes, constancy)))
    _figure(panels, path)


def draw_numerics(results: dict[str, Any], path: Path) -> None:
    """Error of y and of phi by position, and errors by dtype."""
    million, dtypes = results.values()
    panels: list[Panel] = []
    if "refused" not in million:
        panels.append(("error of y by position", lambda axes: _positions(axes, million, "y", "relative error")))
        panels.append(("error of phi by position", lambda axes: _positions(axes, million, "phi_rad", "radians")))
    if "refused" not in dtypes:
        panels.append(("error by dtype", lambda axes: _dtypes(axes, dtypes)))
    _figure(panels, path)


def draw_kernels(results: dict[str, Any], path: Path) -> None:
    """How many times ours each contestant's time is, with the quarter points of the rounds: a panel a rank and pass, and
    one for the decode steps of each rank."""
    panels: list[Panel] = []
    rows = {name: results.get(name, []) for name in ("forward", "backward")}
    colors = {name: f"C{i}" for i, name in enumerate(_rivals([*rows["forward"], *rows["backward"]]))}
    for name, title in (("forward", "forward"), ("backward", "forward + backward")):
        for rank in sorted({row["rank"] for row in rows[name]}):
            mine = [row for row in rows[name] if row["rank"] == rank and OURS in row["times"]]
            panels.append((f"{title}, R = {rank}: times ours", lambda axes, mine=mine: _race(axes, mine, colors)))
    for rank in sorted({row["rank"] for row in results.get("decode", [])}):
        mine = [row for row in results["decode"] if row["rank"] == rank]
        panels.append((f"decode step of a layer, R = {rank}, ms", lambda axes, mine=mine: _steps(axes, mine)))
    _figure(panels, path)


OURS = "triton"


def _rivals(rows: list[dict[str, Any]]) -> list[str]:
    """Names in the order in which they come; the PyTorch path, ten to thirty times slower, is left to the tables."""
    return [name for name in dict.fromkeys(n for row in rows for n in row["times"]) if name not in (OURS, "chunked")]


def _race(axes: Axes, rows: list[dict[str, Any]], colors: dict[str, str]) -> None:
    """A group of bars a shape, from the line at 1, which is ours; below each shape what ours takes."""
    names = _rivals(rows)
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        mine = [(at, row["times"][name]["ratio"]) for at, row in enumerate(rows) if name in row["times"]]
        middle = [v["median"] for _, v in mine]
        reach = [[v["median"] - v["low"] for _, v in mine], [v["high"] - v["median"] for _, v in mine]]
        places = [at + (i - (len(names) - 1) / 2) * width for at, _ in mine]
        axes.bar(
            places, [m - 1 for m in middle], width, bottom=1, yerr=reach, color=colors[name], label=name, alpha=0.9
        )
    axes.axhline(1, color="black", label="ours")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g} ×")
    axes.yaxis.set_minor_formatter("{x:g} ×")
    axes.tick_params(axis="y", which="both", labelsize=8)
    shapes = [f"({row['batch']}, {row['tokens']:,})\n{row['times'][OURS]['ms']['median']:.3g} ms" for row in rows]
    axes.set_xticks(range(len(rows)), shapes)
    axes.legend(fontsize=8)


def _steps(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """One color a dtype of the state; the floor dotted."""
    for i, state in enumerate(dict.fromkeys(row["state"] for row in rows)):
        mine = [row for row in rows if row["state"] == state]
        batch = [row["batch"] for row in mine]
        axes.loglog(batch, [row["times_ms"]["layer"]["median"] for row in mine], "o-", color=f"C{i}", label=state)
        axes.loglog(batch, [row["floors_ms"]["layer"] for row in mine], ":", color=f"C{i}")
    axes.set(xlabel="batch")
    axes.legend()


def draw_model(results: dict[str, Any], path: Path) -> None:
    """Seconds of prefill, and of prefill and decoding, a panel a prompt length; the range of the repetitions."""
    rows = results["models"]
    panels: list[Panel] = []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        mine = [row for row in rows if row["tokens"] == tokens]
        for key, what in (("prefill_s", "prefill"), ("total_s", "prefill + as many decoded")):
            names = [f"{row['model']}, {row['state']} state" for row in mine]
            spreads = [row[key] for row in mine]
            panels.append((f"{what}, {tokens} tokens, s", lambda axes, n=names, s=spreads: _bars(axes, n, s)))
    _figure(panels, path)


def _figure(panels: list[Panel], path: Path) -> None:
    columns = min(3, max(1, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(6.4 * columns, 4.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, (title, draw) in zip(grid.flat, panels, strict=False):
        draw(axes)
        axes.set_title(title)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _bars(axes: Axes, names: list[str], spreads: list[dict[str, Any]]) -> None:
    middle = [s["median"] for s in spreads]
    reach = [[s["median"] - s["min"] for s in spreads], [s["max"] - s["median"] for s in spreads]]
    axes.barh(names, middle, xerr=reach, color="tab:blue", alpha=0.8)
    axes.invert_yaxis()


def _ratios(axes: Axes, rows: list[dict[str, Any]]) -> None:
    _bars(axes, [f"{r['level']}, rank {r['rank']}, {r['dtype']}" for r in rows], [r["ratio"] for r in rows])
    axes.axvline(rows[0]["goal"], color="tab:red", label="goal")
    axes.legend()


def _costs(axes: Axes, rows: list[dict[str, Any]]) -> None:
    _bars(axes, [f"rank {r['rank']}" for r in rows], [r["ratio"] for r in rows])


def _memory(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for rank in sorted({r["rank"] for r in rows}):
        mine = [r for r in rows if r["rank"] == rank]
        for key, style in (("kept_bytes", "o-"), ("peak_bytes", "s--")):
            label = f"rank {rank}, {key.removesuffix('_bytes')}"
            axes.plot([r["tokens"] for r in mine], [r[key] / 2**20 for r in mine], style, label=label)
    axes.set(xlabel="tokens", ylabel="MiB", xlim=(0, None), ylim=(0, None))
    axes.legend()


def _speeds(axes: Axes, rows: list[dict[str, Any]], verb: str) -> None:
    names, spreads = [], []
    for row in rows:
        tokens = row[verb]["tokens"]
        for name, s in row[verb]["seconds"].items():
            names.append(f"{row['dtype']}, {name}")
            spreads.append({"median": tokens / s["median"], "min": tokens / s["max"], "max": tokens / s["min"]})
    _bars(axes, names, spreads)


def _constancy(axes: Axes, result: dict[str, Any]) -> None:
    names = [f"token {result[name]:,}" for name in ("early", "late")]
    spreads = (result["early_s"], result["late_s"])
    ends = {"median": "median", "min": "quartile_1", "max": "quartile_3"}
    _bars(axes, names, [{end: 1e3 * s[key] for end, key in ends.items()} for s in spreads])


def _positions(axes: Axes, models: list[dict[str, Any]], key: str, unit: str) -> None:
    """One colour a model, one line style a route."""
    styles = ("-", "--", ":", "-.")
    for color, model in enumerate(models):
        for style, errors in zip(styles, model["routes"].values(), strict=True):
            axes.loglog(errors["positions"], errors[key], style, color=f"C{color}")
        name = f"rank {model['rank']}{', long memory' if model['long_memory'] else ''}"
        axes.plot([], [], color=f"C{color}", label=name)
        if key == "phi_rad":
            axes.loglog(model["positions"], model["plain_float32_angle_error_rad"], ".", color=f"C{color}")
    for style, route in zip(styles, models[0]["routes"], strict=True):
        axes.plot([], [], style, color="black", label=route)
    if key == "phi_rad":
        axes.plot([], [], ".", color="black", label="plain float32 sum of angles")
    axes.set(xlabel="token", ylabel=unit)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)


def _dtypes(axes: Axes, rows: list[dict[str, Any]]) -> None:
    dtypes, ranks = (list(dict.fromkeys(r[key] for r in rows)) for key in ("dtype", "rank"))
    for row in sorted(rows, key=lambda row: -row["rank"]):
        values = {"y": row["y"], "S": row["S"], **{f"d {name}": v for name, v in row["gradients"].items()}}
        style = {"color": f"C{dtypes.index(row['dtype'])}", "marker": "ox+"[ranks.index(row["rank"])], "ls": ""}
        axes.semilogy(list(values), list(values.values()), label=f"rank {row['rank']}, {row['dtype']}", **style)
    axes.tick_params(axis="x", rotation=90)
    axes.legend(fontsize=7, ncols=2)
