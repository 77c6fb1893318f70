"""Bad input: the law, what came, and what to do, for each argument."""

import pytest
import torch

from mamba3.ops import scan, step
from tests.ops.cases import Sizes, inputs, random_state, token

S = Sizes(b=2, t=6, g=1, per_group=2, p=3, n=4, a=2)


def changed(**changes):
    return {**inputs(S), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_bthp": torch.zeros(2, 6, 2)}, "x must have the 4 dimensions"),
        ({"dt_bth": torch.zeros(2, 5, 2).double()}, "dt has t = 5"),
        ({"theta_bta": torch.zeros(2, 6, 3).double()}, "turns 3 pairs"),
        ({name: torch.zeros(2, 6, 1, 3, 4).double() for name in ("B_btrgn", "C_btrgn")}, "multiple of groups"),
        ({"C_btrgn": torch.zeros(2, 6, 1, 1, 5).double()}, "C has n = 5"),
        ({"x_bthp": torch.zeros(2, 6, 2, 3, dtype=torch.long)}, "floating dtype"),
        ({"D_h": torch.zeros(2, device="meta").double()}, "D is on meta but x is on cpu"),
        ({"B_bias_hrn": torch.zeros(2, 2, 4).double()}, "B_bias has r = 2"),
        ({"out_norm": "layer"}, "out_norm must be one of"),
        ({"out_norm": "pre_gate"}, "go together"),
        ({"z_bthp": None, "mimo_o_hrp": torch.zeros(2, 1, 3).double()}, "belong to the gate"),
        ({"impl": "cuda"}, "impl must be auto"),
        ({"cu_seqlens": [0, 6]}, "batch size 1"),
    ],
)  # fmt: skip
def test_scan_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        scan(**changed(**changes))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 4, 3, 6], "must increase"),
        ([0, 3], "must end at the number of tokens, 6; it ends at 3"),
        ([0, 3, 3, 6], "Sequence 1 of cu_seqlens is empty"),
        ([1, 6], "must start at 0"),
        ([0], "at least one sequence"),
        (torch.tensor([0.0, 6.0]), "vector of int32 or int64"),
        (torch.tensor([[0, 6]]), "vector of int32 or int64"),
    ],
)
def test_boundaries(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        scan(**inputs(Sizes(b=1, t=6)), cu_seqlens=cu_seqlens)


def test_more_ranks_need_their_weights():
    values = inputs(Sizes(r=2))
    del values["mimo_x_hrp"]
    with pytest.raises(ValueError, match="more than one rank needs mimo_x"):
        scan(**values)
    values = inputs(Sizes(r=2))
    del values["mimo_o_hrp"]
    with pytest.raises(ValueError, match="mimo_o_hrp, which are missing"):
        scan(**values)


def test_no_tokens():
    with pytest.raises(ValueError, match="At least one sequence of at least one token"):
        scan(**{name: v[:, :0] if "bt" in name else v for name, v in inputs(S).items()})


def test_a_state_of_other_sizes():
    with pytest.raises(ValueError, match=r"state.phi has s = 3"):
        scan(**inputs(S), state=random_state(S, batch=3))
    with pytest.raises(ValueError, match=r"state.S has n = 8"):
        step(**token(inputs(S), 0), state=random_state(Sizes(p=3, n=8, per_group=2)))


def test_in_place_needs_gradients_off():
    values, state = token(inputs(S), 0), random_state(S)
    values["x_bhp"].requires_grad_()
    with pytest.raises(ValueError, match="in place while gradients are recorded"):
        step(**values, state=state, inplace=True)
