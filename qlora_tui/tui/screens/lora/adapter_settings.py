"""The adapter's settings beside the module grid, what they mean, and advice on each from the papers.

LoRA: Hu et al. 2021, arXiv 2106.09685, section 7.2. QLoRA: Dettmers et al. 2023, arXiv 2305.14314, section 4.
rsLoRA: Kalajdzievski 2023, arXiv 2312.03732. DoRA: Liu et al. 2024, arXiv 2402.09353.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.message import Message
from textual.widgets import Static

from qlora_tui.catalog.architecture_types import LinearModule
from qlora_tui.formatting import capitalize
from qlora_tui.glossary import GLOSSARY, explain
from qlora_tui.recipe.fields import fields, format_value, get_setting
from qlora_tui.recipe.schema import ALL_LINEAR, Lora, Recipe
from qlora_tui.tui.key_names import bare_key
from qlora_tui.tui.widgets.controls import ViList
from qlora_tui.tui.widgets.line_widgets import update_if_changed
from qlora_tui.tui.widgets.panel import Panel


class SettingsList(ViList):
    """Lines with the path of a setting as their id."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right,l", "step(1)", show=False),
        Binding("left,h", "step(-1)", show=False),
    ]

    @dataclass
    class Stepped(Message):
        """The user wants the next or the previous value of a setting."""

        path: str
        direction: int

    def action_step(self, direction: int) -> None:
        """Ask for another value of the setting under the cursor."""
        if self.current is not None:
            self.post_message(self.Stepped(self.current, direction))

    def action_select(self) -> None:
        """Step it upwards."""
        self.action_step(1)

    def select_setting(self, path: str) -> None:
        """Put the cursor on a setting."""
        paths = [option.id for option in self.options]
        if path in paths:
            self.highlighted = paths.index(path)


_MIN_ADVICE = 50
"""Cells from which advice stands beside its setting."""


LORA_CONTROLS: dict[str, tuple[str, ...]] = {
    "lora.rank": ("lora.rank_up", "lora.rank_down"),
    "lora.alpha": ("lora.alpha_up", "lora.alpha_down"),
    "lora.dropout": ("lora.dropout_up", "lora.dropout_down"),
    "lora.use_rslora": ("lora.rslora",),
    "lora.use_dora": ("lora.dora",),
    "lora.train_embeddings": ("lora.embeddings",),
}
"""The settings on the screen, and the ids of the commands that change each."""
_TERMS = {"lora.use_rslora": "rsLoRA", "lora.use_dora": "DoRA", "lora.train_embeddings": "embed"}
"""Their words in the glossary, if those are not the settings' own names; the least known ones."""


def setting_lines(recipe: Recipe, base: Recipe, dora_cost: str, width: int) -> list[tuple[str, Content]]:
    """(path, line) of each setting, with the first words of its advice where there is room."""
    lines = []
    for path in LORA_CONTROLS:
        head = control_line(path, recipe, base)
        room = width - head.cell_length - 1
        words = setting_advice(path, recipe, base, dora_cost) if room >= _MIN_ADVICE else ""
        line = Content.assemble(head, (f" {words}", "$text-muted")).truncate(width, ellipsis=True)
        lines.append((path, line))
    return lines


def setting_advice(path: str, recipe: Recipe, base: Recipe, dora_cost: str) -> str:
    """Advice on a setting of this recipe; ``dora_cost`` is the memory of DoRA if it is known."""
    lora, now, before = recipe.lora, _scale(recipe.lora), _scale(base.lora)
    is_scaled_by_rank = lora.rank != base.lora.rank and lora.alpha == base.lora.alpha and now != before
    if path == "lora.alpha" and is_scaled_by_rank:
        return f"Scales the update by {now:.3g} instead of {before:.3g}: alpha is unchanged."
    if path == "lora.use_dora" and dora_cost:
        return f"{dora_cost}. {advice(path, lora)}"
    return advice(path, lora)


def term_of(path: str) -> str:
    """The setting's word in the glossary."""
    return _TERMS.get(path, fields()[path].key)


def control_line(path: str, recipe: Recipe, base: Recipe) -> Content:
    """``r R rank        16*``: keys, name, value, and a star where it is not the preset's."""
    value = get_setting(recipe, path)
    star = "*" if value != get_setting(base, path) else " "
    keys = " ".join(map(bare_key, LORA_CONTROLS[path]))
    return Content.assemble(
        (f"{keys:<4}", "$accent bold"), f"{term_of(path):<8}", (f"{format_value(value):>6}{star}", "bold")
    )


def _scale(lora: Lora) -> float:
    """The factor of the update B·A: alpha/rank, or alpha/√rank with rsLoRA."""
    return lora.alpha / (sqrt(lora.rank) if lora.use_rslora else lora.rank)


def advice(path: str, lora: Lora) -> str:
    """One line of advice on a setting of this recipe."""
    match path:
        case "lora.rank" if lora.target_modules == (ALL_LINEAR,):
            return "The QLoRA paper saw no effect of rank with all-linear."
        case "lora.rank":
            return "On q and v, ranks 1 to 8 did as well as 64 (LoRA paper)."
        case "lora.alpha":
            return f"Scales the update by {_scale(lora):.3g}, much like the learning rate."
        case "lora.dropout":
            return "QLoRA paper: 0.1 to 13B, 0.05 above. 0 saves memory."
        case "lora.use_rslora" if lora.use_rslora:
            return "Scales by alpha/√rank, so that high ranks keep learning."
        case "lora.use_rslora":
            return f"Scales the update {sqrt(lora.rank):.3g} times as much, for high ranks."
        case "lora.use_dora":
            return "Better at low ranks, slower at every rank (DoRA paper)."
        case _ if lora.train_embeddings:
            return "They learn at a tenth of the rate, as in Unsloth's example, unless another is set."
        case _:
            return "Unsloth trains them for continued pretraining."


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
        if lora.target_modules == (ALL_LINEAR,):
            advice = "The QLoRA paper needed all layers to match full fine-tuning."
        else:
            advice = "In the QLoRA paper, fewer layers fell short of full fine-tuning."
        self._show(kind or "Target modules", term, advice)

    def _show(self, title: str, term: str, advice: str) -> None:
        self.show_title(title)
        self._shown = (term, advice)
        self._show_meaning()

    def _show_meaning(self) -> None:
        term, advice = self._shown
        paragraphs = [Content.assemble(explain(term), "\n", (advice, "$text-muted"))]
        width, room = self.content_size.width, self.content_size.height
        others = [path for path in LORA_CONTROLS if term_of(path) != term]
        least_known_first = sorted(others, key=lambda path: path not in _TERMS)
        for text in map(one_line, least_known_first if width else ()):
            if sum(len(each.wrap(width)) + 1 for each in (*paragraphs, text)) - 1 <= room:
                paragraphs.append(text)
        update_if_changed(self._meaning, Content("\n\n").join(paragraphs))


def one_line(path: str) -> Content:
    """A setting explained without a panel."""
    return Content.assemble((f"{_title(path)}: ", "bold"), explain(term_of(path)))


def _title(path: str) -> str:
    term = term_of(path)
    return capitalize(term) if term.islower() else term
