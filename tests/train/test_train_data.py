"""Laws of the corpus, its split, the token store and the packing."""

import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba3.train.corpus import Corpus, SplitCorpus
from mamba3.train.packing import Packing
from mamba3.train.store import Tokens, open_or_build, open_part
from mamba3.train.tokenizer import byte_tokenizer, encode, end_of_text

DOCUMENTS = [f"document {i}\n" * (i + 1) for i in range(20)]


def write_lines(path, documents):
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path


def tokens_of(lengths) -> Tokens:
    """Documents of the given lengths; every token is distinct, so that a target says where it is from."""
    offsets = np.cumsum([0, *lengths])
    return Tokens([np.arange(offsets[-1], dtype=np.uint32)], offsets)


# -- corpus


def test_folder_gives_files_in_order_and_passes_over_what_is_not_text(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("no")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "sub" / "a.py").write_text("a\r\n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\x00\xff")
    (tmp_path / "empty.txt").write_text("")
    corpus = Corpus(tmp_path)
    assert list(corpus) == [("b.txt", "b"), ("sub/a.py", "a\r\n")]
    assert corpus.skipped == ["empty.txt", "image.png"]
    assert [d.text for d in Corpus(tmp_path, glob="*.py")] == ["a\r\n"]


def test_json_lines_are_documents(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"body": "one"}\n\n{"body": "tw\\u00f6", "x": 1}\n')
    assert list(Corpus(path, field="body")) == [("c.jsonl:1", "one"), ("c.jsonl:3", "twö")]


@pytest.mark.parametrize(
    ("name", "content", "law"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b"abc\xff\xfe", "byte 3 of .* is 0xff"),
        ("a.txt", b"abc\0def", "binary"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "line 2 .* has the keys 'body'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "line 2 .* is a int"),
        ("a.jsonl", b'{"text": "x"}\nnot json\n', "line 2 .* is not"),
        ("a.jsonl", b"[1]\n", "line 1 .* is a list"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1 .* half a surrogate pair"),
        ("a.jsonl", b"\n", "empty"),
    ],
)
def test_a_file_that_is_no_corpus_is_refused_with_the_place(tmp_path, name, content, law):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=law):
        SplitCorpus(Corpus(tmp_path / name), val_fraction=0.1, seed=0)


def test_paths_without_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not; give"):
        Corpus(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"none for glob = '\*.py'"):
        Corpus(tmp_path, glob="*.py")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="is a file; leave it out"):
        Corpus(tmp_path / "a.txt", glob="*.py")
    with pytest.raises(ValueError, match="empty"):
        (tmp_path / "f").mkdir()
        (tmp_path / "f" / "b.bin").write_bytes(b"\xff")
        SplitCorpus(Corpus(tmp_path / "f"), val_fraction=0.1, seed=0)


# -- split


def held_out(path, fraction=0.2, seed=0):
    return {d.name: out for d, out in SplitCorpus(Corpus(path), val_fraction=fraction, seed=seed)}


def test_split_holds_out_about_its_share_whole_and_depends_on_the_seed(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", DOCUMENTS)
    first = held_out(path)
    sizes = {f"c.jsonl:{i + 1}": len(d) for i, d in enumerate(DOCUMENTS)}
    share = sum(sizes[name] for name, out in first.items() if out) / sum(sizes.values())
    assert 0.05 < share <= 0.22
    assert first == held_out(path)
    assert any(first != held_out(path, seed=seed) for seed in range(1, 4))
    assert not any(held_out(path, fraction=0).values())


def test_equal_documents_are_never_divided(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", DOCUMENTS[:4] * 5)
    for seed in range(5):
        texts = {True: set(), False: set()}
        for document, out in SplitCorpus(Corpus(path), val_fraction=0.3, seed=seed):
            texts[out].add(document.text)
        assert texts[True] and texts[False] and not texts[True] & texts[False]


@given(st.text(min_size=2, max_size=200), st.floats(0.01, 0.99))
@settings(max_examples=40, deadline=None)
def test_one_document_is_divided_into_head_and_tail(tmp_path_factory, text, fraction):
    path = write_lines(tmp_path_factory.mktemp("one") / "c.jsonl", [text])
    (head, head_out), (tail, tail_out) = SplitCorpus(Corpus(path), val_fraction=fraction, seed=0)
    assert head.text + tail.text == text and head.text and tail.text
    assert (head_out, tail_out) == (False, True)


# -- store


def test_store_holds_every_document_between_separators(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", DOCUMENTS)
    tokenizer = byte_tokenizer()
    corpus = SplitCorpus(Corpus(path), val_fraction=0.2, seed=0)
    store = open_or_build(corpus, tokenizer, tmp_path / "data")
    end = end_of_text(tokenizer)
    found = {
        out: [part.read(a, b - a).tolist() for a, b in pairwise(part.offsets)]
        for out, part in ((False, store.train), (True, store.val))
    }
    expected = {True: [], False: []}
    for document, out in corpus:
        expected[out].append([end, *document.text.encode(), end])
    assert found == expected
    assert store.train.shards[0].dtype == np.uint16


def test_a_shard_of_another_size_than_its_index_states_is_refused(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", DOCUMENTS)
    store = open_or_build(SplitCorpus(Corpus(path), val_fraction=0.2, seed=0), byte_tokenizer(), tmp_path / "data")
    binary = tmp_path / "data" / store.key / "train-00000.bin"
    binary.write_bytes(binary.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"train-00000.bin must hold [\d,]+ bytes"):
        open_part(binary.parent, "train")


def test_store_is_reused_rebuilt_when_stale_and_mended_when_cut_short(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", DOCUMENTS)

    def build():
        calls = []
        corpus = SplitCorpus(Corpus(path), val_fraction=0.2, seed=0)
        store = open_or_build(corpus, byte_tokenizer(), tmp_path / "data", lambda *a: calls.append(a))
        return store, bool(calls)

    first, built = build()
    assert built
    again, built = build()
    assert not built and again.key == first.key
    binary = tmp_path / "data" / first.key / "train-00000.bin"
    whole = binary.read_bytes()
    binary.write_bytes(whole[:-2])
    assert build()[1] and binary.read_bytes() == whole
    write_lines(path, DOCUMENTS[:-1])
    other, built = build()
    assert built and other.key != first.key
    assert [p.name for p in (tmp_path / "data").iterdir()] == [other.key]


class Untouchable:
    """A tokenizer that may be read and never changed."""

    def __init__(self, tokenizer):
        self.__dict__["tokenizer"] = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __setattr__(self, name, value):
        raise AssertionError(f"{name} of a shared tokenizer was changed")


def test_encoding_never_changes_a_tokenizer_that_threads_share():
    shared = Untouchable(byte_tokenizer())
    for _ in range(2):
        (ids,) = encode(shared, ["a<|endoftext|>"])
        assert end_of_text(shared) not in ids
    shared.add_special_tokens(["<|im_end|>"])
    (ids,) = encode(shared, ["a<|im_end|>"])
    assert shared.token_to_id("<|im_end|>") not in ids


def test_a_special_token_spelled_out_in_a_text_is_text(tmp_path):
    tokenizer = byte_tokenizer()
    assert end_of_text(tokenizer) not in encode(tokenizer, ["a<|endoftext|>b"])[0]


# -- packing

lengths = st.lists(st.integers(2, 40), min_size=1, max_size=12)


@given(lengths, st.integers(1, 16), st.integers(1, 50), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_packed_epoch_predicts_every_token_but_the_first_of_a_document_once(sizes, seq_len, batch_tokens, seed):
    data = tokens_of(sizes)
    packing = Packing(data, seq_len=seq_len, batch_tokens=batch_tokens, seed=seed)
    first_tokens = set(data.offsets[:-1].tolist())
    seen = []
    for step in range(-(-2 * packing.epoch_tokens // batch_tokens)):
        batch = packing.batch(step)
        assert batch.inputs.shape == (1, batch_tokens) and batch.targets.shape == (batch_tokens,)
        bounds = batch.cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds[-1] == batch_tokens and all(np.diff(bounds) > 0)
        assert max(np.diff(bounds)) <= seq_len
        assert batch.targets.tolist() == [i + 1 for i in batch.inputs[0].tolist()]
        assert not first_tokens & set(batch.targets.tolist())
        for a, b in pairwise(bounds):
            piece = batch.inputs[0, a:b].tolist()
            assert piece == list(range(piece[0], piece[0] + b - a))
        seen += batch.targets.tolist()
    expected = sorted(set(range(sum(sizes))) - first_tokens)
    assert sorted(seen[: packing.epoch_tokens]) == expected
    assert sorted(seen[packing.epoch_tokens : 2 * packing.epoch_tokens]) == expected


@given(lengths, st.integers(1, 16), st.integers(16, 50))
@settings(max_examples=30, deadline=None)
def test_the_batch_of_a_step_does_not_depend_on_the_steps_before(sizes, seq_len, batch_tokens):
    data = tokens_of(sizes)
    one = Packing(data, seq_len=seq_len, batch_tokens=batch_tokens, seed=1)
    straight = [one.batch(step) for step in range(7)]
    for step in (6, 0, 3):
        fresh = Packing(data, seq_len=seq_len, batch_tokens=batch_tokens, seed=1).batch(step)
        assert all(a.equal(b) for a, b in zip(straight[step][:3], fresh[:3], strict=True))


def test_order_depends_on_seed_and_epoch():
    data = tokens_of([17] * 20)
    orders = {
        (seed, epoch): tuple(Packing(data, seq_len=16, batch_tokens=320, seed=seed).batch(epoch).inputs[0].tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4


@given(lengths, st.integers(1, 16), st.integers(1, 50), st.integers(0, 60))
@settings(max_examples=50, deadline=None)
def test_a_sample_is_always_the_same_distinct_targets(sizes, seq_len, batch_tokens, budget):
    data = tokens_of(sizes)

    def read():
        packing = Packing(data, seq_len=seq_len, batch_tokens=batch_tokens, seed=0)
        batches = list(packing.sample(budget))
        assert all(b.targets.numel() <= max(batch_tokens, seq_len) for b in batches)
        assert all(b.targets.tolist() == [i + 1 for i in b.inputs[0].tolist()] for b in batches)
        return [t for batch in batches for t in batch.targets.tolist()]

    predicted = set(range(sum(sizes))) - set(data.offsets[:-1].tolist())
    assert read() == read() and set(read()) <= predicted
    assert len(read()) == len(set(read())) == min(budget or len(predicted), len(predicted))


def test_documents_without_targets_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        Packing(Tokens([], np.zeros(1, np.int64)), seq_len=4, batch_tokens=4, seed=0)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_encoding_keeps_no_text_in_memory():
    """A tokenizer of bytes: 4,000 texts, whose tokens tokenizers would keep in a cache of 10,000 for each thread (20 MB)."""
    tokenizer, page = byte_tokenizer(), os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    for i in range(4500):
        if i == 500:
            before = resident()
        encode(tokenizer, [f"{i:07d}" * 30])
    assert resident() - before < 4e6
