"""What a setting, or the kind of module under the cursor, means: from the glossary, with advice.

The other settings are explained below it, those with the least known names first, as far as there is room.
"""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content
from textual.widgets import Static

from qlora_tui.catalog.architecture_types import LinearModule
from qlora_tui.formatting import capitalize
from qlora_tui.glossary import GLOSSARY, explain
from qlora_tui.recipe.schema import Lora
from qlora_tui.tui.screens.lora.controls import LORA_CONTROLS, targets_advice, term_of
from qlora_tui.tui.widgets.line_widgets import update_if_changed
from qlora_tui.tui.widgets.panel import Panel

_LEAST_KNOWN = ("lora.use_rslora", "lora.use_dora", "lora.train_embeddings")


class TermPanel(Panel):
    """The word as its title, what it means, and the advice on it."""

    def __init__(self) -> None:
        self._meaning = Static(id="term")
        self._shown: tuple[str, str] = ("", "")
        super().__init__("Term", self._meaning, id="term-panel")

    def on_resize(self) -> None:
        # The panel knows its new size only after the layout.
        if self._shown[0]:
            self.call_after_refresh(self._show_meaning)

    def show_setting(self, path: str, advice: str) -> None:
        """Explain a setting."""
        self._show(_title(path), term_of(path), advice)

    def show_modules(self, modules: Sequence[LinearModule], lora: Lora) -> None:
        """Explain the kind of these modules, or targets at all."""
        kinds = {module.kind for module in modules}
        kind = next(iter(kinds)) if len(kinds) == 1 else ""
        term = kind if kind in GLOSSARY else "target modules"
        self._show(kind or "Target modules", term, targets_advice(lora))

    def _show(self, title: str, term: str, advice: str) -> None:
        self.show_title(title)
        self._shown = (term, advice)
        self._show_meaning()

    def _show_meaning(self) -> None:
        term, advice = self._shown
        paragraphs = [Content.assemble(explain(term), "\n", (advice, "$text-muted"))]
        width, room = self.content_size.width, self.content_size.height
        others = [control.path for control in LORA_CONTROLS if term_of(control.path) != term]
        for text in map(one_line, sorted(others, key=_order) if width else ()):
            if sum(len(each.wrap(width)) + 1 for each in (*paragraphs, text)) - 1 <= room:
                paragraphs.append(text)
        update_if_changed(self._meaning, Content("\n\n").join(paragraphs))


def one_line(path: str) -> Content:
    """A setting explained without a panel."""
    return Content.assemble((f"{_title(path)}: ", "bold"), explain(term_of(path)))


def _order(path: str) -> int:
    return _LEAST_KNOWN.index(path) if path in _LEAST_KNOWN else len(_LEAST_KNOWN)


def _title(path: str) -> str:
    term = term_of(path)
    return capitalize(term) if term.islower() else term
