"""The one sensible next step, from how things stand: a pure function for Home."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.status import ACTIVE, State


@dataclass(frozen=True)
class HomeState:
    """What the advice rests on."""

    recipe: Recipe
    local_models: int
    """On this machine, that can be trained."""
    verdict: str = ""
    """Whether the recipe fits: a word of the estimate, empty where there is none."""
    last_run: str = ""
    last_state: State | None = None
    last_is_news: bool = False
    """It ended since the app was last looked at."""
    last_checkpoint: int = 0
    """Step of the last that it has whole; 0 where there is none."""
    last_total_steps: int = 0
    """0 where it is not known."""
    last_fix: str = ""
    """What its failure says to do."""
    edited_since: bool = False
    """The recipe was changed after it ended: another run is being prepared."""


@dataclass(frozen=True)
class NextStep:
    """What to do, with which key besides enter, and why."""

    key: str
    """What does the same; empty where only enter does."""
    action: str
    """As Textual runs it."""
    text: str
    why: str


DEMO = NextStep(
    "d",
    "demo",
    "Train the 135M demo model",
    "a real adapter in minutes; downloads 89 MiB, asks first",
)
SEARCH = NextStep(
    "1", "app.go('models')", "Search the Hub for a model", "there are no models on this machine yet"
)


def next_step(now: HomeState) -> NextStep:
    """The most useful thing to do now."""
    state = now.last_state
    if state in ACTIVE:
        return NextStep("", "watch", "Watch the run", f"{now.last_run} is running")
    if now.last_is_news and state == "finished":
        return NextStep("", "chat", "Chat with the adapter", f"{now.last_run} has finished")
    if state == "paused" or (_can_resume(now) and not now.edited_since):
        return _resume(now)
    if state in ("failed", "lost") and not (now.edited_since and _is_complete(now)):
        return NextStep("", "watch", "See what went wrong", now.last_fix or f"{now.last_run} {_ended(state)}")
    return _prepare(now)


def other_steps(now: HomeState, chosen: NextStep) -> tuple[NextStep, ...]:
    """What could be done instead: by a newcomer, or with a run that can go on."""
    if chosen.action in ("resume", "watch") and now.last_state not in ACTIVE:
        resume = (_resume(now),) if now.last_state == "failed" and now.last_checkpoint else ()
        return (*resume, *((_prepare(now),) if _is_complete(now) else ()))
    if chosen.action == "prepare" and _can_resume(now):
        return (_resume(now),)
    if now.recipe.model.id or now.last_state is not None or chosen not in (DEMO, SEARCH):
        return ()
    return (SEARCH,) if chosen is DEMO else (DEMO,)


def _can_resume(now: HomeState) -> bool:
    """A run that was broken off, by the user or by whatever killed it, and not by what it met in itself."""
    return now.last_state in ("stopped", "lost") and now.last_checkpoint > 0


def _resume(now: HomeState) -> NextStep:
    total = f" of {now.last_total_steps:,}" if now.last_total_steps else ""
    where = (
        f"the checkpoint at step {now.last_checkpoint:,}{total}" if now.last_checkpoint else "the beginning"
    )
    why = f"{now.last_run} {_ended(now.last_state)}; it resumes from {where}"
    return NextStep("r", "resume", "Resume the run", why)


def _is_complete(now: HomeState) -> bool:
    return bool(now.recipe.model.id and now.recipe.data.sources)


def _prepare(now: HomeState) -> NextStep:
    if not now.recipe.model.id:
        if not now.local_models:
            return DEMO
        number = f"{now.local_models} model{'s are' if now.local_models > 1 else ' is'} on this machine"
        return NextStep("1", "app.go('models')", "Select a model", number)
    if not now.recipe.data.sources:
        return NextStep("2", "app.go('data')", "Select the training data", "the recipe has no data yet")
    if now.verdict == "does not fit":
        return NextStep("3", "app.go('memory')", "Make it fit", "the recipe needs more memory than there is")
    return NextStep("n", "prepare", "Check and launch", "the recipe is complete")


def _ended(state: State | None) -> str:
    return {"paused": "is paused", "stopped": "was stopped", "lost": "was lost"}.get(state or "", "failed")
