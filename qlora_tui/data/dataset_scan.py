"""Processes rows in several processes; counts the results in file order, and finds duplicate rows.

``dataset`` writes the results and ``inspection`` measures them, so both agree on the samples of a run. Less
than ``MIN_CHILD_BYTES`` of data are processed in this process, less than ``MIN_PARALLEL_BYTES`` in a confined
child, and more in up to ``MAX_WORKERS`` children. Until the first child is ready, this process does the work.
If a child is killed, its batch is processed here: the rendering or reading that killed it then has a child of
its own, and its row is refused. The results are the same either way.
"""

from __future__ import annotations

import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import TypeAlias

from msgspec.structs import replace

from qlora_tui.data.confined import Confined, KilledError
from qlora_tui.data.dataset_report import Counts
from qlora_tui.data.problems import DataProblem, ProblemCounter, none_used
from qlora_tui.data.read import raw_rows
from qlora_tui.data.row_result import Batch, RowProcessor, RowResult, batches
from qlora_tui.data.sources import SourceFile
from qlora_tui.data.split import NearDuplicates
from qlora_tui.data.text_reader import Position
from qlora_tui.recipe.schema import Data

Work: TypeAlias = Callable[[Iterable[Batch]], Iterator[list[RowResult]]]


class DatasetScanner:
    """The counts and problems of all rows that passed through ``scan``."""

    def __init__(
        self,
        data: Data,
        work: Work,
        *,
        sketched: bool = False,
        near_duplicates: bool = False,
    ):
        """Start with empty counts.

        Args:
            data: settings of the recipe.
            work: processes rows.
            sketched: whether every result has a sketch.
            near_duplicates: whether near duplicates are searched.
        """
        self.last_row = 0
        """Number of the last row read from the current file; 0 before its first row."""
        self.counts = Counts()
        self.notes: dict[str, int] = {}
        """Number of conversations with each kind of note (see ``TokenizedSample.notes``)."""
        self._data = data
        self._work = work
        self._sketched = sketched
        self._counters: dict[tuple[int, str], ProblemCounter] = {}
        self._unused_files: list[DataProblem] = []
        self._seen: dict[int, int] = {}
        """First row with each key, which takes 116 MiB for a million rows."""
        self._seen_in_validation: dict[int, int] = {}
        self._near = NearDuplicates() if near_duplicates else None

    def scan(self, file: SourceFile, position: Position) -> Iterator[list[RowResult]]:
        """Yield the results of a file's rows, batch by batch; updates ``position``.

        Excluded rows are counted as excluded and have no result.
        """
        place = file.source, str(file.path)
        tally = self._counters.setdefault(place, ProblemCounter(*place, self._data))
        rows = raw_rows(file.path, position)
        rows_before, left_out_before = self.counts.rows, self.counts.left_out
        self.last_row = 0

        def sketched() -> bool:
            return self._sketched or (self._near is not None and not self._near.full)

        for outcomes in self._work(batches(file, rows, sketched)):
            self.last_row = outcomes[-1].row if outcomes else self.last_row
            included = [one for one in outcomes if one.row not in file.excluded]
            self.counts.excluded += len(outcomes) - len(included)
            for one in included:
                self._count(tally, file, one)
            yield included
        row_count = self.counts.rows - rows_before
        if row_count == self.counts.left_out - left_out_before and (
            unused := none_used(row_count, tally.problems())
        ):
            self._unused_files.append(replace(unused, severity="warning"))

    def problems(self) -> list[DataProblem]:
        """Return all problems, errors first."""
        problems = [problem for tally in self._counters.values() for problem in tally.problems()]
        if self.counts.conversations:  # otherwise all files together have the error
            problems += self._unused_files
        return sorted(problems, key=lambda p: p.severity != "error")

    def _count(self, tally: ProblemCounter, file: SourceFile, one: RowResult) -> None:
        counts, row = self.counts, one.row
        counts.rows += 1
        for kind, example in one.findings:
            tally.add(kind, row, example)
        if one.key is not None:
            self._check_duplicates(tally, file, one, one.key)
        if one.is_rejected:
            counts.left_out += 1
            return
        if one.long_text is not None:
            tally.add_long_text(row, one.long_text)
        if one.counts is not None:
            counts.add(one.counts)
            for note in one.notes if one.counts.conversations else ():
                self.notes[note] = self.notes.get(note, 0) + 1

    def _check_duplicates(self, tally: ProblemCounter, file: SourceFile, one: RowResult, key: int) -> None:
        row, seen = one.row, self._seen
        # The validation file comes after the sources.
        if self._data.validation_path and file.source >= len(self._data.sources):
            seen = self._seen_in_validation
            if (trained := self._seen.get(key)) is not None:
                what = f"Row {row} of the validation file has the same text as row {trained} of the data."
                tally.add("overlap", row, what)
        if (earlier := seen.get(key)) is not None:
            tally.add("duplicate", row, f"Row {row} has the same text as row {earlier}.")
            return
        seen[key] = row
        if self._near is not None:
            near = self._near.find_earlier(array("I", one.sketch), row)
            if near is not None:
                tally.add("near-duplicate", row, f"Row {row} is nearly the same as row {near}.")


MIN_CHILD_BYTES = 256 << 10
"""Minimum size of the data, in bytes, at which a single child process is faster than this process, which must
call the renderer for each row.
"""
MIN_PARALLEL_BYTES = 4 << 20
"""Minimum size of the data, in bytes, at which several child processes are faster than one.

A child takes a third of a second of a core to start, and processes about five megabytes per second.
"""
MAX_WORKERS = 4
"""Maximum number of child processes.

A data set must be made within a gigabyte. Each child holds a tokenizer (82 MiB at its start with a vocabulary
of 49,000, and 141 MiB with one of 139,000) and its word cache of about 25 MiB.
"""
_BATCH_CPU_S = 60.0
_BATCH_MEMORY_BYTES = 512 << 20
_processors: list[RowProcessor] = []
"""In a child: the processor of its batches."""


@contextmanager
def open_worker_pool(processor: RowProcessor, data_bytes: int) -> Iterator[Work]:
    """Yield the function that processes batches, chosen for ``data_bytes`` of data in total."""
    if data_bytes < MIN_CHILD_BYTES:
        yield lambda batches: map(processor.process, batches)
        return
    count = min(cores(), MAX_WORKERS) if data_bytes >= MIN_PARALLEL_BYTES else 1
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
    """Yield the results of each batch, in order; a few batches are processed at the same time."""
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
