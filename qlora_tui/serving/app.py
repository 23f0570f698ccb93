"""The routes of the server: access checks, limits, and waiting clients."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlora_tui.chat.completion_types import Completion, CompletionPart, CompletionResult
from qlora_tui.engine.protocol import Decide
from qlora_tui.errors import INTERNAL_ERROR
from qlora_tui.formatting import name_some, truncate_middle
from qlora_tui.serving import replies
from qlora_tui.serving.errors import ApiError
from qlora_tui.serving.guest import Guest
from qlora_tui.serving.model_names import ServedModel, ServedModels
from qlora_tui.serving.requests import Body, ChatBody, CompletionBody, DecideBody, decode_body

MOST_BYTES = 10_000_000
"""Maximum size of a request body."""
MOST_ROWS = 32
"""Maximum number of answers that the engine computes at a time."""
MOST_OPEN = 96
"""Maximum number of requests in progress or waiting. Further requests are rejected."""
BODY_S = 60.0
"""Seconds within which a request body must arrive."""
ANSWER_S = 3600.0
"""Seconds within which an answer must be complete."""
_BUSY_RETRY_S = 5
_LONGEST_NAME = 80
"""Number of characters of an unknown model name that an error message repeats."""
_RATE_S = 10.0
"""Seconds over which tokens per second are averaged."""

T = TypeVar("T")
_Arrived: TypeAlias = tuple[replies.Choice, CompletionPart | CompletionResult]


class Figures:
    """Counts of the server's work, for its state file and ``/metrics``."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        """Answered requests by HTTP status."""
        self.open = 0
        """Number of requests in progress or waiting."""
        self.rows = 0
        """Number of answers that are being computed."""
        self.prompt_tokens = 0
        self.new_tokens = 0
        self.not_begun: set[object] = set()
        """Requests for which computation has not begun."""
        self._recent: deque[float] = deque()

    def count(self, part: CompletionPart | CompletionResult) -> None:
        """Count a part of an answer as one token, to measure the speed, or add the token counts of a
        finished answer. Parts of a prompt are ignored.
        """
        if isinstance(part, CompletionResult):
            self.prompt_tokens += part.prompt_tokens
            self.new_tokens += part.new_tokens
        elif not part.is_prompt:
            self._recent.append(time.monotonic())

    @property
    def tokens_per_s(self) -> float:
        """Return the approximate number of tokens generated per second over the last seconds."""
        while self._recent and self._recent[0] < time.monotonic() - _RATE_S:
            self._recent.popleft()
        return len(self._recent) / _RATE_S


class EventStream(StreamingResponse):
    """A response that streams events from an iterator. The iterator is closed in any case, even if the client
    disconnects.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        async with aclosing(self.body_iterator):  # type: ignore[type-var]  # it is a generator
            await super().__call__(scope, receive, send)


class Api:
    """Handlers of the routes."""

    def __init__(self, guest: Guest, figures: Figures) -> None:
        self.guest = guest
        self.figures = figures
        self._rows = asyncio.Semaphore(MOST_ROWS)

    async def models(self, request: Request) -> Response:
        """List the models, or return the model that the path names."""
        name = request.path_params.get("name")
        models = await self.guest.models_now()
        if name is None:
            return JSONResponse(
                {"object": "list", "data": [replies.model(each.name) for each in models.listed]}
            )
        if models.find(name) is None:
            raise _no_model(name, models)
        return JSONResponse(replies.model(name))

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._respond(request, ChatBody)

    async def complete(self, request: Request) -> Response:
        """Continue a text or token ids."""
        return await self._respond(request, CompletionBody)

    async def decide(self, request: Request) -> Response:
        """Decide between the labels on which a run was trained."""
        body = decode_body(await _read(request), DecideBody)
        messages = body.conversation
        with self._admitted() as admitted:
            model = await self._model(body.model)
            await self.guest.loaded()
            asked = Decide(messages=messages, adapter_name=model.adapter_name)
            async with self._row(admitted):
                decided = await _unless_gone(request, self.guest.decide(asked))
        return JSONResponse(replies.decision(body, decided))

    async def health(self, request: Request) -> Response:
        """Report that the server is running, and the state of the model."""
        return JSONResponse({"status": "ok", "model": self.guest.state})

    async def metrics(self, request: Request) -> Response:
        """Return the counts in Prometheus' text format, version 0.0.4."""
        figures = self.figures
        lines = ["# TYPE qlora_tui_requests_total counter"]
        lines += [
            f'qlora_tui_requests_total{{status="{s}"}} {n}' for s, n in sorted(figures.statuses.items())
        ]
        for name, kind, value in (
            ("prompt_tokens_total", "counter", figures.prompt_tokens),
            ("generated_tokens_total", "counter", figures.new_tokens),
            ("generated_tokens_per_second", "gauge", figures.tokens_per_s),
            ("answers_in_progress", "gauge", figures.rows),
            ("requests_waiting", "gauge", len(figures.not_begun)),
            ("model_loaded", "gauge", int(self.guest.state == "ready")),
        ):
            lines += [f"# TYPE qlora_tui_{name} {kind}", f"qlora_tui_{name} {value}"]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def _respond(self, request: Request, kind: type[Body]) -> Response:
        body = decode_body(await _read(request), kind)
        if not body.stream:
            return JSONResponse(await _unless_gone(request, self._whole(body)))
        events = self._events(body)
        # Until the first event is sent, an error can still set the HTTP status.
        first = await _unless_gone(request, anext(events))
        return EventStream(_chained(first, events), media_type="text/event-stream")

    async def _whole(self, body: Body) -> replies.Json:
        choices: list[replies.Choice] = []
        async with aclosing(self._shown(body, choices)) as shown:
            async for _ in shown:
                pass
        return replies.whole(body, choices)

    async def _events(self, body: Body) -> AsyncGenerator[bytes]:
        choices: list[replies.Choice] = []
        answer_id, has_begun = replies.new_id(body), False
        try:
            async with aclosing(self._shown(body, choices)) as shown:
                async for each in shown:
                    has_begun = True
                    yield replies.event(replies.chunk(body, answer_id, [each]))
        except ApiError as error:
            if not has_begun:
                raise
            yield replies.event(error.body())
            return
        if replies.includes_usage(body):
            yield replies.event(replies.chunk(body, answer_id, [], replies.usage(body, choices)))
        yield replies.DONE

    async def _shown(self, body: Body, choices: list[replies.Choice]) -> AsyncGenerator[replies.Json]:
        """Compute all answers to a request, and yield the objects to stream, if the answers are streamed.

        A choice for each answer is appended to ``choices`` before its computation. Raises ApiError.
        """
        with self._admitted() as admitted:
            model = await self._model(body.model)
            ready = await self.guest.loaded()
            completions = body.completions(model, ready.context_tokens)
            choices += [replies.Choice(index, body) for index in range(len(completions))]
            arrived: asyncio.Queue[_Arrived | Exception] = asyncio.Queue()
            tasks = [
                asyncio.create_task(self._compute(admitted, choice, completion, arrived))
                for choice, completion in zip(choices, completions, strict=True)
            ]
            try:
                unfinished = len(tasks)
                while unfinished:
                    reply = await arrived.get()
                    if isinstance(reply, Exception):
                        raise reply
                    choice, part = reply
                    unfinished -= isinstance(part, CompletionResult)
                    for each in choice.take(part):
                        yield each
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _compute(
        self,
        admitted: object,
        choice: replies.Choice,
        completion: Completion,
        arrived: asyncio.Queue[_Arrived | Exception],
    ) -> None:
        """Put the parts and the result of one answer into the queue, or the exception that ended it."""
        try:
            parts = self.guest.complete(completion)
            async with self._row(admitted), asyncio.timeout(ANSWER_S), aclosing(parts):
                async for part in parts:
                    self.figures.count(part)
                    arrived.put_nowait((choice, part))
        except TimeoutError:
            arrived.put_nowait(
                ApiError(504, f"The answer took longer than {ANSWER_S:,.0f} s.", code="timeout")
            )
        except Exception as error:
            arrived.put_nowait(error)

    @asynccontextmanager
    async def _row(self, admitted: object) -> AsyncGenerator[None]:
        """Wait until the engine may compute another answer, and count that answer inside the block."""
        async with self._rows:
            self.figures.not_begun.discard(admitted)
            self.figures.rows += 1
            try:
                yield
            finally:
                self.figures.rows -= 1

    @contextmanager
    def _admitted(self) -> Iterator[object]:
        """Count the request as open while the block runs, and yield a token that identifies it. Raises
        ApiError if too many requests are open.
        """
        if self.figures.open >= MOST_OPEN:
            raise ApiError(
                429,
                f"Too many requests: {self.figures.open} are already open.",
                code="too_many_requests",
                retry_after_s=_BUSY_RETRY_S,
            )
        self.figures.open += 1
        admitted = object()
        self.figures.not_begun.add(admitted)
        try:
            yield admitted
        finally:
            self.figures.not_begun.discard(admitted)
            self.figures.open -= 1

    async def _model(self, name: str) -> ServedModel:
        """Return the model with this name. Raises ApiError."""
        models = await self.guest.models_now()
        model = models.find(name)
        if model is None:
            raise _no_model(name, models)
        return model


def _no_model(name: str, models: ServedModels) -> ApiError:
    names = name_some([each.name for each in models.listed])
    asked = truncate_middle(name, _LONGEST_NAME)
    what = f"The model '{asked}' does not exist. This server has {names}."
    return ApiError(404, what, param="model", code="model_not_found")


class Guard:
    """Rejects requests from foreign web pages or without the key, before their bodies are read."""

    def __init__(self, app: ASGIApp, *, api_key: str, hosts: Sequence[str], figures: Figures) -> None:
        """Protect ``app``. ``hosts`` are the names by which clients may call it; empty allows any."""
        self._app = app
        self._api_key = api_key
        self._hosts = frozenset(hosts)
        self._figures = figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._figures.statuses[message["status"]] += 1
            await send(message)

        try:
            self._check(Headers(scope=scope), scope["path"])
        except ApiError as error:
            await _error_response(error)(scope, receive, counting)
            return
        await self._app(scope, receive, counting)

    def _check(self, headers: Headers, path: str) -> None:
        """Raise ApiError if a request must be rejected."""
        # A web page whose host name resolves to this machine sends its own name as the host.
        host = _host_name(f"//{headers.get('host', '')}")
        if self._hosts and host not in self._hosts:
            raise ApiError(403, f"This server does not answer to the name '{host}'.", code="wrong_host")
        origin = headers.get("origin")
        # Compare the port as well: another program on this machine may have its own web pages.
        if origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower():
            what = "Web pages from other sites are not allowed to use this server."
            raise ApiError(403, what, code="wrong_origin")
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_bearer = scheme.lower() == "bearer"
        if (
            self._api_key
            and path != "/health"
            and not (is_bearer and hmac.compare_digest(given.strip().encode(), self._api_key.encode()))
        ):
            raise ApiError(
                401,
                "Wrong or missing API key: send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
            )


def make_app(guest: Guest, figures: Figures, *, api_key: str = "", hosts: Sequence[str] = ()) -> Starlette:
    """Return the application.

    Args:
        guest: The engine that answers.
        figures: Receives counts of requests and tokens.
        api_key: Key that clients must send; empty if none is required.
        hosts: Names by which clients may call this server; empty allows any name.
    """
    api = Api(guest, figures)
    return Starlette(
        routes=[
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.models),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.complete, methods=["POST"]),
            Route("/v1/decide", api.decide, methods=["POST"]),
            Route("/health", api.health),
            Route("/metrics", api.metrics),
        ],
        middleware=[Middleware(Guard, api_key=api_key, hosts=hosts, figures=figures)],
        exception_handlers={
            ApiError: _on_error,
            HTTPException: _on_error,
            ClientDisconnect: _on_client_gone,
            Exception: _on_error,
        },
    )


async def _on_client_gone(request: Request, error: Exception) -> Response:
    # The client is gone, so nobody reads this; it is counted under the status that nginx uses.
    return Response(status_code=499)


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        what = f"{request.method} {request.url.path}: {error.detail}."
        return _error_response(ApiError(error.status_code, what), error.headers)
    if not isinstance(error, ApiError):
        # Starlette logs the traceback.
        error = ApiError(500, f"{INTERNAL_ERROR}: {type(error).__name__}.", code="internal_error")
    return _error_response(error)


def _error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(error.body(), error.status, {**error.headers, **(headers or {})})


def _host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


async def _read(request: Request) -> bytes:
    """Return the body of a request. Raises ApiError."""
    too_long = ApiError(413, f"The body is larger than {MOST_BYTES // 1_000_000} MB.", code="body_too_long")
    if int(request.headers.get("content-length", 0)) > MOST_BYTES:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in request.stream():
                body += piece
                if len(body) > MOST_BYTES:
                    raise too_long
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {BODY_S:.0f} s.", code="timeout") from None
    return bytes(body)


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """Await an answer, and cancel it if the client disconnects. Raises ClientDisconnect in that case."""
    answering = asyncio.create_task(answer)
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientDisconnect
        return answering.result()
    finally:
        answering.cancel()
        leaving.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chained(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(rest):
        yield first
        async for each in rest:
            yield each
