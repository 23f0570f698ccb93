"""A report on data files before any run: format, counts, lengths, problems by row.

``inspect`` gives the whole report; ``inspecting`` gives one at once from the first rows and better
ones while it reads on, for the Data screen and for large files. ``show`` renders one row as the model
will see it. Used by ``qlora-tui data`` and the engine behind the Data screen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.data.checks import conversation_findings, sample_findings
from qlora_tui.data.conversation import Conversation, RowRefused
from qlora_tui.data.examine import Examiner
from qlora_tui.data.known_errors import note_errors, stamp_of, tokens_of
from qlora_tui.data.lengths import fit
from qlora_tui.data.long_texts import most_characters
from qlora_tui.data.open_file import Position
from qlora_tui.data.outcome import Outcome, Outcomes
from qlora_tui.data.problems import DataProblem, problem_of
from qlora_tui.data.render import Choices, pieces, render
from qlora_tui.data.report import Counts, FileReport, Report, Shown
from qlora_tui.data.row import Row
from qlora_tui.data.row_at import row_at
from qlora_tui.data.sources import SourceFile, conversation_of, open_file_of, open_source
from qlora_tui.data.statistics import LengthCounter
from qlora_tui.data.thinking_facts import facts
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.data.untrained import untrained_problem
from qlora_tui.data.workers import working
from qlora_tui.errors import Problem
from qlora_tui.recipe.schema import Data, Source

__all__ = ["Report", "Shown", "inspect", "inspecting", "show"]

_NEXT_REPORT_S = 1.0


def inspect(source: Source, tokenizer: ChatTokenizer | None = None, data: Data | None = None) -> Report:
    """The whole report on one source under the settings of ``data``. Raises ``Problem``."""
    *_, last = inspecting(source, tokenizer, data)
    return last


def inspecting(
    source: Source, tokenizer: ChatTokenizer | None = None, data: Data | None = None
) -> Iterator[Report]:
    """Reports that get better; the last one is complete. Raises ``Problem`` before the first."""
    data = data or Data()
    files, note = open_source(source, data.preferences)
    yield from _Inspection(source, files, note, tokenizer, data).reports()


def show(
    source: Source, row: int, tokenizer: ChatTokenizer, data: Data | None = None, path: str = ""
) -> Shown:
    """Row number ``row`` of the source's file ``path``, or of its first. Raises ``Problem``."""
    data = data or Data()
    file, found = row_of(source, row, data, path)
    shown = _shown(found.number, conversation_of(found, file), tokenizer, data)
    return msgspec.structs.replace(shown, path=str(file.path))


def row_of(source: Source, row: int, data: Data, path: str = "") -> tuple[SourceFile, Row]:
    """Row number ``row`` of a source's file as it is there, or the next there is. Raises ``Problem``."""
    file = open_file_of(source, data.preferences, path)
    found = row_at(file.path, row)
    if found is None:
        raise Problem(
            "No such row", what=f"{file.path} ends before row {row}.", fix="Choose a smaller number."
        )
    return file, found


class _Inspection:
    """What has been counted so far."""

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
        self._last_rows: dict[Path, int] = {}
        unknown = untrained_problem(tokenizer.folder, tokenizer) if tokenizer and tokenizer.folder else None
        self._of_the_model = [unknown] if unknown else []
        self._context = _context_of(tokenizer)
        self._stamps = {file.path: stamp_of(file.path) for file in files}
        self._bytes = sum(file.path.stat().st_size for file in files)

    def reports(self) -> Iterator[Report]:
        """One at once, then one every second, and the complete one."""
        with working(Outcomes(self._data, self._tokenizer, keep_samples=False), self._bytes) as work:
            examiner = Examiner(self._data, work, near_duplicates=True)
            due = time.monotonic()
            done = 0
            for file in self._files:
                position = Position()
                last_row = 0
                for outcomes in examiner.examined(file, position):
                    last_row = self._measure(outcomes) or last_row
                    if time.monotonic() >= due:
                        due = time.monotonic() + _NEXT_REPORT_S
                        self._note_errors(file, examiner, read=False)
                        yield self._report(examiner, False, (done + position.bytes) / (self._bytes or 1))
                done += file.path.stat().st_size
                self._last_rows[file.path] = last_row
                self._note_errors(file, examiner, read=True)
            yield self._report(examiner, True, 1.0)

    def _note_errors(self, file: SourceFile, examiner: Examiner, *, read: bool) -> None:
        """For a launch to know; that there is none, once all of the file was ``read``."""
        problems = examiner.problems()
        if not read and not any(problem.severity == "error" for problem in problems):
            return
        one = self._tokenizer
        tokens = (
            tokens_of(one.folder, one.asked_template, self._data.train_on)
            if one is not None and one.folder is not None
            else None
        )
        with suppress(OSError):  # a full disk is no reason to show nothing
            note_errors(self._source, file.path, self._stamps[file.path], problems, tokens, read=read)

    def _measure(self, outcomes: list[Outcome]) -> int:
        """Add the lengths; the number of the last row."""
        for one in outcomes:
            self._lengths.add(one.lengths, one.row)
        return outcomes[-1].row if outcomes else 0

    def _file_report(self, file: SourceFile) -> FileReport:
        found = file.detection
        return FileReport(
            path=str(file.path),
            bytes=file.path.stat().st_size,
            format=found.layout.format,
            columns=found.layout.columns,
            all_columns=found.columns,
            evidence=(*found.evidence, self._note) if self._note else found.evidence,
            last_row=self._last_rows.get(file.path, 0),
        )

    def _of_the_whole(self, examiner: Examiner, complete: bool) -> Iterator[DataProblem]:
        """What no row shows by itself."""
        most, path = self._context, str(self._files[0].path)
        if most is not None and self._data.max_length > most and (over := self._lengths.above(most)):
            longest = self._lengths.summary().longest_row
            example = f"More than {most:,} tokens, which is the model's context."
            yield problem_of("beyond-context", over, longest, path, example)
        if complete and examiner.counts.rows == 1 and not self._is_one_long_text(examiner):
            row = max(self._last_rows.values())
            yield problem_of(
                "one-row", 1, row, path, "There is nothing beside it to learn or to validate on."
            )

    def _is_one_long_text(self, examiner: Examiner) -> bool:
        """Whether the only row is a text that is split, or should be."""
        if any(problem.kind == "long-text" for problem in examiner.problems()) or examiner.counts.split:
            return True
        is_text = self._files[0].detection.layout.format == "text"
        return is_text and self._tokenizer is None and self._lengths.above(most_characters(self._data)) > 0

    def _report(self, examiner: Examiner, complete: bool, share: float) -> Report:
        counts = examiner.counts
        problems = [*self._of_the_model, *examiner.problems(), *self._of_the_whole(examiner, complete)]
        return Report(
            files=tuple(self._file_report(file) for file in self._files),
            complete=complete,
            share=min(1.0, share),
            counts=Counts(**{name: getattr(counts, name) for name in counts.__struct_fields__}),
            lengths=self._lengths.summary(),
            too_long=self._lengths.above(self._data.max_length) if self._tokenizer else 0,
            problems=tuple(sorted(problems, key=lambda p: p.severity != "error")),
            notes=dict(examiner.notes),
            template=self._tokenizer.template_name if self._tokenizer else "",
            thinking=facts(
                examiner.notes,
                counts.conversations,
                self._tokenizer.traits if self._tokenizer else None,
                self._data,
            ),
        )


def _context_of(tokenizer: ChatTokenizer | None) -> int | None:
    """Tokens the model can read at most; None where that is not known."""
    if tokenizer is None or tokenizer.folder is None:
        return None
    try:
        return parse_architecture(tokenizer.folder / "config.json").max_positions
    except (Problem, OSError):
        return None


def _shown(row: int, one: Conversation | RowRefused, tokenizer: ChatTokenizer, data: Data) -> Shown:
    try:
        if isinstance(one, RowRefused):
            raise one
        whole = render(one, tokenizer, Choices.of(data))
    except RowRefused as refused:
        return Shown(row, (), (), (), refused=refused.reason)
    samples = [
        s for rendered in whole for s in fit(rendered, data.max_length, data.too_long, tokenizer.bos_id)
    ]
    return Shown(
        row=row,
        samples=tuple(tuple(pieces(tokenizer, s.token_ids, s.trained)) for s in samples),
        token_counts=tuple(len(r.token_ids) for r in whole),
        trained_counts=tuple(s.trained_count for s in samples),
        refused="" if samples else f"Nothing is left to learn within {data.max_length} tokens.",
        notes=whole[0].notes,
        findings=(*conversation_findings(one), *sample_findings(tokenizer, one, whole, data.train_on)),
    )
