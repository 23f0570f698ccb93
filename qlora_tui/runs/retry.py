"""Recipe changes after running out of memory that do not change what is trained.

First the micro-batch is halved and accumulation doubled, which keeps the effective batch. At a micro-batch
of one, activation checkpointing is turned on. After that no change keeps the recipe's meaning.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from msgspec import Struct, structs

from qlora_tui.decoding import decode_json
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.recipe.schema import Recipe, Training
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventTail, EventWriter
from qlora_tui.runs.events import Failed, Health, RunEnded, Started


class RetryPlan(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Settings of ``[training]`` that an attempt overrides; None leaves a setting as it is.

    The field names are those of the recipe and of the ``started`` event.
    """

    micro_batch_size: int | None = None
    gradient_accumulation: int | None = None
    gradient_checkpointing: bool | None = None

    @classmethod
    def used_by(cls, settings: Training | Started) -> RetryPlan:
        """Return a plan that sets every field: the values that a recipe requests or that an attempt used."""
        return msgspec.convert(settings, cls, from_attributes=True)

    def overrides(self) -> dict[str, Any]:
        """Settings that this plan sets."""
        return {name: value for name, value in structs.asdict(self).items() if value is not None}

    def applied(self, recipe: Recipe) -> Recipe:
        """Return the recipe as the attempt runs it."""
        return structs.replace(recipe, training=structs.replace(recipe.training, **self.overrides()))

    def to_arguments(self) -> list[str]:
        """Option of ``python -m qlora_tui.training`` that carries the plan; empty without overrides."""
        return ["--plan", msgspec.json.encode(self).decode()] if self.overrides() else []


_DECODER = msgspec.json.Decoder(RetryPlan)


def parse_plan(argument: str) -> RetryPlan:
    """Decode the value of ``--plan``. Raises UserError if it is not valid JSON of a plan."""
    try:
        return decode_json(argument.encode(errors="surrogateescape"), _DECODER)
    except msgspec.MsgspecError as error:
        raise UserError(
            "Invalid --plan",
            what=f"{argument} cannot be decoded: {error}.",
            fix='Pass JSON such as {"micro_batch_size":1,"gradient_accumulation":8}, or omit --plan.',
            exit_code=EXIT_USAGE,
        ) from None


def last_plan(run: RunDir) -> RetryPlan:
    """Plan of the last attempt; empty before the first."""
    plan = RetryPlan()
    for event in EventTail(run.events_path).drain():
        if isinstance(event, Started) and event.micro_batch_size and event.gradient_accumulation:
            plan = RetryPlan.used_by(event)
    return plan


def plan_resume(run: RunDir) -> RetryPlan:
    """Plan with the recipe's settings, or those of a retry: settings that did not fit are not tried again."""
    drained = EventTail(run.events_path).drain()
    ran_out = any(isinstance(event, Failed) and event.kind == "out_of_memory" for event in drained)
    return last_plan(run) if ran_out else RetryPlan()


def next_plan(run: RunDir, ending: RunEnded) -> RetryPlan | None:
    """Plan of the next attempt after an ending; None if there should be none."""
    if not isinstance(ending, Failed) or ending.kind != "out_of_memory":
        return None
    try:
        return reduce_memory(run.recipe(), last_plan(run))
    except UserError:
        return None


def plan_retry(run: RunDir, ending: RunEnded) -> RetryPlan | None:
    """Plan the next attempt after an ending, and record it in the run's events."""
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
    """Return the next cheaper plan with the same effective batch; None if there is none."""
    training = used.applied(recipe).training
    micro_batch_size, accumulation = training.micro_batch_size, training.gradient_accumulation
    checkpointing = training.gradient_checkpointing
    if micro_batch_size > 1:
        # An odd micro-batch cannot be halved exactly: one row at a time keeps the product.
        factor = 2 if micro_batch_size % 2 == 0 else micro_batch_size
        return RetryPlan(
            micro_batch_size=micro_batch_size // factor,
            gradient_accumulation=accumulation * factor,
            gradient_checkpointing=checkpointing,
        )
    if not checkpointing:
        return RetryPlan(micro_batch_size=1, gradient_accumulation=accumulation, gradient_checkpointing=True)
    return None


def describe_plan(plan: RetryPlan) -> str:
    """Describe the plan, for events and screens."""
    words = f"micro-batch {plan.micro_batch_size} × accumulation {plan.gradient_accumulation}"
    return words + (" and gradient checkpointing" if plan.gradient_checkpointing else "")
