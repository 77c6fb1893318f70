"""State files: safetensors with a checksum, written whole or not at all.

Metadata: `format` (always "mamba3-state"), `version`, `kind` ("layer" or "model"), `checksum` (SHA-256 over names, shapes,
dtypes and bytes of all tensors) and whatever the writer adds (dtype, model fingerprint, token count).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = "mamba3-state"
VERSION = "1"


def checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over name, dtype, shape and bytes of each tensor, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def replace_file(path: str | Path, data: bytes) -> None:
    """Write `data` beside `path`, flush it to the disk and rename it into place: `path` is old or new, never half."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # what is told is why it could not be written
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            kept = "the file that was there is untouched" if os.path.exists(path) else "nothing was written"
            raise OSError(error.errno, f"{path} could not be saved ({error.strerror}); {kept}.") from error
        raise


def write(path: str | Path, tensors: dict[str, Tensor], *, kind: str, **metadata: str) -> None:
    """Save tensors with their checksum. OSError names the path and says that the old file is intact."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"format": FORMAT, "version": VERSION, "kind": kind, "checksum": checksum(plain), **metadata}
    replace_file(path, save(plain, metadata=header))


def read(
    path: str | Path, *, kind: str, device: torch.device | str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load tensors and metadata. ValueError when the file is truncated, altered, of another kind or version."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as a state: {error}. It is truncated or not a safetensors file."
        ) from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file but not a state: its metadata has no format {FORMAT!r}.")
    if header.get("version") != VERSION:
        raise ValueError(f"{path} has state version {header.get('version')}; this mamba3 reads version {VERSION}.")
    if header.get("kind") != kind:
        raise ValueError(f"{path} holds the state of a {header.get('kind')}; the state of a {kind} was asked for.")
    if header.get("checksum") != checksum(tensors):
        raise ValueError(f"{path} is damaged: its checksum does not match its content. Restore it from a copy.")
    if device is not None:
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return tensors, header


def metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a state file without its tensors, unchecked. ValueError when it is no such file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a state: {error}.") from error
    if found.get("format") != FORMAT:
        raise ValueError(f"{path} is not a state: its metadata has no format {FORMAT!r}.")
    return found
