"""Bounds the work that untrusted input can cause, by child processes that are killed at their limits.

A chat template is a third party's program, a table is a memory image whose lengths may be forged, and a
tokenizer is run by a library without limits. Each call to a ``Confined`` child has a limit of processor time,
which the kernel counts, and of memory. ``chat_template`` renders in one child, ``arrow_rows`` reads tables in
another, and ``dataset_scan`` processes rows in several, which render templates themselves; each module sets
its own limits. Children need no cleanup: a child ends after a while without calls, and when its parent ends
for any reason.
"""

from __future__ import annotations

import atexit
import importlib
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qlora_tui.errors import UserError
from qlora_tui.process_end import how_ended

if TYPE_CHECKING:
    import subprocess
    from multiprocessing.connection import Connection

T = TypeVar("T")
TIME_SIGNAL = signal.SIGPROF
"""Signal with which the kernel ends a child whose call takes too long. No other code sends this signal."""
_IDLE_S = 30.0
"""Seconds without a call after which a child ends, because it occupies memory."""
_STATUS = Path("/proc/self/status")
_in_child = False
"""Whether this process is a child, in which calls run directly."""
_iterators: dict[int, Iterator[Any]] = {}
"""In a child: the iterators that ``Confined.iterate`` reads, keyed by number."""


class KilledError(Exception):
    """Raised if the child was ended in the middle of a call."""

    def __init__(self, exit_code: int):
        timed_out = exit_code == -TIME_SIGNAL
        super().__init__(
            "it takes too much processor time" if timed_out else f"its process {how_ended(exit_code)}"
        )
        self.exit_code = exit_code
        self.timed_out = timed_out
        """Whether the call exceeded the limit of processor time."""


class Confined:
    """A child process for one kind of work.

    The first call starts the child, and so does the first call after the child has ended.
    """

    def __init__(
        self,
        module: str,
        *,
        cpu_s: float,
        memory_bytes: int,
        prepare: Callable[[], None] | None = None,
    ):
        """Set the limits, without starting the child.

        Args:
            module: imported by the child before its memory is limited.
            cpu_s: maximum processor time of one call, in seconds.
            memory_bytes: maximum memory in addition to that of a child at its start.
            prepare: called in each child at its start, without limits; it is pickled.
        """
        self.cpu_s = cpu_s
        self.memory_bytes = memory_bytes
        self._module = module
        self._prepare = prepare
        self._lock = threading.RLock()
        self._numbers = count()
        self._connection: Connection | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        """PID of the process that started the child. A forked process starts its own child."""

    @property
    def pid(self) -> int | None:
        """Return the PID of the child; None if there is no child."""
        return self._child.pid if self._child is not None else None

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call ``function``, which must be at the top level of a module, in the child; return its result.

        Raises the exceptions of the function, ``MemoryError`` above the memory limit, and ``KilledError`` if
        the child ends.
        """
        if _in_child:
            return function(*arguments)
        with self._lock:
            try:
                done, value = self._reply(function, arguments)
            except KilledError as killed:
                if killed.exit_code:
                    raise
                done, value = self._reply(function, arguments)  # it had ended without calls
        if not done:
            raise value
        result: T = value
        return result

    def _reply(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        """Call the function; return (True, result) or (False, exception)."""
        connection = self._connected()
        try:
            connection.send((function, arguments))
            reply: tuple[bool, Any] = connection.recv()
        except (EOFError, OSError):
            killed = KilledError(self._child.wait() if self._child is not None else -signal.SIGKILL)
            self.close()
            raise killed from None
        except BaseException:
            self.close()  # a late reply would be taken for the reply to the next call
            raise
        return reply

    def iterate(self, function: Callable[..., Iterator[T]], *arguments: Any) -> Iterator[T]:
        """Run ``function`` in the child and yield the items of its iterator; each item is one call."""
        if _in_child:
            yield from function(*arguments)
            return
        number = next(self._numbers)
        self.call(_begin, number, function, arguments)
        child = self._child
        try:
            while True:
                if self._child is not child:
                    raise KilledError(-signal.SIGKILL)
                if not (item := self.call(_advance, number)):
                    return
                yield item[0]
        finally:
            if self._child is child and child is not None:
                with suppress(KilledError):
                    self.call(_end, number)

    def start(self) -> None:
        """Start the child, and wait until it is ready. Raises ``KilledError``."""
        self.call(_nothing)

    def close(self) -> None:
        """End the child, even in the middle of another thread's call."""
        child = self._child
        if child is not None and self._owner == os.getpid():
            child.kill()
            child.wait()
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = self._child = None

    def _connected(self) -> Connection:
        if self._connection is None or self._owner != os.getpid():
            try:
                self._connection = self._start()
            except OSError as error:
                raise UserError(
                    "A process could not be started",
                    what=f"{sys.executable}: {error.strerror or error}.",
                    why="Untrusted files are read in a separate process with limits.",
                    fix="Close other programs, or raise the limits of this account (`ulimit -a`).",
                ) from error
        return self._connection

    def _start(self) -> Connection:
        # Imported only here, because a child does not need them.
        import socket
        import subprocess
        from multiprocessing.connection import Connection

        from qlora_tui import worker

        if not self._owner:
            atexit.register(self.close)
        self._owner = os.getpid()
        ours, theirs = socket.socketpair()
        with theirs, _log().open("ab") as errors:
            self._child = subprocess.Popen(
                worker.module_argv("qlora_tui.data.confined", str(theirs.fileno()), self._module),
                env={**worker.subprocess_env(), "TOKENIZERS_PARALLELISM": "false"},
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=[theirs.fileno()],
                # Ctrl-C is meant for this process, which then ends its children.
                start_new_session=True,
            )
        connection = Connection(ours.detach())
        connection.send((self.cpu_s, self.memory_bytes, self._prepare))
        return connection


def _log() -> Path:
    """Return the file for a child's output: the log, because a message may contain text of a row.

    If the log cannot be written, the output is discarded.
    """
    from qlora_tui import paths

    with suppress(OSError, UserError):
        log = paths.log_path()
        if os.access(log.parent, os.W_OK):
            return log
    return Path(os.devnull)


def _nothing() -> None:
    """Do nothing; a call to this function shows that the child is ready."""


def _begin(number: int, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]) -> None:
    _iterators[number] = function(*arguments)


def _advance(number: int) -> tuple[Any, ...]:
    """Return the next item in a tuple of one; an empty tuple at the end."""
    for item in _iterators[number]:
        return (item,)
    return ()


def _end(number: int) -> None:
    _iterators.pop(number, None)


def _serve(connection: Connection, module: str) -> None:
    """Answer calls until the parent closes the connection, or makes no call for ``_IDLE_S`` seconds."""
    global _in_child
    _in_child = True
    importlib.import_module(module)
    cpu_s, memory_bytes, prepare = connection.recv()
    if prepare is not None:
        prepare()
    limit_memory(memory_bytes)
    while connection.poll(_IDLE_S) or _iterators:
        function, arguments = connection.recv()
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        try:
            reply = True, function(*arguments)
        except Exception as error:
            reply = False, error
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            connection.send(reply)
        except MemoryError as error:
            connection.send((False, error))


def limit_memory(more_bytes: int) -> None:
    """Limit this process to ``more_bytes`` more memory than it has now, if the kernel reports its size."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError, IndexError):
        held = int(_STATUS.read_bytes().partition(b"VmData:")[2].split(maxsplit=1)[0]) << 10
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if soft == resource.RLIM_INFINITY or held + more_bytes < soft:
            resource.setrlimit(resource.RLIMIT_DATA, (held + more_bytes, hard))


def main() -> None:
    """Serve the connection whose file descriptor is the first argument."""
    from multiprocessing.connection import Connection

    # Pickled functions refer to this module by name, not to __main__.
    confined = importlib.import_module("qlora_tui.data.confined")
    with suppress(EOFError, OSError):
        confined._serve(Connection(int(sys.argv[1])), sys.argv[2])


if __name__ == "__main__":
    main()
