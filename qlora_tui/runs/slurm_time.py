"""The time limit of a job: proposed from measured speed, rejected if too short for two checkpoints."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from qlora_tui.catalog.local_models import find_files, load_architecture
from qlora_tui.errors import UsageError, UserError
from qlora_tui.formatting import format_duration, pluralize
from qlora_tui.memory.budget import budget_for, local_budget
from qlora_tui.memory.traces import NO_TRACES
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import slurm
from qlora_tui.runs.data_checks import RunLength, run_length
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.event_log import read_from
from qlora_tui.runs.events import Environment, Started, Step, decode
from qlora_tui.runs.expected_time import ExpectedTime, time_on
from qlora_tui.runs.slurm import SIGNAL_S, JobPlan, Target

_START_S = 180.0
"""Seconds from the start of a job to its first step, if this was not measured."""
_MARGIN = 1.5
"""Factor applied to the measured training time, to allow for evaluations, checkpoints and slower nodes."""
_ROUND_S = 300
_HEAD_BYTES = 1 << 18
"""Bytes at the beginning of the event file that certainly include the first step."""


def plan_job(recipe: Recipe, name: str) -> JobPlan:
    """Return the options of a job for this recipe.

    Args:
        recipe: The recipe.
        name: Name of the target.

    Raises:
        UserError: The target cannot be used, has too few GPUs, or its time limit is too short.
    """
    slurm.require_installed()
    target = slurm.load_target(name)
    _check_gpus(recipe, name, target)
    device, start_s = _measured_on(name)
    length, time = None, None
    with suppress(UserError):
        length = run_length(recipe, find_files(recipe.model.id))
        if length is not None and device is not None:
            time = _time(recipe, device, length)
    wanted_s = slurm.parse_limit(target.time) if target.time else None
    limit_s = None
    if wanted_s is not None:
        words = f"A job's time limit is {format_duration(wanted_s)} (time in {name}.toml)."
    elif time is None:
        words = (
            "A job's time limit is the cluster's default, because no run has been measured on this target."
        )
    else:
        needed_s = start_s + _MARGIN * time.seconds + SIGNAL_S
        limit_s = -(-round(needed_s) // _ROUND_S) * _ROUND_S
        most_s = slurm.partition_limit(target.partition)
        if most_s is not None:
            limit_s = min(limit_s, most_s)
        words = (
            f"A job's time limit is {format_duration(limit_s)}: about {format_duration(time.seconds)} of "
            f"training, {time.source}, and a margin."
        )
    _check_limit(recipe, wanted_s or limit_s, start_s, length, time)
    return JobPlan(name, target, limit_s, words)


def _check_gpus(recipe: Recipe, name: str, target: Target) -> None:
    gpus, given = recipe.training.gpus, slurm.gpus_of(target.gres)
    if gpus == 0 and not target.gres:
        raise UsageError(
            "How many GPUs?",
            what="The recipe asks for all GPUs (training.gpus = 0), but a job must request a fixed number.",
            fix=f"Set training.gpus to 1 or more, or set gres in {name}.toml.",
        )
    if target.gres and gpus > given:
        raise UsageError(
            "Not enough GPUs",
            what=f"The recipe asks for {gpus} GPUs (training.gpus), but {name}.toml requests {target.gres}.",
            fix=f"Set training.gpus to {given}, or change gres in {name}.toml.",
        )


def _check_limit(
    recipe: Recipe, limit_s: int | None, start_s: float, length: RunLength | None, time: ExpectedTime | None
) -> None:
    """Raise UsageError if a job would end before its second checkpoint, or before its first step."""
    if limit_s is None:
        return
    least_s, why = start_s + SIGNAL_S, f"Starting takes about {format_duration(start_s)}"
    if length is not None and time is not None:
        every = recipe.training.checkpoint_every or length.steps_per_epoch
        saves_s = min(2 * every * time.seconds / max(1, length.steps), time.seconds)
        least_s += saves_s
        steps = pluralize(every, "step")
        why += (
            f", training until the second checkpoint (one every {steps}) takes about "
            f"{format_duration(saves_s)}"
        )
    if limit_s >= least_s:
        return
    raise UsageError(
        "The time limit is too short",
        what=f"The time limit of a job is {format_duration(limit_s)}.",
        why=f"{why}, and the last {format_duration(SIGNAL_S)} are reserved for saving.",
        fix=f"Set the target's time to {slurm.format_limit(-(-round(least_s) // 60) * 60)} or more, or save "
        "more often (training.checkpoint_every).",
    )


def _time(recipe: Recipe, environment: Environment, length: RunLength) -> ExpectedTime | None:
    architecture = load_architecture(recipe.model.id)
    if environment.device_kind == "cpu":
        budget = local_budget()
    else:
        budget = budget_for(None, environment.device_total_bytes)
    device = replace(budget.device, kind=environment.device_kind, traces=NO_TRACES)
    time = time_on(recipe, architecture, device, environment.device, length.tokens)
    return time if time is not None and time.run else None


def _measured_on(name: str) -> tuple[Environment | None, float]:
    """Return the environment of the last run on a target, and its seconds from start to first step."""
    for run in all_runs():
        submission = slurm.submission_of(run)
        if submission is None or submission.target != name:
            continue
        environment, start_s = _first_attempt(run)
        if environment is not None and start_s is not None:
            return environment, start_s
    return None, _START_S


def _first_attempt(run: RunDir) -> tuple[Environment | None, float | None]:
    environment: Environment | None = None
    started_at: float | None = None
    with suppress(OSError):
        for line in read_from(run.events_path, 0, _HEAD_BYTES).splitlines():
            match decode(line):
                case Started(at=at):
                    started_at = at
                case Environment() as event:
                    environment = event
                case Step(at=at) if started_at is not None:
                    return environment, max(0.0, at - started_at)
                case _:
                    pass
    return environment, None
