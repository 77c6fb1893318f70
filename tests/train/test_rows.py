"""Laws of rows, of rows that go on, of shards, of tokenising in parallel and of datasets."""

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba3.train.config import TrainConfig
from mamba3.train.corpus import Corpus, SplitCorpus
from mamba3.train.data import Data
from mamba3.train.objective import Objective
from mamba3.train.packing import Packing, part_of
from mamba3.train.ranks import Ranks
from mamba3.train.rows import Rows, Streams
from mamba3.train.store import Tokens, open_or_build
from mamba3.train.tokenise import encoded_groups
from mamba3.train.tokenizer import byte_tokenizer
from tests.train.test_train_data import tokens_of, write_lines
from tests.train.test_trainer import SHAPE, shape

lengths = st.lists(st.integers(2, 60), min_size=2, max_size=12)


@given(lengths, st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_rows_lie_within_documents_and_an_epoch_has_each_once(sizes, seq_len, rows):
    data = tokens_of(sizes)
    if max(sizes) - 1 < seq_len:
        return
    source = Rows(data, seq_len=seq_len, batch_tokens=rows * seq_len, seed=1)
    document = np.repeat(np.arange(len(sizes)), sizes)
    seen = []
    for step in range(-(-source.epoch_tokens // (rows * seq_len))):
        batch = source.batch(step)
        assert batch.inputs.shape == (rows, seq_len) and batch.cu_seqlens is None
        assert batch.targets.tolist() == (batch.inputs.flatten() + 1).tolist()
        for row in batch.inputs.numpy():
            assert len(set(document[[row[0], row[-1] + 1]])) == 1 and (np.diff(row) == 1).all()
        seen += batch.inputs.flatten().tolist()
    first = seen[: source.epoch_tokens]
    assert len(set(first)) == len(first) == sum((n - 1) // seq_len * seq_len for n in sizes)
    sampled = [t for batch in source.sample() for t in batch.targets.tolist()]
    assert len(set(sampled)) == len(sampled) == source.epoch_tokens


@given(lengths, st.integers(1, 6), st.integers(1, 4), st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None)
def test_a_stream_reads_a_document_on_until_it_ends(sizes, seq_len, rows, parts):
    data, rows = tokens_of(sizes), rows * parts
    if data.targets // rows < seq_len:
        with pytest.raises(ValueError, match="need as many tokens"):
            Streams(data, seq_len=seq_len, batch_tokens=rows * seq_len, seed=0)
        return
    source = Streams(data, seq_len=seq_len, batch_tokens=rows * seq_len, seed=3)
    last: dict[int, int] = {}
    for step in range(source.steps + 2):
        for part in range(parts):
            batch = source.batch(step, part, parts)
            pieces = list(pairwise(batch.cu_seqlens.tolist()))
            ids, bounds = batch.inputs[0].tolist(), [*batch.rows.tolist(), len(pieces)]
            assert batch.targets.tolist() == [i + 1 for i in ids]
            for i, (a, b) in enumerate(pairwise(bounds)):
                row = part * (rows // parts) + i
                assert pieces[b - 1][1] - pieces[a][0] == seq_len
                for piece, (start, end) in enumerate(pieces[a:b]):
                    assert ids[start:end] == list(range(ids[start], ids[start] + end - start))
                    goes_on = piece == 0 and bool(batch.goes_on[i])
                    if goes_on:
                        assert ids[start] == last[row] + 1
                    elif step % source.steps:  # a fresh piece is a document's beginning, but in an epoch's first step
                        assert ids[start] in data.offsets
                last[row] = ids[pieces[b - 1][1] - 1]


class Moved(torch.Tensor):
    """A tensor that stands for one on a GPU: nothing reads it but .cpu()."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.cpu:
            raise RuntimeError("indices should be on the CPU")
        with torch._C.DisableTorchFunctionSubclass():
            return args[0].as_subclass(torch.Tensor)


def test_what_describes_a_batch_is_read_on_the_cpu_wherever_a_wrapper_moved_it():
    data = Tokens([np.random.default_rng(0).integers(0, 250, 400).astype(np.uint16)], np.array([0, 150, 400]))
    source = Streams(data, seq_len=40, batch_tokens=80, seed=0)
    from mamba3.lm import Mamba3LM

    torch.manual_seed(0)
    objective, state, moved_state = Objective(Mamba3LM(shape(256))), None, None
    for step in range(2):
        batch = source.batch(step)
        moved = batch._replace(
            **{name: getattr(batch, name).as_subclass(Moved) for name in ("cu_seqlens", "rows", "goes_on")}
        )
        expected, state = objective(batch, state)
        loss, moved_state = objective(moved, moved_state)
        assert loss.item() == expected.item()


def test_a_stream_carries_the_state_that_one_long_sequence_has():
    """The losses of steps that carry the state are those of reading each document whole."""
    data = Tokens([np.random.default_rng(0).integers(0, 250, 400).astype(np.uint16)], np.array([0, 150, 400]))
    source = Streams(data, seq_len=40, batch_tokens=80, seed=0)
    from mamba3.lm import Mamba3LM

    torch.manual_seed(0)
    model = Mamba3LM(shape(256)).double()
    objective, state, total = Objective(model, torch.float64), None, 0.0
    for step in range(source.steps):
        loss, state = objective(source.batch(step), state, "sum")
        total += loss.item()
    assert state is not None
    line = np.concatenate([data.read(s, 1000)[:n] for s, n in _documents(source)])
    after = np.concatenate([data.read(s + 1, 1000)[:n] for s, n in _documents(source)])
    expected = 0.0
    for row in range(2):
        span = slice(row * source.length, row * source.length + source.steps * 40)
        bounds = sorted(
            {0, source.steps * 40, *(e - span.start for e in source._epoch(0).ends if span.start < e < span.stop)}
        )
        ids = torch.from_numpy(line[span].astype(np.int64))[None]
        logits = model(ids, cu_seqlens=[int(b) for b in bounds])[0].float()
        expected += torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(after[span].astype(np.int64)), reduction="sum"
        ).item()
    assert total == pytest.approx(expected, rel=1e-6)


def _documents(source):
    line = source._epoch(0)
    return zip(line.starts.tolist(), np.diff(line.ends, prepend=0).tolist(), strict=True)


@given(lengths, st.sampled_from([1, 2, 4]))
@settings(max_examples=40, deadline=None)
def test_the_parts_of_a_batch_are_the_batch(sizes, parts):
    batch = Packing(tokens_of(sizes), seq_len=24, batch_tokens=48, seed=0).batch(1)
    pieces = [part_of(batch, i, parts) for i in range(parts)]
    assert torch.cat([p.inputs for p in pieces], 1).equal(batch.inputs)
    assert torch.cat([p.targets for p in pieces]).equal(batch.targets)
    bounds = {0, 48}
    for i, piece in enumerate(pieces):
        begin, (goes_on, fresh) = i * 48 // parts, piece.parts
        assert goes_on[i] == (begin not in batch.cu_seqlens)
        own = {begin + b for b in piece.cu_seqlens.tolist()}
        bounds |= own if not goes_on[i] else own - {begin}
        assert fresh[i] == (not goes_on[i] or len(piece.cu_seqlens) > 2)
    assert (
        sorted(bounds - {i * 48 // parts for i in range(parts) if pieces[0].parts[0][i]}) == batch.cu_seqlens.tolist()
    )


@pytest.mark.parametrize("layout", ["packed", "rows", "carry"])
def test_a_step_is_the_same_however_many_ranks_share_it(layout):
    data = tokens_of([90, 200, 60])
    config = TrainConfig(layout=layout, seq_len=8, batch_tokens=64, micro_tokens=16)
    alone = {n: b for n, b in Data(data, None, config).passes(5)}
    assert sorted(alone) == [0, 1, 2, 3]
    for size in (2, 4):
        shared = [Data(data, None, config, Ranks(rank=r, size=size)).passes(5) for r in range(size)]
        assert sorted(n for passes in shared for n, _ in passes) == [0, 1, 2, 3]
        assert all(b.inputs.equal(alone[n].inputs) for passes in shared for n, b in passes)
    with pytest.raises(
        ValueError, match=r"batch_tokens = 64 must be a multiple of micro_tokens = 16.* times the 3 ranks"
    ):
        Data(data, None, config, Ranks(size=3))


# -- shards


def split(path, **settings):
    return SplitCorpus(Corpus(path, **settings), val_fraction=0.2, seed=0)


DOCUMENTS = [f"document {i}\n" * (i + 1) for i in range(20)]


def test_shards_hold_whole_documents_and_a_longer_document_is_named(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", DOCUMENTS)
    whole = open_or_build(split(path), byte_tokenizer(), tmp_path / "whole").train
    parts = open_or_build(split(path), byte_tokenizer(), tmp_path / "parts", shard_tokens=300).train
    assert len(whole.shards) == 1 and len(parts.shards) > 4 and max(len(s) for s in parts.shards) <= 300
    for a, b in pairwise(parts.offsets.tolist()):
        assert parts.read(a, b - a).tolist() == whole.read(a, b - a).tolist() and len(parts.read(a, b - a)) == b - a
    with pytest.raises(ValueError, match=r"one shard of 100 tokens, but c\.jsonl:\d+ has \d+; raise shard_tokens"):
        open_or_build(split(path), byte_tokenizer(), tmp_path / "short", shard_tokens=100)
    assert not list((tmp_path / "short").iterdir())


@pytest.mark.slow
def test_processes_tokenise_as_one_does(tmp_path):
    corpus = split(write_lines(tmp_path / "c.jsonl", DOCUMENTS))
    groups = [[pair] for pair in corpus]
    one, two = (list(encoded_groups(groups, byte_tokenizer(), workers, 0)) for workers in (1, 2))
    assert [g for g, _ in one] == [g for g, _ in two] == groups
    assert all(
        a.tolist() == b.tolist() for (_, x), (_, y) in zip(one, two, strict=True) for a, b in zip(x, y, strict=True)
    )


# -- datasets


def test_a_dataset_on_disk_is_a_corpus(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"body": DOCUMENTS[:5], "n": list(range(5))})
    rows.save_to_disk(str(tmp_path / "saved"))
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    for path in (tmp_path / "saved", tmp_path / "rows.parquet"):
        assert [d.text for d in Corpus(path, field="body")] == DOCUMENTS[:5]
        with pytest.raises(ValueError, match=r"has no 'text'; its columns are 'body', 'n': name the one"):
            list(Corpus(path))
        with pytest.raises(ValueError, match=r"column 'n' must hold text, but row 0 of .* holds a int"):
            list(Corpus(path, field="n"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(ValueError, match=r"must have the split asked for, but .* has train, not 'test'"):
        list(Corpus(tmp_path / "dict", field="body", split="test"))


def test_a_configuration_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    from mamba3.lm import Mamba3Config
    from mamba3.train import memory, prepare

    path = write_lines(tmp_path / "c.jsonl", DOCUMENTS)
    config = TrainConfig(seq_len=64, batch_tokens=4096)

    def wide(vocabulary):
        return Mamba3Config(vocab_size=vocabulary, **{**SHAPE, "layers": ("mamba3",) * 4, "d_model": 64})

    needed = memory.estimate(wide(257), config, 4096)
    counted = memory.saved_bytes(wide(257), config, 4096, device="cpu")
    assert needed.activations == pytest.approx(counted, rel=0.15)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed.total // 2)
    with pytest.raises(
        ValueError, match=r"needs about .* activations of 4,096 tokens\) .* micro_tokens = \d+; recompute = t"
    ):
        prepare(path, tmp_path / "run", config, wide)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed.total + 1)
    prepare(path, tmp_path / "run", config, wide)
    less = memory.estimate(wide(257), dataclasses.replace(config, recompute=True), 4096)
    assert less.states == needed.states and less.activations < 0.6 * needed.activations
    assert json.loads((tmp_path / "run" / "run.json").read_text())["train"]["micro_tokens"] == 4096
