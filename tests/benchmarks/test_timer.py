"""A time is taken only behind green checks, in turns, and ratios are formed within rounds."""

import json

import pytest
import torch

from benchmarks import environment, results
from benchmarks.checks import Check, Refused, agree, angle_distance, require
from benchmarks.timer import Race, Spread, race


def test_green_checks_let_the_contestants_start_in_turns():
    calls = []
    contestants = {name: lambda name=name: calls.append(name) for name in "ab"}
    result = race(contestants, lambda outputs: [Check("they agree", 0.0, 1e-3)], rounds=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert all(len(spread.rounds) == 3 and min(spread.rounds) >= 0 for spread in result.seconds.values())


@pytest.mark.parametrize(
    "checks", [[], [Check("law", float("nan"), 1.0)], [Check("fine", 0, 1), Check("law", 2e-3, 1e-3)]]
)
def test_a_red_check_or_none_at_all_takes_no_time(checks):
    calls = []
    with pytest.raises(Refused, match=r"law|nothing was checked"):
        race({"a": lambda: calls.append("a")}, lambda outputs: checks, rounds=5)
    assert calls == ["a"]


def test_a_refusal_names_the_law_the_error_and_the_bound():
    with pytest.raises(Refused, match=r"step = prefill: error 2\.00e-03, allowed 1e-04") as refusal:
        require([Check("step = prefill", 2e-3, 1e-4), Check("other", 0, 1)])
    assert "other" not in str(refusal.value)


def test_a_ratio_is_formed_within_each_round():
    result = Race({"slow": Spread((2.0, 40.0, 6.0)), "fast": Spread((1.0, 10.0, 3.0))}, ())
    assert result.ratio("slow", "fast").rounds == (2.0, 4.0, 2.0)
    assert result.ratio("slow", "fast").to_dict() == {"median": 2.0, "min": 2.0, "max": 4.0, "rounds": 3}
    assert result.fastest(["slow", "fast"]) == "fast"


def test_angles_are_compared_on_the_circle_and_nan_agrees_with_nothing():
    assert angle_distance(torch.tensor([3.14]), torch.tensor([-3.14])) < 0.01
    assert not agree("law", torch.tensor([float("nan")]), torch.ones(1), torch.float32).holds


def test_the_environment_names_no_machine_user_or_path(tmp_path):
    import getpass
    import platform

    where = environment.describe()
    assert where["threads"] == torch.get_num_threads() and where["versions"]["torch"] == torch.__version__
    text = json.dumps(where)
    for private in (platform.node(), f"/{getpass.getuser()}", str(environment.ROOT)):
        assert not private or private not in text


def test_a_refused_section_is_written_as_refused_and_the_others_run(tmp_path):
    def refuse(tell):
        raise Refused("y is wrong")

    measured = results.run_sections(
        {"bad": refuse, "good": lambda tell: [{"ratio": 1 / 3}]}, lambda _: None, lambda: None
    )
    assert results.refusals(measured) == {"bad": "y is wrong"}
    where = environment.describe()
    path = results.write("cpu", where, True, measured, lambda measured, image: image.touch(), tmp_path)
    assert path.name == f"{where['date'][:10]}-cpu-{where['threads']}-threads-cpu-quick.json"
    written = json.loads(path.read_text())
    assert written["results"] == {"bad": {"refused": "y is wrong"}, "good": [{"ratio": 0.333333}]}
