"""Checkpoints of a run: each a model folder that can be used as it is, with what training needs to go on.

    checkpoints/step-00000200/
        model.safetensors config.json tokenizer.json     the model, as `Mamba3LM.from_pretrained` and the CLI read it
        training.safetensors                             the optimizer's averages and the random generators
        checkpoint.json                                  step, what the run is, SHA-256 of every other file

Laws: a folder of that name is complete (it is renamed into place when everything is on disk); a checkpoint that is
damaged or belongs to another run is refused with the reason; saving that fails leaves every older checkpoint as it was.
"""

import errno
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mamba3.train.folder import new_folder
from mamba3.train.optim import optimizer_tensors, restore_optimizer

FOLDER = "checkpoints"
_CARD = "checkpoint.json"
_TRAINING = "training.safetensors"


class CheckpointError(OSError):
    """A checkpoint that could not be written."""


class Card(NamedTuple):
    """What a checkpoint says of itself: its step, the run's identity, CPU threads then, SHA-256 of its other files."""

    step: int
    identity: dict[str, Any]
    threads: int
    sha256: dict[str, str]


def save(
    run: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    extra_files: tuple[Path, ...] = (),
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest `keep`. Raises CheckpointError if it cannot."""
    place = run / FOLDER / f"step-{step:08d}"
    try:
        with new_folder(place) as folder:
            model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
            for file in extra_files:
                shutil.copy(file, folder / file.name)
            save_file(optimizer_tensors(model, optimizer) | _random_state(), folder / _TRAINING)
            sums = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
            card = Card(step=step, identity=identity, threads=torch.get_num_threads(), sha256=sums)
            (folder / _CARD).write_text(json.dumps(card._asdict(), indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(_failure(run, step, error)) from error
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return place


def list_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run / FOLDER).glob("step-" + "[0-9]" * 8))


def read_card(place: Path) -> Card:
    """Raises ValueError if the card is missing, cut short or not one."""
    try:
        return Card(**json.loads((place / _CARD).read_text()))
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise ValueError(_damaged(place, f"{_CARD} cannot be read ({error})")) from error


def verify(place: Path) -> None:
    """Compare every file of a checkpoint with its checksum. Raises ValueError naming the first that is lost or differs."""
    for name, expected in read_card(place).sha256.items():
        file = place / name
        if not file.is_file():
            raise ValueError(_damaged(place, f"{name} is missing"))
        if _sha256(file) != expected:
            raise ValueError(_damaged(place, f"{name} is truncated or altered: its checksum differs"))


def restore_training(place: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the optimizer's averages and the random generators back, for a model that was loaded from `place`."""
    tensors = load_file(place / _TRAINING)
    torch.set_rng_state(tensors.pop("random/cpu"))
    cuda = [tensors.pop(key) for key in sorted(tensors) if key.startswith("random/cuda")]
    if cuda and torch.cuda.device_count() == len(cuda):
        torch.cuda.set_rng_state_all(cuda)
    restore_optimizer(model, optimizer, tensors)


def check_identity(stored: dict[str, Any], current: dict[str, Any], place: Path) -> None:
    """ValueError naming every field in which a stored run differs from the one that is asked for."""
    old, new = _flat(stored), _flat(current)
    missing = "(absent)"
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key, missing) != new.get(key, missing)]
    if differing:
        changes = "; ".join(f"{key} was {old.get(key, missing)!r}, is {new.get(key, missing)!r}" for key in differing)
        raise ValueError(
            f"a run resumes only what it was, but {place} differs in {changes}. "
            "Give the earlier values, another folder, or start over with --restart."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _random_state() -> dict[str, torch.Tensor]:
    state = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"random/cuda{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}
    return state


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _failure(run: Path, step: int, error: Exception) -> str:
    older = list_checkpoints(run)
    intact = f"{older[-1]} is intact, and the run resumes from it" if older else "there was no earlier checkpoint"
    full = (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "code: 28" in str(error)
    remedy = (
        "The disk is full: free some space and run the same command again" if full else "Run the same command again"
    )
    return f"the checkpoint of step {step} could not be saved ({error}); {intact}. {remedy}."


def _damaged(place: Path, reason: str) -> str:
    return (
        f"a checkpoint must be whole, but in {place} {reason}. Remove that folder to resume from the one before it, "
        "or start over with --restart."
    )
