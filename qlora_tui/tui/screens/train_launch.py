"""The launch half of the Train screen: the recipe in full as a form, and what speaks for and against it."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Container, VerticalScroll
from textual.content import Content
from textual.widgets import Static

from qlora_tui.recipe.fields import fields
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.screens.train_checks import Check, Outcome, errors
from qlora_tui.tui.widgets.lines import put
from qlora_tui.tui.widgets.settings_form import SettingsForm

_ELSEWHERE = frozenset(("data.sources", "name", "note"))
"""Sources are chosen on the Data screen, which shows what is in them."""
_HEAD = 19
"""Cells of a check's sign, word and name."""
SIGNS: dict[Outcome, tuple[str, str]] = {
    "ok": ("✓ ok", "$success"),
    "warning": ("! warning", "$warning"),
    "error": ("✗ error", "$error"),
}


def _paths() -> list[str]:
    """Training first: that is what is decided here."""
    order = {"": 0, "training": 1, "data": 2, "lora": 3, "quantization": 4, "model": 5}
    known = [field for field in fields().values() if field.path not in _ELSEWHERE]
    known.sort(key=lambda field: order.get(field.section, len(order)))
    return ["name", *(field.path for field in known)]


class LaunchPane(Container):
    """A form at the left or on top, the checks beside or under it."""

    def __init__(self) -> None:
        super().__init__(id="launch")
        self._checks: tuple[Check, ...] = ()

    def compose(self) -> ComposeResult:
        yield SettingsForm(_paths(), id="recipe-form")
        with VerticalScroll(id="checks-side", can_focus=False):
            yield Static("Looking at what the run needs…", id="checks")

    def on_resize(self) -> None:
        """Wrap the checks anew."""
        if self._checks:
            self.call_after_refresh(self.show_checks, self._checks)

    def show_recipe(self, recipe: Recipe, base: Recipe) -> None:
        """The recipe as it is now, beside its preset."""
        self.query_one(SettingsForm).show(recipe, base)

    def show_checks(self, checks: tuple[Check, ...]) -> None:
        """What was found, and whether the run can start."""
        self._checks = checks
        room = max(20, self.query_one("#checks-side").scrollable_content_region.width - _HEAD)
        lines = []
        for check in checks:
            sign, style = SIGNS[check.outcome]
            head = Content.assemble((f"{sign:<10}", style), (f"{check.name:<9}", "bold"))
            told = Content(check.text).wrap(room)
            if check.fix:
                told += Content.styled(f"▸ {check.fix}", "$accent").wrap(room)
            lines += [head + told[0], *(Content(" " * _HEAD) + piece for piece in told[1:])]
        wrong = errors(checks)
        if wrong:
            names = ", ".join(dict.fromkeys(check.name for check in wrong))
            lines.append(Content.styled(f"Not ready: {names}.", "bold $error"))
        else:
            waits = any(check.name == "turn" and check.outcome == "warning" for check in checks)
            lines.append(Content.styled(f"Ready. t {'queues' if waits else 'launches'} it.", "bold $success"))
        put(self.query_one("#checks", Static), Content("\n").join(lines))
