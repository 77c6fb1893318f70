"""The configuration that transformers sees: the fields of `Mamba3Config` beside its own.

The fields are not declared a second time: `Mamba3Config` checks them and knows their defaults. A key that neither side
knows is an error, for a file of a newer version must not be read as if it said less.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from mamba3.lm import Mamba3Config, preset
from mamba3.lm.config import FOREIGN, MODEL_TYPE

FIELDS = {field.name for field in dataclasses.fields(Mamba3Config)}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What transformers and its satellites put beside a model's own fields.
KNOWN = {
    *FIELDS, *FOREIGN, *(field.name for field in dataclasses.fields(PreTrainedConfig)), "_attn_implementation_autoset",
    "_commit_hash", "_name_or_path", "experts_implementation", "name_or_path", "num_labels", "quantization_config",
}  # fmt: skip


class Mamba3LMConfig(PreTrainedConfig):
    """Keyword arguments: the fields of `mamba3.Mamba3Config`, and those of `PreTrainedConfig`.

    With none of the former it is the smallest published model. ValueError names unknown, missing and wrong ones.
    """

    model_type = MODEL_TYPE
    attribute_map = {"hidden_size": "d_model", "tie_word_embeddings": "tie_embeddings"}  # noqa: RUF012 (as declared there)
    auto_map = {}  # noqa: RUF012  TRL (1.16) looks for it in any configuration whose class is not transformers' own
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(self, **values: Any):
        for theirs, ours in self.attribute_map.items():
            if theirs in values:
                values[ours] = values.pop(theirs)
        fields = {name: values.pop(name) for name in list(values) if name in FIELDS}
        unknown = sorted(set(values) - KNOWN - set(GenerationConfig().to_dict()))
        if unknown:
            raise ValueError(
                f"The configuration has unknown fields: {', '.join(unknown)}. The file may be of a newer mamba3 (then "
                "upgrade it) or of another model."
            )
        if not fields:
            fields = preset("siso-180m").to_dict()
        self._set(Mamba3Config.from_dict(fields))
        self.use_cache = values.pop("use_cache", True)
        for name in TOKENS:
            setattr(self, name, values.pop(name, None))
        super().__init__(**values)

    def _set(self, config: Mamba3Config) -> None:
        for field in dataclasses.fields(config):
            setattr(self, field.name, getattr(config, field.name))

    @classmethod
    def from_mamba3(cls, config: Mamba3Config, **values: Any) -> Mamba3LMConfig:
        """The same model for transformers; `values` are fields of `PreTrainedConfig`."""
        return cls(**config.to_dict(), **values)

    def to_mamba3(self) -> Mamba3Config:
        """The model's own configuration, checked."""
        return Mamba3Config.from_dict({name: getattr(self, name) for name in FIELDS})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but a dictionary without any field of ours (a folder without config.json) is an error."""
        if not FIELDS & set(config_dict):
            raise ValueError(
                f"There is no config.json of a {MODEL_TYPE} model: it has none of {', '.join(sorted(FIELDS)[:6])}, ..."
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Blocks."""
        return len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds. Attributes that tools have hung on the object stay behind: they could not be read."""
        return {name: value for name, value in super().to_dict().items() if name in KNOWN}
