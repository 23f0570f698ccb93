"""Training runs as the app starts them: queued, trained by a runner, and followed to their end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from bench.acceptance.context import CheckContext
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Data, Lora, Model, Recipe, Source
from qlora_tui.recipe.training_settings import Training
from qlora_tui.runs import actions
from qlora_tui.runs.describe import follow_events
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import AnyEvent, Finished, Step
from qlora_tui.runs.view import RunView

E = TypeVar("E")
OnEvent = Callable[[RunDir, AnyEvent], None]


@dataclass(frozen=True)
class EndedRun:
    """A run that has ended, and its events."""

    run: RunDir
    events: list[AnyEvent]

    def events_of(self, kind: type[E]) -> list[E]:
        """Return the events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def losses(self) -> list[float]:
        """Training loss by step. For a repeated step, the last loss."""
        losses = {step.step: step.loss for step in self.events_of(Step)}
        return [float("nan") if loss is None else loss for loss in losses.values()]

    def require_finished(self) -> EndedRun:
        """Return the run itself. Raises AssertionError with its last event if it did not finish."""
        if not self.events_of(Finished):
            raise AssertionError(f"{self.run.path}: {self.events[-1] if self.events else 'no event'}")
        return self


def short_recipe(context: CheckContext, **settings: Any) -> Recipe:
    """Return the recipe of a run of 6 steps. ``settings`` are paths with ``__`` in place of the dot."""
    recipe = Recipe(
        model=Model(id=context.model),
        lora=Lora(rank=16, dropout=0.05),
        data=Data(sources=(Source(path=context.rows),), max_length=512, validation_fraction=0.1),
        training=Training(
            micro_batch_size=1, gradient_accumulation=2, epochs=100.0, max_steps=6, optimizer="adamw"
        ),
    )
    for key, value in settings.items():
        recipe = replace_setting(recipe, key.replace("__", "."), value)
    return recipe


def train(recipe: Recipe, on_event: OnEvent | None = None) -> EndedRun:
    """Queue a run and wait for its end."""
    return follow(actions.submit(recipe), on_event)


def follow(run: RunDir, on_event: OnEvent | None = None) -> EndedRun:
    """Wait for the end of a run. ``on_event`` is called with each event as it arrives."""
    ended = EndedRun(run, [])
    for event in follow_events(RunView(run)):
        ended.events.append(event)
        if on_event is not None:
            on_event(run, event)
    return ended
