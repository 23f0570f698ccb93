"""LoftQ: starts A and B as the part of each 4-bit weight's rounding error that their rank holds.

Base and adapter together then begin nearer to the 16-bit model (arXiv 2310.08659; one iteration, which leaves
the 4-bit weights as they are). The matrices are those of peft (``utils/loftq_utils.py``) where a module's
scale is 1; with another scale s, s·B·A is the same. The 16-bit weights are read from the model's files,
since quantized ones may come from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qlora_tui.catalog.architecture_types import LinearModule, inner_name
from qlora_tui.catalog.model_validation import weight_files
from qlora_tui.catalog.safetensors_header import read_header
from qlora_tui.errors import UserError


def start_at_rounding_errors(
    model: Any,
    folder: Path,
    targets: Mapping[str, LinearModule],
    on_module: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Set A and B of each adapted 4-bit module of a new adapter; other modules start as before.

    Args:
        model: a peft model whose base was loaded from ``folder``.
        targets: its adapted modules, from :func:`qlora_tui.training.adapter.targets_by_name`.
        on_module: called with the modules done, and of how many.

    Returns:
        The share of the squared rounding errors that the adapter now makes up for.

    Raises:
        UserError: the files have no 16-bit weight of a module.
    """
    modules = {
        name: module
        for name, module in model.base_model.model.named_modules()
        if name in targets and hasattr(module.get_base_layer().weight, "quant_state")
    }
    read = _WeightFiles(folder)
    before = after = 0.0
    for number, (name, module) in enumerate(modules.items(), 1):
        error = _rounding_error(module.get_base_layer().weight, read.weight(name))
        down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
        left, right = low_rank_factors(error, len(down))
        before += float(error.square().sum())
        after += float((error - left @ right).square().sum())
        root = module.scaling["default"] ** 0.5
        with torch.no_grad():
            # A matrix narrower than the rank leaves rows of A, as they were drawn, and columns of B, zero.
            up[:, : left.shape[1]].copy_(left / root)
            down[: len(right)].copy_(right / root)
        on_module(number, len(modules))
    return 1 - after / before if before else 0.0


def low_rank_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the best approximation of that rank: U·√S and √S·Vᵀ of the singular values S.

    They come from the eigenvectors of the smaller of M·Mᵀ and Mᵀ·M, which takes less time than all singular
    vectors do.

    Args:
        matrix: (outputs, inputs), fp32.
        rank: the factors have as many columns and rows, but no more than the smaller side of the matrix.

    Returns:
        (outputs, rank) and (rank, inputs).
    """
    if matrix.shape[0] > matrix.shape[1]:
        left, right = low_rank_factors(matrix.T, rank)
        return right.T, left.T
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    count = min(rank, len(squares))
    main = vectors[:, -count:].flip(1)
    root = squares[-count:].flip(0).clamp_min(torch.finfo(matrix.dtype).tiny) ** 0.25
    return main * root, (main.T @ matrix) / root[:, None]


def _rounding_error(quantized: Any, stored: Tensor) -> Tensor:
    """What quantization took from a weight: (outputs, inputs), fp32, on the weight's device."""
    from bitsandbytes.functional import dequantize_4bit

    rounded = dequantize_4bit(quantized.data, quantized.quant_state)
    if rounded.shape != stored.shape:
        raise _unusable(f"a weight is {tuple(stored.shape)} in the files and {tuple(rounded.shape)} loaded")
    return stored.to(rounded.device, torch.float32).sub_(rounded)


class _WeightFiles:
    """The weights in a model's files, by the name of a module."""

    def __init__(self, folder: Path) -> None:
        self._places = {
            name: folder / file for file in weight_files(folder) for name in read_header(folder / file)[1]
        }
        # A text model taken out of a multimodal one lacks the outer part of the name.
        self._by_tail = {inner_name(name): name for name in self._places}

    def weight(self, module: str) -> Tensor:
        name = f"{module}.weight"
        name = name if name in self._places else self._by_tail.get(inner_name(name), "")
        if not name:
            raise _unusable(f"the files of the model have no weight of {module}")
        with safe_open(self._places[name], framework="pt") as content:
            weight: Tensor = content.get_tensor(name)
        if not weight.is_floating_point():
            raise _unusable(f"the weight of {module} is stored quantized")
        return weight


def _unusable(why: str) -> UserError:
    return UserError(
        "LoftQ cannot start this adapter",
        what=f'lora.init_weights is "loftq", and {why}.',
        fix='Set lora.init_weights = "random" or "eva".',
    )
