"""The cache by itself: the longest prefix, the budget, who goes first."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba3.engine.prefix_cache import PrefixCache
from tests.engine.cases import model

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=8)


def state(tokens):
    return model().prefill(torch.tensor([tokens]))[1].detach()


@settings(max_examples=60)
@given(kept=st.lists(st.tuples(TOKENS, st.booleans()), max_size=12), wanted=TOKENS)
def test_the_longest_snapshot_that_the_prompt_begins_with(kept, wanted):
    cache, empty = PrefixCache(2**30), model().init_state(1)
    with_logits = {}
    for tokens, logits in kept:
        cache.put("", tokens, empty, torch.zeros(3) if logits else None)
        with_logits[tuple(tokens)] = with_logits.get(tuple(tokens), False) or logits
    fit = [t for t, logits in with_logits.items() if t == tuple(wanted[: len(t)]) and (len(t) < len(wanted) or logits)]
    found = cache.find("", wanted)
    assert (None if found is None else tuple(found.tokens)) == max(fit, key=len, default=None)
    assert cache.find("other", wanted) is None and len(cache) == len(with_logits)


def test_the_least_recently_used_goes_first_and_bytes_stay_in_the_budget():
    one = state([1, 2, 3])
    room = 3 * (one.nbytes + 3 * 8)
    cache = PrefixCache(room)
    for last in range(3):
        cache.put("", [1, 2, last], one)
    assert cache.find("", [1, 2, 0, 9]) is not None
    cache.put("", [5, 5, 5], one)
    assert cache.nbytes <= room and len(cache) == 3 and cache.evictions == 1
    assert cache.find("", [1, 2, 1, 9]) is None and cache.find("", [1, 2, 0, 9]) is not None
    assert (cache.hits, cache.misses) == (2, 1)
    small = PrefixCache(one.nbytes - 1)
    small.put("", [1], one)
    assert len(small) == 0 and small.nbytes == 0
    cache.clear()
    assert cache.nbytes == 0 and cache.find("", [5, 5, 5, 1]) is None


def test_a_snapshot_shares_no_memory_with_what_it_was_taken_from():
    cache, one = PrefixCache(2**30), state([1, 2, 3])
    cache.put("", [1, 2, 3], one)
    before = one.layers[0].S.clone()
    one.layers[0].S.zero_()
    assert torch.equal(cache.find("", [1, 2, 3, 4]).state.layers[0].S, before)
