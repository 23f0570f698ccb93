"""Reports on data files before a run: format, counts, lengths, and problems by row.

``inspect`` returns the whole report. For the Data screen and large files, ``inspecting`` yields a report from
the first rows at once, and then more complete ones as it reads on. ``show`` renders one row as the model sees
it. Used by ``qlora-tui data`` and the engine behind the Data screen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.data.conversation import Conversation, RowRejectedError
from qlora_tui.data.dataset_report import (
    NO_SUCH_ROW,
    Counts,
    FileReport,
    LengthCounter,
    Report,
    Shown,
    thinking_sentences,
)
from qlora_tui.data.dataset_scan import DatasetScanner, open_worker_pool
from qlora_tui.data.problems import DataProblem, max_characters, none_used, problem_of
from qlora_tui.data.quick_check import cache_errors, file_fingerprint, tokenizer_fingerprint
from qlora_tui.data.read import row_at
from qlora_tui.data.render import RenderOptions, pieces, render, trained_texts
from qlora_tui.data.row import DamagedFileError, Row
from qlora_tui.data.row_result import RowProcessor, RowResult, conversation_findings, sample_findings
from qlora_tui.data.samples import last_samples, side_names, truncate
from qlora_tui.data.sources import SourceFile, conversation_of, open_file_of, open_source
from qlora_tui.data.text_reader import Position
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.data.trainable_tokens import untrained_problem
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Data, Source

__all__ = ["Report", "Shown", "inspect", "inspecting", "show"]

_NEXT_REPORT_S = 1.0


def inspect(source: Source, tokenizer: ChatTokenizer | None = None, data: Data | None = None) -> Report:
    """Return the whole report on one source for the settings in ``data``. Raises ``UserError``."""
    *_, last = inspecting(source, tokenizer, data)
    return last


def inspecting(
    source: Source, tokenizer: ChatTokenizer | None = None, data: Data | None = None
) -> Iterator[Report]:
    """Yield increasingly complete reports, up to the complete one.

    Raises ``UserError`` before the first report if the source cannot be used, and later if a file is damaged.
    """
    data = data or Data()
    files, note = open_source(source, data.preferences)
    yield from _Inspection(source, files, note, tokenizer, data).reports()


def show(
    source: Source, row: int, tokenizer: ChatTokenizer, data: Data | None = None, path: str = ""
) -> Shown:
    """Render row number ``row`` of the source's file ``path``, or of its first file. Raises ``UserError``."""
    data = data or Data()
    file, found_row = row_of(source, row, data, path)
    shown = _shown(found_row, conversation_of(found_row, file), tokenizer, data)
    return msgspec.structs.replace(shown, path=str(file.path))


def row_of(source: Source, row: int, data: Data, path: str = "") -> tuple[SourceFile, Row]:
    """Read row number ``row`` of a source's file, or the next existing row. Raises ``UserError``."""
    file = open_file_of(source, data.preferences, path)
    found_row = row_at(file.path, row)
    if found_row is None:
        raise UserError(
            "No such row",
            what=f"{file.path} ends before row {row}.",
            fix="Choose a smaller number.",
            code=NO_SUCH_ROW,
        )
    return file, found_row


class _Inspection:
    """The state of an inspection in progress."""

    def __init__(
        self,
        source: Source,
        files: list[SourceFile],
        note: str,
        tokenizer: ChatTokenizer | None,
        data: Data,
    ):
        self._source = source
        self._files = files
        self._note = note
        self._tokenizer = tokenizer
        self._data = data
        self._lengths = LengthCounter("tokens" if tokenizer else "characters")
        self._too_long = 0
        self._last_rows: dict[Path, int] = {}
        unknown = untrained_problem(tokenizer.folder, tokenizer) if tokenizer and tokenizer.folder else None
        self._of_the_model = [unknown] if unknown else []
        self._context = _context_of(tokenizer)
        self._stamps = {file.path: file_fingerprint(file.path) for file in files}
        self._bytes = sum(file.path.stat().st_size for file in files)

    def reports(self) -> Iterator[Report]:
        """Yield a report at once, then one every second, and finally the complete one."""
        with open_worker_pool(
            RowProcessor(self._data, self._tokenizer, keep_samples=False), self._bytes
        ) as work:
            examiner = DatasetScanner(self._data, work, near_duplicates=True)
            due = time.monotonic()
            done = 0
            for file in self._files:
                position = Position()
                try:
                    for outcomes in examiner.scan(file, position):
                        self._measure(outcomes)
                        if time.monotonic() >= due:
                            due = time.monotonic() + _NEXT_REPORT_S
                            self._note_errors(file, examiner.problems(), read=False)
                            yield self._report(examiner, False, (done + position.bytes) / (self._bytes or 1))
                except DamagedFileError as problem:
                    title, fix, path = problem.title, problem.fix, str(file.path)
                    damage = problem_of("damaged-file", 1, (), problem.what, title=title, fix=fix, path=path)
                    self._note_errors(file, [damage], read=False)
                    raise
                done += file.path.stat().st_size
                self._last_rows[file.path] = examiner.last_row
                self._note_errors(file, examiner.problems(), read=True)
            yield self._report(examiner, True, 1.0)

    def _note_errors(self, file: SourceFile, problems: Sequence[DataProblem], *, read: bool) -> None:
        """Store errors for later launches, or their absence if the whole file was ``read``."""
        if not read and not any(problem.severity == "error" for problem in problems):
            return
        one = self._tokenizer
        tokens = (
            tokenizer_fingerprint(one.folder, one.asked_template, self._data.train_on)
            if one is not None and one.folder is not None
            else None
        )
        skips, stamp = self._data.bad_rows == "skip", self._stamps[file.path]
        cache_errors(self._source, file.path, stamp, problems, tokens, read=read, skips_bad_rows=skips)

    def _measure(self, outcomes: list[RowResult]) -> None:
        """Add the lengths of these results."""
        for one in outcomes:
            self._lengths.add(one.lengths, one.row)
            self._too_long += any(length > self._data.max_length for length in one.lengths)

    def _file_report(self, file: SourceFile) -> FileReport:
        detection = file.detection
        return FileReport(
            path=str(file.path),
            bytes=file.path.stat().st_size,
            format=detection.layout.format,
            columns=detection.layout.columns,
            all_columns=detection.columns,
            # These facts concern the source, so they are in the report of its first file only.
            evidence=(*detection.evidence, self._note)
            if self._note and file is self._files[0]
            else detection.evidence,
            last_row=self._last_rows.get(file.path, 0),
        )

    def _dataset_problems(self, examiner: DatasetScanner, complete: bool) -> Iterator[DataProblem]:
        """Yield the problems that no single row shows."""
        most, path = self._context, str(self._files[0].path)
        if most is not None and self._data.max_length > most and (over := self._lengths.above(most)):
            longest = self._lengths.summary().longest_row
            example = f"Longer than the model's context of {most:,} tokens."
            yield problem_of("beyond-context", over, [longest], example, path=path)
        counts = examiner.counts
        if (
            complete
            and counts.rows == counts.left_out
            and (none := none_used(counts.rows, examiner.problems()))
        ):
            yield none
        if complete and examiner.counts.rows == 1 and not self._is_one_long_text(examiner):
            rows, example = (
                [max(self._last_rows.values())],
                "There are no other rows to train or validate on.",
            )
            yield problem_of("one-row", 1, rows, example, path=path)

    def _is_one_long_text(self, examiner: DatasetScanner) -> bool:
        """Return whether the only row is a text that is split, or should be."""
        if any(problem.kind == "long-text" for problem in examiner.problems()) or examiner.counts.split:
            return True
        is_text = self._files[0].detection.layout.format == "text"
        return is_text and self._tokenizer is None and self._lengths.above(max_characters(self._data)) > 0

    def _report(self, examiner: DatasetScanner, complete: bool, share: float) -> Report:
        counts = examiner.counts
        problems = [*self._of_the_model, *examiner.problems(), *self._dataset_problems(examiner, complete)]
        return Report(
            files=tuple(self._file_report(file) for file in self._files),
            complete=complete,
            share=min(1.0, share),
            counts=Counts(**{name: getattr(counts, name) for name in counts.__struct_fields__}),
            lengths=self._lengths.summary(),
            too_long=self._too_long if self._tokenizer else 0,
            problems=tuple(sorted(problems, key=lambda p: p.severity != "error")),
            notes=dict(examiner.notes),
            template=self._tokenizer.template_name if self._tokenizer else "",
            thinking=thinking_sentences(
                examiner.notes,
                counts.conversations,
                self._tokenizer.traits if self._tokenizer else None,
                self._data,
            ),
        )


def _context_of(tokenizer: ChatTokenizer | None) -> int | None:
    """Return the model's maximum context in tokens; None if it is unknown."""
    if tokenizer is None or tokenizer.folder is None:
        return None
    try:
        return parse_architecture(tokenizer.folder / "config.json").max_positions
    except (UserError, OSError):
        return None


def _shown(row: Row, one: Conversation | RowRejectedError, tokenizer: ChatTokenizer, data: Data) -> Shown:
    try:
        if isinstance(one, RowRejectedError):
            raise one
        options = RenderOptions.of(data)
        whole = render(one, tokenizer, options)
        if sides := side_names(one):
            others = [render(other, tokenizer, options) for other in one.rejected]
            whole = last_samples(one, [whole, *others])
    except RowRejectedError as refused:
        return Shown(row.number, (), (), (), refused=refused.reason, findings=row.warnings)
    samples = [
        s for rendered in whole for s in truncate(rendered, data.max_length, data.overflow, tokenizer.bos_id)
    ]
    return Shown(
        row=row.number,
        samples=tuple(tuple(pieces(tokenizer, s.token_ids, s.loss_mask)) for s in samples),
        token_counts=tuple(len(r.token_ids) for r in whole),
        trained_counts=tuple(s.trained_count for s in samples),
        trained_texts=tuple(trained_texts(tokenizer, s.token_ids, s.loss_mask) for s in samples),
        sides=sides if len(samples) == len(sides) else (),
        refused="" if samples else f"Nothing is left to learn within {data.max_length} tokens.",
        notes=whole[0].notes,
        findings=(
            *row.warnings,
            *conversation_findings(one),
            *sample_findings(tokenizer, one, whole, data.train_on),
        ),
    )
