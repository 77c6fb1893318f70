"""Every choice of a training run that is not the model's shape, in one frozen value with a JSON round trip."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

# A run may be resumed with other values of these: they do not change a loss.
_BOOKKEEPING = (
    "eval_every",
    "eval_tokens",
    "save_every",
    "keep",
    "workers",
    "shard_tokens",
    "tensorboard",
    "parallel",
    "graph",
)
LAYOUTS = ("packed", "rows", "carry")
SCHEDULES = ("cosine", "wsd")
PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. The corpus is a path beside it, the model's shape a `Mamba3Config` beside it.

    Raises ValueError, naming the field, its law and what came, for a value that cannot be used.
    """

    # Data
    glob: str = ""  # which files of a folder, by name, such as "*.py"; "" takes every text file
    field: str = "text"  # the key of a JSON line, or the column of a dataset, that holds a document
    split: str = "train"  # which split of a dataset of the hub
    tokenizer: str = "byte"  # "byte", "bpe" (trained on the training documents) or the path of a tokenizer.json
    vocab_size: int | None = None  # size of a trained BPE vocabulary, at least 257; None is 4096; nothing else takes it
    val_fraction: float = 0.05  # share of the corpus's bytes that is held out, in [0, 1); 0 trains without validation
    workers: int = (
        0  # processes that tokenise; 0: one a core for a large corpus, threads of this process for a small one
    )
    shard_tokens: int = 1 << 27  # tokens of one memory-mapped file; a longer document is an error
    layout: str = "packed"  # "packed": pieces of documents end to end, each from the zero state; "rows": dense rows of
    # seq_len tokens, each within one document; "carry": rows that go on in the next step, their state carried (truncated BPTT)
    seq_len: int = 512  # a longer document is cut into pieces of this many tokens
    batch_tokens: int = 4096  # tokens of one step, over all ranks
    micro_tokens: int = 0  # tokens of one forward pass of one rank; 0: what a rank has of a step, in one pass
    seed: int = 0  # initial weights, held-out documents and the order of the data

    # Optimisation
    steps: int = 1000  # optimizer steps of the whole run
    lr: float = 2e-3  # peak learning rate, reached after the warm-up
    schedule: str = "cosine"  # after the warm-up: "cosine", or "wsd", constant and then a linear fall
    warmup_steps: int = 50  # steps of linear rise to the peak, fewer than `steps`
    decay_fraction: float = 0.2  # share of the steps in which "wsd" falls, in (0, 1]
    min_lr_fraction: float = 0.1  # where the schedule ends, as a share of the peak, in [0, 1]
    weight_decay: float = 0.1  # decoupled; never on dt_bias, D, norm weights and other vectors
    decay_bc_bias: bool = False  # whether weight decay also takes hold of B_bias and C_bias
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's two averages, each in [0, 1)
    eps: float = 1e-8  # AdamW's denominator floor
    clip_norm: float = 1.0  # the gradient's global norm is cut to this; 0 does not cut
    dtype: str = "float32"  # of the forward pass: "float32", or "bfloat16" by autocast; parameters stay float32
    spike: float = 10.0  # a loss this many standard deviations above the last ones' mean is skipped; 0 never
    max_skipped: int = (
        10  # steps skipped one after another, for a spike or a number that is not finite, before the run ends
    )
    recompute: bool = False  # activation checkpointing: a block's activations are computed again in the backward pass
    compile: bool = False  # torch.compile what surrounds the scan
    graph: bool = (
        False  # on one GPU with layout "rows": a forward and backward pass is one CUDA graph, launched at once
    )

    # Ranks of torchrun
    parallel: str = "ddp"  # "ddp": every rank holds the model; "fsdp": parameters, gradients and averages are sharded
    context_parallel: int = 1  # ranks that share one sequence, each a part of it; must divide the ranks

    # Bookkeeping
    eval_every: int = 100  # steps between validations; 0 is first and last only
    eval_tokens: int = 65_536  # tokens a validation reads at most; 0 reads all
    save_every: int = 100  # steps between checkpoints; 0 is the last step only
    keep: int = 2  # newest checkpoints that stay on disk, at least 1
    tensorboard: bool = False  # also write the figures for TensorBoard, into run/tensorboard

    def __post_init__(self) -> None:
        if isinstance(self.betas, list):  # JSON has no tuples
            object.__setattr__(self, "betas", tuple(self.betas))
        _check_types(self)
        _check_ranges(self)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"a training configuration has no field {', '.join(map(repr, unknown))}; its fields are {', '.join(known)}."
            )
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> "TrainConfig":
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a training configuration must be JSON, but {error}; correct it there.") from error
        if not isinstance(values, dict):
            raise ValueError(f"a training configuration must be a JSON object but came as {type(values).__name__}.")
        return cls.from_dict(values)

    def trajectory(self) -> dict[str, Any]:
        """The fields that decide the losses: two runs that agree here, in model, data and ranks have the same losses."""
        plain = json.loads(self.to_json())
        return {name: value for name, value in plain.items() if name not in _BOOKKEEPING}


def _check_types(config: TrainConfig) -> None:
    for name, hint in get_type_hints(TrainConfig).items():
        value = getattr(config, name)
        if name == "betas":
            fits = isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, float | int) for v in value)
        else:
            kinds = get_args(hint) or (hint,)
            kinds += (int,) if float in kinds else ()
            fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if not fits:
            wanted = getattr(hint, "__name__", hint)
            raise ValueError(f"{name} must be of type {wanted} but came as {value!r}; correct it.")


def _check_ranges(config: TrainConfig) -> None:
    laws = {
        "val_fraction": (0 <= config.val_fraction < 1, "at least 0 and below 1"),
        "seq_len": (config.seq_len >= 1, "at least 1"),
        "batch_tokens": (config.batch_tokens >= config.seq_len, f"at least seq_len = {config.seq_len}"),
        "micro_tokens": (
            config.micro_tokens == 0 or (config.micro_tokens > 0 and config.batch_tokens % config.micro_tokens == 0),
            f"0 or a divisor of batch_tokens = {config.batch_tokens}",
        ),
        "workers": (config.workers >= 0, "at least 0"),
        "shard_tokens": (config.shard_tokens >= 2, "at least 2"),
        "layout": (config.layout in LAYOUTS, f"one of {', '.join(LAYOUTS)}"),
        "schedule": (config.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        "decay_fraction": (0 < config.decay_fraction <= 1, "above 0 and at most 1"),
        "spike": (config.spike >= 0, "at least 0"),
        "max_skipped": (config.max_skipped >= 1, "at least 1"),
        "parallel": (config.parallel in PARALLEL, f"one of {', '.join(PARALLEL)}"),
        "context_parallel": (config.context_parallel >= 1, "at least 1"),
        "seed": (config.seed >= 0, "at least 0"),
        "steps": (config.steps >= 1, "at least 1"),
        "lr": (config.lr > 0, "above 0"),
        "warmup_steps": (0 <= config.warmup_steps < config.steps, f"at least 0 and below steps = {config.steps}"),
        "min_lr_fraction": (0 <= config.min_lr_fraction <= 1, "between 0 and 1"),
        "weight_decay": (config.weight_decay >= 0, "at least 0"),
        "betas": (all(0 <= beta < 1 for beta in config.betas), "two numbers, each at least 0 and below 1"),
        "eps": (config.eps > 0, "above 0"),
        "clip_norm": (config.clip_norm >= 0, "at least 0"),
        "dtype": (config.dtype in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
        "eval_every": (config.eval_every >= 0, "at least 0"),
        "eval_tokens": (config.eval_tokens >= 0, "at least 0"),
        "save_every": (config.save_every >= 0, "at least 0"),
        "keep": (config.keep >= 1, "at least 1"),
        "vocab_size": (
            config.vocab_size is None or config.vocab_size >= 257,
            "at least 257: 256 bytes and the end of text",
        ),
    }
    for name, (holds, law) in laws.items():
        if not holds:
            raise ValueError(f"{name} must be {law}, but came as {getattr(config, name)!r}.")
    micro = config.micro_tokens or config.batch_tokens
    if config.layout != "packed" and (micro % config.seq_len or config.batch_tokens % config.seq_len):
        raise ValueError(
            f"with layout = {config.layout!r} micro_tokens and batch_tokens must be multiples of seq_len = "
            f"{config.seq_len}, whole rows, but are {config.micro_tokens} and {config.batch_tokens}; change one of them."
        )
    if config.context_parallel > 1 and config.layout != "packed":
        raise ValueError(
            f"context_parallel = {config.context_parallel} spreads the packed line of tokens over ranks, but layout is "
            f"{config.layout!r}; set layout to 'packed'."
        )
    if config.vocab_size is not None and config.tokenizer != "bpe":
        raise ValueError(
            f"vocab_size = {config.vocab_size} belongs to a tokenizer that is trained here, but tokenizer is "
            f"{config.tokenizer!r}; leave vocab_size out or set tokenizer to 'bpe'."
        )
