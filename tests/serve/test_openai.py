"""The official client's calls, and what it is told when they are wrong."""

import threading
import time

import openai
import pytest
import torch

from mamba3.engine import EngineConfig
from mamba3.serve import ServeConfig, app
from mamba3.text.encode import encode
from tests.serve.conftest import lm, served

MODEL = "mamba3"
LONG = {"max_tokens": 4000, "logit_bias": {"256": -100}}  # no end token


def oracle(prompt: bytes, count: int) -> bytes:
    tokens = lm().generate(torch.tensor([list(prompt)]), max_new_tokens=count).tokens[0].tolist()
    return bytes(t for t in tokens if t < 256)


def test_models(server):
    client = server.client()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt")
    assert caught.value.code == "model_not_found"


def test_a_completion_is_the_plain_loop_s(server):
    done = server.client().completions.create(model=MODEL, prompt="Once upon", temperature=0, max_tokens=12)
    (choice,) = done.choices
    assert choice.text == oracle(b"Once upon", 12).decode(errors="replace") and choice.finish_reason == "length"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (9, 12, 21)
    again = server.client().completions.create(model=MODEL, prompt="Once upon", temperature=0, max_tokens=12)
    assert again.usage.prompt_tokens_details.cached_tokens == 9 and again.choices[0].text == choice.text


def test_prompts_of_every_kind_and_several_continuations(server):
    client = server.client()
    for prompt, count in (("ab", 1), ([97, 98], 1), (["ab", "c"], 2), ([[97, 98], [99]], 2)):
        done = client.completions.create(model=MODEL, prompt=prompt, n=2, temperature=0, max_tokens=3)
        assert [choice.index for choice in done.choices] == list(range(2 * count))
        assert done.choices[0].text == oracle(b"ab", 3).decode(errors="replace")
        assert done.usage.prompt_tokens == (2 if count == 1 else 3)
    assert client.completions.create(model=MODEL, prompt="", max_tokens=2).usage.prompt_tokens == 1


def test_streams_add_up_to_the_whole(server):
    client = server.client()
    settings = {"model": MODEL, "prompt": ["Hé", "b"], "n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 20}
    whole = client.completions.create(**settings)
    texts, usage, reasons = [""] * 4, None, [None] * 4
    for chunk in client.completions.create(**settings, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage or usage
    assert texts == [choice.text for choice in whole.choices] and len(set(texts)) == 4
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens == 80


def test_the_wire_format_of_a_stream(server):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 2}
    status, headers, raw = server.call("POST", "/v1/chat/completions", body)
    events = raw.decode().split("\n\n")
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream") and headers["x-request-id"]
    assert events[0].startswith("data: {") and '"role":"assistant"' in events[0]
    assert events[-2:] == ["data: [DONE]", ""]


def test_chat(server):
    client, messages = server.client(), [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    settings = {"model": MODEL, "messages": messages, "seed": 1, "max_completion_tokens": 8, "logprobs": True}
    whole = client.chat.completions.create(**settings, top_logprobs=2)
    (choice,) = whole.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert whole.usage.prompt_tokens == len("System: S\nUser: Hi\nAssistant:")
    assert b"".join(bytes(t.bytes) for t in choice.logprobs.content).decode(errors="replace") == choice.message.content
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
        assert token.logprob <= token.top_logprobs[0].logprob <= 0
    text, content = "", []
    for i, chunk in enumerate(client.chat.completions.create(**settings, top_logprobs=2, stream=True)):
        assert chunk.object == "chat.completion.chunk" and (chunk.choices[0].delta.role == "assistant") == (i == 0)
        text += chunk.choices[0].delta.content or ""
        content += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert text == choice.message.content and content == choice.logprobs.content


def test_log_probabilities_of_completions_and_echo(server):
    client, settings = server.client(), {"model": MODEL, "prompt": "ab", "temperature": 0, "logprobs": 2}
    (plain,) = client.completions.create(**settings, max_tokens=3).choices
    (echoed,) = client.completions.create(**settings, max_tokens=3, echo=True).choices
    (scored,) = client.completions.create(**settings, max_tokens=0, echo=True).choices
    assert echoed.text == "ab" + plain.text and scored.text == "ab"
    assert echoed.logprobs.tokens[:2] == ["a", "b"] and echoed.logprobs.token_logprobs[0] is None
    assert echoed.logprobs.token_logprobs[2:] == pytest.approx(plain.logprobs.token_logprobs, abs=1e-5)
    assert echoed.logprobs.token_logprobs[:2] == scored.logprobs.token_logprobs
    model = lm()
    expected = model(torch.tensor([[97]]))[0, 0, :257].detach().log_softmax(-1)[98]
    assert scored.logprobs.token_logprobs[1] == pytest.approx(float(expected), abs=1e-4)
    assert echoed.logprobs.text_offset[:2] == [0, 1] and len(plain.logprobs.top_logprobs[0]) == 2
    parts = list(client.completions.create(**settings, max_tokens=3, echo=True, stream=True))
    assert "".join(part.choices[0].text for part in parts) == echoed.text
    streamed = [v for part in parts if part.choices[0].logprobs for v in part.choices[0].logprobs.token_logprobs]
    assert streamed[0] is None and streamed[1:] == pytest.approx(echoed.logprobs.token_logprobs[1:], abs=1e-5)


@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_echoes_the_prompt_s_log_probabilities(server, max_tokens, stream):
    settings = {"model": MODEL, "prompt": ["ab", "cde"], "logprobs": 1, "echo": True, "max_tokens": max_tokens}
    alone = server.client().completions.create(**settings)
    settings |= {"n": 3, "temperature": 1.5, "seed": 1}
    found = [[] for _ in range(6)]
    if stream:
        for part in server.client().completions.create(**settings, stream=True):
            for choice in part.choices:
                found[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
    else:
        for choice in server.client().completions.create(**settings).choices:
            found[choice.index] = choice.logprobs.token_logprobs
    for i, values in enumerate(found):
        prompt = (2, 3)[i // 3]
        expected = alone.choices[i // 3].logprobs.token_logprobs[:prompt]
        assert len(values) == prompt + max_tokens and values[0] is None
        assert values[1:prompt] == pytest.approx(expected[1:], abs=1e-5)


def test_a_seed_is_the_same_alone_and_in_a_crowd(server):
    client = server.client()

    def once(seed):
        settings = {"temperature": 1.3, "top_p": 0.95, "max_tokens": 15, "seed": seed}
        return client.completions.create(model=MODEL, prompt="seed", **settings).choices[0].text

    alone, crowd = [once(seed) for seed in range(6)], [""] * 6
    threads = [threading.Thread(target=lambda i=i: crowd.__setitem__(i, once(i))) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert crowd == alone and len(set(alone)) == 6


def test_settings_reach_the_sampler(server):
    client = server.client()
    say = lambda **settings: client.completions.create(model=MODEL, prompt="x", max_tokens=6, **settings).choices[0]  # noqa: E731
    assert say(logit_bias={"65": 100}).text == "AAAAAA"
    assert say(logit_bias={"65": 100, "66": 95}, frequency_penalty=2, temperature=0).text.startswith("AA")
    assert "B" in say(logit_bias={"65": 100, "66": 95}, frequency_penalty=2, temperature=0).text
    assert (
        say(logit_bias={"65": 100}, stop="AAA").text == ""
        and say(logit_bias={"65": 100}, stop=["AAA"]).finish_reason == "stop"
    )
    assert say(logit_bias={"256": 100}).finish_reason == "stop"
    assert say(extra_body={"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1}).text
    assert say(temperature=2, extra_body={"top_k": 1}).text == say(temperature=0).text


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("completions", {"temperature": -1}, "temperature"),
        ("completions", {"temperature": "hot"}, "temperature"),
        ("completions", {"max_tokens": 10**7}, "max_tokens"),
        ("completions", {"suffix": "x"}, "suffix"),
        ("completions", {"prompt": [999]}, None),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": ["x"] * 20, "n": 10}, None),
        ("completions", {"logit_bias": {"999": 1}}, None),
        ("completions", {"stream_options": {"include_usage": True}}, None),
        ("completions", {"n": 2, "session": "a"}, None),
        ("chat/completions", {"tools": [{"type": "function"}]}, "tools"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format.type"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ("chat/completions", {"top_logprobs": 2}, None),
    ],
)
def test_what_cannot_be_done_is_refused_in_openai_s_shape(server, path, fields, param):
    base = {"prompt": "x"} if path == "completions" else {"messages": [{"role": "user", "content": "x"}]}
    status, _, body = server.call("POST", f"/v1/{path}", {"model": MODEL, **base, **fields})
    error = body["error"]
    assert status == 400 and error["type"] == "invalid_request_error" and error["message"]
    if param is not None:
        assert error["param"].startswith(param)


def test_fields_that_change_nothing_are_accepted(server):
    fields = {"tools": None, "response_format": {"type": "text"}, "store": False, "user": "me", "modalities": ["text"]}
    body = {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "max_tokens": 1}
    assert server.call("POST", "/v1/chat/completions", {**body, **fields})[0] == 200


def test_other_errors_have_the_shape_too(server):
    for method, path, data, status in (
        ("GET", "/nowhere", None, 404),
        ("GET", "/v1/completions", None, 405),
        ("POST", "/v1/completions", b"{not json", 400),
        ("POST", "/v1/completions", b"[]", 400),
    ):
        found, _, body = server.call(method, path, data=data)
        assert found == status and set(body["error"]) == {"message", "type", "param", "code"}
    with pytest.raises(openai.NotFoundError):
        server.client().completions.create(model="other", prompt="x")


def test_a_client_that_goes_away_frees_its_row(server):
    aborted = server.service.metrics.aborted._value.get()
    stream = server.client().completions.create(model=MODEL, prompt="x", **LONG, stream=True)
    next(iter(stream))
    assert server.service.engine.pool.used == 1
    stream.close()
    assert server.idle() and server.service.engine.pool.used == 0
    with pytest.raises(openai.APITimeoutError):
        server.client().with_options(timeout=0.3).completions.create(model=MODEL, prompt="x", **LONG)
    assert server.idle() and server.service.engine.pool.used == 0
    assert server.service.metrics.aborted._value.get() == aborted + 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_its_first_token_leaves_the_queue(stream):
    """It is noticed while it waits, not when its turn comes."""
    with served(engine=EngineConfig(rows=1, quantum=None)) as server:
        client, scheduler = server.client(), server.service.engine.scheduler
        with client.completions.create(model=MODEL, prompt="x", **LONG, stream=True) as running:
            next(iter(running))
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.3).completions.create(
                    model=MODEL, prompt="y", stream=stream, max_tokens=2
                )
            end = time.monotonic() + 20
            while scheduler.waiting and time.monotonic() < end:
                time.sleep(0.01)
            assert scheduler.waiting == 0 and len(scheduler.running) == 1
        assert server.idle() and server.service.metrics.aborted._value.get() == 2


def test_metrics_health_and_the_status_page(server):
    server.client().completions.create(model=MODEL, prompt="x", max_tokens=3)
    status, _, raw = server.call("GET", "/metrics")
    lines = dict(line.rsplit(" ", 1) for line in raw.decode().splitlines() if not line.startswith("#"))
    assert status == 200 and float(lines["mamba3_completion_tokens_total"]) >= 3 and lines["mamba3_rows"] == "4.0"
    assert any(name.startswith("mamba3_first_token_seconds_bucket") for name in lines)
    assert float(lines['mamba3_requests_total{route="/v1/completions",status="200"}']) >= 1
    assert server.call("GET", "/health")[::2] == (200, {"status": "ok"})
    _, _, facts = server.call("GET", "/status")
    _, _, page = server.call("GET", "/")
    assert facts["rows"] == 4 and facts["running"] == 0 and facts["chosen_tokens"] >= 3
    for name in ("running", "rows", "waiting", "tokens_per_second", "cache_hits", "sessions"):
        assert f"s.{name}".encode() in page and name in facts


# -- keys and limits


def test_keys_owners_and_limits():
    config = ServeConfig(api_keys=("alpha", "beta"), per_key=1, max_body=2000)
    with served(config=config, engine=EngineConfig(rows=1, queue=1)) as server:
        with pytest.raises(openai.AuthenticationError) as caught:
            server.client("wrong").models.list()
        assert caught.value.code == "invalid_api_key"
        for path in ("/v1/models", "/v1/sessions", "/status"):
            assert server.call("GET", path)[0] == 401
        assert server.call("GET", "/health")[0] == server.call("GET", "/metrics")[0] == 200
        alpha, beta = server.client("alpha"), server.client("beta")
        one = alpha.completions.create(model=MODEL, prompt="secret" * 5, max_tokens=2)
        other = beta.completions.create(model=MODEL, prompt="secret" * 5, max_tokens=2)
        assert one.usage.prompt_tokens_details.cached_tokens == other.usage.prompt_tokens_details.cached_tokens == 0
        stream = alpha.completions.create(model=MODEL, prompt="x", **LONG, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            alpha.completions.create(model=MODEL, prompt="x")
        assert caught.value.code == "too_many_requests" and caught.value.response.headers["Retry-After"] == "1"
        waits = threading.Thread(target=lambda: beta.completions.create(model=MODEL, prompt="x", max_tokens=1))
        waits.start()
        while not server.service.engine.scheduler.waiting:
            time.sleep(0.01)
        stream.close()
        waits.join()
        assert server.call("POST", "/v1/completions", {"model": MODEL, "prompt": "x" * 3000}, "alpha")[0] == 413


def test_a_full_queue_says_when_to_come_back():
    with served(engine=EngineConfig(rows=1, queue=1)) as server:
        client = server.client()
        stream = client.completions.create(model=MODEL, prompt="x", **LONG, stream=True)
        next(iter(stream))
        waits = threading.Thread(target=lambda: client.completions.create(model=MODEL, prompt="x", max_tokens=1))
        waits.start()
        while not server.service.engine.scheduler.waiting:
            time.sleep(0.01)
        for streaming in (False, True):
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(model=MODEL, prompt="x", stream=streaming)
            assert caught.value.code == "queue_full" and "Retry-After" in caught.value.response.headers
        stream.close()
        waits.join()


def test_a_key_that_asks_for_much_fills_no_queue_but_its_own():
    config = ServeConfig(api_keys=("alpha", "beta"))
    with served(config=config, engine=EngineConfig(rows=1, queue=4)) as server:
        alpha, beta = server.client("alpha"), server.client("beta")
        with alpha.completions.create(model=MODEL, prompt="x", n=20, **LONG, stream=True) as stream:
            next(iter(stream))
            while server.service.engine.scheduler.waiting < 19:
                time.sleep(0.01)
            with pytest.raises(openai.RateLimitError):
                alpha.completions.create(model=MODEL, prompt="x", extra_body={"user": "another"})
            waits = threading.Thread(target=lambda: beta.completions.create(model=MODEL, prompt="x", max_tokens=1))
            waits.start()
            while server.service.engine.scheduler.waiting < 20:
                assert waits.is_alive()
                time.sleep(0.01)
        waits.join()


def test_a_step_that_fails_ends_its_requests_and_no_more(monkeypatch):
    with served() as server:
        step, failing = server.service.engine._runner.step, []

        def fail(*arguments):
            if failing:
                raise RuntimeError("secret detail")
            return step(*arguments)

        monkeypatch.setattr(server.service.engine._runner, "step", fail)
        failing.append(True)
        status, _, body = server.call("POST", "/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": 5})
        assert status == 503 and "secret" not in body["error"]["message"]
        failing.clear()
        assert server.client().completions.create(model=MODEL, prompt="x", max_tokens=5).usage.completion_tokens == 5


def test_an_engine_that_dies_leaves_nobody_waiting(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("secret detail")

    with served() as server:
        monkeypatch.setattr(server.service.engine._runner, "read", fail)
        monkeypatch.setattr(server.service.engine, "reset", fail)
        for _ in range(2):  # one that was under way, and one that comes after
            status, _, body = server.call(
                "POST", "/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": 5}, timeout=10
            )
            assert status == 503 and "engine has died" in body["error"]["message"]
        assert server.call("GET", "/health")[0] == 503


def test_one_thread_encodes(server, monkeypatch):
    """Each thread that encodes would come to hold a cache of its own; this one is there whatever the others are busy with."""
    threads, go_on, store = set(), threading.Event(), server.service.sessions
    monkeypatch.setattr(app, "encode", lambda *arguments: threads.add(threading.get_ident()) or encode(*arguments))
    monkeypatch.setattr(store, "list", lambda owner: go_on.wait(30) and [])
    lists = [threading.Thread(target=server.call, args=("GET", "/v1/sessions")) for _ in range(3)]
    for thread in lists:
        server.client().completions.create(model=MODEL, prompt="x", max_tokens=1)
        thread.start()
    go_on.set()
    for thread in lists:
        thread.join()
    assert len(threads) == 1


def test_logs_tell_no_prompts(server, caplog):
    with caplog.at_level("INFO", "mamba3.serve"):
        server.client().completions.create(model=MODEL, prompt="my secret", max_tokens=3)
        found = []
        for _ in range(1000):  # a line comes after its answer, and so may that of another test's request
            lines = [r for r in caplog.records if r.name == "mamba3.serve.access"]
            found = [r for r in lines if r.facts.get("prompt_tokens") == 9]
            if found:
                break
            time.sleep(0.02)
    (record,) = found
    assert record.facts["completion_tokens"] == 3 and record.facts["status"] == 200
    assert not any("secret" in str(vars(line)) for line in lines)


def test_numbers_are_finite(server):
    body = b'{"model": "mamba3", "prompt": "x", "temperature": NaN}'
    assert server.call("POST", "/v1/completions", data=body)[0] == 400
