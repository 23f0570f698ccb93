"""The list of runs, with as many columns as fit, and the preview of the run under the cursor."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import islice
from pathlib import Path
from typing import ClassVar

from textual.binding import BindingType
from textual.content import Content
from textual.events import Click
from textual.geometry import Region, Size
from textual.message import Message
from textual.strip import Strip

from qlora_tui.formatting import (
    capitalize,
    format_bytes,
    format_duration,
    format_loss,
    format_path,
    format_percent,
    format_progress,
    format_speed,
    pluralize,
    shorten_name,
    truncate_middle,
    with_exponent,
)
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.describe import describe, done_at_words
from qlora_tui.runs.event_log import events_backwards
from qlora_tui.runs.events import ALL_STEPS_DONE, Progress, SampleGenerated, Step
from qlora_tui.runs.exports import Export, read_exports
from qlora_tui.runs.main_settings import MainSetting, setting_words
from qlora_tui.runs.result_weights import better_checkpoint
from qlora_tui.runs.run_summary import WORSE, RunSummary
from qlora_tui.runs.status import ACTIVE, RESUMABLE
from qlora_tui.tui import clock
from qlora_tui.tui.breakpoints import WIDE_CELLS
from qlora_tui.tui.key_names import highlight_keys, key_name, name_keys
from qlora_tui.tui.render.columns import Column, cut_sentence, table
from qlora_tui.tui.render.labels import (
    BEST,
    SIGNS,
    format_ago,
    recipe_facts,
    result_label,
    verdict_content,
)
from qlora_tui.tui.render.loss import changes_of_loss, lowest_losses, shapes_of_loss
from qlora_tui.tui.render.meters import labeled
from qlora_tui.tui.screens.runs.export_dialog import export_line
from qlora_tui.tui.widgets.controls import LIST_KEYS, LineView, cursor_row, render_line

MARKS = "ABCD"
"""Letters that mark the runs selected for comparison, in the list and in the graph of losses. No run state
uses one of these letters as its symbol.
"""
_LOSS_WIDTH, _SHAPE_WIDTH = 9, 20
"""Maximum widths of the columns with the validation loss and with its graph, in cells."""

_DAYS_OF_WEEK = 7


def when(summary: RunSummary, now: float) -> str:
    """Return when a run was queued or, if unknown, when its status last changed: ``03:12`` for today,
    ``Mon 03:12`` for the six days before, or ``23 Nov`` for other days; ``NA`` if neither is known. ``now``:
    the current Unix time.
    """
    at = summary.queued_at or summary.status.at
    if not at:
        return "NA"
    days = date.fromtimestamp(now) - date.fromtimestamp(at)
    form = "%H:%M" if not days else "%a %H:%M" if 0 < days.days < _DAYS_OF_WEEK else "%d %b"
    return time.strftime(form, time.localtime(at))


def best_loss(summary: RunSummary, lowest: Collection[str]) -> Content:
    """Return the best validation loss, such as ``2.780★``, where the star marks a run in ``lowest``. If there
    was no validation, return the last training loss, such as ``2.630*``; if there is no loss, return an empty
    text. The last character is a mark or a space, so that the numbers in a column are aligned.

    ``lowest``: ids of the runs with the lowest loss, from :func:`.lowest_losses`.
    """
    loss, mark = (summary.loss, "*") if summary.best is None else (summary.best[0], " ")
    if loss is None:
        return Content()
    if summary.id in lowest:
        return Content.styled(f"{format_loss(loss)}{BEST}", "$validation bold")
    return Content(f"{format_loss(loss)}{mark}")


_MIN_REASON, _MIN_SHORT_REASON = 28, 17
"""Minimum width, in cells, of the column with the reason why a run ended: in a list of at least
:data:`.WIDE_CELLS` cells, and in a narrower one, in which settings that differ are more important. The column
fills the width that the other columns leave.
"""
_TIME_OF_DAY = re.compile(r"-\d{4}(-\d+)?$")
"""Matches the time of day, and the number that may follow it, at the end of a generated name such as
``owls-20261130-0752-2``.
"""
_SETTINGS_DROPPED = 8
"""Position of the first setting in the order in which columns are left out. Settings are left out last."""
_HEAD = 15
"""Width of the first column, with mark and state, in cells."""


def short_name(name: str, width: int) -> str:
    """Return a name shortened to ``width`` cells. A time of day at the end of the name is kept, since the
    names of runs of the same day often differ only in the time.
    """
    time_of_day = _TIME_OF_DAY.search(name)
    kept = time_of_day[0] if time_of_day else ""
    return shorten_name(name.removesuffix(kept), width - len(kept)) + kept


def reason(summary: RunSummary) -> Content:
    """Return, in a few words, why the run ended or is waiting; for an active run, its devices. The text is
    empty if all steps were completed.
    """
    if summary.failure:
        return Content(summary.failure)
    text = summary.status.detail.replace("\n", " ")
    if not text and summary.status.state in ACTIVE:
        text = summary.devices
    # The state is in the first column.
    state = "Waiting " if summary.status.state == "queued" else f"{capitalize(summary.status.state)} "
    if text.startswith(state):
        text = text.removeprefix(state).rstrip(".")
    return Content("" if text == ALL_STEPS_DONE else text)


def _need_exponents(numbers: Iterable[str]) -> bool:
    """Return whether a column writes these numbers with exponents, because one of them needs an exponent."""
    return any("e-" in number for number in numbers)


def rates_have_exponents(rows: Sequence[RunSummary]) -> bool:
    """Return whether a list of these runs has a column of learning rates with exponents."""
    rates = {each.value for row in rows for each in row.settings if each.title == "lr"}
    return len(rates) > 1 and _need_exponents(rates)


def _setting_columns(rows: Sequence[RunSummary]) -> Iterator[Column[RunSummary]]:
    """Yield a column for each setting in which the runs differ. If there is no room for all, the settings
    with the fewest different values are left out first.
    """
    readable = [row.settings for row in rows if row.settings]
    variety = {same[0].title: len(set(same)) for same in zip(*readable, strict=True)}
    order = sorted(variety, key=variety.__getitem__)

    def value(place: int, has_exponents: bool, row: RunSummary) -> str:
        if not row.settings:
            return ""
        number = row.settings[place].value
        return with_exponent(number) if has_exponents else number

    for place, title in enumerate(variety):
        if variety[title] > 1:
            # A column has one notation, with the exponents below each other.
            has_exponents = _need_exponents(settings[place].value for settings in readable)
            yield Column(
                title=title,
                text=partial(value, place, has_exponents),
                right=has_exponents,
                dropped=_SETTINGS_DROPPED + order.index(title),
            )


def _columns(rows: Sequence[RunSummary], width: int) -> tuple[Column[RunSummary], ...]:
    """Return the columns of a list of these runs, to the right of the column with mark and state. ``width``:
    width of the list, in cells.
    """
    changes, shapes, lowest = changes_of_loss(rows), shapes_of_loss(rows, _SHAPE_WIDTH), lowest_losses(rows)

    return (
        Column(title="queued", text=lambda s: when(s, clock.now()), right=True, gap=0),
        Column(title="run", text=lambda s: s.name, shrinks=True, min_width=16, shorter=short_name),
        Column(title="model", text=lambda s: s.model, max_width=24, dropped=3, shown_if_same=False),
        Column(title="data", text=lambda s: s.data, max_width=24, dropped=2, shown_if_same=False),
        *_setting_columns(rows),
        Column(
            title="steps",
            text=lambda s: format_progress(s.step, s.total_steps) if s.total_steps else "",
            max_width=17,
            right=True,
            dropped=4,
        ),
        Column(
            title="validation",
            text=lambda s: shapes.get(s.id, ""),
            style="$validation",
            dropped=1,
            shown_if_empty=False,
        ),
        Column(title="★ val ", text=partial(best_loss, lowest=lowest), max_width=_LOSS_WIDTH, right=True),
        Column(
            title="exact",
            text=lambda s: "" if s.accuracy is None else format_percent(s.accuracy),
            right=True,
            shown_if_empty=False,
        ),
        Column(title="change", text=lambda s: changes.get(s.id, ""), dropped=7, shown_if_empty=False),
        Column(
            title="trained",
            text=lambda s: "" if s.seconds is None else format_duration(s.seconds),
            max_width=11,
            right=True,
            dropped=5,
        ),
        Column(
            title="mean tok/s",
            text=lambda s: "" if s.tokens_per_s is None else format_speed(s.tokens_per_s),
            right=True,
            dropped=1,
        ),
        Column(
            title="memory",
            text=lambda s: "" if s.peak_bytes is None else format_bytes(s.peak_bytes),
            right=True,
            dropped=1,
        ),
        Column(
            title="reason",
            text=reason,
            shrinks=True,
            min_width=_MIN_REASON if width >= WIDE_CELLS else _MIN_SHORT_REASON,
            shown_if_empty=False,
            is_sentence=True,
        ),
    )


class RunTable(LineView):
    """A list with one line per run, below a fixed header line."""

    BINDINGS: ClassVar[list[BindingType]] = [*LIST_KEYS]

    class Moved(Message):
        """Posted when the cursor has moved to another run."""

    class Opened(Message):
        """Posted when the run under the cursor is clicked."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: tuple[RunSummary, ...] = ()
        self._waiting: tuple[str, ...] = ()
        self._marked: tuple[str, ...] = ()
        self._drawn: list[Content] = []
        self._drawn_at = 0
        self._cursor = 0
        self._is_moved = False
        """Whether the user has moved the cursor to a run other than the first."""
        self.starts_at_top = True
        """Whether the next call of :meth:`show` moves the cursor to the first run."""

    @property
    def current(self) -> RunSummary | None:
        """The run under the cursor; None if the list is empty."""
        return self._rows[self._cursor] if self._rows else None

    def start_at_top(self) -> None:
        """Let the next call of :meth:`show` move the cursor to the first run, unless the user has moved the
        cursor.
        """
        self.starts_at_top = not self._is_moved

    def show(self, rows: Sequence[RunSummary], waiting: tuple[str, ...], marked: tuple[str, ...]) -> None:
        """Show these runs. The cursor stays on its run, and only lines that have changed are repainted.

        Args:
            rows: The runs, in display order.
            waiting: Ids of the queued runs, in the order of the queue.
            marked: Ids of the runs selected for comparison, in the order of :data:`MARKS`.
        """
        current = self.current
        self._rows, self._waiting, self._marked = tuple(rows), waiting, marked
        names = [row.id for row in self._rows]
        grows = self.virtual_size.height != len(names) + 1
        if self.starts_at_top:
            self._cursor, self.starts_at_top = 0, False
        elif current is not None and current.id in names:
            self._cursor = names.index(current.id)
        self._cursor = min(self._cursor, max(0, len(names) - 1))
        self.virtual_size = Size(1, len(names) + 1)
        if grows:
            self.refresh(layout=True)
        self._redraw()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Return the number of runs plus one line for the titles. The remaining height is left to the panel
        below.
        """
        return len(self._rows) + 1

    def action_move(self, places: int) -> None:
        """Move the cursor down by this many runs, or up if ``places`` is negative. The cursor stops at either
        end.
        """
        self._go_to(self._cursor + places)

    def on_click(self, event: Click) -> None:
        line = event.y + round(self.scroll_y) - 1
        if event.y > 0 and 0 <= line < len(self._rows):
            if line == self._cursor:
                self.post_message(self.Opened())
            self._go_to(line)

    def watch_has_focus(self, has_focus: bool) -> None:
        super().watch_has_focus(has_focus)
        self._redraw()

    def render_line(self, y: int) -> Strip:
        width = self.scrollable_content_region.width
        if self._drawn_at != width:
            self._drawn_at, self._drawn = width, self._draw()
        line = 0 if y == 0 else y + round(self.scroll_y)
        content = self._drawn[line] if line < len(self._drawn) else Content("")
        return render_line(self, content, width)

    def _go_to(self, row: int) -> None:
        row = min(max(row, 0), max(0, len(self._rows) - 1))
        if row == self._cursor:
            return
        self._cursor = row
        self._is_moved, self.starts_at_top = row > 0, False
        # Use a height of 2: the header line covers the top line of the region.
        self.scroll_to_region(Region(0, row, 1, 2), animate=False, force=True)
        self._redraw()
        self.post_message(self.Moved())

    def _redraw(self) -> None:
        before, self._drawn = self._drawn, self._draw()
        self._drawn_at = self.scrollable_content_region.width
        if len(before) != len(self._drawn):
            self.refresh()
            return
        for line, (old, new) in enumerate(zip(before, self._drawn, strict=True)):
            if not old.is_same(new):
                self.refresh_line(line)

    def _draw(self) -> list[Content]:
        width = self.scrollable_content_region.width
        head = Column[RunSummary](text=self._head, width=_HEAD)
        # A scroll bar is not next to a text.
        room = width - self.show_vertical_scrollbar
        titles, *lines = table((head, *_columns(self._rows, room)), self._rows, room, title_style="")
        if lines:
            titles = titles.pad_right(lines[0].cell_length - titles.cell_length)
            line = lines[self._cursor]
            lines[self._cursor] = cursor_row(self, line, width) if self.has_focus else line.stylize("bold")
        return [titles.stylize("dim"), *lines]

    def _head(self, row: RunSummary) -> Content:
        mark = MARKS[self._marked.index(row.id)] if row.id in self._marked else " "
        sign, word, style = result_label(row.status, row.defect)
        if row.id in self._waiting:
            # All queued runs have the same symbol and color. The reason says what a run waits for.
            sign, style = SIGNS["queued"]
            word = f"queue {self._waiting.index(row.id) + 1}"
        bar = " " if self.app.no_color else "▌"
        return Content.assemble((bar, style), (f"{mark} ", "$primary"), (f"{sign} {word:<10}", style))


_LABEL = 10
"""Width of a label in the preview, in cells."""
_MAX_EXPORTS = 8
_MAX_LOG_LINES = 60
_MAX_EVENTS = 2000
"""Number of events, from the newest, that are read to fill the log. Most of them are steps, which the log
leaves out.
"""


@dataclass(frozen=True)
class RunFiles:
    """What the preview shows of a run's folder."""

    recipe: Recipe | None
    """The run's recipe; None if it cannot be read."""
    exports: tuple[Export, ...]
    checkpoints: tuple[int, ...]
    """Steps of the checkpoints, oldest first."""
    has_adapter: bool
    bytes: int
    """Total size of the folder, in bytes."""
    log: tuple[tuple[float, str], ...]
    """(Unix time, text) of the last events, newest first, without steps, progress and answers."""

    @classmethod
    def read(cls, summary: RunSummary) -> RunFiles:
        """Read the run's folder. This can be slow, so call it in a thread."""
        recipe = summary.run.readable_recipe()
        return cls(
            recipe,
            tuple(read_exports(summary.run)),
            tuple(step for step, _ in summary.run.checkpoints()),
            summary.run.adapter_dir.is_dir(),
            _size(summary.run.path),
            _log(summary),
        )


def can_be_used(summary: RunSummary, files: RunFiles | None) -> bool:
    """Return whether the run has saved an adapter or checkpoint to chat with, export or compare. ``files``:
    contents of the run's folder; None if they have not been read yet, in which case the result is True.
    """
    if files is None or summary.status.state == "finished":
        return True
    return bool(files.checkpoints) or files.has_adapter


def run_keys(summary: RunSummary, files: RunFiles | None) -> tuple[tuple[str, str], ...]:
    """Return (command, verb) for the keys of the run's panel. Chat and Export are included only if
    :func:`can_be_used` is True. If they propose a checkpoint, the verbs give its step. They propose a
    checkpoint that is notably better than the last weights or, if there is none and the run is active, the
    last checkpoint.
    """
    if not can_be_used(summary, files):
        return (("runs.open", "open"),)
    saved = () if files is None else files.checkpoints
    step = better_checkpoint(summary, saved)
    if step is None and saved and summary.status.state in ACTIVE:
        step = saved[-1]
    weights = "" if step is None else f" step {step:,}"
    chat = f"chat with{weights}" if weights else "chat"
    return (("runs.open", "open"), ("runs.chat", chat), ("runs.export", f"export{weights}"))


def preview_title(summary: RunSummary) -> str:
    """Return the run's name, followed by its id if the id differs from the name."""
    return summary.name if summary.name == summary.id else f"{summary.name}  ({summary.id})"


def detail_lines(
    summary: RunSummary, files: RunFiles | None, shared: Collection[MainSetting] = ()
) -> list[Content]:
    """Return lines for a window without room for the preview: facts about the run, and how it ended.

    Args:
        summary: The run.
        files: Contents of the run's folder; None if they have not been read yet.
        shared: The settings that all listed runs share, which the title of the list names.
    """
    facts = [part for part in (summary.model, setting_words(summary.settings, shared)) if part]
    if summary.accuracy is not None:
        facts.append(f"{format_percent(summary.accuracy)} of short answers exactly right")
    if summary.energy:
        facts.append(summary.energy)
    second = Content("  ").join(ending(summary, files))
    if summary.verdict is not None and summary.defect is None and summary.status.state == "finished":
        second = verdict_content(summary.verdict)
    if files is not None and files.exports:
        head = Content.styled("  Export: " if second else "Export: ", "dim")
        second += head + export_line(files.exports[0])
    return [Content(" · ".join(facts)), *([second] if second else [])]


def ending(summary: RunSummary, files: RunFiles | None, *, beside_verdict: bool = False) -> list[Content]:
    """Return lines that say why the run ended, what is wrong with its result, and what to do; empty if there
    is nothing to report.

    Args:
        summary: The run.
        files: Contents of the run's folder; None if they have not been read yet.
        beside_verdict: Whether the verdict is also shown. If so, a validation loss that has risen is not
            reported here, because the verdict reports it.
    """
    text = summary.status.detail.replace("\n", " ")
    text = "" if text == ALL_STEPS_DONE else capitalize(text)
    detail = Content(text).stylize("bold $error", 0, len(summary.failure))
    is_said = beside_verdict and summary.verdict is not None
    wrong = (
        summary.defect.sentence if summary.defect and not (is_said and summary.defect.word == WORSE) else ""
    )
    lines = [Content.assemble((f"{wrong} " if wrong else "", "$error"), detail)] if wrong or text else []
    if summary.fix:
        lines.append(Content.assemble(("▸ ", "$primary"), summary.fix))
    if summary.status.state in RESUMABLE:
        step = "" if files is None else f" from step {files.checkpoints[-1] if files.checkpoints else 0:,}"
        lines.append(highlight_keys(f"{key_name('runs.resume')} resumes it{step}."))
    return lines


def result_lines(summary: RunSummary, now: float, width: int, answers: str = "") -> list[Content]:
    """Return lines with the run's results.

    Args:
        summary: The run.
        now: The current Unix time.
        width: Available width, in cells.
        answers: Progress of comparing the run's answers; empty if they are not being compared.
    """
    status = summary.status
    sign, word, style = result_label(status, summary.defect)
    rows: list[tuple[str, Content | str]] = [("state", Content.styled(f"{sign} {word}", style))]
    # The status of an active run has the time of the last heartbeat, so the start is shown instead.
    is_active = status.state in ACTIVE
    if at := summary.started_at if is_active else status.at:
        since = (
            "started" if is_active else {"queued": "queued", "paused": "paused"}.get(status.state, "ended")
        )
        rows.append((since, format_ago(at, now).removeprefix("at ")))
    if summary.devices:
        rows.append(("device", summary.devices))
    if summary.total_steps:
        rows.append(("steps", format_progress(summary.step, summary.total_steps)))
    if summary.best is not None:
        loss, step = summary.best
        rows.append(("best", f"validation {format_loss(loss)} at step {step:,}"))
    elif summary.loss is not None:
        rows.append(("last", f"training {format_loss(summary.loss)}"))
    # A verdict already includes the loss before training.
    if summary.loss_to_beat is not None and summary.verdict is None:
        rows.append(("before", f"{format_loss(summary.loss_to_beat)}, lower than after training"))
    if summary.accuracy is not None:
        rows.append(("exact", f"{format_percent(summary.accuracy)} of short answers"))
    if summary.seconds is not None:
        left = "" if summary.seconds_left is None else f", {format_duration(summary.seconds_left)} left"
        if done_at := done_at_words(summary.seconds_left):
            left += f", done {done_at}"
        rows.append(("trained", f"{format_duration(summary.seconds)}{left}"))
    if summary.energy:
        rows.append(("energy", summary.energy))
    if answers:
        rows.append(("answers", answers))
    lines = _rows(rows, width)
    if summary.verdict is not None:
        lines += verdict_content(summary.verdict).wrap(width)
        if not summary.verdict.has_answers and not answers:
            compares = name_keys("{runs.evaluate} compares answers with the base's.")
            lines.append(highlight_keys(compares, "dim"))
    return lines


def settings_lines(recipe: Recipe | None, width: int, *, has_exponents: bool = False) -> list[Content]:
    """Return lines with the settings that most often differ between runs. ``recipe``: None if it cannot be
    read. ``has_exponents``: whether to write the learning rate with an exponent, as the list of runs does.
    """
    if recipe is None:
        return [Content.styled("The recipe cannot be read.", "$error")]
    rows: list[tuple[str, Content | str]] = []
    for label, value in recipe_facts(recipe, width - _LABEL):
        rate, *rest = value.split(" ", 1) if label == "lr" and has_exponents else (value,)
        rows.append((label, " ".join([with_exponent(rate), *rest]) if rest else value))
    if recipe.note:
        rows.append(("note", " ".join(recipe.note.split())))
    return _rows(rows, width)


def files_lines(summary: RunSummary, files: RunFiles, width: int) -> list[Content]:
    """Return lines with the run's size, number of checkpoints, folder and exports."""
    size = f"{format_bytes(files.bytes)}, {pluralize(len(files.checkpoints), 'checkpoint')}"
    rows = _rows([("size", size), ("folder", format_path(summary.run.path))], width)
    if not files.exports and not files.checkpoints and summary.status.state != "finished":
        return rows
    if not files.exports:
        return [*rows, highlight_keys(name_keys("Not exported yet: {runs.export} writes a GGUF."), "dim")]
    return rows + [export_line(export, width) for export in files.exports[:_MAX_EXPORTS]]


def log_lines(log: Sequence[tuple[float, str]], width: int, height: int) -> list[Content]:
    """Return the last events of a run in at most ``height`` lines, the newest event last. Long texts are
    shortened by :func:`cut_sentence`. ``log``: (Unix time, text) of each event, the newest first.
    """
    if not log:
        return [Content.styled("Nothing has happened yet.", "dim")]
    lines = []
    for at, text in reversed(log[:height]):
        moment = Content.styled(f"{time.strftime('%H:%M', time.localtime(at))}  ", "dim")
        lines.append(moment + cut_sentence(Content(text), width - moment.cell_length))
    return lines


def _rows(rows: list[tuple[str, Content | str]], width: int) -> list[Content]:
    """Return a line for each (label, value). If a value given as a string is too long, its middle is left
    out.
    """
    lines = []
    for label, value in rows:
        text = Content(truncate_middle(value, width - _LABEL)) if isinstance(value, str) else value
        lines.append(labeled(label, text, _LABEL))
    return lines


def _size(folder: Path) -> int:
    """Return the total size in bytes of all files in the folder. A file that is deleted in the meantime
    counts as 0.
    """
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(path) / name).lstat().st_size
            except OSError:
                continue
    return total


def _log(summary: RunSummary) -> tuple[tuple[float, str], ...]:
    try:
        events = islice(events_backwards(summary.run.events_path), _MAX_EVENTS)
        others = (event for event in events if not isinstance(event, Step | Progress | SampleGenerated))
        return tuple(
            (event.at, " ".join(describe(event, summary.total_steps).split()))
            for event in islice(others, _MAX_LOG_LINES)
        )
    except OSError:
        return ()
