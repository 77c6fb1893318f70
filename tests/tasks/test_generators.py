"""Laws of the task generators: independent answers, balance, masks, lengths, vocabulary, seeds."""

import ast
import operator

import pytest
import torch

from mamba3.tasks import MQAR, TASKS, make_task
from mamba3.tasks.base import IGNORED

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
ENDING = ["parity", "arithmetic", "arithmetic-brackets"]
EQUALS = {"arithmetic": 4, "arithmetic-brackets": 10}
CHI_SQUARE = {1: 10.8, 4: 18.5}  # 99.9 % points by degrees of freedom


def sample(name, sequences=200, shortest=3, longest=40, seed=0):
    return make_task(name).sample(sequences, shortest, longest, torch.Generator().manual_seed(seed))


def evaluate(text: str) -> int:
    """An integer expression, by Python's own parser."""

    def value(node) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        assert isinstance(node, ast.BinOp), ast.dump(node)
        return OPERATORS[type(node.op)](value(node.left), value(node.right))

    return value(ast.parse(text, mode="eval").body)


def by_hand(name: str, symbols: str) -> str:
    """The answer's symbol for what stands before it."""
    if name == "parity":
        return str(symbols.count("1") % 2)
    assert symbols.endswith("=") and symbols.count("=") == 1
    return str(evaluate(symbols[:-1]) % 5)


@pytest.mark.parametrize("name", ENDING)
@pytest.mark.parametrize(("shortest", "longest"), [(3, 12), (3, 40), (200, 256)])
def test_answers_agree_with_another_evaluator(name, shortest, longest):
    task, batch = make_task(name), sample(name, 200, shortest, longest)
    for row, position, answer in zip(batch.inputs, batch.positions[:, 0], batch.answers[:, 0], strict=True):
        assert task.symbols[answer] == by_hand(name, task.text(row[: position + 1]))


@pytest.mark.parametrize(("expression", "answer"), [("2+3*4", 4), ("1-3", 3), ("4*4*4-0", 4), ("3", 3), ("0-1*3+2", 4)])
def test_arithmetic_binds_as_in_school(expression, answer):
    task = make_task("arithmetic")
    tokens = torch.tensor([[task.symbols.index(s) for s in expression]])
    digits, ops = tokens[:, ::2] - task.zero, torch.cat([tokens[:, 1::2], torch.ones(1, 1, dtype=torch.int64)], dim=1)
    assert task._value(digits, ops, torch.tensor([digits.shape[1]])).item() == answer


@pytest.mark.parametrize("name", ENDING)
def test_answers_and_digits_are_balanced(name):
    task, batch = make_task(name), sample(name, 4000, 100, 160, seed=1)
    classes = round(1 / task.chance)
    for values in (batch.answers[:, 0], batch.inputs[:, 1 if name == "parity" else 0]):
        counts = torch.stack([(values == task.symbols.index(str(c))).sum() for c in range(classes)]).double()
        if name == "arithmetic-brackets" and values is not batch.answers[:, 0]:
            values = batch.inputs[batch.inputs < 5][::97]  # an expression in brackets begins with one
            counts = torch.bincount(values, minlength=5).double()
        expected = counts.sum() / classes
        assert counts.sum() > 1000
        assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE[classes - 1]


def test_operators_are_those_of_the_source():
    plain = sample("arithmetic", 2000, 3, 80)
    counts = torch.bincount(plain.inputs.flatten(), minlength=10)[1:4].double()
    expected = counts.sum() / 3
    assert ((counts - expected) ** 2 / expected).sum() < 13.9  # two degrees of freedom
    brackets = make_task("arithmetic-brackets")
    text = "".join(brackets.text(row) for row in sample("arithmetic-brackets", 300).inputs)
    assert "*" not in text and text.count("(") == text.count(")")


@pytest.mark.parametrize("name", ENDING)
def test_only_the_answer_is_asked_for_and_only_it_is_hidden(name):
    task, batch = make_task(name), sample(name)
    targets, padding = batch.targets, task.symbols.index("")
    assert ((targets != IGNORED).sum(1) == 1).all()
    for row, target, position, answer in zip(batch.inputs, targets, batch.positions, batch.answers, strict=True):
        assert target[position].equal(answer)
        tail = row[position.item() + 1 :]
        assert not tail.numel() or tail[0] == 0  # the answer's place
        assert (tail[1:] == padding).all()
        if name in EQUALS:
            assert row[position] == EQUALS[name]


@pytest.mark.parametrize("name", ENDING)
def test_lengths_are_uniform_between_their_bounds(name):
    batch = sample(name, 6000, 3, 12)
    expected = {"parity": range(3, 13), "arithmetic": range(3, 12, 2), "arithmetic-brackets": range(5, 13)}[name]
    assert sorted(set(batch.lengths.tolist())) == list(expected)
    counts = torch.bincount(batch.lengths)[list(expected)].double()
    shares = torch.ones(len(expected))
    if name == "arithmetic-brackets":
        shares[0] = 3  # 3, 4 and 5 all become 5
    shares = 6000 * shares / shares.sum()
    assert ((counts - shares) ** 2 / shares).sum() < 30  # nine degrees of freedom at most
    after = 1 if name != "arithmetic-brackets" else 2  # the answer; in brackets it is followed by padding
    assert batch.positions[:, 0].equal(batch.lengths - 1 - after)
    exact = sample(name, 50, 255, 255)
    assert (exact.lengths == 255).all() and exact.inputs.shape == (50, 254)


def test_short_brackets_are_written_out():
    task, batch = make_task("arithmetic-brackets"), sample("arithmetic-brackets", 500, 3, 8)
    shapes = {}
    for row, position in zip(batch.inputs, batch.positions[:, 0], strict=True):
        text = task.text(row[:position])
        shapes.setdefault(position.item(), set()).add("".join("d" if s.isdigit() else s for s in text))
    assert shapes == {2: {"-d"}, 3: {"(d)"}, 4: {"(-d)"}, 5: {"(d+d)", "(d-d)"}}


@pytest.mark.parametrize("noise", [False, True])
def test_mqar_asks_every_key_once_for_its_value(noise):
    task = MQAR(vocab_size=64, noise=noise)
    batch = task.sample(300, 32, 32, torch.Generator().manual_seed(0))
    pairs = 8
    assert batch.inputs.shape == (300, 32) and batch.positions.shape == (300, pairs)
    for row, positions, answers in zip(batch.inputs, batch.positions, batch.answers, strict=True):
        table = dict(zip(row[: 2 * pairs : 2].tolist(), row[1 : 2 * pairs : 2].tolist(), strict=True))
        assert len(table) == pairs and len(set(table.values())) == pairs
        assert all(1 <= key < 32 <= value < 64 for key, value in table.items())
        assert sorted(row[positions].tolist()) == sorted(table)
        assert [table[key] for key in row[positions].tolist()] == answers.tolist()
        assert (positions >= 2 * pairs).all() and (positions % 2 == 0).all() and len(set(positions.tolist())) == pairs
    free = torch.ones_like(batch.inputs).scatter(1, batch.positions, 0)[:, 2 * pairs :].bool()
    fillers = batch.inputs[:, 2 * pairs :][free]
    assert (fillers.unique().numel() > 50) if noise else (fillers == 0).all()


def test_mqar_gaps_are_short_more_often():
    """p(gap j) ~ j^(0.01 - 1): of one pair in 64 slots, the first slot is taken with probability 1 / sum."""
    task = MQAR(vocab_size=64, pairs_divisor=130)
    batch = task.sample(4000, 130, 130, torch.Generator().manual_seed(0))
    odds = torch.arange(1.0, 65) ** (0.01 - 1)
    first = (batch.positions[:, 0] == 2).double().mean()
    assert abs(first - odds[0] / odds.sum()) < 4 * (0.21 * 0.79 / 4000) ** 0.5


@pytest.mark.parametrize("name", TASKS)
def test_tokens_are_in_the_vocabulary_and_a_seed_decides_them(name):
    task, lengths = make_task(name), (64, 64) if name == "mqar" else (3, 64)
    assert len(task.symbols) == task.vocab_size
    first, again, other = (sample(name, 100, *lengths, seed=seed) for seed in (5, 5, 6))
    for tokens in (first.inputs, first.answers):
        assert tokens.min() >= 0 and tokens.max() < task.vocab_size
    assert first.inputs.equal(again.inputs) and first.answers.equal(again.answers)
    assert not first.inputs.equal(other.inputs)


def test_scaled_accuracy():
    assert make_task("parity").scaled_accuracy(0.5) == 0
    assert make_task("arithmetic").scaled_accuracy(1.0) == 1
    assert make_task("arithmetic").scaled_accuracy(0.6) == pytest.approx(0.5)
    assert make_task("parity").scaled_accuracy(0.49) < 0  # not clipped


def test_impossible_demands_are_refused():
    with pytest.raises(ValueError, match="parity needs at least one sequence and 3 <= shortest <= longest"):
        sample("parity", 10, 12, 4)
    with pytest.raises(ValueError, match="one even length"):
        sample("mqar", 10, 8, 16)
    with pytest.raises(ValueError, match="even vocabulary"):
        MQAR(vocab_size=7)
    with pytest.raises(ValueError, match="a task is one of parity"):
        make_task("copy")
