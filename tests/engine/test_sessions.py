"""Sessions go on as if they had never stopped: continued, forked, rewound, parked, moved; and they are their owner's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba3.engine import (
    Engine,
    EngineConfig,
    SamplingParams,
    Session,
    SessionBusy,
    SessionStore,
    TooManySessions,
    UnknownSession,
)
from tests.engine.cases import greedy, model
from tests.lm.test_model import tiny

ROOT = Path(__file__).parents[2]


def say(engine: Engine, session: Session, tokens: list[int], count: int = 4, keep: int = 8) -> list[int]:
    """One turn: what the model answers."""
    engine.add(session.request("turn", tokens, SamplingParams(max_tokens=count)))
    outputs = []
    while engine.busy:
        outputs += engine.step()
    chosen = [output.token for output in outputs]
    session.add_turn([*tokens, *chosen], "x" * len(tokens), outputs[-1].finish.state, keep)
    return chosen


def turn(store: SessionStore, id: str, tokens: list[int], owner: str = "") -> list[int]:
    with store.use(owner, id) as session:
        return say(Engine(store.model, EngineConfig(rows=2)), session, tokens)


@pytest.mark.parametrize("kind", ["siso", "hybrid"])
@settings(max_examples=6)
@given(data=st.data())
def test_a_session_is_its_tokens_whatever_was_done_to_it(kind, data):
    """Turns, forks, rewinds, parking, export, restarts in any order: what is said next is what the plain loop says."""
    import tempfile

    lm = model(kind)
    with tempfile.TemporaryDirectory() as folder:
        store = SessionStore(lm, folder, budget=data.draw(st.sampled_from([0, 2**30])), keep_turns=2)
        store.create(id="a")
        past = {"a": [[]]}  # of each session, the tokens at the end of each turn
        for step in range(data.draw(st.integers(3, 9))):
            name = data.draw(st.sampled_from(sorted(past)))
            what = data.draw(st.sampled_from(["say", "say", "fork", "rewind", "park", "restart", "export"]))
            if what == "say":
                tokens = data.draw(st.lists(st.integers(0, 49), min_size=1, max_size=6))
                whole = [*past[name][-1], *tokens]
                reply = turn(store, name, tokens)
                assert reply == greedy(lm, whole, 4)
                past[name].append(whole + reply)
            elif what == "rewind":
                back = data.draw(st.integers(0, len(past[name]) - 1))
                store.rewind("", name, back)
                past[name] = past[name][: back + 1]
            elif what == "fork":
                back = data.draw(st.integers(0, len(past[name]) - 1))
                past[store.fork("", name, f"f{step}", back).id] = past[name][: back + 1]
            elif what == "park":
                assert store.park("", name).parked
            elif what == "export":
                past[store.import_(store.export("", name), id=f"i{step}").id] = list(past[name])
            else:
                store.park_all()
                store = SessionStore(lm, folder)
        for name, ends in past.items():
            info = store.info("", name)
            assert (info.tokens, info.turns) == (len(ends[-1]), len(ends) - 1)
            with store.use("", name) as session:
                assert session.tokens == ends[-1]


def test_a_turn_reads_what_is_new_and_no_more():
    store = SessionStore(model())
    store.create(id="a")
    turn(store, "a", list(range(30)))
    engine = Engine(model())
    with store.use("", "a") as session:
        say(engine, session, [1, 2])
    assert engine.counters.prompt_tokens == 3  # the token chosen last, and two


def test_turns_whose_states_are_gone_are_read_again():
    session = Session("a")
    for tokens in ([1, 2, 3], [4], [5]):
        say(Engine(model()), session, tokens, keep=1)
    whole = session.tokens[: session.turns[0].tokens]
    session.rewind(1)
    assert session.states == {} and session.tokens == whole
    assert say(Engine(model()), session, [7]) == greedy(model(), [*whole, 7], 4)


def test_forks_share_their_states_until_they_differ():
    store = SessionStore(model())
    store.create(id="a")
    turn(store, "a", [1, 2, 3])
    before = store.nbytes
    store.fork("", "a", "b")
    assert store.nbytes == before
    a, b = turn(store, "a", [4]), turn(store, "b", [5])
    with store.use("", "a") as one, store.use("", "b") as other:
        assert one.tokens[:7] == other.tokens[:7] and one.tokens[7:] == [4, *a] and other.tokens[7:] == [5, *b]


# -- owners


def test_the_sessions_of_another_do_not_exist(tmp_path):
    store = SessionStore(model(), tmp_path)
    store.create("ann", "a")
    turn(store, "a", [1, 2], "ann")
    for parked in (False, True):
        if parked:
            store.park("ann", "a")
        for call in (store.info, store.park, store.export, store.delete, store.fork):
            with pytest.raises(UnknownSession, match="There is no session 'a'"):
                call("bob", "a")
        with pytest.raises(UnknownSession), store.use("bob", "a"):
            pass
        assert store.list("bob") == [] and len(store.list("ann")) == 1
    assert store.create("bob", "a").tokens == 0
    assert not any("ann" in str(path) for path in tmp_path.rglob("*"))


# -- files


def test_what_does_not_fit_in_memory_is_parked(tmp_path):
    store = SessionStore(model(), tmp_path, keep_turns=1)
    for i in range(6):
        store.create(id=f"s{i}")
        turn(store, f"s{i}", [i + 1])
        if i == 0:
            store.budget = 3 * store.nbytes
    assert store.nbytes <= store.budget and [info.parked for info in store.list("")] == [True] * 3 + [False] * 3
    with store.use("", "s0") as session:
        tokens = list(session.tokens)
    assert turn(store, "s0", [9]) == greedy(model(), [*tokens, 9], 4)


def test_a_session_that_cannot_be_parked_fails_no_other_s_request(tmp_path, monkeypatch, caplog):
    store = SessionStore(model(), tmp_path, budget=0)

    def full(session):
        raise OSError("No space left on device")

    monkeypatch.setattr(store, "write", full)
    for id in ("a", "b"):
        store.create(id=id)
        turn(store, id, [1, 2])
    assert "could not be parked" in caplog.text and [info.parked for info in store.list("")] == [False, False]
    monkeypatch.undo()
    turn(store, "b", [3])
    assert store.nbytes == 0


@pytest.mark.parametrize("how", ["truncated", "altered", "text", "other weights"])
def test_files_that_cannot_be_trusted(tmp_path, how):
    store = SessionStore(model(), tmp_path)
    store.create(id="a")
    turn(store, "a", [1, 2, 3])
    store.park("", "a")
    (path,) = tmp_path.rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    if how == "altered":
        data[-3] ^= 1
    path.write_bytes({"truncated": data[:-10], "text": b"hello"}.get(how, bytes(data)))
    lm = tiny(seed=9) if how == "other weights" else model()
    with pytest.raises(ValueError, match=r"checksum|cannot be read|made by other weights") as caught:
        SessionStore(lm).import_(path.read_bytes())
    assert str(tmp_path) not in str(caught.value)
    if how in ("altered", "other weights"):
        later = SessionStore(lm, tmp_path)
        with pytest.raises(ValueError), later.use("", "a"):
            pass
        later.delete("", "a")
        assert not path.exists()


def test_imports_are_checked_against_the_model():
    """Files with a right checksum whose content does not fit: each is refused with a ValueError, none is believed."""
    session = Session("a")
    say(Engine(model("hybrid")), session, [1, 2, 3])
    good = session.tensors()
    Session.from_tensors(good, model("hybrid"))
    numbers = (".S", ".phi", ".B_prev", ".x_prev", ".k", ".v")  # any number is a state; shapes are not
    for name in good:
        for bad in (None, torch.zeros(3), good[name].flatten()[:-1], good[name].double() + 1e6):
            if bad is not None and name.endswith(numbers) and bad.shape == good[name].shape:
                continue
            tensors = {n: v for n, v in good.items() if n != name} | ({} if bad is None else {name: bad})
            with pytest.raises(ValueError, match=r"session|tokens|states"):
                Session.from_tensors(tensors, model("hybrid"))
    for name in filter(lambda name: name.endswith(numbers), good):
        for bad in (torch.nan, torch.inf):
            with pytest.raises(ValueError, match="must be finite"):
                Session.from_tensors(good | {name: torch.full_like(good[name], bad)}, model("hybrid"))
    with pytest.raises(ValueError, match="do not fit"):
        Session.from_tensors(good, model("siso"))


KILLED = """
import sys, torch
torch.set_num_threads(1)
from mamba3.engine import SessionStore, Engine
from mamba3.ops import state_file
from tests.engine.test_sessions import say, turn
from tests.engine.cases import model
import os
real = os.replace
store = SessionStore(model(), sys.argv[1])
store.create(id="a")
turn(store, "a", [1, 2, 3])
store.save("", "a")
turn(store, "a", [4, 5])
def stop(*arguments):
    print("writing", flush=True)
    import time
    time.sleep(60)
os.replace = stop
store.park("", "a")
"""


def test_a_process_killed_while_it_parks_leaves_the_file_of_before(tmp_path):
    """Killed at the last moment: the new file is complete beside the old one, and not yet in its place."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.rglob("*.safetensors*")) + list(tmp_path.rglob(".*.safetensors*"))) >= 1
    store = SessionStore(model(), tmp_path)
    with store.use("", "a") as session:
        assert session.tokens == [1, 2, 3, *greedy(model(), [1, 2, 3], 4)]
    assert not list(tmp_path.rglob(".*safetensors*"))


def test_parking_in_16_bits_halves_the_file_and_drifts_little(tmp_path):
    lm = model("siso", torch.float32)
    sizes, sessions = [], []
    for dtype in (None, torch.bfloat16):
        store = SessionStore(lm, tmp_path / str(dtype), dtype=dtype)
        store.create(id="a")
        turn(store, "a", list(range(40)))
        sizes.append(store.park("", "a").nbytes)
        with store.use("", "a") as session:
            sessions.append(session)
    exact, rounded = (s.states[1].layers[0].S for s in sessions)
    assert rounded.dtype == torch.float32 and 0 < (exact - rounded).abs().max() <= 2**-8 * exact.abs().max()
    assert torch.equal(sessions[0].states[1].layers[0].phi, sessions[1].states[1].layers[0].phi)
    assert sizes[1] < sizes[0]


# -- errors


def test_names_turns_and_limits():
    store = SessionStore(model(), limit=2)
    for name in ("", "a/b", "../x", "a" * 65, "é"):
        with pytest.raises(ValueError, match="A session's name has 1 to 64 letters"):
            store.create(id=name)
    store.create(id="a")
    with pytest.raises(ValueError, match="There is a session 'a' already"):
        store.create(id="a")
    with pytest.raises(ValueError, match=r"turn must lie in \[0, 0\], the turns of this session; it is 1"):
        store.rewind("", "a", 1)
    with pytest.raises(ValueError, match="Parking needs a folder"):
        store.park("", "a")
    with store.use("", "a"), pytest.raises(SessionBusy, match="under way in session 'a'"):
        store.delete("", "a")
    store.create()
    with pytest.raises(TooManySessions):
        store.create()
    store.delete("", "a")
    with pytest.raises(UnknownSession):
        store.info("", "a")


@pytest.mark.slow
def test_many_kills_at_random_moments(tmp_path):
    """kill -9 at any moment of parking after parking: what is found afterwards is always one of the turns, whole."""
    script = KILLED.split("os.replace = stop")[0]
    script += "print('go', flush=True)\nwhile True: turn(store, 'a', [4]); store.save('', 'a')"
    for i in range(10):
        folder = tmp_path / str(i)
        with subprocess.Popen(
            [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
        ) as process:  # fmt: skip
            assert process.stdout.readline() == "go\n"
            time.sleep(0.2 + 0.037 * i)
            process.send_signal(signal.SIGKILL)
        store = SessionStore(model(), folder)
        with store.use("", "a") as session:
            assert len(session.tokens) == 7 or len(session.tokens) % 5 == 3  # turns of 7, 6, 5, 5, ... tokens
            tokens = list(session.tokens)
        assert turn(store, "a", [9]) == greedy(model(), [*tokens, 9], 4)
