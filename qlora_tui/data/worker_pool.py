"""Processing of row batches by several processes, with results in the order of the rows.

A small file is processed in this process. For a large one each core gets a child process (``worker``); until
the first is ready, and where one has died, this process does the work too. The results are the same either
way. Children exit when their input ends: none outlives this process, however it ends.

Compared at commit 7720e8a0 with ``concurrent.futures.ProcessPoolExecutor`` (spawn, 2 cores, 40,000 rows):
when this process gets kill -9, the executor leaves its processes running forever, 55 MiB each. When one
worker dies, it gives up all batches (``BrokenProcessPool``), where this pool finishes the rows. Its first
rows come after 0.3 s instead of 0.06 s, all of them after 5.9 s instead of 5.1 s, in 133 MiB instead of 119.
"""

from __future__ import annotations

import os
import pickle
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import TypeAlias

import msgspec

from qlora_tui import paths, subprocesses
from qlora_tui.data.length_prefixed import read_frame, write_frame
from qlora_tui.data.row_result import Batch, RowProcessor, RowResult
from qlora_tui.data.template_guard import HANG_SIGNAL, hung_template

Work: TypeAlias = Callable[[Iterable[Batch]], Iterator[list[RowResult]]]

MIN_PARALLEL_BYTES = 16 << 20
"""Bytes of data from which child processes pay off: a child takes a third of a second of a core to start, and
processes some five megabytes a second."""
MODULE = "qlora_tui.data.worker"
MAX_WORKERS = 4
"""Most child processes. A data set must be made within a gigabyte: each holds a tokenizer, 82 MiB at its
start with a vocabulary of 49,000 and 141 with one of 139,000, and its word cache, some 25."""
_decode = msgspec.msgpack.Decoder(list[RowResult]).decode


@contextmanager
def open_worker_pool(outcomes: RowProcessor, data_bytes: int) -> Iterator[Work]:
    """Provide the function that processes batches, chosen by ``data_bytes`` in total."""
    count = min(cores(), MAX_WORKERS) if data_bytes >= MIN_PARALLEL_BYTES else 1
    if count < 2:
        yield lambda batches: map(outcomes.process, batches)
        return
    workers = WorkerPool(outcomes, count)
    try:
        yield workers.work
    finally:
        workers.close()


def cores() -> int:
    """Return the number of cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


class WorkerPool:
    """Child processes, and a thread for each that waits for it."""

    def __init__(self, outcomes: RowProcessor, count: int):
        self._outcomes = outcomes
        self._count = count
        self._waiting: SimpleQueue[subprocess.Popen[bytes] | None] = SimpleQueue()
        """Idle children; None once all have died."""
        self._alive = 0
        """Number of children that have replied and not died since."""
        self._counting = Lock()
        self.ready = False
        """Whether a child has replied."""
        self.children = [_start_child() for _ in range(count)]
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="data-worker")
        what = pickle.dumps(outcomes)
        for child in self.children:
            self._threads.submit(self._initialize_child, child, what)

    def work(self, batches: Iterable[Batch]) -> Iterator[list[RowResult]]:
        """Yield the results of each batch, in order; a few batches are processed at a time."""
        pending: deque[tuple[Batch, Future[list[RowResult]]]] = deque()
        for batch in batches:
            if not self.ready:
                yield self._outcomes.process(batch)
                continue
            pending.append((batch, self._threads.submit(self._run_in_child, batch)))
            if len(pending) > 2 * self._count:
                yield self._result(*pending.popleft())
        while pending:
            yield self._result(*pending.popleft())

    def close(self) -> None:
        """Stop the children."""
        for child in self.children:
            child.kill()
        self._threads.shutdown(cancel_futures=True)
        for child in self.children:
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()

    def _initialize_child(self, child: subprocess.Popen[bytes], what: bytes) -> None:
        _request(child, what)
        with self._counting:
            self._alive += 1
        self._waiting.put(child)
        self.ready = True

    def _run_in_child(self, batch: Batch) -> list[RowResult]:
        child = self._waiting.get()
        if child is None:
            self._waiting.put(None)  # for the next caller
            raise EOFError
        try:
            answer = _request(child, pickle.dumps(batch))
        except (OSError, EOFError):
            self._on_child_death()
            if child.wait() == -HANG_SIGNAL:
                raise hung_template("A process that renders rows") from None  # it would hang here too
            raise
        self._waiting.put(child)
        return _decode(answer)

    def _on_child_death(self) -> None:
        """Handle the death of a child: it gets no more batches, or it would take every one that waits."""
        with self._counting:
            self._alive -= 1
            if not self._alive:
                self._waiting.put(None)

    def _result(self, batch: Batch, future: Future[list[RowResult]]) -> list[RowResult]:
        try:
            return future.result()
        except (OSError, EOFError):  # the child died on this batch, or was killed for its memory
            return self._outcomes.process(batch)


def _start_child() -> subprocess.Popen[bytes]:
    """Start a child that ignores Ctrl-C, which is for this process, which then stops its children.

    The child's stderr goes to the log: a library's last message may contain text of a row.
    """
    log = paths.log_path()
    with (log if os.access(log.parent, os.W_OK) else Path(os.devnull)).open("ab") as errors:
        return subprocess.Popen(
            subprocesses.module_argv(MODULE),
            env={**subprocesses.subprocess_env(), "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )


def _request(child: subprocess.Popen[bytes], what: bytes) -> bytes:
    """Return the child's reply. Raises ``OSError`` or ``EOFError`` where it has died."""
    assert child.stdin is not None
    assert child.stdout is not None
    write_frame(child.stdin, what)
    return read_frame(child.stdout)
