"""LoRA on top of the frozen model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from qlora_tui.catalog.architecture_types import Architecture, LinearModule, inner_name
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Lora
from qlora_tui.recipe.targets import alpha_of, rank_of, resolve_targets
from qlora_tui.training.experts.expert_lora import as_fused_parameters, fuse_experts
from qlora_tui.training.fused import use_fused
from qlora_tui.training.trainable_tokens import init_untrained_rows, token_indices, use_trained_rows
from qlora_tui.training.trained_embeddings import peft_options, use_fp32_copies


def add_lora(model: Any, settings: Lora, architecture: Architecture, token_ids: Sequence[int] = ()) -> Any:
    """Add a LoRA adapter that does not change the model yet (B is 0). Draws from torch's random numbers.

    Also switches the model to the fused forwards (:mod:`.fused`). The weights of the adapter are fp32,
    whatever dtype the model computes in. With ``train_embeddings`` they include embedding and head.

    Args:
        token_ids: tokens whose rows of embedding and head are trained too; untrained ones start as the mean.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    targets = targets_by_name(model, settings, architecture)
    ranks = {name: rank_of(settings, module) for name, module in targets.items()}
    alphas = {name: alpha_of(settings, module) for name, module in targets.items()}
    embeddings = peft_options(model) if settings.train_embeddings else {}
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=_int_if_whole(settings.alpha),
        # peft reads the keys as regular expressions, so each is the full name of one module, escaped.
        rank_pattern={re.escape(name): rank for name, rank in ranks.items() if rank != settings.rank},
        alpha_pattern={
            re.escape(name): _int_if_whole(alpha) for name, alpha in alphas.items() if alpha != settings.alpha
        },
        lora_dropout=settings.dropout,
        target_modules=[name for name, module in targets.items() if module.part != "expert"],
        target_parameters=[name for name, module in targets.items() if module.part == "expert"] or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        bias="none",
        trainable_token_indices=token_indices(model, token_ids) if token_ids else None,
        **embeddings,
    )
    with exact_target_names(model, config.target_modules), as_fused_parameters(model):
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    use_fused(adapted)
    fuse_experts(adapted)
    if token_ids:
        init_untrained_rows(model)
        use_trained_rows(model)
    if embeddings:
        use_fp32_copies(model, tied=embeddings["ensure_weight_tying"])
    return adapted


@contextmanager
def exact_target_names(model: nn.Module, names: Iterable[str] | str) -> Iterator[None]:
    """Make peft adapt exactly the modules that are named, and no others.

    For adapters made before transformers 5, peft reads ``gate_proj`` and its like as the routed experts in
    families that have such (``_convert_peft_config_moe``), also at the end of the full name of a shared
    expert's or a dense layer's module. Names that are all modules of this model need no such reading.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # a version of peft or transformers that does not do this
        yield
        return
    module_names = {name for name, _ in model.named_modules()}
    original = conversion.convert_peft_config_for_transformers
    if not isinstance(names, str) and module_names.issuperset(names):
        conversion.convert_peft_config_for_transformers = lambda *args, **kwargs: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = original


def targets_by_name(model: nn.Module, settings: Lora, architecture: Architecture) -> dict[str, LinearModule]:
    """The targets of the recipe by their full name in this model. Raises UserError."""
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    by_tail = {inner_name(name): name for name in names}
    targets = {}
    for module in resolve_targets(settings, architecture.targets):
        # A text model taken out of a multimodal one lacks the outer part of the name.
        name = module.name if module.name in names else by_tail.get(inner_name(module.name))
        if name is None:
            raise UserError(
                "Target module not in the model",
                what=f"lora.target_modules resolves to {module.name}, which is not in the loaded model.",
                why="The loaded model differs from its config.json.",
                fix="Use module types that the model has, such as q_proj.",
            )
        targets[name] = module
    return targets


def trained_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _int_if_whole(alpha: float) -> float:
    """A whole float as an int, which is what other programs expect in ``adapter_config.json``."""
    return int(alpha) if alpha == int(alpha) else alpha
