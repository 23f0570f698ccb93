"""The engine in memory: loaded on demand, unloaded when idle, and unloaded for each run on its device.

The engine's process is ended instead of being told to unload, because its CUDA context takes GPU memory too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

from qlora_tui.chat.chat_types import Decided
from qlora_tui.chat.completion_types import Completion, CompletionPart, CompletionResult
from qlora_tui.engine.client import EngineClient, EngineClosedError, ReplyStream
from qlora_tui.engine.protocol import ChatReady, Complete, Decide, LoadChat, OfferAdapters
from qlora_tui.errors import UserError
from qlora_tui.runs.devices import own_device, run_on
from qlora_tui.serving.errors import RETRY_AFTER_S, ApiError, of_user_error
from qlora_tui.serving.model_names import RunsToServe, ServedModels, check_aliases, served_models
from qlora_tui.worker import Progress

POLL_S = 0.5
"""Seconds between two checks of the queue. A trainer takes longer than this to start."""

GuestState: TypeAlias = Literal["unloaded", "loading", "ready", "yielded", "failed"]
"""State of the model. ``yielded``: a run uses the GPU. ``failed``: the next request tries again."""


class Guest:
    """The one engine of a server. It gives up its device whenever a training run claims the device."""

    def __init__(
        self, runs: RunsToServe, aliases: Mapping[str, str] | None = None, idle_unload_s: float | None = None
    ) -> None:
        """Look up the models to serve. Raises UserError if an alias names no model, or is a model's name.

        ``idle_unload_s``: seconds without a request after which the model is unloaded; None keeps it loaded.
        """
        self._runs = runs
        self._aliases = aliases or {}
        self._idle_unload_s = idle_unload_s
        self._device = own_device()
        self._stamp = runs.stamp()
        check_aliases(served_models(runs), self._aliases)
        self.models = served_models(runs, aliases)
        """The models as of the last request for them."""
        self._offered: Mapping[str, str] = {}
        """Adapters that the engine knows."""
        self.ready: ChatReady | None = None
        self.state: GuestState = "unloaded"
        self.detail = ""
        """What the server waits for, or why the engine failed, in a sentence."""
        self._engine = EngineClient()
        self._loading: asyncio.Task[ChatReady] | None = None
        self._in_use = 0
        self._used_at = time.monotonic()

    async def close(self) -> None:
        """End the engine."""
        await self._engine.kill()

    async def watch(self) -> None:
        """Load the model unless a run uses the device. Then, until cancelled, unload it when it is idle or
        while a run uses the device, and load it again after a run.
        """
        if not await asyncio.to_thread(run_on, self._device.key):
            self._start_loading()
        while True:
            run = await asyncio.to_thread(run_on, self._device.key)
            if run:
                detail = (
                    f"{run} needs the memory of {self._device}. After the run, the model is loaded again."
                )
                if not self._is_yielded:
                    await self._unload("yielded", detail)
                self.detail = detail
            elif self._is_yielded:
                self.state, self.detail = "unloaded", ""
                self._start_loading()
            elif self._is_idle:
                await self._unload("unloaded")
            await asyncio.sleep(POLL_S)

    async def models_now(self) -> ServedModels:
        """Return the models, including recently trained ones and excluding deleted ones. Raises ApiError."""
        try:
            return await asyncio.to_thread(self._read_models)
        except UserError as problem:
            raise of_user_error(problem, is_lost=False) from problem

    def _read_models(self) -> ServedModels:
        stamp = self._runs.stamp()
        if stamp != self._stamp:
            self.models, self._stamp = served_models(self._runs, self._aliases), stamp
        return self.models

    async def loaded(self) -> ChatReady:
        """Return the model with all current adapters, after loading it if necessary.

        Raises ApiError with status 503 while a run uses the GPU.
        """
        self._used_at = time.monotonic()
        if self._is_yielded:
            raise self._unavailable()
        if self.ready is not None and self._engine.pid is not None:
            adapters = self.models.source.adapters
            if self._offered != adapters:
                with self._using(request := self._engine.ask(OfferAdapters(adapters=adapters))):
                    await request.result()
                self._offered = adapters
            return self.ready
        try:
            # A client that disconnects does not cancel loading, because other clients wait for it too.
            return await asyncio.shield(self._start_loading())
        except EngineClosedError:
            raise self._unavailable() from None
        except UserError as problem:
            raise of_user_error(problem, is_lost=True) from problem

    def _start_loading(self) -> asyncio.Task[ChatReady]:
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(self._load())
            # Nobody may be awaiting the task, so retrieve its exception; ``state`` records the outcome.
            self._loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._loading

    async def _load(self) -> ChatReady:
        """Load the model. Raises UserError."""
        self.state, self.ready = "loading", None
        try:
            await asyncio.to_thread(self._read_models)
            if self._is_yielded:
                # A run began in the meantime, before there was a process to end.
                raise EngineClosedError
            self._offered = self.models.source.adapters
            async for reply in self._engine.ask(LoadChat(source=self.models.source)):
                if isinstance(reply, Progress):
                    self.detail = reply.text
                else:
                    self.ready = reply
        except EngineClosedError:
            raise
        except UserError as problem:
            self._fail(problem)
            raise
        assert self.ready is not None
        self.state, self.detail = "ready", ""
        return self.ready

    async def complete(self, completion: Completion) -> AsyncGenerator[CompletionPart | CompletionResult]:
        """Yield the parts of a completion, then its result. Closing the iterator stops the completion."""
        request = self._engine.ask(Complete(completion=completion))
        with self._using(request):
            async for reply in request:
                if not isinstance(reply, Progress):
                    yield reply

    async def decide(self, decide: Decide) -> Decided:
        """Return a decision. Raises ApiError."""
        request = self._engine.ask(decide)
        with self._using(request):
            return await request.result()

    @contextmanager
    def _using(self, request: ReplyStream[Any, Any]) -> Iterator[None]:
        """Keep the model loaded inside the block, and convert errors of the engine to errors of the API."""
        self._in_use += 1
        try:
            yield
        except EngineClosedError:
            raise self._unavailable() from None
        except UserError as problem:
            if is_lost := self._engine.pid is None:
                self._fail(problem)
            raise of_user_error(problem, is_lost=is_lost) from problem
        finally:
            request.close()
            self._in_use -= 1
            self._used_at = time.monotonic()

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine that holds the model; None if there is none."""
        return self._engine.pid

    def _fail(self, problem: UserError) -> None:
        self.state, self.ready = "failed", None
        self.detail = " ".join(str(problem).split())

    @property
    def _is_yielded(self) -> bool:
        return self.state == "yielded"

    @property
    def _is_idle(self) -> bool:
        return (
            self._idle_unload_s is not None
            and self.state == "ready"
            and not self._in_use
            and time.monotonic() - self._used_at > self._idle_unload_s
        )

    async def _unload(self, state: GuestState, detail: str = "") -> None:
        """End the engine. Requests in progress fail with the message ``detail``."""
        self.state, self.ready, self.detail = state, None, detail
        await self._engine.kill()

    def _unavailable(self) -> ApiError:
        why = self.detail or "The model was unloaded."
        return ApiError(503, why, code="gpu_in_use", retry_after_s=RETRY_AFTER_S)
