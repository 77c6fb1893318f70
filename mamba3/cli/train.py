"""`mamba3 train`: a corpus and a few numbers into a run folder."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mamba3.cli.console import console, errors
from mamba3.train.config import TrainConfig
from mamba3.train.recipes import MODEL_OPTIONS, RECIPES, read_recipe

if TYPE_CHECKING:
    from mamba3.lm import Mamba3Config
    from mamba3.train import Trainer

_DEFAULT = TrainConfig()
_DATA, _MODEL, _OPTIMISATION, _RUN = "Data", "Model", "Optimisation", "Run"
# The model of `mamba3 train` without a preset: small enough for a laptop's processor.
_SMALL: dict[str, Any] = {"d_model": 256, "d_state": 64, "headdim": 64}
_SMALL_LAYERS = 4


def _setting(field: str, help: str, panel: str) -> Any:
    """An option for a field of TrainConfig: absent means the configuration file's value, or the field's default."""
    return typer.Option(
        help=f"{help} (default: {_shown(getattr(_DEFAULT, field))})", show_default=False, rich_help_panel=panel
    )


def _recipes() -> str:
    return "where settings come from: " + "; ".join(f"{name}, {recipe.purpose}" for name, recipe in RECIPES.items())


def _shown(value: object) -> str:
    return "every text file" if value == "" else "4096" if value is None else str(value)


def _shape(help: str) -> Any:
    return typer.Option(help=help, show_default=False, rich_help_panel=_MODEL)


def train(
    corpus: Annotated[
        Path | None, typer.Argument(help="a text file, a folder, JSON lines, or a dataset: hf:NAME or hf:NAME:CONFIG")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help=_recipes(), show_default=False, rich_help_panel=_RUN)] = None,
    out: Annotated[Path, typer.Option(help="the run's folder", rich_help_panel=_RUN)] = Path("run"),
    config: Annotated[
        Path | None,
        typer.Option(help="JSON file of settings, its recipe and its model; options win", rich_help_panel=_RUN),
    ] = None,
    show_config: Annotated[
        bool,
        typer.Option("--show-config", help="print what would be run, as a configuration file", rich_help_panel=_RUN),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="demand a checkpoint to go on from", rich_help_panel=_RUN)
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="discard the folder's run", rich_help_panel=_RUN)] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=_RUN)] = "auto",
    eval_every: Annotated[int | None, _setting("eval_every", "steps between validations", _RUN)] = None,
    eval_tokens: Annotated[int | None, _setting("eval_tokens", "held-out tokens read at most, 0 for all", _RUN)] = None,
    save_every: Annotated[int | None, _setting("save_every", "steps between checkpoints", _RUN)] = None,
    keep: Annotated[int | None, _setting("keep", "checkpoints kept", _RUN)] = None,
    tensorboard: Annotated[bool | None, _setting("tensorboard", "write figures for TensorBoard too", _RUN)] = None,
    parallel: Annotated[str | None, _setting("parallel", "under torchrun: ddp or fsdp", _RUN)] = None,
    context_parallel: Annotated[int | None, _setting("context_parallel", "ranks that share a sequence", _RUN)] = None,
    glob: Annotated[str | None, _setting("glob", "files of a folder, such as '*.py'", _DATA)] = None,
    field: Annotated[str | None, _setting("field", "key or column that holds the text", _DATA)] = None,
    split: Annotated[str | None, _setting("split", "split of a dataset of the hub", _DATA)] = None,
    workers: Annotated[int | None, _setting("workers", "processes that tokenise, 0 chooses", _DATA)] = None,
    shard_tokens: Annotated[int | None, _setting("shard_tokens", "tokens of a file on disk", _DATA)] = None,
    layout: Annotated[str | None, _setting("layout", "packed, rows, or carry (truncated BPTT)", _DATA)] = None,
    tokenizer: Annotated[str | None, _setting("tokenizer", "byte, bpe or a tokenizer.json", _DATA)] = None,
    vocab_size: Annotated[int | None, _setting("vocab_size", "size of a trained BPE vocabulary", _DATA)] = None,
    val_fraction: Annotated[float | None, _setting("val_fraction", "share held out", _DATA)] = None,
    seq_len: Annotated[int | None, _setting("seq_len", "tokens of the longest piece", _DATA)] = None,
    batch_tokens: Annotated[int | None, _setting("batch_tokens", "tokens of a step, over all ranks", _DATA)] = None,
    micro_tokens: Annotated[
        int | None, _setting("micro_tokens", "tokens of one forward pass, 0 for all", _DATA)
    ] = None,
    seed: Annotated[int | None, _setting("seed", "of weights and data order", _DATA)] = None,
    preset: Annotated[str | None, _shape("a size of the paper, such as siso-180m; the options below change it")] = None,
    layers: Annotated[int | None, _shape(f"number of layers (default: {_SMALL_LAYERS})")] = None,
    attention_every: Annotated[
        int | None, _shape("every so many layers one is attention (6 is the paper's 5:1)")
    ] = None,
    d_model: Annotated[int | None, _shape(f"width (default: {_SMALL['d_model']})")] = None,
    d_state: Annotated[int | None, _shape(f"state channels (default: {_SMALL['d_state']})")] = None,
    headdim: Annotated[int | None, _shape(f"channels of a head (default: {_SMALL['headdim']})")] = None,
    expand: Annotated[float | None, _shape("inner width over width (default: 2)")] = None,
    ngroups: Annotated[int | None, _shape("groups of B and C (default: 1)")] = None,
    mimo_rank: Annotated[int | None, _shape("rank R; 1 is SISO (default: 1)")] = None,
    d_intermediate: Annotated[int | None, _shape("inner width of the MLP, 0 for none (default: 2 x width)")] = None,
    steps: Annotated[int | None, _setting("steps", "optimizer steps", _OPTIMISATION)] = None,
    lr: Annotated[float | None, _setting("lr", "peak learning rate", _OPTIMISATION)] = None,
    schedule: Annotated[str | None, _setting("schedule", "cosine or wsd", _OPTIMISATION)] = None,
    warmup_steps: Annotated[int | None, _setting("warmup_steps", "steps of rise", _OPTIMISATION)] = None,
    decay_fraction: Annotated[
        float | None, _setting("decay_fraction", "of the steps, wsd's fall", _OPTIMISATION)
    ] = None,
    min_lr_fraction: Annotated[float | None, _setting("min_lr_fraction", "end over peak", _OPTIMISATION)] = None,
    weight_decay: Annotated[float | None, _setting("weight_decay", "AdamW's", _OPTIMISATION)] = None,
    decay_bc_bias: Annotated[bool | None, _setting("decay_bc_bias", "decay B and C biases", _OPTIMISATION)] = None,
    clip_norm: Annotated[float | None, _setting("clip_norm", "gradient norm, 0 for none", _OPTIMISATION)] = None,
    dtype: Annotated[str | None, _setting("dtype", "float32 or bfloat16", _OPTIMISATION)] = None,
    spike: Annotated[float | None, _setting("spike", "deviations above which a loss is skipped", _OPTIMISATION)] = None,
    max_skipped: Annotated[int | None, _setting("max_skipped", "skips in a row that end it", _OPTIMISATION)] = None,
    recompute: Annotated[bool | None, _setting("recompute", "activation checkpointing", _OPTIMISATION)] = None,
    compile: Annotated[bool | None, _setting("compile", "torch.compile around the scan", _OPTIMISATION)] = None,
    graph: Annotated[bool | None, _setting("graph", "one GPU, rows: a pass is one CUDA graph", _OPTIMISATION)] = None,
) -> None:
    """Train a language model from scratch, or go on with the run that the folder holds.

    Settings come from a recipe, a configuration file, and the options below, each winning over the one before. Under
    `torchrun --nproc-per-node N -m mamba3 train ...` all ranks train together.
    """
    options = dict(locals())
    if resume and restart:
        raise ValueError("--resume and --restart exclude each other; give one of them or neither.")
    chosen = read_recipe(recipe, config)
    given = {f.name: options[f.name] for f in fields(TrainConfig) if options.get(f.name) is not None}
    if warmup_steps is None and steps is not None and 0 < steps <= chosen.train.warmup_steps:
        given["warmup_steps"] = steps // 10
        errors.print(
            f"[dim]The rate rises over {steps // 10} of {steps} steps; --warmup-steps gives another number.[/]"
        )
    chosen = chosen.changed(
        given,
        {name: options[name] for name in MODEL_OPTIONS if options[name] is not None},
    )
    if show_config:
        console.print_json(chosen.to_json())
        raise typer.Exit
    if corpus is None:
        raise ValueError(
            "a corpus must be named: a text file, a folder, JSON lines or hf:NAME, as in `mamba3 train my-texts/`."
        )
    trainer = run_training(
        corpus,
        out,
        chosen.train,
        lambda vocabulary: model_config(vocabulary, chosen.model),
        start="resume" if resume else "restart" if restart else "auto",
        device=device,
    )
    console.print(f"Done: mamba3 generate --model {trainer.folder / 'model'} --prompt ...", soft_wrap=True)


def model_config(vocabulary: int, chosen: Mapping[str, Any]) -> "Mamba3Config":
    """A preset, or the small default, with what was chosen in place of its own values.

    `preset` is a name, `layers` a number or a list of kinds, `attention_every` puts attention in every so many layers'
    place; all others are fields of `Mamba3Config`.
    """
    import mamba3

    values = dict(chosen)
    preset, layers, every = (values.pop(name, None) for name in ("preset", "layers", "attention_every"))
    base = mamba3.preset(preset, vocab_size=vocabulary) if preset else None
    if base is None:
        values.setdefault("d_intermediate", 2 * values.get("d_model", _SMALL["d_model"]))
        values = _SMALL | values
    if isinstance(layers, list | tuple):
        values["layers"] = tuple(layers)
    elif base is None or layers or every:
        count = layers or (len(base.layers) if base else _SMALL_LAYERS)
        spacing = every or count + 1
        values["layers"] = tuple("attention" if (i + 1) % spacing == 0 else "mamba3" for i in range(count))
    if every and "attn_heads" not in values:
        width = values.get("d_model") or (base.d_model if base else 0)
        values["attn_heads"] = max(1, width // 64)
    if preset:
        return mamba3.preset(preset, vocab_size=vocabulary, **values)
    return mamba3.Mamba3Config.from_dict({"vocab_size": vocabulary, **values})


def run_training(
    corpus: Path,
    out: Path,
    config: TrainConfig,
    model_config: Callable[[int], "Mamba3Config"],
    *,
    start: Literal["auto", "resume", "restart"],
    device: str,
    patience: float = math.inf,
) -> "Trainer":
    """Prepare, train and write run/model. After `patience` seconds the training is left off at a checkpoint.

    Raises ValueError while another process trains there. Exits with 130 when Ctrl-C stopped it, after a checkpoint.
    """
    from mamba3.cli.in_use import in_use
    from mamba3.cli.interrupt import INTERRUPTED, stop_on_interrupt
    from mamba3.cli.models import pick_device
    from mamba3.cli.progress import ProgressReporter
    from mamba3.train.ranks import join, leave, local_device
    from mamba3.train.report import Reporter
    from mamba3.train.run import export, prepare

    place = local_device(pick_device(device))
    ranks = join(config.context_parallel, place)
    console.quiet = not ranks.first
    with in_use(out) if ranks.first else nullcontext():
        reporter = ProgressReporter(console) if ranks.first else Reporter()
        try:
            trainer = prepare(
                corpus, out, config, model_config, start=start, device=place, reporter=reporter, ranks=ranks
            )
        finally:
            reporter.finished(0)
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        origin = f"going on after step {trainer.step:,}" if trainer.step else f"a new run in {out}"
        together = f", {ranks.size} ranks ({config.parallel})" if ranks.size > 1 else ""
        console.print(f"{parameters:,} parameters on {trainer.device}{together}; {origin}.", soft_wrap=True)
        end = time.perf_counter() + patience
        with stop_on_interrupt("Stopping after this step, with a checkpoint") as interrupted:
            outcome = trainer.run(lambda: interrupted() or time.perf_counter() > end)
            if outcome.stopped:
                why = "" if interrupted() else f" as {patience:.0f} s are over, more than was planned"
                console.print(f"Stopped after step {outcome.step:,}{why}; the same command goes on from there.")
            if interrupted():
                raise typer.Exit(INTERRUPTED)
        export(trainer)
    leave()
    return trainer
