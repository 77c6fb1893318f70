"""A Mamba-3 language model with its head as transformers' own class (docs/transformers.md)."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from mamba3.hf.backbone import Mamba3LMModel
from mamba3.hf.cache import Mamba3LMCache
from mamba3.hf.configuration import Mamba3LMConfig
from mamba3.hf.pretrained import Mamba3LMPreTrainedModel
from mamba3.lm import Mamba3LM

GENERATE = cast(Any, GenerationMixin).generate


class Mamba3LMForCausalLM(Mamba3LMPreTrainedModel, GenerationMixin):
    """A Mamba-3 language model, SISO, MIMO or hybrid; AutoModelForCausalLM's class."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: Mamba3LMConfig):
        super().__init__(config)
        self.model = Mamba3LMModel(config)
        self.lm_head = nn.Linear(config.d_model, self.model.embedding.num_embeddings, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    def to_mamba3(self) -> Mamba3LM:
        """The same weights, not a copy, as a `Mamba3LM`: its three verbs, its state files."""
        with torch.device("meta"):
            lm = Mamba3LM(self.config.to_mamba3())
        lm.embedding, lm.layers, lm.norm_f = self.model.embedding, self.model.layers, self.model.norm_f
        lm.lm_head = None if self.config.tie_embeddings else cast(nn.Linear, self.lm_head)
        return lm.train(self.training)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Mamba3LMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [b, t, vocab_size] of every token's successor; those of columns of padding mean nothing.

        Args:
            input_ids: [b, t]; or inputs_embeds, [b, t, d_model].
            attention_mask: [b, t], or with the columns read before in front; 0 is padding, which leaves no trace.
            position_ids, seq_idx, cu_seq_lens_q: mark sequences packed in a row, see `mamba3.hf.rows`, as
                DataCollatorWithFlattening and TRL do. Positions mean nothing else here.
            past_key_values: what was read before; input_ids are what follows. It is brought up to date in place.
            use_cache: return a cache; by default not in training, and never for rows that hold several sequences.
            labels: [b, t]; loss is the mean cross-entropy of each label under its predecessor's logits, without those of -100.
            logits_to_keep: of the last tokens alone, or of the columns in a tensor; 0: all.

        Raises ValueError where they contradict one another.
        """
        read = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            past_key_values=past_key_values, use_cache=use_cache, output_hidden_states=output_hidden_states,
            output_attentions=output_attentions, return_dict=True, cu_seq_lens_q=cu_seq_lens_q, seq_idx=seq_idx,
        )  # fmt: skip
        last = read.last_hidden_state
        kept = last[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else last[:, logits_to_keep]
        logits = self.lm_head(kept)[..., : self.config.vocab_size]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=read.past_key_values, hidden_states=read.hidden_states
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    # -- generate

    @functools.wraps(GENERATE)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if isinstance(ids, Tensor) and ids.numel():
            self.check_ids(ids)
        if isinstance(cache, Mamba3LMCache) and cache.get_seq_length():
            cache.check_continues(ids)
            config = kwargs.get("generation_config") or self.generation_config
            if kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None)) is not None:
                raise ValueError(
                    "prefill_chunk_size goes with a fresh cache only: transformers cuts input_ids by its length."
                )
        return GENERATE(self, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        # transformers would make a DynamicCache, and hand it to classes with "mamba" in their name as cache_params.
        cache, kind = model_kwargs.get("past_key_values"), generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation must be dynamic or static; it is {kind!r}. A state has a fixed size and stays in "
                "float32 on the model's device."
            )
        if cache is not None:
            if kind is not None:
                raise ValueError("Give past_key_values or cache_implementation, one of the two.")
            return
        if generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = Mamba3LMCache(
                room=generation_config.max_length if kind == "static" else 0
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Mamba3LMCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What the next forward gets: all that came in the first call (what follows the cache), then the last token."""
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if is_first_iteration and inputs_embeds is not None:
            inputs = {"inputs_embeds": inputs_embeds}
        elif not is_first_iteration and next_sequence_length is not None:
            inputs = {"input_ids": input_ids[:, -next_sequence_length:]}
        return inputs | {
            "past_key_values": past_key_values, "attention_mask": attention_mask, "use_cache": use_cache,
            "logits_to_keep": logits_to_keep, "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
        }  # fmt: skip
