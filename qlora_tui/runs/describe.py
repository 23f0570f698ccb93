"""Sentences about a run: its events, its state for screen readers, and its events as they arrive.

``attach``, ``train`` and ``demo`` print these sentences; the log of the live screen shows the same lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from msgspec import structs

from qlora_tui.errors import UserError
from qlora_tui.formatting import (
    capitalize,
    format_bytes,
    format_count,
    format_duration,
    format_float,
    format_gib,
    format_kwh,
    format_loss,
    format_loss_change,
    format_nats,
    format_number,
    format_percent,
    format_points,
    format_power,
    format_progress,
    format_rate,
    format_small_percent,
    format_speed,
    pluralize,
)
from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.hours import Clock
from qlora_tui.locks import is_locked
from qlora_tui.recipe.fields import name_settings
from qlora_tui.runs import events
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import last_log_lines
from qlora_tui.runs.holds import hold_words, time_words
from qlora_tui.runs.process import ensure_runner, runner_lock_path, runner_log_path
from qlora_tui.runs.slurm_runs import is_on_cluster, refresh
from qlora_tui.runs.status import ACTIVE, held_words
from qlora_tui.runs.task_metrics.intervals import MIN_ROWS
from qlora_tui.runs.telemetry import Reading
from qlora_tui.runs.view import RunView
from qlora_tui.settings import current_settings

_MINUTE_S = 60.0
_clock = Clock()
POLL_S = 0.25
GRACE_S = 10.0
"""Seconds without a runner after which one is started.

A runner may take this long to start, or to replace one that exits.
"""
MUCH_FORGETTING = 2.0
"""Limit in nats per token, at which each token of the base's own answer becomes 7 times less likely.

The demo, which teaches a style, reaches 1.4.
"""
_FAR_ABOVE = 1.25
"""Multiple of the estimated memory above which a measured peak is marked as a warning."""
_FEW_TURN_ENDS = 0.5
"""Share of the base's turn ends below which a warning says that answers no longer end."""


def describe(event: events.AnyEvent, total_steps: int = 0) -> str:
    """Describe an event in one or a few lines."""
    match event:
        case events.Queued():
            return "queued"
        case events.Started():
            again = f", continuing from step {event.resumed_from_step:,}" if event.resumed_from_step else ""
            return f"attempt {event.attempt}{again}"
        case events.PhaseChanged():
            return f"{events.phase_label(event.phase)}{': ' + event.detail if event.detail else ''}"
        case events.Progress():
            return f"{events.phase_label(event.phase)} {format_progress(event.done, event.total)}"
        case events.Environment():
            kernels = "; Triton kernels" if event.kernels == "triton" else ""
            computed = f"attention: {event.attention}; loss: {event.loss}{kernels}"
            return f"{event.device}, {event.compute_dtype}; {computed}"
        case events.DataReady():
            return (
                f"{event.samples:,} samples, {event.validation_samples:,} for validation; "
                f"{event.trained_tokens:,} of {event.tokens:,} tokens trained; "
                + (f"{event.replayed:,} answers of the base model replayed; " if event.replayed else "")
                + f"{event.total_steps:,} steps"
            )
        case events.AdapterReady():
            share = format_small_percent(event.trained_parameters / event.total_parameters)
            return f"training {format_count(event.trained_parameters)} parameters ({share} of the model)"
        case events.StepVerified():
            return _format_verified(event)
        case events.StepChosen():
            split = f"{event.micro_batch_size} × {event.gradient_accumulation}"
            return (
                f"chosen by free memory: batch {event.effective_batch} = {split}, optimizer {event.optimizer}"
            )
        case events.LayersKept():
            return _format_kept(event)
        case events.LayersStreamed():
            return (
                f"streamed layers: {event.streamed_layers} of {event.layers} stay in host memory "
                f"({format_bytes(event.host_bytes)}) and are streamed through "
                f"{format_bytes(event.slot_bytes)} on the device"
            )
        case events.MemoryMeasured():
            estimated = f"{format_bytes(event.estimated_bytes)} estimated"
            if exceeds_estimate(event):
                more = format_percent(event.measured_bytes / event.estimated_bytes - 1)
                estimated = f"{more} more than the {estimated}"
            return f"memory: {format_bytes(event.measured_bytes)} measured, {estimated}"
        case events.Step():
            return (
                f"step {format_progress(event.step, total_steps)}  loss {format_loss(_number(event.loss))}  "
                f"{format_rewards(event)}{'  ' if event.reward_accuracy is not None else ''}"
                f"lr {format_rate(event.learning_rate)}  grad {format_float(_number(event.grad_norm))}  "
                f"{format_speed(event.tokens_per_s)} tok/s"
            )
        case events.Evaluated():
            best = _format_best(event) if event.best and event.step else ""
            exact = "" if event.accuracy is None else f", {format_percent(event.accuracy)} of answers exact"
            rewards = "" if event.reward_accuracy is None else f", {format_rewards(event)}"
            base = " (the base model)" if exact and not event.step else ""
            forgot = format_forgetting(event) if event.step else ""
            general = event.general_answers
            answers = "" if general is None else f"; of {general.answers} general answers "
            answers += ", ".join(f"{name} {value}" for name, value in general_answer_texts(general))
            measured = f"{format_loss(_number(event.loss))}{best}{rewards}{exact}{base}"
            return f"step {event.step:,}: validation loss {measured}{', ' if forgot else ''}{forgot}{answers}"
        case events.ValidationCompared():
            change = (
                "too few rows to tell a change from chance"
                if event.rows < MIN_ROWS or event.low is None or event.high is None
                else "95% interval of the change "
                f"{format_loss_change(event.low)} to {format_loss_change(event.high)}"
            )
            return (
                f"validation loss of {pluralize(event.rows, 'row')} before training "
                f"{format_loss(event.before)}, after {format_loss(event.after)}; {change}"
            )
        case events.AnswersCompared():
            verdict = "not enough evidence" if event.comparison == "unclear" else event.comparison
            change = f"{format_points(event.low)} to {format_points(event.high)} points"
            return (
                f"answers to {pluralize(event.prompts, 'validation prompt')}: {event.metric} "
                f"{format_percent(event.adapter)} versus the base's {format_percent(event.base)}, 95% "
                f"interval of the change {change}: {verdict}"
            )
        case events.CheckpointSaved():
            return f"checkpoint at step {event.step:,}"
        case events.SampleGenerated():
            return f"step {event.step:,}: {event.prompt!r} → {event.answer!r}"
        case events.Health():
            return f"{event.severity}: {event.evidence} {event.remedy}"
        case events.RequestReceived():
            value = "" if event.value is None else f" {format_number(event.value)}"
            request = "sample answers" if event.request == "sample" else event.request.replace("_", " ")
            return f"requested: {request}{value}"
        case events.Finished():
            sentence = (
                f"finished at step {event.step:,} after {format_duration(event.seconds)}: {event.reason}"
            )
            energy = format_energy(event)
            return f"{sentence}; {energy}" if energy else sentence
        case events.Stopped():
            return f"stopped at step {event.step:,}"
        case events.Paused():
            return f"paused at step {event.step:,}{f' {hold_words(event.hold)}' if event.hold else ''}"
        case events.Failed():
            return f"failed: {event.problem()}"


def exceeds_estimate(event: events.MemoryMeasured) -> bool:
    """Return whether a measured peak is so far above its estimate that the estimate was wrong."""
    return event.estimated_bytes > 0 and event.measured_bytes > _FAR_ABOVE * event.estimated_bytes


def format_rewards(event: events.Step | events.Evaluated | None) -> str:
    """Return ``83% right, margin 0.12``: the share of correctly ordered answers and the mean reward margin.

    Empty without a preference method.
    """
    if event is None or event.reward_accuracy is None:
        return ""
    margin = event.reward_margin
    far = "" if margin is None else f", margin {format_nats(margin)}"
    return f"{format_percent(event.reward_accuracy)} right{far}"


def format_forgetting(event: events.Evaluated | None) -> str:
    """Return how far the model has diverged from its base on general prompts; empty if not measured."""
    if event is None or event.forgetting is None:
        return ""
    return f"forgetting {format_nats(event.forgetting)}"


def forgetting_evidence(
    step: int, divergence: float, turn_ends: float | None, since: tuple[int, float] | None = None
) -> str:
    """Return the text of a forgetting warning: first the effect, then the measured value, on one line.

    Args:
        step: Step of the latest evaluation.
        divergence: Mean KL(base ‖ model) on general prompts at this step, in nats per token.
        turn_ends: Share of the base's turn ends that the model keeps; None if the base has none.
        since: Step and divergence of the first warning, if it was earlier.
    """
    was = "" if since is None else f" ({format_nats(since[1])} at step {since[0]:,})"
    effect = forgetting_effect(divergence, turn_ends)
    return (
        f"{capitalize(effect)}. {capitalize(forgetting_words(divergence))}: "
        f"KL divergence from the base on general prompts at step {step:,}{was}."
    )


def forgetting_words(divergence: float) -> str:
    """Return the forgetting and the limit above which it counts as a lot: ``forgetting 1.4 of 2``.

    ``divergence`` is in nats per token.
    """
    return f"forgetting {format_nats(divergence)} of {format_number(MUCH_FORGETTING)}"


def forgetting_effect(divergence: float, turn_ends: float | None) -> str:
    """Return what has changed in answers to general prompts, such as ``general answers no longer end``.

    Args:
        divergence: Mean KL(base ‖ model) on general prompts, in nats per token.
        turn_ends: Share of the base's turn ends that the model keeps; None if the base has none.
    """
    if turn_ends is not None and turn_ends < _FEW_TURN_ENDS:
        share = format_percent(turn_ends)
        return f"only {share} of general answers still end" if turn_ends else "general answers no longer end"
    return "other abilities are at risk" if divergence > MUCH_FORGETTING else "general answers have changed"


def current_health(view: RunView) -> tuple[events.Health, ...]:
    """Return the findings of a run.

    Settings are named by their labels, and a forgetting warning has the latest value.
    """
    measured = [(e.step, e.forgetting, e.general_turn_ends) for e in view.evaluations if e.step]
    known = [(step, value, ends) for step, value, ends in measured if value is not None]

    def current(health: events.Health) -> events.Health:
        health = structs.replace(health, remedy=name_settings(health.remedy))
        if health.kind != "forgetting" or not known:
            return health
        first = next(((step, value) for step, value, _ in known if step >= health.step), known[-1][:2])
        since = first if first[0] < known[-1][0] else None
        return structs.replace(health, evidence=forgetting_evidence(*known[-1], since))

    return tuple(map(current, view.health))


def general_answer_texts(counts: events.GeneralAnswers | None) -> list[tuple[str, str]]:
    """Return label and text of each count over general answers, such as ``("ended", "9 (base 11)")``."""
    if counts is None:
        return []
    pairs = [
        ("ended", counts.ended, counts.base_ended),
        ("looping", counts.looping, counts.base_looping),
        ("refused", counts.refused, counts.base_refused),
    ]
    if counts.json_prompts:
        pairs.append(("valid JSON", counts.json_valid, counts.base_json_valid))
    return [(label, f"{count} (base {base})") for label, count, base in pairs]


def _format_best(event: events.Evaluated) -> str:
    before = event.before_training
    if before is None or (event.loss is not None and event.loss < before):
        return ", best so far"
    return f", lowest so far, but {format_loss(before)} before training"


class PhaseFilter:
    """Selects which events are displayed: each phase is displayed only once per attempt.

    Otherwise, the training phase would be displayed again after every evaluation and checkpoint.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()

    def is_new(self, event: events.AnyEvent) -> bool:
        """Return False for a phase that was already displayed. Must be called for every event, in order."""
        if isinstance(event, events.Started):
            self._seen.clear()
        if not isinstance(event, events.PhaseChanged):
            return True
        phase = (event.phase, "" if event.phase in events.STEP_PHASES else event.detail)
        new = phase not in self._seen
        self._seen.add(phase)
        return new


def unknown_lines(number: int) -> str:
    """Return a message about lines that this version cannot read."""
    lines = "1 line is" if number == 1 else f"{number:,} lines are"
    return (
        f"{lines} not shown: another version of qlora-tui wrote them, or they are damaged. "
        "`qlora-tui runs check` reports damaged lines."
    )


def format_energy(ending: events.Finished, *, with_cost: bool = True) -> str:
    """Return ``0.42 kWh, 0.13 EUR, 3.1 tokens/J``; empty if the GPU reported no power."""
    if ending.energy_kwh is None:
        return ""
    used = energy_words(ending.energy_kwh) if with_cost else format_kwh(ending.energy_kwh)
    efficiency = ending.tokens_per_joule
    return used if efficiency is None else f"{used}, {format_float(efficiency)} tokens/J"


def energy_words(kwh: float) -> str:
    """Return ``0.24 kWh, 0.07 EUR``: the energy, with its cost if the user has set a price."""
    cost = current_settings().cost(kwh)
    return f"{format_kwh(kwh)}, {cost}" if cost else format_kwh(kwh)


def done_at_words(seconds_left: float | None) -> str:
    """Return ``Sat 01:20``, the time at which a run will end; empty if it trains without interruption."""
    hours, now = current_settings().training_hours, _clock.now()
    if seconds_left is None:
        return ""
    done_at = hours.done_at(now, seconds_left, _clock.zone())
    return time_words(done_at) if done_at > now + seconds_left + _MINUTE_S else ""


def format_exact(accuracy: float | None, base: float | None) -> str:
    """Return ``97%, base 12%``, the share of exact short answers; empty for data without short answers."""
    if accuracy is None:
        return ""
    return format_percent(accuracy) + ("" if base is None else f", base {format_percent(base)}")


def _format_kept(event: events.LayersKept) -> str:
    available = format_bytes(event.available_bytes)
    if not event.kept_layers:
        return f"gradient checkpointing: every layer, since only {available} of memory is available"
    return (
        f"gradient checkpointing: {event.kept_layers} of {event.layers} layers keep their activations "
        f"({format_bytes(event.estimated_bytes)} of {available} available)"
    )


def _format_verified(event: events.StepVerified) -> str:
    if event.reason:
        return f"the first step could not be checked against transformers and peft: {event.reason}"
    figures = (
        f"loss {format_loss(_number(event.loss))} versus {format_loss(_number(event.reference_loss))}; "
        f"gradients differ by {format_small_percent(_number(event.gradient_difference))} "
        f"({format_small_percent(_number(event.gradient_noise))} by rounding alone)"
    )
    if not event.agrees:
        return f"first step differs from transformers + peft, so the results may be wrong: {figures}"
    if event.replaced:
        return (
            f"first step differed from transformers + peft because of {', '.join(event.replaced)}, which "
            f"this run no longer uses; now they match ({figures})"
        )
    return f"first step matches transformers + peft: {figures}"


def _number(value: float | None) -> float:
    # JSON cannot represent NaN and infinity, so events store them as None.
    return float("nan") if value is None else value


def summarize_status(view: RunView, sample: Reading | None) -> str:
    """Return ``training, step 640 of 3,000, loss 1.21, 12 min left. GPU 96% busy, 18.2 of 24.0 GiB, 61
    °C.``"""
    state = view.status.state
    parts: list[str] = [events.phase_label(view.phase) if state == "running" and view.phase else state]
    progress = view.progress
    if progress is not None and view.phase == progress.phase and state == "running":
        parts.append(format_progress(progress.done, progress.total))
    if view.total_steps:
        parts.append(f"step {format_progress(view.step, view.total_steps)}")
    if view.loss is not None:
        parts.append(f"loss {format_loss(view.loss)}")
    if view.evaluations:
        last = view.evaluations[-1]
        loss = float("nan") if last.loss is None else last.loss
        parts.append(f"validation loss {format_loss(loss)} at step {last.step:,}")
        if last.accuracy is not None:
            base = "" if view.base_accuracy is None else f" (base model {format_percent(view.base_accuracy)})"
            parts.append(f"{format_percent(last.accuracy)} of answers exact{base}")
        if rewards := format_rewards(last):
            parts.append(rewards)
    if view.best is not None and view.best is not view.evaluations[-1]:
        parts.append(f"best {format_loss(view.best.loss)} at step {view.best.step:,}")
    if view.loss_to_beat is not None:
        parts.append(f"worse than before training ({format_loss(view.loss_to_beat)})")
    # If the detail says, for example, that the trainer is suspended, its pace means nothing.
    detail = view.status.detail if state == "running" else ""
    if state == "running" and not detail and view.seconds_left is not None:
        done_at = done_at_words(view.seconds_left)
        parts.append(f"{format_duration(view.seconds_left)} left{f', done {done_at}' if done_at else ''}")
    if view.status.hold is not None:
        parts.insert(1, held_words(view.status))
    summary = f"{', '.join(parts)}.{' ' if detail else ''}{detail}"
    return (
        summary if sample is None or state not in ("starting", "running") else f"{summary} {_machine(sample)}"
    )


def _machine(sample: Reading) -> str:
    if sample.gpu is None:
        cpu = format_percent(sample.cpu_percent / 100)
        return f"No GPU; CPU {cpu} of one core, {format_gib(sample.rss_bytes)} GiB."
    is_one = len(sample.gpus) == 1
    texts = [
        f"GPU {'' if is_one else f'{gpu.index} '}{', '.join(_gpu(gpu)) or 'reports no metrics'}."
        for gpu in sample.gpus
    ]
    return " ".join(texts)


def _gpu(gpu: GpuMetrics) -> list[str]:
    """Return the parts of the sentence about the GPU, without metrics that the GPU does not report."""
    parts = []
    if gpu.utilization_percent is not None:
        parts.append(f"{gpu.utilization_percent}% busy")
    if gpu.memory_used_bytes is not None:
        parts.append(f"{format_gib(gpu.memory_used_bytes)} of {format_gib(gpu.memory_total_bytes)} GiB")
    if gpu.power_w is not None:
        limit = "" if gpu.power_limit_w is None else f" of {format_power(gpu.power_limit_w)}"
        parts.append(f"{format_power(gpu.power_w)}{limit} W")
    if gpu.temperature_c is not None:
        parts.append(f"{gpu.temperature_c} °C")
    if gpu.throttle:
        parts.append(f"slowed by {', '.join(gpu.throttle)}")
    return parts


def follow_events(
    view: RunView, on_status: Callable[[str], None] = lambda detail: None
) -> Iterator[events.AnyEvent]:
    """Yield every event that the view has not read yet, until the run is over.

    Afterwards ``view.ending`` is the ending. It is None if only ``view.status`` has the outcome: for a run
    that is lost or unreadable, or whose last event is missing or damaged. Raises UserError for a queued run
    that no runner starts.

    ``on_status`` is called with a sentence about a trainer that may send no events for long, because it is
    suspended, does not respond, or runs on another machine, and about a suspended runner.
    """
    settled_before = False
    runner = _RunnerMonitor(view.run)
    reported = waited_for = ""
    while True:
        yield from view.iter_new()
        state = view.status.state
        # The runner is about to requeue a run on hold.
        is_held = state == "paused" and isinstance(view.ending, events.Paused) and bool(view.ending.hold)
        settled = not (is_held or state == "queued" or state in ACTIVE)
        # Resuming appends Queued shortly before it changes the status, so an ending may be missing once.
        if state in ("lost", "unreadable", "gone") or (settled and (view.ending or settled_before)):
            return
        settled_before = settled
        # The text before a colon stays the same, while the text after it may contain an age.
        detail = view.status.detail if state == "queued" or state in ACTIVE else ""
        if detail.partition(":")[0] != reported:
            if detail or waited_for:
                on_status(detail or f"The {waited_for} responds again.")
            reported = detail.partition(":")[0]
            # Events report the end of a hold.
            waited_for = "" if view.status.hold else "runner" if state == "queued" else "trainer"
        if is_on_cluster(view.run):
            refresh([view.run])
        elif state == "queued" or is_held:
            runner.check()
        time.sleep(POLL_S)


class _RunnerMonitor:
    """Makes sure that a queued run has a runner, which may have been killed or be unable to work."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._missing_since: float | None = None
        self._tried = False

    def check(self) -> None:
        """Start a runner if none was active for a while. Raises UserError if starting one did not help."""
        now = time.monotonic()
        if is_locked(runner_lock_path()):
            self._missing_since = None
            return
        if self._missing_since is None:
            self._missing_since = now
        if now - self._missing_since < GRACE_S:
            return
        if self._tried:
            lines = [line.strip() for line in last_log_lines(runner_log_path()) if line.strip()]
            raise UserError(
                "The run was not started",
                what=f"{self._run.id} is queued, but the runner ended before it started the run.",
                why=f"The runner's log ends: {lines[-1]}" if lines else "",
                fix=f"{runner_log_path()} has the details; `qlora-tui attach {self._run.id}` tries again.",
            )
        ensure_runner()
        self._tried, self._missing_since = True, None
