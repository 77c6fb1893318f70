"""Finding what a command works with: a device, a dtype, a model folder and its tokenizer."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from mamba3.lm import Mamba3LM
from mamba3.train import checkpoint
from mamba3.train.tokenizer import FILE_NAME, load_tokenizer

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def pick_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name, None for None."""
    if name is None:
        return None
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)} but is {name!r}.")
    return DTYPES[name]


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N but is {name!r}.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {name!r} but this machine has {torch.cuda.device_count()} GPUs that PyTorch can use."
        )
    return device


def find_model(folder: Path) -> Path:
    """The model folder itself, or the newest checkpoint of a run folder."""
    if (folder / "config.json").is_file():
        return folder
    checkpoints = checkpoint.list_checkpoints(folder)
    if checkpoints:
        return checkpoints[-1]
    raise ValueError(
        f"a model folder must hold config.json and model.safetensors, or be a run of `mamba3 train`, but {folder} "
        f"{'is neither' if folder.exists() else 'does not exist'}; name another folder."
    )


def load_model(folder: Path, tokenizer: Path | None, device: str, dtype: str | None) -> tuple[Mamba3LM, Tokenizer]:
    """The model of a folder (see `find_model`) and its tokenizer: the one given, else the one beside the model."""
    place = find_model(folder)
    if tokenizer is None and not (place / FILE_NAME).is_file():
        raise ValueError(
            f"a model needs its tokenizer, but {place} holds no {FILE_NAME}; give one with --tokenizer FILE."
        )
    encoder = load_tokenizer(tokenizer or place)
    model = Mamba3LM.from_pretrained(place, device=pick_device(device), dtype=pick_dtype(dtype)).eval()
    size = encoder.get_vocab_size(with_added_tokens=True)
    if size > model.config.vocab_size:
        raise ValueError(
            f"a tokenizer must not have more tokens than its model, but {tokenizer or place} has {size} and the model "
            f"{model.config.vocab_size}; give the tokenizer that the model was trained with."
        )
    return model, encoder
