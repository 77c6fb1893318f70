"""Laws of looking inside: the trace is the model's own prefill, and the turning pair is found where it was put."""

import math

import torch

from mamba3.lm import Mamba3LM
from mamba3.tasks import Parity
from mamba3.tasks.models import model_config
from mamba3.tasks.phase import shipped_parity, trace, turning_pair, turns_by_token

BITS = "0110100110010110100101100110100100101101"


def untrained(**fields):
    torch.manual_seed(0)
    model = Mamba3LM(model_config("parity", 3, "mamba3", d_model=16, d_state=8, headdim=16, **fields)).eval()
    with torch.no_grad():
        model.embedding.weight.normal_()
    return model


def test_trace_is_prefill():
    model, tokens = untrained(), Parity().encode(BITS)
    seen = trace(model, tokens)
    logits, state = model.prefill(tokens[None])
    torch.testing.assert_close(seen.probabilities, logits[0, :, :3].softmax(-1).detach(), rtol=1e-4, atol=1e-5)
    turned = (seen.phases[0][-1] - state.layers[0].phi[0].detach()).cos()  # equal but for whole turns
    torch.testing.assert_close(turned, torch.ones_like(turned), rtol=0, atol=1e-5)


def test_the_turning_pair_is_the_one_that_was_made():
    """A layer whose pair 1 is written by hand: half a turn on a one, none on a zero."""
    model, tokens = untrained(), Parity().encode(BITS)
    block = model.layers[0]
    with torch.no_grad():
        model.embedding.weight.copy_(torch.zeros(8, 16))
        model.embedding.weight[1, 0], model.embedding.weight[2, 1] = 1.0, 1.0
        splits = block.mixer.splits
        weight = block.mixer.in_proj.weight.zero_()
        dt, theta = sum(splits[:4]), sum(splits[:7])
        weight[dt : dt + splits.dt, :2] = 0.0
        block.mixer.dt_bias.fill_(math.log(math.e - 1))  # dt = 1
        weight[theta + 1, 1] = 20.0  # tanh saturates: theta = pi on a one
    pair = turning_pair(trace(model, tokens), tokens == 2)
    assert pair is not None and (pair.layer, pair.pair) == (0, 1) and pair.score > 0.999
    assert abs(pair.on_zero) < 1e-3 and abs(abs(pair.on_one) - math.pi) < 1e-3


def test_turns_by_token_are_those_of_the_traces():
    """Two sequences of a model with two layers, token by token: means of the traces' own differences."""
    torch.manual_seed(3)
    model = Mamba3LM(model_config("parity", 3, "mamba3", d_model=16, d_state=8, headdim=16, layers=2)).eval()
    with torch.no_grad():
        model.embedding.weight.normal_()
        for block in model.layers:
            block.mixer.dt_bias.fill_(1.0)
    tokens = torch.stack([Parity().encode("0110100"), Parity().encode("1110010")])
    found = turns_by_token(model, tokens)
    assert set(found) == {0, 1}
    for layer, (mean, agreement) in found.items():
        phases = [trace(model, row).phases[layer] for row in tokens]
        turns = torch.stack([p.diff(dim=0, prepend=torch.zeros_like(p[:1])) for p in phases])
        for bit in (1, 2):
            unit = torch.polar(torch.ones(()), turns[tokens == bit]).mean(0)
            torch.testing.assert_close(torch.polar(agreement[bit], mean[bit]), unit, rtol=1e-4, atol=1e-5)
        assert mean[0].isnan().all()  # padding was not there
    halves = turns_by_token(model, tokens, (torch.arange(7) > 3).long().expand(2, -1))
    for layer, (mean, _) in halves.items():  # two kinds of any making: the first four tokens and the others
        phases = torch.stack([trace(model, row).phases[layer] for row in tokens])
        turns = phases.diff(dim=1, prepend=torch.zeros_like(phases[:, :1]))
        expected = torch.polar(torch.ones(()), turns[:, 4:]).mean((0, 1)).angle()
        assert mean.shape[0] == 2
        torch.testing.assert_close(mean[1], expected, rtol=1e-4, atol=1e-4)
    # The first layer sees the token alone, so each turns by one angle.
    assert (found[0][1][1:] > 0.9999).all() and (found[1][1][1:] < 0.9999).any()


def test_without_rotation_there_is_no_turning_pair():
    tokens = Parity().encode(BITS)
    assert turning_pair(trace(untrained(rotation="none"), tokens), tokens == 2) is None
    ones = Parity().encode("111")
    assert turning_pair(trace(untrained(), ones), ones == 2) is None


def test_the_shipped_model_is_right_on_fresh_bits():
    """Sequences of exactly 2,048 tokens: no error in 25; every one turns its pair by half a turn, a zero by nothing."""
    batch, model = Parity().sample(25, 2048, 2048, torch.Generator().manual_seed(11)), shipped_parity()
    with torch.no_grad():
        logits = model(batch.inputs)
    answers = logits[..., :3].argmax(-1).gather(1, batch.positions)
    assert answers.equal(batch.answers)
    pair = turning_pair(trace(model, Parity().encode(BITS)), Parity().encode(BITS) == 2)
    assert pair is not None and abs(abs(pair.on_one) - math.pi) < 1e-5 and abs(pair.on_zero) < 1e-5
