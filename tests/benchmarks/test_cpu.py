"""Every section of `cpu` runs at toy size, and refuses to time an implementation that is wrong."""

import json
import sys
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import constancy, cpu, gradient, loop, peer
from benchmarks.__main__ import app
from benchmarks.checks import Refused
from benchmarks.compilation import try_compile
from mamba3.ops import chunked
from mamba3.ops.scan import IMPLEMENTATIONS

LAYER: dict[str, Any] = {"d_model": 16, "d_state": 8, "headdim": 8}
LOOP = loop.Sizes(tokens=40, rounds=2, ranks=(1, 2), **LAYER)
GRADIENT = gradient.Sizes(
    tokens=40, checked=20, rounds=2, ranks=(1, 2), memory_heads=4, memory_tokens=(1024, 2048, 4096), **LAYER
)
PEER = peer.Sizes(
    tokens=48, prompt=20, checked=4, decoded=2, rounds=2, layers=2, vocab_size=50, chunk_sizes=(8, 16), presets=(),
    compile_limit_s=0, dtypes=(torch.float32,), **LAYER,
)  # fmt: skip
CONSTANCY = constancy.Sizes(early=10, late=90, chunk=32, steps=4, layers=2, vocab_size=50, **LAYER)
TOY = cpu.Sizes(loop=LOOP, gradient=GRADIENT, peer=PEER, constancy=CONSTANCY)


def quiet(text):
    pass


@pytest.fixture
def wrong_scan(monkeypatch):
    """A chunked scan whose y is 1 % too large."""

    def scan(*args, **settings):
        y, state = chunked.scan(*args, **settings)
        return chunked.ScanOutput(y * 1.01, state)

    monkeypatch.setitem(IMPLEMENTATIONS, "chunked", scan)


def test_prefill_and_token_loop():
    rows = loop.measure(LOOP, quiet)
    assert {(r["level"], r["rank"], r["dtype"]) for r in rows} == {
        (level, rank, dtype)
        for level in ("layer", "recurrence")
        for rank in (1, 2)
        for dtype in ("float32", "bfloat16")
    }
    for row in rows:
        assert row["met"] == (row["ratio"]["median"] >= loop.GOAL) and row["ratio"]["rounds"] == 2
        assert len(row["checks"]) == 2


def test_memory_of_the_gradient_is_linear_in_tokens():
    """The second doubling of the tokens adds twice what the first did, and not four times; blocks leave some scatter."""
    rows = gradient.memory(GRADIENT, quiet)
    for rank in (1, 2):
        for key in ("kept_bytes", "peak_bytes"):
            held = [row[key] for row in rows if row["rank"] == rank]
            assert held[2] - held[1] < 2.5 * (held[1] - held[0]), key
        kept = [row["kept_bytes_per_token"] for row in rows if row["rank"] == rank]
        assert max(kept) < rows[0]["all_states_bytes_per_token"]


@pytest.mark.parametrize(
    "measure",
    [
        lambda: loop.measure(LOOP, quiet),
        lambda: gradient.cost(GRADIENT, quiet),
        lambda: constancy.measure(CONSTANCY, quiet),
    ],
)
def test_a_wrong_scan_is_not_timed(wrong_scan, measure):
    with pytest.raises(Refused, match=r"error [129]\.\d\de-0[23]"):
        measure()


def test_a_wrong_angle_is_not_timed(monkeypatch):
    """The token loop is a contestant too: a step that forgets to turn is found by the prefill."""
    monkeypatch.setattr(sys.modules["mamba3.ops.step"], "wrap", torch.zeros_like)
    with pytest.raises(Refused, match="token loop"):
        loop.measure(LOOP, quiet)


def test_a_peer_whose_cache_is_wrong_is_not_timed(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(peer.Peer, "step", lambda self, token, memory: (self.read(token.unsqueeze(1))[0], memory))
    with pytest.raises(Refused, match="peer eager: cached decode"):
        peer.measure(PEER, quiet)


def test_against_the_peer():
    pytest.importorskip("transformers")
    (row,) = peer.measure(PEER, quiet)
    assert set(row["parameters"]) == {"ours", "peer"}
    for verb in ("prefill", "decode"):
        assert row[verb]["best"] == {"ours": "ours eager", "peer": "peer eager"}
        assert row[verb]["ratio"] == row[verb]["ratio_eager"] == row[verb]["ratios_to_peer"]["ours eager"]


def test_a_compilation_that_takes_too_long_or_fails_says_so():
    def endless(side):
        while True:
            pass

    def fail(side):
        raise RuntimeError("no compiler\nand more")

    side, note = try_compile(lambda: None, endless, 0.05)
    assert side is None and note == {"compiled": False, "why": "not done after 0 s"}
    side, note = try_compile(lambda: None, fail, 60)
    assert side is None and note["why"] == "RuntimeError: no compiler"


def test_time_and_memory_by_position():
    result = constancy.measure(CONSTANCY, quiet)
    assert result["state_bytes"]["early"] == result["state_bytes"]["late"] and result["late"] == 90
    assert result["ratio"]["rounds"] == 4


def test_memory_behind_a_view_counts():
    """A state whose x_prev is a slice of a thousand tokens holds all of them."""
    model = peer.build_ours(PEER, torch.float32)
    state = model.init_state(1)
    assert constancy.held_bytes(state) == state.nbytes
    layer, wide = state.layers[0], torch.zeros(1, 1000, 4, 8)
    state.layers[0] = layer._replace(x_prev=wide[:, -1])
    assert constancy.held_bytes(state) == state.nbytes - 4 * 8 * 4 + wide.nbytes


def test_the_command_writes_results_and_fails_when_refused(monkeypatch, tmp_path, wrong_scan):
    monkeypatch.setattr(cpu, "QUICK", TOY)
    monkeypatch.setattr(peer, "measure", lambda sizes, tell: [])
    outcome = CliRunner().invoke(
        app, ["cpu", "--quick", "--threads", str(torch.get_num_threads()), "--out", str(tmp_path)]
    )
    assert outcome.exit_code == 1 and "No times for prefill against the token loop" in outcome.output
    (path,) = tmp_path.glob("*-cpu-quick.json")
    written = json.loads(path.read_text())["results"]
    assert set(written["prefill against the token loop"]) == {"refused"}
    assert "prefill_s" not in path.read_text() and path.with_suffix(".png").stat().st_size > 1000
