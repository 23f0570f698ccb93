"""The stages of a run before its first step. The live pane shows the stages in place of the graph."""

from __future__ import annotations

from itertools import pairwise

from textual.content import Content

from qlora_tui.formatting import abbreviate_home, format_duration, format_progress, truncate_middle
from qlora_tui.runs.events import Phase, PhaseChanged, phase_label
from qlora_tui.runs.holds import hold_words
from qlora_tui.runs.status import ACTIVE
from qlora_tui.tui.render.meters import bar
from qlora_tui.tui.screens.train.run_follower import RunSnapshot

_TO_COME: dict[Phase, str] = {
    "loading": "the model's weights",
    "tokenizing": "the rows of the data",
    "probing": "the first step, and the memory of the longest batch",
    "evaluating": "validation loss before training",
    "training": "the first step",
}
"""What each stage works on, by phase, in the order in which a run goes through the stages."""
_STAGE_CELLS = 13
"""Width of a stage's symbol and name, in cells."""
_MAX_BAR = 30
_MIN_WIDTH_FOR_BAR = 60


def is_starting(snapshot: RunSnapshot) -> bool:
    """Return whether the run is queued or active but has no step to draw yet."""
    return snapshot.status.state in (*ACTIVE, "queued") and not snapshot.envelopes.loss.xs


def stage_lines(snapshot: RunSnapshot, now: float, width: int, height: int) -> list[Content]:
    """Return a line for each stage, such as ``✓ loading libraries 4 s``: finished stages, the current stage
    with its progress, and the stages to come. ``now``: Unix time.
    """
    stages = snapshot.stages
    if snapshot.status.state == "queued":
        stages = ()
        hold, detail = snapshot.status.hold, snapshot.status.detail
        what = hold_words(hold) if hold else detail or "the runs before it in the queue"
        lines = [_stage_line("▸", "waiting", what, "", width, "bold $primary")]
    elif not stages:
        lines = [_stage_line("▸", "starting", "the trainer's process", "", width, "bold $primary")]
    else:
        lines = [
            _stage_line(
                "✓", phase_label(stage.phase), _about(stage), format_duration(after.at - stage.at), width
            )
            for stage, after in pairwise(stages)
        ]
        lines += _current(snapshot, now, width)
    seen = {stage.phase for stage in stages}
    for phase, what in _TO_COME.items():
        # The evaluation before training is left out if there is no validation data, or if training has begun.
        skipped = phase == "evaluating" and ("training" in seen or not snapshot.has_validation)
        if phase not in seen and not skipped:
            lines.append(_stage_line("·", phase_label(phase), what, "", width, "dim"))
    # If not all lines fit, the stages that finished first are left out.
    return lines[-height:]


def _current(snapshot: RunSnapshot, now: float, width: int) -> list[Content]:
    stage, progress = snapshot.stages[-1], snapshot.view.progress
    seconds = max(0.0, now - stage.at)
    lines = [
        _stage_line(
            "▸", phase_label(stage.phase), _about(stage), format_duration(seconds), width, "bold $primary"
        )
    ]
    if progress is not None and progress.phase == stage.phase and progress.total:
        share = progress.done / progress.total
        left = seconds * (1 - share) / share if 0 < share < 1 and seconds >= 1 else None
        text = format_progress(progress.done, progress.total)
        if left is not None:
            text += f"   about {format_duration(left)} left"
        cells = min(_MAX_BAR, width - _STAGE_CELLS - len(text) - 2) if width >= _MIN_WIDTH_FOR_BAR else 0
        drawn = f"{bar(share, cells)} " if cells > 0 else ""
        lines.append(Content.assemble(" " * _STAGE_CELLS, (drawn, "$primary"), text))
    return lines


def _about(stage: PhaseChanged) -> str:
    return stage.detail or _TO_COME.get(stage.phase, "the file to 16-bit weights")


def _stage_line(sign: str, name: str, what: str, seconds: str, width: int, style: str = "") -> Content:
    room = width - _STAGE_CELLS - len(seconds) - 2
    text = truncate_middle(abbreviate_home(what), max(8, min(room, 52)))
    sign_style = style or "$success"
    pad = " " * max(2, min(room, 52) - len(text) + 2) if seconds else ""
    return Content.assemble(
        (f"{sign} ", sign_style),
        (f"{name:<{_STAGE_CELLS - 2}}", style),
        (text, "" if style.startswith("bold") else "dim"),
        (pad + seconds, "" if style.startswith("bold") else "dim"),
    )
