"""What the kernels' benchmark does without a GPU: floors, checks, jobs, the plots, and rivals that cannot run."""

import contextlib
import json
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import kernel_checks, kernel_jobs, kernel_races, kernels
from benchmarks import rivals as benchmark_rivals
from benchmarks.cuda import spread
from benchmarks.kernel_sizes import SHAPES, floors, moved_bytes, products_flops
from benchmarks.plots import draw_kernels, draw_model
from benchmarks.rivals import RIVALS, passes, rivals
from mamba3.nn.mixer import Mamba3


def test_the_floors_are_those_of_the_layer():
    """mathematics: 25.5 KB and 3.7 MFLOP a token and rank at 64 heads of 64, state 128, chunks of 64 rows."""
    state = 64 * 64 * 128 * 4
    assert (moved_bytes(1, 2048, 1, False) - state) / 2048 == pytest.approx(25.5 * 1024, rel=0.02)
    assert products_flops(1, 2048, 1, False) / 2048 == pytest.approx(3.7e6, rel=0.02)
    assert products_flops(2, 512, 4, True) == 2 * products_flops(1, 512, 1, False) * 4 * 3
    top = {"copy_TBs": 2.0, "matmul_TFLOPs": 1.0}
    assert floors(8, 2048, 1, False, top)["bytes_ms"] == pytest.approx(moved_bytes(8, 2048, 1, False) / 2e9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
@pytest.mark.parametrize("rank", [1, 4])
def test_rivals_that_cannot_run_are_left_out_and_say_why(rank):
    runs, left_out = rivals(rank, 1, 64, True, 60.0, {})
    assert not runs
    assert set(left_out) == {rival.name for rival in RIVALS if rival.rank == rank}
    assert all(left_out.values())


def test_a_pass_with_gradients_reaches_every_tensor_and_one_without_records_nothing():
    tensors = [torch.randn(3, 4), torch.randn(3, 4)]
    forward, both = (passes(lambda a, b: a * b, tensors, backward) for backward in (False, True))
    assert not forward.run().requires_grad and forward.held == 2 * 48
    assert len(both.run()) == 2 and both.held == 3 * 48


def test_errors_of_parameters_count_together_and_nan_is_red():
    truth = {"x_bthp": torch.ones(4), "D_h": torch.ones(4), "B_bias_hrn": torch.ones(4)}
    found = {"x_bthp": torch.ones(4), "D_h": torch.full((4,), 1.3), "B_bias_hrn": torch.full((4,), 1.4)}
    seen = kernel_checks.errors(found, truth)
    assert seen == {"x_bthp": 0.0, "parameters": pytest.approx((0.09 / 2 + 0.16 / 2) ** 0.5)}
    assert not kernel_checks.errors(found | {"x_bthp": torch.full((4,), torch.nan)}, truth)["x_bthp"] <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_a_job_that_fails_says_how_and_the_others_are_done():
    jobs = {
        "fails": kernel_jobs.Job("check", {"dtype": "float32", "backward": False, "case": [1, 1, 4, 1, 8, 8, 2]}),
        "late": kernel_jobs.Job("no such kind", {}),
    }
    told = []
    outcomes = kernel_jobs.run_all(jobs, 100.0, 2, told.append)
    assert "ended with 1" in str(outcomes["fails"].why) and "KeyError" in str(outcomes["late"].why)
    assert len(told) == 2
    late = kernel_jobs.run_all({"late": jobs["late"]}, 0.4, 1, told.append)["late"]
    assert late.why == "not done after its 0 s" and late.result is None
    assert "not begun" in str(kernel_jobs.run_all({"late": jobs["late"]}, 0.0, 1, told.append)["late"].why)


def test_a_job_s_result_is_what_it_wrote_whatever_it_printed(monkeypatch):
    """A library that logs to the standard output once ended a whole run, when a process was late."""
    job, soon = kernel_jobs.Job("tune", {}), 60 + time.monotonic()

    def late(command, **_):
        Path(command[-1]).write_text('{"done": [false]}')
        raise subprocess.TimeoutExpired(command, 1, output=b"2026-11-22 10:52:03 [TileLang] compiling\n")

    monkeypatch.setattr(kernel_jobs.subprocess, "run", late)
    outcome = kernel_jobs._run(job, soon)
    assert outcome.result == {"done": [False]} and "not done after" in str(outcome.why)

    def never(command, **_):
        raise subprocess.TimeoutExpired(command, 1, output=b"2026-11-22 10:52:03 [TileLang] compiling\n")

    monkeypatch.setattr(kernel_jobs.subprocess, "run", never)
    assert kernel_jobs._run(job, soon).result is None


def test_every_shape_and_dtype_has_its_jobs():
    cold = kernels._cold_jobs(["a", "b", "c", "d"], backward=True)
    assert len(cold) == 2 * len(SHAPES) == len({job.cache for job in cold.values()})
    jobs = kernels._jobs(backward=True, decode=True, with_rivals=True, quick=False)
    kinds = [job.kind for job in jobs.values()]
    assert kinds.count("check") == sum(len(v) for cases in kernel_checks.CASES.values() for v in cases.values())
    assert kinds.count("tune") == sum(r.parts for r in RIVALS if r.parts > 0)
    assert kinds.count("tile") == 9  # of the official MIMO: three kernels at three shapes
    assert kinds.count("decode") == 3 * len(SHAPES) and kinds.count("warm") == 2 * len(SHAPES)
    few = kernels._jobs(backward=False, decode=False, with_rivals=False, quick=True).values()
    assert {job.kind for job in few} == {"check", "warm"} and not any(job.settings["backward"] for job in few)
    assert set(kinds) | {"cold"} == set(kernel_jobs.KINDS)


def test_a_rival_is_unready_where_none_of_its_processes_was_done_or_a_kernel_of_the_shape_is_missing():
    jobs = kernels._jobs(backward=True, decode=False, with_rivals=True, quick=False)
    outcomes = {name: kernel_jobs.Outcome({"seconds": 1.0, "done": [False, True]}, None) for name in jobs}
    assert set(kernels._unready(jobs, outcomes)) == {("official MIMO", 1, 131072, wanted) for wanted in (False, True)}
    late = kernel_jobs.Outcome(None, "late")
    outcomes["compile official MIMO (8, 2048) backward"] = late
    outcomes |= {name: late for name in jobs if "gated" in name}
    outcomes["compile Mamba-2 1/6"] = late
    outcomes["compile Mamba-2 2/6"] = kernel_jobs.Outcome({"done": [False]}, "late")
    unready = kernels._unready(jobs, outcomes)
    assert "late" in unready["official MIMO", 8, 2048, True] and "late" in unready["gated delta rule", 1, 16384, False]
    assert ("official MIMO", 8, 2048, False) not in unready and ("official MIMO", 128, 512, True) not in unready
    assert not any(name == "Mamba-2" for name, *_ in unready)


def test_what_cold_processes_compiled_is_found_where_it_is_put(monkeypatch, tmp_path):
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    cold, own = tmp_path / "cold", tmp_path / "own"
    monkeypatch.setattr(knobs.cache, "dir", str(cold))
    manager = FileCacheManager("kernel")
    manager.put_group("k.json", {"k.cubin": manager.put(b"code", "k.cubin")})
    monkeypatch.setattr(knobs.cache, "dir", str(own))
    kernels._keep_compiled([str(cold)])
    found = FileCacheManager("kernel").get_group("k.json")
    assert found is not None and found == {"k.cubin": str(own / "kernel" / "k.cubin")}
    assert Path(found["k.cubin"]).read_bytes() == b"code"


def test_candidates_are_spread_over_a_grid_and_do_not_cap_registers_where_they_need_not():
    class Config(NamedTuple):
        num_warps: int
        maxnreg: int | None

    grid = [Config(w, r) for w in range(30) for r in (None, 128)]
    kept = benchmark_rivals.candidates(grid)
    assert len(kept) == 12 and {c.maxnreg for c in kept} == {None}
    assert kept[0].num_warps == 0 and kept[-1].num_warps >= 27 and len({c.num_warps for c in kept}) == 12
    assert benchmark_rivals.candidates(kept) == kept and len(benchmark_rivals.candidates(grid[1:2])) == 1


def test_the_plots_have_a_panel_a_shape(tmp_path):
    times = {
        name: {"ms": spread([at, 1.1 * at, 1.2 * at]), "host_ms": 0.1, "peak_GiB": 1.0}
        for name, at in (("triton", 0.5), ("chunked", 13.0))
    }
    row = dict(rank=1, batch=8, tokens=2048, times=times, floors={"bytes_ms": 0.15, "products_ms": 0.08})
    step = dict(rank=1, batch=8, state="float32", times_ms={"layer": spread([1.0, 2.0])}, floors_ms={"layer": 0.9})
    measured = {"forward": [row, row | dict(rank=4)], "backward": [row], "decode": [step]}
    draw_kernels(measured, tmp_path / "kernels.png")
    seconds = dict(median=1.0, min=0.9, max=1.1)
    draw_model(
        {"models": [dict(model="siso", state="float32", tokens=512, prefill_s=seconds, total_s=seconds)]},
        tmp_path / "model.png",
    )
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("kernels.png", "model.png"))


@pytest.fixture
def without_a_gpu(monkeypatch):
    """What a run asks of CUDA before it races."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        kernels.environment, "describe", lambda _: {"date": "2026-11-22", "device": "none", "commit": ""}
    )
    monkeypatch.setattr(kernels, "_prepare", lambda *_: ({"checks": []}, {}))
    monkeypatch.setattr(kernels, "ceilings", lambda: {"copy_TBs": 3.0, "matmul_TFLOPs": 700.0})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_a_run_that_is_cut_short_keeps_every_row_and_has_every_section_s_first_shape(
    without_a_gpu, monkeypatch, tmp_path
):
    def race_scan(backward, r, b, t, first, *_):
        if not first:
            raise KeyboardInterrupt
        return {"rank": r, "batch": b, "backward": backward}

    monkeypatch.setattr(kernels.kernel_races, "_race_scan", race_scan)
    monkeypatch.setattr(kernels.kernel_races, "decode", lambda *_: iter([{"rank": 1, "batch": 8}]))
    with pytest.raises(KeyboardInterrupt):
        kernels.run(tmp_path)
    (file,) = tmp_path.glob("*-kernels.json")
    kept = json.loads(file.read_text())["results"]
    assert [row["rank"] for row in kept["forward"]] == list(SHAPES) == [row["rank"] for row in kept["backward"]]
    assert [row["backward"] for row in kept["forward"] + kept["backward"]] == [False] * 2 + [True] * 2
    assert kept["decode"] == [{"rank": 1, "batch": 8}]


def test_a_row_of_decode_for_every_rank_and_batch(monkeypatch):
    """What a step is made of, on a CPU: graphs call it at once and the race takes one second a graph."""

    def race(contestants, ours, rounds):
        assert contestants["layer"].run() is not None  # the kernel alone needs a GPU
        return {name: {"ms": {"median": 1e3}} for name in contestants}, {}

    monkeypatch.setattr(kernel_races, "layer_of", lambda r: Mamba3(32, 16, headdim=8, mimo_rank=r))
    monkeypatch.setattr(kernel_races, "STATES", ("float32",))  # a CPU steps in the weights' dtype
    monkeypatch.setattr(kernel_races, "graphed", lambda run, repeats: run)
    monkeypatch.setattr(kernel_races, "race", race)
    settings = kernel_races.Settings({1: [], 4: []}, (1, 3), 3, None, {}, False, {"copy_TBs": 3.0})
    rows = list(kernel_races.decode(settings, lambda _: None))
    assert len({(row["rank"], row["batch"], row["state"]) for row in rows}) == 2 * 2 == len(rows)
    assert set(rows[0]["times_ms"]) == {"layer", "kernel"}
    assert rows[0]["times_ms"]["kernel"]["median"] == 1e3 / kernel_races.STEPS
    state = 1 * 8 * 8 * 16 * 4  # batch, heads of 8 channels in 64, state, bytes
    assert rows[0]["floors_ms"]["kernel"] == pytest.approx(2 * state / 3e9)


def test_rivals_that_fail_or_take_too_long_are_left_out(without_a_gpu, monkeypatch):
    def late(b, t):
        time.sleep(5)
        raise AssertionError

    def failing(b, t):
        def call(*_):
            print("2026-11-22 10:52:03 [TileLang] compiling")  # noqa: T201
            raise RuntimeError("kernel input TRAP dtype expected bfloat16, but got float32")

        return call, [torch.ones(1)]

    for build, limit_s, why in ((failing, 60.0, "TRAP dtype"), (late, 0.2, "not done after 0 s")):
        monkeypatch.setattr(benchmark_rivals, "sound_assembler", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(benchmark_rivals, "RIVALS", [RIVALS[0]._replace(build=build)])
        runs, left_out = rivals(4, 1, 64, False, limit_s, {})
        assert not runs and why in left_out[RIVALS[0].name]
