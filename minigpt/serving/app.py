"""The routes: OpenAI's API, the chat page, health and metrics.

schema.py defines requests and responses, requests.py runs them, guard.py checks who may send them.
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
from minigpt.serving.guard import Guard, HttpError, ServerMetrics
from minigpt.serving.requests import AnswerStream, GenerationRequest, RequestBuilder
from minigpt.serving.worker import Worker
from minigpt.settings.groups import LOOPBACK
from minigpt.version import __version__

WEB = Path(__file__).parent / "web"
PAGE_FILES = {"index.html": "text/html", "chat.css": "text/css", "chat.js": "text/javascript"}
T = TypeVar("T")


def make_app(worker: Worker, builder: RequestBuilder, name: str, api_key: str | None = None) -> Guard:
    """The server as an ASGI application.

    Args:
        worker: runs the model.
        builder: converts requests to rows of the batch.
        name: the model name that clients see.
        api_key: wanted of all clients. Without it, the server answers to the names of the loopback interface alone.
    """
    metrics = ServerMetrics()
    errors: dict[int | str, dict[str, Any]] = {key: {"model": schema.ErrorBody} for key in ("4XX", "5XX")}
    app = FastAPI(title="minigpt", version=__version__, docs_url=None, redoc_url=None, responses=errors)
    needs_key: dict[str, Any] = {"dependencies": [Security(HTTPBearer(auto_error=False))] if api_key else []}
    may_stream: dict[str, Any] = {"responses": {200: {"content": {"text/event-stream": {}}}}}
    card = schema.ModelCard(id=name, created=int(time.time()), max_model_len=builder.model.config.context)

    def check_model(model: str | None) -> None:
        if model not in (None, name):
            raise HttpError(
                404, f"unknown model {model!r}; this server has {name!r}", param="model", code="model_not_found"
            )

    async def respond(
        request: Request, body: schema.SamplingFields, generation: GenerationRequest, chat: bool
    ) -> Response:
        answer = AnswerStream(generation, worker, builder.tokenizer)
        metrics.counts["prompt_tokens_total"] += generation.prompt_tokens

        def finish() -> None:
            answer.cancel()
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
        if generation.truncated:
            head["truncated"] = generation.truncated.model_dump()
        if body.stream:
            return EventStream(_events(head, chat, generation, answer, body.include_usage), finish)
        try:
            choices = await unless_disconnected(request.receive, _choices(chat, generation, answer))
            return JSONResponse({**head, "choices": choices, "usage": usage(generation, answer)})
        except ClientDisconnected:
            return Response(status_code=499)  # nginx's code for a closed connection: only the metrics see it
        finally:
            finish()

    @app.post("/v1/chat/completions", response_model=schema.ChatAnswer, **may_stream, **needs_key)
    async def chat_completions(body: schema.ChatRequest, request: Request) -> Any:
        check_model(body.model)
        return await respond(request, body, await asyncio.to_thread(builder.chat, body), chat=True)

    @app.post("/v1/completions", response_model=schema.CompletionAnswer, **may_stream, **needs_key)
    async def completions(body: schema.CompletionRequest, request: Request) -> Any:
        check_model(body.model)
        return await respond(request, body, await asyncio.to_thread(builder.completion, body), chat=False)

    @app.get("/v1/models", **needs_key)
    async def models() -> schema.ModelList:
        return schema.ModelList(data=[card])

    @app.get("/v1/models/{model:path}", **needs_key)
    async def model(model: str) -> schema.ModelCard:
        check_model(model)
        return card

    @app.get("/health")
    async def health() -> schema.Health:
        if worker.ended:
            raise HttpError(503, str(worker.ended), type="server_error")
        return schema.Health()

    @app.get("/metrics", response_class=PlainTextResponse, **needs_key)
    async def prometheus() -> Response:
        running = min(worker.rows, worker.max_rows)
        text = metrics.text(rows_running=running, rows_waiting=worker.rows - running, up=int(worker.ended is None))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @app.get("/{file}", include_in_schema=False)
    async def page(file: str) -> Response:
        if file not in PAGE_FILES:
            raise HttpError(404, "no such path")
        return Response((WEB / file).read_bytes(), media_type=PAGE_FILES[file])

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return await page("index.html")

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        if not isinstance(error, HttpError):
            message = parse_failure(error.__cause__) or error.detail
            error = HttpError(error.status_code, message, headers=error.headers)
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def validation_error(_: Request, error: RequestValidationError) -> Response:
        return invalid_request(error.errors()).response()

    @app.exception_handler(Exception)
    async def server_error(_: Request, error: Exception) -> Response:
        return HttpError(500, f"{type(error).__name__} in the server", type="server_error").response()

    paths = {"/", *app.openapi()["paths"]}
    return Guard(app, metrics, api_key=api_key, hosts=None if api_key else LOOPBACK, paths=paths)


def parse_failure(cause: BaseException | None) -> str | None:
    """Why json.loads failed on a body, unless it was the syntax: FastAPI only says that parsing failed."""
    if isinstance(cause, UnicodeDecodeError):
        return f"the body is not UTF-8 text (byte {cause.start}), so not JSON"
    if isinstance(cause, RecursionError):
        return "the body is nested too deeply"
    if isinstance(cause, ValueError):
        return "the body contains a number with too many digits"
    return None


def invalid_request(errors: Sequence[dict[str, Any]]) -> HttpError:
    """The most helpful of pydantic's errors about a body, as one line that names the field."""
    # For a union each member type reports an error; the ones that only say "wrong type" help least.
    error = min(errors, key=lambda error: (error["loc"][:2] != errors[0]["loc"][:2], error["type"].endswith("_type")))
    path = [str(part) for part in error["loc"][1:] if str(part).isalnum() or "_" in str(part)]
    path = [part for part in path if part not in ("str", "int")]  # pydantic adds the member type of a union
    if error["type"] == "json_invalid":
        return HttpError(400, f"the body is not JSON: {error['ctx']['error']} at character {path[0]}")
    if not path:
        return HttpError(400, f"the body: {error['msg']} (expected a JSON object, sent as application/json)")
    if path[0] in schema.UNSUPPORTED:
        return HttpError(400, f"{path[0]}: not supported", param=path[0], code="unsupported_parameter")
    if error["type"] == "extra_forbidden":
        return HttpError(400, f"unknown field {'.'.join(path)}", param=path[0], code="unknown_parameter")
    return HttpError(400, f"{'.'.join(path)}: {error['msg']}", param=path[0])


def usage(generation: GenerationRequest, answer: AnswerStream) -> dict[str, int]:
    tokens = {"prompt_tokens": generation.prompt_tokens, "completion_tokens": answer.new_tokens}
    return {**tokens, "total_tokens": sum(tokens.values())}


async def _choices(chat: bool, generation: GenerationRequest, answer: AnswerStream) -> list[dict[str, Any]]:
    texts, reasons = [""] * len(generation.rows), [""] * len(generation.rows)
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
    head: dict[str, Any], chat: bool, generation: GenerationRequest, answer: AnswerStream, include_usage: bool
) -> AsyncIterator[str]:
    """An answer as server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

    def event(index: int, content: dict[str, Any], reason: str | None) -> str:
        choice = {"index": index, **content, "logprobs": None, "finish_reason": reason}
        return _event({**head, "choices": [choice], **({"usage": None} if include_usage else {})})

    try:
        if chat:
            for index in range(len(generation.rows)):
                yield event(index, {"delta": {"role": "assistant", "content": ""}}, None)
        async for index, text, reason in answer:
            if text or reason:
                yield event(index, {"delta": {"content": text} if text else {}} if chat else {"text": text}, reason)
        if include_usage:
            yield _event({**head, "choices": [], "usage": usage(generation, answer)})
        yield "data: [DONE]\n\n"
    except HttpError as error:
        yield f"data: {error.json}\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


# ---- clients that disconnect


class ClientDisconnected(Exception):
    """The client has closed the connection."""


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`, and cancels it if the client disconnects first. The request body must have been
    read.

    Raises:
        ClientDisconnected: the client disconnected.
    """

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    work_task, disconnect_task = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait({work_task, disconnect_task}, return_when=asyncio.FIRST_COMPLETED)
        if not work_task.done():
            raise ClientDisconnected
        return work_task.result()
    finally:
        work_task.cancel()
        disconnect_task.cancel()
        await asyncio.gather(work_task, disconnect_task, return_exceptions=True)


class EventStream(StreamingResponse):
    """Sends events until the client disconnects. `finish` is always called at the end, also after an error."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], finish: Callable[[], None]):
        super().__init__(events)
        self._finish = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientDisconnected):
                await unless_disconnected(receive, self.stream_response(send))
        finally:
            self._finish()
