"""Laws of loading whole models in the published layout, from every kind of file, and of writing them again."""

import json
import logging
import pickle
import shutil

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from mamba3 import Mamba3Config, Mamba3LM, preset
from mamba3.convert import (
    choose_decay,
    config_from_official,
    load_official,
    read_official,
    save_official,
)
from mamba3.convert.decay import bundled_documents
from tests.convert.official import (
    GOLDEN,
    MODELS,
    oracle_model,
    random_model,
    relative_error,
)

BOUND = 1e-10
SISO = GOLDEN / "official_lm_siso"
BIN = "pytorch_model.bin"
CONFIG = {
    "d_model": 32, "d_intermediate": 48, "n_layer": 2, "vocab_size": 61, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True, "attn_layer_idx": [], "attn_cfg": {},
    "ssm_cfg": {"layer": "Mamba3", "d_state": 16, "headdim": 16, "chunk_size": 16},
}  # fmt: skip
ATTENTION = {"causal": True, "num_heads": 4}


def write(folder, config=CONFIG, weights=None, decay=None):
    """A checkpoint in the published layout; `decay` is added to ssm_cfg."""
    folder.mkdir(parents=True, exist_ok=True)
    if decay:
        config = {**config, "ssm_cfg": {**config["ssm_cfg"], "decay": decay}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(random_model(config) if weights is None else weights, folder / BIN)
    return folder


def golden_model(name):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    return expected["input_ids"], expected["logits"]


# -- what the models compute


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_golden_logits(name):
    input_ids, logits = golden_model(name)
    model = load_official(GOLDEN / name, "heavy_tail", torch.float64)
    assert relative_error(model(input_ids), logits) < BOUND
    first, state = model.prefill(input_ids[:, :9])
    second, state = model.prefill(input_ids[:, 9:-1], state)
    last, _ = model.step(input_ids[:, -1], state)
    assert relative_error(torch.cat([first, second, last.unsqueeze(1)], 1), logits) < BOUND
    wrong = load_official(GOLDEN / name, "softplus", torch.float64)
    assert relative_error(wrong(input_ids), logits) > 1e-4


@pytest.mark.parametrize(
    "attention",
    [
        {},
        {"num_heads_kv": 2},
        {"num_heads_kv": 1, "head_dim": 16},
        {"qkv_proj_bias": False, "out_proj_bias": False, "softmax_scale": 8**-0.5, "d_conv": 0, "rotary_emb_dim": 0},
        {"qkv_proj_bias": False, "mlp_dim": 0, "softmax_scale": None},
    ],
)
@torch.no_grad()
def test_hybrids_agree_with_the_oracle(tmp_path, attention):
    config = {**CONFIG, "attn_layer_idx": [1], "attn_cfg": {**ATTENTION, **attention}, "tie_embeddings": False}
    weights = random_model(config)
    input_ids = torch.randint(61, (2, 13))
    expected = oracle_model(config, weights, input_ids, "softplus")
    model = load_official(write(tmp_path, config, weights), "softplus")
    assert model.config.layers == ("mamba3", "attention")
    assert relative_error(model(input_ids), expected) < BOUND
    first, state = model.prefill(input_ids[:, :-1])
    last, _ = model.step(input_ids[:, -1], state)
    assert relative_error(torch.cat([first, last.unsqueeze(1)], 1), expected) < BOUND


@pytest.mark.parametrize("ssm", [{"is_mimo": True, "mimo_rank": 1}, {"is_mimo": True, "mimo_rank": 2, "ngroups": 2}])
@pytest.mark.parametrize("changes", [{"d_intermediate": 0}, {"tie_embeddings": False}])
@torch.no_grad()
def test_other_models_agree_with_the_oracle(tmp_path, ssm, changes):
    config = {**CONFIG, **changes, "ssm_cfg": {**CONFIG["ssm_cfg"], **ssm}}
    weights = random_model(config)
    input_ids = torch.randint(61, (1, 11))
    expected = oracle_model(config, weights, input_ids, "heavy_tail")
    assert relative_error(load_official(write(tmp_path, config, weights), "heavy_tail")(input_ids), expected) < BOUND


def test_the_dtype_is_that_of_the_file_unless_told(tmp_path):
    assert load_official(SISO, "heavy_tail").embedding.weight.dtype == torch.float32
    weights = {name: value.bfloat16() for name, value in random_model(CONFIG).items()}
    model = load_official(write(tmp_path, CONFIG, weights), "heavy_tail")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    assert model.layers[0].mixer.dt_bias.dtype == torch.float32
    assert torch.equal(model.layers[0].mixer.dt_bias, weights["backbone.layers.0.mixer.dt_bias"].float())
    half = load_official(tmp_path, "heavy_tail", torch.float16, "cpu")
    assert half.layers[0].mixer.in_proj.weight.dtype == torch.float16
    with pytest.raises(ValueError, match=r"dtype must be.*int8"):
        load_official(tmp_path, "heavy_tail", torch.int8)


def test_null_and_absent_fields_take_the_official_defaults():
    least = {"d_model": 32, "n_layer": 2, "vocab_size": 61, "ssm_cfg": {"layer": "Mamba3"}, "attn_cfg": None}
    config = config_from_official({**least, "model_type": "mamba3"}, "softplus")
    assert config == Mamba3Config(vocab_size=61, d_model=32, layers=("mamba3",) * 2, decay="softplus")
    published = {**least, "ssm_cfg": {"layer": "Mamba3", "is_mimo": True, "mimo_rank": 4}, "d_intermediate": 1264}
    published |= {"vocab_size": 128256, "d_model": 768, "n_layer": 12, "pad_vocab_size_multiple": 16}
    with torch.device("meta"):
        assert Mamba3LM(config_from_official(published, "heavy_tail")).num_parameters() == 187_291_968


# -- files


def all_layouts(folder, weights):
    """The same weights in every layout; yields the folder of each."""
    config = (SISO / "config.json").read_text()

    def place(name):
        path = folder / name
        path.mkdir()
        (path / "config.json").write_text(config)
        return path

    path = place("older format")
    torch.save(weights, path / BIN, _use_new_zipfile_serialization=False)
    yield path
    separate = {name: value.clone() for name, value in weights.items()}
    path = place("safetensors")
    save_file(separate, path / "model.safetensors")
    yield path
    for kept in ("lm_head.weight", "backbone.embedding.weight"):
        path = place(f"safetensors with {kept} alone")
        dropped = {"lm_head.weight", "backbone.embedding.weight"} - {kept}
        save_file({k: v for k, v in separate.items() if k not in dropped}, path / "model.safetensors")
        yield path
    for suffix, save in ((".safetensors", save_file), (".bin", torch.save)):
        path, stem = place(f"shards{suffix}"), "model" if suffix == ".safetensors" else "pytorch_model"
        names, weight_map = sorted(separate), {}
        for i, part in enumerate((names[:5], names[5:])):
            shard = f"{stem}-0000{i + 1}-of-00002{suffix}"
            save({name: separate[name] for name in part}, path / shard)
            weight_map |= dict.fromkeys(part, shard)
        (path / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        yield path


def test_every_layout_holds_the_same_model(tmp_path):
    weights = torch.load(SISO / BIN)
    expected = load_official(SISO, "heavy_tail")
    for folder in all_layouts(tmp_path, weights):
        model = load_official(str(folder), "heavy_tail")
        assert model.fingerprint() == expected.fingerprint(), folder
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_the_model_does_not_live_in_the_file(tmp_path):
    """A model outlives its file, and training it leaves the file alone."""
    folder = tmp_path / "copy"
    shutil.copytree(SISO, folder)
    model = load_official(folder, "heavy_tail")
    before = [p.clone() for p in model.parameters()]
    (folder / BIN).write_bytes(b"\0" * (folder / BIN).stat().st_size)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('this code must not run')",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_weights_are_named(tmp_path):
    whole = (SISO / BIN).read_bytes()
    contents = {
        "empty": b"", "cut": whole[: len(whole) // 2], "short": whole[:-1], "text": b"version https://git-lfs\n" * 9,
        "code": pickle.dumps({"backbone.embedding.weight": Trap()}, 2), "list": pickle.dumps([1, 2], 2), "zeros": b"\0" * 999,
    }  # fmt: skip
    for name, content in contents.items():
        folder = write(tmp_path / name)
        (folder / BIN).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}/{BIN} (is damaged|must hold)"):
            load_official(folder, "heavy_tail")
    generator = torch.Generator().manual_seed(0)
    folder = write(tmp_path / "flipped")
    for i in torch.randint(len(whole), (60,), generator=generator).tolist():
        older = tmp_path / "flipped" / BIN
        older.write_bytes(whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :])
        try:
            load_official(folder, "heavy_tail")
        except ValueError as error:
            assert BIN in str(error)


def test_damaged_safetensors_are_named(tmp_path):
    folder = write(tmp_path)
    (folder / BIN).unlink()
    save_file({k: v.clone() for k, v in random_model(CONFIG).items()}, folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-1], whole[:5]):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
            load_official(folder, "heavy_tail")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "shard.bin"}}, "names shard.bin, which is missing"),
        ({"weight_map": {"a": "../shard.bin"}}, "not beside it"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path, index, message):
    (write(tmp_path) / BIN).unlink()
    (tmp_path / f"{BIN}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load_official(tmp_path, "heavy_tail")


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_official(tmp_path, "heavy_tail")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_official(tmp_path, "heavy_tail")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match="has no weights"):
        load_official(tmp_path, "heavy_tail")
    with pytest.raises(ValueError, match="is a file"):
        load_official(tmp_path / "config.json", "heavy_tail")
    for name in ("nowhere", tmp_path / "nowhere", str(tmp_path / "nowhere"), "a/b/c", "../b"):
        with pytest.raises(ValueError, match="neither a folder nor"):
            load_official(name, "heavy_tail")


def test_our_own_folders_are_told_apart(tmp_path):
    load_official(SISO, "heavy_tail").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"use Mamba3LM\.from_pretrained"):
        load_official(tmp_path, "heavy_tail")


def test_tensors_that_do_not_fit(tmp_path):
    weights = random_model(CONFIG)
    name = "backbone.layers.1.mixer.in_proj.weight"
    damaged = {key: value.clone() for key, value in weights.items()}
    damaged[name][3, 3] = torch.nan
    cases = [
        ({k: v for k, v in weights.items() if k != name}, f"missing {name}"),
        ({**weights, "backbone.layers.0.mixer.A_log": torch.zeros(4)}, "unknown backbone.layers.0.mixer.A_log"),
        ({**weights, name: weights[name][:-1]}, rf"{name} has shape \(\d+, 32\), not \(\d+, 32\)"),
        (damaged, f"{name} holds NaN"),
        ({**weights, "lm_head.weight": weights["lm_head.weight"] + 1}, "tie_embeddings is true, but lm_head.weight"),
        ({**weights, name: weights[name].to(torch.int8)}, rf"{name} \(torch.int8\)"),
        ({"state_dict": weights}, r"state_dict \(dict\)"),
        ({}, "missing backbone.embedding.weight"),
    ]
    for content, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            load_official(write(tmp_path, CONFIG, content), "heavy_tail")
        assert str(tmp_path / BIN) in str(caught.value)
    untied = {k: v for k, v in weights.items() if k != "lm_head.weight"}
    with pytest.raises(ValueError, match=r"missing lm_head\.weight"):
        load_official(write(tmp_path, {**CONFIG, "tie_embeddings": False}, untied), "heavy_tail")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm": False}, "rms_norm is false"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer is Mamba2"),
        ({"ssm_cfg": {}}, "ssm_cfg.layer is Mamba1, the official default"),
        ({"ssm_cfg": None}, "must have ssm_cfg"),
        ({"ssm_cfg": ["Mamba3"]}, "ssm_cfg must be an object"),
        ({"ssm_cfg": {"layer": "Mamba3", "use_rope": True}}, "no argument use_rope"),
        ({"ssm_cfg": {"layer": "Mamba3", "d_model": 32}}, "no argument d_model"),
        ({"moe_cfg": {}}, "no field moe_cfg"),
        ({"n_layer": 0}, "n_layer must be an integer of at least 1"),
        ({"d_intermediate": "48"}, "d_intermediate must be an integer"),
        ({"vocab_size": None}, "must have vocab_size"),
        ({"tie_embeddings": 1}, "tie_embeddings must be true or false"),
        ({"attn_layer_idx": [2], "attn_cfg": ATTENTION}, "attn_layer_idx must list layers from 0 to 1"),
        ({"attn_layer_idx": [-1], "attn_cfg": ATTENTION}, "attn_layer_idx must list"),
        ({"attn_layer_idx": 1, "attn_cfg": ATTENTION}, "attn_layer_idx must list"),
        ({"attn_layer_idx": [1], "attn_cfg": {"causal": True}}, "num_heads must be a positive integer"),
        ({"attn_layer_idx": [1], "attn_cfg": {"num_heads": 4}}, "causal is not true"),
        ({"attn_layer_idx": [1], "attn_cfg": {**ATTENTION, "d_conv": 4}}, "d_conv is 4"),
        ({"attn_layer_idx": [1], "attn_cfg": {**ATTENTION, "rotary_emb_dim": 8}}, "rotary_emb_dim is 8"),
        ({"attn_layer_idx": [1], "attn_cfg": {**ATTENTION, "mlp_dim": 64}}, "mlp_dim is 64"),
        ({"attn_layer_idx": [1], "attn_cfg": {**ATTENTION, "softmax_scale": 1.0}}, "softmax_scale is 1.0"),
        ({"attn_layer_idx": [1], "attn_cfg": {**ATTENTION, "window": 64}}, "no argument window"),
        ({"attn_layer_idx": [1], "attn_cfg": {**ATTENTION, "num_heads_kv": 0}}, "num_heads_kv must be a positive"),
        ({"attn_layer_idx": [1], "attn_cfg": {**ATTENTION, "num_heads_kv": 3}}, "multiple of n_kv_heads"),
        ({"attn_layer_idx": [1], "attn_cfg": {**ATTENTION, "qkv_proj_bias": None}}, "qkv_proj_bias must be true"),
    ],
)
def test_a_config_that_is_not_supported(tmp_path, changes, message):
    write(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(ValueError, match=message):
        load_official(tmp_path, "heavy_tail")


# -- the hub


def test_a_repository_of_the_hub(monkeypatch, tmp_path):
    asked = []

    def snapshot(repo_id, *, allow_patterns):
        asked.append((repo_id, allow_patterns))
        folder = tmp_path / "snapshot"
        if len(asked) > 1:
            shutil.copytree(SISO, folder, dirs_exist_ok=True)
        folder.mkdir(exist_ok=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model = load_official("state-spaces/mamba3-siso-187m", "heavy_tail")
    assert model.fingerprint() == load_official(SISO, "heavy_tail").fingerprint()
    assert [repo for repo, _ in asked] == ["state-spaces/mamba3-siso-187m"] * 2
    assert "config.json" in asked[0][1]
    assert "*.bin" in asked[1][1]


def test_a_hub_that_does_not_answer(monkeypatch):
    def snapshot(repo_id, *, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Name or service not known.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(OSError, match=r"owner/name is no folder here.*not known.*give their folder"):
        load_official("owner/name", "heavy_tail")


# -- the decay


def test_the_decay_is_named_or_demanded(tmp_path, caplog):
    caplog.set_level(logging.INFO, "mamba3.convert")
    write(tmp_path)
    with pytest.raises(ValueError, match="Give decay, one of heavy_tail, softplus, or tokenizer"):
        load_official(tmp_path)
    with pytest.raises(ValueError, match="'relu'"):
        load_official(tmp_path, "relu")
    for name in ("softplus", "heavy_tail"):
        model, choice = read_official(tmp_path, name)
        assert (model.config.decay, choice.decay, choice.source) == (name, name, "argument")
        assert {block.mixer.decay for block in model.layers} == {name}
    top = {**CONFIG, "decay_activation": "softplus"}
    for config in (top, {**CONFIG, "ssm_cfg": {**CONFIG["ssm_cfg"], "decay": "softplus"}}):
        model, choice = read_official(write(tmp_path, config))
        assert (model.config.decay, choice.source, choice.losses) == ("softplus", "config.json", None)
        assert "softplus, named by the config.json" in str(choice)
    assert not caplog.records
    assert load_official(tmp_path, "heavy-tail").config.decay == "heavy_tail"
    assert "names the decay softplus; the argument heavy_tail is taken" in caplog.text


def number_tokenizer(unknown="0"):
    """Token 17 is the word "17", and there is nothing else: any sequence of tokens is a text."""
    tokenizer = Tokenizer(models.WordLevel(vocab={str(i): i for i in range(65)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@torch.no_grad()
def own_documents(model):
    """What the model itself says: its loss there is least, in expectation, under the activation it spoke with."""
    state, ids = model.init_state(4), [torch.zeros(4, dtype=torch.int64)]
    for _ in range(48):
        logits, state = model.step(ids[-1], state)
        ids.append(torch.multinomial(logits.softmax(-1), 1).squeeze(1))
    return [" ".join(map(str, tokens)) for tokens in torch.stack(ids, 1).tolist()]


@pytest.mark.parametrize("decay", ["heavy_tail", "softplus"])
@torch.no_grad()
def test_auto_finds_the_decay_of_a_model(tmp_path, monkeypatch, caplog, decay):
    model = load_official(write(tmp_path), decay)
    documents, tokenizer = own_documents(model), number_tokenizer()
    monkeypatch.setattr("mamba3.convert.decay.bundled_documents", lambda: documents)
    caplog.set_level(logging.INFO, "mamba3.convert")
    loaded, choice = read_official(tmp_path, tokenizer=tokenizer)
    assert (choice.decay, choice.source) == (decay, "measured")
    assert loaded.fingerprint() == model.fingerprint()
    assert {block.mixer.decay for block in loaded.layers} == {decay}
    assert choice.losses is not None
    assert choice.margin == pytest.approx(max(choice.losses.values()) - min(choice.losses.values()))
    assert choice.margin > 0.05
    assert f"decay {decay}, by {choice.margin:.4f} nats a token" in caplog.text
    assert [record.levelname for record in caplog.records] == ["INFO"]
    ids = torch.tensor([tokenizer.encode(text).ids for text in documents])
    for name, loss in choice.losses.items():
        logits = load_official(tmp_path, name)(ids[:, :-1])
        assert loss == pytest.approx(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())
    tokenizer.save(str(tmp_path / "elsewhere.json"))
    assert read_official(tmp_path, tokenizer=tmp_path / "elsewhere.json").choice == choice
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read_official(tmp_path).choice == choice


def test_choosing_leaves_the_model_as_it_was_and_warns_when_close(tmp_path, caplog):
    model = Mamba3LM(
        Mamba3Config(vocab_size=64, d_model=32, layers=("mamba3", "attention"), attn_heads=2, d_state=16, headdim=16)
    )
    before = model.fingerprint()
    with caplog.at_level(logging.INFO, "mamba3.convert"):
        choice = choose_decay(model, number_tokenizer(), ["1 2 3", "40 50", ""])
    assert model.fingerprint() == before
    assert model.layers[0].mixer.decay == "heavy_tail"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "too close to tell" in caplog.text
    assert choice.losses is not None
    assert choice.losses[choice.decay] == min(choice.losses.values())


def test_a_tokenizer_that_does_not_fit(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="not this model's"):
        load_official(tmp_path, tokenizer=number_tokenizer("64"))
    with pytest.raises(ValueError, match="There is no tokenizer at"):
        load_official(tmp_path, tokenizer=tmp_path / "missing.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_official(tmp_path)
    with pytest.raises(ValueError, match="no token to predict"):
        choose_decay(load_official(tmp_path, "softplus"), number_tokenizer(), ["", "7"])
    model = load_official(tmp_path, "softplus")
    with torch.no_grad():
        model.norm_f.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        choose_decay(model, number_tokenizer())


def test_the_bundled_sentences():
    documents = bundled_documents()
    assert len(documents) == 4
    assert sum(text.count(".") for text in documents) >= 30
    assert all(text.isascii() and "\n" not in text and "  " not in text for text in documents)


# -- and back


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_the_identity(tmp_path, name):
    model = load_official(GOLDEN / name, "softplus")
    save_official(model, tmp_path / "new")
    theirs, ours = (torch.load(folder / BIN) for folder in (GOLDEN / name, tmp_path / "new"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert ours["lm_head.weight"].data_ptr() == ours["backbone.embedding.weight"].data_ptr()
    again = load_official(tmp_path / "new")
    assert again.config == model.config
    assert again.fingerprint() == model.fingerprint()


def test_a_hybrid_in_bfloat16_there_and_back(tmp_path):
    config = Mamba3Config(
        vocab_size=50, d_model=32, layers=("mamba3", "attention", "mamba3"), d_intermediate=40, d_state=16, headdim=16,
        mimo_rank=1, mimo=True, rope_fraction=1.0, out_norm="pre_gate_grouped", attn_heads=4, attn_kv_heads=2,
        attn_out_bias=True, residual_in_fp32=False, tie_embeddings=False, pad_vocab_multiple=16, decay="softplus",
        A_floor=1e-3, dt_min=1e-2, expand=1.5, ngroups=3,
    )  # fmt: skip
    model = Mamba3LM(config, dtype=torch.bfloat16)
    save_official(model, tmp_path)
    again = load_official(tmp_path)
    assert again.config == config
    assert again.fingerprint() == model.fingerprint()
    assert all(a.dtype == b.dtype for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_models_that_the_official_one_cannot_express(tmp_path):
    small = {"vocab_size": 50, "d_model": 32, "layers": ("mamba3",), "d_state": 16, "headdim": 16}
    for settings, message in (({"norm_eps": 1e-6}, "eps 1e-05"), ({"lam": 1.0}, "lam is not learned")):
        with pytest.raises(ValueError, match=message):
            save_official(Mamba3LM(Mamba3Config(**{**small, **settings})), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameters"), [("siso-180m", 186_849_600), ("mimo-180m", 187_291_968)])
@torch.no_grad()
def test_the_smallest_published_size(tmp_path, name, parameters):
    model = Mamba3LM(preset(name), dtype=torch.bfloat16)
    assert model.num_parameters() == parameters
    save_official(model, tmp_path)
    saved = torch.load(tmp_path / BIN, mmap=True)
    assert saved["backbone.layers.11.mixer.in_proj.weight"].dtype == torch.bfloat16
    again = load_official(tmp_path)
    assert again.fingerprint() == model.fingerprint()
    input_ids = torch.randint(128_256, (1, 16))
    assert torch.equal(again(input_ids), model(input_ids))
