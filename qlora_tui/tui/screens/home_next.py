"""The one sensible next step, from how things stand: a pure function for Home."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.status import ACTIVE, State


@dataclass(frozen=True)
class Standing:
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
    "a real adapter in minutes; 98 MB to download, after asking",
)
SEARCH = NextStep("1", "app.go('models')", "Search the hub for a model", "there is none on this machine yet")


def next_step(now: Standing) -> NextStep:
    """The most useful thing to do now."""
    if now.last_state in ACTIVE:
        return NextStep("", "watch", "Watch the run", f"{now.last_run} is at work")
    if now.last_is_news and now.last_state == "finished":
        return NextStep("", "chat", "Talk to the adapter", f"{now.last_run} is finished")
    if now.last_is_news and now.last_state in ("failed", "lost"):
        return NextStep("", "watch", "See what went wrong", f"{now.last_run} {_ended(now.last_state)}")
    if now.last_state == "paused":
        return NextStep("", "watch", "Go on with the run", f"{now.last_run} is paused; r resumes it")
    return _prepare(now)


def other_steps(now: Standing, chosen: NextStep) -> tuple[NextStep, ...]:
    """What a newcomer could do instead."""
    if now.recipe.model.id or now.last_state is not None or chosen not in (DEMO, SEARCH):
        return ()
    return (SEARCH,) if chosen is DEMO else (DEMO,)


def _prepare(now: Standing) -> NextStep:
    if not now.recipe.model.id:
        if not now.local_models:
            return DEMO
        number = f"{now.local_models} model{'s are' if now.local_models > 1 else ' is'} on this machine"
        return NextStep("1", "app.go('models')", "Choose a model", number)
    if not now.recipe.data.sources:
        return NextStep("2", "app.go('data')", "Choose what it learns from", "the recipe has no data yet")
    if now.verdict == "does not fit":
        return NextStep("3", "app.go('memory')", "Make it fit", "the recipe needs more memory than there is")
    return NextStep("", "prepare", "Check and launch", "the recipe is complete")


def _ended(state: State) -> str:
    return "was lost" if state == "lost" else "failed"
