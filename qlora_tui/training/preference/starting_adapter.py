"""The adapter that a run starts from (``lora.init_from``) as the reference of DPO and KTO.

The reference is what the model was before the run, so where an adapter is trained further it is that adapter
and not the base. Its weights are kept beside those that change, and take their place for a pass. The first
attempt writes them to the run's folder, so that a resume compares with the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qlora_tui.errors import UserError
from qlora_tui.files import atomic_write, read_regular


class StartingAdapter:
    """Weights of the trained parameters at the start of a run."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """``weights``: by the names of the parameters, on their devices."""
        self._weights = dict(weights)

    @classmethod
    def of(cls, model: Any) -> StartingAdapter:
        """Copy the trained parameters of a model."""
        return cls({name: p.detach().clone() for name, p in _trained(model)})

    @classmethod
    def read(cls, path: Path, model: Any) -> StartingAdapter:
        """Read what :meth:`write` wrote. Raises UserError for a file that is missing or does not fit."""
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
        """Give a model these weights inside, without gradients; its own are there again afterwards."""
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
