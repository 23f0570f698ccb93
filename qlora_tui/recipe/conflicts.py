"""Finds settings that are each valid alone but invalid together."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from qlora_tui.errors import UsageError
from qlora_tui.formatting import capitalize
from qlora_tui.recipe.schema import Recipe


class Conflict(Struct, frozen=True):
    """Settings that contradict each other."""

    paths: tuple[str, ...]
    """The settings, which the form marks."""
    what: str
    fix: str


def find_conflicts(recipe: Recipe) -> list[Conflict]:
    """Return all conflicts in a recipe; empty for a valid one."""
    quantization, lora, data, training = recipe.quantization, recipe.lora, recipe.data, recipe.training
    streams = quantization.streamed_layers > 0
    declared = (
        (
            training.early_stopping > 0 and not (data.validation_fraction or data.validation_path),
            ("training.early_stopping", "data.validation_fraction"),
            "training.early_stopping needs a validation loss, and there is no validation data",
            "set data.validation_fraction above 0, name a data.validation_path, "
            "or set training.early_stopping = 0",
        ),
        (
            recipe.model.attention == "flash" and quantization.compute_dtype == "float32",
            ("model.attention", "quantization.compute_dtype"),
            'model.attention = "flash" needs 16 bits, and quantization.compute_dtype is "float32"',
            'set model.attention = "sdpa" or quantization.compute_dtype = "auto"',
        ),
        (
            training.lr_scheduler == "wsd" and training.warmup_ratio + training.lr_decay_share > 1,
            ("training.warmup_ratio", "training.lr_decay_share"),
            "training.warmup_ratio and training.lr_decay_share add up to more than all steps",
            "lower training.warmup_ratio or training.lr_decay_share to a sum of at most 1",
        ),
        (
            lora.train_embeddings and bool(lora.trainable_tokens),
            ("lora.train_embeddings", "lora.trainable_tokens"),
            "lora.train_embeddings trains every row of embedding and head, and lora.trainable_tokens "
            "names some of them",
            "set lora.train_embeddings = false or leave lora.trainable_tokens out",
        ),
        *_preference_conflicts(recipe),
        (
            streams and training.gradient_checkpointing == "off",
            ("quantization.streamed_layers", "training.gradient_checkpointing"),
            "quantization.streamed_layers needs gradient checkpointing: a streamed layer is recomputed "
            "in the backward pass, because another layer has taken its place on the GPU",
            'set training.gradient_checkpointing = "on" or quantization.streamed_layers = 0',
        ),
        (
            streams and lora.use_dora,
            ("quantization.streamed_layers", "lora.use_dora"),
            "lora.use_dora reads every weight of the model before training, but with "
            "quantization.streamed_layers most of them are not on the GPU",
            "set lora.use_dora = false or quantization.streamed_layers = 0",
        ),
        (
            streams and training.gpus != 1,
            ("quantization.streamed_layers", "training.gpus"),
            "quantization.streamed_layers needs a single GPU: each process would hold the streamed layers in "
            "host memory and copy them over the same bus",
            "set training.gpus = 1 or quantization.streamed_layers = 0",
        ),
        (
            lora.train_embeddings and training.gpus != 1,
            ("lora.train_embeddings", "training.gpus"),
            "lora.train_embeddings needs a single GPU: the gradients of embedding and head are not summed "
            "over several",
            "set training.gpus = 1 or lora.train_embeddings = false",
        ),
    )
    return [Conflict(paths, what, fix) for applies, paths, what, fix in declared if applies]


def _preference_conflicts(recipe: Recipe) -> Iterator[tuple[bool, tuple[str, str], str, str]]:
    """Yield, for each setting that can conflict with a preference method: whether it does, the paths, the
    conflict and its fix.
    """
    method = recipe.preference_method
    settings = (
        (recipe.data.train_on == "everything", "data.train_on", 'is "everything"', '= "assistant"'),
        (recipe.data.overflow == "split", "data.overflow", 'is "split"', '= "cut-right"'),
        (recipe.training.replay_share > 0, "training.replay_share", "is above 0", "= 0"),
        (recipe.training.neftune_alpha > 0, "training.neftune_alpha", "is above 0", "= 0"),
        (recipe.lora.train_embeddings, "lora.train_embeddings", "is on", "= false"),
    )
    for is_set, path, is_, wanted in settings:
        what = f'data.preferences = "{method}" compares whole answers, and {path} {is_}'
        yield is_set and method is not None, ("data.preferences", path), what, f"set {path} {wanted}"


def check_conflicts(recipe: Recipe) -> None:
    """Raise UserError, exit code 2, with all conflicts in the recipe, if there are any."""
    conflicting = find_conflicts(recipe)
    if not conflicting:
        return
    raise UsageError(
        "Conflicting settings",
        what="; ".join(conflict.what for conflict in conflicting) + ".",
        fix="\n  ".join(f"{capitalize(c.fix)}." for c in conflicting),
    )


def require_runnable(recipe: Recipe) -> None:
    """Raise UserError, exit code 2, if the recipe lacks a model or data, or has conflicts."""
    missing = []
    if not recipe.model.id:
        missing.append(("no model", "model.id", "Name a model: --model, or id under [model]."))
    if not recipe.data.sources:
        missing.append(("no data", "data.sources", "Name a data file: --data, or sources under [data]."))
    if missing:
        things, keys, fixes = zip(*missing, strict=True)
        are = "is" if len(missing) == 1 else "are"
        raise UsageError(
            "Not ready to run",
            what=f"The recipe has {' and '.join(things)}: {' and '.join(keys)} {are} empty.",
            fix="\n  ".join(fixes),
        )
    check_conflicts(recipe)
