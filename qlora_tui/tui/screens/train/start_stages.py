"""What a run does before its first step: the stages so far with their times, progress, and those to come."""

from __future__ import annotations

from itertools import pairwise

from textual.content import Content
from textual.geometry import Size

from qlora_tui.formatting import abbreviate_home, format_duration, truncate_middle
from qlora_tui.runs.events import Phase, PhaseChanged, phase_label
from qlora_tui.runs.status import ACTIVE
from qlora_tui.tui.render.charts import bar
from qlora_tui.tui.screens.train.run_snapshot import RunSnapshot
from qlora_tui.tui.widgets.line_widgets import DiffWidget

_TO_COME: dict[Phase, str] = {
    "loading": "the model's weights",
    "tokenizing": "the rows of the data",
    "probing": "the first step, and the memory of the longest batch",
    "evaluating": "validation loss before training",
    "training": "the first step",
}
"""What each stage is about, in the order in which a run first comes to them."""
_LABEL = 13
"""Cells of a sign and the name of a stage."""
_MAX_BAR = 30
_MIN_WIDTH_FOR_BAR = 60


def is_starting(snapshot: RunSnapshot) -> bool:
    """Whether the run waits or is active, and has no step to draw yet."""
    return snapshot.status.state in (*ACTIVE, "queued") and not snapshot.envelopes.loss.xs


class StartStages(DiffWidget):
    """One line for each stage, shown instead of an empty graph."""

    DEFAULT_CSS = """
    StartStages {
        height: auto;
    }
    """

    def __init__(self) -> None:
        super().__init__()
        self._snapshot: RunSnapshot | None = None
        self._now = 0.0
        self._line_count = 0

    def show(self, snapshot: RunSnapshot, now: float) -> None:
        """Show how far the run is; ``now`` is the Unix time that the current stage is timed to."""
        self._snapshot, self._now = snapshot, now
        count = len(stage_lines(snapshot, now, self.size.width))
        if count != self._line_count:
            self._line_count = count
            self.refresh(layout=True)
        self.redraw()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return self._line_count

    def draw(self, width: int, height: int) -> list[Content]:
        if self._snapshot is None:
            return []
        # In a small window, what is done gives way to what is to come.
        return stage_lines(self._snapshot, self._now, width)[-height:]


def stage_lines(snapshot: RunSnapshot, now: float, width: int) -> list[Content]:
    """``✓ loading    libraries   4 s``: what is done, what is at work with its progress, what comes."""
    stages = snapshot.stages
    if snapshot.status.state == "queued":
        stages = ()
        lines = [_line("▸", "waiting", "the runs before it in the queue", "", width, "bold $primary")]
    elif not stages:
        lines = [_line("▸", "starting", "the trainer's process", "", width, "bold $primary")]
    else:
        lines = [
            _line("✓", phase_label(stage.phase), _about(stage), format_duration(after.at - stage.at), width)
            for stage, after in pairwise(stages)
        ]
        lines += _current(snapshot, now, width)
    seen = {stage.phase for stage in stages}
    for phase, what in _TO_COME.items():
        # Without validation data nothing is evaluated.
        skipped = phase == "evaluating" and ("training" in seen or not snapshot.has_validation)
        if phase not in seen and not skipped:
            lines.append(_line("·", phase_label(phase), what, "", width, "dim"))
    return lines


def _current(snapshot: RunSnapshot, now: float, width: int) -> list[Content]:
    stage, progress = snapshot.stages[-1], snapshot.view.progress
    seconds = max(0.0, now - stage.at)
    lines = [
        _line("▸", phase_label(stage.phase), _about(stage), format_duration(seconds), width, "bold $primary")
    ]
    if progress is not None and progress.phase == stage.phase and progress.total:
        share = progress.done / progress.total
        left = seconds * (1 - share) / share if 0 < share < 1 and seconds >= 1 else None
        text = f"{progress.done:,} of {progress.total:,}"
        if left is not None:
            text += f"   about {format_duration(left)} left"
        cells = min(_MAX_BAR, width - _LABEL - len(text) - 2) if width >= _MIN_WIDTH_FOR_BAR else 0
        drawn = f"{bar(share, cells)} " if cells > 0 else ""
        lines.append(Content.assemble(" " * _LABEL, (drawn, "$primary"), text))
    return lines


def _about(stage: PhaseChanged) -> str:
    return stage.detail or _TO_COME.get(stage.phase, "the file to 16-bit weights")


def _line(sign: str, name: str, what: str, seconds: str, width: int, style: str = "") -> Content:
    room = width - _LABEL - len(seconds) - 2
    text = truncate_middle(abbreviate_home(what), max(8, min(room, 52)))
    sign_style = style or "$success"
    pad = " " * max(2, min(room, 52) - len(text) + 2) if seconds else ""
    return Content.assemble(
        (f"{sign} ", sign_style),
        (f"{name:<{_LABEL - 2}}", style),
        (text, "" if style.startswith("bold") else "dim"),
        (pad + seconds, "" if style.startswith("bold") else "dim"),
    )
