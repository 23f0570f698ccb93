"""The live half of the Train screen: the current state of one run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby

import psutil
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widgets import Static

from qlora_tui.tui import clock
from qlora_tui.tui.key_names import bare_key, highlight_keys, key_name
from qlora_tui.tui.screens.train.gpu_panel import GpuPanel, MachineState
from qlora_tui.tui.screens.train.log_tail import SIGNS, Level, LogEntry, LogTail
from qlora_tui.tui.screens.train.run_charts import loss_plot, sparkline_data, steps_axis
from qlora_tui.tui.screens.train.run_follower import RunSnapshot
from qlora_tui.tui.screens.train.run_header import RunHeader, RunOutcomeText, outcome_text
from qlora_tui.tui.screens.train.sparklines import Sparklines
from qlora_tui.tui.screens.train.tab_bar import TabBar
from qlora_tui.tui.widgets.graph import Graph

_LEVELS: tuple[tuple[str, frozenset[Level]], ...] = (
    ("", frozenset(SIGNS)),
    ("warnings only", frozenset(("warning", "error"))),
    ("errors only", frozenset(("error",))),
)
TABS = ("log", "samples", "health", "output")
_NO_EVENTS = "No events yet."
_EMPTY = {
    "samples": "No samples yet. Sample prompts (training.sample_prompts) are answered at each evaluation.",
    "health": "No warnings.",
    "output": "No output yet.",
}
"""Text of a tab without entries; the others show ``_NO_EVENTS``."""


class LivePane(Vertical):
    """Header, graph, sparklines, GPU panel, and one of four tabs."""

    def __init__(self) -> None:
        super().__init__(id="live")
        self._snapshot: RunSnapshot | None = None
        self._search = ""
        self._level = 0
        self._host_bytes = psutil.virtual_memory().total
        self._cores = os.cpu_count() or 1

    def compose(self) -> ComposeResult:
        yield RunHeader()
        yield Static(id="run-outcome", markup=False)
        with Horizontal(id="live-top"):
            with Vertical(id="live-curves"):
                yield Graph(empty="Reading the run…")
                yield Sparklines()
            yield GpuPanel()
        yield TabBar(TABS)
        yield LogTail(_NO_EVENTS)

    def show(self, snapshot: RunSnapshot, from_step: float = 0.0) -> None:
        """Show the snapshot; unchanged parts are not painted again."""
        self._snapshot = snapshot
        self.query_one(RunHeader).show(snapshot, clock.now())
        self._show_outcome(snapshot)
        self.query_one(Graph).show(loss_plot(snapshot, from_step))
        x = steps_axis(snapshot.step, snapshot.view.total_steps, from_step)
        self.query_one(Sparklines).show(sparkline_data(snapshot), x)
        self.query_one(GpuPanel).show(self._machine(snapshot))
        self.show_tab(self.query_one(TabBar).front)

    def show_tab(self, name: str) -> None:
        """Put one of the texts in front."""
        snapshot = self._snapshot
        if snapshot is None:
            return
        notes = {"samples": str(len(snapshot.samples) or ""), "health": _health_note(snapshot)}
        does = {"train.tab": "next", "train.search": "search", "train.level": "level"}
        keys = " · ".join(f"{bare_key(command)} {verb}" for command, verb in does.items())
        self.query_one(TabBar).show(name, notes, keys, self._left_out())
        self.query_one(LogTail).show(_entries(snapshot, name), _EMPTY.get(name, _NO_EVENTS))

    def next_tab(self, places: int) -> None:
        """Go along the tabs."""
        front = TABS.index(self.query_one(TabBar).front)
        self.show_tab(TABS[(front + places) % len(TABS)])

    @property
    def search(self) -> str:
        """The text that lines are searched for."""
        return self._search

    def search_for(self, text: str) -> None:
        """Show only lines with this text."""
        self._search = text
        self.query_one(LogTail).filter(search=text)
        self.show_tab(self.query_one(TabBar).front)

    def next_level(self) -> None:
        """All lines, then warnings and errors, then errors."""
        self._level = (self._level + 1) % len(_LEVELS)
        self.query_one(LogTail).filter(only=_LEVELS[self._level][1])
        self.show_tab(self.query_one(TabBar).front)

    def begin(self) -> None:
        """Reset the tabs for another run."""
        self._level, self._search = 0, ""
        log = self.query_one(LogTail)
        log.filter(search="", only=_LEVELS[0][1])
        log.anchor()
        log.focus()

    def _show_outcome(self, snapshot: RunSnapshot) -> None:
        outcome = outcome_text(snapshot)
        box = self.query_one("#run-outcome", Static)
        text = "" if outcome is None else f"{outcome.text}\n{outcome.next_step}"
        if str(box.content) != text:
            box.update(text if outcome is None else _outcome_content(outcome))
        box.display = outcome is not None
        box.set_class(outcome is not None and outcome.is_error, "-error")

    def _left_out(self) -> str:
        """The filters that hide lines."""
        search = f"/{self._search}" if self._search else ""
        return " ".join(filter(None, (search, _LEVELS[self._level][0])))

    def _machine(self, snapshot: RunSnapshot) -> MachineState:
        view = snapshot.view
        over = snapshot.status.state not in ("starting", "running")
        return MachineState(
            device=view.environment.device.removeprefix("NVIDIA GeForce ") if view.environment else "",
            samples=snapshot.telemetry,
            estimate_bytes=view.memory.estimated_bytes if view.memory else None,
            host_bytes=self._host_bytes,
            cores=self._cores,
            note="Last readings of the run." if over and snapshot.telemetry else "",
        )


def _entries(snapshot: RunSnapshot, tab: str) -> Sequence[LogEntry]:
    match tab:
        case "log":
            return snapshot.entries
        case "output":
            return snapshot.output
        case "samples":
            return _sample_entries(snapshot)
        case _:
            return _health_entries(snapshot)


def _sample_entries(snapshot: RunSnapshot) -> tuple[LogEntry, ...]:
    entries: list[LogEntry] = []
    step = -1
    for sample in snapshot.samples:
        if sample.step != step:
            step = sample.step
            entries.append(LogEntry(None, "info", f"── step {step:,} ──"))
        entries.append(LogEntry(None, "info", f"▸ {sample.prompt}"))
        entries += [LogEntry(None, "info", f"  {line}") for line in sample.answer.splitlines() or [""]]
    return tuple(entries)


def _health_entries(snapshot: RunSnapshot) -> tuple[LogEntry, ...]:
    """One entry for consecutive equal warnings."""
    entries = []
    for _, group in groupby(
        snapshot.health, key=lambda health: (health.kind, health.severity, health.remedy)
    ):
        warnings = list(group)
        first, last = warnings[0], warnings[-1]
        steps = f"step {first.step:,}" if len(warnings) == 1 else f"steps {first.step:,} to {last.step:,}"
        times = "" if len(warnings) == 1 else f" ({len(warnings)} times)"
        entries.append(LogEntry(last.at, last.severity, f"{steps}: {last.evidence}{times} ▸ {last.remedy}"))
    if snapshot.fix is not None:
        entries.append(LogEntry(None, "info", f"▸ {key_name('train.fix')} {snapshot.fix.label}"))
    return tuple(entries)


def _health_note(snapshot: RunSnapshot) -> str:
    errors = sum(h.severity == "error" for h in snapshot.health)
    if errors:
        return f"✗{errors}"
    return f"!{len(snapshot.health)}" if snapshot.health else ""


def _outcome_content(outcome: RunOutcomeText) -> Content:
    return Content.assemble(f"{outcome.text}\n", highlight_keys(outcome.next_step))
