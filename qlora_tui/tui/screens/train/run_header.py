"""The header of the live screen: name, state and progress of a run, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass

from textual.content import Content

from qlora_tui.formatting import abbreviate_home, format_duration, format_float, format_path, truncate_middle
from qlora_tui.runs.defects import find_defect
from qlora_tui.runs.describe import format_energy
from qlora_tui.runs.events import Failed, Finished, phase_label
from qlora_tui.runs.status import ACTIVE
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.render.block_charts import bar
from qlora_tui.tui.render.run_labels import format_ago, result_label
from qlora_tui.tui.screens.train.run_follower import RunSnapshot
from qlora_tui.tui.widgets.diff_widget import DiffWidget

_MIN_NAME_WIDTH = 12
_ENDINGS = {
    "stop": ("Stopping", " after this step"),
    "pause": ("Pausing", " after this step"),
    "finish_epoch": ("Stopping at the end of this epoch", ""),
}
"""(what, when during training) of each request to end the run."""


class RunHeader(DiffWidget):
    """Two lines: which run and its state; how far it is, or how it ended."""

    DEFAULT_CSS = """
    RunHeader {
        height: 2;
        padding: 0 1;
    }
    """

    def __init__(self) -> None:
        super().__init__()
        self._title = RunTitle(Content(""), "", Content(""))
        self._facts: list[str] = []
        self._share: float | None = None

    def show(self, snapshot: RunSnapshot, now: float) -> None:
        """Repaint what changed."""
        shown = (title(snapshot), facts(snapshot, now), progress_share(snapshot))
        if shown != (self._title, self._facts, self._share):
            self._title, self._facts, self._share = shown
            self.redraw()

    def draw(self, width: int, height: int) -> list[Content]:
        drawn = Content("")
        if self._share is not None:
            drawn = Content.styled(bar(self._share, max(8, min(24, width // 6))), "$primary") + " "
        line = drawn
        for number, fact in enumerate(self._facts):
            piece = ("  " if number else "") + fact
            if line.cell_length + len(piece) > width:
                break
            line += piece
        return [self._title.fitted(width), line]


@dataclass(frozen=True)
class RunTitle:
    """``● qwen-tickets-20261124-0212  training  attempt 2``."""

    sign: Content
    name: str
    rest: Content

    def fitted(self, width: int) -> Content:
        """Shorten the name in its middle, so that the state stays in view."""
        left = max(_MIN_NAME_WIDTH, width - self.sign.cell_length - self.rest.cell_length)
        name = Content.styled(truncate_middle(self.name, left), "bold")
        return (self.sign + name + self.rest).truncate(width, ellipsis=True)


def title(snapshot: RunSnapshot) -> RunTitle:
    """The name of a run with its state, warnings and attempt."""
    status, view = snapshot.status, snapshot.view
    defect = find_defect(view)
    sign, word, style = result_label(status.state, defect)
    if status.state == "running":
        word = phase_label(view.phase or status.state)
    elif defect is not None:
        word = f"{status.state}, {word}"
    parts: list[str | tuple[str, str]] = ["  ", (word, style)]
    if count := len({health.kind for health in snapshot.health if health.severity == "warning"}):
        parts.append((f"  ! {count} warning{'s' if count > 1 else ''}", "$warning"))
    if view.attempt > 1:
        parts.append((f"  attempt {view.attempt}", "dim"))
    if status.state in ACTIVE and (ending := _ENDINGS.get(snapshot.ending_request)):
        when = ending[1] if view.phase == "training" else ""
        parts.append((f"  {ending[0]}{when}", "bold $warning"))
    if (status.state == "queued" or status.state in ACTIVE) and status.detail:
        # Suspended, not responding, on another machine: more important than the rest.
        parts.append((f"  {status.detail}", "$warning"))
    elif status.state == "running" and view.phase_detail and not snapshot.ending_request:
        parts.append((f"  {view.phase_detail}", "dim"))
    return RunTitle(Content.styled(f"{sign} ", style), view.run.name, Content.assemble(*parts))


def progress_share(snapshot: RunSnapshot) -> float | None:
    """Progress of the run, or of a phase without steps, from 0 to 1; None if unknown."""
    if snapshot.status.state in ("finished", "queued"):
        return None
    progress, view = snapshot.view.progress, snapshot.view
    over = snapshot.status.state not in ("starting", "running")
    if progress is not None and progress.total and not snapshot.step and not over:
        return progress.done / progress.total
    return snapshot.step / view.total_steps if view.total_steps else None


def facts(snapshot: RunSnapshot, now: float) -> list[str]:
    """Facts, the most important first; those that do not fit are dropped."""
    state = snapshot.status.state
    if state == "queued":
        return ["waiting in the queue"]
    if state in ("starting", "running"):
        return _active_facts(snapshot, now)
    return _ended_facts(snapshot, now)


def _active_facts(snapshot: RunSnapshot, now: float) -> list[str]:
    view = snapshot.view
    facts = []
    if view.progress is not None and view.phase != "training":
        facts.append(f"{phase_label(view.phase or '')} {view.progress.done:,}/{view.progress.total:,}")
    if view.total_steps:
        facts.append(f"step {snapshot.step:,}/{view.total_steps:,}")
    if snapshot.seconds_left is not None:
        facts.append(f"ETA {format_duration(snapshot.seconds_left)}")
    if snapshot.tokens_per_s is not None:
        facts.append(f"{snapshot.tokens_per_s:,.0f} tok/s")
    if view.data is not None and view.data.steps_per_epoch:
        all_epochs = view.total_steps / view.data.steps_per_epoch
        facts.append(f"epoch {_epochs(snapshot.epoch)}/{_epochs(all_epochs)}")
    if snapshot.fix is not None:
        facts.append(f"{key_name('train.fix')} {snapshot.fix.label}")
    if snapshot.energy_kwh is not None:
        facts.append(f"{snapshot.energy_kwh:.2f} kWh")
    if view.started_at is not None:
        facts.append(f"running for {format_duration(max(0.0, now - view.started_at))}")
    return facts or ["starting"]


def _epochs(count: float) -> str:
    return format_float(count, 3 if count >= 1 else 2)


def _ended_facts(snapshot: RunSnapshot, now: float) -> list[str]:
    view, status = snapshot.view, snapshot.status
    facts = [f"{format_ago(status.at, now)}"] if status.at else []
    if view.total_steps:
        facts.append(f"step {snapshot.step:,}/{view.total_steps:,}")
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
            reason_text = "" if reason in ("", "all steps done") else f"{reason[:1].upper()}{reason[1:]}. "
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
