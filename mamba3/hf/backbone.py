"""The blocks of a `Mamba3LM` as a model of transformers: which sequences a batch holds, and the way through the blocks.

The modules carry the names that they have in `Mamba3LM`; a folder that `Mamba3LM.save_pretrained` wrote loads as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from mamba3.hf import offload
from mamba3.hf.cache import NOT_A_TOKEN, Mamba3LMCache, put
from mamba3.hf.configuration import Mamba3LMConfig
from mamba3.hf.pretrained import Mamba3LMPreTrainedModel
from mamba3.hf.rows import Rows, rows_of
from mamba3.lm import LMState, Mamba3LM
from mamba3.lm.model import Block
from mamba3.lm.state import LayerState
from mamba3.ops import State
from mamba3.ops.types import wide_dtype


class Mamba3LMModel(Mamba3LMPreTrainedModel):
    """The blocks without the head; AutoModel's class."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]  # noqa: RUF012

    def __init__(self, config: Mamba3LMConfig):
        super().__init__(config)
        lm = Mamba3LM(config.to_mamba3())
        self.embedding, self.layers, self.norm_f = lm.embedding, lm.layers, lm.norm_f
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Mamba3LMCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """last_hidden_state [b, t, d_model], normalised; the arguments are those of `Mamba3LMForCausalLM.forward`."""
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions: there are no attention weights to return; leave it out.")
        if use_cache is None:  # nobody who trains reads the cache, and keeping it costs memory
            use_cache = bool(self.config.use_cache) and not self.training
        rows, cache = self._rows(
            input_ids, inputs_embeds, past_key_values, use_cache and not self._checkpoints(),
            attention_mask=attention_mask, position_ids=position_ids, seq_idx=seq_idx, cu_seqlens=cu_seq_lens_q,
        )  # fmt: skip
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        last, residuals = self._blocks(input_ids, inputs_embeds, rows, cache, bool(output_hidden_states))
        output = BaseModelOutputWithPast(last_hidden_state=last, past_key_values=cache, hidden_states=residuals)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _blocks(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        rows: Rows,
        cache: Mamba3LMCache | None,
        residuals: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """What the head reads, and the residual stream before each block when asked for; `cache` moves on."""
        if input_ids is not None and input_ids.device.type == "cpu":  # elsewhere looking would wait for the device
            self.check_ids(input_ids)
        h = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        batch, tokens = h.shape[:2]
        dtype = h.dtype
        before = None if cache is None else self._states(cache, rows, batch)
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
        return last, (*seen, last) if residuals else None

    def _states(self, cache: Mamba3LMCache, rows: Rows, batch: int) -> list[LayerState | None]:
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

    def _checkpoints(self) -> bool:
        return self.gradient_checkpointing and self.training


def _forward(block: Block, h: Tensor, boundaries: list[int] | None) -> Tensor:
    return block.run(h, lambda u: (offload.call(block.mixer, "forward", u, boundaries), None))[0]


def _read(block: Block, verb: str, h: Tensor, state: LayerState | None, *marks: Any) -> tuple[Tensor, LayerState]:
    return block.run(h, lambda u: offload.call(block.mixer, verb, u, state, *marks))


def _like(state: LayerState) -> tuple[torch.device, torch.dtype]:
    v = state.x_prev if isinstance(state, State) else state.k
    return v.device, v.dtype
