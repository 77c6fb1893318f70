"""A Hugging Face dataset as documents: one of the hub, a folder that `save_to_disk` wrote, or parquet and arrow files.

    hf:NAME   hf:NAME:CONFIG   a folder with dataset_info.json   a file *.parquet or *.arrow

`datasets` is imported when one is opened. Rows are documents, in the dataset's order, their text in one named column.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PREFIX = "hf:"
_FILES = {".parquet": "parquet", ".arrow": "arrow"}


def is_dataset(path: str | Path) -> bool:
    """Whether a corpus path names a dataset rather than text."""
    if str(path).startswith(PREFIX):
        return True
    path = Path(path)
    return path.suffix in _FILES or any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def read_rows(path: str | Path, *, field: str, split: str) -> Iterator[str]:
    """The texts of a dataset, in order. Raises ValueError for a column or split that it lacks, or that is not text."""
    rows = _open(str(path), split)
    columns = list(rows.column_names)
    if field not in columns:
        raise ValueError(
            f"a dataset must have the named column, but {path} has no {field!r}; its columns are "
            f"{', '.join(map(repr, columns))}: name the one that holds the text with field (--field)."
        )
    for number, row in enumerate(rows.select_columns([field])):
        if not isinstance(row[field], str):
            raise ValueError(
                f"column {field!r} must hold text, but row {number} of {path} holds a {type(row[field]).__name__}; "
                "name another column with field (--field)."
            )
        yield row[field]


def _open(path: str, split: str) -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"{path} is a dataset, which needs the library: pip install 'mamba3[train]'.")
    import datasets

    if path.startswith(PREFIX):
        name, _, config = path.removeprefix(PREFIX).partition(":")
        try:
            return datasets.load_dataset(name, config or None, split=split)
        except (ValueError, OSError) as error:  # among them an unknown split, a gated name, no network
            raise ValueError(f"the dataset {name!r}, split {split!r}, could not be opened: {error}") from error
    file = Path(path)
    if file.suffix in _FILES:
        if not file.is_file():
            raise ValueError(f"a corpus must exist, but {file} does not; give a file, a folder or hf:NAME.")
        return datasets.load_dataset(_FILES[file.suffix], data_files=str(file), split="train")
    found = datasets.load_from_disk(path)
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(
                f"a dataset must have the split asked for, but {path} has {', '.join(map(str, found))}, not {split!r}."
            )
        return found[split]
    return found
