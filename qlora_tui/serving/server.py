"""The process of a server: its socket, its API key, and its state file."""

from __future__ import annotations

import asyncio
import errno
import secrets
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from ipaddress import ip_address

import h11
import msgspec
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from qlora_tui.errors import UsageError, disk_problems
from qlora_tui.files import atomic_write
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.servers import LOOPBACK, ServerStatus, key_path, server_on, state_path
from qlora_tui.serving.app import Figures, make_app
from qlora_tui.serving.guest import Guest
from qlora_tui.serving.model_names import RunsToServe

REQUEST_S = 5.0
"""Seconds for which a connection may stay open without a request."""
_STATE_S = 1.0
_ANY_HOST = ("0.0.0.0", "::")


class Server:
    """A server with a listening socket; ``run`` answers requests until a signal arrives."""

    def __init__(
        self,
        runs: RunsToServe,
        *,
        host: str = LOOPBACK,
        port: int = 8000,
        api_key: str = "",
        aliases: Mapping[str, str] | None = None,
        idle_unload_s: float | None = None,
    ) -> None:
        """Open the socket, and write the API key and the state file. Raises UserError."""
        self._guest = Guest(runs, aliases, idle_unload_s)
        self._figures = Figures()
        self._socket = _open_socket(host, port)
        self.host, self.port = host, int(self._socket.getsockname()[1])
        self.api_key = api_key or ("" if is_loopback(host) else secrets.token_urlsafe(32))
        with disk_problems():
            key_path(self.port).unlink(missing_ok=True)
            if self.api_key:
                atomic_write(key_path(self.port), self.api_key)
            self._write(self.status)

    @property
    def address(self) -> str:
        """Base URL for clients on this machine, such as ``http://127.0.0.1:8000/v1``."""
        host = LOOPBACK if self.host in _ANY_HOST else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"

    def run(self, on_change: Callable[[ServerStatus], None] = lambda status: None) -> None:
        """Answer requests until SIGINT or SIGTERM. ``on_change`` gets each new state of the model."""
        try:
            asyncio.run(self._run(on_change))
        finally:
            self.close()

    def close(self) -> None:
        """Close the socket, and delete the state file and the key."""
        self._socket.close()
        with suppress(OSError):
            state_path(self.port).unlink(missing_ok=True)
            key_path(self.port).unlink(missing_ok=True)

    async def _run(self, on_change: Callable[[ServerStatus], None]) -> None:
        # A loopback server that is called by another name is called by a web page (DNS rebinding).
        hosts = ("localhost", LOOPBACK, "::1", self.host) if is_loopback(self.host) else ()
        app = make_app(self._guest, self._figures, api_key=self.api_key, hosts=hosts)
        server = _Uvicorn(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=TimedConnection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=512,
                timeout_graceful_shutdown=2,
            )
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.handle_exit, number, None)
        tasks = [
            asyncio.create_task(self._guest.watch()),
            asyncio.create_task(self._report(on_change)),
        ]
        try:
            await server.serve(sockets=[self._socket])
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            await self._guest.close()
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _report(self, on_change: Callable[[ServerStatus], None]) -> None:
        """Check the state once a second. Write the state file if anything in it has changed, and call
        ``on_change`` if the state of the model or its description has changed.
        """
        shown: ServerStatus | None = None
        while True:
            status = self.status
            if status != shown:
                with suppress(OSError):
                    self._write(status)
            if shown is None or (status.state, status.detail) != (shown.state, shown.detail):
                on_change(status)
            shown = status
            await asyncio.sleep(_STATE_S)

    def _write(self, status: ServerStatus) -> None:
        atomic_write(state_path(self.port), msgspec.json.encode(status))

    @property
    def status(self) -> ServerStatus:
        """Current state of the server."""
        guest, figures = self._guest, self._figures
        return ServerStatus(
            process=process_identity(),
            address=self.address,
            port=self.port,
            base=guest.models.source.recipe.model.id,
            models=tuple(model.name for model in guest.models.listed),
            state=guest.state,
            detail=guest.detail,
            engine_pid=guest.engine_pid or 0,
            memory_bytes=guest.ready.memory_bytes if guest.ready else 0,
            is_local=is_loopback(self.host),
            key_file=str(key_path(self.port)) if self.api_key else "",
            requests=figures.statuses.total(),
            refused=sum(count for status, count in figures.statuses.items() if status >= 400),
            answering=figures.rows,
            waiting=len(figures.not_begun),
            tokens_per_s=round(figures.tokens_per_s, 1),
            prompt_tokens=figures.prompt_tokens,
            new_tokens=figures.new_tokens,
        )


class TimedConnection(H11Protocol):
    """A connection that is closed if it stays open without a request. Otherwise, clients without an API key
    could hold connections open.
    """

    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn
        """Start the timeout of the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Process received data. The timeout continues while the head of a request is incomplete."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Start the timeout for the next request, or for the rest of a request body that nobody reads."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timeout."""
        super().connection_lost(exc)
        self._stop_clock()

    def _watch(self) -> None:
        is_answered = self.cycle is None or self.cycle.response_complete
        if not is_answered or self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_clock()
        elif self._clock is None:
            self._clock = self.loop.call_later(REQUEST_S, self.transport.close)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None


class _Uvicorn(uvicorn.Server):
    """A uvicorn server that does not raise the signal again, so that state file and key are deleted."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signal handlers to the caller."""
        yield


def is_loopback(host: str) -> bool:
    """Return whether only programs on this machine can reach a server that listens on ``host``."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _open_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UserError, which names the server that already uses the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            other = server_on(port)
            who = f"A server for {other.base} (PID {other.process.pid})" if other else "Another program"
            stop = f"stop it with `qlora-tui serve --stop --port {port}`, or " if other else ""
            fix = f"choose another port: `--port {port + 1}`."
            raise UsageError(
                "The port is in use",
                what=f"{who} is listening on port {port}.",
                fix=(stop + fix)[:1].upper() + (stop + fix)[1:],
            ) from error
        raise UsageError(
            "The address cannot be used",
            what=f"{host} port {port}: {error.strerror or error}.",
            fix="Use an address of this machine, and a port above 1023.",
        ) from error
