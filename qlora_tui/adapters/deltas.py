"""The update of each weight by an adapter, read from its folder and computed one weight at a time.

LoRA (arXiv:2106.09685, section 4.1): W + s·B·A with s = alpha / r, or alpha / √r with rsLoRA
(arXiv:2312.03732). DoRA (arXiv:2402.09353, equation 5): the rows of this sum, scaled to the learned
magnitudes.

peft stacks the factors of all experts of a layer (``ParamWrapper`` in ``tuners/lora/layer.py``), and names
them by the module that holds the parameters, not by the parameter. :mod:`.stored_layout` maps parameters to
tensors of the weight files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlora_tui.catalog.adapters import CONFIG, WEIGHTS, load_adapter_config
from qlora_tui.errors import UserError
from qlora_tui.runs.damage import checksum_damage
from qlora_tui.training.experts.routing import PROJECTIONS, columns_of_b, rows_of_a

_WRAPPER = ".base_layer"


def expert_parameter(name: str, config: Mapping[str, Any]) -> str | None:
    """Return the experts' parameter that the factors under ``name`` adapt; None for the factors of a module.

    Args:
        name: A name in the adapter's weights, such as ``model.layers.0.mlp.experts.base_layer``.
        config: The adapter's config.
    """
    path, depth = name.replace(_WRAPPER, ""), name.count(_WRAPPER)
    targets = config.get("target_parameters") or ()
    adapted = [p for p in PROJECTIONS if any(f".{path}.{p}".endswith(f".{target}") for target in targets)]
    # peft wraps the parameters in the model's order, so the last one is outermost.
    return f"{path}.{adapted[-1 - depth]}" if depth < len(adapted) else None


class Update:
    """An update of one weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as stored."""
        raise NotImplementedError

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether the update can apply to a weight of this shape."""
        return shape == self.shape

    def apply_to(self, weight: Tensor) -> Tensor:
        """Return the updated weight, in the dtype and layout of ``weight``."""
        raise NotImplementedError


@dataclass(frozen=True)
class ExpertDelta(Update):
    """LoRA update of a parameter that holds one projection of all experts of a layer."""

    down: Tensor
    """Factor A, of shape (experts · rank, inputs)."""
    up: Tensor
    """Factor B, of shape (outputs, rank · experts)."""
    experts: int
    scale: float
    transposed: bool = False
    """Whether each matrix is (inputs, outputs), as in gpt-oss. The adapter's files do not contain this; it is
    read from the model.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        outputs, inputs = len(self.up), self.down.shape[1]
        return (self.experts, *((inputs, outputs) if self.transposed else (outputs, inputs)))

    def apply_to(self, weight: Tensor) -> Tensor:
        """Return the merged parameter, in the dtype of ``weight``. Each expert is computed in fp32."""
        rows, columns = rows_of_a(self.down, self.experts), columns_of_b(self.up, self.experts)
        merged = weight.clone()
        for expert in range(self.experts):
            change = columns[expert].float() @ rows[expert].float() * self.scale
            merged[expert] = (weight[expert].float() + (change.T if self.transposed else change)).to(
                weight.dtype
            )
        return merged


_PART = re.compile(
    r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)"
)
ROWS = re.compile(r"base_model\.model\.(.+)\.token_adapter\.trainable_tokens_delta")
"""Matches the name under which peft stores a module's trained token rows."""
WHOLE = re.compile(r"base_model\.model\.(.+)\.weight")
"""Matches the name under which peft stores the weight of a module that is trained in full."""


@dataclass(frozen=True)
class LoraDelta(Update):
    """LoRA update of one weight matrix (outputs, inputs)."""

    down: Tensor
    """Factor A, of shape (rank, inputs)."""
    up: Tensor
    """Factor B, of shape (outputs, rank)."""
    scale: float
    magnitude: Tensor | None
    """DoRA's magnitudes, of shape (outputs,); None for plain LoRA."""
    transposed: bool
    """Whether the weight is stored as (inputs, outputs), as in GPT-2's layers."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight as stored."""
        outputs, inputs = self.up.shape[0], self.down.shape[1]
        return (inputs, outputs) if self.transposed else (outputs, inputs)

    def change(self) -> Tensor:
        """Return s·B·A, of shape (outputs, inputs), computed in fp32."""
        return self.up.float() @ self.down.float() * self.scale

    def apply_to(self, weight: Tensor) -> Tensor:
        """Return the merged weight, in the dtype and layout of ``weight``. It is computed in fp32."""
        wide = weight.float().T if self.transposed else weight.float()
        merged = wide + self.change()
        if self.magnitude is not None:
            merged *= (self.magnitude.float() / merged.norm(dim=1))[:, None]
        return (merged.T if self.transposed else merged).to(weight.dtype).contiguous()


@dataclass(frozen=True)
class EmbeddingRowDelta(Update):
    """Trained rows of an embedding or a head (``lora.trainable_tokens``)."""

    ids: tuple[int, ...]
    rows: Tensor
    """Values of the rows, of shape (ids, width)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the smallest matrix with these rows."""
        return max(self.ids) + 1, self.rows.shape[1]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether a matrix of this shape has these rows."""
        return len(shape) == 2 and shape[0] >= self.shape[0] and shape[1] == self.shape[1]

    def apply_to(self, weight: Tensor) -> Tensor:
        """Return the matrix with these rows replaced, in the dtype of ``weight``."""
        changed = weight.clone()
        changed[list(self.ids)] = self.rows.to(weight.dtype)
        return changed


@dataclass(frozen=True)
class WholeMatrix(Update):
    """A fully trained weight of the embedding or the head (``lora.train_embeddings``)."""

    weight: Tensor
    """The trained weight, of shape (vocabulary, width)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it replaces."""
        return tuple(self.weight.shape)

    def apply_to(self, weight: Tensor) -> Tensor:
        """Return the trained weight in the dtype of ``weight``."""
        return self.weight.to(weight.dtype)


AdapterDeltas: TypeAlias = dict[str, Update]
"""Updates by the name of a module, or of a parameter of experts."""


def check_unchanged(folder: Path) -> None:
    """Raise UserError if an adapter's files do not match their checksums."""
    damage = checksum_damage(folder, only=(WEIGHTS, CONFIG))
    if damage is not None:
        raise UserError(
            "The adapter is damaged",
            what=f"{folder}: {damage}.",
            why="A file has changed since the trainer wrote it; a disk or copy error is the usual cause.",
            fix="Choose another checkpoint of the run; `qlora-tui runs check` lists the intact checkpoints.",
        )


def read_deltas(folder: Path) -> AdapterDeltas:
    """Read all updates of an adapter.

    Raises UserError if the adapter is damaged, or contains anything but LoRA, token rows and full matrices.
    """
    check_unchanged(folder)
    try:
        config = load_adapter_config(folder)
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(folder, str(error)) from error
    parts: dict[str, dict[str, Tensor]] = {}
    rows: dict[str, EmbeddingRowDelta | WholeMatrix] = {}
    for key, tensor in tensors.items():
        if match := ROWS.fullmatch(key):
            ids = _ids_of(match[1], config)
            if len(ids) != len(tensor) or not ids:
                raise _unreadable(
                    folder, f"{match[1]} has {len(tensor)} rows, but {CONFIG} names {len(ids)} tokens."
                )
            rows[match[1]] = EmbeddingRowDelta(ids, tensor)
            continue
        if is_whole_matrix(key, config) and tensor.ndim == 2:
            rows[WHOLE.sub(r"\1", key)] = WholeMatrix(tensor)
            continue
        match = _PART.fullmatch(key)
        if match is None:
            raise UserError(
                "This adapter cannot be merged",
                what=f"The adapter contains {key}, which is neither a LoRA weight of a linear module nor a "
                f"trained token row.",
                fix="Load the adapter with peft, and use merge_and_unload instead.",
            )
        parts.setdefault(match[1], {})[match[2].removesuffix(".weight")] = tensor
    for name, part in parts.items():
        sizes = [part[side].ndim == 2 and len(part[side]) for side in ("lora_A", "lora_B") if side in part]
        if len(sizes) != 2 or not all(sizes) or part["lora_A"].shape[0] != part["lora_B"].shape[1]:
            raise _unreadable(folder, f"the two matrices of {name} do not belong together.")
    updates: AdapterDeltas = dict(rows)
    for name, part in parts.items():
        parameter = expert_parameter(name, config)
        if parameter is None:
            updates[name] = _update(name, part, config)
        else:
            updates[parameter] = _expert_update(parameter, part, config, folder)
    return updates


def _unreadable(folder: Path, why: str) -> UserError:
    return UserError(
        "The adapter cannot be read",
        what=f"{folder}: {why}",
        fix="Use the adapter folder of a run, or another checkpoint.",
    )


def is_whole_matrix(key: str, config: dict[str, Any]) -> bool:
    """Return whether ``key`` is the weight of a module that the adapter trains in full.

    If the head is tied, the config names only the embedding, but peft saves both weights.
    """
    match = WHOLE.fullmatch(key)
    if match is None or ".lora_" in key:
        return False
    names = config.get("modules_to_save") or ()
    return bool(names) and (
        bool(config.get("ensure_weight_tying")) or any(f".{match[1]}".endswith(f".{name}") for name in names)
    )


def _ids_of(module: str, config: dict[str, Any]) -> tuple[int, ...]:
    """Return the token ids of a module's rows. In the config, a list applies to the embedding; a mapping has
    a list for each module.
    """
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((ids for name, ids in indices.items() if f".{module}".endswith(f".{name}")), None)
    return tuple(indices or ())


def _expert_update(
    parameter: str, part: dict[str, Tensor], config: dict[str, Any], folder: Path
) -> ExpertDelta:
    down, up = part["lora_A"], part["lora_B"]
    ranks = config.get("rank_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), parameter), config.get("r", 8))
    if len(down) % rank:
        raise _unreadable(
            folder,
            f"the factors of {parameter} have {len(down)} rows, which is not a multiple of rank {rank}.",
        )
    return ExpertDelta(down=down, up=up, experts=len(down) // rank, scale=_scale(parameter, rank, config))


def _scale(name: str, rank: int, config: dict[str, Any]) -> float:
    alphas = config.get("alpha_pattern") or {}
    alpha: float = alphas.get(get_pattern_key(list(alphas), name), config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _update(name: str, part: dict[str, Tensor], config: dict[str, Any]) -> LoraDelta:
    down, up = part["lora_A"], part["lora_B"]
    return LoraDelta(
        down=down,
        up=up,
        scale=_scale(name, down.shape[0], config),
        magnitude=part.get("lora_magnitude_vector"),
        transposed=bool(config.get("fan_in_fan_out")),
    )
