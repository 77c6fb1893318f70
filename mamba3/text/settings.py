"""tokenizer_config.json: what transformers' AutoTokenizer must be told beside a tokenizer.json."""

import json
from pathlib import Path

from tokenizers import Tokenizer

SETTINGS_FILE = "tokenizer_config.json"


def write_settings(folder: Path, tokenizer: Tokenizer, end: int | None) -> None:
    """Write the class, the token `end` that ends a text, and it as padding too: what is padded is masked."""
    values: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if end is not None:
        values["eos_token"] = values["pad_token"] = tokenizer.id_to_token(end)
    (folder / SETTINGS_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
