"""A run folder from a corpus: tokenizer, tokens, model, checkpoints; new or resumed.

run/  run.json  tokenizer.json  data/<key>/  checkpoints/step-.../  metrics.jsonl  loss.png  model/
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tokenizers import Tokenizer

from mamba3.lm import Mamba3Config, Mamba3LM
from mamba3.ops.state_file import replace_file
from mamba3.text.settings import write_settings
from mamba3.train import checkpoint, memory
from mamba3.train.config import TrainConfig
from mamba3.train.corpus import Corpus, SplitCorpus
from mamba3.train.data import Data, resolved_micro_tokens
from mamba3.train.ranks import Ranks
from mamba3.train.report import METRICS, Reporter
from mamba3.train.saver import remove_abandoned
from mamba3.train.store import open_or_build, open_part
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


class _Ground(NamedTuple):
    """What the first rank laid out, as every rank needs it to make its trainer."""

    tokenizer: str
    store: Path
    shape: Mamba3Config
    identity: dict[str, Any]
    resume_from: Path | None


def prepare(
    corpus_path: str | Path,
    run: Path,
    config: TrainConfig,
    model_config: Callable[[int], Mamba3Config],
    *,
    start: Literal["auto", "resume", "restart"] = "auto",
    device: torch.device | str = "cpu",
    reporter: Reporter | None = None,
    ranks: Ranks | None = None,
) -> Trainer:
    """The trainer of a run folder, ready to `run()`.

    Args:
        corpus_path: see `Corpus`.
        model_config: the model's configuration for the vocabulary size that the tokenizer turns out to have.
        start: "auto" resumes where the folder has a checkpoint and begins where it has none; "resume" demands one;
            "restart" removes what the folder holds of an earlier run (not the tokenised corpus).
        ranks: of `mamba3.train.ranks.join`; the first one lays out the folder, the others wait.

    Raises ValueError for a corpus, tokenizer or configuration that cannot be used, for a configuration that does not fit
    into the memory, for a folder that holds another run (the differing fields are named) and for a damaged checkpoint.
    """
    reporter, ranks, device = reporter or Reporter(), ranks or Ranks(), torch.device(device)
    ground = ranks.from_first(lambda: _lay_out(corpus_path, run, config, model_config, start, device, reporter, ranks))
    tokenizer = Tokenizer.from_str(ground.tokenizer)
    torch.manual_seed(config.seed)
    val = open_part(ground.store, "val")
    return Trainer(
        Mamba3LM(ground.shape),
        config,
        run,
        data=Data(open_part(ground.store, "train"), val if val.documents else None, config, ranks),
        token_sizes=token_bytes(tokenizer),
        identity=ground.identity,
        extra_files=(run / FILE_NAME,),
        device=device,
        reporter=reporter,
        resume_from=ground.resume_from,
        ranks=ranks,
    )


def _lay_out(
    corpus_path: str | Path,
    run: Path,
    config: TrainConfig,
    model_config: Callable[[int], Mamba3Config],
    start: Literal["auto", "resume", "restart"],
    device: torch.device,
    reporter: Reporter,
    ranks: Ranks,
) -> _Ground:
    """Check everything that can be wrong, then write the tokenizer, the card and the tokens."""
    resume_from = max(checkpoint.list_checkpoints(run), default=None) if start != "restart" else None
    if start == "resume" and resume_from is None:
        raise ValueError(
            f"a run to resume must hold a checkpoint, but {run} has none; leave out --resume to begin one."
        )
    corpus = SplitCorpus(
        Corpus(corpus_path, glob=config.glob, field=config.field, split=config.split),
        val_fraction=config.val_fraction, seed=config.seed,
    )  # fmt: skip
    if corpus.corpus.skipped:
        names = ", ".join(corpus.corpus.skipped[:3])
        reporter.note(f"Passed over {len(corpus.corpus.skipped)} empty or non-text files ({names}, ...).")
    if resume_from is not None:
        checkpoint.verify(resume_from)
    tokenizer = _tokenizer(config, corpus, resume_from)
    vocabulary = tokenizer.get_vocab_size(with_added_tokens=True)
    shape, micro = model_config(vocabulary), resolved_micro_tokens(config, ranks)
    identity = {
        "train": config.trajectory() | {"tokenizer": _kind(config.tokenizer), "micro_tokens": micro},
        "model": json.loads(shape.to_json()),
        "corpus": corpus.contents,
        "tokens": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
    }
    if resume_from is not None:
        checkpoint.check_identity(checkpoint.read_card(resume_from).identity, identity, resume_from)
    _require_states_of_fixed_size(shape, config)
    with torch.device("meta"):
        Mamba3LM(shape)  # which checks what fits together
    memory.require(shape, config, micro, ranks, device)
    if start == "restart":  # only now, when nothing that was asked for can turn out to be wrong
        _remove_run(run)
    run.mkdir(parents=True, exist_ok=True)
    remove_abandoned(run)
    replace_file(run / FILE_NAME, tokenizer.to_str(pretty=True).encode())
    replace_file(run / RUN_CARD, (json.dumps(identity, indent=2) + "\n").encode())
    store = open_or_build(
        corpus, tokenizer, run / "data", reporter.tokenising, workers=config.workers, shard_tokens=config.shard_tokens
    )
    reporter.note(
        f"{corpus.documents:,} documents, {corpus.bytes:,} bytes; vocabulary {vocabulary:,}; "
        f"{store.train.targets:,} training and {store.val.targets:,} held-out tokens."
    )
    return _Ground(tokenizer.to_str(), run / "data" / store.key, shape, identity, resume_from)


def export(trainer: Trainer) -> Path:
    """Write the model and its tokenizer, without what training needs, as `run/model`; called when a run has ended."""
    place = trainer.folder / MODEL
    model = trainer.saver.whole_model(trainer.model)
    if model is not None:
        model.save_pretrained(place)  # pyright: ignore[reportCallIssue]
        for file in trainer.extra_files:
            shutil.copy(file, place / file.name)
        if (place / FILE_NAME).is_file():
            tokenizer = load_tokenizer(place)
            write_settings(place, tokenizer, end_of_text(tokenizer))
    return place


def _require_states_of_fixed_size(shape: Mamba3Config, config: TrainConfig) -> None:
    """What carries states from step to step or from rank to rank needs layers that a fixed state joins."""
    if config.layout == "carry" and "attention" in shape.layers:
        raise ValueError(
            "layout = 'carry' needs layers whose state has a fixed size, but this model has attention layers, whose cache "
            "would grow with every step; take layout 'packed', or layers of kind mamba3 alone."
        )
    if config.context_parallel > 1 and ("attention" in shape.layers or shape.d_conv):
        odd = "attention layers" if "attention" in shape.layers else f"a short convolution (d_conv = {shape.d_conv})"
        raise ValueError(
            f"context_parallel = {config.context_parallel} needs layers that a fixed state joins, but this model has {odd}; "
            "set context_parallel to 1, or leave that out of the model."
        )


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
