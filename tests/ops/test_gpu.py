"""The chunked path on a CUDA device: the same laws, every dtype, and memory that grows with tokens alone."""

import pytest
import torch

from mamba3 import Mamba3Config, Mamba3LM
from mamba3.ops import scan, step
from tests.ops.cases import Sizes, distance, inputs, random_state, state_distance, token, tokens

pytestmark = pytest.mark.gpu
# What rounding alone costs: a few roundings of the products in the input's dtype.
BOUNDS = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 0.02, torch.float16: 0.003}


def on_gpu(values):
    return {name: v.cuda() for name, v in values.items()}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rank", [1, 3])
def test_every_dtype_is_the_reference_with_gradients(dtype, rank):
    s = Sizes(b=2, t=200, g=2, per_group=2, p=24, n=20, a=5, r=rank)
    values, state = inputs(s, dtype=dtype), random_state(s, dtype=dtype)
    exact = {name: v.double().requires_grad_() for name, v in values.items()}
    truth = scan(**exact, state=state, impl="reference")
    weights = torch.randn_like(truth.y)
    true_grads = torch.autograd.grad((truth.y * weights).sum() + truth.state.S.sum(), list(exact.values()))
    leaves = {name: v.cuda().requires_grad_() for name, v in values.items()}
    ours = scan(**leaves, state=state.to("cuda"))
    grads = torch.autograd.grad((ours.y.double() * weights.cuda()).sum() + ours.state.S.sum(), list(leaves.values()))
    assert distance(ours.y.cpu(), truth.y) < BOUNDS[dtype]
    assert distance(ours.state.S.cpu(), truth.state.S) < BOUNDS[dtype]
    for name, grad, true in zip(leaves, grads, true_grads, strict=True):
        assert distance(grad.cpu(), true) < 4 * BOUNDS[dtype], name


def test_tensor_float_32_does_not_reach_angles_and_decays():
    s = Sizes(b=1, t=3000, per_group=2, p=16, n=32, a=8)
    values = inputs(s, dtype=torch.float32)
    truth = scan(**values, impl="reference")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        ours = scan(**on_gpu(values))
    finally:
        torch.set_float32_matmul_precision(before)
    assert distance(ours.y.cpu(), truth.y) < 2e-3
    assert abs(ours.state.phi.cpu() - truth.state.phi).max() < 1e-4


def test_splits_packs_and_steps():
    s = Sizes(b=1, t=300, r=2)
    values, state = inputs(s), random_state(s).to("cuda")
    values = on_gpu(values)
    whole = scan(**values, state=state)
    first = scan(**tokens(values, 0, 77), state=state)
    second = scan(**tokens(values, 77, 300), state=first.state)
    assert distance(torch.cat([first.y, second.y], 1).cpu(), whole.y.cpu()) < 1e-10
    with torch.no_grad():
        after = first.state.clone()
        for t in range(77, 100):
            y, after = step(**token(values, t), state=after, inplace=True)
            assert distance(y.cpu(), whole.y[:, t].cpu()) < 1e-10
    pack = scan(**values, cu_seqlens=torch.tensor([0, 1, 77, 300], device="cuda", dtype=torch.int32))
    alone = scan(**tokens(values, 77, 300))
    assert distance(pack.y[:, 77:].cpu(), alone.y.cpu()) < 1e-10
    assert state_distance(pack.state.select([2]).to("cpu"), alone.state.to("cpu")) < 1e-10


def test_runs_are_bitwise_equal():
    s = Sizes(b=2, t=500, per_group=4, p=32, n=32, a=8, r=2)
    values = {name: v.cuda().requires_grad_() for name, v in inputs(s, dtype=torch.bfloat16).items()}
    runs = []
    for _ in range(2):
        y = scan(**values).y
        runs.append([y, *torch.autograd.grad(y.float().square().sum(), list(values.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_training_memory_is_linear_and_never_tokens_by_state():
    """64 heads, P 64, N 128: one (tokens, H, N, P) tensor of 16,384 tokens in bf16 alone would be 16 GiB."""

    def peak(t):
        s = Sizes(b=1, t=t, per_group=64, p=64, n=128, a=32)
        values = {name: v.cuda().requires_grad_() for name, v in inputs(s, dtype=torch.bfloat16, device="cpu").items()}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        scan(**values).y.float().sum().backward()
        return torch.cuda.max_memory_allocated() - before

    short, long = peak(16384), peak(32768)
    assert long < 2.2 * short
    assert short < 8 * 2**30


@pytest.mark.parametrize("hybrid", [False, True])
def test_the_model_generates_the_same_as_on_the_cpu(hybrid):
    layers = ("mamba3", "attention", "mamba3") if hybrid else ("mamba3", "mamba3")
    torch.manual_seed(0)
    config = Mamba3Config(
        vocab_size=50, d_model=32, layers=layers, d_state=16, headdim=16, d_intermediate=64, mimo_rank=2, attn_heads=4
    )
    model, ids = Mamba3LM(config, dtype=torch.float64), torch.randint(0, 50, (2, 70))
    expected = model.generate(ids, max_new_tokens=12).tokens
    twin = Mamba3LM.from_weights(config, model.state_dict(), device="cuda")
    assert torch.equal(twin.generate(ids.cuda(), max_new_tokens=12).tokens.cpu(), expected)
    half = twin.to(torch.bfloat16)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        half(ids.cuda()).float().logsumexp(-1).sum().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())
