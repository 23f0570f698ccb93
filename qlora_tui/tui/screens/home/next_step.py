"""The next step that Home suggests: a pure function of the state of the app and its runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.status import ACTIVE, State


@dataclass(frozen=True)
class HomeState:
    """The facts on which the suggested next step depends."""

    recipe: Recipe
    local_models: int
    """Number of models on this machine that can be trained."""
    verdict: str = ""
    """The ``word`` of the verdict on whether the recipe fits into memory; empty if there is no verdict."""
    model_error: str = ""
    """Why the model cannot be trained, in a few words; empty if no reason is known."""
    can_download: bool = False
    """Whether files that the model lacks can be downloaded."""
    data_error: str = ""
    """Why the data cannot be used, in a few words; empty if no reason is known."""
    last_run: str = ""
    last_state: State | None = None
    last_is_news: bool = False
    """Whether the last run has ended since the previous session of the app. This includes runs that ended in
    the current session.
    """
    last_checkpoint: int = 0
    """Step of the last run's newest intact checkpoint; 0 if there is none."""
    last_weights: str = ""
    """The weights that Chat and Export propose for the last run, such as ``step 640 (best)``; empty unless
    the run ended because all steps were done.
    """
    last_total_steps: int = 0
    """Number of steps of the last run; 0 if unknown."""
    last_fix: str = ""
    """How to fix the cause of the last run's failure; empty if there is no known fix."""
    edited_since: bool = False
    """Whether the recipe has been changed since the last run ended."""
    duration: str = ""
    """Expected time of a run of the recipe, in a few words; empty if unknown."""


@dataclass(frozen=True)
class NextStep:
    """A step to suggest, with its reason and its command."""

    command: str
    """Id of the command that carries out the step; empty if the step has no key other than Enter on Home."""
    action: str
    """The Textual action that carries out the step."""
    text: str
    why: str


Steps: TypeAlias = tuple[NextStep, tuple[NextStep, ...]]
"""The suggested step, and alternatives to it."""

DEMO = NextStep(
    "home.demo",
    "demo",
    "Train the 135M demo model",
    "a real adapter in minutes; downloads 89 MiB, asks first",
)
SEARCH = NextStep(
    "go.models",
    "app.go('models')",
    "Search the Hub for a model",
    "there are no models on this machine yet",
)


def next_step(now: HomeState) -> NextStep:
    """Return the most useful next step."""
    state = now.last_state
    if state in ACTIVE:
        return NextStep("", "watch", "Watch the run", "charts, samples and log on the Train screen")
    if state == "finished" and (now.last_is_news or not now.edited_since):
        answers = f"{now.last_weights or 'adapter'} and base, side by side"
        return NextStep("", "chat", "Chat with the adapter", answers)
    if state == "paused" or (_can_resume(now) and not now.edited_since):
        return _resume(now)
    if state in ("failed", "lost") and not (now.edited_since and now.recipe.has_model_and_data):
        return NextStep("", "watch", "See what went wrong", now.last_fix or f"{now.last_run} {_ended(state)}")
    return _prepare(now)


def other_steps(now: HomeState, chosen: NextStep) -> tuple[NextStep, ...]:
    """Return alternatives to the suggested step ``chosen``, such as resuming a run, preparing another run,
    exporting the adapter, or, for new users, the demo.
    """
    if chosen.action in ("resume", "watch") and now.last_state not in ACTIVE:
        resume = (_resume(now),) if now.last_state == "failed" and now.last_checkpoint else ()
        return (*resume, *((_prepare(now),) if now.recipe.has_model_and_data else ()))
    if chosen.action == "chat":
        return (_export(now), *((_prepare(now),) if now.recipe.has_model_and_data else ()))
    if chosen.action in ("prepare", "app.go('data')", "app.go('models')") and _can_resume(now):
        return (_resume(now),)
    if now.recipe.model.id or now.last_state is not None or chosen not in (DEMO, SEARCH):
        return ()
    return (SEARCH,) if chosen is DEMO else (DEMO,)


def _export(now: HomeState) -> NextStep:
    weights = f"{now.last_weights} as " if now.last_weights else ""
    return NextStep("home.export", "export", "Export the adapter", f"{weights}GGUF or a merged model")


def _can_resume(now: HomeState) -> bool:
    """Return whether the last run was stopped or lost, and has a checkpoint."""
    return now.last_state in ("stopped", "lost") and now.last_checkpoint > 0


def _resume(now: HomeState) -> NextStep:
    total = f" of {now.last_total_steps:,}" if now.last_total_steps else ""
    where = (
        f"the checkpoint at step {now.last_checkpoint:,}{total}" if now.last_checkpoint else "the beginning"
    )
    why = f"{now.last_run} {_ended(now.last_state)}; it resumes from {where}"
    return NextStep("home.resume", "resume", "Resume the run", why)


def _prepare(now: HomeState) -> NextStep:
    if not now.recipe.model.id:
        if not now.local_models:
            return DEMO
        number = f"{now.local_models} model{'s are' if now.local_models > 1 else ' is'} on this machine"
        return NextStep("go.models", "app.go('models')", "Select a model", number)
    if now.model_error:
        step = "Get the weights, or select another model" if now.can_download else "Select another model"
        return NextStep("go.models", "app.go('models')", step, now.model_error)
    if not now.recipe.data.sources:
        return NextStep("go.data", "app.go('data')", "Select the training data", "the recipe has no data yet")
    if now.data_error:
        return NextStep("go.data", "app.go('data')", "Fix the data", now.data_error)
    if now.verdict == "does not fit":
        return NextStep(
            "go.memory", "app.go('memory')", "Make it fit", "the recipe needs more memory than there is"
        )
    why = "checked and launched on the Train screen"
    if now.duration:
        why = f"{now.duration} here, launched on the Train screen"
    text = "Prepare a new run" if now.last_state == "finished" else "Check the recipe"
    return NextStep("home.prepare", "prepare", text, why)


def _ended(state: State | None) -> str:
    return {"paused": "is paused", "stopped": "was stopped", "lost": "was lost"}.get(state or "", "failed")
