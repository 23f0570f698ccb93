"""Compares the instant estimate of one model type with a traced step, to see if the estimate's range holds.

The model has heads of realistic width, because in smaller ones, tensors as wide as a head or narrower weigh
too much.
"""

from __future__ import annotations

from bench.model_types.outcome import Estimated
from bench.model_types.tiny_config import settings_of
from qlora_tui.recipe.schema import Data, Quantization, Recipe
from qlora_tui.recipe.training_settings import Checkpointing, Training

_HEAD_WIDTH = 128
_LENGTH = 512
_CHECKPOINTING: tuple[Checkpointing, ...] = ("on", "off")


def compare_estimate(model_type: str) -> Estimated:
    """Trace a step of a model type in NF4 on a GPU, with and without checkpointing.

    Returns the comparison that uses more of the range of its instant estimate.
    """
    from transformers import AutoConfig

    from qlora_tui.engine.trace_worker import trace_request
    from qlora_tui.memory import Device, trainer_execution
    from qlora_tui.memory.estimate import closed_form
    from qlora_tui.memory.layout import build_layout
    from qlora_tui.memory.levels import step_uncertainty
    from qlora_tui.runs.exact_memory import TraceRequest
    from qlora_tui.training.description import architecture_of

    try:
        config = AutoConfig.for_model(model_type, **settings_of(model_type, _HEAD_WIDTH)).to_dict()
        architecture = architecture_of(config)
    except Exception as error:  # sizes that are invalid with wider heads
        return Estimated(untraced=_reason(error))
    compared = []
    for checkpointing in _CHECKPOINTING:
        recipe = Recipe(
            data=Data(max_length=min(_LENGTH, architecture.max_positions or _LENGTH)),
            quantization=Quantization(),
            training=Training(
                micro_batch_size=2, gradient_accumulation=1, gradient_checkpointing=checkpointing
            ),
        )
        execution = trainer_execution(recipe, Device(), architecture)
        try:
            traced = trace_request(TraceRequest(config=config, recipe=recipe, execution=execution))
        except Exception as error:
            return Estimated(untraced=_reason(error))
        instant = closed_form(recipe, architecture, execution)["step"]
        share = step_uncertainty(build_layout(recipe, architecture, execution), traced=False)
        compared.append(Estimated(ratio=traced.step_bytes / instant, uncertainty=share))
    return max(compared, key=lambda each: (each.ratio - 1) / each.uncertainty)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0][:120] or type(error).__name__
