"""What the documentation says of precision, held over tokens and by dtype."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import dtypes, million, numerics
from benchmarks.__main__ import app
from benchmarks.checks import Refused
from mamba3.ops import chunked
from mamba3.ops.scan import IMPLEMENTATIONS

TOY = numerics.Sizes(
    million=million.Sizes(
        tokens=1200, stepped=200, checked=100, piece=128, long_piece=512, window=64, models=((2, False), (1, True))
    ),
    dtypes=dtypes.Sizes(tokens=40, d_state=8, headdim=4, heads=2, ranks=(2,)),
)
HALF_ULP_OF_PI = 2.0**-23
SHORTEST_CHUNK = 16


def quiet(text):
    pass


def held(models, tokens_a_piece):
    """The laws of a measurement, whatever its length.

    A head that forgets carries no error from afar, so the last window's error is that of the first; twice allows for the
    windows' own scatter. phi is rounded to float32 once a piece (and nowhere else): a random walk of that many steps, four
    standard deviations at most. A head that forgets nothing gains one rounding of its decay a chunk, unit roundoff each.
    """
    for model in models:
        routes = model["routes"]
        pieces = model["tokens"] / tokens_a_piece + 2 * len(model["positions"])
        chunks = model["tokens"] / SHORTEST_CHUNK
        for route, errors in routes.items():
            if model["long_memory"]:
                if route != "step by step":
                    assert max(errors["y"]) < max(1e-6, chunks * 2**-24)
                continue
            assert errors["y"][-1] < 2 * errors["y"][0], route
            assert errors["S_unturned"][-1] < 2 * errors["S_unturned"][0], route
            if route.startswith("prefill"):
                assert errors["phi_rad"][-1] < HALF_ULP_OF_PI * (2 + 4 * math.sqrt(pieces)), route


def test_no_drift_over_a_thousand_tokens():
    models = million.measure(TOY.million, quiet)
    assert [m["positions"] for m in models] == [[64, 100, 178, 316, 562, 1000, 1200]] * 2
    assert [r["positions"][-1] for r in models[0]["routes"].values()] == [1200, 1200, 178, 1200]
    held(models, TOY.million.piece)


@pytest.mark.slow
def test_no_drift_over_a_million_tokens():
    sizes = million.Sizes(stepped=10_000)
    models = million.measure(sizes, quiet)
    held(models, sizes.piece)
    for model in models:
        assert model["angle_rad"][-1] > 50_000, "the angle should have turned many thousand times"
        plain = model["plain_float32_angle_error_rad"][-1]
        kept = max(model["routes"][f"prefill in pieces of {sizes.piece:,}"]["phi_rad"])
        assert plain > 1e4 * kept, "a plain float32 sum loses what the wrapped angle keeps"


def test_errors_by_dtype_are_a_few_unit_roundoffs():
    rows = dtypes.measure(TOY.dtypes, quiet)
    assert [row["dtype"] for row in rows] == ["float64", "float32", "bfloat16", "float16"]
    for row in rows:
        assert set(row["gradients"]) >= {
            "x",
            "dt",
            "A",
            "lam",
            "theta",
            "B",
            "C",
            "D",
            "z",
            "mimo_x",
            "mimo_z",
            "mimo_o",
        }
        for error in (row["y"], row["S"], *row["gradients"].values()):
            assert error < 50 * row["unit_roundoff"]


def test_a_wrong_float64_run_is_refused(monkeypatch):
    def scan(*args, **settings):
        y, state = chunked.scan(*args, **settings)
        return chunked.ScanOutput(y + 1e-8, state)

    monkeypatch.setitem(IMPLEMENTATIONS, "chunked", scan)
    with pytest.raises(Refused, match="chunked = definition in float64"):
        million.measure(TOY.million, quiet)


def test_windows_end_where_they_should_whatever_the_pieces():
    def count(start, stop, state):
        return torch.arange(start, stop).view(1, -1, 1), million.State(*[torch.tensor(stop)] * 4)

    for piece in (1, 7, 100):
        reading = million.follow(count, 100, piece, [20, 30, 100], 20)
        assert {m: (int(y[0, 0]), int(y[0, -1]), y.shape[1]) for m, y in reading.y.items()} == {
            20: (0, 19, 20), 30: (10, 29, 20), 100: (80, 99, 20),
        }  # fmt: skip
        assert {m: int(s.S) for m, s in reading.states.items()} == {20: 20, 30: 30, 100: 100}


def test_the_command_writes_results(monkeypatch, tmp_path):
    monkeypatch.setattr(numerics, "QUICK", TOY)
    outcome = CliRunner().invoke(
        app, ["numerics", "--quick", "--threads", str(torch.get_num_threads()), "--out", str(tmp_path)]
    )
    assert outcome.exit_code == 0, outcome.output
    (path,) = tmp_path.glob("*-numerics-quick.json")
    written = json.loads(path.read_text())
    assert written["quick"] and set(written["results"]) == {"a million tokens", "errors by dtype"}
    assert path.with_suffix(".png").stat().st_size > 1000
