"""Client of the engine for asyncio: the app's side. Loads no torch.

    async with EngineClient() as engine:
        async for reply in engine.ask(Generate(messages=messages, adapter_name="adapter")):
            ...
        tokens = await engine.ask(CountTokens(text="red")).result()

The child starts with the first request. It exits when its stdin closes, so it cannot outlive this process,
however this process ends.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, Self

import msgspec

from qlora_tui import worker
from qlora_tui.engine.protocol import (
    EngineRequest,
    Message,
    PartT,
    RequestEnvelope,
    ResultT,
    Stop,
    decode_reply,
    decode_value,
    encode,
    open_log,
    truncated_log,
)
from qlora_tui.errors import UserError
from qlora_tui.process_end import ended_early
from qlora_tui.remote.calls import current
from qlora_tui.worker import Failure, Progress, Result

_LONGEST_LINE_BYTES = 1 << 26
_SHUTDOWN_TIMEOUT_S = 3.0
"""Seconds within which a child must exit by itself."""
_KILLED_TIMEOUT_S = 0.5
"""Maximum seconds that :meth:`EngineClient.kill` waits for the killed child to exit. A GPU driver may need
longer to free the child's memory.
"""


class EngineClosedError(UserError):
    """The caller closed the engine before it replied. This is not a failure, and is not shown to the user."""

    def __init__(self) -> None:
        super().__init__(
            "The engine was closed",
            what="The engine was closed before it answered.",
            fix="Send the request again.",
        )


class EngineClient:
    """A client with one child process, which is started on demand and restarted after it was lost."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._listener: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._waiting: dict[int, asyncio.Queue[Message | UserError]] = {}
        self._number = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def pid(self) -> int | None:
        """PID of the child; None if there is none."""
        return self._process.pid if self._process and self._process.returncode is None else None

    def ask(self, request: EngineRequest[PartT, ResultT]) -> ReplyStream[PartT, ResultT]:
        """Return the replies to a request, which is sent when the first reply is awaited."""
        return ReplyStream(self, request)

    async def start(self) -> None:
        """Start the child now unless it is running, instead of with the first request. Raises UserError."""
        async with self._starting:
            if self.pid is None:
                await self._start()

    async def close(self) -> None:
        """Stop the child and free its resources. The next request starts another child."""
        # The next child starts after this one has ended, because its listener ends every request.
        async with self._starting:
            process, self._process = self._process, None
            if process is None:
                return
            if process.stdin is not None:
                process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), _SHUTDOWN_TIMEOUT_S)
            except TimeoutError:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
            if self._listener is not None:
                await self._listener
                self._listener = None

    async def kill(self) -> None:
        """Kill the child, which has nothing to save. Wait at most ``_KILLED_TIMEOUT_S`` for it to exit."""
        process, self._process = self._process, None
        if process is None or process.stdin is None or self._listener is None:
            return
        with suppress(ProcessLookupError):
            process.kill()
        process.stdin.close()
        with suppress(TimeoutError):
            # The listener ends once the pipes are closed.
            await asyncio.wait_for(self._listener, _KILLED_TIMEOUT_S)

    async def _start(self) -> None:
        link = current()
        try:
            with open_log() as log:
                self._process = await asyncio.create_subprocess_exec(
                    *(worker.module_argv("qlora_tui.engine") if link is None else link.engine_argv()),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    # Ctrl-C in the terminal is meant for the app, not for the engine.
                    start_new_session=True,
                    limit=_LONGEST_LINE_BYTES,
                    env=worker.subprocess_env(),
                )
        except OSError as error:
            raise UserError(
                "The engine could not be started",
                what=f"{sys.executable}: {error.strerror}.",
                fix="Run `qlora-tui doctor`.",
            ) from error
        self._listener = asyncio.create_task(self._listen(self._process))

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        link = current()
        async for line in process.stdout:
            try:
                line = line if link is None else bytes(link.here(line))
                envelope = decode_reply(line)
            except (msgspec.MsgspecError, ValueError):
                continue
            if (queue := self._waiting.get(envelope.number)) is not None:
                queue.put_nowait(envelope.reply)
        code = await process.wait()
        # ``close`` clears ``_process`` first.
        lost_there = None if link is None or link.is_connected else link.unreachable()
        lost = (lost_there or _lost_error(code)) if self._process is process else EngineClosedError()
        for queue in self._waiting.values():
            queue.put_nowait(lost)
        if self._process is process:
            self._process = None

    async def _send(self, request: Any) -> int:
        if (link := current()) is not None:
            await asyncio.to_thread(link.send_data, request)
        await self.start()
        self._number += 1
        number = self._number
        self._waiting[number] = asyncio.Queue()
        self._write(RequestEnvelope(number, request))
        return number

    def _write(self, envelope: RequestEnvelope) -> None:
        # _listen detects a child that has just ended, and reports it in more detail.
        if self._process is not None and self._process.stdin is not None:
            line, link = encode(envelope), current()
            self._process.stdin.write(line if link is None else bytes(link.there(line)) + b"\n")


class ReplyStream(AsyncIterator[Progress | PartT | ResultT], Generic[PartT, ResultT]):
    """Replies as they arrive: status lines and parts, then the result.

    A Failure and the loss of the engine are raised as UserError. If the waiting task is cancelled, the
    engine stops work on the request.
    """

    def __init__(self, client: EngineClient, request: EngineRequest[PartT, ResultT]) -> None:
        self._client = client
        self._request = request
        self._number: int | None = None
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Progress | PartT | ResultT:
        if self._over:
            raise StopAsyncIteration
        try:
            if self._number is None:
                self._number = await self._client._send(self._request)
            reply = await self._client._waiting[self._number].get()
        except BaseException:
            self.stop()
            self._end()
            raise
        if isinstance(reply, UserError | Failure | Result):
            self._end()
        if isinstance(reply, UserError):
            raise reply
        if isinstance(reply, Failure):
            raise reply.error()
        return reply if isinstance(reply, Progress) else decode_value(reply, self._request)

    async def result(self) -> ResultT:
        """Wait for the result and return it."""
        replies: list[Any] = [reply async for reply in self]
        result: ResultT = replies[-1]
        return result

    def stop(self) -> None:
        """Stop the request at once. What the engine has produced so far and the result still arrive."""
        if self._number is None:
            self._over = True
        elif not self._over:
            self._client._write(RequestEnvelope(0, Stop(request_number=self._number)))

    def close(self) -> None:
        """Stop the request, and drop the remaining replies."""
        self.stop()
        self._end()

    def _end(self) -> None:
        self._over = True
        if self._number is not None:
            self._client._waiting.pop(self._number, None)


def _lost_error(exit_code: int) -> UserError:
    subject = "The process that holds the model"
    return ended_early("The engine stopped unexpectedly", subject, exit_code, log=truncated_log())
