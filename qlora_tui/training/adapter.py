"""LoRA on top of the frozen model: new, or from another adapter (``lora.init_from``).

Writes the result, ``adapter/``, which plain peft can load. This module also keeps the starting adapter, which
DPO and KTO use as their reference. The reference model is the model before the run: if a run continues to
train an adapter, the reference has that adapter, not the bare base. The starting weights are kept in addition
to the trained ones and replace them during reference passes. The first attempt writes the starting weights to
the run's folder, so that a resumed run has the same reference.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from qlora_tui.catalog.adapters import WEIGHTS, load_adapter_config, misfit, require_fit
from qlora_tui.catalog.architecture_types import Architecture, LinearModule, inner_name
from qlora_tui.catalog.model_validation import copy_files, is_template_file, tokenizer_files
from qlora_tui.checksums import checked_folder, digest
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.files import atomic_write, read_regular
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.schema import Lora, Recipe
from qlora_tui.recipe.targets import alpha_of, rank_of, resolve_targets
from qlora_tui.runs.damage import checksum_damage
from qlora_tui.runs.directory import RunDir
from qlora_tui.training import checkpoints
from qlora_tui.training.embeddings import (
    init_untrained_rows,
    peft_options,
    token_indices,
    use_fp32_copies,
    use_trained_rows,
)
from qlora_tui.training.experts.lora import as_fused_parameters, fuse_experts
from qlora_tui.training.fused import use_fused
from qlora_tui.training.health import OVERFLOW_REMEDY


def add_lora(model: Any, settings: Lora, architecture: Architecture, token_ids: Sequence[int] = ()) -> Any:
    """Add a new LoRA adapter, which does not change the model's output yet because B is 0.

    Draws from torch's random numbers. Also switches the model to the fused forward methods (:mod:`.fused`).
    The adapter's weights are fp32, whatever dtype the model computes in. With ``train_embeddings`` they
    include embedding and head.

    Args:
        token_ids: tokens whose rows of embedding and head are also trained. A row that the base never trained
            starts as the mean of all rows.
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
def exact_target_names(model: nn.Module, names: Iterable[str] | str = ()) -> Iterator[None]:
    """Make peft adapt exactly the named modules, and load weights under exactly their names.

    Without this, peft applies its conversion for adapters made before transformers 5
    (``_convert_peft_config_moe``). In some families, this conversion mistakes names such as ``gate_proj`` for
    the routed experts, even at the end of the full name of a dense layer or a shared expert. peft also
    renames an adapter's weights by the patterns with which transformers renames a model's weights, so a
    weight whose name happens to match a pattern is lost. Neither step is needed if all names are modules of
    this model.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # a version of peft or transformers without this conversion
        yield
        return
    module_names = {name for name, _ in model.named_modules()}
    of_config = conversion.convert_peft_config_for_transformers
    of_weights = conversion.convert_peft_adapter_state_dict_for_transformers

    def convert_weights(
        model: nn.Module, peft_config: Any, adapter_state_dict: dict[str, Tensor], **options: Any
    ) -> Any:
        modules = {name.removeprefix(_PEFT_PREFIX) for name, _ in model.named_modules()}
        of_modules = (key.removeprefix(_PEFT_PREFIX).partition(".lora_") for key in adapter_state_dict)
        if all(name in modules for name, lora, _ in of_modules if lora):
            return adapter_state_dict
        return of_weights(model, peft_config, adapter_state_dict, **options)

    if names and not isinstance(names, str) and module_names.issuperset(names):
        conversion.convert_peft_config_for_transformers = lambda *args, **kwargs: None
    conversion.convert_peft_adapter_state_dict_for_transformers = convert_weights
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = of_config
        conversion.convert_peft_adapter_state_dict_for_transformers = of_weights


MISREAD_REMEDY = "qlora-tui reads it correctly. Merge it before other programs load it."
"""What the user can do with an adapter that plain peft reads wrongly."""


def misread_by_peft(model_type: str, targets: Iterable[str] | str) -> list[str]:
    """Return the targets that plain peft mistakes for routed experts; see :func:`exact_target_names`."""
    from peft import LoraConfig
    from peft.utils import transformers_weight_conversion as conversion

    base: Any = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    misread = []
    for target in [] if isinstance(targets, str) else sorted(targets):
        config = LoraConfig(target_modules=[target])
        try:
            conversion.convert_peft_config_for_transformers(config, base, None)
        except ValueError:  # one of two modules that became one parameter
            config.target_modules = None
        if target not in (config.target_modules or ()):
            misread.append(target)
    return misread


def targets_by_name(model: nn.Module, settings: Lora, architecture: Architecture) -> dict[str, LinearModule]:
    """Return the recipe's targets, keyed by their full names in this model. Raises UserError."""
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    by_tail = {inner_name(name): name for name in names}
    targets = {}
    for module in resolve_targets(settings, architecture.targets):
        # In a text model taken out of a multimodal one, module names lack their first part.
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
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _int_if_whole(alpha: float) -> float:
    """Return a whole number as an int, the type that other programs expect in ``adapter_config.json``."""
    return int(alpha) if alpha == int(alpha) else alpha


def save_adapter(model: Any, folder: Path) -> None:
    """Save weights and configuration of the adapter in peft's format, and nothing else."""
    # peft would also write a model card, and compile its template again for each checkpoint.
    model.create_or_update_model_card = lambda folder: None
    model.save_pretrained(str(folder), save_embedding_layers=False)


def load_adapter(model: Any, folder: Path) -> None:
    """Replace the model's adapter weights with saved ones."""
    from safetensors.torch import load_file

    _set_weights(model, load_file(folder / WEIGHTS))


def _set_weights(model: Any, weights: dict[str, Tensor]) -> None:
    """Replace all weights of an adapter. Raises ValueError if they do not belong to this model."""
    from peft import set_peft_model_state_dict

    with exact_target_names(model):
        result = set_peft_model_state_dict(model, weights)
    lacking = [name for name in result.missing_keys if ".lora_" in name]
    for name in (*result.unexpected_keys, *lacking):
        raise ValueError(f"{name} is only in {'the model' if name in lacking else 'the saved adapter'}")


def load_initial_adapter(model: Any, lora: Lora, architecture: Architecture) -> None:
    """Replace the weights of a new adapter with those in the folder ``lora.init_from``, which is only read.

    Raises:
        UserError: the weights are damaged, or their modules, shapes or tokens are not this adapter's.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    folder = Path(lora.init_from)
    require_fit(folder, lora, architecture)
    if damage := checksum_damage(folder):
        raise _damaged(folder, damage)
    tokens = load_adapter_config(folder).get("trainable_token_indices")
    if tokens != model.peft_config["default"].trainable_token_indices:
        raise misfit(folder, "it trains the rows of other tokens (lora.trainable_tokens)")
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, str(error)) from error
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted(expected.keys() ^ weights.keys()):
        raise misfit(folder, f"only {'the recipe' if name in expected else 'it'} has {name}")
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
            raise misfit(folder, f"{name} has the shape {shapes}")
    _set_weights(model, weights)


def _damaged(folder: Path, damage: str) -> UserError:
    return UserError(
        "The adapter is damaged",
        what=f"{folder}: {damage}.",
        why="The file has changed since it was written; a disk or copy error is the usual cause.",
        fix="Start from another adapter, or from a checkpoint of the run that trained this one.",
    )


_PEFT_PREFIX = "base_model.model."
_GENERATION = "generation_config.json"
_TEMPLATE = "chat_template.jinja"
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by their size in bytes, for summing the bits of weights."""


def load_best_weights(run: RunDir, model: Any, step: int) -> str:
    """Load the adapter weights of the best step from its checkpoint.

    If the checkpoint of the best step is missing, for example after a full disk, the weights of the last step
    stay.

    Returns:
        The step that the weights are from, as a text for the user.
    """
    folder = checkpoints.intact_folder(run, step)
    if folder is None:
        return (
            f"the adapter is from the last step, because the checkpoint of the best step, {step}, is missing"
        )
    load_adapter(model, folder)
    return f"the adapter is from the best step, {step}"


def trained_weights_digest(model: Any) -> str:
    """Return a digest of all trained weights, which is the same on every device."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Sum the bits as integers, because a copy of a trained embedding would take gigabytes.
            bits = parameter.detach().view(_INTEGERS[parameter.element_size()])
            digest.update(f"{name} {int(bits.sum(dtype=torch.int64))} ".encode())
    return digest.hexdigest()


def require_trained(model: Any, initial_weights: str, steps: int, skipped: int) -> None:
    """Raise UserError if training has not changed the weights.

    Args:
        initial_weights: digest of the weights before the first step; empty if it is unknown.
        steps: number of steps of the run.
        skipped: number of steps skipped because float16 gradients overflowed.
    """
    if trained_weights_digest(model) != initial_weights:
        return
    overflow = "Steps in which the gradients overflowed float16 were skipped."
    raise UserError(
        "Training changed nothing",
        what=f"After {pluralize(steps, 'step')} the adapter is unchanged.",
        why=overflow
        if skipped
        else "The gradients were 0, or the updates too small for the weights' precision.",
        fix=OVERFLOW_REMEDY
        if skipped
        else "Check the loss masks on the Data screen, and raise Learning rate.",
    )


def write_adapter(
    run: RunDir, model: Any, recipe: Recipe, model_folder: Path, tokenizer: ChatTokenizer, *, from_hub: bool
) -> str:
    """Write adapter, tokenizer, chat template and recipe to disk, and return the hash of their checksums.

    An earlier adapter is deleted only after the new one is in place. Raises OSError if the adapter cannot be
    written. With ``from_hub``, the config names the base by its Hub ID, so that other machines find it.
    """
    with checked_folder(run.adapter_dir) as draft:
        config = model.peft_config["default"]
        config.base_model_name_or_path = recipe.model.id if from_hub else str(model_folder)
        config.revision = recipe.model.revision if from_hub else None
        save_adapter(model, draft)
        names = tokenizer_files(model_folder)
        if (model_folder / _GENERATION).is_file():
            names.append(_GENERATION)
        if not tokenizer.has_own_template:
            names = [name for name in names if not is_template_file(name)]
            (draft / _TEMPLATE).write_text(tokenizer.template.text)
        copy_files(model_folder, draft, names)
        shutil.copyfile(run.recipe_path, draft / "recipe.toml")
    return digest(run.adapter_dir)


class StartingAdapter:
    """Weights of the trained parameters at the start of a run."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Keep ``weights``: tensors keyed by parameter name, on the devices of the parameters."""
        self._weights = dict(weights)

    @classmethod
    def of(cls, model: Any) -> StartingAdapter:
        """Copy the trained parameters of a model."""
        return cls({name: p.detach().clone() for name, p in _trained(model)})

    @classmethod
    def read(cls, path: Path, model: Any) -> StartingAdapter:
        """Read the file that :meth:`write` wrote.

        Raises UserError if it is missing or does not fit the model.
        """
        try:
            weights = load(read_regular(path))
            return cls({name: weights[name].reshape(p.shape).to(p) for name, p in _trained(model)})
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise UserError(
                "The starting adapter cannot be read",
                what=f"{path}: {error}",
                why="The run compares its answers with those of the adapter that it started from.",
                fix="Restore the file, or start a new run with the same recipe.",
            ) from error

    def write(self, path: Path) -> None:
        """Write the weights as safetensors. Raises OSError."""
        atomic_write(path, save({name: weight.contiguous().cpu() for name, weight in self._weights.items()}))

    @contextmanager
    def in_place(self, model: Any) -> Iterator[None]:
        """Put these weights into the model, unrecorded by autograd, and restore its own on exit."""
        own = {name: p.data for name, p in _trained(model)}
        try:
            for name, p in _trained(model):
                p.data = self._weights[name]
            yield
        finally:
            for name, p in _trained(model):
                p.data = own[name]


def _trained(model: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
