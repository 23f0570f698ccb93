"""The names inside transformers, peft, accelerate and bitsandbytes that the trainer relies on.

These libraries do not document the names, so a release may change them. The upper bounds in
``pyproject.toml`` are the newest releases that have all names; :func:`require_names` makes a missing name a
clear error at the start of a run, instead of a wrong result or a traceback in the middle of it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

from qlora_tui.errors import UserError
from qlora_tui.installation import install_command

NAMES = {
    "transformers": (
        "masking_utils:sdpa_mask",
        "masking_utils:eager_mask",
        "integrations.sdpa_attention:sdpa_attention_forward",
        "modeling_layers:GradientCheckpointingLayer.gradient_checkpointing",
        "modeling_utils:PreTrainedModel.set_attn_implementation",
        "trainer_pt_utils:get_parameter_names",
        "trainer_pt_utils:safe_globals",
        "core_model_loading:spawn_materialize",
        "core_model_loading:WeightConverter.convert",
        "core_model_loading:rename_source_key",
        "core_model_loading:revert_weight_conversion",
        "core_model_loading:dot_natural_key",
        "conversion_mapping:get_model_conversion_mapping",
        "core_model_loading:MergeModulelist",
        "core_model_loading:Concatenate",
        "quantizers.auto:AUTO_QUANTIZER_MAPPING",
        "quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer._process_model_before_weight_loading",
        "quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer._process_model_after_weight_loading",
        "quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer.param_needs_quantization",
        "quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer.update_weight_conversions",
    ),
    "peft": (
        "tuners.lora.layer:ParamWrapper.get_base_layer",
        "utils.transformers_weight_conversion:convert_peft_adapter_state_dict_for_transformers",
        "tuners.tuners_utils:_check_lora_target_modules_mamba",
        "utils.other:TrainableTokensWrapper",
        "utils.other:ModulesToSaveWrapper",
        "optimizers:create_loraplus_optimizer",
    ),
    "accelerate": (
        "optimizer:AcceleratedOptimizer.step_was_skipped",
        "accelerator:Accelerator.optimizer_step_was_skipped",
    ),
    "bitsandbytes": (
        "functional:quantize_4bit",
        "functional:dequantize_4bit",
        "functional:int8_vectorwise_quant",
        "functional:create_dynamic_map",
        "functional:QuantState",
        "nn:Linear4bit",
    ),
}
"""The names of each library as ``module:attribute``, with further attributes after dots."""


def require_names() -> None:
    """Raise UserError if an installed library lacks a name of :data:`NAMES`."""
    for library, names in NAMES.items():
        missing = [name for name in names if not exists(library, name)]
        if missing:
            installed = f"{library} {version(library)}"
            raise UserError(
                f"{library} has changed",
                what=f"{installed} has no {library}.{missing[0].replace(':', '.')}, which training needs.",
                why=(
                    "The library is newer or older than the releases that this version of qlora-tui was "
                    "tested with."
                ),
                fix=f"Install the releases that qlora-tui requires: {install_command('qlora-tui')}",
            )


def exists(library: str, name: str) -> bool:
    """Return whether ``library`` contains ``name``, in the form of :data:`NAMES`."""
    module, _, path = name.partition(":")
    try:
        found: Any = import_module(f"{library}.{module}")
        for attribute in path.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError):
        return False
    return True
