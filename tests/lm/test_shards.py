"""Laws of sharded weights: any split reads back bit for bit, and two splits never lie side by side."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba3 import Mamba3Config, Mamba3LM
from mamba3.lm import shards


@pytest.mark.parametrize(
    ("text", "size"), [(7, 7), ("7", 7), ("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2MiB", 2**21), ("10b", 10)]
)
def test_a_size_is_a_number_or_a_text(text, size):
    assert shards.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "five", "-1", "0", "5TB", "1 2", 0, "0.0001kb"])
def test_a_size_that_is_none(text):
    with pytest.raises(ValueError, match="positive number of bytes"):
        shards.parse_size(text)


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=20), limit=st.none() | st.integers(1, 60))
def test_a_plan_holds_every_name_once_in_order_and_keeps_the_limit(sizes, limit):
    named = {str(i): size for i, size in enumerate(sizes)}
    plan = shards.plan(named, limit)
    assert [name for shard in plan for name in shard] == list(named)
    assert all(plan)
    if limit is None:
        assert len(plan) == 1
    else:
        assert all(len(shard) == 1 or sum(named[name] for name in shard) <= limit for shard in plan)


def small():
    config = Mamba3Config(vocab_size=50, d_model=16, layers=("mamba3",) * 2, d_state=8, headdim=8, d_intermediate=16)
    return Mamba3LM(config, dtype=torch.bfloat16)


@pytest.mark.parametrize("limit", [None, "1GB", 12000, 1])
def test_a_model_is_the_same_in_any_split(tmp_path, limit):
    model = small()
    for previous in (None, 9000):  # and whatever lay there before
        model.save_pretrained(tmp_path, previous)
        model.save_pretrained(tmp_path, limit)
        again = Mamba3LM.from_pretrained(tmp_path)
        assert again.fingerprint() == model.fingerprint()
        pairs = zip(again.parameters(), model.parameters(), strict=True)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
        names = {path.name for path in tmp_path.iterdir()}
        split = shards.INDEX_FILE in names
        assert split == (limit in (12000, 1)) and (shards.WEIGHTS_FILE in names) != split
        if split:
            index = json.loads((tmp_path / shards.INDEX_FILE).read_text())
            assert set(index["weight_map"].values()) == names - {"config.json", shards.INDEX_FILE}
            assert index["metadata"]["total_size"] == sum(
                v.numel() * v.element_size() for v in model.state_dict().values()
            )
            assert limit == 1 or all(
                (tmp_path / name).stat().st_size < 12000 + 4096 for name in names if "-of-" in name
            )


def test_what_is_wrong_with_shards_is_named(tmp_path):
    small().save_pretrained(tmp_path, 12000)
    index = tmp_path / shards.INDEX_FILE
    file = shards.shard_files(index)[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged or truncated.*again"):
        Mamba3LM.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=rf"names {file.name}, which is missing; download or copy it too"):
        Mamba3LM.from_pretrained(tmp_path)
    file.write_bytes(whole)
    values = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {k: v for k, v in values["weight_map"].items() if v != file.name}}))
    with pytest.raises(ValueError, match="missing layers"):
        Mamba3LM.from_pretrained(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        Mamba3LM.from_pretrained(tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        Mamba3LM.from_pretrained(tmp_path)
