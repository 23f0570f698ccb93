"""Rows in file order: the result of each, counted and compared with the other rows.

``dataset`` writes the results, ``inspection`` measures them, so both agree on what a run trains on.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from msgspec.structs import replace

from qlora_tui.data.dataset_report import Counts
from qlora_tui.data.excluded_rows import ExcludedByFile
from qlora_tui.data.key_table import KeyTable
from qlora_tui.data.long_texts import LongTexts
from qlora_tui.data.near_duplicates import NearDuplicates
from qlora_tui.data.problems import DataProblem, ProblemCounter, none_used
from qlora_tui.data.read import raw_rows
from qlora_tui.data.row_result import RowResult, batches
from qlora_tui.data.sources import SourceFile
from qlora_tui.data.text_reader import Position
from qlora_tui.data.worker_pool import Work
from qlora_tui.recipe.schema import Data


class DatasetScanner:
    """Counts and problems of all rows that passed through ``scan``."""

    def __init__(
        self,
        data: Data,
        work: Work,
        excluded: ExcludedByFile,
        *,
        sketched: bool = False,
        near_duplicates: bool = False,
    ):
        """Count nothing yet.

        Args:
            data: settings of the recipe.
            work: processes rows.
            excluded: rows that are left out; they are counted as excluded and nothing else.
            sketched: whether a sketch comes with every result.
            near_duplicates: whether near duplicates are searched.
        """
        self._excluded = excluded
        self.last_row = 0
        """Number of the last row that was read of the current file; 0 before its first."""
        self.counts = Counts()
        self.notes: dict[str, int] = {}
        """Number of conversations that were changed for the template, by kind."""
        self._data = data
        self._work = work
        self._sketched = sketched
        self._counters: dict[tuple[int, str], ProblemCounter] = {}
        self._unused_files: list[DataProblem] = []
        self._long_texts: dict[tuple[int, str], LongTexts] = {}
        self._seen, self._seen_in_validation = KeyTable(), KeyTable()
        self._near = NearDuplicates() if near_duplicates else None

    def scan(self, file: SourceFile, position: Position) -> Iterator[list[RowResult]]:
        """Yield the results of a file's rows but excluded ones, batch by batch; updates ``position``."""
        excluded = self._excluded.get((file.source, file.path), frozenset())
        place = file.source, str(file.path)
        skips = self._data.bad_rows == "skip"
        tally = self._counters.setdefault(place, ProblemCounter(*place, skips_bad_rows=skips))
        rows = raw_rows(file.path, position)
        rows_before, left_out_before = self.counts.rows, self.counts.left_out
        self.last_row = 0
        for outcomes in self._work(batches(file, rows, self._wants_sketches)):
            self.last_row = outcomes[-1].row if outcomes else self.last_row
            included = [one for one in outcomes if one.row not in excluded]
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
        problems += [long.problem(self._data) for long in self._long_texts.values()]
        if self.counts.conversations:  # else it is an error of all files together
            problems += self._unused_files
        return sorted(problems, key=lambda p: p.severity != "error")

    def _wants_sketches(self) -> bool:
        return self._sketched or (self._near is not None and not self._near.full)

    def _count(self, tally: ProblemCounter, file: SourceFile, one: RowResult) -> None:
        counts, row = self.counts, one.row
        counts.rows += 1
        for kind, example in one.messages:
            tally.add(kind, row, example)
        if one.key is not None:
            self._check_duplicates(tally, file, one, one.key)
        if one.rejected is not None:
            counts.left_out += 1
            tally.add(one.rejected[0], row, one.rejected[1])
            return
        for kind, example in one.sample_findings:
            tally.add(kind, row, example)
        if one.long_text is not None:
            place = file.source, str(file.path)
            self._long_texts.setdefault(place, LongTexts(*place)).add(row, one.long_text)
        samples, tokens, trained, dropped, cut, split = one.counts or (0,) * 6
        if samples or not one.counts:
            counts.conversations += 1
            for note in one.notes:
                self.notes[note] = self.notes.get(note, 0) + 1
        counts.samples += samples
        counts.tokens += tokens
        counts.trained_tokens += trained
        counts.dropped += dropped
        counts.cut += cut
        counts.split += split

    def _check_duplicates(self, tally: ProblemCounter, file: SourceFile, one: RowResult, key: int) -> None:
        row, seen = one.row, self._seen
        if self._is_validation(file.source):
            seen = self._seen_in_validation
            if (trained := self._seen.get(key)) is not None:
                tally.add("overlap", row, f"Row {row} of the validation file is row {trained} of the data.")
        earlier = seen.first(key, row)
        if earlier is not None:
            tally.add("duplicate", row, f"Row {row} says the same as row {earlier}.")
        elif (
            self._near is not None
            and (near := self._near.find_earlier(array("I", one.sketch), row)) is not None
        ):
            tally.add("near-duplicate", row, f"Row {row} is nearly the same as row {near}.")

    def _is_validation(self, source: int) -> bool:
        """Return whether a source is the recipe's validation file, which comes after its sources."""
        return bool(self._data.validation_path) and source >= len(self._data.sources)
