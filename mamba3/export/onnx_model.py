"""An exported model under onnxruntime: the verbs prefill and step on NumPy arrays, and the greedy loop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mamba3.export.onnx_file import CONFIG_FILE, NEXT, PREFILL_FILE, STEP_FILE, VERSION, need

Arrays = dict[str, np.ndarray]


class OnnxLM:
    """What `export_onnx` wrote. threads: of onnxruntime, 0: as it likes. ValueError when the folder is no export."""

    def __init__(self, folder: str | Path, *, threads: int = 0):
        need("onnxruntime")
        import onnxruntime

        folder = Path(folder)
        for name in (CONFIG_FILE, STEP_FILE, PREFILL_FILE):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} holds no exported model: it has no {name}. Write one with export_onnx.")
        values = json.loads((folder / CONFIG_FILE).read_text())
        if values["version"] != VERSION:
            raise ValueError(f"{folder} has version {values['version']}; this mamba3 reads {VERSION}. Export it again.")
        self.vocab_size, self.prefill_tokens = int(values["vocab_size"]), int(values["prefill_tokens"])
        self._shapes: dict[str, list[int]] = values["state"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._step, self._prefill = (
            onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
            for name in (STEP_FILE, PREFILL_FILE)
        )

    def init_state(self, batch_size: int) -> Arrays:
        """The state before the first token."""
        return {name: np.zeros((batch_size, *shape), np.float32) for name, shape in self._shapes.items()}

    def step(self, tokens: np.ndarray, state: Arrays) -> tuple[np.ndarray, Arrays]:
        """One token a sequence, [b]: (logits [b, v], the next state)."""
        return self._run(self._step, tokens, state)

    def prefill(self, tokens: np.ndarray, state: Arrays | None = None) -> tuple[np.ndarray, Arrays]:
        """Any number of tokens [b, t] from any state: (logits [b, v] of the last ones, the next state)."""
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be [b, t] with at least one token; they came with shape {tokens.shape}.")
        state = self.init_state(tokens.shape[0]) if state is None else state
        logits, at, length = np.empty(0), 0, self.prefill_tokens
        while at < tokens.shape[1]:
            whole = at + length <= tokens.shape[1]
            session, piece = (self._prefill, tokens[:, at : at + length]) if whole else (self._step, tokens[:, at])
            logits, state = self._run(session, piece, state)
            at += length if whole else 1
        return logits, state

    def generate(self, tokens: np.ndarray, *, max_new_tokens: int = 128) -> np.ndarray:
        """The likeliest continuation of each prompt [b, t]: [b, max_new_tokens]."""
        logits, state = self.prefill(tokens)
        chosen = [logits.argmax(-1)]
        while len(chosen) < max_new_tokens:
            logits, state = self.step(chosen[-1], state)
            chosen.append(logits.argmax(-1))
        return np.stack(chosen, 1)

    def _run(self, session, tokens: np.ndarray, state: Arrays) -> tuple[np.ndarray, Arrays]:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"Tokens must lie in [0, {self.vocab_size}); they reach from {low} to {high}.")
        names = [NEXT + name for name in self._shapes]
        logits, *after = session.run(["logits", *names], {"tokens": tokens.astype(np.int64), **state})
        return logits, dict(zip(self._shapes, after, strict=True))
