"""The top line of every screen: the screens on the left, the active run and the GPU on the right."""

from __future__ import annotations

from textual.app import RenderResult
from textual.content import Content
from textual.widget import Widget

from qlora_tui.formatting import format_float, format_gib
from qlora_tui.tui.breakpoints import WIDE_CELLS
from qlora_tui.tui.commands import NAVIGATION
from qlora_tui.tui.key_names import bare_key
from qlora_tui.tui.system_status import SystemStatus


class TopBar(Widget):
    """Never wraps: the status is cut to what fits beside the screens; Home can be a digit only."""

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
        """Repaint if what is shown has changed."""
        before = self.status_options(self._status)
        self._status = system_status
        if self.status_options(system_status) != before:
            self.refresh()

    def render(self) -> RenderResult:
        navigation = self._navigation()
        width_left = self.size.width - navigation.cell_length - 1
        system_status = next((p for p in self.status_options(self._status) if len(p) <= width_left), "")
        gap = " " * max(1, self.size.width - navigation.cell_length - len(system_status))
        return Content.assemble(navigation, gap, system_status)

    def _navigation(self) -> Content:
        parts: list[Content | str] = []
        for command in NAVIGATION:
            mode = command.id.removeprefix("go.")
            is_current = mode == self._mode
            # In a narrow window the status needs the cells of a word more.
            is_bare = mode == "home" and not is_current and self.size.width < WIDE_CELLS
            text = f" {bare_key(command.id)} " if is_bare else f" {bare_key(command.id)} {command.label} "
            style = "reverse bold" if is_current else ""
            parts.append(Content.styled(text, style).stylize(f"@click=app.go('{mode}')"))
        return Content.assemble(*parts)

    @staticmethod
    def status_options(system_status: SystemStatus) -> list[str]:
        """Possible texts, the longest first."""
        run = _run_text(system_status)
        gpu = _gpu_text(system_status)
        short_run = run.split(" loss ")[0]
        waiting = len(system_status.waiting_ids) if system_status.active is not None else 0
        with_queue = [f"{text} · {waiting} waiting   {gpu}" for text in (run, short_run) if waiting]
        options = [*with_queue, f"{run}   {gpu}", f"{short_run}   {gpu}", run, short_run, gpu, ""]
        return [option.strip() + " " for option in options]


def _run_text(system_status: SystemStatus) -> str:
    status = system_status.active_status
    if status is None:
        return f"{len(system_status.waiting_ids)} waiting" if system_status.waiting_ids else ""
    from qlora_tui.runs.events import STEP_PHASES, phase_label  # not needed for the first frame

    # An attempt that has just started shows its phase.
    if not status.step or status.phase not in STEP_PHASES:
        return f"● {phase_label(status.phase or status.state)}"
    loss = f" loss {format_float(status.loss, 3)}" if status.loss is not None else ""
    return f"● {status.step:,}/{status.total_steps:,}{loss}"


def _gpu_text(system_status: SystemStatus) -> str:
    if system_status.gpu is None:
        return system_status.no_gpu_title
    if system_status.gpu_problem is not None:
        return f"{system_status.gpu.short_name} unusable"
    metrics = system_status.gpu_metrics
    if metrics is None:
        return f"{system_status.gpu.short_name} NA"
    use = "NA" if metrics.utilization_percent is None else f"{metrics.utilization_percent}%"
    temperature = "" if metrics.temperature_c is None else f" {metrics.temperature_c}°"
    memory = f"{format_gib(metrics.memory_used_bytes)}/{format_gib(metrics.memory_total_bytes)}G"
    return f"{system_status.gpu.short_name} {use} {memory}{temperature}"
