"""A `Mamba3LM` as lm-evaluation-harness sees a model: three questions about text (lm_eval.api.model.LM).

    loglikelihood           log p(continuation | context), and whether the continuation is what greedy decoding says
    loglikelihood_rolling   log p(text), each token given all before it: no window, for a state has no end
    generate_until          a continuation up to a stop text

Nothing is cut off at a context length. An empty context is the beginning of a text: the token that the tokenizer has for
that, or else the one that ends a text.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tokenizers import Tokenizer

from mamba3.evaluate.continuing import continue_prompts
from mamba3.evaluate.scoring import log_likelihoods, rolling_log_likelihood
from mamba3.lm import Mamba3LM
from mamba3.lm.generate import Sampling

BEGINNINGS = ("<|begin_of_text|>", "<s>", "<bos>")
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
# What generate_until heeds of a task's generation_kwargs. Others are refused, for they would change the result.
GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p")
Progress = Callable[[str, int, int], None]


class HarnessLM(TemplateLM):
    """model, tokenizer: what is evaluated. batch_size: texts at a time.

    beginning: whether a context starts with the token of a beginning; None: as the tokenizer's own post-processor does
    (Llama 3's puts it there), which is what the harness does for models of transformers. max_new_tokens: where a task does
    not say. progress: called with (kind of request, done, of how many).
    """

    def __init__(
        self,
        model: Mamba3LM,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 16,
        beginning: bool | None = None,
        max_new_tokens: int = 256,
        progress: Progress | None = None,
    ):
        super().__init__()
        self.model, self.encoder = model.eval(), tokenizer
        self.batch_size, self.beginning, self.max_new_tokens = batch_size, beginning, max_new_tokens
        self._progress = progress or (lambda kind, done, total: None)
        self._device = model.embedding.weight.device
        if beginning and self._token(BEGINNINGS) is None:
            raise ValueError(f"The tokenizer has no token for the beginning of a text, one of {', '.join(BEGINNINGS)}.")

    def _token(self, names: Iterable[str]) -> int | None:
        return next((t for t in map(self.encoder.token_to_id, names) if t is not None), None)

    # -- tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token = self._token(ENDS)
        if token is None:
            raise ValueError(
                f"The tokenizer has no token for the end of a text, one of {', '.join(ENDS)}; add one to it."
            )
        return token

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        token = self._token(BEGINNINGS)
        return self.eot_token_id if token is None else token

    @property
    def tokenizer_name(self) -> str:
        """Of no use to the harness here: the model has no chat template."""
        return ""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text, with those that stand around it unless ruled out (see `beginning`)."""
        if add_special_tokens is None and self.beginning is None:
            return self.encoder.encode(string, add_special_tokens=True).ids
        ids = self.encoder.encode(string, add_special_tokens=False).ids
        wanted = self.beginning if add_special_tokens is None else add_special_tokens
        return [self.prefix_token_id, *ids] if wanted else ids

    # -- the three questions

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, greedy) of each (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        scored = log_likelihoods(self.model, pairs, self.batch_size)
        for done, (index, score, greedy) in enumerate(scored, start=1):
            answers[index] = (score, greedy)
            self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
            self._progress("loglikelihood", done, len(requests))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """log p of each text in nats, from its beginning."""
        answers = []
        for request in requests:
            (text,) = request.args
            tokens = self.tok_encode(text, add_special_tokens=False)
            answers.append(rolling_log_likelihood(self.model, tokens, self.prefix_token_id))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answers[-1])
            self._progress("loglikelihood_rolling", len(answers), len(requests))
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The continuation of each context, up to the first of its stop texts or the end of the text."""
        asked = [cast("tuple[str, dict[str, Any]]", request.args) for request in requests]
        answers, done = [""] * len(requests), 0
        alike: dict[str, list[int]] = defaultdict(list)
        for i, (_, wanted) in enumerate(asked):
            alike[repr(sorted(wanted.items()))].append(i)
        for indices in alike.values():
            stops, count, sampling = self._generation(asked[indices[0]][1])
            for at, text in continue_prompts(
                self.model, [self.tok_encode(asked[i][0]) or [self.prefix_token_id] for i in indices], self._decode,
                stops=stops, end=self._token(ENDS), max_new_tokens=count, sampling=sampling, batch_size=self.batch_size,
            ):  # fmt: skip
                done += 1
                answers[indices[at]] = text
                self.cache_hook.add_partial("generate_until", asked[indices[at]], text)
                self._progress("generate_until", done, len(requests))
        return answers

    def _decode(self, ids: list[int]) -> str:
        return self.encoder.decode(ids, skip_special_tokens=False)

    def _generation(self, wanted: dict[str, Any]) -> tuple[Sequence[str], int, Sampling]:
        """(stop texts, tokens at most, how to choose) of a task's generation_kwargs."""
        unknown = sorted(set(wanted) - set(GENERATION))
        if unknown:
            raise ValueError(f"generation_kwargs has {', '.join(unknown)}; heeded here are {', '.join(GENERATION)}.")
        until = wanted.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        settings = {name: wanted[name] for name in ("top_p", "top_k", "min_p") if wanted.get(name) is not None}
        temperature = wanted.get("temperature")
        sample = wanted.get("do_sample", bool(temperature))
        sampling = (
            Sampling(temperature=1.0 if temperature is None else temperature, **settings) if sample else Sampling()
        )
        return stops, int(wanted.get("max_gen_toks") or self.max_new_tokens), sampling

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.embedding.weight.dtype).removeprefix("torch."),
            "model_fingerprint": self.model.fingerprint(),
        }
