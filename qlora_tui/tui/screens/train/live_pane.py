"""The live pane of the Train screen: the current state of a run, with its log."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import ClassVar

import psutil
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.css.query import NoMatches
from textual.geometry import Size
from textual.strip import Strip

from qlora_tui.formatting import pluralize, truncate_middle
from qlora_tui.runs.devices import devices_of
from qlora_tui.runs.events import Failed
from qlora_tui.runs.status import ACTIVE
from qlora_tui.tui import clock
from qlora_tui.tui.key_names import bare_key, highlight_keys, name_keys
from qlora_tui.tui.render.columns import hanging
from qlora_tui.tui.render.plot import LEAST_CHART, no_plot, plot
from qlora_tui.tui.screens.train.machine_panel import MachineState, machine_lines
from qlora_tui.tui.screens.train.outcome import fix_text, outcome_has_fix, outcome_lines, outcome_text
from qlora_tui.tui.screens.train.run_follower import Level, LogEntry, RunSnapshot
from qlora_tui.tui.screens.train.run_panels import (
    count_warnings,
    evaluation_lines,
    finding_line,
    header_lines,
    health_lines,
    key_figures,
    other_warnings,
    sample_lines,
    samples_title,
    setup_lines,
)
from qlora_tui.tui.screens.train.stage_panel import is_starting, stage_lines
from qlora_tui.tui.screens.train.step_charts import graph_lines, loss_plot, step_charts
from qlora_tui.tui.textual_compat import follow_end
from qlora_tui.tui.widgets.controls import (
    SCROLL_KEYS,
    Draw,
    Drawing,
    Lines,
    LineView,
    Panel,
    render_line,
    wrapped,
)

SIGNS: dict[Level, tuple[str, str]] = {
    "info": (" ", ""),
    "warning": ("!", "$warning"),
    "error": ("✗", "$error"),
}
"""(symbol, color) of a log entry, by level."""
LEVELS: tuple[tuple[str, frozenset[Level]], ...] = (
    ("", frozenset(SIGNS)),
    ("warnings only", frozenset(("warning", "error"))),
    ("errors only", frozenset(("error",))),
)
_ENDED_WELL = ("finished", "stopped", "paused")
"""If a run has ended in one of these states, the machine's last readings are hidden, since they do not
explain the end.
"""
_TABS = ("log", "answers", "health", "output")
_RUN_KEYS = (("train.another", "other run"), ("train.copy", "copy command"))
_LEAVE = ("app.quit", "leave; it trains on")
_GRAPH = "Loss and pace"
_GRAPH_KEYS = (("train.zoom_in", "zoom in"), ("train.zoom_out", "zoom out"))
_LOG_KEYS = (("train.tab", "next"), ("train.search", "search"), ("train.level", "warnings"))
_MAX_NAME = 70
"""Maximum width of a run's name in a panel's title, in cells. The app needs a window of at least 80 cells."""
_LEAST_TEXT = 8
"""Minimum width of a log entry's text after the time, in cells."""
_TITLE_FRAME = 4
"""Width of the border to the left and right of a panel's title, in cells."""
_NO_EVENTS = "No events yet."
_EMPTY = {
    "answers": "No answers yet. Sample prompts are answered at each evaluation.",
    "health": "No warnings.",
}
"""Text of a tab without entries. Tabs that are not listed here show ``_NO_EVENTS``."""
_ANSWER_NOW = " Press {train.sample} to answer them now."


_LEAST_LOG = 3
"""Minimum height of the log's panel, in rows; the style sheet has it too."""


class LivePane(Vertical):
    """The panels for one run: header, graph and log, and next to them GPU, health, setup and evaluations."""

    def __init__(self) -> None:
        super().__init__(id="live")
        self._snapshot: RunSnapshot | None = None
        self._front = _TABS[0]
        self._host_bytes = psutil.virtual_memory().total
        self._cores = os.cpu_count() or 1

    def compose(self) -> ComposeResult:
        yield Panel(
            "Run",
            Drawing(id="run-header"),
            Lines(id="run-outcome"),
            Drawing(id="run-finding"),
            id="run-panel",
        )
        with Horizontal(id="live-body"):
            with Vertical(id="live-side"):
                yield Panel("Machine", Drawing(id="gpu"), id="gpu-panel")
                yield Panel("Health", Drawing(id="health"), id="health-panel")
                yield Panel("Validation", Drawing(id="evaluations"), id="evaluations-panel")
                yield Panel("Setup", Drawing(id="setup"), id="setup-panel")
                yield Panel("Answers", Drawing(id="samples"), id="samples-panel")
            with Vertical(id="live-main"):
                reading = partial(plot, no_plot("Reading the run…"))
                graph = Drawing(reading, id="loss-graph", classes="graph")
                yield Panel(_GRAPH, graph, Drawing(id="stages"), id="graph-panel")
                yield Panel("", LogTail(_NO_EVENTS), keys=_LOG_KEYS, id="log-panel")

    def show(
        self, snapshot: RunSnapshot, from_step: float = 0.0, active: str = "", answers: str = ""
    ) -> None:
        """Show the snapshot. Unchanged parts are not repainted.

        Args:
            snapshot: The run's current state.
            from_step: The step at which the graphs begin.
            active: Id of another run that is training now; empty if there is none.
            answers: Progress of comparing this run's answers; empty if they are not being compared.
        """
        self._snapshot = snapshot
        panel = self.query_one("#run-panel", Panel)
        panel.show_title(truncate_middle(snapshot.view.run.name, _MAX_NAME))
        panel.show_keys((*_RUN_KEYS, _LEAVE) if snapshot.status.state in ACTIVE else _RUN_KEYS)
        self.query_one("#run-header").set_class(bool(key_figures(snapshot)), "-large")
        has_bar = not self.app.no_color
        self._draw("run-header", partial(header_lines, snapshot, clock.now(), has_bar=has_bar))
        outcome, box = outcome_text(snapshot, active, answers), self.query_one("#run-outcome", Lines)
        if not box.content_size.width:  # hidden so far: without a text, it would have no rows to be laid out
            box.show(outcome or Content(""))
        self.call_after_refresh(box.show, partial(outcome_lines, outcome or Content("")))
        box.display = outcome is not None
        self._draw("run-finding", partial(finding_line, snapshot))
        self.set_class(bool(snapshot.fix and snapshot.fix.evidence), "-finding")
        self._show_graph(snapshot, from_step)
        self._show_side(snapshot)
        self.show_tab(self._front)
        self.call_after_refresh(self._divide_rows)

    def _divide_rows(self) -> None:
        """If the graph and the log do not both fit, replace the graph with two lines, one for the loss and
        one for the other values, and give all other rows to the log.
        """
        try:
            main, panel = self.query_one("#live-main"), self.query_one("#graph-panel")
        except NoMatches:  # the screen is being closed
            return
        least = LEAST_CHART + 1 + panel.gutter.height + panel.styles.margin.height
        self.set_class(main.size.height < least + _LEAST_LOG, "-low")

    def _show_graph(self, snapshot: RunSnapshot, from_step: float) -> None:
        starting = is_starting(snapshot)
        panel = self.query_one("#graph-panel", Panel)
        self.set_class(starting, "-starting")
        waits = snapshot.status.state == "queued"
        panel.show_title(("Waiting" if waits else "Starting") if starting else _GRAPH)
        panel.show_keys(() if starting else _GRAPH_KEYS)
        graph, stages = self.query_one("#loss-graph", Drawing), self.query_one("#stages", Drawing)
        graph.display, stages.display = not starting, starting
        if starting:
            stages.show(partial(stage_lines, snapshot, clock.now()))
        else:
            graph.show(partial(graph_lines, loss_plot(snapshot, from_step), step_charts(snapshot)))

    def _show_side(self, snapshot: RunSnapshot) -> None:
        machine = self._machine(snapshot)
        self.query_one("#gpu-panel", Panel).show_title(machine.title)
        self._draw("gpu", partial(machine_lines, machine))
        self.query_one("#gpu").set_class(machine.has_no_gpu, "-no-gpu").set_class(
            not machine.readings, "-empty"
        )
        self._draw("setup", partial(setup_lines, snapshot))
        self.query_one("#samples-panel", Panel).show_title(samples_title(snapshot))
        # Panels without contents are hidden, so that the remaining panels have more lines.
        health = health_lines(snapshot)
        self._draw("health", partial(wrapped, health))
        self._draw("samples", partial(sample_lines, snapshot))
        self.set_class(bool(health), "-health")
        self.set_class(bool(snapshot.samples), "-samples")
        self.set_class(bool(snapshot.evaluations), "-evaluations")
        state = snapshot.status.state
        self.set_class(state in _ENDED_WELL, "-ended")
        self.set_class(state not in (*ACTIVE, *_ENDED_WELL), "-broken")
        self._draw("evaluations", partial(evaluation_lines, snapshot))

    def _draw(self, name: str, draw: Draw) -> None:
        self.query_one(f"#{name}", Drawing).show(draw)

    def show_tab(self, name: str) -> None:
        """Show the tab with this name below the graph. If the run has no such tab, show the log. Before the
        first snapshot, do nothing.
        """
        snapshot = self._snapshot
        if snapshot is None:
            return
        self._front = name if name in _tabs(snapshot) else _TABS[0]
        empty = _EMPTY.get(self._front, _NO_EVENTS)
        if self._front == "answers" and snapshot.status.state in ACTIVE:
            empty += _ANSWER_NOW
        self.query_one(LogTail).show(_entries(snapshot, self._front), name_keys(empty))
        self._show_log_title()

    def _show_log_title(self) -> None:
        snapshot, panel = self._snapshot, self.query_one("#log-panel", Panel)
        if snapshot is None or not panel.size.width:
            return
        log = self.query_one(LogTail)
        filters = " ".join(filter(None, (f"/{log.search}" if log.search else "", LEVELS[log.level][0])))
        notes = {"answers": str(len(snapshot.samples) or ""), "health": _health_note(snapshot)}
        # In a small window, the panel's lower border, which has the keys, is left out. The title then has the
        # keys.
        has_border = panel.styles.border_bottom[0] not in ("", "none")
        hints = [Content.assemble((bare_key(key), "$key bold"), f" {verb}") for key, verb in _LOG_KEYS]
        keys = None if has_border else Content("  ").join(hints)
        width = panel.outer_size.width - _TITLE_FRAME
        panel.show_title(
            tabs_title(_tabs(snapshot), self._front, notes, filters=filters, keys=keys, width=width)
        )

    def on_resize(self) -> None:
        """Fit the log's title to the new width, and the graph to the new height."""
        self.call_after_refresh(self._show_log_title)
        self.call_after_refresh(self._divide_rows)

    def next_tab(self, places: int) -> None:
        """Show the tab that is ``places`` to the right of the current tab. Wrap around at either end."""
        if self._snapshot is not None:
            names = _tabs(self._snapshot)
            self.show_tab(names[(names.index(self._front) + places) % len(names)])

    def filter_log(self, search: str, level: int) -> None:
        """Show only lines that contain ``search`` and have one of the levels of ``LEVELS[level]``."""
        self.query_one(LogTail).filter(search, level)
        self.show_tab(self._front)

    def begin(self) -> None:
        """Prepare for another run: reset the log's filters, keep its last line in view, and focus the log."""
        log = self.query_one(LogTail)
        log.filter("", 0)
        log.anchor()
        log.focus()

    def _machine(self, snapshot: RunSnapshot) -> MachineState:
        view = snapshot.view
        device = view.environment.device.removeprefix("NVIDIA GeForce ") if view.environment else ""
        names: dict[int, str] = {}
        if snapshot.telemetry and len(snapshot.telemetry[-1].gpus) > 1 and (its := devices_of(view.run)):
            names = {each.index: str(each) for each in its.devices if each.index is not None}
            device = pluralize(len(names), "GPU")
        return MachineState(
            device=device,
            readings=snapshot.telemetry,
            gpu_names=names,
            estimate_bytes=view.memory.estimated_bytes if view.memory else None,
            host_bytes=self._host_bytes,
            cores=self._cores,
            is_over=snapshot.status.state not in ACTIVE,
        )


def _tabs(snapshot: RunSnapshot) -> tuple[str, ...]:
    """Return the names of the tabs. The tab with the trainer's own output is left out while it is empty."""
    return _TABS if snapshot.output else _TABS[:-1]


def _entries(snapshot: RunSnapshot, tab: str) -> Sequence[LogEntry]:
    if tab in ("log", "output"):
        return snapshot.entries if tab == "log" else snapshot.output
    return _sample_entries(snapshot) if tab == "answers" else _health_entries(snapshot)


def _sample_entries(snapshot: RunSnapshot) -> tuple[LogEntry, ...]:
    entries: list[LogEntry] = []
    step = -1
    for sample in snapshot.samples:
        if sample.step != step:
            step = sample.step
            entries.append(LogEntry(None, "info", f"── step {step:,} ──"))
        entries.append(LogEntry(None, "info", f"❯ {sample.prompt}"))
        entries += [LogEntry(None, "info", f"  {line}") for line in sample.answer.splitlines() or [""]]
    return tuple(entries)


def _health_entries(snapshot: RunSnapshot) -> tuple[LogEntry, ...]:
    """Return the entries of the Health tab. Consecutive equal warnings are merged into one entry.

    After the warnings come a warning about other programs, the run's failure, and the key for a fix. The key
    is left out if :func:`outcome_text` already includes it.
    """
    entries = []
    for _, group in groupby(
        snapshot.health, key=lambda health: (health.kind, health.severity, health.remedy)
    ):
        warnings = list(group)
        first, last = warnings[0], warnings[-1]
        steps = f"step {first.step:,}" if len(warnings) == 1 else f"steps {first.step:,} to {last.step:,}"
        times = "" if len(warnings) == 1 else f" ({len(warnings)} times)"
        entries.append(LogEntry(last.at, last.severity, f"{steps}: {last.evidence}{times} ▸ {last.remedy}"))
    entries += [LogEntry(at, "warning", text) for at, text in other_warnings(snapshot)]
    if isinstance(ending := snapshot.view.ending, Failed):
        entries.append(LogEntry(ending.at, "error", f"{ending.title}: {ending.what}"))
    if snapshot.fix is not None and not outcome_has_fix(snapshot):
        entries.append(LogEntry(None, "info", f"▸ {fix_text(snapshot)}"))
    return tuple(entries)


def _health_note(snapshot: RunSnapshot) -> str:
    """Return the note on the Health tab: ``✗1`` for one error or, if there are no errors, ``!2`` for two
    warnings. If there are no warnings either, the note is ``✓``; before the first step, it is empty. Warnings
    of one kind count once.
    """
    severities = list({health.kind: health.severity for health in snapshot.health}.values())
    errors = severities.count("error") + isinstance(snapshot.view.ending, Failed)
    if errors:
        return f"✗{errors}"
    if warnings := count_warnings(snapshot):
        return f"!{warnings}"
    return "✓" if snapshot.step else ""


class LogTail(LineView):
    """Shows the end of a growing log, until the user scrolls away from the end."""

    BINDINGS: ClassVar[list[BindingType]] = [*SCROLL_KEYS]

    def __init__(self, empty: str, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._empty = empty
        self._entries: Sequence[LogEntry] = ()
        self._shown_count = 0
        """Number of entries that are already in ``_lines``."""
        self._lines: list[Content] = []
        self._wrapped_at = 0
        self.search = ""
        self.level = 0
        """Index in :data:`LEVELS` of the levels that are shown."""

    def show(self, entries: Sequence[LogEntry], empty: str | None = None) -> None:
        """Show these entries. If ``entries`` is the same list as in the last call, only the entries appended
        since then are processed.

        ``empty``: the text to show if there are no entries; None to keep the last such text.
        """
        if empty is not None and empty != self._empty:
            self._empty = empty
            self.refresh()
        if isinstance(entries, tuple) and entries == self._entries:
            return
        if entries is not self._entries or len(entries) < self._shown_count:
            self._entries = entries
            self._rebuild()
        elif len(entries) > self._shown_count:
            self._append_new()

    def filter(self, search: str, level: int) -> None:
        """Show only lines that contain ``search`` and have one of the levels of ``LEVELS[level]``."""
        self.search, self.level = search, level
        self._rebuild()

    def on_mount(self) -> None:
        self.anchor()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        follow_end(self)

    def on_resize(self) -> None:
        self._rewrap()

    def _rewrap(self) -> None:
        if self._wrapped_at != self.scrollable_content_region.width:
            self._rebuild()

    def watch_show_vertical_scrollbar(self) -> None:
        # The scroll bar takes up one column when it appears, but Textual sends no resize event.
        self._rewrap()

    def render_line(self, y: int) -> Strip:
        width = self.scrollable_content_region.width
        line = y + round(self.scroll_y)
        lines = self._lines
        if not lines:
            nothing = "No line matches." if self._entries else self._empty
            lines = highlight_keys(nothing, "dim").wrap(max(1, width))
        if line >= len(lines):
            return Strip.blank(width, self.rich_style)
        return render_line(self, lines[line], width)

    def notify_style_update(self) -> None:
        self.refresh()
        super().notify_style_update()

    def _rebuild(self) -> None:
        self._lines = []
        self._shown_count = 0
        self._wrapped_at = self.scrollable_content_region.width
        self._append_new()
        self.refresh()

    def _append_new(self) -> None:
        fresh = self._entries[self._shown_count :]
        self._shown_count += len(fresh)
        only, search = LEVELS[self.level][1], self.search.casefold()
        for entry in fresh:
            if entry.level in only and search in entry.text.casefold():
                self._lines += self._wrapped(entry)
        # The layout scrolls an anchored widget to its end, since only the layout knows the visible height.
        self.virtual_size = Size(max(1, self._wrapped_at), len(self._lines))
        self.refresh()

    def _wrapped(self, entry: LogEntry) -> list[Content]:
        sign, style = SIGNS[entry.level]
        clock = "" if entry.at is None else time.strftime("%H:%M:%S ", time.localtime(entry.at))
        text = Content.styled(entry.text, style) if style else Content(entry.text)
        head = Content.assemble((clock, "dim"), (f"{sign} ", style)) if clock else Content("")
        return hanging(head, text, self._wrapped_at, _LEAST_TEXT)


def tabs_title(
    names: Sequence[str],
    front: str,
    notes: Mapping[str, str],
    *,
    filters: str,
    keys: Content | None,
    width: int,
) -> Content:
    """Return a title with the names of the tabs, such as ``log │ answers 12 │ health !2``. A click on a name
    runs ``screen.show_tab('<name>')``.

    Args:
        names: The names of the tabs.
        front: The name of the tab that is shown.
        notes: The text after a tab's name, such as a count, by name.
        filters: The search text and the level that select the lines to show; empty if all lines are shown.
            This text is always included, shortened if necessary.
        keys: Hints for keys that the lower border does not show; None for no hints. The hints are left out if
            they do not fit, or if there are filters.
        width: Available width, in cells.
    """
    parts = []
    for name in names:
        text = f" {name}{' ' if notes.get(name) else ''}{notes.get(name, '')} "
        style = "reverse bold" if name == front else "not bold $text-muted"
        parts.append(Content.styled(text, style).stylize(f"@click=screen.show_tab('{name}')"))
    line = Content.styled("│", "not bold $text-muted").join(parts)
    room = width - line.cell_length - 2
    if filters:
        line += Content.styled(f"  {truncate_middle(filters, max(1, room))}", "bold $foreground")
    elif keys is not None and keys.cell_length <= room:
        line += Content.assemble("  ", keys).stylize_before("not bold $text-muted")
    return line
