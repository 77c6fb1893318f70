"""Folders: one layout for `Mamba3LM` and for transformers, in every dtype, sharded or not; and folders that are none."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from mamba3 import LMState, Mamba3LM
from mamba3.hf import Mamba3LMConfig, Mamba3LMForCausalLM, Mamba3LMModel
from mamba3.train import TrainConfig, export, prepare
from tests.hf.cases import EVERY_SETTING, KINDS, pair, tokens
from tests.lm.test_model import tiny
from tests.ops.cases import distance
from tests.train.test_trainer import shape

SETTINGS = [*((kind, {}) for kind in KINDS), ("siso", EVERY_SETTING)]


@pytest.mark.parametrize(("kind", "changes"), SETTINGS)
def test_either_side_reads_what_the_other_wrote(kind, changes, tmp_path):
    lm = tiny(kind, dtype=torch.float32, **changes)
    lm.save_pretrained(tmp_path / "lm")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert isinstance(model, Mamba3LMForCausalLM) and not model.training
    model.save_pretrained(tmp_path / "hf")
    back = Mamba3LM.from_pretrained(tmp_path / "hf")
    assert back.config == lm.config == model.config.to_mamba3()
    assert back.fingerprint() == lm.fingerprint() == model.to_mamba3().fingerprint()
    ids = tokens(2, 9)
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(ids).logits)
    base = AutoModel.from_pretrained(tmp_path / "hf")
    assert isinstance(base, Mamba3LMModel)
    assert torch.equal(base(ids)[0], model(ids, output_hidden_states=True).hidden_states[-1])


def test_shards(tmp_path):
    _, model = pair("hybrid", dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, "auto"])
def test_dtypes(name, dtype, tmp_path):
    """The parameters of the recurrence stay float32 in 16 bits, as in a layer that is built so; auto is the file's."""
    lm = tiny("mimo", dtype=torch.bfloat16)
    lm.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **{name: dtype})
    want = torch.bfloat16 if dtype == "auto" else dtype
    built = Mamba3LM(lm.config, dtype=want)
    built.lm_head = None
    assert {n: p.dtype for n, p in built.named_parameters()} == {n: p.dtype for n, p in model.model.named_parameters()}
    assert model.dtype == want
    if want == torch.bfloat16:
        assert distance(model(tokens(1, 9)).logits, lm(tokens(1, 9))[..., :50]) == 0
        model.save_pretrained(tmp_path / "again")
        assert Mamba3LM.from_pretrained(tmp_path / "again").fingerprint() == lm.fingerprint()


def test_from_config_starts_as_a_language_model_does():
    torch.manual_seed(3)
    lm = Mamba3LM(tiny("hybrid").config)
    model = AutoModelForCausalLM.from_config(Mamba3LMConfig.from_mamba3(lm.config))
    mine, theirs = dict(model.model.named_parameters()), dict(lm.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, p in theirs.items():
        assert mine[name].std().item() == pytest.approx(p.std().item(), rel=0.5, abs=1e-3), name
    assert Mamba3LMConfig().to_mamba3().d_model == 768


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_resized_embeddings(tied, tmp_path):
    _, model = pair("siso", dtype=torch.float32, tie_embeddings=tied)
    assert (model.lm_head.weight is model.model.embedding.weight) == tied
    before = model(tokens(1, 6)).logits
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        model(torch.tensor([[1, 60]]))
    model.resize_token_embeddings(61, mean_resizing=False)
    assert model.config.vocab_size == 61 and model.model.embedding.weight.shape == model.lm_head.weight.shape == (
        64,
        16,
    )
    assert (model.lm_head.weight is model.model.embedding.weight) == tied
    logits = model(torch.tensor([[1, 60]])).logits
    assert logits.shape == (1, 2, 61)
    assert torch.equal(model(tokens(1, 6)).logits[..., :50], before)
    assert 0.01 < model.model.embedding.weight[56:].std() < 0.03
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(torch.tensor([[1, 60]])).logits, logits)
    assert distance(Mamba3LM.from_pretrained(tmp_path)(torch.tensor([[1, 60]]))[..., :61], logits) == 0
    model.resize_token_embeddings(70, pad_to_multiple_of=32)
    assert model.config.to_mamba3().padded_vocab_size == len(model.model.embedding.weight) == 96
    assert model.resize_token_embeddings() is model.model.embedding


def test_the_configuration_makes_a_round_trip(tmp_path):
    config = Mamba3LMConfig.from_mamba3(tiny("hybrid", **EVERY_SETTING).config, bos_token_id=1, eos_token_id=[2, 3])
    config.something_a_tool_hung_on_it = object()
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, Mamba3LMConfig)
    assert again.to_mamba3() == config.to_mamba3() and again.eos_token_id == [2, 3]
    assert (again.hidden_size, again.num_hidden_layers, again.tie_word_embeddings) == (16, 3, False)
    again.tie_word_embeddings = True
    assert again.to_mamba3().tie_embeddings
    assert Mamba3LMConfig(**{**config.to_dict(), "tie_word_embeddings": True}).tie_embeddings


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def tensors(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


BAD = {
    "a newer configuration": (
        lambda d: change(d / "config.json", d_memory=3),
        "unknown fields: d_memory.*newer mamba3",
    ),
    "a wrong setting": (lambda d: change(d / "config.json", decay="linear"), "decay must be one of"),
    "no layers": (lambda d: change(d / "config.json", layers=[]), "layers must name"),
    "no configuration": (lambda d: (d / "config.json").unlink(), "no config.json of a mamba3_lm"),
    "a broken configuration": (lambda d: (d / "config.json").write_text("{"), "config.json.*not a valid JSON"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "a cut shard": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
        "model.safetensors.*damaged or truncated",
    ),
    "a missing tensor": (
        lambda d: tensors(d, lambda w: w.pop("layers.1.mixer.D")),
        "missing model.layers.1.mixer.D. Restore",
    ),
    "an unknown tensor": (lambda d: tensors(d, lambda w: w.update(extra=torch.ones(2))), "unknown extra"),
    "a tensor of NaN": (lambda d: tensors(d, lambda w: w["norm_f.weight"].fill_(torch.nan)), "norm_f.weight holds NaN"),
    "a misshapen tensor": (
        lambda d: tensors(d, lambda w: w.update({"norm_f.weight": torch.ones(2)})),
        r"norm_f.weight has shape \(2,\), not \(16,\)",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_folders_are_told(fault, tmp_path):
    tiny("siso", dtype=torch.float32).save_pretrained(tmp_path)
    spoil, message = BAD[fault]
    spoil(tmp_path)
    with pytest.raises((ValueError, OSError, RuntimeError), match=f"(?s){message}"):
        Mamba3LMForCausalLM.from_pretrained(tmp_path)


def test_a_missing_shard(tmp_path):
    _, model = pair("siso", dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises((ValueError, OSError), match=gone.name):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_folder_of_another_model(tmp_path):
    tiny("siso", dtype=torch.float32).save_pretrained(tmp_path)
    change(tmp_path / "config.json", model_type="gpt2")
    with pytest.raises(ValueError, match="is of a gpt2 model"):
        Mamba3LM.from_pretrained(tmp_path)


def test_a_conversation_saved_on_one_side_goes_on_on_the_other(tmp_path):
    lm, model = pair("hybrid", dtype=torch.float32)
    out = model.generate(tokens(1, 5), do_sample=False, max_new_tokens=6, return_dict_in_generate=True)
    out.past_key_values.state.save(tmp_path / "state.safetensors", model.to_mamba3())
    state = LMState.load(tmp_path / "state.safetensors", lm)
    more = lm.generate(out.sequences[:, -1:], state=state, max_new_tokens=6).tokens
    assert torch.equal(more, model.generate(tokens(1, 5), do_sample=False, max_new_tokens=12)[:, 11:])


def test_what_training_writes_is_read_with_its_tokenizer_and_padded(tmp_path):
    """The folder that a training run leaves needs nothing added: AutoTokenizer pads for it, and padding changes nothing."""
    (tmp_path / "a.txt").write_text("the state of a model turns with every token it reads\n" * 40)
    config = TrainConfig(steps=1, warmup_steps=0, seq_len=16, batch_tokens=48, eval_every=1, eval_tokens=16)
    run = prepare(tmp_path / "a.txt", tmp_path / "run", config, shape)
    run.run()
    folder = export(run)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    batch = tokenizer(["the state", "a"], return_tensors="pt", padding=True, padding_side="left")
    got = model.generate(**batch, max_new_tokens=8, do_sample=False)[1, -8:]
    alone = tokenizer("a", return_tensors="pt")
    assert torch.equal(got, model.generate(**alone, max_new_tokens=8, do_sample=False)[0, -8:])
