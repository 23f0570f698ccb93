"""The header of the live screen: state and progress of a run, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass

from textual.content import Content

from qlora_tui.formatting import (
    abbreviate_home,
    capitalize,
    format_duration,
    format_float,
    format_path,
    truncate_middle,
)
from qlora_tui.runs.defects import find_defect
from qlora_tui.runs.describe import format_energy
from qlora_tui.runs.events import ALL_STEPS_DONE, Failed, Finished, phase_label
from qlora_tui.runs.status import ACTIVE
from qlora_tui.tui.key_names import highlight_keys, key_name
from qlora_tui.tui.render.charts import bar
from qlora_tui.tui.render.labels import BEST, format_ago, result_label
from qlora_tui.tui.screens.train.run_snapshot import RunSnapshot
from qlora_tui.tui.widgets.line_widgets import DiffWidget

_MIN_BAR = 8
_STEP_BAR = 8
"""Cells of the bar within a step."""
_LONG_STEP_S = 5.0
"""Seconds of a step from which on its micro-batches are shown: in a shorter one they would only flicker."""
_MAX_DETAIL = 48
"""Cells of what a phase is about; a model's path may be long."""
_ENDINGS = {
    "stop": ("Stopping", " after this step"),
    "stop_now": ("Stopping now", ""),
    "pause": ("Pausing", " after this step"),
    "finish_epoch": ("Stopping at the end of this epoch", ""),
}
"""(what, when during training) of each request to end the run."""


class RunHeader(DiffWidget):
    """Two lines: state and progress of a run, or how it ended; then what else is known."""

    DEFAULT_CSS = """
    RunHeader {
        height: 2;
    }
    """

    def __init__(self) -> None:
        super().__init__()
        self._state = Content("")
        self._progress: list[str] = []
        self._facts: list[str] = []
        self._share: float | None = None

    def show(self, snapshot: RunSnapshot, now: float) -> None:
        """Repaint what changed."""
        shown = (
            state_line(snapshot),
            progress_facts(snapshot),
            facts(snapshot, now),
            progress_share(snapshot),
        )
        if shown != (self._state, self._progress, self._facts, self._share):
            self._state, self._progress, self._facts, self._share = shown
            self.redraw()

    def draw(self, width: int, height: int) -> list[Content]:
        progress = "  ".join(self._progress)
        room = width - self._state.cell_length - len(progress) - 2
        first, others = self._state, self._facts
        if room < 0:
            others = [*self._progress, *others]
        else:
            cells = room - 2 if self._share is not None and room - 2 >= _MIN_BAR else 0
            drawn = bar(self._share or 0.0, cells) + "  " if cells else ""
            first = Content.assemble(first, "  ", (drawn, "$primary"), progress)
        second = ""
        for number, fact in enumerate(others):
            piece = ("  " if number else "") + fact
            if len(second) + len(piece) > width:
                break
            second += piece
        return [first.truncate(width, ellipsis=True), highlight_keys(second)]


def state_line(snapshot: RunSnapshot) -> Content:
    """``● training  ! 2 warnings  attempt 2``: the state of a run with warnings, attempt and requests."""
    status, view = snapshot.status, snapshot.view
    defect = find_defect(view)
    sign, word, style = result_label(status.state, defect)
    if status.state == "running":
        word = phase_label(view.phase or status.state)
    elif defect is not None:
        word = f"{status.state}, {word}"
    parts: list[str | tuple[str, str]] = [(f"{sign} ", style), (word, f"bold {style}")]
    if count := len({health.kind for health in snapshot.health if health.severity == "warning"}):
        parts.append((f"  ! {count} warning{'s' if count > 1 else ''}", "$warning"))
    if view.attempt > 1:
        parts.append((f"  attempt {view.attempt}", "dim"))
    if status.state in ACTIVE and (ending := _ENDINGS.get(snapshot.ending_request)):
        when = ending[1] if view.phase == "training" else ""
        parts.append((f"  {ending[0]}{when}", "bold $warning"))
        if snapshot.is_stopping and snapshot.ending_request == "stop":
            parts.append((f"  {key_name('train.stop')} now", "$accent"))
    if (status.state == "queued" or status.state in ACTIVE) and status.detail:
        # Suspended, not responding, on another machine: more important than the rest.
        parts.append((f"  {status.detail}", "$warning"))
    elif status.state == "running" and view.phase_detail and not snapshot.ending_request:
        parts.append((f"  {truncate_middle(view.phase_detail, _MAX_DETAIL)}", "dim"))
    return Content.assemble(*parts)


def progress_share(snapshot: RunSnapshot) -> float | None:
    """Progress of the run, or of a phase without steps, from 0 to 1; None if unknown."""
    if snapshot.status.state in ("finished", "queued"):
        return None
    progress, view = snapshot.view.progress, snapshot.view
    over = snapshot.status.state not in ACTIVE
    if progress is not None and progress.total and not snapshot.step and not over:
        return progress.done / progress.total
    return snapshot.step / view.total_steps if view.total_steps else None


def progress_facts(snapshot: RunSnapshot) -> list[str]:
    """What stands beside the bar: how far the run is, and the time left."""
    view, state = snapshot.view, snapshot.status.state
    facts = []
    if state in ACTIVE and view.progress is not None and view.phase != "training":
        facts.append(f"{view.progress.done:,} of {view.progress.total:,}")
    if view.total_steps and state != "queued":
        if state in ACTIVE and snapshot.step:
            facts.append(f"{snapshot.step / view.total_steps:.0%}")
        facts.append(f"step {snapshot.step:,}/{view.total_steps:,}")
    if state in ACTIVE and snapshot.seconds_left is not None:
        facts.append(f"ETA {format_duration(snapshot.seconds_left)}")
    return facts


def facts(snapshot: RunSnapshot, now: float) -> list[str]:
    """Other facts, the most important first; those that do not fit are dropped."""
    state = snapshot.status.state
    if state == "queued":
        return ["waiting in the queue"]
    if state in ACTIVE:
        return _active_facts(snapshot, now)
    return _ended_facts(snapshot, now)


def _active_facts(snapshot: RunSnapshot, now: float) -> list[str]:
    view = snapshot.view
    facts = [within] if (within := step_progress(snapshot)) else []
    if snapshot.tokens_per_s is not None:
        facts.append(f"{snapshot.tokens_per_s:,.0f} tok/s")
    if view.data is not None and view.data.steps_per_epoch:
        all_epochs = view.total_steps / view.data.steps_per_epoch
        facts.append(f"epoch {_epochs(snapshot.epoch)} of {_epochs(all_epochs)}")
    if view.started_at is not None:
        facts.append(_time_so_far(snapshot, max(0.0, now - view.started_at)))
    if snapshot.fix is not None:
        facts.append(f"{key_name('train.fix')} {snapshot.fix.label}")
    if checkpoints := _checkpoints(snapshot):
        facts.append(checkpoints)
    if next_evaluation := _next_evaluation(snapshot):
        facts.append(f"next evaluation at {next_evaluation:,}")
    if snapshot.energy_kwh is not None:
        facts.append(f"{snapshot.energy_kwh:.2f} kWh")
    return facts or ["starting"]


def _checkpoints(snapshot: RunSnapshot) -> str:
    """``checkpoints at 60 ★, 70``: the best and the newest; empty before the first."""
    if not snapshot.view.checkpoints:
        return ""
    newest = snapshot.view.checkpoints[-1].step
    if snapshot.best is None or not snapshot.is_best_saved:
        return f"checkpoint at {newest:,}"
    best = f"{snapshot.best.step:,} {BEST}"
    return f"checkpoint at {best}" if snapshot.best.step == newest else f"checkpoints at {best}, {newest:,}"


def _time_so_far(snapshot: RunSnapshot, since_start: float) -> str:
    """``running 21 min, 13 min in steps``: the time since the start, and that of all steps."""
    trained = snapshot.seconds_trained
    if not trained:
        return f"running {format_duration(since_start)}"
    # Earlier attempts have a part in the steps but not in the time since the last start; a clock may be set.
    is_comparable = snapshot.view.attempt == 1 and trained <= since_start
    if not is_comparable:
        return f"{format_duration(trained)} in steps"
    return f"running {format_duration(since_start)}, {format_duration(trained)} in steps"


def step_progress(snapshot: RunSnapshot) -> str:
    """``this step ███░░░░░ 3/8``: its micro-batches, where the step takes long; otherwise empty."""
    status = snapshot.status
    if snapshot.view.phase != "training" or status.micro_batches < 2:
        return ""
    if snapshot.seconds_per_step is not None and snapshot.seconds_per_step < _LONG_STEP_S:
        return ""
    done = bar(status.micro_batch / status.micro_batches, _STEP_BAR)
    return f"this step {done} {status.micro_batch}/{status.micro_batches}"


def _next_evaluation(snapshot: RunSnapshot) -> int:
    """The step of the next evaluation; 0 if none is known."""
    view, recipe = snapshot.view, snapshot.recipe
    if recipe is None or view.data is None or not view.data.validation_samples or not snapshot.step:
        return 0
    every = recipe.training.eval_every or view.data.steps_per_epoch
    return min((snapshot.step // every + 1) * every, view.total_steps) if every else 0


def _epochs(count: float) -> str:
    return format_float(count, 3 if count >= 1 else 2)


def _ended_facts(snapshot: RunSnapshot, now: float) -> list[str]:
    view, status = snapshot.view, snapshot.status
    facts = [f"{format_ago(status.at, now)}"] if status.at else []
    if snapshot.best is not None:
        before = view.loss_to_beat
        worse = "" if before is None else f", {format_float(before, 3)} before training"
        facts.append(f"validation {format_float(snapshot.best.loss, 3)} at {snapshot.best.step:,}{worse}")
    elif snapshot.loss is not None:
        facts.append(f"loss {format_float(snapshot.loss, 3)}")
    if isinstance(view.ending, Finished):
        facts.append(f"trained {format_duration(view.ending.seconds)}")
        if energy := format_energy(view.ending):
            facts.append(energy)
    return facts


@dataclass(frozen=True)
class RunOutcomeText:
    """The text under the header of a run that has ended."""

    text: str
    next_step: str
    is_error: bool = False


def outcome_text(snapshot: RunSnapshot) -> RunOutcomeText | None:
    """What happened, why, and what to do; None while the run is active."""
    state, view = snapshot.status.state, snapshot.view
    again, prepare = key_name("train.resume"), f"{key_name('train.prepare')} prepare another run"
    chat = key_name("train.chat")
    resume_hint = (
        f"▸ {again} resume from the last checkpoint"
        if view.checkpoints
        else f"▸ {again} resume from step 0"
        if view.attempt
        else f"▸ {again} queue it"
    )
    match state:
        case "finished":
            reason = view.ending.reason if isinstance(view.ending, Finished) else snapshot.status.detail
            reason_text = "" if reason in ("", ALL_STEPS_DONE) else f"{capitalize(reason)}. "
            return RunOutcomeText(
                f"{reason_text}Adapter: {format_path(view.run.adapter_dir)}",
                f"▸ {chat} chat with it   {prepare}",
            )
        case "failed":
            if isinstance(view.ending, Failed):
                failed = view.ending
                text = "\n".join(
                    part for part in (f"{failed.title}: {failed.what}", failed.why, failed.fix) if part
                )
            else:
                text = snapshot.status.detail
            return RunOutcomeText(abbreviate_home(text), f"{resume_hint}   {prepare}", is_error=True)
        case "lost":
            return RunOutcomeText(snapshot.status.detail, f"{resume_hint}   {prepare}", is_error=True)
        case "stopped" | "paused":
            offer = f"   {chat} chat with its adapter" if view.checkpoints else ""
            return RunOutcomeText(snapshot.status.detail, f"{resume_hint}{offer}   {prepare}")
        case "unreadable" | "gone":
            offer = f"▸ {key_name('train.another')} show other runs   {prepare}"
            return RunOutcomeText(snapshot.status.detail, offer, is_error=True)
        case _:
            return None
