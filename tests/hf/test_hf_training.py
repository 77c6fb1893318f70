"""Training with the tools of the house next door: Trainer resumes bitwise, PEFT's LoRA, TRL on packed documents."""

import itertools
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from mamba3.hf import LORA_TARGETS
from tests.hf.cases import pair, tokens

pytest.importorskip("accelerate", reason="Trainer needs accelerate")
# Of libraries that were called, not of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

ARGUMENTS = {
    "use_cpu": True, "learning_rate": 1e-2, "report_to": "none", "logging_steps": 1, "disable_tqdm": True, "seed": 0,
    "dataloader_pin_memory": False,
}  # fmt: skip
WORDS = ("the state of a model is a matrix and the angle of its phase turns with every token it reads " * 3).split()
PERIOD = 7


def documents():
    """Counting modulo 7 from different starts: easily learnt, and not from a neighbour in the pack."""
    return [{"input_ids": [(start + t) % PERIOD for t in range(6 + start)]} for start in range(12)]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(folder, model, *, steps, resume=None, **settings):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=3, save_steps=3, **ARGUMENTS, **settings
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=documents(),
        data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def test_trainer_resumes_bitwise(tmp_path):
    """Packed, with checkpointing of activations: stopped after three steps, the rest is what it would have been."""
    settings = {"gradient_checkpointing": True, "lr_scheduler_type": "cosine"}
    _, whole = pair("hybrid", dtype=torch.float32)
    straight = train(tmp_path / "whole", whole, steps=6, **settings)
    assert losses(straight)[-1] < losses(straight)[0]
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    _, resumed = pair("hybrid", dtype=torch.float32, seed=5)
    again = train(tmp_path / "again", resumed, steps=6, resume=checkpoint, **settings)
    assert losses(again) == losses(straight)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "checkpoint-6")
    assert torch.equal(loaded.model.norm_f.weight, whole.model.norm_f.weight)


def test_trainer_evaluates_padded_batches(tmp_path):
    _, model = pair("siso", dtype=torch.float32)
    rows = [{"input_ids": d["input_ids"], "labels": d["input_ids"]} for d in documents()]

    def collate(features):
        width = max(len(f["input_ids"]) for f in features)
        rows = [f["input_ids"] + [0] * (width - len(f["input_ids"])) for f in features]
        mask = [[1] * len(f["input_ids"]) + [0] * (width - len(f["input_ids"])) for f in features]
        ids, mask = torch.tensor(rows), torch.tensor(mask)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_eval_batch_size=12, **ARGUMENTS)
    got = Trainer(model=model, args=arguments, eval_dataset=rows, data_collator=collate).evaluate()["eval_loss"]
    with torch.no_grad():
        alone = [(model(ids := torch.tensor([r["input_ids"]]), labels=ids).loss, ids.shape[1] - 1) for r in rows]
    assert got == pytest.approx(float(sum(a * n for a, n in alone) / sum(n for _, n in alone)), rel=1e-5)


def adapters(model, **settings):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM", **settings)


@pytest.mark.parametrize("kind", ["mimo", "hybrid"])
def test_lora(kind, tmp_path):
    """Adapters on every projection; they start as nothing, learn alone, are saved alone, and merge into the weights."""
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    _, model = pair(kind, dtype=torch.float32)
    ids = tokens(2, 12)
    before = model(ids).logits.detach()
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    tuned = peft.get_peft_model(model, adapters(model))
    wrapped = {
        name.split(".lora_A.")[0].rsplit(".", 1)[1] for name, _ in tuned.named_parameters() if ".lora_A." in name
    }
    assert wrapped == set(LORA_TARGETS)
    assert torch.equal(tuned(ids).logits, before)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=2e-2)
    first = None
    for _ in range(15):
        loss = tuned(ids, labels=ids).loss
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
        optimizer.step()
    assert loss.item() < 0.95 * first
    tuned.eval()
    after, written = tuned(ids).logits, tuned.generate(input_ids=ids, do_sample=False, max_new_tokens=8)
    tuned.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    _, again = pair(kind, dtype=torch.float32)
    assert torch.equal(peft.PeftModel.from_pretrained(again, tmp_path)(ids).logits, after)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, after, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.generate(ids, do_sample=False, max_new_tokens=8), written)
    kept = dict(merged.named_parameters())
    assert all(torch.equal(kept[n], p) for n, p in frozen.items() if n.split(".")[-2] not in LORA_TARGETS)


def word_tokenizer(folder):
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "<eos>", *sorted(set(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize("lora", [False, True])
def test_sft_trainer_on_packed_documents(lora, tmp_path):
    """TRL packs them; its positions tell the model where one begins. The loss falls, and is that of the documents alone."""
    trl = pytest.importorskip("trl", reason="SFTTrainer needs trl")
    datasets = pytest.importorskip("datasets", reason="SFTTrainer needs datasets")
    _, model = pair("siso", dtype=torch.float32, d_model=32)
    data = datasets.Dataset.from_list([{"text": " ".join(WORDS[i : i + 5 + i % 9])} for i in range(40)])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), packing=True, max_length=64, max_steps=12, per_device_train_batch_size=2,
        bf16=False, save_strategy="no", **ARGUMENTS,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=word_tokenizer(tmp_path / "tokenizer"),
        peft_config=adapters(model) if lora else None,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    marks = {name: v for name, v in batch.items() if name in ("position_ids", "seq_idx", "cu_seq_lens_q")}
    ids, labels = batch["input_ids"], batch["labels"]
    with torch.no_grad():
        packed = model(input_ids=ids, **marks).logits[0]
        cuts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
        alone = torch.cat([model(ids[:, a:b]).logits[0] for a, b in itertools.pairwise(cuts)])
    assert len(cuts) > 3 and ids.shape[0] == 1
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert labels is not None
    trainer.train()
    seen = losses(trainer)
    assert sum(seen[-3:]) < (0.95 if lora else 0.8) * sum(seen[:3])
    trainer.save_model(str(tmp_path / "out"))
    name = "adapter_config.json" if lora else "config.json"
    assert json.loads((tmp_path / "out" / name).read_text())
