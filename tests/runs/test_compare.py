"""The comparison: contestants of one size and one recurrence, the driver whole, stopped, gone on with and given back."""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mamba3.tasks import peers

RUNS = Path(__file__).parents[2] / "runs"
FEW = ["--quick", "--kinds", "mamba3-mimo", "transformer", "--seeds", "2", "--device", "cpu"]


@pytest.fixture
def contestants(monkeypatch):
    monkeypatch.syspath_prepend(str(RUNS))
    import contestants

    return contestants


@pytest.fixture
def race(monkeypatch, tmp_path):
    """The state of a comparison over rates 1e-3, 2e-3, 4e-3, with the arguments and the finished cells given."""
    monkeypatch.syspath_prepend(str(RUNS))
    import compare

    def of(cells, *arguments):
        known = {}
        for kind, rate, seed, final, found in cells:
            tokens = 40 if final else 8
            cell = compare.Cell(kind, rate, seed, tokens, final=final)
            known[cell.name] = {
                "kind": kind,
                "rate": rate,
                "seed": seed,
                "tokens": tokens,
                "final": final,
                "batch_tokens": 65_536,
            } | found
        (tmp_path / "known.json").write_text(json.dumps({"cells": known}))
        fixed = ["--rates", "1e-3", "2e-3", "4e-3", "--sweep-tokens", "8", "--train-tokens", "40", "--device", "cpu"]
        fixed += ["--warmup", "0.1", "--known", str(tmp_path / "known.json"), "--out", str(tmp_path / "out")]
        return compare.Race(compare.options_of(None, [*fixed, *arguments]))

    return of


def sweep(kind, *losses):
    return [(kind, rate, 0, False, {"val_loss": loss}) for rate, loss in zip((1e-3, 2e-3, 4e-3), losses, strict=True)]


def start(out: Path, *more: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RUNS.parent)}
    command = [sys.executable, str(RUNS / "compare.py"), "--out", str(out), *FEW, *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_all_kinds_have_the_same_parameters_to_one_percent(contestants):
    size = contestants.Size(vocab_size=8192)
    counts = {}
    for kind in contestants.KINDS:
        if kind != "gdn":  # which is made of another library's layer
            with torch.device("meta"):
                counts[kind] = contestants.Contestant(kind, size).num_parameters()
    assert 30e6 < counts["mamba3-siso"] < 31e6
    assert all(abs(count / counts["mamba3-siso"] - 1) < 0.01 for count in counts.values()), counts


def test_every_kind_is_causal_and_learns_from_every_parameter(contestants):
    size = contestants.Size(vocab_size=16, d_model=32, layers=2, inner=64, headdim=16, d_state=8)
    ids = torch.randint(0, 16, (2, 24))
    for kind in contestants.KINDS:
        if kind == "gdn" or kind in contestants.STATES:
            continue
        torch.manual_seed(0)
        model = contestants.Contestant(kind, size)
        logits = model(ids)
        later = model(torch.cat([ids[:, :12], 15 - ids[:, 12:]], 1))
        torch.testing.assert_close(logits[:, :12], later[:, :12], rtol=1e-4, atol=1e-5)
        assert (logits[:, 12:] - later[:, 12:]).abs().max() > 1e-3, kind
        logits.square().sum().backward()
        idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not idle, (kind, idle)


def test_mamba2_is_its_recurrence(contestants):
    """S_t = exp(A dt) S_{t-1} + dt x (x) B, y = S C: the scan that stands in for its kernels where there are none."""
    torch.manual_seed(0)
    x, dt, A = torch.randn(1, 9, 2, 4), torch.rand(1, 9, 2), -torch.rand(2)
    B, C = torch.randn(1, 9, 8), torch.randn(1, 9, 8)
    S, expected = torch.zeros(1, 2, 4, 8), []
    for t in range(9):
        S = (A * dt[:, t]).exp()[..., None, None] * S + (x[:, t] * dt[:, t, :, None])[..., None] * B[:, t, None, None]
        expected.append((S * C[:, t, None, None]).sum(-1))
    torch.testing.assert_close(
        contestants.SCANS["ours"](x, dt, A, B, C), torch.stack(expected, 1), rtol=1e-4, atol=1e-5
    )


def test_mamba2_convolves_as_the_short_convolution_does(contestants):
    torch.manual_seed(0)
    layer = contestants.Mamba2(32, 8, 16)
    u = torch.randn(2, 11, 32)
    row = layer.in_proj(u)[..., 64:144]
    expected, _ = layer.conv(row, layer.conv.init_state(2))
    _, x, B, C, _ = layer.before(u)
    torch.testing.assert_close(torch.cat([x.flatten(-2), B, C], -1), expected)


def test_gated_deltanet_is_saved_with_each_weight_once(contestants, monkeypatch, tmp_path):
    class Stub(nn.Module):
        def __init__(self, hidden_size, **_):
            super().__init__()
            self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

        def forward(self, u):
            return (self.o_proj(u),)

    monkeypatch.setitem(sys.modules, "fla", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "fla.layers", SimpleNamespace(GatedDeltaNet=Stub))
    size = contestants.Size(vocab_size=16, d_model=32, layers=2, inner=64, headdim=16, d_state=8)
    model = contestants.Contestant("gdn", size)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(("kind", "parent"), [("mamba3-mimo-n32", "mamba3-mimo"), ("mamba3-no-bias", "mamba3-siso")])
def test_a_variant_takes_the_tuned_rate_or_names_the_sweep_it_misses(race, kind, parent):
    assert {cell.rate for cell in race(sweep(parent, 3.0, 1.0, 2.0), "--kinds", kind).plan()} == {2e-3}
    with pytest.raises(SystemExit, match=f"no finished sweep of {parent} over 0.001 0.002 0.004"):
        race(sweep(parent, 3.0, 1.0, 2.0)[:2], "--kinds", kind).plan()
    assert not [cell for cell in race([], "--kinds", kind, parent).plan() if cell.final]  # its sweep comes first


def test_the_table_is_of_one_rate_and_marks_the_edge_of_the_grid(race):
    facts = {"parameters": 1, "memory_bytes": {"32": 1}, "tokens_per_second": 1.0}
    cells = [
        (kind, rate, seed, True, facts | {"val_loss": loss, "test_perplexity": {"32": loss}})
        for kind in ("transformer", "mamba3-siso")
        for rate, seed, loss in ((1e-3, 0, 5.0), (2e-3, 0, 1.0), (2e-3, 1, 3.0), (4e-3, 0, 7.0))
    ]
    cells += sweep("transformer", 3.0, 1.0, 2.0) + sweep("mamba3-siso", 3.0, 2.0, 1.0)
    inner, edge = race(cells, "--kinds", "transformer", "mamba3-siso").table()
    assert (inner["rate"], inner["seeds"], inner["val_loss"]["mean"], inner["edge"]) == (2e-3, 2, 2.0, False)
    assert (edge["rate"], edge["seeds"], edge["val_loss"]["mean"], edge["edge"]) == (4e-3, 1, 7.0, True)


def test_the_table_says_which_kernels_and_devices_its_figures_are_of(race):
    facts = {"parameters": 1, "memory_bytes": {"32": 1}, "tokens_per_second": 1.0, "val_loss": 1.0}
    facts |= {"test_perplexity": {"32": 1.0}}
    where = ({"scan": "mamba3 triton", "device": "H100"}, {"scan": "mamba3 triton", "device": "H200"}, {})
    cells = [("mamba3-siso", 2e-3, seed, True, facts | place) for seed, place in enumerate(where)]
    (row,) = race(sweep("mamba3-siso", 3.0, 1.0, 2.0) + cells, "--kinds", "mamba3-siso").table()
    assert row["scan"] == ["mamba3 triton", "not recorded"] and row["device"] == ["H100", "H200", "not recorded"]


def test_what_is_compiled_is_forgotten_between_kinds_alone(race, contestants, monkeypatch, tmp_path):
    forgotten = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(True))
    made = race([], "--quick", "--kinds", "transformer", "mamba3-siso", "--seeds", "1", "--device", "cpu")
    made.open()
    made.run()
    kinds = [cell["kind"] for cell in made.cells.values()]
    changes = sum(a != b for a, b in itertools.pairwise(kinds))
    assert len(kinds) == 6 and len(forgotten) == changes == 2
    assert {cell["scan"] for cell in made.cells.values()} == {"mamba3 chunked", "torch's scaled_dot_product_attention"}


def relative(found, truth):
    return ((found.float() - truth).norm() / truth.norm()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fla", "mamba_ssm"])
def test_the_kernels_of_others_compute_mamba2_and_its_gradient(contestants, name):
    pytest.importorskip(name)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)  # these kernels are what they are
    x, dt, A = torch.randn(2, 512, 4, 64), torch.rand(2, 512, 4) * 0.1, -torch.rand(4) * 8
    B, C = torch.randn(2, 512, 128), torch.randn(2, 512, 128)
    exact = [v.cuda().requires_grad_() for v in (x, dt, A, B, C)]
    truth, weight = contestants.SCANS["ours"](*exact), torch.randn(2, 512, 4, 64, device="cuda")
    (truth * weight).sum().backward()
    rounded = [v.detach().bfloat16() if i in (0, 3, 4) else v.detach() for i, v in enumerate(exact)]
    rounded = [v.clone().requires_grad_() for v in rounded]
    found = contestants.SCANS[name](*rounded)
    (found.float() * weight).sum().backward()
    assert relative(found, truth) < 2e-2
    errors = {i: relative(v.grad, w.grad) for i, (v, w) in enumerate(zip(rounded, exact, strict=True))}
    assert all(error < 3e-2 for error in errors.values()), errors


@pytest.mark.gpu
def test_the_kernels_of_gated_deltanet_compute_it_and_its_gradient():
    """S_t = exp(g) S_{t-1};  S_t += beta (v - S_t k) k';  o = S_t q / sqrt(K): flash-linear-attention against this."""
    ops = pytest.importorskip("fla.ops.gated_delta_rule")
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)
    q, k = (torch.nn.functional.normalize(torch.randn(2, 192, 3, 128), dim=-1) for _ in range(2))
    v, g, beta = torch.randn(2, 192, 3, 256), -torch.rand(2, 192, 3) * 0.3, torch.rand(2, 192, 3)
    exact = [w.cuda().double().requires_grad_() for w in (q, k, v, g, beta)]
    Q, K, V, G, W = exact
    S, rows = torch.zeros(2, 3, 256, 128, dtype=torch.float64, device="cuda"), []
    for t in range(192):
        S = S * G[:, t, :, None, None].exp()
        change = W[:, t, :, None] * (V[:, t] - torch.einsum("bhvk,bhk->bhv", S, K[:, t]))
        S = S + change[..., None] * K[:, t, :, None]
        rows.append(torch.einsum("bhvk,bhk->bhv", S, Q[:, t]) / 128**0.5)
    truth, weight = torch.stack(rows, 1), torch.randn(2, 192, 3, 256, device="cuda", dtype=torch.float64)
    (truth * weight).sum().backward()
    rounded = [w.detach().float() if w is G else w.detach().bfloat16() for w in exact]
    rounded = [w.clone().requires_grad_() for w in rounded]
    with peers.sound_kernels(torch.device("cuda")):
        found = ops.chunk_gated_delta_rule(*rounded[:3], rounded[3], rounded[4])[0]
        (found.double() * weight).sum().backward()
    errors = {name: relative(a.grad, b.grad.float()) for name, a, b in zip("qkvgb", rounded, exact, strict=True)}
    errors["o"] = relative(found, truth.float())
    assert all(error < 3e-2 for error in errors.values()), errors


def test_kinds_come_in_order_of_worth_and_a_worker_stays_with_the_kind_that_it_compiled(race):
    kinds = ("mamba3-siso", "mamba2", "mamba3-siso-n64", "mamba3-euler")
    cells = [cell for kind in kinds[:2] for cell in sweep(kind, 3.0, 1.0, 2.0)]
    made = race(cells, "--kinds", *kinds, "--seeds", "2")
    todo = [cell for cell in made.plan() if cell.name not in made.cells]
    assert [(cell.kind, cell.seed) for cell in todo] == [
        ("mamba3-siso", 0), ("mamba2", 0), ("mamba3-siso", 1), ("mamba2", 1),
        ("mamba3-siso-n64", 0), ("mamba3-euler", 0), ("mamba3-siso-n64", 1), ("mamba3-euler", 1),
    ]  # fmt: skip
    made.compiled = "mamba2"
    first = made.in_turn(todo)
    assert [(cell.kind, cell.seed) for cell in first[:4]] == [
        ("mamba2", 0), ("mamba3-siso", 0), ("mamba2", 1), ("mamba3-siso", 1)
    ]  # fmt: skip
    assert sorted(c.name for c in first) == sorted(c.name for c in todo)


def test_a_cell_is_taken_for_another_only_where_all_its_settings_are_the_same(race, tmp_path):
    import compare

    cells = sweep("mamba3-siso", 3.0, 1.0, 2.0)
    assert not [cell for cell in race(cells, "--kinds", "mamba3-siso").plan() if cell.rate == 1e-3 and cell.final]
    for other in (["--warmup", "0.25"], ["--batch-tokens", "32768"], ["--sweep-tokens", "9"], ["--rates", "5e-4"]):
        made = race(cells, "--kinds", "mamba3-siso", *other)
        assert made.best_rate("mamba3-siso") is None, other
        assert not any(cell.name in made.cells for cell in made.plan()), other
    known = [(*cell[:4], cell[4] | {"corpus_tokens": 7}) for cell in cells]
    made = race(known, "--kinds", "mamba3-siso")
    assert len(made.cells) == 3
    made.corpus = 8  # as the folder of tokens turns out to hold
    made.refresh()
    assert not made.cells
    recorded = json.loads((RUNS.parent / "docs/results/language-model/2026-11-22-H200-compare.json").read_text())
    for name, cell in recorded["cells"].items():
        settings = {k: cell[k] for k in ("kind", "rate", "seed", "tokens", "final", "batch_tokens")}
        assert compare.Cell(**settings).name == name


def test_a_cell_that_another_process_is_at_is_left_to_it(race, monkeypatch):
    made = race(sweep("mamba3-siso", 3.0, 1.0, 2.0), "--kinds", "mamba3-siso", "--seeds", "2")
    from claims import claim

    first, second = [cell for cell in made.plan() if cell.final]
    trained = []
    monkeypatch.setattr(made, "train", lambda cell: trained.append(cell.name) or {"val_loss": 1.0, "kind": cell.kind})
    monkeypatch.setattr(made, "table", list)
    with claim(made.options.out / "claims" / first.name):
        assert not made.attempt(first) and made.attempt(second)
    assert trained == [second.name]
    other = race([], "--kinds", "mamba3-siso", "--seeds", "2")  # a process that began before `second` was finished
    other.cells.pop(second.name, None)
    monkeypatch.setattr(other, "train", lambda cell: pytest.fail("trained twice"))
    assert other.attempt(second) and second.name in other.cells


def test_the_refusal_of_a_library_is_lifted_where_its_kernels_are_compiled_rightly(contestants, monkeypatch):
    from mamba3.ops.triton import assembler

    library = SimpleNamespace(TRITON_ABOVE_3_7_1=False)
    monkeypatch.setitem(sys.modules, "fla", SimpleNamespace())
    monkeypatch.setattr("importlib.import_module", lambda name: {"fla.ops.common.chunk_o": library}[name])
    monkeypatch.setattr(contestants, "scan_of", lambda device: "fla")
    newer = SimpleNamespace(path="newer")
    gpu = torch.device("cuda")
    for replacement, lifted in ((newer, True), (None, False)):
        monkeypatch.setattr(assembler, "_replacement", lambda device, tool=replacement: tool)
        for kind in ("gdn", "mamba2", "mamba2-n64"):
            with contestants.sound_kernels(kind, gpu):
                assert lifted == library.TRITON_ABOVE_3_7_1
                assert (vars(assembler.knobs.nvidia).get("ptxas") == "newer") == lifted
            assert library.TRITON_ABOVE_3_7_1 is False
        with contestants.sound_kernels("mamba3-siso", gpu):
            assert library.TRITON_ABOVE_3_7_1 is False
    with contestants.sound_kernels("gdn", torch.device("cpu")):
        assert library.TRITON_ABOVE_3_7_1 is False


@pytest.mark.slow
def test_workers_that_are_killed_at_random_moments_end_with_what_one_process_finds(tmp_path):
    pytest.importorskip("matplotlib")
    start(tmp_path / "one")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RUNS.parent)}
    command = [sys.executable, str(RUNS / "compare.py"), "--out", str(tmp_path / "many"), *FEW, "--gpus", "2"]
    moments = random.Random(0)
    for _ in range(4):
        lead = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(moments.uniform(3, 14))
        lead.kill()  # its workers end by themselves, or go on beside the next ones for a while
        lead.wait(60)
    assert "8 cells" in start(tmp_path / "many", "--gpus", "2")
    one, many = (json.loads((tmp_path / name / "compare.json").read_text()) for name in ("one", "many"))
    assert one["cells"].keys() == many["cells"].keys()
    for name, cell in one["cells"].items():
        timed = {"tokens_per_second"}
        assert {k: v for k, v in cell.items() if k not in timed} == {
            k: v for k, v in many["cells"][name].items() if k not in timed
        }
    timed = {"tokens_per_second"}
    assert [{k: v for k, v in row.items() if k not in timed} for row in one["table"]] == [
        {k: v for k, v in row.items() if k not in timed} for row in many["table"]
    ]


@pytest.mark.slow
def test_runs_stops_and_goes_on_elsewhere(tmp_path):
    pytest.importorskip("matplotlib")
    assert "the same command goes on" in start(tmp_path / "a", "--seconds", "0")
    assert json.loads((tmp_path / "a" / "compare.json").read_text())["cells"] == {}
    assert "8 cells" in start(tmp_path / "a")
    whole = json.loads((tmp_path / "a" / "compare.json").read_text())
    assert [row["kind"] for row in whole["table"]] == ["mamba3-mimo", "transformer"]
    assert all(row["seeds"] == 2 and row["test_perplexity"]["128"]["sd"] is not None for row in whole["table"])
    assert (tmp_path / "a" / "compare.png").read_bytes().startswith(b"\x89PNG")
    for kind in ("mamba3-mimo", "transformer"):  # the final cells were trained at the sweep's best rate
        swept = [c for c in whole["cells"].values() if c["kind"] == kind and not c["final"]]
        best = min(swept, key=lambda c: c["val_loss"])["rate"]
        assert {c["rate"] for c in whole["cells"].values() if c["kind"] == kind and c["final"]} == {best}
    some = {name: cell for name, cell in whole["cells"].items() if not cell["final"]}
    (tmp_path / "known.json").write_text(json.dumps({"cells": some}))
    said = start(tmp_path / "b", "--known", str(tmp_path / "known.json"))
    assert "8 cells" in said and "sweep" not in said.replace("sweeps", "")
    again = json.loads((tmp_path / "b" / "compare.json").read_text())
    assert again["table"][1]["test_perplexity"] == whole["table"][1]["test_perplexity"]
