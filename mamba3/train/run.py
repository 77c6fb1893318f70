"""A run folder from a corpus: tokenizer, tokens, model, checkpoints; new or resumed.

run/  run.json  tokenizer.json  data/<key>/  checkpoints/step-.../  metrics.jsonl  loss.png  model/
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from mamba3.lm import Mamba3Config, Mamba3LM
from mamba3.ops.state_file import replace_file
from mamba3.train import checkpoint
from mamba3.train.config import TrainConfig
from mamba3.train.corpus import Corpus, SplitCorpus
from mamba3.train.packing import Packing
from mamba3.train.report import METRICS, Reporter
from mamba3.train.store import Tokens, open_or_build
from mamba3.train.tokenizer import (
    DEFAULT_BPE_SIZE,
    FILE_NAME,
    byte_tokenizer,
    end_of_text,
    load_tokenizer,
    token_bytes,
    train_bpe,
)
from mamba3.train.trainer import CURVE, Trainer

RUN_CARD = "run.json"
MODEL = "model"


def prepare(
    corpus_path: str | Path,
    run: Path,
    config: TrainConfig,
    model_config: Callable[[int], Mamba3Config],
    *,
    start: Literal["auto", "resume", "restart"] = "auto",
    device: torch.device | str = "cpu",
    reporter: Reporter | None = None,
) -> Trainer:
    """The trainer of a run folder, ready to `run()`.

    Args:
        corpus_path: see `Corpus`.
        model_config: the model's configuration for the vocabulary size that the tokenizer turns out to have.
        start: "auto" resumes where the folder has a checkpoint and begins where it has none; "resume" demands one;
            "restart" removes what the folder holds of an earlier run (not the tokenised corpus).

    Raises ValueError for a corpus, tokenizer or configuration that cannot be used, for a folder that holds another run
    (the differing fields are named) and for a damaged checkpoint.
    """
    reporter = reporter or Reporter()
    resume_from = max(checkpoint.list_checkpoints(run), default=None) if start != "restart" else None
    if start == "resume" and resume_from is None:
        raise ValueError(
            f"a run to resume must hold a checkpoint, but {run} has none; leave out --resume to begin one."
        )
    corpus = SplitCorpus(
        Corpus(corpus_path, glob=config.glob, field=config.field), val_fraction=config.val_fraction, seed=config.seed
    )
    if corpus.corpus.skipped:
        names = ", ".join(corpus.corpus.skipped[:3])
        reporter.note(f"Passed over {len(corpus.corpus.skipped)} empty or non-text files ({names}, ...).")
    if resume_from is not None:
        checkpoint.verify(resume_from)
    tokenizer = _tokenizer(config, corpus, resume_from)
    vocabulary = tokenizer.get_vocab_size(with_added_tokens=True)
    shape = model_config(vocabulary)
    identity = {
        "train": config.trajectory() | {"tokenizer": _kind(config.tokenizer)},
        "model": json.loads(shape.to_json()),
        "corpus": corpus.contents,
        "tokens": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
    }
    if resume_from is not None:
        checkpoint.check_identity(checkpoint.read_card(resume_from).identity, identity, resume_from)
    model = _model(shape, config.seed, resume_from)
    if start == "restart":  # only now, when nothing that was asked for can turn out to be wrong
        _remove_run(run)
    run.mkdir(parents=True, exist_ok=True)
    replace_file(run / FILE_NAME, tokenizer.to_str(pretty=True).encode())
    replace_file(run / RUN_CARD, (json.dumps(identity, indent=2) + "\n").encode())
    store = open_or_build(corpus, tokenizer, run / "data", reporter.tokenising)
    reporter.note(
        f"{corpus.documents:,} documents, {corpus.bytes:,} bytes; vocabulary {vocabulary:,}; "
        f"{store.train.targets:,} training and {store.val.targets:,} held-out tokens."
    )

    def packed(data: Tokens) -> Packing:
        return Packing(data, seq_len=config.seq_len, batch_tokens=config.batch_tokens, seed=config.seed)

    return Trainer(
        model,
        config,
        run,
        train=packed(store.train),
        val=packed(store.val) if store.val.documents else None,
        token_sizes=token_bytes(tokenizer),
        identity=identity,
        extra_files=(run / FILE_NAME,),
        device=device,
        reporter=reporter,
        resume_from=resume_from,
    )


def export(trainer: Trainer) -> Path:
    """Write the model and its tokenizer, without what training needs, as `run/model`."""
    place = trainer.folder / MODEL
    trainer.model.save_pretrained(place)  # pyright: ignore[reportCallIssue]
    for file in trainer.extra_files:
        shutil.copy(file, place / file.name)
    return place


def _model(shape: Mamba3Config, seed: int, resume_from: Path | None) -> Mamba3LM:
    if resume_from is not None:
        return Mamba3LM.from_pretrained(resume_from)
    torch.manual_seed(seed)
    return Mamba3LM(shape)


def _kind(tokenizer: str) -> str:
    """The choice of a tokenizer without its path: a file that moved is the same file."""
    return tokenizer if tokenizer in ("byte", "bpe") else "file"


def _tokenizer(config: TrainConfig, corpus: SplitCorpus, resume_from: Path | None) -> Tokenizer:
    """The run's tokenizer. BPE is trained when the run begins and comes from the checkpoint ever after."""
    if config.tokenizer == "byte":
        tokenizer = byte_tokenizer()
    elif config.tokenizer != "bpe":
        tokenizer = load_tokenizer(config.tokenizer)
    elif resume_from is not None:
        tokenizer = load_tokenizer(resume_from)
    else:
        tokenizer = train_bpe(corpus.training_texts(), config.vocab_size or DEFAULT_BPE_SIZE)
    end_of_text(tokenizer)
    return tokenizer


def _remove_run(run: Path) -> None:
    for folder in (checkpoint.FOLDER, MODEL):
        shutil.rmtree(run / folder, ignore_errors=True)
    for file in (METRICS, CURVE, RUN_CARD, FILE_NAME):
        (run / file).unlink(missing_ok=True)
