"""Time and memory limits for chat templates, which are programs by third parties.

Time is processor time, so a busy or suspended machine changes nothing. A watcher thread raises
``TemplateStopped`` in the rendering thread past the limit. Memory is limited by the kernel. Arithmetic on
numbers of millions of digits, which neither limit can interrupt, is rejected.

A single operation of the interpreter, such as comparing two lists that hold each other a million times,
blocks both the watcher thread and the exception. For this case a kernel timer ends the process. The watcher
restarts the timer ten times a second, which works as long as operations finish. The timer counts the
processor time of the process, so a suspended process is safe. The parent process recognizes the cause by the
signal (``HANG_SIGNAL``).
"""

from __future__ import annotations

import ctypes
import faulthandler
import signal
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from qlora_tui.data import memory_bound
from qlora_tui.errors import UserError
from qlora_tui.formatting import uncapitalize

MAX_CPU_S = 5.0
"""Most processor seconds of one rendering. A long conversation takes some milliseconds."""
MAX_ADDED_MEMORY_BYTES = 256 << 20
MAX_BITS = 4096
"""Most bits of an integer."""
MAX_HUNG_CPU_S = 20.0
"""Most processor seconds of the process in which no other thread can run."""
HANG_SIGNAL = signal.SIGVTALRM
"""Signal that ends a process whose template hangs in one operation; no other code sends it."""
HUNG = "The chat template was stuck in one operation."
_LOOK_S = 0.1
_IDLE_LOOKS = 50
_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc


class TemplateStopped(BaseException):
    """The time limit was reached. Not an ``Exception``, so that no handler in between catches it."""


def check_number(value: Any) -> Any:
    """Return ``value``, unless it is a number that is too large. Raises ``OverflowError``."""
    if type(value) is int and value.bit_length() > MAX_BITS:
        raise OverflowError(f"a number has more than {MAX_BITS:,} bits")
    return value


def multiplied(left: Any, right: Any) -> Any:
    """Return ``left * right`` of numbers, or a repeated text. Raises ``OverflowError``."""
    return check_number(left * right)


def raised(base: Any, exponent: Any) -> Any:
    """Return ``base ** exponent``. Raises ``OverflowError`` instead of taking long."""
    if type(base) is int and type(exponent) is int and base.bit_length() * abs(exponent) > MAX_BITS:
        raise OverflowError(f"a number has more than {MAX_BITS:,} bits")
    return base**exponent


class Bounded:
    """Limits one rendering: ``with Bounded():``. Raises ``TemplateStopped`` and ``MemoryError``."""

    __slots__ = ("clock", "ends_at", "is_overdue", "thread")

    def __enter__(self) -> None:
        self.is_overdue = False
        self.thread = threading.get_ident()
        self.clock = _clock_of(self.thread)
        self.ends_at = time.clock_gettime(self.clock) + MAX_CPU_S
        _watch.begin(self)  # before memory is limited: a new thread takes some
        memory_bound.enter(MAX_ADDED_MEMORY_BYTES)

    def seconds(self) -> float:
        """Processor time of the block so far. Call it in the block's thread."""
        return time.clock_gettime(self.clock) - self.ends_at + MAX_CPU_S

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        memory_bound.leave()
        _watch.end(self)


def _clock_of(thread: int) -> int:
    # macOS has no clock for one thread; there a busy machine counts.
    clock_of_thread = getattr(time, "pthread_getcpuclockid", None)
    return clock_of_thread(thread) if clock_of_thread else time.CLOCK_MONOTONIC


def hung_template(process: str) -> UserError:
    """Build the error for a ``process`` ("The trainer process") that was ended by ``HANG_SIGNAL``."""
    return UserError(
        "The chat template hangs",
        what=f"{process} was ended: {uncapitalize(HUNG)}",
        why=f"It took {MAX_HUNG_CPU_S:.0f} seconds of processor time, and could not be stopped otherwise.",
        fix='Choose another template: model.chat_template = "chatml".',
    )


class _HangTimer:
    """Ends the process unless it is restarted in time."""

    def __init__(self) -> None:
        self._is_prepared = False

    def start(self) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_HUNG_CPU_S)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def prepare(self) -> None:
        """Let stderr report where it hung; then the default action of the signal ends the process."""
        if self._is_prepared:
            return
        self._is_prepared = True
        with suppress(OSError, ValueError, RuntimeError):  # a stderr that is not a file
            if sys.__stderr__ is not None:
                # All threads: under load the kernel may deliver the signal to the watcher.
                faulthandler.register(HANG_SIGNAL, file=sys.__stderr__, all_threads=True, chain=True)


def _receive_exception(thread: int) -> None:
    """Receive what was raised in this ``thread`` and not delivered yet; returns within a few bytecodes.

    Withdrawing it, by raising None, would leave the interpreter's flag for such an exception set. With that,
    Python 3.11 never gets past the first bytecode of a function that a profiler, debugger or tracer follows.
    """
    try:
        _raise_in(ctypes.c_ulong(thread), ctypes.py_object(TemplateStopped))
        while True:
            pass
    except TemplateStopped:
        return


class _Watch:
    """The watcher thread. It exits when nothing has been rendered for a while."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hang_timer = _HangTimer()
        self._under_way: set[Bounded] = set()
        self._is_running = False

    def begin(self, block: Bounded) -> None:
        with self._lock:
            if not self._is_running:
                threading.Thread(target=self._run, name="template-watch", daemon=True).start()
                self._is_running = True
                self._hang_timer.prepare()
            if not self._under_way:
                self._hang_timer.start()
            self._under_way.add(block)

    def end(self, block: Bounded) -> None:
        """Stop watching. Nothing is raised in the block's thread after this returns."""
        while True:
            try:
                with self._lock:
                    self._under_way.discard(block)
                    if not self._under_way:
                        self._hang_timer.stop()
                if block.is_overdue:
                    # Raised, maybe not delivered: the rendering has finished, or failed for another reason.
                    _receive_exception(block.thread)
                return
            except TemplateStopped:
                continue  # it was delivered here

    def _run(self) -> None:
        idle = 0
        while True:
            time.sleep(_LOOK_S)
            with self._lock:
                idle = 0 if self._under_way else idle + 1
                if idle > _IDLE_LOOKS:
                    self._is_running = False
                    return
                try:
                    if self._under_way:
                        self._hang_timer.start()
                    self._stop_overdue()
                except (MemoryError, OSError):
                    continue  # out of memory in this thread too: try again

    def _stop_overdue(self) -> None:
        """Raise TemplateStopped in every block past its limit, repeatedly, because a finalizer drops it."""
        for block in self._under_way:
            if time.clock_gettime(block.clock) > block.ends_at:
                block.is_overdue = True
                _raise_in(ctypes.c_ulong(block.thread), ctypes.py_object(TemplateStopped))


_watch = _Watch()
