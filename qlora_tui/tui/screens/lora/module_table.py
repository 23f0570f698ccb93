"""The linear modules of a model as a table of kinds and layers.

:mod:`.module_grid` draws it, the LoRA screen turns selected names into patterns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qlora_tui.catalog.architecture_types import Architecture, LinearModule
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Lora
from qlora_tui.recipe.targets import alpha_of, match_modules, rank_of

ALL, SOME, NONE = "all", "some", "none"


def adapter_parameters(modules: Iterable[LinearModule], lora: Lora) -> int:
    """Trained parameters: rank × (in + out) per matrix, and with DoRA one magnitude per output."""
    return sum(
        rank_of(lora, module) * (module.in_features + module.out_features) * module.copies
        + (module.out_features if lora.use_dora else 0)
        for module in modules
    )


def has_custom_rank(modules: Iterable[LinearModule], lora: Lora) -> bool:
    """Whether a pattern gives any of them a rank or an alpha that differs from the recipe's."""
    if not (lora.rank_pattern or lora.alpha_pattern):
        return False
    return any((rank_of(lora, m), alpha_of(lora, m)) != (lora.rank, lora.alpha) for m in modules)


@dataclass(frozen=True)
class ModuleRow:
    """One kind, or every kind: its modules by column."""

    name: str
    cells: tuple[tuple[LinearModule, ...], ...]

    @property
    def modules(self) -> list[LinearModule]:
        """All of them, in the model's order."""
        return [module for cell in self.cells for module in cell]

    @property
    def shape(self) -> str:
        """``3584→512``, in → out; the first layer's where layers differ."""
        if self.name == "every kind":
            return ""
        first = self.modules[0]
        return f"{first.in_features}→{first.out_features}"


class ModuleTable:
    """The language model's modules; a vision tower's get no gradient from text and are left out."""

    def __init__(self, architecture: Architecture) -> None:
        self.modules: Sequence[LinearModule] = [m for m in architecture.targets if m.part != "vision"]
        layers = sorted({m.layer for m in self.modules if m.layer is not None})
        outside = [None] if any(m.layer is None for m in self.modules) else []
        self.columns: tuple[int | None, ...] = (*layers, *outside)
        """Layers by number; None last, for modules outside layers."""
        kinds = dict.fromkeys(module.kind for module in self.modules)
        # As all-linear: experts are chosen by name.
        every = self._row("every kind", [m for m in self.modules if m.part != "expert"])
        self.rows = (every, *(self._row(k, [m for m in self.modules if m.kind == k]) for k in kinds))

    def _row(self, name: str, modules: Sequence[LinearModule]) -> ModuleRow:
        by_layer: dict[int | None, list[LinearModule]] = {column: [] for column in self.columns}
        for module in modules:
            by_layer[module.layer].append(module)
        return ModuleRow(name, tuple(tuple(by_layer[column]) for column in self.columns))

    def chosen(self, patterns: tuple[str, ...]) -> frozenset[str]:
        """Names of the modules that these patterns select; none if one of them selects nothing."""
        try:
            return frozenset(module.name for module in match_modules(patterns, self.modules))
        except UserError:
            return frozenset()

    def within(self, rows: tuple[int, int], columns: tuple[int, int] | None) -> list[LinearModule]:
        """Modules of a block of rows and columns, both ends included, in any order; None is every column."""
        top, bottom = sorted(rows)
        first, last = sorted(columns) if columns else (0, len(self.columns) - 1)
        chosen = {
            module.name: module
            for row in self.rows[top : bottom + 1]
            for cell in row.cells[first : last + 1]
            for module in cell
        }
        return list(chosen.values())


def state(modules: Sequence[LinearModule], chosen: frozenset[str]) -> str:
    """Whether all, some or none of them are chosen."""
    count = sum(module.name in chosen for module in modules)
    return ALL if count == len(modules) else SOME if count else NONE


def toggled(modules: Sequence[LinearModule], chosen: frozenset[str]) -> frozenset[str]:
    """All of them chosen, unless they were: then none."""
    names = frozenset(module.name for module in modules)
    return chosen - names if state(modules, chosen) == ALL else chosen | names
