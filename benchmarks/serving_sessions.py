"""Sessions in numbers: how fast parked ones come back, whether a killed process loses any, what 16 bits cost."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.checks import Refused
from benchmarks.results import Tell
from benchmarks.timer import percentiles
from mamba3 import Mamba3LM
from mamba3.engine import Engine, EngineConfig, SamplingParams, Session, SessionStore


def turn(engine: Engine, session: Session, tokens: list[int], count: int = 4) -> list[int]:
    """One greedy turn of a session."""
    engine.add(session.request("turn", tokens, SamplingParams(max_tokens=count)))
    outputs = []
    while engine.busy:
        outputs += engine.step()
    chosen = [output.token for output in outputs if output.token is not None]
    session.add_turn([*tokens, *chosen], "", outputs[-1].finish.state if outputs[-1].finish else None)
    return chosen


def parked(model: Mamba3LM, count: int, restored: int, tell: Tell) -> dict[str, Any]:
    """Sessions of a turn each, all in files; so many of them, in random order, are taken up by another store. Each has its
    tokens, and one in twenty goes on as the plain loop does."""
    engine, chance = Engine(model, EngineConfig(rows=1, cache_bytes=0)), random.Random(0)
    saving, restoring, wrong = [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        store, said = SessionStore(model, folder, save_turns=False), {}
        for i in range(count):
            name = store.create(id=f"s{i}").id
            with store.use("", name) as session:
                turn(engine, session, [i % 256, i // 256 % 256, 7])
                said[name] = list(session.tokens)
            began = time.perf_counter()
            size = store.park("", name).nbytes
            saving.append(time.perf_counter() - began)
            if i % 100 == 0:
                tell(f"{i} of {count} sessions parked")
        began = time.perf_counter()
        store = SessionStore(model, folder)
        opening = time.perf_counter() - began
        if len(store) != count:
            raise Refused(f"{count} sessions were parked and {len(store)} found")
        for i, number in enumerate(chance.sample(range(count), min(restored, count))):
            name = f"s{number}"
            began = time.perf_counter()
            with store.use("", name) as session:
                restoring.append(time.perf_counter() - began)
                wrong += session.tokens != said[name]
                if i % 20 == 0:
                    expected = model.generate(torch.tensor([[*said[name], 65]]), max_new_tokens=3).tokens[0].tolist()
                    wrong += turn(engine, session, [65], 3) != expected
            store.park("", name)
            if i % 100 == 0:
                tell(f"{i} of {restored} sessions restored")
    if wrong:
        raise Refused(f"{wrong} sessions did not go on as they should")
    return {
        "sessions": count, "restored": len(restoring), "bytes_each": size,
        "park_s": percentiles(saving), "restore_s": percentiles(restoring),
        "open_folder_s": opening,
    }  # fmt: skip


_VICTIM = """
import sys
from mamba3 import Mamba3LM
from mamba3.engine import Engine, EngineConfig, SessionStore
from benchmarks.serving_sessions import turn
model = Mamba3LM.from_pretrained(sys.argv[1]).eval()
store = SessionStore(model, sys.argv[2], save_turns=False)
engine = Engine(model, EngineConfig(rows=1, cache_bytes=0))
store.create(id="a")
turns = 0
while True:
    with store.use("", "a") as session:
        turn(engine, session, [2], 1)
    turns += 1
    print("parking", turns, flush=True)
    store.park("", "a")
    print("parked", turns, flush=True)
"""
_PARK_S = 0.03  # what parking takes, about: the kill falls into it


def kills(model: Path, count: int, tell: Tell) -> dict[str, Any]:
    """kill -9 of processes that park: what lies in the folder then is a session, whole, with every turn that was parked."""
    lm, chance, found, amid = Mamba3LM.from_pretrained(model).eval(), random.Random(0), [], 0
    for i in range(count):
        with tempfile.TemporaryDirectory() as folder:
            lines = _killed(model, folder, f"parking {chance.randint(2, 6)}\n", chance.uniform(0, _PARK_S))
            amid += any(Path(folder).rglob(".*.safetensors.*"))
            turns = max(int(line.split()[1]) for line in lines if line.startswith("parked") and line.endswith("\n"))
            with SessionStore(lm, folder).use("", "a") as session:  # raises when it is damaged
                found.append(len(session.turns))
                if found[-1] not in (turns, turns + 1) or len(session.tokens) != 2 * found[-1]:
                    raise Refused(f"kill {i}: {turns} turns were parked and {found[-1]} found")
        tell(f"{i + 1} of {count} processes killed, {amid} amid a write")
    return {"kills": count, "amid_a_write": amid, "lost": 0, "turns_found": {"fewest": min(found), "most": max(found)}}


def _killed(model: Path, folder: str, moment: str, seconds: float) -> list[str]:
    """What a process said that was killed so long after it said `moment`."""
    command = [sys.executable, "-c", _VICTIM, str(model), folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line == moment:
                    break
            time.sleep(seconds)
        finally:
            process.send_signal(signal.SIGKILL)
        if moment not in lines:
            raise Refused("the process that was to be killed ended before")
        return lines + process.stdout.readlines()


@torch.no_grad()
def drift(model: Mamba3LM, tokens: int, tell: Tell) -> dict[str, Any]:
    """What a state kept in 16 bits changes in the logits of the tokens that follow, against the state itself."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 256, (1, tokens), generator=generator)
    follows = torch.randint(0, 256, (1, tokens), generator=generator)
    _, state = model.prefill(prompt)
    exact, _ = model.prefill(follows, state)
    reference = exact.double().log_softmax(-1)
    found: dict[str, Any] = {"tokens": tokens}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        session = Session("s", tokens=prompt[0].tolist())
        session.add_turn([], "", state)
        back = Session.from_tensors(session.tensors(dtype), model).states[1]
        logits, _ = model.prefill(follows, back)
        divergence = (reference.exp() * (reference - logits.double().log_softmax(-1))).sum(-1)[0]
        found[name] = {
            "divergence_nats": {"first": float(divergence[0]), "mean": float(divergence.mean()), "last": float(divergence[-1])},
            "other_likeliest_token": float((logits.argmax(-1) != exact.argmax(-1)).double().mean()),
            "largest_logit_change": float((logits - exact).abs().max()),
        }  # fmt: skip
    return found
