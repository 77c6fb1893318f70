"""What our classes for transformers share: files, the embedding's size, and how transformers is to treat them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from mamba3.hf.configuration import Mamba3LMConfig

# The parameters of the recurrence, which a layer built in 16 bits keeps in float32; patterns, as transformers reads them.
RECURRENT = [rf"mixer\.{name}$" for name in ("dt_bias", "B_bias", "C_bias", "D", "mimo_x", "mimo_z", "mimo_o")]


class Mamba3LMPreTrainedModel(PreTrainedModel):
    """What the model with a head and the one without share."""

    config_class = Mamba3LMConfig
    config: Mamba3LMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _supports_sdpa = True
    _input_embed_layer = "embedding"
    _no_split_modules = ["Block"]  # noqa: RUF012 (as transformers declares them)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = RECURRENT

    def _init_weights(self, module: nn.Module) -> None:
        # Modules initialise themselves when they are made; an embedding may be made anew, by resize_token_embeddings.
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but weights that are missing, unknown, misshapen or not finite raise ValueError.

        They would be a warning there, and a model that writes nonsense.
        """
        told = kwargs.pop("output_loading_info", False)
        tolerated = kwargs.setdefault("ignore_mismatched_sizes", False)
        kwargs["ignore_mismatched_sizes"] = True  # so that the names come back
        path = pretrained_model_name_or_path
        try:
            model, info = cast(Any, super()).from_pretrained(path, *args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"{_damaged(path)} is damaged or truncated: {error}. Download or copy it again."
            ) from error
        problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
        problems += [f"unknown {name}" for name in sorted(info["unexpected_keys"])]
        if not tolerated:
            problems += [
                f"{name} has shape {tuple(came)}, not {tuple(needed)}" for name, came, needed in info["mismatched_keys"]
            ]
        if getattr(model, "hf_quantizer", None) is None:
            came = ((name, p) for name, p in model.named_parameters() if name not in info["missing_keys"])
            problems += [f"{name} holds NaN or infinity" for name, p in came if not _finite(p)]
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise ValueError(
                f"The weights of {path} do not fit its config.json: {shown}. Restore the file from a copy."
            )
        return (model, info) if told else model

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers; the embedding's rows stay a multiple of pad_vocab_multiple, config.vocab_size counts tokens."""
        if new_num_tokens is None and pad_to_multiple_of is None:
            return cast(nn.Embedding, self.get_input_embeddings())
        vocabulary = new_num_tokens or self.config.vocab_size
        multiple = pad_to_multiple_of or self.config.pad_vocab_multiple
        super().resize_token_embeddings(vocabulary, multiple, mean_resizing)
        self.config.vocab_size, self.config.pad_vocab_multiple = vocabulary, multiple
        return cast(nn.Embedding, self.get_input_embeddings())

    def check_ids(self, input_ids: Tensor) -> None:
        """ValueError when a token has no row in the embedding."""
        low, high = (int(v) for v in input_ids.aminmax())
        rows = cast(nn.Embedding, self.get_input_embeddings()).num_embeddings
        if low < 0 or high >= rows:
            raise ValueError(
                f"Token {high if high >= rows else low} has no row in the embedding of {rows}. The tokenizer is larger than "
                "the model, or of another one: take the one beside the weights, or call "
                "model.resize_token_embeddings(len(tokenizer)) and train the new rows."
            )


def _finite(p: Tensor) -> bool:
    return (
        p.is_meta
        or not p.is_floating_point()
        or p.numel() == 0
        or all(bool(v.isfinite()) for v in p.detach().aminmax())
    )


def _damaged(path: Any) -> str:
    """The first file of a folder that does not open."""
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return str(file)
    return f"A weights file of {path}"
