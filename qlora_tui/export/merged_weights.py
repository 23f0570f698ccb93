"""The weights of a base with an adapter merged in, one tensor at a time.

The base may be its stored 16-bit weights, or these weights as the training saw them: quantized to 4 bits and
back (``requantize``). An adapter that learned on 4-bit weights also learned to
make up for their rounding errors, and may answer otherwise on the 16-bit ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from qlora_tui.catalog.config_parser import load_config
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.catalog.model_validation import CONFIG, is_mxfp4, read_header, weight_files
from qlora_tui.chat.adapter_deltas import AdapterDeltas, LoraDelta, read_deltas
from qlora_tui.chat.base_weights import assign_deltas, with_tied_head
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.chat.session import model_folder
from qlora_tui.errors import UserError
from qlora_tui.export.requantize import Requantizer, reader_of


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of a weight file."""

    name: str
    """Its name in the weight file."""
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Returns its values: float32 where LoRA changes it, else in the stored dtype."""


@dataclass(frozen=True)
class MergedWeights:
    """The base's weight files, and the adapter's update of each tensor."""

    folder: Path
    """The base's folder."""
    updates: dict[Path, AdapterDeltas]
    """By weight file, then by tensor name."""
    requantize: Requantizer | None = None
    """Rounds a tensor as quantization did in training; None keeps the stored values."""

    @property
    def changed(self) -> int:
        """Return the number of tensors that the adapter changes."""
        return sum(map(len, self.updates.values()))

    def __iter__(self) -> Iterator[MergedTensor]:
        """Yield every tensor in the order of the files."""
        for file in self.updates:
            for name, entry in read_header(file)[1].items():
                if name != "__metadata__":
                    yield MergedTensor(name, tuple(entry["shape"]), partial(self._read, file, name))

    def _read(self, file: Path, name: str) -> Tensor:
        with safe_open(file, framework="pt") as content:
            # Copy: the original is a view of the mapped file.
            stored: Tensor = content.get_tensor(name).clone()
        if self.requantize is not None:
            stored = self.requantize(name, stored, reader_of(self.updates))
        update = self.updates[file].get(name)
        if update is None:
            return stored
        return update.apply_to(stored.float() if isinstance(update, LoraDelta) else stored)


def merged_weights(
    source: ChatSource, adapter_name: str, on_status: Callable[[str], None] = lambda words: None
) -> MergedWeights:
    """Return the weights of a run's base with its adapter ``adapter_name``. Raises UserError."""
    base = model_folder(source.recipe, on_status)
    require_mergeable(base)
    adapter = Path(source.adapters[adapter_name])
    files = [base / name for name in weight_files(base)]
    head = resolve_model(source.recipe.model.id).architecture.head
    deltas = with_tied_head(read_deltas(adapter), files, head)
    return MergedWeights(base, assign_deltas(deltas, files, adapter))


def require_mergeable(base: Path) -> None:
    """Raise UserError where the weights of a base are stored in a form that nothing is merged into."""
    if is_mxfp4(load_config(base / CONFIG)):
        raise UserError(
            "This base cannot be exported with its adapter",
            what=f"{base} stores its experts in 4-bit floats (MXFP4).",
            why="Merged models and files for llama.cpp are made from 16-bit weights.",
            fix="Export the adapter alone, as a folder: `qlora-tui export adapter RUN FOLDER`.",
        )
