"""The whole workflow on a small real model: data, estimate, background training, comparison with the base."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from qlora_tui.catalog.local_models import load_architecture
from qlora_tui.chat.chat_sources import run_source
from qlora_tui.chat.chat_types import AnswerComparison
from qlora_tui.demo.conversations import CONVERSATIONS, HELD_OUT, SHOWN, voice_faults
from qlora_tui.demo.demo_model import ensure_model
from qlora_tui.errors import UserError
from qlora_tui.memory import estimate
from qlora_tui.memory.budget import local_budget
from qlora_tui.recipe.layering import build_recipe
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions
from qlora_tui.runs.describe import follow_events
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import AnyEvent, Failed, Finished
from qlora_tui.runs.view import RunView

PRESET = "cpu-demo"
MAX_ANSWER_TOKENS = 80
"""Token limit of an answer. The adapter's answers have about 40 tokens."""


class DemoResult(Struct, frozen=True, kw_only=True):
    """Output of ``qlora-tui demo --json``."""

    run: str
    adapter_dir: str
    steps: int
    loss_first: float
    loss_last: float
    validation_loss_before: float
    validation_loss_after: float
    estimated_peak_bytes: int
    measured_peak_bytes: int
    tokens_per_s: float
    seconds: float
    """Duration of the whole demo, including download, training and answers."""
    samples: tuple[AnswerComparison, ...]
    """Answers to questions that are not in the training data."""
    in_voice: int
    """Number of the adapter's answers in which :func:`.voice_faults` finds no fault."""


def demo_recipe(model: Path) -> Recipe:
    """Build the recipe from the preset and the bundled conversations.

    The recipe uses the ``chatml`` template, which has no default system prompt. The default prompt of the
    model's own template would add 21 tokens to each conversation.
    """
    sets = ["name=demo", "model.chat_template=chatml"]
    return build_recipe(preset=PRESET, sets=sets, model=str(model), data=[str(CONVERSATIONS)])


def estimated_peak_bytes(recipe: Recipe) -> int:
    """Return the predicted memory peak of the process, on this machine's GPU or CPU, in bytes."""
    budget = local_budget()
    return estimate(recipe, load_architecture(recipe.model.id), device=budget.device).process_bytes


def run_demo(
    on_status: Callable[[str], None],
    on_progress: Callable[[str], None],
    on_event: Callable[[AnyEvent, RunView], None],
) -> DemoResult:
    """Run the demo.

    Args:
        on_status: Receives the current activity.
        on_progress: Receives the progress of this activity.
        on_event: Receives each event of the run.

    Raises:
        UserError: Any step failed. KeyboardInterrupt is not caught, and the run then continues.
    """
    began = time.monotonic()
    recipe = demo_recipe(ensure_model(on_status, on_progress=on_progress))
    predicted = estimated_peak_bytes(recipe)
    run = actions.submit(recipe)
    on_status(f"Training in the background as {run.id}")
    view = wait_for_end(run, on_event)
    if isinstance(view.ending, Failed):
        raise view.ending.problem()
    if not isinstance(view.ending, Finished):
        raise UserError(
            "The demo did not finish",
            what=f"{run.id} is {view.status.state} at step {view.step}.",
            fix=f"Continue with `qlora-tui resume {run.id} --follow`.",
        )
    questions = sum(map(len, HELD_OUT))
    on_status(
        f"Asking the adapter {questions} questions that are not in the data, and asking the base some of them"
    )
    # torch is needed only from here on, after the run, so that only one model at a time is in memory.
    from qlora_tui.chat.repl import compare_answers

    samples = compare_answers(
        run_source(run),
        HELD_OUT,
        max_new_tokens=MAX_ANSWER_TOKENS,
        base_answers=SHOWN,
        on_status=on_progress,
    )
    return result_of(view, predicted, tuple(samples), time.monotonic() - began)


def wait_for_end(run: RunDir, on_event: Callable[[AnyEvent, RunView], None]) -> RunView:
    """Follow a run until it has ended. Raises UserError if it is lost."""
    view = RunView(run)
    for event in follow_events(view):
        on_event(event, view)
    if view.ending is None:
        raise UserError(
            "The demo run was lost",
            what=f"{run.id}: {view.status.detail}",
            fix=f"Continue with `qlora-tui resume {run.id}`; the log is {run.log_path}.",
        )
    return view


def result_of(
    view: RunView, predicted: int, samples: tuple[AnswerComparison, ...], seconds: float
) -> DemoResult:
    """Build the result from the run's own events."""
    losses = [e.loss for e in view.evaluations if e.loss is not None]
    assert isinstance(view.ending, Finished)
    return DemoResult(
        run=view.run.id,
        adapter_dir=str(view.run.adapter_dir),
        steps=view.step,
        loss_first=view.series.loss[0],
        loss_last=view.series.loss[-1],
        validation_loss_before=losses[0],
        validation_loss_after=losses[-1],
        estimated_peak_bytes=predicted,
        measured_peak_bytes=view.memory.measured_bytes if view.memory else 0,
        tokens_per_s=view.ending.tokens_per_s,
        seconds=round(seconds, 1),
        samples=samples,
        in_voice=sum(not voice_faults(each.adapter, ended=each.adapter_ended) for each in samples),
    )
