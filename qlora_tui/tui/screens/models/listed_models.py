"""What the Model screen lists: the models of this machine, and results of the Hub or models to start with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from textual.content import Content

from qlora_tui.catalog.hub import HubModel
from qlora_tui.catalog.local_models import LocalModel
from qlora_tui.tui.screens.models.model_facts import HubFacts
from qlora_tui.tui.screens.models.model_lines import (
    HUB,
    LOCAL,
    STARTER,
    hub_lines,
    local_lines,
    starter_lines,
)
from qlora_tui.tui.screens.models.starter_choice import Starter


@dataclass
class ListedModels:
    """Both lists, and what was found out about their models."""

    local: list[LocalModel] | None = None
    """None until the machine was searched."""
    hub: list[HubModel] | None = None
    """None without a search."""
    query: str = ""
    """What the Hub was searched for."""
    hub_facts: dict[str, HubFacts] = field(default_factory=dict)
    """Details of models on the Hub by id, where they were asked for."""
    needs: dict[Path, tuple[int, str]] = field(default_factory=dict)
    """Bytes and verdict of each model of this machine with the recipe as it is."""
    starters: tuple[Starter, ...] = ()
    """Models to start with, listed until the Hub is searched."""

    @property
    def lists_starters(self) -> bool:
        """Whether models to start with take the place of results: until the Hub is searched."""
        return self.hub is None and not self.query

    def local_model(self, id_: str | None) -> LocalModel | None:
        """The model of this machine with this id of a line."""
        return next((m for m in self.local or () if LOCAL + str(m.path) == id_), None)

    def hub_model(self, id_: str | None) -> HubModel | None:
        """The model on the Hub with this id of a line."""
        return next((m for m in self.hub or () if HUB + m.id == id_), None)

    def starter(self, id_: str | None) -> Starter | None:
        """The model to start with that has this id of a line."""
        return next((m for m in self.starters if STARTER + m.id == id_), None)

    def copy_here(self, model: HubModel) -> LocalModel | None:
        """The copy on this machine of a model on the Hub, where it can be trained."""
        return next((m for m in self.local or () if m.id == model.id and m.refusal is None), None)

    def lines(self, words: str, chosen: str, width: int) -> list[tuple[str, Content]]:
        """(id, line) of each model with ``words`` in its name: those of this machine, then those of the Hub.

        Until the Hub is searched, models to start with take the place of its results.

        Args:
            words: In lower case. Results of the Hub stay whatever is typed after they were searched for.
            chosen: The id of the recipe's model.
            width: Cells of a line.
        """
        local = [model for model in self.local or () if words in model.name.lower()]
        lines = local_lines(local, chosen, width, self.needs) if self.local else []
        here = frozenset(model.id for model in self.local or () if model.refusal is None)
        to_start = [m for m in self.starters if m.id not in here and words in m.id.lower()]
        if to_start and self.lists_starters:
            return [*lines, *starter_lines(to_start, width, with_demo=not self.local and not words)]
        return [*lines, *hub_lines(self.hub, self.query, width, here)]
