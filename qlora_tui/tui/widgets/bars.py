"""The bars of every screen: one at the top with the names of the screens and the status, and one at the
bottom with the keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, TypeAlias

from textual.app import App, RenderResult
from textual.binding import ActiveBinding
from textual.content import Content, Span
from textual.errors import NoWidget
from textual.events import Click
from textual.screen import Screen
from textual.widget import Widget

from qlora_tui.formatting import format_duration, format_gib, format_percent, format_progress, format_reading
from qlora_tui.tui.commands import NUMBERED_SCREENS
from qlora_tui.tui.key_names import bare_key, short_key
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.widgets.controls import Drawing, Lines, Panel, is_covered

if TYPE_CHECKING:
    from qlora_tui.gpu.metrics import GpuDevice, GpuMetrics
    from qlora_tui.runs.status import Status

_MARGIN = 1
_MOST_RUNS = 3
"""If at most this many runs train in addition to the active run, the top line shows the progress of each.
Otherwise it shows only their number.
"""
_GAP, _NARROW_GAP = 3, 2
"""Cells between two keys of the footer: normally, and if not all keys fit with the normal gap."""
_Items: TypeAlias = list[tuple[Content, ActiveBinding]]


class TopBar(Widget):
    """The top line: the names of the screens, and the status.

    The line never wraps: the status is shortened to the space that the screens' names leave.
    """

    DEFAULT_CSS = """
    TopBar {
        dock: top;
        height: 1;
        background: $panel;
        link-style: none;
        link-color: $foreground;
    }
    """

    def __init__(self, mode: str) -> None:
        super().__init__()
        self._mode = mode
        self._status = SystemStatus()

    def show_status(self, system_status: SystemStatus) -> None:
        """Show this status. Repaint only if its text has changed."""
        before = self.status_options(self._status)
        self._status = system_status
        if self.status_options(system_status) != before:
            self.refresh()

    def render(self) -> RenderResult:
        navigation = self._navigation()
        width_left = self.size.width - navigation.cell_length - 1
        system_status = next((p for p in self.status_options(self._status) if len(p) <= width_left), "")
        gap = " " * max(1, self.size.width - navigation.cell_length - len(system_status))
        signs = re.finditer("●", system_status)
        status = Content(system_status, [Span(*sign.span(), "$training") for sign in signs])
        return Content.assemble(navigation, gap, status)

    def _navigation(self) -> Content:
        parts: list[Content | str] = []
        for screen in NUMBERED_SCREENS:
            text = f" {bare_key(screen.opened_by.id)} {screen.label} "
            style = "reverse bold" if screen.name == self._mode else ""
            parts.append(Content.styled(text, style).stylize(f"@click={screen.opened_by.action}"))
        return Content.assemble(*parts)

    @staticmethod
    def status_options(system_status: SystemStatus) -> list[str]:
        """Return texts for the status, longest first. The first text that fits is shown."""
        if system_status.box_silent_s:
            return _silence_texts(system_status)
        runs, gpus = _run_texts(system_status), _gpu_texts(system_status)
        more = _waiting_text(system_status)
        with_more = [f"{run} · {more}" for run in runs if more]
        options = [f"{run}   {gpu}" for run in (*with_more, *runs) for gpu in gpus]
        options += [*with_more, _shares_text(system_status), *runs, gpus[-1], ""]
        if system_status.box:
            # If there is little space, only the name of the other machine is shown, not its state.
            whole = [f"{system_status.box_note or system_status.box}   {option}" for option in options]
            options = [*whole, system_status.box, *options]
        return [option.strip() + " " for option in options]


def _silence_texts(system_status: SystemStatus) -> list[str]:
    """Return texts, longest first, which say that the machine the app is connected to no longer responds. The
    longest text adds that the machine's runs continue.
    """
    silence = f"{system_status.box} has not answered for {format_duration(system_status.box_silent_s)}"
    return [f"{option} " for option in (f"{silence}; its runs continue", silence, "no answer", "")]


def _run_texts(system_status: SystemStatus) -> list[str]:
    """Return texts for the active run, longest first: ``● step 1,240 of 3,000`` and ``● 41%``. Before the
    first step, or if no run is active, there is only one text, which can be empty.
    """
    status = system_status.active_status
    if status is None:
        return [f"{len(system_status.waiting_ids)} waiting" if system_status.waiting_ids else ""]
    return _progress_texts(status)


def _progress_texts(status: Status) -> list[str]:
    """Return texts for the progress of an active run, longest first. Before the run's first step, there is
    only one text.
    """
    from qlora_tui.runs.events import STEP_PHASES, phase_label  # not needed for the first frame

    # A run that has just started or resumed has no step yet, so its phase is shown.
    if not status.step or status.phase not in STEP_PHASES:
        return [f"● {phase_label(status.phase or status.state)}"]
    texts = [f"● step {format_progress(status.step, status.total_steps)}"]
    return [*texts, f"● {format_percent(status.step / status.total_steps)}"] if status.total_steps else texts


def _shares_text(system_status: SystemStatus) -> str:
    """Return the progress of several runs, such as ``● 41% 12%``. If fewer than two runs are training, return
    the longest text of :func:`_run_texts`.
    """
    statuses = (system_status.active_status, *system_status.also_active_statuses)
    shares = [_progress_texts(status)[-1].removeprefix("● ") for status in statuses if status is not None]
    return f"● {' '.join(shares)}" if len(shares) > 1 else _run_texts(system_status)[0]


def _waiting_text(system_status: SystemStatus) -> str:
    """Return a text about other active runs, queued runs, exports and servers, such as ``● 12% · 2 waiting ·
    exporting Q8_0``; empty if there are none.
    """
    others = system_status.also_active_statuses
    parts = [_progress_texts(status)[-1] for status in others]
    if len(others) > _MOST_RUNS:
        parts = [f"{len(others)} more training"]
    if system_status.waiting_ids and system_status.active is not None:
        parts.append(f"{len(system_status.waiting_ids)} waiting")
    if exports := system_status.exports:
        parts.append(f"exporting {exports[0].form if len(exports) == 1 else len(exports)}")
    if system_status.servers:
        parts.append("serving")
    return " · ".join(parts)


def _gpu_texts(system_status: SystemStatus) -> list[str]:
    """Return texts about the GPUs available for training, longest first. The first text describes each GPU in
    full. If there are several GPUs, the second gives only the utilization of each GPU, and the third
    describes only the chosen GPU.
    """
    if system_status.gpu is None:
        return [system_status.no_gpu_title]
    if system_status.gpu_problem is not None:
        return [f"{system_status.gpu.short_name} unusable"]
    first = system_status.gpu, system_status.gpu_metrics
    gpus = [first, *zip(system_status.other_gpus, system_status.other_gpu_metrics, strict=True)]
    texts = [" · ".join(text(*each) for each in gpus) for text in (_gpu_text, _use_text)]
    return [*texts, _gpu_text(*first)] if len(gpus) > 1 else texts[:1]


def _gpu_text(gpu: GpuDevice, metrics: GpuMetrics | None) -> str:
    """Return a GPU's name, utilization, memory and temperature: ``RTX 4090 96% 18.2/24.0G 61°``. If
    ``metrics`` is None, the text has only the name and ``NA``.
    """
    if metrics is None:
        return _use_text(gpu, metrics)
    temperature = "" if metrics.temperature_c is None else f" {metrics.temperature_c}°"
    memory = f"{format_gib(metrics.memory_used_bytes)}/{format_gib(metrics.memory_total_bytes)}G"
    return f"{_use_text(gpu, metrics)} {memory}{temperature}"


def _use_text(gpu: GpuDevice, metrics: GpuMetrics | None) -> str:
    return f"{gpu.short_name} {format_reading(None if metrics is None else metrics.utilization_percent)}"


class CommandFooter(Drawing):
    """The last line, with keys and labels: ``Z Stop z Pause ^P Palette``. Clicking a key presses it. Keys
    that a panel names in its border, or in a text that is fully visible, are left out. Keys that do not fit
    are shown only in the help. While a dialog covers the screen, the line is empty.

    Textual's Footer, which this replaces, mounts a widget for each key at every change of focus, and style
    caches keep these widgets alive.
    """

    DEFAULT_CSS = """
    CommandFooter {
        dock: bottom;
        height: 1;
        background: $panel;
    }
    """

    def __init__(
        self, also: Collection[str] = (), label_of: Callable[[str], str | None] = lambda command_id: ""
    ) -> None:
        """Create the footer. ``also``: ids of app commands to show after the screen's own.

        ``label_of`` returns the current label of a command id; empty for the default label, None for a
        command that the footer leaves out.
        """
        super().__init__(self._lines)
        self._also = also
        self._label_of = label_of
        self._shown: list[ActiveBinding] = []
        self._named: set[str] = set()
        """The commands and keys that are named outside the footer: the last result of :func:`_named`."""
        self._screen_bindings: list[ActiveBinding] = []
        self._app_bindings: list[ActiveBinding] = []

    def on_mount(self) -> None:
        self.screen.bindings_updated_signal.subscribe(self, self._bindings_changed, immediate=True)
        self.screen.screen_layout_refresh_signal.subscribe(self, self._laid_out, immediate=True)

    def on_unmount(self) -> None:
        self.screen.bindings_updated_signal.unsubscribe(self)
        self.screen.screen_layout_refresh_signal.unsubscribe(self)

    def _bindings_changed(self, screen: Screen[object]) -> None:
        shown: dict[str, ActiveBinding] = {}
        # A dialog shows its own keys in its frame.
        for active in () if is_covered(screen) else screen.active_bindings.values():
            if active.binding.show or active.binding.id in self._also:
                shown.setdefault(active.binding.action, active)
        self._shown, self._named = list(shown.values()), _named(screen)
        self._choose()

    def _laid_out(self, screen: Screen[object]) -> None:
        """After a layout, if the keys that the panels show have changed, choose again which commands the
        footer shows. This is rare.
        """
        named = _named(screen)
        if named != self._named:
            self._named = named
            self._choose()

    def _choose(self) -> None:
        """Show the commands whose keys are not already shown in a panel. Leave out commands that currently
        have no label.
        """
        shown = [
            active
            for active in self._shown
            if not self._named & {active.binding.id, active.binding.key}
            and self._label_of(active.binding.id or "") is not None
        ]
        own = [active for active in shown if not isinstance(active.node, App)]
        of_app = [active for active in shown if isinstance(active.node, App)]
        also = [active for active in of_app if active.binding.id in self._also]
        self._screen_bindings = [*own, *also]
        self._app_bindings = [active for active in of_app if active not in also]
        self.redraw()

    def _lines(self, width: int, height: int) -> list[Content]:
        own, of_app, gap = self._fitting_items(width)
        left, right = (Content(" " * gap).join(item for item, _ in items) for items in (own, of_app))
        space = width - 2 * _MARGIN - left.cell_length - right.cell_length
        return [Content.assemble(" " * _MARGIN, left, " " * max(gap, space), right)]

    def on_click(self, event: Click) -> None:
        own, of_app, gap = self._fitting_items(self.size.width)
        width_of_app = sum(item.cell_length + gap for item, _ in of_app) - gap
        for items, x in ((own, _MARGIN), (of_app, self.size.width - _MARGIN - width_of_app)):
            for item, active in items:
                if x <= event.x < x + item.cell_length:
                    self.app.simulate_key(active.binding.key)
                    return
                x += item.cell_length + gap

    def _fitting_items(self, width: int) -> tuple[_Items, _Items, int]:
        """Return the screen's and the app's items that fit ``width``, and the gap between two items in cells.

        The gap shrinks before any key is dropped. Only the screen's keys are dropped, the last one first.
        """
        own = [(self._item(active), active) for active in self._screen_bindings]
        of_app = [(self._item(active), active) for active in self._app_bindings]
        room = width - 2 * _MARGIN
        for gap in (_GAP, _NARROW_GAP):
            if sum(item.cell_length + gap for item, _ in (*own, *of_app)) - gap <= room:
                return own, of_app, gap
        while own and sum(item.cell_length + _NARROW_GAP for item, _ in (*own, *of_app)) > room + _NARROW_GAP:
            own.pop()
        return own, of_app, _NARROW_GAP

    def _item(self, active: ActiveBinding) -> Content:
        dim = "" if active.enabled else " dim"
        label = self._label_of(active.binding.id or "") or active.binding.description
        return Content.assemble(
            (short_key(active.binding.key), f"$key bold{dim}"),
            (f" {label}", f"$footer-description-foreground{dim}"),
        )


def _named(screen: Screen[object]) -> set[str]:
    """Return the ids of the commands in the panels' lower borders, and the keys in the panels' titles and
    texts.
    """
    named: set[str] = set()
    # Walked, not queried: this is computed after each layout, and a query matches selectors at each widget.
    for panel in screen.walk_children(Panel):
        named |= panel.named_commands | panel.named_keys
        for text in panel.walk_children(Widget):
            if isinstance(text, Lines | Drawing) and _is_whole(text):
                named |= text.named_keys
    return named


def _is_whole(widget: Widget) -> bool:
    """Return whether the whole widget is visible."""
    try:
        found = widget.screen.find_widget(widget)
    except NoWidget:
        return False
    return bool(found.region) and found.visible_region == found.region
