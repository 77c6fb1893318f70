"""The language model: sizes of the paper, three verbs, hybrids, files, and what people do to modules."""

import copy
import dataclasses
import errno
import json
import os
import pickle
from unittest import mock

import pytest
import torch

from mamba3 import LMState, Mamba3Config, Mamba3LM, preset
from mamba3.ops import State, state_file
from tests.ops.cases import distance

TINY = {"vocab_size": 50, "d_model": 16, "d_state": 8, "headdim": 8, "d_intermediate": 20}
KINDS = {
    "siso": {"layers": ("mamba3",) * 2},
    "mimo": {"layers": ("mamba3",) * 2, "mimo_rank": 2, "tie_embeddings": False},
    "hybrid": {"layers": ("mamba3", "attention", "mamba3"), "attn_heads": 4, "attn_kv_heads": 2, "mimo_rank": 2},
    "no mlp": {"layers": ("mamba3",), "d_intermediate": 0},
}


def tiny(kind="siso", seed=0, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    return Mamba3LM(Mamba3Config(**{**TINY, **KINDS[kind], **changes}), dtype=dtype)


@pytest.mark.parametrize(("name", "count"), [("siso-180m", 186_849_600), ("mimo-180m", 187_291_968)])
def test_published_sizes_to_the_digit(name, count):
    with torch.device("meta"):
        assert Mamba3LM(preset(name)).num_parameters() == count


@pytest.mark.parametrize(
    ("name", "millions"),
    [("siso-440m", 443.0), ("mimo-440m", 444.2), ("siso-880m", 892.8), ("mimo-880m", 894.6),
     ("siso-1.5b", 1494.7), ("mimo-1.5b", 1497.1)],
)  # fmt: skip
def test_sizes_of_the_paper(name, millions):
    with torch.device("meta"):
        assert Mamba3LM(preset(name)).num_parameters() / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("kind", [*KINDS, "convolution, RoPE"])
@pytest.mark.parametrize("live", [0, 2, 3])
def test_a_step_leaves_padding_alone(kind, live):
    """Sequences from `live` on: their state stays, and the others' is what it is without them."""
    model = tiny(kind) if kind in KINDS else tiny(d_conv=3, rotation="standard")
    ids = torch.randint(0, 50, (3, 9))
    with torch.no_grad():
        _, before = model.prefill(ids[:, :8])
        _, expected = model.step(ids[:, 8], before.clone())
        _, state = model.step(ids[:, 8], before.clone(), torch.tensor([live], dtype=torch.int32))
        after = model.step(ids[:, 8], state.clone())[0][live:]
        assert torch.equal(after, model.step(ids[:, 8], before.clone())[0][live:])
    assert state.tokens.tolist() == [9] * live + [8] * (3 - live)
    rows = torch.arange(3) < live
    for mine, moved, stays in zip(state.layers, expected.layers, before.layers, strict=True):
        if isinstance(mine, State):
            for a, b, c in zip(mine, moved, stays, strict=True):
                assert a is None or (torch.equal(a[rows], b[rows]) and torch.equal(a[~rows], c[~rows]))
        else:
            assert torch.equal(mine.length, torch.where(rows, moved.length, stays.length))


@torch.no_grad()
def test_a_row_is_the_state_of_its_sequence_in_the_same_memory():
    model, ids = tiny("hybrid"), torch.randint(0, 50, (3, 9))
    _, state = model.prefill(ids)
    row, copy = state.row(1), state.select([1])
    assert torch.equal(model.step(ids[1, :1], row)[0], model.step(ids[1, :1], copy)[0])
    assert state.tokens.tolist() == [9, 10, 9] and state.layers[0].S.data_ptr() < row.layers[0].S.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_three_verbs_agree(kind):
    model, ids = tiny(kind), torch.randint(0, 50, (2, 90))
    with torch.no_grad():
        whole = model(ids)
        first, state = model.prefill(ids[:, :40])
        second, state = model.prefill(ids[:, 40:80], state)
        rest = []
        for t in range(80, 90):
            logits, state = model.step(ids[:, t], state)
            rest.append(logits)
        assert whole.shape == (2, 90, 56)
        assert distance(torch.cat([first, second, torch.stack(rest, 1)], 1), whole) < 1e-10
        assert state.tokens.tolist() == [90, 90]
        pack, packed = model.prefill(ids.reshape(1, 180), cu_seqlens=[0, 90, 180])
        assert distance(pack.view_as(whole), whole) < 1e-10
        assert distance(model(ids.reshape(1, 180), cu_seqlens=torch.tensor([0, 90, 180])).view_as(whole), whole) < 1e-10
        last, after = model.prefill(ids[:, 40:], model.prefill(ids[:, :40])[1], last_only=True)
        assert distance(last, whole[:, -1:]) < 1e-10
        assert distance(model.step(ids[:, 0], after)[0], model.step(ids[:, 0], model.prefill(ids)[1])[0]) < 1e-10
        last, _ = model.prefill(ids.reshape(1, 180), cu_seqlens=[0, 90, 180], last_only=True)
        assert distance(last.squeeze(1), whole[:, -1]) < 1e-10
        a, _ = model.step(ids[:, 0], state)
        b, _ = model.step(ids[:, 0], packed)
        assert distance(a, b) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind):
    model = tiny(kind)
    model(torch.randint(0, 50, (2, 30))).logsumexp(-1).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_step_with_gradients_leaves_the_state_alone():
    model = tiny("hybrid")
    state = model.init_state(2)
    logits, after = model.step(torch.tensor([1, 2]), state)
    assert logits.requires_grad and after is not state and state.tokens.tolist() == [0, 0]
    assert not state.layers[0].S.any()


def test_sixteen_bits_keep_a_wide_residual_and_recurrence():
    model = tiny("mimo", dtype=torch.bfloat16)
    ids = torch.randint(0, 50, (1, 40))
    exact = copy.deepcopy(model).double()
    assert model.layers[0].mixer.dt_bias.dtype == torch.float32
    assert model(ids).dtype == torch.bfloat16 and distance(model(ids), exact(ids)) < 0.03
    assert distance(model.to(torch.bfloat16)(ids), exact(ids)) < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_configuration_round_trip(kind):
    config = tiny(kind, B_bias=(-1.0, 1.0)).config
    assert Mamba3Config.from_json(config.to_json()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"vocab_size": 5, "d_model": 8, "layers": ["mamba3"], "n_head": 3}', "no field n_head"),
        ('{"vocab_size": 5, "layers": ["mamba3"]}', "needs d_model"),
        ('{"vocab_size": 0, "d_model": 8, "layers": ["mamba3"]}', "vocab_size must be a positive integer; it is 0"),
        ('{"vocab_size": 5, "d_model": 8, "layers": []}', "at least one block"),
        ('{"vocab_size": 5, "d_model": 8, "layers": ["mamba2"]}', "layers has mamba2"),
        ('{"vocab_size": 5, "d_model": 8, "layers": ["attention"]}', "needs attn_heads"),
        ("[1]", "this is a list"),
        ("{", "not JSON"),
    ],
)
def test_configurations_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        Mamba3Config.from_json(text)


def test_unknown_preset():
    with pytest.raises(ValueError, match="siso-180m"):
        preset("base")


# -- files


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same(kind, tmp_path):
    model, ids = tiny(kind, dtype=torch.float32), torch.randint(0, 50, (1, 20))
    model.save_pretrained(tmp_path / "new" / "folder")
    twin = Mamba3LM.from_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(twin(ids), model(ids)) and twin.fingerprint() == model.fingerprint()
    assert twin.config == model.config
    half = Mamba3LM.from_pretrained(tmp_path / "new" / "folder", dtype=torch.bfloat16)
    assert half.embedding.weight.dtype == torch.bfloat16 and half.layers[0].norm.weight.dtype == torch.bfloat16


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        Mamba3LM.from_pretrained(tmp_path)
    model = tiny(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or truncated"):
        Mamba3LM.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "d_state": 16}))
    with pytest.raises(ValueError, match=r"layers.0.mixer.B_bias has shape \(4, 1, 8\), not \(4, 1, 16\)"):
        Mamba3LM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "layers": ["mamba3"] * 3}))
    with pytest.raises(ValueError, match=r"missing layers\.2"):
        Mamba3LM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "layers": ["mamba3"]}))
    with pytest.raises(ValueError, match=r"unknown layers\.1"):
        Mamba3LM.from_pretrained(tmp_path)


def test_weights_that_are_no_numbers(tmp_path):
    model = tiny(dtype=torch.float32)
    with torch.no_grad():
        model.layers[1].mixer.D[0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers.1.mixer.D holds NaN"):
        Mamba3LM.from_pretrained(tmp_path)


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_model(tmp_path, monkeypatch):
    model, ids = tiny(dtype=torch.float32), torch.randint(0, 50, (1, 5))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device.*untouched"):
        tiny(seed=3, dtype=torch.float32).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert torch.equal(Mamba3LM.from_pretrained(tmp_path)(ids), model(ids))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_state_goes_on_as_if_nothing_happened(kind, tmp_path):
    model, ids = tiny(kind), torch.randint(0, 50, (2, 30))
    _, state = model.prefill(ids)
    state.save(tmp_path / "state.safetensors")
    loaded = LMState.load(tmp_path / "state.safetensors", model)
    assert loaded.tokens.tolist() == [30, 30] and loaded.fingerprint == model.fingerprint()
    go_on = {"max_new_tokens": 12, "temperature": 0.9, "seed": 4}
    more = torch.randint(0, 50, (2, 3))
    assert torch.equal(
        model.generate(more, state=loaded, **go_on).tokens, model.generate(more, state=state, **go_on).tokens
    )
    with torch.no_grad():
        whole = torch.cat([ids, more], dim=1)
        assert torch.equal(model.generate(more, state=loaded, **go_on).tokens, model.generate(whole, **go_on).tokens)


def test_state_files_that_are_refused(tmp_path):
    model, path = tiny(), tmp_path / "state"
    _, state = model.prefill(torch.randint(0, 50, (1, 5)))
    state.save(path)
    whole = path.read_bytes()
    for damage in (whole[:40], whole[: len(whole) - 9], b"", b"not a state at all"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            LMState.load(path, model)
    path.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    with pytest.raises(ValueError, match="checksum does not match"):
        LMState.load(path, model)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="of another model or of other weights"):
        LMState.load(path, tiny(seed=9))
    state.layers[0].save(path)
    with pytest.raises(ValueError, match="holds the state of a layer"):
        LMState.load(path, model)
    model.float().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a state"):
        LMState.load(tmp_path / "model.safetensors", model)
    with pytest.raises(FileNotFoundError):
        LMState.load(tmp_path / "nowhere", model)


def test_saving_a_state_on_a_full_disk_keeps_the_old_one(tmp_path, monkeypatch):
    model, path = tiny(), tmp_path / "state"
    _, state = model.prefill(torch.randint(0, 50, (1, 5)))
    state.save(path)
    _, later = model.prefill(torch.randint(0, 50, (1, 5)), state)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(
        OSError, match=r"could not be saved \(No space left on device\); the file that was there is untouched"
    ):
        later.save(path)
    monkeypatch.undo()
    assert LMState.load(path, model).tokens.tolist() == [5]
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_file_is_written_with_the_mode_that_open_gives_whatever_other_threads_write(tmp_path):
    """The mask of modes belongs to the whole process: two threads that set it and put it back could leave it at nothing."""
    (tmp_path / "opened").touch()
    with mock.patch.object(os, "umask", side_effect=AssertionError("the process's mask was changed")):
        state_file.replace_file(tmp_path / "replaced", b"whole")
    modes = {name: (tmp_path / name).stat().st_mode for name in ("opened", "replaced")}
    assert modes["opened"] == modes["replaced"] and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(
        OSError, match=r"nowhere/state could not be saved \(No such file or directory\); nothing was written"
    ):
        state_file.replace_file(tmp_path / "nowhere" / "state", b"whole")


def test_the_version_of_a_state_file_is_checked(tmp_path, monkeypatch):
    model = tiny()
    _, state = model.prefill(torch.randint(0, 50, (1, 5)))
    monkeypatch.setattr(state_file, "VERSION", "2")
    state.save(tmp_path / "state")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="state version 2; this mamba3 reads version 1"):
        LMState.load(tmp_path / "state", model)


def test_states_fork_and_select():
    model, ids = tiny("hybrid"), torch.randint(0, 50, (3, 20))
    with torch.no_grad():
        _, state = model.prefill(ids)
        fork = state.clone()
        expected, _ = model.step(torch.tensor([1, 2, 3]), state)
        again, _ = model.step(torch.tensor([3, 1]), fork.select([2, 0]))
    assert distance(again, expected[[2, 0]]) < 1e-10
    assert fork.tokens.tolist() == [20] * 3 and state.tokens.tolist() == [21] * 3


def test_a_state_has_a_fixed_size():
    model = tiny("mimo")
    _, short = model.prefill(torch.randint(0, 50, (1, 1)))
    _, long = model.prefill(torch.randint(0, 50, (1, 3000)))
    assert short.nbytes == long.nbytes


def test_the_fingerprint_names_the_weights():
    model = tiny()
    before = model.fingerprint()
    assert before == tiny().fingerprint() == copy.deepcopy(model).fingerprint() != tiny(seed=1).fingerprint()
    with torch.no_grad():
        model.layers[0].mixer.in_proj.weight.mul_(1.5)
    assert model.fingerprint() != before


# -- bad input


def test_inputs_that_do_not_fit():
    model = tiny()
    with pytest.raises(ValueError, match=r"integers \[b, t\]"):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"integers \[b, t\]"):
        model(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"integers \[b\]"):
        model.step(torch.zeros(2, 1, dtype=torch.long), model.init_state(2))
    with pytest.raises(ValueError, match="holds 3 sequences, but 2 came in"):
        model.prefill(torch.zeros(2, 4, dtype=torch.long), model.init_state(3))
    with pytest.raises(ValueError, match="has 1 layers but the model 2"):
        model.prefill(torch.zeros(2, 4, dtype=torch.long), tiny("no mlp").init_state(2))


# -- what people do to modules


def test_modules_are_copied_pickled_and_built_without_memory():
    model, ids = tiny("hybrid"), torch.randint(0, 50, (1, 9))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids), model(ids))
    _, state = model.prefill(ids)
    assert torch.equal(pickle.loads(pickle.dumps(state)).layers[0].S, state.layers[0].S)
    with torch.device("meta"):
        ghost = Mamba3LM(model.config)
        assert ghost(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 56)


# torch 2.13: Dynamo itself instantiates the autograd.Function that it traces, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole():
    model, ids = tiny("mimo", dtype=torch.float32), torch.randint(0, 50, (2, 40))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert distance(compiled(ids), model(ids)) < 1e-5
    with torch.no_grad():
        _, state = model.prefill(ids)
        step = torch.compile(model.step, fullgraph=True, backend="aot_eager")
        ours = state.clone()
        for t in range(3):
            a, ours = step(ids[:, t], ours)
            b, state = model.step(ids[:, t], state)
            assert distance(a, b) < 1e-5
        assert ours.tokens.tolist() == state.tokens.tolist() == [43, 43]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor of torch 2.13 uses torch.jit
def test_compiles_to_machine_code():
    """The same through Inductor, with the compiler of the machine."""
    model, ids = tiny("siso", dtype=torch.float32), torch.randint(0, 50, (2, 40))
    expected = model(ids)
    compiled = torch.compile(model, fullgraph=True)
    ours = compiled(ids)
    assert distance(ours, expected) < 1e-5
    grads = []
    for logits in (ours, expected):
        model.zero_grad()
        logits.logsumexp(-1).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert max(distance(a, b) for a, b in zip(*grads, strict=True)) < 1e-4


def test_autocast_trains():
    model, ids = tiny("hybrid", dtype=torch.float32), torch.randint(0, 50, (2, 40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids)
    logits.float().logsumexp(-1).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert distance(logits, model(ids)) < 0.05
