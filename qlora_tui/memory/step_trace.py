"""A traced step (``engine/trace.py``) as input of the estimate, and the same figures by the closed form."""

from __future__ import annotations

from msgspec import Struct

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.errors import UserError
from qlora_tui.memory.execution import ExecutionConfig
from qlora_tui.memory.layout import build_layout
from qlora_tui.memory.parameter_memory import gradient_bytes
from qlora_tui.memory.static_memory import FROZEN, static_items
from qlora_tui.memory.step import peak_candidates, profile_step
from qlora_tui.recipe.schema import Recipe


class StepTrace(Struct, frozen=True, kw_only=True, tag_field="reply", tag="traced"):
    """Peak bytes of a step, in storages."""

    parameter_bytes: int
    """Frozen weights as stored, including scales."""
    adapter_bytes: int
    forward_bytes: int
    """Peak of the forward beyond weights and adapter; including gradients of an earlier micro-step."""
    backward_bytes: int
    """Peak of the backward beyond weights and adapter, including gradients."""
    gradient_bytes: int
    kept_bytes: int
    """Bytes alive between forward and backward."""

    @property
    def step_bytes(self) -> int:
        """Return the larger of both peaks, beyond weights and adapter."""
        return max(self.forward_bytes, self.backward_bytes)

    def figures(self) -> dict[str, int]:
        """Return the figures under the keys of :func:`closed_form`."""
        return {
            "frozen": self.parameter_bytes,
            "adapter": self.adapter_bytes,
            "gradients": self.gradient_bytes,
            "step": self.step_bytes,
        }


def closed_form(recipe: Recipe, architecture: Architecture, execution: ExecutionConfig) -> dict[str, int]:
    """Return the estimate's own values of the figures in a trace: frozen weights, adapter, gradients, and the
    step's peak beyond weights and adapter."""
    layout = build_layout(recipe, architecture, execution)
    resident = static_items(recipe, architecture, layout, execution)
    gradients = gradient_bytes(layout, execution)
    step = max(
        peak.total_bytes
        for peak in peak_candidates(profile_step(layout, execution, recipe.lora.dropout), layout, execution)
    )
    return {
        "frozen": sum(resident.get(key, 0) for key in FROZEN),
        "adapter": resident["adapter"],
        "gradients": gradients,
        "step": step + (gradients if execution.accumulates else 0),
    }


def check_traceable(recipe: Recipe, execution: ExecutionConfig) -> None:
    """Raise UserError for recipes that the meta device cannot run."""
    if recipe.quantization.method == "int8":
        raise UserError(
            "An int8 step cannot be traced",
            what="bitsandbytes has no 8-bit product for tensors without values.",
            fix="Trace it with quantization.method = nf4 or none; the estimate itself covers int8.",
        )
    if execution.float16:
        raise UserError(
            "A float16 step cannot be traced",
            what="Tensors without values do not support what a float16 step adds, such as autocast.",
            fix="Trace it with quantization.compute_dtype = bfloat16; the estimate itself covers float16.",
        )
