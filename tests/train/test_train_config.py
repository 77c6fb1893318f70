"""Laws of the configuration, the schedule, the parameter groups and the tokenizers."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba3.cli.train import model_config
from mamba3.lm import Mamba3Config, Mamba3LM
from mamba3.train.config import TrainConfig
from mamba3.train.optim import build_optimizer, optimizer_tensors, parameter_groups, restore_optimizer
from mamba3.train.recipes import RECIPES, read_recipe
from mamba3.train.schedule import configured_rate, learning_rate
from mamba3.train.tokenizer import (
    TextStream,
    byte_tokenizer,
    encode,
    end_of_text,
    load_tokenizer,
    token_bytes,
    train_bpe,
)

# -- configuration


def test_json_round_trip_and_partial_json():
    config = TrainConfig(steps=7, warmup_steps=1, betas=(0.8, 0.9), tokenizer="bpe", vocab_size=300)
    assert TrainConfig.from_json(config.to_json()) == config
    assert TrainConfig.from_json('{"steps": 200}') == TrainConfig(steps=200)


def test_config_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lr = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        TrainConfig("*.py")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "law"),
    [
        ({"stepps": 3, "lrr": 1}, "no field 'lrr', 'stepps'; its fields are"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": "10"}, "steps must be of type int but came as '10'"),
        ({"steps": True}, "steps must be of type int"),
        ({"decay_bc_bias": 1}, "decay_bc_bias must be of type bool"),
        ({"betas": [0.9]}, "betas must be"),
        ({"betas": [0.9, 1.0]}, "betas must be"),
        ({"lr": -1.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"steps": 5, "warmup_steps": 5}, "warmup_steps must be .* below steps = 5"),
        ({"seq_len": 100, "batch_tokens": 99}, "batch_tokens must be at least seq_len = 100"),
        ({"dtype": "float16"}, "dtype must be 'float32' or 'bfloat16'"),
        ({"vocab_size": 300}, "leave vocab_size out"),
        ({"vocab_size": 256, "tokenizer": "bpe"}, "at least 257"),
        ({"val_fraction": 1.0}, "val_fraction must be"),
        ({"keep": 0}, "keep must be"),
        ({"batch_tokens": 4096, "micro_tokens": 1000}, "micro_tokens must be 0 or a divisor of batch_tokens = 4096"),
        ({"layout": "rows", "seq_len": 500}, "multiples of seq_len = 500, whole rows"),
        ({"layout": "streams"}, "layout must be one of packed, rows, carry"),
        ({"schedule": "linear"}, "schedule must be one of cosine, wsd"),
        ({"decay_fraction": 0.0}, "decay_fraction must be above 0"),
        ({"layout": "carry", "context_parallel": 2}, "set layout to 'packed'"),
        ({"parallel": "tp"}, "parallel must be one of ddp, fsdp"),
    ],
)
def test_values_that_cannot_be_used_are_named(values, law):
    with pytest.raises(ValueError, match=law):
        TrainConfig.from_dict(values)


def test_text_that_is_no_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be JSON"):
        TrainConfig.from_json("{")
    with pytest.raises(ValueError, match="came as list"):
        TrainConfig.from_json("[]")
    with pytest.raises(ValueError, match="does not exist"):
        read_recipe(None, tmp_path / "absent.json")
    for text, law in (('{"a": 1}', "no field 'a'"), ('{"model": 3}', "must be JSON objects"), ("{", "must be JSON")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=rf"bad\.json: .*{law}"):
            read_recipe(None, tmp_path / "bad.json")
    with pytest.raises(ValueError, match=r"recipe must be one of laptop, small, paper-180m, .* but is 'large'"):
        read_recipe("large")


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_is_a_configuration_file_and_builds_its_model(name, tmp_path):
    recipe = read_recipe(name)
    (tmp_path / "run.json").write_text(recipe.to_json())
    again = read_recipe(None, tmp_path / "run.json")
    assert (again.train, again.model) == (recipe.train, recipe.model)
    (tmp_path / "less.json").write_text(json.dumps({"recipe": name, "steps": 20_000, "model": {"d_state": 16}}))
    less = read_recipe(None, tmp_path / "less.json")
    assert less.train == dataclasses.replace(recipe.train, steps=20_000) and less.model == {
        **recipe.model,
        "d_state": 16,
    }
    assert model_config(300, less.model).d_state == 16


def test_trajectory_leaves_out_bookkeeping_alone():
    base = TrainConfig()
    assert TrainConfig(eval_every=3, eval_tokens=1, save_every=9, keep=5).trajectory() == base.trajectory()
    assert TrainConfig(seed=1).trajectory() != base.trajectory()
    assert json.loads(json.dumps(base.trajectory())) == base.trajectory()


# -- schedule


@given(st.integers(1, 300), st.data())
@settings(max_examples=60, deadline=None)
def test_schedule_rises_to_the_peak_and_falls_to_the_floor(steps, data):
    warmup = data.draw(st.integers(0, steps - 1))
    rates = [learning_rate(k, peak=2.0, warmup=warmup, steps=steps, floor=0.5) for k in range(steps)]
    rise, fall = rates[:warmup], rates[warmup:]
    assert rise == pytest.approx([2.0 * (k + 1) / warmup for k in range(warmup)])
    assert fall[0] == 2.0 and fall == sorted(fall, reverse=True)
    assert len(fall) == 1 or fall[-1] == pytest.approx(0.5)
    if len(fall) % 2:
        assert len(fall) == 1 or fall[len(fall) // 2] == pytest.approx(1.25)


@given(st.integers(4, 300), st.floats(0.05, 1.0))
@settings(max_examples=60, deadline=None)
def test_warmup_stable_decay_is_a_plateau_and_a_line(steps, fraction):
    config = TrainConfig(
        steps=steps, warmup_steps=2, schedule="wsd", decay_fraction=fraction, lr=2.0, min_lr_fraction=0.25
    )
    rates = [configured_rate(config, k) for k in range(steps)]
    falling = max(min(round(fraction * steps), steps - 3), 1)
    assert rates[2 : steps - falling] == pytest.approx([2.0] * (steps - falling - 2))
    assert rates[-1] == pytest.approx(0.5)
    drops = [a - b for a, b in zip(rates[steps - falling - 1 :], rates[steps - falling :], strict=False)]
    assert drops == pytest.approx([1.5 / falling] * falling)


# -- parameter groups


def tiny(**overrides) -> Mamba3LM:
    values = dict(vocab_size=257, d_model=32, layers=("mamba3", "attention"), attn_heads=2, d_state=16, headdim=16)
    return Mamba3LM(Mamba3Config(**{**values, **overrides}))


@pytest.mark.parametrize("name", ["dt_bias", "B_bias", "in_proj.weight"])
def test_parameters_that_are_not_float32_masters_are_refused_by_name(name):
    model = tiny()
    parameter = model.get_parameter(f"layers.0.mixer.{name}")
    parameter.data = parameter.data.bfloat16()
    kind = "a parameter of the recurrence must" if "bias" in name else "a parameter must"
    with pytest.raises(ValueError, match=rf"^{kind} be float32 .* layers\.0\.mixer\.{name} is bfloat16; .*autocast"):
        build_optimizer(model, TrainConfig())


def names_of(model, group):
    ids = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


@pytest.mark.parametrize("out_norm", ["none", "pre_gate_grouped"])
@pytest.mark.parametrize("decay_bc_bias", [False, True])
def test_weight_decay_spares_what_the_paper_spares(out_norm, decay_bc_bias):
    model = tiny(out_norm=out_norm, mimo_rank=2, d_conv=4, attn_qkv_bias=True, d_intermediate=32)
    decayed, exempt = parameter_groups(model, weight_decay=0.1, decay_bc_bias=decay_bc_bias)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    yes, no = names_of(model, decayed), names_of(model, exempt)
    assert yes | no == {name for name, _ in model.named_parameters()} and not yes & no
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in ("dt_bias", "D") or "norm" in name:
            assert name in no
        elif leaf in ("B_bias", "C_bias"):
            assert (name in yes) == decay_bc_bias
        elif "proj" in name and parameter.ndim == 2:
            assert name in yes
    assert any(name.endswith("embedding.weight") for name in yes)


@pytest.mark.parametrize("decay_bc_bias", [False, True])
def test_a_step_without_gradient_shrinks_exactly_the_decayed(decay_bc_bias):
    model = tiny()
    optimizer = build_optimizer(model, TrainConfig(lr=0.1, weight_decay=0.5, decay_bc_bias=decay_bc_bias))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        shrinks = name in names_of(model, optimizer.param_groups[0])
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if shrinks else 1.0))
        assert shrinks or not name.endswith("in_proj.weight")


def test_optimizer_state_survives_names_and_refuses_another_model():
    torch.manual_seed(0)
    config = TrainConfig()
    first, second = tiny(), tiny()
    second.load_state_dict(first.state_dict())
    ids = torch.arange(12)[None]

    def step(model, optimizer):
        optimizer.zero_grad()
        model(ids).float().logsumexp(-1).sum().backward()
        optimizer.step()

    optimizer = build_optimizer(first, config)
    step(first, optimizer)
    second.load_state_dict(first.state_dict())
    copy = build_optimizer(second, config)
    restore_optimizer(second, copy, optimizer_tensors(first, optimizer))
    step(first, optimizer)
    step(second, copy)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert a.equal(b)
    wider = tiny(d_state=32)
    with pytest.raises(ValueError, match="belongs to another model"):
        restore_optimizer(wider, build_optimizer(wider, config), optimizer_tensors(first, optimizer))
    deeper = tiny(layers=("mamba3",) * 3)
    with pytest.raises(ValueError, match="belongs to another model"):
        restore_optimizer(deeper, build_optimizer(deeper, config), optimizer_tensors(first, optimizer))


# -- tokenizers

BPE = train_bpe(["the cat sat on the mat; the dog ate the cat food\n" * 20, "naïve €uro 😀 " * 20], 300)


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), BPE], ids=["byte", "bpe"])
@given(text=st.text())
@settings(max_examples=60, deadline=None)
def test_any_text_round_trips_whole_and_streamed(tokenizer, text):
    ids = encode(tokenizer, [text])[0].tolist()
    assert tokenizer.decode(ids) == text
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text
    sizes = token_bytes(tokenizer)
    assert sizes is not None and sizes[ids].sum() == len(text.encode())


def test_bytes_are_their_own_tokens():
    tokenizer = byte_tokenizer()
    assert encode(tokenizer, ["aé"])[0].tolist() == [97, 0xC3, 0xA9]
    assert (end_of_text(tokenizer), tokenizer.get_vocab_size()) == (256, 257)
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in (0xE2, 0x82, 0xAC, 0xFF, 97, 256, 0xE2)] == ["", "", "€", "\ufffd", "a", "", ""]
    assert stream.finish() == "\ufffd"


def test_a_text_longer_than_a_part_is_encoded_whole():
    text = ("a line of text\n" * 40_000) + "x" * 600_000
    assert encode(byte_tokenizer(), [text, "", "y"])[0].size == len(text)
    assert BPE.decode(encode(BPE, [text])[0].tolist()) == text


def test_stream_of_a_tokenizer_that_is_not_byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "▁hello": 1, "▁world": 2, "\n": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    stream = TextStream(tokenizer)
    assert token_bytes(tokenizer) is None
    assert [stream.push(i) for i in (1, 2, 2)] == ["hello", " world", " world"]
    with pytest.raises(ValueError, match="end-of-text token"):
        end_of_text(tokenizer)


def test_bpe_training_repeats_and_saves(tmp_path):
    texts = ["some text to merge\n" * 30]
    assert train_bpe(texts, 280).to_str() == train_bpe(texts, 280).to_str()
    (tmp_path / "tokenizer.json").write_text(BPE.to_str())
    assert load_tokenizer(tmp_path).to_str() == load_tokenizer(tmp_path / "tokenizer.json").to_str() == BPE.to_str()
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe(texts, 256)


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="not a tokenizer"):
        load_tokenizer(tmp_path)


def test_schedule_is_finite_at_one_step():
    assert math.isfinite(learning_rate(0, peak=1.0, warmup=0, steps=1, floor=0.1))
