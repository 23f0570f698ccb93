"""Processing of row batches by several processes, with results in the order of the rows.

A small file is processed in this process. For a large one each core gets a confined child; until the first is
ready, this process does the work too. A batch in which a child is killed is processed here, where what killed
it is confined by itself and refused with its row. The results are the same either way.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import TypeAlias

from qlora_tui.data.confined import Confined, KilledError
from qlora_tui.data.row_result import Batch, RowProcessor, RowResult

Work: TypeAlias = Callable[[Iterable[Batch]], Iterator[list[RowResult]]]

MIN_PARALLEL_BYTES = 4 << 20
"""Bytes of data from which child processes pay off: a child takes a third of a second of a core to start, and
processes some five megabytes a second."""
MAX_WORKERS = 4
"""Most child processes. A data set must be made within a gigabyte: each holds a tokenizer, 82 MiB at its
start with a vocabulary of 49,000 and 141 with one of 139,000, and its word cache, some 25."""
_BATCH_CPU_S = 60.0
_BATCH_MEMORY_BYTES = 512 << 20
_processors: list[RowProcessor] = []
"""In a child: what processes its batches."""


@contextmanager
def open_worker_pool(processor: RowProcessor, data_bytes: int) -> Iterator[Work]:
    """Provide the function that processes batches, chosen by ``data_bytes`` in total."""
    count = min(cores(), MAX_WORKERS) if data_bytes >= MIN_PARALLEL_BYTES else 1
    if count < 2:
        yield lambda batches: map(processor.process, batches)
        return
    children = [
        Confined(
            __name__,
            cpu_s=_BATCH_CPU_S,
            memory_bytes=_BATCH_MEMORY_BYTES,
            prepare=partial(_keep, processor),
        )
        for _ in range(count)
    ]
    threads = ThreadPoolExecutor(count, thread_name_prefix="data-worker")
    try:
        yield partial(_work, threads, children, processor)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.close()
        threads.shutdown()


def cores() -> int:
    """Return the number of cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def _work(
    threads: ThreadPoolExecutor,
    children: list[Confined],
    processor: RowProcessor,
    batches: Iterable[Batch],
) -> Iterator[list[RowResult]]:
    """Yield the results of each batch, in order; a few batches are processed at a time."""
    idle: SimpleQueue[Confined] = SimpleQueue()

    def start(child: Confined) -> None:
        with suppress(KilledError):
            child.start()
            idle.put(child)

    def process(batch: Batch) -> list[RowResult] | None:
        child = idle.get()
        try:
            return child.call(_process, batch)
        except (KilledError, MemoryError):
            return None
        finally:
            idle.put(child)

    def oldest() -> list[RowResult]:
        batch, future = pending.popleft()
        results = future.result()
        return processor.process(batch) if results is None else results

    for child in children:
        threads.submit(start, child)
    pending: deque[tuple[Batch, Future[list[RowResult] | None]]] = deque()
    for batch in batches:
        if idle.empty() and not pending:
            yield processor.process(batch)
            continue
        pending.append((batch, threads.submit(process, batch)))
        if len(pending) > 2 * len(children):
            yield oldest()
    while pending:
        yield oldest()


def _keep(processor: RowProcessor) -> None:
    _processors.append(processor)


def _process(batch: Batch) -> list[RowResult]:
    return _processors[0].process(batch)
