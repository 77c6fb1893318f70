"""What our classes for transformers share: `Mamba3LM`'s modules, its files, and the way through the blocks.

The modules carry the names they have in `Mamba3LM`, at the top level, so that one folder serves both.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from mamba3.hf import offload
from mamba3.hf.cache import NOT_A_TOKEN, Mamba3LMCache, put
from mamba3.hf.configuration import Mamba3LMConfig
from mamba3.hf.rows import Rows, rows_of
from mamba3.lm import LMState, Mamba3LM
from mamba3.lm.model import Block
from mamba3.lm.state import LayerState
from mamba3.ops import State
from mamba3.ops.types import wide_dtype

# The parameters of the recurrence, which a layer built in 16 bits keeps in float32.
RECURRENT = [
    "mixer.dt_bias",
    "mixer.B_bias",
    "mixer.C_bias",
    r"mixer.D$",
    "mixer.mimo_x",
    "mixer.mimo_z",
    "mixer.mimo_o",
]


class Trunk(NamedTuple):
    """last: normalised, what the head reads. residuals: the stream before each block, when asked for."""

    last: Tensor
    residuals: tuple[Tensor, ...] | None
    cache: Mamba3LMCache | None


class Mamba3LMPreTrainedModel(PreTrainedModel):
    """What the model with a head and the one without share: modules, files, and the way through the blocks."""

    config_class = Mamba3LMConfig
    config: Mamba3LMConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _is_stateful = True
    _supports_sdpa = True
    _input_embed_layer = "embedding"
    _no_split_modules = ["Block"]  # noqa: RUF012 (as transformers declares them)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = RECURRENT

    def __init__(self, config: Mamba3LMConfig):
        super().__init__(config)
        lm = Mamba3LM(config.to_mamba3())
        self.embedding, self.layers, self.norm_f = lm.embedding, lm.layers, lm.norm_f
        self.gradient_checkpointing = False

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
            problems += [f"{name} holds NaN or infinity" for name, p in model.named_parameters() if not _finite(p)]
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

    # -- the way through the blocks

    def _trunk(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        rows: Rows,
        cache: Mamba3LMCache | None,
        residuals: bool,
    ) -> Trunk:
        if input_ids is not None and input_ids.device.type == "cpu":  # elsewhere looking would wait for the device
            self._check_ids(input_ids)
        h = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        batch, tokens = h.shape[:2]
        dtype = h.dtype
        before = None if cache is None else self._states(cache, rows, batch, h)
        h = rows.pack(h.to(wide_dtype(dtype)) if self.config.residual_in_fp32 else h)
        step = before is not None and before[0] is not None and tokens == 1 and rows.boundaries is None
        h = h[:, 0] if step else h
        seen, states = [], []
        for i, block in enumerate(cast("Iterable[Block]", self.layers)):
            if residuals:
                seen.append(rows.unpack(h.unsqueeze(1) if step else h, batch, tokens))
            if before is not None:
                verb, marks = ("step", ()) if step else ("prefill", (rows.boundaries,))
                h, state = offload.through(block, functools.partial(_read, block, verb), h, before[i], *marks)
                states.append(state)
            elif self._checkpoints():
                through = functools.partial(offload.through, block, functools.partial(_forward, block))
                h = self._gradient_checkpointing_func(through, h, rows.boundaries)
            else:
                h = offload.through(block, functools.partial(_forward, block), h, rows.boundaries)
        h = self.norm_f(h.unsqueeze(1) if step else h, dtype)
        if cache is not None:
            self._advance(cache, states, rows, batch, tokens, input_ids, h.device)
        last = rows.unpack(h, batch, tokens)
        return Trunk(last, (*seen, last) if residuals else None, cache)

    def _states(self, cache: Mamba3LMCache, rows: Rows, batch: int, h: Tensor) -> list[LayerState | None]:
        """Where each sequence of the pack starts, layer by layer; None: before the first token."""
        if cache.state is None:
            return [None] * len(self.layers)
        if cache.batch_size != batch:
            raise ValueError(
                f"The cache holds {cache.batch_size} sequences, but {batch} came in. For several continuations of each "
                "(num_beams, num_return_sequences) call cache.batch_repeat_interleave(n) and repeat input_ids likewise."
            )
        if len(rows.owners) == batch:
            return list(cache.state.layers)
        return list(cache.state.select(rows.owners).layers)

    def _advance(
        self, cache: Mamba3LMCache, states: list[LayerState], rows: Rows, batch: int, tokens: int,
        input_ids: Tensor | None, device: torch.device,
    ) -> None:  # fmt: skip
        bounds = rows.boundaries
        counts = torch.full((batch,), tokens, device=device)
        if bounds is not None:
            counts = torch.zeros(batch, dtype=torch.int64, device=device)
            counts[rows.owners] = torch.tensor(bounds, device=device).diff()
        if len(rows.owners) < batch:
            owners = torch.tensor(rows.owners, device=device)
            old = cache.state.layers if cache.state is not None else [None] * len(states)
            blocks = cast("Iterable[Block]", self.layers)
            whole = [
                block.mixer.init_state(batch, *_like(new)) if layer is None else layer
                for block, layer, new in zip(blocks, old, states, strict=True)
            ]
            states = [put(layer, owners, new) for layer, new in zip(whole, states, strict=True)]
        read = counts if cache.state is None else cache.state.tokens + counts.to(cache.state.tokens.device)
        if input_ids is None:
            input_ids = torch.full((batch, tokens), NOT_A_TOKEN, device=device)
        cache.advance(LMState(states, read), input_ids)

    def _rows(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, cache: Any, use_cache: bool, **marks: Any
    ) -> tuple[Rows, Mamba3LMCache | None]:
        """The sequences that came, and the cache to keep, after the checks that need both."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give input_ids or inputs_embeds, one of the two.")
        v = cast(Tensor, input_ids if inputs_embeds is None else inputs_embeds)
        if v.ndim < 2 or v.shape[0] == 0 or v.shape[1] == 0:
            raise ValueError(f"input_ids must be [b, t] with at least one token; it came with shape {tuple(v.shape)}.")
        if cache is not None and not isinstance(cache, Mamba3LMCache):
            raise ValueError(
                f"past_key_values must be a mamba3.hf.Mamba3LMCache; it is a {type(cache).__name__}. Leave it out, and the "
                "model makes one."
            )
        rows = rows_of(v.shape[0], v.shape[1], **marks)
        if rows.packed and cache is not None:
            raise ValueError(
                "A row that holds several sequences (cu_seq_lens_q, seq_idx, position_ids that restart) has no one state: "
                "leave past_key_values out, or give each sequence a row of its own."
            )
        keep = not rows.packed and (cache is not None or use_cache)
        return rows, (Mamba3LMCache() if cache is None else cache) if keep else None

    def _run(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, cache: Any, use_cache: bool | None,
        residuals: bool | None, attentions: bool | None, **marks: Any,
    ) -> Trunk:  # fmt: skip
        if attentions or (attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions: there are no attention weights to return; leave it out.")
        # Nobody who trains reads the cache, and keeping it costs memory.
        keep = self.config.use_cache and not self.training if use_cache is None else use_cache
        rows, cache = self._rows(input_ids, inputs_embeds, cache, keep and not self._checkpoints(), **marks)
        residuals = self.config.output_hidden_states if residuals is None else residuals
        return self._trunk(input_ids, inputs_embeds, rows, cache, bool(residuals))

    def _check_ids(self, input_ids: Tensor) -> None:
        low, high = (int(v) for v in input_ids.aminmax())
        rows = self.embedding.num_embeddings
        if low < 0 or high >= rows:
            raise ValueError(
                f"Token {high if high >= rows else low} has no row in the embedding of {rows}. The tokenizer is larger than "
                "the model, or of another one: take the one beside the weights, or call "
                "model.resize_token_embeddings(len(tokenizer)) and train the new rows."
            )

    def _checkpoints(self) -> bool:
        return self.gradient_checkpointing and self.training


def _forward(block: Block, h: Tensor, boundaries: list[int] | None) -> Tensor:
    return block.run(h, lambda u: (offload.call(block.mixer, "forward", u, boundaries), None))[0]


def _read(block: Block, verb: str, h: Tensor, state: LayerState | None, *marks: Any) -> tuple[Tensor, LayerState]:
    return block.run(h, lambda u: offload.call(block.mixer, verb, u, state, *marks))


def _like(state: LayerState) -> tuple[torch.device, torch.dtype]:
    v = state.x_prev if isinstance(state, State) else state.k
    return v.device, v.dtype


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
