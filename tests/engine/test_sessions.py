"""Sessions go on as if they had never stopped: continued, forked, rewound, parked, moved; and they are their owner's."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba3.engine import (
    Engine,
    EngineConfig,
    Finish,
    SamplingParams,
    Session,
    SessionBusy,
    SessionMemoryFull,
    SessionNotSaved,
    SessionStore,
    Speech,
    TooManySessions,
    UnknownSession,
)
from mamba3.engine.session_files import Key
from mamba3.ops import state_file
from mamba3.text.encode import encode, end_of_text
from mamba3.train.tokenizer import byte_tokenizer, train_bpe
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
    with store.use("", "a") as session:
        assert store.nbytes == before + session.record_bytes  # tokens, text and turns, at most
    a, b = turn(store, "a", [4]), turn(store, "b", [5])
    with store.use("", "a") as one, store.use("", "b") as other:
        assert one.tokens[:7] == other.tokens[:7] and one.tokens[7:] == [4, *a] and other.tokens[7:] == [5, *b]


# -- replies that a stop string ends


@cache
def speaker(bpe: bool):
    """(model, speech): of bytes, or of a byte-level BPE whose tokens end within characters and within stop strings."""
    corpus = ["naïve café — 東京 🦙 the end.", "日本語 🎉 é è ü the end of the text"] * 20
    tokenizer = train_bpe(corpus, 300) if bpe else byte_tokenizer()
    lm = tiny(vocab_size=tokenizer.get_vocab_size(), tie_embeddings=False).eval()
    return lm, Speech(tokenizer, end_of_text(tokenizer))


def reply(engine: Engine, session: Session, said: str, speech: Speech, params: SamplingParams) -> tuple[str, Finish]:
    """One turn in text: what was shown, and how it ended."""
    request = session.request("turn", encode(speech.tokenizer, [said])[0].tolist(), params)
    engine.add(request)
    outputs = []
    while engine.busy:
        outputs += engine.step()
    chosen, text = [output.token for output in outputs], "".join(output.text for output in outputs)
    session.add_reply(request, said, chosen, text, outputs[-1].finish, speech)
    return text, outputs[-1].finish


@pytest.mark.parametrize("bpe", [False, True])
@settings(max_examples=12)
@given(data=st.data())
def test_a_reply_cut_by_a_stop_string_keeps_a_state_from_before_it(bpe, data):
    """Wherever the stop string lies in tokens and characters, guessed or not: the state kept is that of the tokens kept, it
    misses no more than the reply's end, and what is said next is what the plain loop says."""
    lm, speech = speaker(bpe)
    config = EngineConfig(rows=1, speculate=data.draw(st.sampled_from([0, 3])))
    said = data.draw(st.sampled_from(["the end", "é 東京", "🎉🎉🎉"]))
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=data.draw(st.integers(0, 5)), ignore_end=True)
    whole, _ = reply(Engine(lm, config, speech.tokenizer), Session("a"), said, speech, params)
    if "\ufffd" in whole or len(whole) < 2:  # half characters are not encoded as what they came from
        biased = tuple((t, 9.0) for t in encode(speech.tokenizer, ["é 東京 the end 🎉"])[0].tolist())
        params = replace(params, logit_bias=biased)
        whole, _ = reply(Engine(lm, config, speech.tokenizer), Session("a"), said, speech, params)
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = whole[start : start + data.draw(st.integers(1, 4))]
    session, engine = Session("a"), Engine(lm, config, speech.tokenizer)
    text, finish = reply(engine, session, said, speech, replace(params, stop=(stop,)))
    assert finish.reason == "stop" and text == whole[: whole.index(stop)] and session.text == said + text
    if "\ufffd" not in text:
        assert speech.tokenizer.decode(session.tokens) == session.text
    read = int(finish.state.tokens)
    _, expected = lm.prefill(torch.tensor([session.tokens[:read]]))
    for mine, theirs in zip(finish.state.layers, expected.layers, strict=True):
        assert torch.allclose(mine.S, theirs.S, atol=1e-9)
    again = len(session.tokens) - read
    assert again <= len(encode(speech.tokenizer, [text[finish.characters :]])[0]) <= 8 + config.speculate
    before = engine.counters.prompt_tokens
    more, _ = reply(engine, session, "?", speech, replace(params, temperature=0, stop=(), logit_bias=(), max_tokens=4))
    assert engine.counters.prompt_tokens - before == again + len(encode(speech.tokenizer, ["?"])[0])
    assert session.tokens[-4:] == greedy(lm, session.tokens[:-4], 4) and session.text.endswith(more)


def test_a_long_chat_with_stop_strings_reads_each_turn_once():
    """What a turn reads does not grow with the conversation."""
    lm, speech = speaker(False)
    engine, session = Engine(lm, EngineConfig(rows=1, cache_bytes=0), speech.tokenizer), Session("a")
    bias = tuple((byte, 50.0) for byte in b"xyz")
    for seed in range(12):
        before = engine.counters.prompt_tokens
        params = SamplingParams(max_tokens=200, temperature=1.0, seed=seed, logit_bias=bias, stop=("xyz",))
        _, finish = reply(engine, session, "a question", speech, params)
        assert finish.reason == "stop" and engine.counters.prompt_tokens - before <= len("a question") + 2
    assert len(session.tokens) > 200


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


@pytest.mark.parametrize("saved", [False, True])
def test_what_does_not_fit_in_memory_is_parked(tmp_path, saved):
    store = SessionStore(model(), tmp_path, keep_turns=1, save_turns=saved)
    for i in range(6):
        store.create(id=f"s{i}")
        turn(store, f"s{i}", [i + 1])
        if i == 0:
            store.budget = 3 * store.nbytes
    assert store.nbytes <= store.budget and [info.parked for info in store.list("")] == [True] * 3 + [False] * 3
    with store.use("", "s0") as session:
        tokens = list(session.tokens)
    assert turn(store, "s0", [9]) == greedy(model(), [*tokens, 9], 4)


def full(session):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_session_that_cannot_be_parked_fails_no_other_s_request(tmp_path, monkeypatch, caplog):
    store = SessionStore(model(), tmp_path, budget=0, save_turns=False)
    monkeypatch.setattr(store._files, "write", full)
    for id in ("a", "b"):
        store.create(id=id)
        turn(store, id, [1, 2])
    assert "could not be parked" in caplog.text and [info.parked for info in store.list("")] == [False, False]
    monkeypatch.undo()
    turn(store, "b", [3])
    assert store.nbytes == 0


def texts_of(store: SessionStore) -> dict[str, tuple[int, int]]:
    return {info.id: (info.tokens, info.turns) for info in store.list("")}


def test_what_was_answered_is_in_the_file(tmp_path):
    """Created, said, forked, rewound, imported: another process finds it without anybody having parked it."""
    store = SessionStore(model(), tmp_path)
    store.create(id="a")
    assert texts_of(SessionStore(model(), tmp_path)) == {"a": (0, 0)}
    for tokens in ([1, 2], [3]):
        turn(store, "a", tokens)
    store.fork("", "a", "b", 1)
    store.fork("", "a", "c")
    store.import_(store.export("", "a"), id="d")
    store.rewind("", "a", 1)
    expected = {"a": (6, 1), "b": (6, 1), "c": (11, 2), "d": (11, 2)}
    assert texts_of(store) == texts_of(SessionStore(model(), tmp_path)) == expected
    store.delete("", "d")
    turn(store, "a", [5])
    other = SessionStore(model(), tmp_path)
    assert texts_of(other) == {"a": (11, 2), "b": (6, 1), "c": (11, 2)}
    with store.use("", "a") as mine, other.use("", "a") as theirs:
        assert mine.tokens == theirs.tokens and theirs.tokens[6] == 5


def test_a_fork_is_a_second_name_of_the_file_until_they_differ(tmp_path):
    store = SessionStore(model(), tmp_path)
    store.create(id="a")
    turn(store, "a", [1, 2])
    store.fork("", "a", "b")
    assert [path.stat().st_nlink for path in tmp_path.rglob("*.safetensors")] == [2, 2]
    turn(store, "b", [3])
    assert [path.stat().st_nlink for path in tmp_path.rglob("*.safetensors")] == [1, 1]
    assert texts_of(SessionStore(model(), tmp_path)) == {"a": (6, 1), "b": (11, 2)}


def test_a_change_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    """A full disk: every call that changes something says so, and neither memory nor file has changed."""
    store = SessionStore(model(), tmp_path)
    store.create(id="a")
    for tokens in ([1, 2], [3]):
        turn(store, "a", tokens)
    data, before = store.export("", "a"), texts_of(store)
    monkeypatch.setattr(state_file, "replace_file", lambda path, data: full(None))
    for call in (
        lambda: turn(store, "a", [4]), lambda: store.rewind("", "a", 1), lambda: store.create(id="new"),
        lambda: store.fork("", "a", "new", 1), lambda: store.import_(data, id="new"),
    ):  # fmt: skip
        with pytest.raises((SessionNotSaved, OSError), match="No space left on device"):
            call()
        assert texts_of(store) == texts_of(SessionStore(model(), tmp_path)) == before
    monkeypatch.undo()
    with store.use("", "a") as session:
        whole = [*session.tokens, 4]
    assert turn(store, "a", [4]) == greedy(model(), whole, 4)
    assert store.create(id="new").tokens == 0


def test_a_session_whose_use_breaks_off_is_as_it_was():
    store = SessionStore(model())
    store.create(id="a")
    turn(store, "a", [1, 2])
    with pytest.raises(KeyboardInterrupt), store.use("", "a") as session:
        say(Engine(model()), session, [3])
        raise KeyboardInterrupt
    assert texts_of(store) == {"a": (6, 1)}


def test_nobody_waits_for_the_file_of_another(tmp_path, monkeypatch):
    """While a session is read or written, everything else is answered; the session itself is busy."""
    store = SessionStore(model(), tmp_path)
    for id in ("a", "b"):
        store.create(id=id)
        turn(store, id, [1, 2])
    store.park("", "a")
    entered, go_on = threading.Event(), threading.Event()

    def slow(call):
        def slowly(*arguments, **settings):
            entered.set()
            assert go_on.wait(30)
            return call(*arguments, **settings)

        return slowly

    for name, work in (("read", lambda: store.save("", "a")), ("write", lambda: store.rewind("", "a", 0))):
        entered.clear()
        go_on.clear()
        with monkeypatch.context() as patch:
            patch.setattr(state_file, name, slow(getattr(state_file, name)))
            thread = threading.Thread(target=work)
            thread.start()
            assert entered.wait(30)
        answered = threading.Thread(
            target=lambda: (store.list(""), store.info("", "a"), store.nbytes, len(store), store.info("", "b"))
        )
        answered.start()
        answered.join(10)
        stuck = answered.is_alive()
        with pytest.raises(SessionBusy):
            store.delete("", "a") if not stuck else store.take("", "a")
        go_on.set()
        thread.join()
        assert not stuck
    assert texts_of(store)["a"] == (0, 0)


@pytest.mark.parametrize("with_folder", [False, True])
@pytest.mark.parametrize("save_turns", [False, True])
def test_many_threads_leave_every_session_whole(tmp_path, with_folder, save_turns):
    """Whatever six threads do at once under a small budget: nobody is told anything but what may be, each session holds the
    turns that were said to be kept, and the bytes are those of what is there."""
    _, state = model().prefill(torch.tensor([[1]]))
    folder = tmp_path if with_folder else None
    store = SessionStore(model(), folder, budget=5 * state.nbytes, save_turns=save_turns)
    names, kept, wrong = [f"s{i}" for i in range(5)], [], []
    for name in names:
        store.create(id=name)

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for i in range(60):
            name = chance.choice(names)
            try:
                what = chance.choice(["say", "say", "say", "break", "look", "park", "copy"])
                if what in ("say", "break"):
                    with store.use("", name) as session:
                        session.add_turn([1] * (1 + len(session.turns)), f"{len(session.turns)},", state.clone(), 3)
                        if what == "break":
                            raise KeyError
                    kept.append(name)
                elif what == "look":
                    assert store.info("", name).id == name and len(store.list("")) >= len(names)
                elif what == "park" and with_folder:
                    store.park("", name)
                elif what == "copy":
                    copy = store.fork("", name, f"c{seed}-{i}")
                    assert copy.tokens == copy.turns * (copy.turns + 1) // 2
                    store.delete("", copy.id)
            except (SessionBusy, KeyError):
                continue
            except SessionMemoryFull:
                assert not with_folder
            except BaseException as error:
                wrong.append(error)
                raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not store._register.in_use and not store._register.moving and len(store) == len(names)
    for name in names:
        with store.use("", name) as session:
            assert session.text == "".join(f"{i}," for i in range(len(session.turns)))
            assert [turn.tokens for turn in session.turns] == [
                i * (i + 1) // 2 for i in range(1, len(session.turns) + 1)
            ]
    assert sum(info.turns for info in store.list("")) == len(kept) > 10
    store._make_room()
    alive = [store._memory.get(key) for key in store._memory.keys()]  # noqa: SIM118 (not a dict)
    states = {id(state): state.nbytes for session in alive for state in session.states.values()}
    assert store.nbytes == sum(states.values()) + sum(session.record_bytes for session in alive)
    assert store.nbytes <= store.budget
    if with_folder:
        store.park_all()
        assert texts_of(SessionStore(model(), folder)) == texts_of(store)


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
def stop(*arguments):
    print("writing", flush=True)
    import time
    time.sleep(60)
os.replace = stop
turn(store, "a", [4, 5])
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


# -- bounds


def test_without_a_folder_states_are_given_up_and_nothing_else():
    """Memory stays within its budget, the latest sessions keep their states, and every session goes on as it should."""
    store = SessionStore(model(), keep_turns=2)
    for i in range(6):
        store.create(id=f"s{i}")
        turn(store, f"s{i}", [i + 1])
        turn(store, f"s{i}", [i + 2])
        if i == 2:
            store.budget = store.nbytes
        assert store.nbytes <= store.budget
    found = [len(store._memory.get(Key.of("", f"s{i}")).states) for i in range(6)]
    assert found[0] == 0 and found[-1] == 2 and found == sorted(found)
    for i in range(6):
        with store.use("", f"s{i}") as session:
            tokens = list(session.tokens)
        assert turn(store, f"s{i}", [9]) == greedy(model(), [*tokens, 9], 4) and store.nbytes <= store.budget


def test_tokens_and_texts_of_one_owner_leave_room_for_the_others():
    store = SessionStore(model(), budget=100_000, owners=2)
    store.create("bob", "b")
    store.create("ann", "a")
    with (
        pytest.raises(SessionMemoryFull, match="may take 48 KiB of memory; 2 KiB are"),
        store.use("ann", "a") as session,
    ):
        session.add_turn([1] * 2000, "x", None)
    with store.use("ann", "a") as session:
        session.add_turn([1] * 1000, "x", None)  # of 40 bytes
    data = store.export("ann", "a")
    for call in (lambda: store.fork("ann", "a"), lambda: store.import_(data, "ann")):
        with pytest.raises(SessionMemoryFull, match="Delete sessions or rewind them"):
            call()
    assert [(info.id, info.turns) for info in store.list("ann")] == [("a", 1)]
    with pytest.raises(SessionMemoryFull):
        for _ in range(100):
            store.create("ann")
    store.import_(data, "bob")
    with store.use("bob", "b") as session:
        session.add_turn([1] * 20, "x", None)
    store.rewind("ann", "a", 0)
    assert store.fork("ann", "a").turns == 0 and store.nbytes <= store.budget


def test_who_holds_most_gives_up_first(tmp_path):
    store = SessionStore(model(), tmp_path)
    store.create("bob", "b")
    turn(store, "b", [1], "bob")
    for i in range(5):
        store.create("ann", f"a{i}")
        turn(store, f"a{i}", [1], "ann")
    store.budget = store.nbytes // 2
    store.save("ann", "a4")
    assert not store.info("bob", "b").parked and store.nbytes <= store.budget
    assert [info.parked for info in store.list("ann")][:3] == [True] * 3


def test_what_sessions_hold_is_counted():
    """Against what Python's allocator says: states apart, no session holds more than is counted, and not much less."""
    store, many = SessionStore(model(), budget=2**40), 300
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for i in range(many):
        store.create(id=f"s{i}")
        for text in ("x" * 500, "é" * 100):
            with store.use("", f"s{i}") as session:
                session.add_turn([1000 + i * 500 + n for n in range(400)], text, None)
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 0.5 * store.nbytes < held <= store.nbytes


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
    with pytest.raises(TooManySessions, match="You have 2 sessions, and may have 2"):
        store.create()
    shared = SessionStore(model(), limit=2, owners=2)
    shared.create("ann")
    with pytest.raises(TooManySessions):
        shared.create("ann")
    shared.create("bob")
    store.delete("", "a")
    with pytest.raises(UnknownSession):
        store.info("", "a")


@pytest.mark.slow
def test_many_kills_at_random_moments(tmp_path):
    """kill -9 at any moment of turn after turn, each written: what is found afterwards is always one of the turns, whole."""
    script = KILLED.split("os.replace = stop")[0]
    script += "print('go', flush=True)\nwhile True: turn(store, 'a', [4])"
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
            assert len(session.tokens) % 5 == 2  # turns of 7, 5, 5, ... tokens
            tokens = list(session.tokens)
        assert turn(store, "a", [9]) == greedy(model(), [*tokens, 9], 4)
