"""The HTTP application: OpenAI's routes, sessions, health, metrics and a status page, over one `Service`."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from openai.types import Model
from prometheus_client import CONTENT_TYPE_LATEST

from mamba3 import __version__
from mamba3.engine import Request as EngineRequest
from mamba3.serve import errors
from mamba3.serve.chat import ChatShape
from mamba3.serve.completions import TextShape
from mamba3.serve.errors import APIError, ErrorResponse, of_the_caller
from mamba3.serve.generation import Job, answer
from mamba3.serve.middleware import Observed
from mamba3.serve.protocol import ChatBody, CompletionBody, Generation, Health
from mamba3.serve.service import Service
from mamba3.serve.sessions_api import session_routes
from mamba3.serve.who import Owner
from mamba3.text.encode import encode

_CODES = (400, 401, 404, 409, 413, 422, 429, 500, 503)
_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions


def create_app(service: Service) -> FastAPI:
    """The application. Its lifespan starts the engine's thread, and at the end stops it and parks the sessions."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.thread.start()
        yield
        service.draining = True
        await asyncio.to_thread(service.thread.stop)
        await asyncio.to_thread(service.sessions.park_all)
        service.tokenizing.shutdown()

    app = FastAPI(
        title="mamba3", version=__version__, lifespan=lifespan,
        responses={code: {"model": ErrorResponse} for code in _CODES},
    )  # fmt: skip
    errors.install(app)
    app.add_middleware(Observed, service=service)

    app.state.service = service
    _add_plain_routes(app, service)
    app.include_router(session_routes(service))

    @app.post("/v1/completions", tags=["OpenAI"])
    async def completions(body: CompletionBody, http: Request, owner: Owner) -> Response:
        """Text that goes on, as OpenAI's API has it."""
        service.check_model(body.model)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(service.place(owner))
            job = await text_job(service, body, http, owner, stack)
            return await answer(job, stack.pop_all(), body.stream, _includes_usage(body))

    @app.post("/v1/chat/completions", tags=["OpenAI"])
    async def chat(body: ChatBody, http: Request, owner: Owner) -> Response:
        """A reply to messages, as OpenAI's API has it. With a session, messages are what is new."""
        service.check_model(body.model)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(service.place(owner))
            job = await chat_job(service, body, http, owner, stack)
            return await answer(job, stack.pop_all(), body.stream, _includes_usage(body))

    return app


async def text_job(service: Service, body: CompletionBody, http: Request, owner: str, stack: AsyncExitStack) -> Job:
    """The job of a text completion."""
    prompts = await _read_prompts(service, body)
    limit = service.max_tokens(body.max_tokens, _COMPLETION_TOKENS)
    id = f"cmpl-{secrets.token_hex(12)}"
    texts = [service.tokenizer.decode(p, skip_special_tokens=False) for p in prompts] if body.echo else None
    shape = TextShape(service, id, body.logprobs, texts)
    shape.first_tokens = [prompt[0] for prompt in prompts]
    prompt_logprobs = body.logprobs if body.echo else None
    with of_the_caller():
        params = body.sampling(limit, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs)
    if body.session is None:
        requests = [
            EngineRequest(id=f"{id}-{i}", tokens=tokens, params=params, owner=owner, user=body.user)
            for i, tokens in enumerate(prompts)
        ]
        return Job(service, http, requests, shape)
    session = await stack.enter_async_context(service.session(owner, body.session))
    assert isinstance(body.prompt, str)
    prompt = prompts[0] if body.prompt or not session.tokens else []
    with of_the_caller():
        request = session.request(id, prompt, params)
    return Job(service, http, [request], shape, session, body.prompt)


async def chat_job(service: Service, body: ChatBody, http: Request, owner: str, stack: AsyncExitStack) -> Job:
    """The job of a chat completion."""
    template = service.template
    if template is None:
        told = "This model has no chat template; use /v1/completions, or serve it with --chat-template."
        raise APIError(400, told, param="messages", code="no_chat_template")
    limit = service.max_tokens(body.max_completion_tokens or body.max_tokens, service.config.max_tokens)
    messages, id = [message.plain for message in body.messages], f"chatcmpl-{secrets.token_hex(12)}"
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    with of_the_caller():
        params = body.sampling(limit, template.stops, logprobs=logprobs)
    shape, session = ChatShape(service, id), None
    if body.session is not None:
        session = await stack.enter_async_context(service.session(owner, body.session))
    with of_the_caller("messages"):
        if session is None or not session.tokens:
            said, tokens = await service.tokenize(template.first, messages)
        else:
            said, tokens = await service.tokenize(template.following, session.text, messages)
    _check_length(service, len(tokens), "messages")
    if session is None:
        requests = [EngineRequest(id=id, tokens=tokens, params=params, owner=owner, user=body.user)]
        return Job(service, http, requests, shape)
    return Job(service, http, [session.request(id, tokens, params)], shape, session, said)


async def _read_prompts(service: Service, body: CompletionBody) -> list[list[int]]:
    """The tokens of each prompt; an empty text is the end-of-text token, which documents begin after."""
    given = body.prompt
    texts = [given] if isinstance(given, str) else [p for p in given if isinstance(p, str)]
    if texts:
        encoded = await service.tokenize(encode, service.tokenizer, texts)
        prompts = [ids.tolist() or [service.end_token] for ids in encoded]
    elif given and isinstance(given[0], int):
        prompts = [[token for token in given if isinstance(token, int)]]
    else:
        prompts = [list(prompt) for prompt in given if isinstance(prompt, list)]
    for prompt in prompts:
        _check_length(service, len(prompt), "prompt")
    return prompts


def _check_length(service: Service, tokens: int, param: str) -> None:
    if tokens > service.config.max_prompt:
        told = f"A prompt may have at most {service.config.max_prompt} tokens; it has {tokens}."
        raise APIError(400, told, param=param, code="context_length_exceeded")


def _includes_usage(body: Generation) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _add_plain_routes(app: FastAPI, service: Service) -> None:
    started = int(time.time())
    model = Model(id=service.config.model_name, created=started, object="model", owned_by="mamba3")

    @app.get("/v1/models", tags=["OpenAI"])
    async def models(owner: Owner):
        """The one model that is served."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", tags=["OpenAI"])
    async def one_model(name: str, owner: Owner) -> Model:
        service.check_model(name)
        return model

    @app.get("/health", tags=["operations"], response_model=Health)
    async def health() -> Response:
        """200 while requests are served, 503 while the server ends or when its engine has died."""
        well = service.thread.alive and not service.draining
        body = Health(status="ok" if well else "draining")
        return Response(body.model_dump_json(), 200 if well else 503, media_type="application/json")

    @app.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(b"".join(service.metrics.text()), media_type=CONTENT_TYPE_LATEST)

    @app.get("/status", tags=["operations"])
    async def status(owner: Owner):
        """What the status page shows."""
        engine, sessions = service.engine, await asyncio.to_thread(service.sessions.list, owner)
        return {
            "model": service.config.model_name, "seconds": int(time.time()) - started, "rows": engine.config.rows,
            "running": len(engine.scheduler.running), "reading": len(engine.scheduler.prompts),
            "waiting": engine.scheduler.waiting, "tokens_per_second": service.metrics.tokens_per_second,
            "cache_hits": engine.cache.hits, "cache_misses": engine.cache.misses, "cache_bytes": engine.cache.nbytes,
            "cached_tokens": engine.counters.cached_tokens, "prompt_tokens": engine.counters.prompt_tokens,
            "chosen_tokens": engine.counters.chosen_tokens,
            "sessions": [info.__dict__ for info in sessions[:100]],
        }  # fmt: skip

    page = files("mamba3.serve").joinpath("status.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page)
