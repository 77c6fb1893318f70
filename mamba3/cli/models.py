"""Finding what a command works with: a device, a dtype, a model folder and its tokenizer."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from mamba3.convert import files, hub, layouts, read_model
from mamba3.lm import Mamba3LM
from mamba3.train import checkpoint
from mamba3.train.tokenizer import FILE_NAME

SHIPPED = {"books": Path(__file__).parents[1] / "data" / "books"}  # models that come with the package, by name
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


def find_model(name: str | Path) -> Path:
    """The model folder itself, the newest checkpoint of a run folder, a model of the package, or a repository of the hub."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    checkpoints = checkpoint.list_checkpoints(folder)
    if checkpoints:
        return checkpoints[-1]
    if not folder.exists() and str(name) in SHIPPED:
        return SHIPPED[str(name)]
    if not folder.exists() and hub.is_repo_id(str(name)):
        return hub.find_folder(str(name))
    if str(name) in SHIPPED:
        raise ValueError(
            f"{name} is a model that comes with the package, but there is a folder of that name here, which comes first and "
            "holds no model; rename it, or run the command in another folder."
        )
    raise ValueError(
        f"a model folder must hold config.json and model.safetensors, or be a run of `mamba3 train`, but {folder} "
        f"{'is neither' if folder.exists() else 'does not exist'}; name another folder, {' or '.join(SHIPPED)}, which comes "
        "with the package, or a repository of the hub."
    )


def load_model(
    name: str | Path, tokenizer: str | Path | None, device: str, dtype: str | None, decay: str = "auto"
) -> tuple[Mamba3LM, Tokenizer]:
    """The model of a folder (see `find_model`) in any layout, and its tokenizer: the one given, else the one beside it."""
    place = find_model(name)
    if tokenizer is None and not (place / FILE_NAME).is_file():
        official = layouts.layout_of(files.read_json(place / files.CONFIG_FILE), place) == layouts.OFFICIAL
        trained = (
            " The official checkpoints were trained with that of meta-llama/Llama-3.1-8B (gated: accept its terms)."
        )
        raise ValueError(
            f"a model needs its tokenizer, but {place} holds no {FILE_NAME}; give one with --tokenizer FILE, its folder or a "
            f"repository of the hub.{trained if official else ''}"
        )
    encoder = files.read_tokenizer(hub.find_tokenizer(tokenizer or place))
    model = read_model(place, decay, pick_dtype(dtype), pick_device(device), tokenizer=encoder).model.eval()
    files.check_vocabulary(encoder, model.config, tokenizer or place)
    return model, encoder
