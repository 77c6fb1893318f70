"""The attention of hybrid models: plain softmax attention, with a cache that obeys the law of prefill."""

import pytest
import torch

from mamba3.nn import Attention, AttentionState, PagedState
from mamba3.nn.cache import PAGE
from tests.ops.cases import distance


def naive(module, u):
    """softmax(q k^T / sqrt(e)) v by the book; each group of query heads shares one key head."""
    h, kv, e = module.n_heads, module.n_kv_heads, module.head_dim
    rows = module.in_proj(u)
    q, k, v = rows.split([h * e, kv * e, kv * e], dim=-1)
    outs = []
    for head in range(h):
        shared = slice((head // (h // kv)) * e, (head // (h // kv)) * e + e)
        scores = q[..., head * e : head * e + e] @ k[..., shared].transpose(1, 2) / e**0.5
        future = torch.ones(u.shape[1], u.shape[1]).triu(1).bool()
        outs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[..., shared])
    return module.out_proj(torch.cat(outs, dim=-1))


@pytest.mark.parametrize(("heads", "kv", "bias"), [(4, 4, False), (4, 2, True), (4, 1, False)])
def test_verbs_are_the_naive_attention(heads, kv, bias):
    module = Attention(16, heads, kv, qkv_bias=bias, out_bias=bias, dtype=torch.float64)
    u = torch.randn(2, 150, 16, dtype=torch.float64)
    expected = naive(module, u)
    assert distance(module(u), expected) < 1e-10
    first, state = module.prefill(u[:, :70])
    kept = state.clone()
    second, state = module.prefill(u[:, 70:140], state)
    assert torch.equal(kept.k, module.prefill(u[:, :70])[1].k)
    rest = []
    with torch.no_grad():
        for t in range(140, 150):
            y, state = module.step(u[:, t], state)
            rest.append(y)
    assert distance(torch.cat([first, second, torch.stack(rest, 1)], dim=1), expected) < 1e-10
    assert state.length.tolist() == [150, 150] and state.used == 150


def test_packs_of_unequal_caches():
    module = Attention(16, 4, 2, dtype=torch.float64)
    lengths, more = [3, 1, 7], [2, 5, 1]
    first, second = ([torch.randn(1, n, 16, dtype=torch.float64) for n in ns] for ns in (lengths, more))
    _, state = module.prefill(torch.cat(first, 1), cu_seqlens=[0, 3, 4, 11])
    y, state = module.prefill(torch.cat(second, 1), state, cu_seqlens=[0, 2, 7, 8])
    assert state.length.tolist() == [5, 6, 8]
    expected = [
        naive(module, torch.cat(pair, 1))[:, n:]
        for pair, n in zip(zip(first, second, strict=True), lengths, strict=True)
    ]
    assert distance(y, torch.cat(expected, dim=1)) < 1e-10
    token = torch.randn(3, 16, dtype=torch.float64)
    with torch.no_grad():
        y, _ = module.step(token, state.select([2, 0, 1]))
    full = torch.cat([first[2], second[2], token[:1].unsqueeze(1)], 1)
    assert distance(y[0], naive(module, full)[0, -1]) < 1e-10
    y = module(torch.cat(first, 1), cu_seqlens=[0, 3, 4, 11])
    assert distance(y, torch.cat([naive(module, u) for u in first], 1)) < 1e-10


def test_steps_carry_gradients():
    module, u = Attention(16, 2, dtype=torch.float64), torch.randn(1, 4, 16, dtype=torch.float64, requires_grad=True)
    state = module.init_state(1)
    for t in range(4):
        y, state = module.step(u[:, t], state)
    ours = torch.autograd.grad(y.sum(), u)[0]
    assert distance(ours, torch.autograd.grad(naive(module, u)[:, -1].sum(), u)[0]) < 1e-10


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="positive multiple of n_kv_heads = 3"):
        Attention(16, 4, 3)
    with pytest.raises(ValueError, match="multiple of n_heads = 5"):
        Attention(16, 5)
    with pytest.raises(ValueError, match="d_model = 16"):
        Attention(16, 4)(torch.zeros(1, 2, 8))


@torch.no_grad()
def test_pages_that_lie_anywhere_are_a_cache():
    """Steps and a verification, to the bit; pages of nobody and places behind the tokens are finite, all others NaN."""
    module, lengths = Attention(16, 4, 2, dtype=torch.float32), torch.tensor([3, 64, 150])
    u = torch.randn(3, 150, 16)
    _, whole = module.prefill(u)
    cache = AttentionState(whole.k, whole.v, lengths.clone(), 150).grow(3 * PAGE)
    table = torch.tensor([[7, 0, 0], [2, 9, 0], [4, 1, 8]])
    k, v = (torch.full((11, PAGE, 2, 4), torch.nan) for _ in range(2))
    for pages, source in ((k, cache.k), (v, cache.v)):
        pages[[0, 9]] = torch.randn(2, PAGE, 2, 4)
        for row, used in enumerate((1, 1, 3)):
            for i in range(used):
                pages[table[row, i]] = source[row, i * PAGE : (i + 1) * PAGE]
    paged = PagedState(k, v, table, lengths.clone(), 150)
    for _ in range(3):
        token = torch.randn(3, 16)
        expected, cache = module.step(token, cache)
        y, paged = module.step(token, paged)
        assert torch.equal(y, expected) and torch.equal(paged.length, cache.length)
    tokens = torch.randn(3, 5, 16)
    expected, _ = module.verify(tokens, cache)
    y, _ = module.verify(tokens, paged)
    assert torch.equal(y, expected) and paged.length.tolist() == [6, 67, 153]
    with pytest.raises(ValueError, match="The table has room for 192 tokens, and 193 are needed"):
        paged.grow(193)


def test_pages_record_no_gradient():
    module = Attention(16, 4, 2)
    pages = torch.zeros(2, PAGE, 2, 4)
    paged = PagedState(pages, pages.clone(), torch.tensor([[1]]), torch.tensor([0]), 0)
    with pytest.raises(ValueError, match="changed in place"):
        module.step(torch.randn(1, 16), paged)
