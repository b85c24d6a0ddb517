"""The routes: OpenAI's API, the page, health and metrics.

schema.py says what requests and answers look like, answer.py what becomes of them, guard.py who may ask at all.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from minigpt.serving import schema
from minigpt.serving.guard import ApiError, Guard, Metrics
from minigpt.serving.requests import Answer, GenerationRequest, RequestBuilder
from minigpt.serving.worker import Worker
from minigpt.settings.groups import LOOPBACK
from minigpt.version import __version__

WEB = Path(__file__).parent / "web"
PAGE = {"index.html": "text/html", "chat.css": "text/css", "chat.js": "text/javascript"}
T = TypeVar("T")


def make_app(worker: Worker, builder: RequestBuilder, name: str, api_key: str | None = None) -> Guard:
    """The server as an ASGI application.

    Args:
        worker: runs the model.
        asker: turns requests into rows.
        name: of the model, as clients call it.
        api_key: wanted of all clients. Without it, the server answers to the names of the loopback interface alone.
    """
    metrics = Metrics()
    errors: dict[int | str, dict[str, Any]] = {key: {"model": schema.ErrorBody} for key in ("4XX", "5XX")}
    app = FastAPI(title="minigpt", version=__version__, docs_url=None, redoc_url=None, responses=errors)
    keyed: dict[str, Any] = {"dependencies": [Security(HTTPBearer(auto_error=False))] if api_key else []}
    streamed: dict[str, Any] = {"responses": {200: {"content": {"text/event-stream": {}}}}}
    card = schema.ModelCard(id=name, created=int(time.time()), max_model_len=builder.model.config.context)

    def check_model(model: str | None) -> None:
        if model not in (None, name):
            raise ApiError(404, f"no model {model!r} here, but {name!r}", param="model", code="model_not_found")

    async def respond(request: Request, body: schema.Sampled, question: GenerationRequest, chat: bool) -> Response:
        answer = Answer(question, worker, builder.tokenizer)
        metrics.counts["prompt_tokens_total"] += question.prompt_tokens

        def done() -> None:
            answer.leave()
            metrics.counts["completion_tokens_total"] += answer.new_tokens
            metrics.observe("answer_seconds", time.perf_counter() - answer.started)
            if answer.first_token_s is not None:
                metrics.observe("first_token_seconds", answer.first_token_s)

        head: dict[str, Any] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "text_completion" if not chat else "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": name,
        }
        if question.truncated:
            head["truncated"] = question.truncated.model_dump()
        if body.stream:
            return EventStream(_events(head, chat, question, answer, body.include_usage), done)
        try:
            choices = await while_there(request.receive, _choices(chat, question, answer))
            return JSONResponse({**head, "choices": choices, "usage": usage(question, answer)})
        except ClientLeft:
            return Response(status_code=499)  # nobody reads it; the metrics count it
        finally:
            done()

    @app.post("/v1/chat/completions", response_model=schema.ChatAnswer, **streamed, **keyed)
    async def chat_completions(body: schema.ChatRequest, request: Request) -> Any:
        check_model(body.model)
        return await respond(request, body, await asyncio.to_thread(builder.chat, body), chat=True)

    @app.post("/v1/completions", response_model=schema.CompletionAnswer, **streamed, **keyed)
    async def completions(body: schema.CompletionRequest, request: Request) -> Any:
        check_model(body.model)
        return await respond(request, body, await asyncio.to_thread(builder.completion, body), chat=False)

    @app.get("/v1/models", **keyed)
    async def models() -> schema.ModelList:
        return schema.ModelList(data=[card])

    @app.get("/v1/models/{model:path}", **keyed)
    async def model(model: str) -> schema.ModelCard:
        check_model(model)
        return card

    @app.get("/health")
    async def health() -> schema.Health:
        if worker.ended:
            raise ApiError(503, str(worker.ended), type="server_error")
        return schema.Health()

    @app.get("/metrics", response_class=PlainTextResponse, **keyed)
    async def prometheus() -> Response:
        running = min(worker.rows, worker.max_rows)
        text = metrics.text(rows_running=running, rows_waiting=worker.rows - running, up=int(worker.ended is None))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @app.get("/{file}", include_in_schema=False)
    async def page(file: str) -> Response:
        if file not in PAGE:
            raise ApiError(404, "nothing here")
        return Response((WEB / file).read_bytes(), media_type=PAGE[file])

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return await page("index.html")

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        if not isinstance(error, ApiError):
            message = unreadable(error.__cause__) or error.detail
            error = ApiError(error.status_code, message, headers=error.headers)
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return invalid_request(error.errors()).response()

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return ApiError(500, f"{type(error).__name__} in the server", type="server_error").response()

    paths = {"/", *app.openapi()["paths"]}
    return Guard(app, metrics, api_key=api_key, hosts=None if api_key else LOOPBACK, paths=paths)


def unreadable(cause: BaseException | None) -> str | None:
    """What of a body made json.loads fail, where it is not the syntax; FastAPI says no more than that it failed."""
    if isinstance(cause, UnicodeDecodeError):
        return f"the body is not UTF-8 text (byte {cause.start}), so not JSON"
    if isinstance(cause, RecursionError):
        return "the body is nested too deeply"
    if isinstance(cause, ValueError):
        return "the body holds a number of too many digits"
    return None


def invalid_request(errors: Sequence[dict[str, Any]]) -> ApiError:
    """The most telling of pydantic's complaints about a body, in a line that names the field."""
    # of a field that may have several types, each complains: those whose type it is not say the least
    error = min(errors, key=lambda error: (error["loc"][:2] != errors[0]["loc"][:2], error["type"].endswith("_type")))
    where = [str(part) for part in error["loc"][1:] if str(part).isalnum() or "_" in str(part)]
    where = [part for part in where if part not in ("str", "int")]  # members of such a field
    if error["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {error['ctx']['error']} at character {where[0]}")
    if not where:
        return ApiError(400, f"the body: {error['msg']} (a JSON object is wanted, as application/json)")
    if where[0] in schema.NOT_HERE:
        return ApiError(400, f"{where[0]}: not supported here", param=where[0], code="unsupported_parameter")
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {'.'.join(where)}", param=where[0], code="unknown_parameter")
    return ApiError(400, f"{'.'.join(where)}: {error['msg']}", param=where[0])


def usage(question: GenerationRequest, answer: Answer) -> dict[str, int]:
    counted = {"prompt_tokens": question.prompt_tokens, "completion_tokens": answer.new_tokens}
    return {**counted, "total_tokens": sum(counted.values())}


async def _choices(chat: bool, question: GenerationRequest, answer: Answer) -> list[dict[str, Any]]:
    texts, reasons = [""] * len(question.rows), [""] * len(question.rows)
    async for index, text, reason in answer:
        texts[index] += text
        reasons[index] = reason or ""
    return [
        {
            "index": index,
            **({"message": {"role": "assistant", "content": text}} if chat else {"text": text}),
            "logprobs": None,
            "finish_reason": reason,
        }
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
    ]


async def _events(
    head: dict[str, Any], chat: bool, question: GenerationRequest, answer: Answer, include_usage: bool
) -> AsyncIterator[str]:
    """An answer as server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

    def event(index: int, said: dict[str, Any], reason: str | None) -> str:
        choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
        return _event({**head, "choices": [choice], **({"usage": None} if include_usage else {})})

    try:
        if chat:
            for index in range(len(question.rows)):
                yield event(index, {"delta": {"role": "assistant", "content": ""}}, None)
        async for index, text, reason in answer:
            if text or reason:
                yield event(index, {"delta": {"content": text} if text else {}} if chat else {"text": text}, reason)
        if include_usage:
            yield _event({**head, "choices": [], "usage": usage(question, answer)})
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield f"data: {error.json}\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


# ---- clients that leave


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


async def while_there(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it is cancelled where the client, whose body has been read, leaves before.

    Raises:
        ClientLeft: it did.
    """

    async def client_leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(client_leaves())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class EventStream(StreamingResponse):
    """Events for as long as the client is there. `done` is called at the end, however it comes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], done: Callable[[], None]):
        super().__init__(events)
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientLeft):
                await while_there(receive, self.stream_response(send))
        finally:
            self._done()
