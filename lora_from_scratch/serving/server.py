"""The HTTP server: many adapters behind an API that is compatible with OpenAI's clients.

POST /v1/completions            `model` is the name of an adapter or of the base; `stream` sends server-sent events
GET  /v1/models                 the base and all adapters
POST /v1/load_lora_adapter      {"lora_name": ..., "lora_path": ...}, as in vLLM; only if updates are allowed
POST /v1/unload_lora_adapter    {"lora_name": ...}; only if updates are allowed
GET  /health, /metrics          for monitoring
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lora_from_scratch.models.checkpoint import AnyTokenizer
from lora_from_scratch.serving.adapter_store import UnknownAdapter
from lora_from_scratch.serving.engine import Engine, QueueFull
from lora_from_scratch.serving.metrics import Metrics
from lora_from_scratch.serving.protocol import (
    Answer,
    ApiError,
    Completion,
    parse_completion,
    parse_json,
    server_sent_event,
    usage,
)
from lora_from_scratch.serving.scheduler import Request, Scheduler
from lora_from_scratch.serving.text_stream import TextStream

MOST_BYTES = 2**20  # the maximum size of a request body
Pieces = AsyncGenerator[tuple[int, str, str | None], None]  # the index of a choice, a piece of text, the finish reason
FAILURE = "the server has failed; its log says why"


@dataclass
class _Job:
    """A completion in progress."""

    completion: Completion
    requests: list[Request]
    texts: list[TextStream]
    answer: Answer

    def usage(self) -> dict[str, int]:
        return usage(sum(len(r.prompt) for r in self.requests), sum(len(r.tokens) for r in self.requests))


class Server:
    """The ASGI application, in `app`.

    Args:
        scheduler: runs the model and holds the adapters.
        tokenizer: the model's tokenizer.
        base: the name of the base model.
        max_waiting: the maximum number of waiting requests; further ones are answered with status 429.
        allow_updates: whether clients may add and remove adapters.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: AnyTokenizer,
        base: str,
        *,
        max_waiting: int = 256,
        allow_updates: bool = False,
    ) -> None:
        self.scheduler, self.store, self.tokenizer, self.base = scheduler, scheduler.store, tokenizer, base
        self.engine = Engine(scheduler, max_waiting)
        self.metrics = Metrics(self.engine)
        routes = [
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]
        if allow_updates:
            routes.append(Route("/v1/load_lora_adapter", self.load, methods=["POST"]))
            routes.append(Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]))
        handlers: dict[Any, Callable[[HttpRequest, Any], Awaitable[Response]]] = {
            ApiError: self._refuse,
            HTTPException: self._refuse_http,
            Exception: self._fail,
        }
        self.app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.engine.start()
        try:
            yield
        finally:
            await run_in_threadpool(self.engine.stop)

    # --- Completions ---

    async def completions(self, http: HttpRequest) -> Response:
        completion = parse_completion(parse_json(await _body(http)))
        job = self._job(completion)
        events = self._events(job)
        try:  # an error before the first event still determines the status code
            first = await _unless_gone(http, anext(events))
        except BaseException:
            await events.aclose()
            raise
        if completion.stream:
            stream = self._stream(job, first, events)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return await self._whole(http, job, first, events)

    def _job(self, completion: Completion) -> _Job:
        """Find the adapter of a completion and encode its prompts.

        Raises:
            ApiError: there is no such model, or a prompt is not valid text.
        """
        adapter = None
        if completion.model != self.base:
            try:
                adapter = self.store.find(completion.model)
            except UnknownAdapter:
                text = f"the model {completion.model!r} does not exist: neither the base {self.base!r} nor an adapter"
                raise ApiError(404, text, param="model", code="model_not_found") from None
        stop = frozenset({self.tokenizer.eos_id})
        requests = []
        for number, prompt in enumerate(completion.prompts):
            sampling = completion.sampling.for_prompt(number)
            tokens = prompt if isinstance(prompt, list) else self._encode(prompt)
            requests.append(Request(tokens, completion.max_tokens, adapter, sampling, stop))
        texts = [TextStream(self.tokenizer, completion.stop) for _ in requests]
        return _Job(completion, requests, texts, Answer(completion.model))

    def _encode(self, prompt: str) -> list[int]:
        try:
            return self.tokenizer.encode(prompt) or [self.tokenizer.eos_id]
        except ValueError:
            raise ApiError(
                400, "the prompt is not valid text: it has half of a surrogate pair", param="prompt"
            ) from None

    async def _events(self, job: _Job) -> Pieces:
        """Yield (index of the choice, new piece of text, finish reason or None).

        Raises:
            ApiError: the request cannot be run.
        """
        numbers = {request: number for number, request in enumerate(job.requests)}
        left = set(job.requests)
        self.metrics.started(job.requests)
        try:
            async with contextlib.aclosing(self.engine.run(job.requests)) as events:
                async for event in events:
                    if event.finished == "error":
                        raise ApiError(400, f"{job.completion.model}: {event.error}", param="model")
                    if event.finished == "failure":
                        raise ApiError(500, FAILURE)
                    number, finished = numbers[event.request], event.finished
                    text = job.texts[number]
                    piece = "" if event.token is None else text.add(event.token)
                    self.metrics.took(event)
                    if event.request not in left:
                        continue
                    if finished:
                        piece += text.finish()
                    if text.stopped:
                        finished = "stop"
                    if finished:
                        left.discard(event.request)
                    if piece or finished:
                        yield number, piece, finished
                    if not left:
                        return
        except QueueFull:
            raise ApiError(
                429, "the server is busy: too many requests are waiting; try again later", code="busy"
            ) from None
        except ValueError as error:
            raise ApiError(400, str(error), param="prompt") from None
        finally:
            self.metrics.ended(job.requests)

    async def _whole(
        self,
        http: HttpRequest,
        job: _Job,
        first: tuple[int, str, str | None],
        events: Pieces,
    ) -> Response:
        texts, reasons = [""] * len(job.requests), ["length"] * len(job.requests)

        async def collect() -> None:
            texts[first[0]] += first[1]
            reasons[first[0]] = first[2] or reasons[first[0]]
            async for number, piece, finished in events:
                texts[number] += piece
                reasons[number] = finished or reasons[number]

        async with contextlib.aclosing(events):
            await _unless_gone(http, collect())
        choices = [job.answer.choice(*parts) for parts in zip(range(len(texts)), texts, reasons, strict=True)]
        return JSONResponse(job.answer.whole(choices, job.usage()))

    async def _stream(self, job: _Job, first: tuple[int, str, str | None], events: Pieces) -> AsyncIterator[str]:
        async with contextlib.aclosing(events):
            yield server_sent_event(job.answer.whole([job.answer.choice(*first)]))
            try:
                async for event in events:
                    yield server_sent_event(job.answer.whole([job.answer.choice(*event)]))
                if job.completion.include_usage:
                    yield server_sent_event(job.answer.whole([], job.usage()))
            except ApiError as error:  # the status code has already been sent
                yield server_sent_event(error.body)
            yield server_sent_event("[DONE]")

    # --- Adapters ---

    async def models(self, http: HttpRequest) -> Response:
        names = await run_in_threadpool(self.store.names)
        return JSONResponse({"object": "list", "data": [self._model(name) for name in (self.base, *names)]})

    async def one_model(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        if name != self.base:
            try:
                self.store.find(name)
            except UnknownAdapter as error:
                raise ApiError(404, str(error), param="model", code="model_not_found") from None
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        parent = None if name == self.base else self.base
        return {"id": name, "object": "model", "created": 0, "owned_by": "lora-from-scratch", "parent": parent}

    async def load(self, http: HttpRequest) -> Response:
        name, path = _strings(parse_json(await _body(http)), "lora_name", "lora_path")
        if name == self.base:
            raise ApiError(400, f"{name!r} is the base model", param="lora_name")
        try:
            await run_in_threadpool(self.store.add, name, path)
        except (ValueError, OSError) as error:
            raise ApiError(400, f"{name}: {error}", param="lora_path") from None
        return JSONResponse({"status": "ok", "name": name})

    async def unload(self, http: HttpRequest) -> Response:
        (name,) = _strings(parse_json(await _body(http)), "lora_name")
        try:
            self.store.remove(name)
        except UnknownAdapter as error:
            raise ApiError(404, str(error), param="lora_name", code="model_not_found") from None
        return JSONResponse({"status": "ok", "name": name})

    # --- Monitoring ---

    async def health(self, http: HttpRequest) -> Response:
        if not self.engine.is_alive:
            raise ApiError(503, "the engine has stopped")
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, http: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type=self.metrics.media_type)

    async def _refuse(self, http: HttpRequest, error: ApiError) -> Response:
        self.metrics.refused(error.status)
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body, error.status, headers)

    async def _refuse_http(self, http: HttpRequest, error: HTTPException) -> Response:
        text = f"{http.method} {http.url.path}: {error.detail}"
        return await self._refuse(http, ApiError(error.status_code, text))

    async def _fail(self, http: HttpRequest, error: Exception) -> Response:
        return await self._refuse(http, ApiError(500, FAILURE))


async def _unless_gone(http: HttpRequest, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled if the client disconnects first."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    async def result() -> Any:
        return await work

    tasks = [asyncio.ensure_future(result()), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ApiError(499, "the client has gone away")  # this response is not delivered
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _body(http: HttpRequest) -> bytes:
    """The body of a request, which must not exceed `MOST_BYTES`."""
    body = b""
    async for chunk in http.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise ApiError(413, f"the body must have at most {MOST_BYTES} bytes")
    return body


def _strings(body: dict[str, Any], *names: str) -> list[str]:
    for name in names:
        if not isinstance(body.get(name), str):
            raise ApiError(400, f"{name} must be a string", param=name)
    return [body[name] for name in names]
