"""Checkpoints written while training goes on: copied at once, written in the background, visible when whole.

torch.distributed.checkpoint writes what training needs (every rank its shards); the first rank then adds the model as a
folder that can be used, the checksums and the card, and renames the folder into place. One checkpoint is in flight at most.
"""

import copy
import errno
import json
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from mamba3.train.checkpoint import (
    CARD,
    FOLDER,
    TRAINING,
    Card,
    CheckpointError,
    list_checkpoints,
    place_of,
    sha256_of,
)
from mamba3.train.folder import publish, temporary_of
from mamba3.train.ranks import Ranks, whole


class Saver:
    """Writes the checkpoints of one run.

    model: the model before it is spread over ranks; a copy of it is kept in the CPU's memory for what is being written.
    on_saved(step, place): called from `poll` or `wait`, in the thread that trains.
    """

    def __init__(
        self,
        run: Path,
        model: nn.Module,
        *,
        identity: dict[str, Any],
        extra_files: tuple[Path, ...] = (),
        keep: int = 2,
        ranks: Ranks | None = None,
        on_saved: Callable[[int, Path], None] = lambda step, place: None,
    ):
        self.run, self.identity, self.extra_files, self.keep = run, identity, extra_files, keep
        self.ranks, self.on_saved = ranks or Ranks(), on_saved
        self.copy = copy.deepcopy(model).to("cpu") if self.ranks.first else None
        if self.ranks.size == 1:  # what dcp warns of, in a thread of its own, is what is meant
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[Path]] | None = None

    def save(self, step: int, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Copy the model and `tensors` and write them in the background; waits for the checkpoint before.

        Raises CheckpointError for the one before, or if this one cannot begin.
        """
        self.wait()
        place = place_of(self.run, step)
        temporary = temporary_of(place)
        state = {"model": model.state_dict(), "training": tensors}
        try:
            if self.ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
                (temporary / TRAINING).mkdir(parents=True, exist_ok=True)  # other ranks make it too
            self.whole_model(model)
            written = async_save(
                state,
                storage_writer=FileSystemWriter(temporary / TRAINING, single_file_per_rank=True, sync_files=True),
                process_group=self.ranks.saving,
            )
        except OSError as error:
            if self.ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise self._failure(step, error) from error
        written = getattr(written, "upload_completion", written)
        self._pending = step, self._thread.submit(self._finish, step, place, written)

    def poll(self) -> None:
        """Tell of a checkpoint that has become whole; raises CheckpointError for one that could not be written."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is in flight; raises as `poll` does."""
        if self._pending is not None:
            (step, future), self._pending = self._pending, None
            self.on_saved(step, future.result())

    def close(self) -> None:
        """Let what is in flight end, without raising: for when another error is on its way."""
        if self._pending is not None:
            self._pending[1].exception()
            self._pending = None

    @torch.no_grad()
    def whole_model(self, model: nn.Module) -> nn.Module | None:
        """The copy with the weights as they are now, on the first rank (None on others); all ranks take part in gathering."""
        mine = dict(self.copy.named_parameters()) | dict(self.copy.named_buffers()) if self.copy is not None else {}
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            value = whole(value.detach())
            if name in mine:
                mine[name].copy_(value)
        return self.copy

    def _finish(self, step: int, place: Path, written: Any) -> Path:
        temporary = temporary_of(place)
        try:
            written.result()
            if self.copy is not None:
                self.copy.save_pretrained(temporary)  # pyright: ignore[reportCallIssue]
                for file in self.extra_files:
                    shutil.copy(file, temporary / file.name)
                files = sorted(file for file in temporary.rglob("*") if file.is_file())
                sums = {file.relative_to(temporary).as_posix(): sha256_of(file) for file in files}
                card = Card(step=step, identity=self.identity, threads=torch.get_num_threads(), sha256=sums)
                (temporary / CARD).write_text(json.dumps(card._asdict(), indent=2) + "\n")
                publish(temporary, place)
                for old in list_checkpoints(self.run)[: -self.keep]:
                    shutil.rmtree(old)
        except (Exception, CheckpointException) as error:  # the library's is no Exception
            if self.ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
            if not _of_the_disk(error):
                raise
            raise self._failure(step, error) from error
        return place

    def _failure(self, step: int, error: BaseException) -> CheckpointError:
        older = list_checkpoints(self.run)
        intact = f"{older[-1]} is intact, and the run resumes from it" if older else "there was no earlier checkpoint"
        causes = [error, *_causes(error)]
        full = any(getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for cause in causes) or any(
            "code: 28" in str(cause) or "No space left" in str(cause) for cause in causes
        )
        remedy = (
            "The disk is full: free some space and run the same command again" if full else "Run the same command again"
        )
        return CheckpointError(f"the checkpoint of step {step} could not be saved ({causes[-1]}); {intact}. {remedy}.")


def _causes(error: BaseException) -> list[BaseException]:
    """What torch.distributed.checkpoint wrapped: the ranks' own errors."""
    failures = getattr(error, "failures", {})
    return [failure[0] if isinstance(failure, tuple) else failure for failure in failures.values()]


def _of_the_disk(error: BaseException) -> bool:
    """Whether an error is the disk's: an OSError, or the library's that holds one (it also raises RuntimeError for a write
    that the system cut short)."""
    kinds = (OSError, SafetensorError, CheckpointException)
    return isinstance(error, kinds) or "PytorchStreamWriter" in str(error)


def restore(place: Path, tensors: dict[str, torch.Tensor], ranks: Ranks, model: nn.Module | None = None) -> None:
    """Fill `tensors`, and the model where one is given, from the checkpoint, each rank its shards, in place."""
    state: dict[str, Any] = {"training": tensors} | ({} if model is None else {"model": model.state_dict()})
    load(
        state,
        storage_reader=FileSystemReader(place / TRAINING),
        process_group=ranks.saving,
        no_dist=ranks.size == 1,
    )


def stored_tensors(place: Path) -> dict[str, torch.Tensor]:
    """Empty tensors in the shapes and dtypes of what a checkpoint holds for training."""
    found = FileSystemReader(place / TRAINING).read_metadata().state_dict_metadata
    prefix = "training."
    return {
        key.removeprefix(prefix): torch.empty(v.size, dtype=v.properties.dtype)
        for key, v in found.items()
        if key.startswith(prefix) and isinstance(v, TensorStorageMetadata)
    }


def remove_abandoned(run: Path) -> None:
    """Remove what a killed process left half written."""
    for abandoned in (run / FOLDER).glob(".*.tmp"):
        shutil.rmtree(abandoned, ignore_errors=True)
