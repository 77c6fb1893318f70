"""Files from the Hugging Face hub, through huggingface_hub: its cache, its resumed downloads, its login, HF_ENDPOINT."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from mamba3.convert.files import BIN_FILE, CONFIG_FILE, TOKENIZER_FILE, TOKENIZER_FILES, WEIGHT_FILES

PATTERNS = (
    [CONFIG_FILE, *TOKENIZER_FILES, "*.safetensors", "*.safetensors.index.json"],
    ["*.bin", f"{BIN_FILE}.index.json"],
)
LOGIN = "log in (`hf auth login`, or HF_TOKEN in the environment)"


def is_repo_id(name: str | Path) -> bool:
    """Whether the name can be that of a repository of the hub, owner/name."""
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def find_folder(path_or_repo: str | Path) -> Path:
    """A local folder as it is, or else the files of a repository of the Hugging Face hub, downloaded or from its cache.

    ValueError when it is neither; OSError, with what to do, when the hub does not answer or does not give the files out.
    """
    folder = Path(path_or_repo)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file; give the folder that holds it and its {CONFIG_FILE}.")
    if not is_repo_id(path_or_repo):
        raise ValueError(
            f"{path_or_repo} is neither a folder nor the id of a repository of the Hugging Face hub (owner/name)."
        )
    for patterns in PATTERNS:
        folder = _download(str(path_or_repo), patterns)
        if any((folder / name).is_file() for name in WEIGHT_FILES):
            break
    return folder


def find_tokenizer(tokenizer: str | Path) -> Path:
    """The tokenizer.json that is meant: that file, or the one in a folder, or in a repository of the hub (owner/name).

    ValueError when there is none; OSError, with what to do, when the hub does not give it out.
    """
    path = Path(tokenizer)
    if not path.exists() and is_repo_id(tokenizer):
        path = _download(str(tokenizer), list(TOKENIZER_FILES))
        if not (path / TOKENIZER_FILE).is_file():
            raise ValueError(
                f"The repository {tokenizer} has no {TOKENIZER_FILE}. Make one with transformers, "
                f"AutoTokenizer.from_pretrained({str(tokenizer)!r}).save_pretrained(FOLDER), and give that folder."
            )
    path = path / TOKENIZER_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"There is no tokenizer at {path}; give the path of a {TOKENIZER_FILE}, its folder, or a repository of the "
            "hub that holds one (owner/name)."
        )
    return path


def _download(repo: str, patterns: list[str]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns))
    except (
        Exception
    ) as error:  # its HTTP client's errors have no base class in common with its own, and vary by release
        raise OSError(_advice(repo, error)) from error


def _advice(repo: str, error: Exception) -> str:
    """What became of a download and what to do about it."""
    other = "or download the files elsewhere and give their folder."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, GatedRepoError):
        return (
            f"{repo} is gated: its owner gives it to those who have asked. Accept its terms on "
            f"{constants.ENDPOINT}/{repo} and {LOGIN}; {other}"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{repo} is no folder here, and the Hugging Face hub has no such repository, or not for you. Check the name; "
            f"for a private one, {LOGIN}; {other}"
        )
    if status in (401, 403):
        return f"The Hugging Face hub does not give you {repo} ({status}). Renew the login: {LOGIN}; {other}"
    reason = " ".join(str(error).split())
    return (
        f"{repo} is no folder here, and could not be had from the Hugging Face hub: {reason or type(error).__name__} "
        f"Check the network and try again: what has come already is kept; {other}"
    )
