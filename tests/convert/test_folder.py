"""Laws of converting folders: there and back is the identity bit for bit, and what fails leaves nothing behind."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from mamba3 import Mamba3Config, Mamba3LM, preset
from mamba3.cli import main
from mamba3.convert import config_from_official, convert_folder, load_official, read_model
from mamba3.convert.files import read_weights
from mamba3.convert.folder import fixed_input
from mamba3.convert.layouts import ARCHITECTURE, LAYOUTS, MODEL_TYPE
from mamba3.train.tokenizer import byte_tokenizer
from tests.convert.official import oracle_model, random_model

CONFIG = {
    "d_model": 32, "d_intermediate": 48, "n_layer": 2, "vocab_size": 300, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True, "attn_layer_idx": [], "attn_cfg": {},
    "ssm_cfg": {"layer": "Mamba3", "d_state": 16, "headdim": 16, "decay": "softplus"},
}  # fmt: skip
MIMO = {"is_mimo": True, "mimo_rank": 2}
KINDS = {
    "siso": CONFIG,
    "mimo": {**CONFIG, "ssm_cfg": {**CONFIG["ssm_cfg"], **MIMO}},
    "hybrid": {**CONFIG, "attn_layer_idx": [1], "attn_cfg": {"causal": True, "num_heads": 4}},
    "untied": {**CONFIG, "tie_embeddings": False},
}


def official(folder, config=CONFIG, dtype=torch.bfloat16, tokenizer=True):
    """A folder in the official layout, and its weights."""
    folder.mkdir(parents=True)
    weights = random_model(config, dtype=dtype)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights, folder / "pytorch_model.bin")
    if tokenizer:
        byte_tokenizer().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder, weights


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [None, "9KB"])
def test_all_the_way_round_is_the_identity(tmp_path, kind, limit):
    """official -> ours -> transformers -> official: every tensor, in the dtype of its file; every file of the tokenizer."""
    source, weights = official(tmp_path / "official", KINDS[kind])
    # what a model keeps wider than its matrices may lie in the file in either width
    weights["backbone.layers.0.mixer.dt_bias"] = weights["backbone.layers.0.mixer.dt_bias"].float() + 1e-6
    torch.save(weights, source / "pytorch_model.bin")
    before = source
    for layout in ("mamba3", "transformers", "official"):
        done = convert_folder(before, tmp_path / f"as {layout}", layout, max_shard_size=limit)
        assert done.target == layout and done.difference == 0 and done.scale > 0
        assert done.tokenizer == ("tokenizer.json", "tokenizer_config.json")
        before = tmp_path / f"as {layout}"
        for name in done.tokenizer:
            assert (before / name).read_bytes() == (source / name).read_bytes()
        assert (before / "model.safetensors.index.json").exists() == (limit is not None)
    read, _ = read_weights(before)
    if limit is not None and KINDS[kind]["tie_embeddings"]:
        read["lm_head.weight"] = read["backbone.embedding.weight"]  # safetensors holds a tied tensor once
    same(read, weights)
    assert read_model(before).model.config == read_model(source).model.config
    ours = read_model(tmp_path / "as mamba3")
    assert ours.model.fingerprint() == Mamba3LM.from_pretrained(tmp_path / "as mamba3").fingerprint()
    same(read_weights(tmp_path / "as transformers")[0], read_weights(tmp_path / "as mamba3")[0])


@torch.no_grad()
def test_every_layout_computes_what_the_oracle_does(tmp_path):
    """The order of state channels is undone, not merely carried along: each folder against the independent oracle."""
    source, weights = official(tmp_path / "0", KINDS["mimo"], torch.float64)
    input_ids = fixed_input(300)[:, :9]
    expected = oracle_model(KINDS["mimo"], weights, input_ids, "softplus")
    for layout in LAYOUTS:
        convert_folder(source, tmp_path / layout, layout)
        loaded = read_model(tmp_path / layout)
        assert (loaded.layout, loaded.choice.decay) == (layout, "softplus")
        torch.testing.assert_close(loaded.model(input_ids), expected, rtol=1e-10, atol=1e-10)


def test_transformers_is_told_what_it_needs(tmp_path):
    source, _ = official(tmp_path / "0")
    (source / "tokenizer_config.json").unlink()
    convert_folder(source, tmp_path / "1", "transformers")
    values = json.loads((tmp_path / "1" / "config.json").read_text())
    assert (values["model_type"], values["architectures"], values["dtype"]) == (MODEL_TYPE, [ARCHITECTURE], "bfloat16")
    assert values["eos_token_id"] == 256
    described = json.loads((tmp_path / "1" / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert described["eos_token"] == described["pad_token"] == "<|endoftext|>"


def test_a_dtype_rounds_the_matrices_and_spares_the_recurrence(tmp_path):
    source, weights = official(tmp_path / "0", dtype=torch.float64)
    half = convert_folder(source, tmp_path / "1", "official", dtype=torch.bfloat16)
    assert 0 < half.difference < 0.2 * half.scale
    read, _ = read_weights(tmp_path / "1")
    name = "backbone.layers.1.mixer."
    assert torch.equal(read[name + "in_proj.weight"], weights[name + "in_proj.weight"].bfloat16())
    assert torch.equal(read[name + "dt_bias"], weights[name + "dt_bias"].float())
    wide = convert_folder(tmp_path / "1", tmp_path / "2", dtype=torch.float32)
    assert wide.difference == 0
    assert {v.dtype for v in read_weights(tmp_path / "2")[0].values()} == {torch.float32}
    same(read_weights(convert(tmp_path / "2", tmp_path / "3", "official", dtype=torch.bfloat16))[0], read)


def convert(source, target, *arguments, **settings):
    convert_folder(source, target, *arguments, **settings)
    return target


def test_the_check_finds_a_result_that_differs(tmp_path, monkeypatch):
    """The difference printed is measured on the files: with a conversion that leaves the channels alone it is not zero."""
    source, _ = official(tmp_path / "0")
    assert convert_folder(source, tmp_path / "1").difference == 0
    monkeypatch.setattr("mamba3.convert.layouts.reordered", lambda weights, layer, official: {})
    assert convert_folder(source, tmp_path / "2").difference > 1e-2


# -- what goes wrong


def failing(tmp_path, source, match, error=ValueError, **settings):
    """The conversion raises, and the folder of the target is as empty as before, hidden files included."""
    place = tmp_path / "results"
    place.mkdir(exist_ok=True)
    before = sorted(p.name for p in place.iterdir())
    with pytest.raises(error, match=match):
        convert_folder(source, place / "to", **settings)
    assert sorted(p.name for p in place.iterdir()) == before


def test_sources_that_are_not_right(tmp_path):
    source, _ = official(tmp_path / "source")

    def variant(name, change):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        change(folder)
        return folder

    def config(**values):
        return lambda folder: (folder / "config.json").write_text(json.dumps({**CONFIG, **values}))

    cut = variant("cut", lambda f: (f / "pytorch_model.bin").write_bytes(b"PK" * 99))
    failing(tmp_path, cut, r"pytorch_model\.bin is damaged")
    failing(
        tmp_path, variant("empty", lambda f: (f / "config.json").unlink()), r"is no model: it has no config\.json.*Give"
    )
    failing(
        tmp_path,
        variant("bare", lambda f: (f / "pytorch_model.bin").unlink()),
        "has no weights; there should be one of",
    )
    other = variant("llama", lambda f: (f / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}'))
    failing(tmp_path, other, r"no Mamba-3 language model.*it is of llama\. Known are")
    failing(tmp_path, variant("newer", config(moe_cfg={})), "no field moe_cfg")
    failing(tmp_path, variant("mixed", config(decay="heavy_tail")), "names two activations of A.*keep one")
    failing(
        tmp_path,
        variant("relu", config(ssm_cfg={"layer": "Mamba3", "decay": "relu"})),
        "must be one of heavy_tail, soft",
    )
    failing(tmp_path, source, "a layout is one of|A layout is one of", layout="gguf")
    failing(tmp_path, source, "positive number of bytes", max_shard_size="many")
    failing(tmp_path, source, "no tokenizer at", tokenizer=tmp_path / "nowhere.json")
    small = variant("small", config(vocab_size=200))
    torch.save(random_model({**CONFIG, "vocab_size": 200}), small / "pytorch_model.bin")
    failing(tmp_path, small, r"goes up to token 256 and the model has embeddings for 208; give the tokenizer that")
    odd = Mamba3LM(Mamba3Config(vocab_size=300, d_model=16, layers=("mamba3",), d_state=8, headdim=8, lam=0.5))
    odd.save_pretrained(tmp_path / "odd")
    failing(tmp_path, tmp_path / "odd", "lam is not learned", layout="official")


def test_our_own_and_transformers_folders_that_are_not_right(tmp_path):
    source, _ = official(tmp_path / "source")
    for layout in ("mamba3", "transformers"):
        good = convert(source, tmp_path / layout, layout, max_shard_size="9KB")
        values = json.loads((good / "config.json").read_text())
        (good / "config.json").write_text(json.dumps({**values, "flux_capacity": 3}))
        failing(tmp_path, good, "flux_capacity.*newer mamba3")
        (good / "config.json").write_text(json.dumps({**values, "decay": "relu"}))
        failing(tmp_path, good, "'relu'")
        (good / "config.json").write_text(json.dumps(values))
        shard = good / "model-00001-of-00009.safetensors"
        shard = shard if shard.exists() else next(good.glob("model-*"))
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-9])
        failing(tmp_path, good, f"{shard.name} is damaged or truncated")
        shard.unlink()
        failing(tmp_path, good, f"names {shard.name}, which is missing")


def test_a_class_around_the_model_may_put_a_prefix_before_the_names(tmp_path):
    good = convert(official(tmp_path / "0")[0], tmp_path / "1", "transformers")
    weights = load_file(good / "model.safetensors")
    save_file({f"model.{name}": value for name, value in weights.items()}, good / "model.safetensors")
    same(read_weights(convert(good, tmp_path / "2"))[0], weights)


def test_a_target_that_is_there(tmp_path):
    source, _ = official(tmp_path / "source")
    target = tmp_path / "to"
    target.mkdir()
    convert_folder(source, target)  # an empty folder is as good as none
    with pytest.raises(ValueError, match=r"holds a model already; give another folder, or overwrite"):
        convert_folder(source, target)
    before = (target / "config.json").read_bytes()
    with pytest.raises(ValueError, match="lam is not learned"):
        odd = Mamba3LM(Mamba3Config(vocab_size=300, d_model=16, layers=("mamba3",), d_state=8, headdim=8, lam=0.5))
        odd.save_pretrained(tmp_path / "odd")
        convert_folder(tmp_path / "odd", target, "official", overwrite=True)
    assert (target / "config.json").read_bytes() == before, "the model that was there stays when the new one fails"
    convert_folder(source, target, "transformers", overwrite=True, max_shard_size="9KB")
    assert not (target / "model.safetensors").exists()
    for place, law in ((source, "is the source itself"), (tmp_path, "is no model folder")):
        with pytest.raises(ValueError, match=law):
            convert_folder(source, place, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["odd", "source", "to"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    source, _ = official(tmp_path / "source")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mamba3.convert.folder.shards.write", full)
    failing(tmp_path, source, "No space left", OSError)


# -- the same model under two descriptions


def test_the_published_configuration_and_the_preset_are_one_model():
    """1264 inner channels are stored as 1280, and 128,256 tokens are a multiple of 8 and of 16: one fingerprint."""
    ssm = {"layer": "Mamba3", "is_mimo": True, "mimo_rank": 4}
    values = {"vocab_size": 128_256, "d_model": 768, "n_layer": 12, "ssm_cfg": ssm, "pad_vocab_size_multiple": 16}
    published = config_from_official({**values, "d_intermediate": 1264}, "heavy_tail")
    ours = preset("mimo-180m")
    assert published != ours and published.canonical() == ours.canonical()
    with torch.device("meta"):
        assert Mamba3LM(published).fingerprint() == Mamba3LM(ours).fingerprint()
        other = preset("mimo-180m", d_intermediate=1281)
        assert Mamba3LM(other).fingerprint() != Mamba3LM(ours).fingerprint()


def test_a_padding_that_matters_is_told_apart():
    small = {"d_model": 16, "layers": ("mamba3",), "vocab_size": 50}
    padded = [Mamba3Config(**small, pad_vocab_multiple=m).canonical() for m in (1, 2, 8, 14, 16, 64)]
    assert [c.padded_vocab_size for c in padded] == [50, 50, 56, 56, 64, 64]
    assert padded[0] == padded[1] != padded[2] == padded[3] != padded[4] == padded[5]


# -- at full size


def word_tokenizer(size):
    """Token i is the word "w<i>", but for the last, which ends a text: every token of a large vocabulary can be seen."""
    vocabulary = {f"w{i}": i for i in range(size - 1)} | {"<|end_of_text|>": size - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "parameters"), [("siso", 186_849_600), ("mimo", 187_291_968)])
def test_the_whole_path_at_the_smallest_published_size(tmp_path, capsys, kind, parameters):
    """A folder as published (bf16, 128,256 tokens) but for its random weights: convert, check, generate, and back."""
    ssm = {"layer": "Mamba3", "d_state": 128, "headdim": 64, "rope_fraction": 0.5, "chunk_size": 64}
    ssm |= {"is_mimo": True, "mimo_rank": 4} if kind == "mimo" else {}
    config = {
        **CONFIG, "d_model": 768, "d_intermediate": 1536 if kind == "siso" else 1264, "n_layer": 12, "ssm_cfg": ssm,
        "vocab_size": 128_256,
    }  # fmt: skip
    source, weights = official(tmp_path / "published", config)
    word_tokenizer(config["vocab_size"]).save(str(source / "tokenizer.json"))

    def run(*arguments):
        with pytest.raises(SystemExit) as exit:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert not exit.value.code, err
        return out

    said = run("convert", source, tmp_path / "ours", "--decay", "heavy_tail")
    assert f"{parameters:,} parameters" in said and "between source and result: 0 " in said
    said = run("convert", tmp_path / "ours", tmp_path / "hf", "--to", "transformers", "--max-shard-size", "100MB")
    assert "between source and result: 0 " in said and len(list((tmp_path / "hf").glob("model-*"))) == 3
    said = run("convert", tmp_path / "hf", tmp_path / "back", "--to", "official")
    assert "between source and result: 0 " in said
    same(read_weights(tmp_path / "back")[0], weights)
    greedy = ["--prompt", "w7 w100000", "--max-new-tokens", 4, "--temperature", 0]
    texts = {run("generate", "--model", tmp_path / name, *greedy) for name in ("ours", "hf", "back")}
    texts.add(run("generate", "--model", source, "--decay", "heavy_tail", *greedy))
    assert len(texts) == 1 and len(re.findall(r"w\d+", texts.pop())) == 4
    assert load_official(tmp_path / "back").fingerprint() == Mamba3LM.from_pretrained(tmp_path / "ours").fingerprint()
