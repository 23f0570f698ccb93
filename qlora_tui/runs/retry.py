"""What to change when memory ran out, so that the run still learns the same thing.

First the micro-batch is halved and accumulation doubled: the effective batch stays. At a micro-batch of one,
activation checkpointing is turned on. After that nothing that keeps the recipe's meaning is left.
"""

from __future__ import annotations

import time

from msgspec import Struct, structs

from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventTail, EventWriter
from qlora_tui.runs.events import Failed, Health, RunEnded, Started


class RetryPlan(Struct, frozen=True, kw_only=True):
    """How an attempt departs from its recipe; None leaves a setting as it is."""

    micro_batch: int | None = None
    gradient_accumulation: int | None = None
    gradient_checkpointing: bool | None = None

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe as the attempt runs it."""
        changes = {key: value for key, value in structs.asdict(self).items() if value is not None}
        return structs.replace(recipe, training=structs.replace(recipe.training, **changes))

    def arguments(self) -> list[str]:
        """For the trainer's command line."""
        arguments = []
        if self.micro_batch is not None:
            arguments += ["--micro-batch", str(self.micro_batch)]
        if self.gradient_accumulation is not None:
            arguments += ["--gradient-accumulation", str(self.gradient_accumulation)]
        if self.gradient_checkpointing:
            arguments += ["--gradient-checkpointing"]
        return arguments


def last_plan(run: RunDir) -> RetryPlan:
    """What the last attempt used; empty before the first."""
    plan = RetryPlan()
    for event in EventTail(run.events_path).drain():
        if isinstance(event, Started) and event.micro_batch:
            plan = RetryPlan(
                micro_batch=event.micro_batch,
                gradient_accumulation=event.gradient_accumulation,
                gradient_checkpointing=event.gradient_checkpointing,
            )
    return plan


def plan_resume(run: RunDir) -> RetryPlan:
    """The recipe's own settings, or those that a retry found: what did not fit once is not tried again."""
    drained = EventTail(run.events_path).drain()
    ran_out = any(isinstance(event, Failed) and event.kind == "out_of_memory" for event in drained)
    return last_plan(run) if ran_out else RetryPlan()


def next_plan(run: RunDir, ending: RunEnded) -> RetryPlan | None:
    """The next attempt after an ending; None when there should be none."""
    if not isinstance(ending, Failed) or ending.kind != "out_of_memory":
        return None
    try:
        return reduce_memory(run.recipe(), last_plan(run))
    except UserError:
        return None


def plan_retry(run: RunDir, ending: RunEnded) -> RetryPlan | None:
    """The next attempt after an ending, told in the run's events."""
    plan = next_plan(run, ending)
    if plan is not None and isinstance(ending, Failed):
        with EventWriter(run.events_path) as log:
            log.append(
                Health(
                    at=time.time(),
                    kind="out_of_memory",
                    severity="warning",
                    evidence=ending.what,
                    remedy=f"Trying again with {describe_plan(plan)}; the effective batch stays.",
                )
            )
    return plan


def reduce_memory(recipe: Recipe, used: RetryPlan) -> RetryPlan | None:
    """The next cheaper plan with the same effective batch, or None at the end of the road."""
    training = recipe.training
    micro_batch = used.micro_batch or training.micro_batch
    accumulation = used.gradient_accumulation or training.gradient_accumulation
    checkpointing = used.gradient_checkpointing or training.gradient_checkpointing
    if micro_batch > 1:
        # An odd micro-batch cannot be halved exactly: one row at a time keeps the product.
        factor = 2 if micro_batch % 2 == 0 else micro_batch
        return RetryPlan(
            micro_batch=micro_batch // factor,
            gradient_accumulation=accumulation * factor,
            gradient_checkpointing=checkpointing,
        )
    if not checkpointing:
        return RetryPlan(micro_batch=1, gradient_accumulation=accumulation, gradient_checkpointing=True)
    return None


def describe_plan(plan: RetryPlan) -> str:
    """In words, for events and screens."""
    words = f"micro-batch {plan.micro_batch} × accumulation {plan.gradient_accumulation}"
    return words + (" and activation checkpointing" if plan.gradient_checkpointing else "")
