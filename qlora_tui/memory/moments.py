"""The moments of a training step that may be its peak: from the replayed step, or from a trace of it."""

from __future__ import annotations

from qlora_tui.memory.execution import ExecutionConfig
from qlora_tui.memory.layout import Layout
from qlora_tui.memory.parameter_memory import gradient_bytes, optimizer_step_bytes
from qlora_tui.memory.step import Peak, StepProfile, peak_candidates
from qlora_tui.memory.step_trace import StepTrace


def step_moments(
    step_profile: StepProfile,
    layout: Layout,
    execution: ExecutionConfig,
    traced: StepTrace | None = None,
    *,
    every_layer: bool = False,
) -> list[Peak]:
    """Return the moments in order of time, without what is there all the time.

    With ``every_layer`` there is one for the forward of each layer, not only of the first and the last. Of a
    trace only the larger peak counts; with ``every_layer`` it has a moment for forward and backward each.
    """
    if traced is None:
        moments = peak_candidates(step_profile, layout, execution, every_layer=every_layer)
    elif every_layer:
        moments = [
            _traced_moment("traced forward", traced, traced.forward_bytes),
            _traced_moment("traced backward", traced, traced.backward_bytes),
        ]
    else:
        moments = [_traced_moment("traced step", traced, traced.step_bytes)]
    moments.append(_optimizer_moment(layout, execution, has_gradients=traced is None))
    return moments


def _traced_moment(phase: str, traced: StepTrace, size: int) -> Peak:
    gradients = min(traced.gradient_bytes, size)
    return Peak(phase, {"gradients": gradients, "activations": size - gradients})


def _optimizer_moment(layout: Layout, execution: ExecutionConfig, *, has_gradients: bool) -> Peak:
    """Return the optimizer step. Gradients that are accumulated are there all the time, unless traced."""
    is_counted = execution.accumulates and has_gradients
    return Peak(
        "optimizer step",
        {
            "gradients": 0 if is_counted else gradient_bytes(layout, execution),
            "optimizer_step": optimizer_step_bytes(layout, execution),
        },
    )
