"""A 12-layer, 768-wide model against transformers' Mamba-2 of equal width, depth, state and vocabulary.

The peer runs its PyTorch path (its kernels need a GPU) as its generate() does: a prefill that makes a cache and keeps the
last token's logits, then one token at a time with that cache. Both sides read the same tokens, both choose the next token
by argmax, both have random weights; each is taken at its best of eager and torch.compile, the peer at its best chunk size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.checks import Check, distance, require
from benchmarks.compilation import try_compile
from benchmarks.results import Tell
from benchmarks.timer import Race, race
from mamba3 import Mamba3Config, Mamba3LM, preset

PREFILL_GOAL, DECODE_GOAL = 2.0, 1.3
# Logits of sound runs differ by 1e-5 in float32; in bfloat16 by 1e-2 for us and 6e-2 for the peer, whose cached state is
# bfloat16 too. A wrong cache gives 1. float32 comes first and runs the same code, so that what is wrong by less ends there.
LOGITS_AGREE = {torch.float32: 1e-4, torch.bfloat16: 1.5e-1}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """`prompt` tokens are read before decoding and, with `checked` more, verified against the whole forward pass."""

    tokens: int = 2048
    prompt: int = 80
    checked: int = 16
    decoded: int = 32
    rounds: int = 3
    d_model: int = 768
    layers: int = 12
    d_state: int = 128
    headdim: int = 64
    vocab_size: int = 32_000
    chunk_sizes: tuple[int, ...] = (64, 128, 256)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    presets: tuple[str, ...] = ("siso-180m", "mimo-180m")
    compile_limit_s: float = 90.0  # 0: eager alone


def _agree(law: str, ours: Tensor, truth: Tensor, dtype: torch.dtype) -> Check:
    return Check(law, distance(ours, truth), LOGITS_AGREE[dtype])


class Side(Protocol):
    """A model under one way of running it. Logits are of the last token, [1, v], but for `whole`, [1, t, v]."""

    def read(self, ids: Tensor) -> tuple[Tensor, Any]: ...

    def step(self, token: Tensor, memory: Any) -> tuple[Tensor, Any]: ...

    def whole(self, ids: Tensor) -> Tensor: ...


class Ours:
    """Mamba3LM, eager or with some of its functions replaced by compiled ones."""

    def __init__(self, model: Mamba3LM, step: Callable | None = None):
        self.model = model
        self._step = model.step if step is None else step

    def read(self, ids: Tensor) -> tuple[Tensor, Any]:
        logits, state = self.model.prefill(ids, last_only=True)
        return logits[:, -1], state

    def step(self, token: Tensor, memory: Any) -> tuple[Tensor, Any]:
        return self._step(token, memory)

    def whole(self, ids: Tensor) -> Tensor:
        return self.model(ids)


class Peer:
    """transformers' Mamba2ForCausalLM at one chunk size, eager or compiled."""

    def __init__(self, model: Any, chunk_size: int, forward: Callable | None = None):
        self.model, self.chunk_size = model, chunk_size
        self._forward = model if forward is None else forward

    def _at_chunk_size(self) -> None:
        for block in self.model.backbone.layers:
            block.mixer.chunk_size = self.chunk_size

    def read(self, ids: Tensor) -> tuple[Tensor, Any]:
        self._at_chunk_size()
        output = self._forward(input_ids=ids, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1], output.cache_params

    def step(self, token: Tensor, memory: Any) -> tuple[Tensor, Any]:
        output = self._forward(input_ids=token.unsqueeze(1), cache_params=memory, use_cache=True)
        return output.logits[:, -1], memory

    def whole(self, ids: Tensor) -> Tensor:
        self._at_chunk_size()
        return self.model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def measure(sizes: Sizes, tell: Tell) -> list[dict[str, Any]]:
    """A row for each dtype: parameters, tokens/s of prefill and decode for every contestant, and the ratios."""
    rows = []
    for dtype in sizes.dtypes:
        rows.append(_measure_dtype(sizes, dtype, tell))
        torch.compiler.reset()  # compiled code keeps its model alive
    return rows


def build_ours(sizes: Sizes, dtype: torch.dtype) -> Mamba3LM:
    """Mixers alone, as the peer has no MLP."""
    torch.manual_seed(0)
    config = Mamba3Config(
        vocab_size=sizes.vocab_size, d_model=sizes.d_model, layers=("mamba3",) * sizes.layers,
        d_state=sizes.d_state, headdim=sizes.headdim,
    )  # fmt: skip
    return Mamba3LM(config, dtype=dtype).eval()


def build_peer(sizes: Sizes, dtype: torch.dtype) -> Any:
    """The peer: expand 2, one group, tied embeddings, like ours."""
    from transformers import Mamba2Config, Mamba2ForCausalLM, logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=sizes.vocab_size, hidden_size=sizes.d_model, num_hidden_layers=sizes.layers,
        state_size=sizes.d_state, head_dim=sizes.headdim, num_heads=2 * sizes.d_model // sizes.headdim, expand=2,
        n_groups=1, chunk_size=sizes.chunk_sizes[-1], tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = Mamba2ForCausalLM(config)
    return model.to(dtype).eval()


def parameters(model: nn.Module) -> int:
    """Parameters, a tied one counted once."""
    return sum(p.numel() for p in model.parameters())


def _measure_dtype(sizes: Sizes, dtype: torch.dtype, tell: Tell) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    ours, peer = build_ours(sizes, dtype), build_peer(sizes, dtype)
    ids = torch.randint(sizes.vocab_size, (1, sizes.tokens))
    tell(f"{name}: the peer's chunk sizes")
    trial = _race_chunk_sizes(peer, ids, sizes, dtype)
    chunk_size = int(trial.fastest(list(trial.seconds)))

    prefill: dict[str, Side] = {"ours eager": Ours(ours), "peer eager": Peer(peer, chunk_size)}
    decode: dict[str, Side] = dict(prefill)
    notes: dict[str, dict[str, Any]] = {}
    if sizes.compile_limit_s:
        _add_compiled(ours, peer, chunk_size, ids, sizes, prefill, decode, notes, tell)
    further = {n: Mamba3LM(preset(n, vocab_size=sizes.vocab_size), dtype=dtype).eval() for n in sizes.presets}
    for preset_name, model in further.items():
        prefill[preset_name] = decode[preset_name] = Ours(model)

    tell(f"{name}: prefill of {sizes.tokens:,} tokens")
    checks = [c for side_name, side in decode.items() for c in cached_decode_holds(side_name, side, ids, sizes, dtype)]
    require(checks)
    read = race(
        {side_name: lambda side=side: side.read(ids)[0] for side_name, side in prefill.items()},
        lambda outputs: [*checks, *_prefill_holds(prefill, outputs, ids, dtype)],
        sizes.rounds,
    )
    tell(f"{name}: decode")
    decoding = race({n: _decoder(side, ids, sizes) for n, side in decode.items()}, lambda outputs: checks, sizes.rounds)
    models = {"ours": ours, "peer": peer, **further}
    return {
        "dtype": name,
        "parameters": {n: parameters(model) for n, model in models.items()},
        "peer_chunk_sizes_s": {n: spread.to_dict() for n, spread in trial.seconds.items()},
        "peer_chunk_size": chunk_size,
        "compile": notes,
        "prefill": _verdict(read, sizes.tokens, PREFILL_GOAL),
        "decode": _verdict(decoding, sizes.decoded, DECODE_GOAL),
        "checks": [check._asdict() for check in read.checks],
    }


def _race_chunk_sizes(peer: Any, ids: Tensor, sizes: Sizes, dtype: torch.dtype) -> Race:
    """Eager alone: compiled too, 64 was the fastest of 64, 128 and 256 where we tried."""
    sides = {str(c): Peer(peer, c) for c in sizes.chunk_sizes}
    first = str(sizes.chunk_sizes[0])
    return race(
        {c: lambda side=side: side.read(ids)[0] for c, side in sides.items()},
        lambda outputs: [
            _agree(f"peer: chunk size {c} = {first}", v, outputs[first], dtype) for c, v in outputs.items()
        ],
        rounds=1,
    )


def _decoder(side: Side, ids: Tensor, sizes: Sizes) -> Callable[[], Tensor]:
    logits, memory = side.read(ids[:, : sizes.prompt])

    def run() -> Tensor:
        nonlocal logits, memory
        for _ in range(sizes.decoded):
            logits, memory = side.step(logits.argmax(-1), memory)
        return logits

    return run


def cached_decode_holds(name: str, side: Side, ids: Tensor, sizes: Sizes, dtype: torch.dtype) -> list[Check]:
    """The checks that a prompt read and then stepped through gives the logits of one forward pass over all of it."""
    ids = ids[:, : sizes.prompt + sizes.checked]
    whole = side.whole(ids)
    logits, memory = side.read(ids[:, : sizes.prompt])
    stepped = [logits]
    for t in range(sizes.prompt, ids.shape[1]):
        logits, memory = side.step(ids[:, t], memory)
        stepped.append(logits)
    return [
        _agree(f"{name}: cached decode = whole forward", torch.stack(stepped, 1), whole[:, sizes.prompt - 1 :], dtype)
    ]


def _prefill_holds(sides: dict[str, Side], outputs: dict[str, Tensor], ids: Tensor, dtype: torch.dtype) -> list[Check]:
    """The timed prefill: an eager one equals reading all but the last token and stepping; a compiled one equals eager."""
    checks = []
    for name, side in sides.items():
        if "compiled" in name:
            law, expected = "compiled prefill = eager prefill", outputs[name.replace("compiled", "eager")]
        else:
            law, expected = "prefill = prefill, then a step", side.step(ids[:, -1], side.read(ids[:, :-1])[1])[0]
        checks.append(_agree(f"{name}: {law}", outputs[name], expected, dtype))
    return checks


def _verdict(result: Race, tokens: int, goal: float) -> dict[str, Any]:
    ours = result.fastest([n for n in result.seconds if n.startswith("ours")])
    peer = result.fastest([n for n in result.seconds if n.startswith("peer")])
    ratio = result.ratio(peer, ours)
    return {
        "tokens": tokens,
        "seconds": {n: spread.to_dict() for n, spread in result.seconds.items()},
        "tokens_per_s": {n: tokens / spread.median for n, spread in result.seconds.items()},
        "best": {"ours": ours, "peer": peer},
        "ratio": ratio.to_dict(),
        "ratio_eager": result.ratio("peer eager", "ours eager").to_dict(),
        "ratios_to_peer": {n: result.ratio(peer, n).to_dict() for n in result.seconds if not n.startswith("peer")},
        "goal": goal,
        "met": ratio.median >= goal,
    }


# -- torch.compile


def _add_compiled(
    ours: Mamba3LM,
    peer: Any,
    chunk_size: int,
    ids: Tensor,
    sizes: Sizes,
    prefill: dict[str, Side],
    decode: dict[str, Side],
    notes: dict[str, dict[str, Any]],
    tell: Tell,
) -> None:
    """Each side's compiled forms, as contestants; where one fails or takes too long, the note says why."""
    prompt = ids[:, : sizes.prompt]
    peer_eager, ours_eager = Peer(peer, chunk_size), Ours(ours)

    def twice(side: Side, reader: Side) -> None:
        logits, memory = reader.read(prompt)
        for _ in range(2):
            logits, memory = side.step(logits.argmax(-1), memory)

    def peer_whole() -> Peer:
        return Peer(peer, chunk_size, torch.compile(peer, dynamic=False))

    def ours_step() -> Ours:
        return Ours(ours, torch.compile(ours.step, dynamic=False))

    for kind, side_name, make, warm in (
        ("decode", "peer", peer_whole, lambda side: twice(side, peer_eager)),
        ("decode", "ours", ours_step, lambda side: twice(side, ours_eager)),
        ("prefill", "peer", peer_whole, lambda side: side.read(ids)),
        ("prefill", "ours", lambda: Ours(_compiled_mixers(ours)), lambda side: side.read(ids)),
    ):
        tell(f"compiling {kind}, {side_name}")
        side, notes[f"{side_name} {kind}"] = try_compile(make, warm, sizes.compile_limit_s)
        if side is not None and kind == "prefill":
            prefill[f"{side_name} compiled"] = side
        elif side is not None:
            decode[f"{side_name} compiled"] = _ReadEager(side, peer_eager if side_name == "peer" else ours_eager)


class _ReadEager:
    """A side that steps compiled and reads eagerly, so that a prompt's length compiles nothing."""

    def __init__(self, compiled: Side, eager: Side):
        self.step, self.read, self.whole = compiled.step, eager.read, eager.whole


def _compiled_mixers(model: Mamba3LM) -> Mamba3LM:
    """A copy whose mixers' prefill is compiled: one graph for all layers, as the whole model's takes minutes to compile."""
    model = copy.deepcopy(model)
    for block in model._blocks():
        block.mixer.prefill = torch.compile(block.mixer.prefill, dynamic=False)
    return model
