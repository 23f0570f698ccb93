"""What the Model screen lists: the models of this machine, and the results of the last search of the Hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from textual.content import Content

from qlora_tui.catalog.hub import HubModel
from qlora_tui.catalog.local_models import LocalModel
from qlora_tui.tui.screens.models.model_facts import HubFacts
from qlora_tui.tui.screens.models.model_lines import HUB, LOCAL, hub_lines, local_lines


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

    def local_model(self, id_: str | None) -> LocalModel | None:
        """The model of this machine with this id of a line."""
        return next((m for m in self.local or () if LOCAL + str(m.path) == id_), None)

    def hub_model(self, id_: str | None) -> HubModel | None:
        """The model on the Hub with this id of a line."""
        return next((m for m in self.hub or () if HUB + m.id == id_), None)

    def copy_here(self, model: HubModel) -> LocalModel | None:
        """The copy on this machine of a model on the Hub, where it can be trained."""
        return next((m for m in self.local or () if m.id == model.id and m.refusal is None), None)

    def lines(self, words: str, chosen: str, width: int) -> list[tuple[str, Content]]:
        """(id, line) of each model of this machine with ``words`` in its name, then those of the Hub.

        Args:
            words: In lower case. Results of the Hub stay whatever is typed after they were searched for.
            chosen: The id of the recipe's model.
            width: Cells of a line.
        """
        local = [model for model in self.local or () if words in model.name.lower()]
        lines = local_lines(local, chosen, width, self.needs) if self.local else []
        here = frozenset(model.id for model in self.local or () if model.refusal is None)
        return [*lines, *hub_lines(self.hub, self.query, width, here)]
