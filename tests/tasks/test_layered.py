"""Laws of the models that train apart: their layers are the known ones, by kernels or not; what cannot be built is named."""

import pytest
import torch

from mamba3 import Mamba3
from mamba3.nn import Attention
from mamba3.tasks import MQAR
from mamba3.tasks.captured import answer_losses
from mamba3.tasks.fit import seeded_generator
from mamba3.tasks.layered import RECALL, FusedMamba3, RotaryAttention, recall_model
from mamba3.tasks.peers import Mamba2, one_configuration, peer, why_not
from mamba3.tasks.plan import Member, Plan, stage_groups
from mamba3.tasks.settings import Settings

SMALL = {"d_state": 8, "headdim": 16}


@pytest.fixture
def interpreted(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_mamba2_is_that_of_transformers():
    pytest.importorskip("transformers")
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    ours = Mamba2(16, 8, 16).double()
    config = Mamba2Config(
        hidden_size=16, state_size=8, expand=2, head_dim=16, num_heads=2, n_groups=1, conv_kernel=4, chunk_size=8,
        num_hidden_layers=1, vocab_size=8,
    )  # fmt: skip
    theirs = Mamba2Mixer(config, layer_idx=0).eval().double()
    weights = {name.replace("conv.", "conv1d."): v for name, v in ours.state_dict().items()}
    theirs.load_state_dict(weights | {"conv1d.weight": weights["conv1d.weight"].unsqueeze(1)})
    u = torch.randn(2, 21, 16, dtype=torch.double)
    torch.testing.assert_close(ours(u), theirs(u), rtol=1e-6, atol=1e-6)  # theirs rounds within to float32


def layers():
    return {
        "mamba3": FusedMamba3(16, 8, headdim=16, decay="softplus"),
        "mamba3-conv": FusedMamba3(16, 8, headdim=16, d_conv=4),
        "mamba2": Mamba2(16, 8, 16),
    }


@pytest.mark.parametrize("kind", list(layers()))
def test_a_layer_by_kernels_is_the_layer(kind, interpreted):
    layer, u = layers()[kind], torch.randn(2, 37, 16, requires_grad=True)
    found = []
    for kernels in (False, True):
        y = layer(u, kernels=kernels)
        found.append((y, *torch.autograd.grad(y.square().sum(), [u, layer.in_proj.weight, layer.D])))
    for theirs, mine in zip(*found, strict=True):
        assert (mine - theirs).abs().max() <= 2e-6 * theirs.abs().max()


def test_a_fused_layer_without_kernels_is_mamba3():
    layer = FusedMamba3(16, 8, headdim=16)
    plain = Mamba3(16, 8, headdim=16)
    plain.load_state_dict(layer.state_dict())
    u = torch.randn(2, 5, 16)
    assert layer(u).equal(plain(u))


def test_rotary_attention_is_causal_and_sees_distances_alone():
    layer, u = RotaryAttention(16, 2).double(), torch.randn(1, 9, 16, dtype=torch.double)
    y = layer(u)
    changed = u.clone()
    changed[:, 6:] += 1
    torch.testing.assert_close(layer(changed)[:, :6], y[:, :6])
    assert not layer(changed)[:, 6].allclose(y[:, 6])
    # A token that is repeated reads the same whatever the position; without rotation it would for other tokens too.
    same = u[:, :1].expand(-1, 9, -1)
    torch.testing.assert_close(layer(same)[:, 8], layer(same)[:, 0])
    plain = Attention(16, 2).double()
    plain.load_state_dict(layer.state_dict())
    swapped = u[:, [1, 0, 2]]
    torch.testing.assert_close(plain(swapped)[:, 2], plain(u[:, :3])[:, 2])
    assert not layer(swapped)[:, 2].allclose(layer(u[:, :3])[:, 2])


@pytest.mark.parametrize("kind", list(RECALL))
def test_recall_models_answer_every_question(kind):
    """Several questions a sequence are those asked one by one."""
    model = recall_model(kind, 32, 16, **SMALL)
    batch = MQAR(vocab_size=32).sample(2, 16, 16, seeded_generator("test"))
    logits = model(batch.inputs, batch.positions)
    assert logits.shape == (2, 4, 32)
    torch.testing.assert_close(logits[:, 1], model(batch.inputs, batch.positions[:, 1]))
    losses = answer_losses(logits.expand(3, -1, -1, -1), batch.answers)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.answers.flatten()) * len(batch.inputs)
    torch.testing.assert_close(losses, expected.expand(3))


def test_recall_trains_on_several_numbers_of_pairs():
    settings = Settings(stages=(32,), steps=20, batch=4, shortest=4, ranges=((32, 32),))
    members = (Member("mamba3", 1e-3, 0),)
    (group,) = stage_groups(Plan("mqar", 16, members, settings, (1,), (2,)), 0, None)
    assert tuple(group.tokens.shape) == (20, 4, 32) and tuple(group.answers.shape) == (20, 4, 8)
    for sequence, pairs in enumerate((8, 8, 4, 4)):  # K = T / 4, T / 8
        tokens, places, answers = (v[3, sequence].long() for v in group[:3])
        keys = tokens[: 2 * pairs : 2].tolist()
        for place, answer in zip(places, answers, strict=True):  # the token after the key's first place is the answer
            assert tokens[2 * keys.index(int(tokens[place])) + 1] == answer
        assert [int((places == place).sum()) for place in places.unique()] == [8 // pairs] * pairs
    (again,) = stage_groups(Plan("mqar", 16, members, settings, (1,), (2,)), 0, None)
    assert all(a.equal(b) for a, b in zip(group[:3], again[:3], strict=True))


def test_what_cannot_be_built_is_named(monkeypatch):
    assert why_not("gdn", "cpu") == "the kernels of gated DeltaNet need a GPU"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_not("gdn") == "fla is not installed (pip install 'mamba3[peers]')"
    with pytest.raises(ValueError, match="cannot be built: fla is not installed"):
        peer("gdn", 3, 16, 1)
    with pytest.raises(ValueError, match="a peer is one of gdn, mamba2"):
        peer("lstm", 3, 16, 1)
    with pytest.raises(ValueError, match="a recall model is one of mamba3,"):
        recall_model("lstm", 3, 16)


def test_one_configuration_of_each_kernel():
    triton = pytest.importorskip("triton")

    def kernel(x):
        pass

    offered = [triton.Config({"BK": k}, num_warps=w, num_stages=s) for k in (16, 64) for w in (1, 4) for s in (2, 3)]
    with one_configuration():
        tuned = triton.autotune(offered, key=["x"])(triton.JITFunction(kernel))
    (left,) = tuned.configs
    assert (left.kwargs["BK"], left.num_warps, left.num_stages) == (64, 4, 2)
    assert len(triton.autotune(offered, key=["x"])(triton.JITFunction(kernel)).configs) == 8
