"""Checkpoints of a run: each a model folder that can be used as it is, with what training needs to go on.

    checkpoints/step-00000200/
        model.safetensors config.json tokenizer.json     the model, as `Mamba3LM.from_pretrained` and the CLI read it
        training/                                        torch.distributed.checkpoint: weights, the optimizer's averages,
                                                         random generators, carried states, each rank's shards
        checkpoint.json                                  step, what the run is, SHA-256 of every other file

Laws: a folder of that name is complete (it is renamed into place when everything is on disk); a checkpoint that is
damaged or belongs to another run is refused with the reason; saving that fails leaves every older checkpoint as it was.
`mamba3.train.saver` writes them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = "checkpoints"
CARD = "checkpoint.json"
TRAINING = "training"


class CheckpointError(OSError):
    """A checkpoint that could not be written."""


class Card(NamedTuple):
    """What a checkpoint says of itself: its step, the run's identity, CPU threads then, SHA-256 of its other files."""

    step: int
    identity: dict[str, Any]
    threads: int
    sha256: dict[str, str]


def place_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run / FOLDER / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run / FOLDER).glob("step-" + "[0-9]" * 8))


def read_card(place: Path) -> Card:
    """Raises ValueError if the card is missing, cut short or not one."""
    try:
        return Card(**json.loads((place / CARD).read_text()))
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise ValueError(_damaged(place, f"{CARD} cannot be read ({error})")) from error


def verify(place: Path) -> None:
    """Compare every file of a checkpoint with its checksum. Raises ValueError naming the first that is lost or differs."""
    for name, expected in read_card(place).sha256.items():
        file = place / name
        if not file.is_file():
            raise ValueError(_damaged(place, f"{name} is missing"))
        if sha256_of(file) != expected:
            raise ValueError(_damaged(place, f"{name} is truncated or altered: its checksum differs"))


def check_identity(stored: dict[str, Any], current: dict[str, Any], place: Path) -> None:
    """ValueError naming every field in which a stored run differs from the one that is asked for."""
    old, new = _flat(stored), _flat(current)
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key, _ABSENT) != new.get(key, _ABSENT)]
    if "tokens" in differing and {*differing} <= {"tokens", "model.vocab_size"}:
        raise ValueError(
            f"a checkpoint goes on with the tokenizer it began with, but {place} was made with another one: every token "
            "would mean something else. Give the tokenizer.json that lies in the checkpoint, or start over with --restart."
        )
    if differing:
        raise ValueError(
            f"a run resumes only what it was, but {place} differs in {_changes(old, new, differing)}. "
            "Give the earlier values, another folder, or start over with --restart."
        )


_ABSENT = "(absent)"


def _changes(old: dict[str, Any], new: dict[str, Any], names: list[str]) -> str:
    said = [
        f"{name} was {old.get(name, _ABSENT)!r}, is {new.get(name, _ABSENT)!r}" for name in names if name != "tokens"
    ]
    if "tokens" in names:  # which hold the tokenizer's digest, and say nothing to a reader
        said.append("the tokenizer is another one, to which every token means something else")
    return "; ".join(said)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def random_state() -> dict[str, torch.Tensor]:
    """The states of PyTorch's random generators."""
    state = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random/cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["random/cpu"])
    if "random/cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random/cuda"])


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _damaged(place: Path, reason: str) -> str:
    return (
        f"a checkpoint must be whole, but in {place} {reason}. Remove that folder to resume from the one before it, "
        "or start over with --restart."
    )
