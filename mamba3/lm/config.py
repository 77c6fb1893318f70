"""The configuration of a language model: frozen, checked when made, a JSON round trip, unknown keys are errors."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from mamba3.nn.mlp import MULTIPLE

_USUAL_PADDING = 8
LAYER_KINDS = ("mamba3", "attention")
# What transformers calls a folder of ours, and the class of mamba3.hf that reads it.
MODEL_TYPE, ARCHITECTURE = "mamba3_lm", "Mamba3LMForCausalLM"
# What config.json holds for transformers' sake, beside the model's own fields.
FOREIGN = (
    "architectures", "attn_implementation", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "is_encoder_decoder", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "tokenizer_class", "torch_dtype",
    "transformers_version", "use_cache",
)  # fmt: skip


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class Mamba3Config:
    """What a `Mamba3LM` is built from. Sizes are in channels; the layer's own fields are those of `mamba3.Mamba3`."""

    vocab_size: int  # tokens of the tokenizer; the embedding is padded to a multiple of pad_vocab_multiple
    d_model: int
    layers: tuple[str, ...]  # the kind of each block, first to last: "mamba3" or "attention"
    d_intermediate: int = 0  # inner channels of the gated MLP, rounded up to a multiple of 128; 0: no MLP

    d_state: int = 128
    expand: float = 2
    headdim: int = 64
    ngroups: int = 1
    mimo_rank: int = 1
    mimo: bool | None = None  # mimo_x, mimo_z, mimo_o exist; None: when mimo_rank > 1
    rope_fraction: float = 0.5
    decay: str = "heavy_tail"  # or "softplus": both exist in published weights with the same parameter names
    out_norm: str = "none"
    lam: str | float = "learned"
    rotation: str = "data_dependent"
    B_bias: float | tuple[float, float] | None = 1.0
    C_bias: float | tuple[float, float] | None = 1.0
    bc_bias_trainable: bool = True
    d_conv: int = 0
    A_floor: float = 1e-4
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_init_floor: float = 1e-4

    attn_heads: int | None = None  # query heads of the attention blocks; needed when there are any
    attn_kv_heads: int | None = None  # key and value heads; None: as many as query heads
    attn_head_dim: int | None = None  # None: d_model / attn_heads
    attn_qkv_bias: bool = False
    attn_out_bias: bool = False

    norm_eps: float = 1e-5
    residual_in_fp32: bool = True  # the residual stream of a 16-bit model is float32
    tie_embeddings: bool = True
    pad_vocab_multiple: int = _USUAL_PADDING

    def __post_init__(self):
        for name in ("layers", "B_bias", "C_bias"):
            object.__setattr__(self, name, _tuples(getattr(self, name)))
        for name in ("vocab_size", "d_model", "pad_vocab_multiple"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer; it is {value!r}.")
        if not isinstance(self.layers, tuple) or not self.layers:
            raise ValueError(f"layers must name the kind of at least one block; it is {self.layers!r}.")
        unknown = sorted({str(kind) for kind in self.layers if kind not in LAYER_KINDS})
        if unknown:
            raise ValueError(f"A layer is one of {', '.join(LAYER_KINDS)}; layers has {', '.join(unknown)}.")
        if "attention" in self.layers and self.attn_heads is None:
            raise ValueError("A model with attention layers needs attn_heads.")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return -(-self.vocab_size // self.pad_vocab_multiple) * self.pad_vocab_multiple

    def canonical(self) -> Mamba3Config:
        """One spelling for all configurations that build the same model: sizes as they are after rounding up.

        The paper's 1264 inner channels and the 1280 that are stored, a vocabulary padded to 8 or to 16 with the same
        result: such models compute the same and can read each other's states.
        """
        inner = -(-self.d_intermediate // MULTIPLE) * MULTIPLE
        usual = dataclasses.replace(self, d_intermediate=inner, pad_vocab_multiple=_USUAL_PADDING)
        if usual.padded_vocab_size == self.padded_vocab_size:
            return usual
        return dataclasses.replace(usual, pad_vocab_multiple=self.padded_vocab_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in config.json."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The text of config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Mamba3Config:
        """The inverse of `to_dict`. ValueError names unknown and missing keys."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(
                f"Mamba3Config has no field {', '.join(unknown)}; the file may be of a newer mamba3 or of another model."
            )
        needed = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values]
        if needed:
            raise ValueError(f"Mamba3Config needs {', '.join(needed)}.")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> Mamba3Config:
        """The inverse of `to_json`; what a config.json says to transformers is passed over.

        ValueError when the text is no JSON object, has unknown keys or is of another kind of model.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"A configuration is a JSON object; this text is not JSON: {error}.") from error
        if not isinstance(values, dict):
            raise ValueError(f"A configuration is a JSON object; this is a {type(values).__name__}.")
        if values.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise ValueError(f"The configuration is of a {values['model_type']} model; a Mamba3LM is a {MODEL_TYPE}.")
        return cls.from_dict({name: value for name, value in values.items() if name not in FOREIGN})
