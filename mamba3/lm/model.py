"""The language model (mathematics.md, section 8).

h += mixer(RMSNorm(h));  h += mlp(RMSNorm(h));  ...;  logits = head(RMSNorm(h)),  head tied to the embedding
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3.lm import generate as generation
from mamba3.lm import shards
from mamba3.lm.config import ARCHITECTURE, MODEL_TYPE, Mamba3Config
from mamba3.lm.draft import Draft
from mamba3.lm.state import LayerState, LMState
from mamba3.nn import Attention, GatedMLP, Mamba3, RMSNorm, init
from mamba3.nn.linear import few_rows, project
from mamba3.ops.state_file import replace_file
from mamba3.ops.types import wide_dtype
from mamba3.ops.validation import check_cu_seqlens

CONFIG_FILE = "config.json"
FINGERPRINT_SAMPLES = 64


class Step(NamedTuple):
    """The mixer's step in a block: of one token its norm and its projection are one."""

    state: LayerState
    live: Tensor | None


class Block(nn.Module):
    """One mixer and, unless d_intermediate is 0, one MLP, each behind its norm and added to the residual stream."""

    def __init__(self, config: Mamba3Config, kind: str, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.norm = RMSNorm(config.d_model, config.norm_eps, **factory)
        if kind == "attention":
            assert config.attn_heads is not None
            self.mixer: Any = Attention(
                config.d_model, config.attn_heads, config.attn_kv_heads, config.attn_head_dim,
                qkv_bias=config.attn_qkv_bias, out_bias=config.attn_out_bias, **factory,
            )  # fmt: skip
        else:
            self.mixer = Mamba3(
                config.d_model, config.d_state, config.expand, config.headdim, config.ngroups,
                mimo_rank=config.mimo_rank, rope_fraction=config.rope_fraction, decay=config.decay,
                out_norm=config.out_norm, lam=config.lam, rotation=config.rotation, B_bias=config.B_bias,
                C_bias=config.C_bias, bc_bias_trainable=config.bc_bias_trainable, d_conv=config.d_conv,
                A_floor=config.A_floor, dt_min=config.dt_min, dt_max=config.dt_max, dt_init_floor=config.dt_init_floor,
                mimo=config.mimo, **factory,
            )  # fmt: skip
        self.norm2, self.mlp = None, None
        if config.d_intermediate:
            self.norm2 = RMSNorm(config.d_model, config.norm_eps, **factory)
            self.mlp = GatedMLP(config.d_model, config.d_intermediate, **factory)

    def forward(
        self,
        h: Tensor,
        y: Tensor | None,
        mix: Callable[[Tensor], tuple[Tensor, Any]] | Step,
        *,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor, Any]:
        """`through`, called as a module is: what wraps modules (sharding, recomputation) takes hold of every verb."""
        return self.through(h, y, mix, last_only=last_only)

    def run(
        self, h: Tensor, mix: Callable[[Tensor], tuple[Tensor, Any]], *, last_only: bool = False
    ) -> tuple[Tensor, Any]:
        """The block with one of the mixer's verbs in the middle: (h, what the verb returned beside y).

        last_only: the verb returns y of the last token alone, and so does the block.
        """
        h, y, extra = self.through(h, None, mix, last_only=last_only)
        return h + y, extra

    def through(
        self,
        h: Tensor,
        y: Tensor | None,
        mix: Callable[[Tensor], tuple[Tensor, Any]] | Step,
        *,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor, Any]:
        """`run` of the residual stream h + y, with the last sum left to do: the next block's norm does it in its own pass."""
        dtype = self.mixer.in_proj.weight.dtype
        if isinstance(mix, Step):
            row, h = self.norm.project(h, y, dtype, self.mixer.in_proj)
            mixed, extra = self.mixer.step_row(row, mix.state, mix.live)
        else:
            u, h = self.norm.after(h, y, dtype)
            mixed, extra = mix(u)
            h = h[:, -1:] if last_only else h
        if self.mlp is not None and self.norm2 is not None:
            mixed, h = self.mlp.after(self.norm2, h, mixed, dtype)
        return h, mixed, extra


class Mamba3LM(nn.Module):
    """A Mamba-3 language model; tokens [b, t] to logits [b, t, padded_vocab_size].

    Three verbs: `forward` (training), `prefill` (any number of tokens from any state), `step` (one token, in place).
    """

    def __init__(
        self, config: Mamba3Config, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.config = config
        factory = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model, **factory)
        self.layers = nn.ModuleList(Block(config, kind, **factory) for kind in config.layers)
        self.norm_f = RMSNorm(config.d_model, config.norm_eps, **factory)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False, **factory)
        self._fingerprint: tuple[Any, str] | None = None
        self._initialize()

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.layers))

    @torch.no_grad()
    def _initialize(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)
        residuals = len(self.config.layers) * (2 if self.config.d_intermediate else 1)
        for block in self._blocks():
            init.residual_(block.mixer.out_proj, residuals)
            if block.mlp is not None:
                init.residual_(block.mlp.fc2, residuals)

    # -- the three verbs

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor | list[int] | None = None) -> Tensor:
        """Logits [b, t, padded_vocab_size] of every token's successor. cu_seqlens: b = 1, packed documents."""
        return self.head(self.hidden(input_ids, cu_seqlens))

    def hidden(self, input_ids: Tensor, cu_seqlens: Tensor | list[int] | None = None) -> Tensor:
        """What the head reads: [b, t, d_model], normalised."""
        boundaries = self._boundaries(input_ids, cu_seqlens)
        h, y = self._embed(input_ids, 2), None
        for block in self._blocks():
            h, y, _ = block(h, y, lambda u, block=block: (block.mixer(u, boundaries), None))
        return self.norm_f.after(h, y, self.embedding.weight.dtype)[0]

    def forward_segment(
        self, input_ids: Tensor, enter: Callable[..., Any], cu_seqlens: Tensor | list[int] | None = None
    ) -> Tensor:
        """`forward` for one rank's part, [1, t], of a sequence that is spread over ranks; `enter` as the layer's has it.

        Raises ValueError for a model with attention, whose cache is not a summary.
        """
        if "attention" in self.config.layers:
            raise ValueError(
                "A sequence spread over ranks needs layers that a fixed state joins, but this model has attention layers; "
                "use context_parallel=1, or layers of kind mamba3 alone."
            )
        boundaries = self._boundaries(input_ids, cu_seqlens)
        h, y = self._embed(input_ids, 2), None
        for block in self._blocks():
            h, y, _ = block(h, y, lambda u, block=block: (block.mixer.forward_segment(u, enter, boundaries), None))
        return self.head(self.norm_f.after(h, y, self.embedding.weight.dtype)[0])

    def head(self, hidden: Tensor) -> Tensor:
        """Logits from what `hidden` returned."""
        if self.lm_head is not None:
            return project(self.lm_head, hidden)
        logits = few_rows(hidden, self.embedding.weight)
        return F.linear(hidden, self.embedding.weight) if logits is None else logits

    def prefill(
        self,
        input_ids: Tensor,
        state: LMState | None = None,
        cu_seqlens: Tensor | list[int] | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[Tensor, LMState]:
        """Read tokens from any state: (logits [b, t, v], the state after each sequence). The given state is not changed.

        last_only: logits of each sequence's last token alone, [b, 1, v] (or [s, 1, v] for a pack).
        """
        boundaries = self._boundaries(input_ids, cu_seqlens)
        batch = input_ids.shape[0] if boundaries is None else len(boundaries) - 1
        before: list[LayerState | None] = [None] * len(self.layers)
        if state is not None:
            self._check_state(state, batch)
            before = list(state.layers)
        h, y, layers = self._embed(input_ids, 2), None, []
        shorten = last_only and boundaries is None
        for i, (block, layer) in enumerate(zip(self._blocks(), before, strict=True)):
            if shorten and i == len(self.layers) - 1:
                h, y, layer = block(h, y, lambda u, m=block.mixer, s=layer: m.prefill_last(u, s), last_only=True)
            else:
                h, y, layer = block(h, y, lambda u, m=block.mixer, s=layer: m.prefill(u, s, boundaries))
            layers.append(layer)
        if last_only and boundaries is not None and y is not None:
            ends = [b - 1 for b in boundaries[1:]]
            h, y = h[0, ends].unsqueeze(1), y[0, ends].unsqueeze(1)
        after = LMState(layers, self._tokens_read(input_ids, boundaries, state), self._name(state))
        return self.head(self.norm_f.after(h, y, self.embedding.weight.dtype)[0]), after

    def step(self, input_ids: Tensor, state: LMState, live: Tensor | None = None) -> tuple[Tensor, LMState]:
        """Read one token a sequence, [b]: (logits [b, v], state).

        The given state is updated in place and returned. While gradients are recorded it is left alone, and a new one
        is returned. live [1] int32: how many of the sequences, the first ones, there are; the others are padding, whose state
        stays and whose logits mean nothing.
        """
        self._check_state(state, input_ids.shape[0])
        h, y, layers = self._embed(input_ids, 1), None, []
        for block, layer in zip(self._blocks(), state.layers, strict=True):
            h, y, layer = block(h, y, Step(layer, live))
            layers.append(layer)
        logits = self.head(self.norm_f.after(h, y, self.embedding.weight.dtype)[0])
        read = 1 if live is None else torch.arange(len(input_ids), device=live.device) < live
        if torch.is_grad_enabled():
            return logits, LMState(layers, state.tokens + read, state.fingerprint)
        state.layers, state.tokens = layers, state.tokens.add_(read)
        return logits, state

    @torch.no_grad()
    def verify(self, input_ids: Tensor, state: LMState) -> tuple[Tensor, Draft]:
        """Read tokens [b, t] of which the last ones may be taken back: (logits [b, t, v], draft).

        The given state is not changed (caches of attention layers must have room for t more tokens) until
        `draft.accept(counts)` moves it on by counts[i] of the tokens of row i.
        """
        self._check_state(state, input_ids.shape[0])
        h, y, reads = self._embed(input_ids, 2), None, []
        for block, layer in zip(self._blocks(), state.layers, strict=True):
            h, y, read = block(h, y, lambda u, m=block.mixer, s=layer: m.verify(u, s))
            reads.append(read)
        logits = self.head(self.norm_f.after(h, y, self.embedding.weight.dtype)[0])
        return logits, Draft(self, state, reads)

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LMState:
        """The state before the first token."""
        layers: list[LayerState] = [block.mixer.init_state(batch_size, device, dtype) for block in self._blocks()]
        tokens = torch.zeros(batch_size, dtype=torch.int64, device=device or self.embedding.weight.device)
        return LMState(layers, tokens, self._name(None))

    def _name(self, state: LMState | None) -> str | None:
        """The fingerprint that a state which follows `state` carries."""
        if state is not None:
            return state.fingerprint
        return None if torch.compiler.is_compiling() else self.fingerprint()

    def _tokens_read(self, input_ids: Tensor, boundaries: list[int] | None, state: LMState | None) -> Tensor:
        """[s]: how many tokens each sequence has read once it has read input_ids."""
        device = self.embedding.weight.device if state is None else state.tokens.device
        if boundaries is None:
            read = torch.full((input_ids.shape[0],), input_ids.shape[1], dtype=torch.int64, device=device)
        else:
            read = torch.tensor(boundaries, device=device).diff()
        return read if state is None else state.tokens + read

    def generate(self, input_ids: Tensor, **settings: Any) -> generation.Generation:
        """Continue prompts; the settings and their meaning are those of `mamba3.lm.generate.generate`."""
        return generation.generate(self, input_ids, **settings)

    def compile_around_scan(self) -> None:
        """torch.compile the norms, the MLPs and the coefficients of each block, in place; not the scan between them.

        The scan's table of chunks is built from the values of cu_seqlens, which would mean a graph for every batch.
        """
        for block in self._blocks():
            for part in (block.norm, block.norm2, block.mlp):
                if part is not None:
                    part.compile()
            if isinstance(block.mixer, Mamba3):
                block.mixer.compile_coefficients()

    # -- parameters and files

    def num_parameters(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def fingerprint(self) -> str:
        """A short name for these weights: a hash of what the configuration builds and of samples of every parameter."""
        modules: list[nn.Module] = [self]  # asked for at every prefill without a state: PyTorch's walk is slow
        for module in modules:
            modules.extend(m for m in module._modules.values() if m is not None)
        found = (p for module in modules for p in module._parameters.values() if p is not None)
        key = tuple((p.data_ptr(), p._version) for p in found if not p.is_meta)
        if self._fingerprint is None or self._fingerprint[0] != key:
            parameters = dict(self.named_parameters())
            digest = hashlib.sha256(self.config.canonical().to_json().encode())
            samples = []
            for v in (part for p in parameters.values() for part in _parts(p.detach())):
                flat = v.reshape(-1)
                samples.append(flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLES)].double())
            if samples and not samples[0].is_meta:
                digest.update(torch.cat(samples).cpu().numpy().tobytes())
            self._fingerprint = (key, digest.hexdigest()[:16])
        return self._fingerprint[1]

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str | None = None) -> None:
        """Write config.json and model.safetensors, each atomically; the folder is made if it is missing.

        transformers reads the folder too, after `import mamba3.hf`. max_shard_size: bytes, or a text such as "5GB"; larger
        weights are split into files with an index.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shards.write(folder, self.state_dict(), max_shard_size)
        dtype = str(self.embedding.weight.dtype).removeprefix("torch.")
        values = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "dtype": dtype, **self.config.to_dict()}
        replace_file(folder / CONFIG_FILE, (json.dumps(values, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mamba3LM:
        """Load what `save_pretrained` wrote, here or in transformers, in the dtype of the file unless told.

        Raises ValueError when a file is missing, damaged, of another model, or holds NaN.
        """
        folder = Path(folder)
        weights = shards.find(folder)
        if not (folder / CONFIG_FILE).is_file() or weights is None:
            absent = shards.WEIGHTS_FILE if (folder / CONFIG_FILE).is_file() else CONFIG_FILE
            raise ValueError(f"{folder} is not a saved Mamba3LM: it has no {absent}.")
        config = Mamba3Config.from_json((folder / CONFIG_FILE).read_text())
        # transformers puts the blocks of a model with a head under this name.
        tensors = {name.removeprefix("model."): value for name, value in shards.read(weights).items()}
        return cls.from_weights(config, tensors, device=device, dtype=dtype, source=str(folder))

    @classmethod
    def from_weights(
        cls,
        config: Mamba3Config,
        weights: dict[str, Tensor],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        source: str = "the weights",
    ) -> Mamba3LM:
        """A model from a state dict under our names. ValueError names missing, unknown, misshapen and NaN tensors."""
        if "embedding.weight" in weights:
            dtype = dtype or weights["embedding.weight"].dtype
        with torch.device("meta"):
            model = cls(config, dtype=dtype)
        expected = model.state_dict()
        check_weights(expected, weights, source)
        model = model.to_empty(device=device or "cpu")
        model.load_state_dict(weights)
        return model

    # -- checks

    def _boundaries(self, input_ids: Tensor, cu_seqlens: Tensor | list[int] | None) -> list[int] | None:
        if cu_seqlens is None:
            return None
        return check_cu_seqlens(cu_seqlens, input_ids.shape[0], input_ids.shape[-1])

    def _embed(self, input_ids: Tensor, dimensions: int) -> Tensor:
        letters = "[b, t]" if dimensions == 2 else "[b]"
        if input_ids.ndim != dimensions or input_ids.is_floating_point() or input_ids.numel() == 0:
            raise ValueError(
                f"input_ids must be integers {letters}, at least one; they came as {input_ids.dtype} of shape "
                f"{tuple(input_ids.shape)}."
            )
        h = self.embedding(input_ids)
        return h.to(wide_dtype(h.dtype)) if self.config.residual_in_fp32 else h

    def _check_state(self, state: LMState, batch: int) -> None:
        if len(state.layers) != len(self.layers):
            raise ValueError(f"The state has {len(state.layers)} layers but the model {len(self.layers)}.")
        if state.batch_size != batch:
            raise ValueError(f"The state holds {state.batch_size} sequences, but {batch} came in.")


def _parts(weight: Tensor) -> list[Tensor]:
    """The plain tensors of a weight: itself, or what a quantised one is made of (values, scales), which has no view."""
    flatten = getattr(weight, "__tensor_flatten__", None)
    return [part for name in flatten()[0] for part in _parts(getattr(weight, name))] if flatten else [weight]


def check_weights(expected: dict[str, Tensor], weights: dict[str, Tensor], source: str) -> None:
    """ValueError that names every missing, unknown or misshapen tensor, and those that hold NaN or infinity."""
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in expected]
    for name, value in weights.items():
        if name not in expected:
            continue
        if value.shape != expected[name].shape:
            problems.append(f"{name} has shape {tuple(value.shape)}, not {tuple(expected[name].shape)}")
        elif value.is_floating_point() and not all(bool(v.isfinite()) for v in value.aminmax()):
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{source} do not fit this model: {shown}.")
