"""A run's state for screen readers: one sentence each for the run and its GPU, without charts or columns."""

from __future__ import annotations

from qlora_tui.formatting import format_duration, format_float, format_gib, format_percent
from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.runs.describe import format_rewards
from qlora_tui.runs.events import phase_label
from qlora_tui.runs.telemetry import Reading
from qlora_tui.runs.view import RunView


def summarize_status(view: RunView, sample: Reading | None) -> str:
    """``training, step 640 of 3,000, loss 1.21, 12 min left. GPU 96% busy, 18.2 of 24.0 GiB, 61 °C.``"""
    state = view.status.state
    parts: list[str] = [phase_label(view.phase) if state == "running" and view.phase else state]
    progress = view.progress
    if progress is not None and view.phase == progress.phase:
        parts.append(f"{progress.done:,} of {progress.total:,}")
    if view.total_steps:
        parts.append(f"step {view.step:,} of {view.total_steps:,}")
    if view.loss is not None:
        parts.append(f"loss {format_float(view.loss, 3)}")
    if view.evaluations:
        last = view.evaluations[-1]
        loss = float("nan") if last.loss is None else last.loss
        parts.append(f"validation loss {format_float(loss, 3)} at step {last.step:,}")
        if last.accuracy is not None:
            base = "" if view.base_accuracy is None else f" (base model {format_percent(view.base_accuracy)})"
            parts.append(f"{format_percent(last.accuracy)} of answers exact{base}")
        if rewards := format_rewards(last):
            parts.append(rewards)
    if view.best is not None and view.best is not view.evaluations[-1]:
        parts.append(f"best {format_float(view.best.loss, 3)} at step {view.best.step:,}")
    if view.loss_to_beat is not None:
        parts.append(f"worse than before training ({format_float(view.loss_to_beat, 3)})")
    # Such as that the trainer is suspended: then nothing is left of its pace.
    detail = view.status.detail if state == "running" else ""
    if state == "running" and not detail and view.seconds_left is not None:
        parts.append(f"{format_duration(view.seconds_left)} left")
    summary = f"{', '.join(parts)}.{' ' if detail else ''}{detail}"
    return (
        summary if sample is None or state not in ("starting", "running") else f"{summary} {_machine(sample)}"
    )


def _machine(sample: Reading) -> str:
    if sample.gpu is None:
        return f"No GPU; CPU {sample.cpu_percent:.0f}% of one core, {format_gib(sample.rss_bytes)} GiB."
    return f"GPU {', '.join(_gpu(sample.gpu)) or 'tells nothing'}."


def _gpu(gpu: GpuMetrics) -> list[str]:
    """Parts of the GPU sentence; metrics that the GPU does not report are left out."""
    parts = []
    if gpu.utilization_percent is not None:
        parts.append(f"{gpu.utilization_percent}% busy")
    if gpu.memory_used_bytes is not None:
        parts.append(f"{format_gib(gpu.memory_used_bytes)} of {format_gib(gpu.memory_total_bytes)} GiB")
    if gpu.power_w is not None:
        limit = "" if gpu.power_limit_w is None else f" of {gpu.power_limit_w:.0f}"
        parts.append(f"{gpu.power_w:.0f}{limit} W")
    if gpu.temperature_c is not None:
        parts.append(f"{gpu.temperature_c} °C")
    if gpu.throttle:
        parts.append(f"slowed by {', '.join(gpu.throttle)}")
    return parts
