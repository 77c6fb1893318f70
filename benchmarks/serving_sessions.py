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
from benchmarks.serving_load import percentiles
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
    """Sessions of a turn each, all in files; some at random are taken up by another store, and go on as they should."""
    engine, chance = Engine(model, EngineConfig(rows=1, cache_bytes=0)), random.Random(0)
    parking, restoring, wrong = [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        store, said = SessionStore(model, folder), {}
        for i in range(count):
            name = store.create(id=f"s{i}").id
            with store.use("", name) as session:
                turn(engine, session, [i % 256, i // 256 % 256, 7])
                said[name] = list(session.tokens)
            began = time.perf_counter()
            size = store.park("", name).nbytes
            parking.append(time.perf_counter() - began)
            if i % 100 == 0:
                tell(f"{i} of {count} sessions parked")
        began = time.perf_counter()
        store = SessionStore(model, folder)
        opening = time.perf_counter() - began
        if len(store) != count:
            raise Refused(f"{count} sessions were parked and {len(store)} found")
        for i in range(restored):
            name = f"s{chance.randrange(count)}"
            began = time.perf_counter()
            with store.use("", name) as session:
                restoring.append(time.perf_counter() - began)
                wrong += session.tokens != said[name]
                if i % 20 == 0:
                    expected = model.generate(torch.tensor([[*said[name], 65]]), max_new_tokens=3).tokens[0].tolist()
                    wrong += turn(engine, session, [65], 3) != expected
            store.delete("", name) if i % 20 == 0 else store.park("", name)
            if i % 20 == 0:
                store.create(id=name)
                said[name] = []
            tell(f"{i} of {restored} sessions restored")
    if wrong:
        raise Refused(f"{wrong} sessions did not go on as they should")
    return {
        "sessions": count, "restored": restored, "bytes_each": size,
        "park_s": percentiles(parking), "restore_s": percentiles(restoring),
        "open_folder_s": opening,
    }  # fmt: skip


_VICTIM = """
import sys
from mamba3 import Mamba3LM
from mamba3.engine import Engine, EngineConfig, SessionStore
from benchmarks.serving_sessions import turn
model = Mamba3LM.from_pretrained(sys.argv[1]).eval()
store, engine = SessionStore(model, sys.argv[2]), Engine(model, EngineConfig(rows=1, cache_bytes=0))
store.create(id="a")
with store.use("", "a") as session:
    turn(engine, session, [1])
store.save("", "a")
print("go", flush=True)
while True:
    with store.use("", "a") as session:
        turn(engine, session, [2], 1)
    store.park("", "a")
"""


def kills(model: Path, count: int, tell: Tell) -> dict[str, Any]:
    """kill -9 of a process that does nothing but say and park; what lies in the folder then is a session, whole."""
    lm, chance, turns = Mamba3LM.from_pretrained(model).eval(), random.Random(0), []
    for i in range(count):
        with tempfile.TemporaryDirectory() as folder:
            with subprocess.Popen(
                [sys.executable, "-c", _VICTIM, str(model), folder], stdout=subprocess.PIPE, text=True
            ) as process:
                assert process.stdout is not None
                if process.stdout.readline() != "go\n":
                    raise Refused("the process that was to be killed did not start")
                time.sleep(chance.uniform(0, 0.3))
                process.send_signal(signal.SIGKILL)
            with SessionStore(lm, folder).use("", "a") as session:  # raises when it is damaged
                turns.append(len(session.turns))
                if len(session.tokens) != 5 + 2 * (len(session.turns) - 1):
                    raise Refused(f"after kill {i} the session has {len(session.tokens)} tokens")
        tell(f"{i + 1} of {count} processes killed")
    return {"kills": count, "lost": 0, "turns_found": {"fewest": min(turns), "most": max(turns)}}


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
