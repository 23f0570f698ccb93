"""Presets: browse with the difference to the recipe, open, save as, delete with undo."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from qlora_tui.errors import Problem
from qlora_tui.recipe.difference import difference
from qlora_tui.recipe.presets import Preset, Snapshot, WouldOverwrite, delete, presets, restore, save
from qlora_tui.tui.screens.problem import ProblemScreen
from qlora_tui.tui.screens.question import QuestionScreen

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp


class PresetsScreen(ModalScreen[None]):
    """Shipped presets and the user's own, beside what opening one would change."""

    CSS_PATH = "presets.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Close"),
        Binding("j", "list_down", show=False),
        Binding("k", "list_up", show=False),
        Binding("s", "save_as", "Save as"),
        Binding("D", "delete", "Delete"),
        Binding("u", "undo_delete", "Undo delete"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._presets: list[Preset] = []
        self._deleted: list[Snapshot] = []

    @property
    def workstation(self) -> QloraApp:
        """The app, by its own type."""
        return cast("QloraApp", self.app)

    def compose(self) -> ComposeResult:
        with Vertical(id="presets-card") as card:
            card.border_title = "Presets"
            card.border_subtitle = "enter opens · s save as · D delete · u undo · esc closes"
            with Horizontal():
                yield OptionList(id="preset-list")
                with VerticalScroll(id="preview-side", can_focus=False):
                    yield Static(id="preview", markup=False)
            yield Input(placeholder="name, or name: a note on what it is for", id="save-name")

    def on_mount(self) -> None:
        self.query_one("#save-name").display = False
        self._list_again(self.workstation.workbench.preset)
        self.query_one(OptionList).focus()

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Show what opening it would change."""
        self.query_one("#preview", Static).update(self._preview(self._presets[event.option_index]))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Open it; model and data stay."""
        preset = self._presets[event.option_index]
        try:
            self.workstation.workbench.open_preset(preset.name)
        except Problem as problem:
            self.app.push_screen(ProblemScreen(problem))
            return
        self.workstation.recipe_edited()
        self.dismiss()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Save the recipe under the name given."""
        name, _, note = event.value.partition(":")
        if name.strip():
            self._save(name.strip(), note.strip(), overwrite=False)

    def action_list_down(self) -> None:
        """As the arrow does."""
        self.query_one(OptionList).action_cursor_down()

    def action_list_up(self) -> None:
        """As the arrow does."""
        self.query_one(OptionList).action_cursor_up()

    def action_leave(self) -> None:
        """Leave the name field first, then the screen."""
        field = self.query_one("#save-name", Input)
        if field.display:
            field.display = False
            self.query_one(OptionList).focus()
        else:
            self.dismiss()

    def action_save_as(self) -> None:
        """Ask for a name."""
        field = self.query_one("#save-name", Input)
        field.display = True
        field.focus()

    def action_delete(self) -> None:
        """Delete one of the user's own; u brings it back until this screen closes."""
        index = self.query_one(OptionList).highlighted
        if index is None:
            return
        try:
            self._deleted.append(delete(self._presets[index].name))
        except Problem as problem:
            self.app.push_screen(ProblemScreen(problem))
            return
        self.notify(f"{self._presets[index].name} is deleted. u brings it back.")
        self._list_again(self._presets[max(0, index - 1)].name)

    def action_undo_delete(self) -> None:
        """Bring the last deleted preset back."""
        if not self._deleted:
            return
        try:
            restore(self._deleted.pop())
        except Problem as problem:
            self.app.push_screen(ProblemScreen(problem))
        self._list_again(self.workstation.workbench.preset)

    def _save(self, name: str, note: str, *, overwrite: bool) -> None:
        try:
            path = save(name, self.workstation.workbench.recipe, note=note, overwrite=overwrite)
        except WouldOverwrite as problem:

            def answered(yes: bool | None) -> None:
                if yes:
                    self._save(name, note, overwrite=True)

            question = QuestionScreen(problem.title, f"{problem.what} {problem.why}", yes="Replace it")
            self.app.push_screen(question, answered)
            return
        except Problem as problem:
            self.app.push_screen(ProblemScreen(problem))
            return
        self.workstation.workbench.saved_as(name)
        self.workstation.recipe_edited()
        self.notify(f"Saved as {path}")
        self.action_leave()
        self._list_again(name)

    def _list_again(self, select: str) -> None:
        self._presets = presets()
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options(Option(_line(preset)) for preset in self._presets)
        names = [preset.name for preset in self._presets]
        options.highlighted = names.index(select) if select in names else 0

    def _preview(self, preset: Preset) -> str:
        if preset.problem:
            return str(preset.problem)
        workbench = self.workstation.workbench
        changes = difference(workbench.recipe, preset.recipe(workbench.recipe))
        lines = [str(change) for change in changes] or ["The recipe is as this preset gives it."]
        heading = "Opening it changes:" if changes else ""
        return "\n".join(filter(None, [preset.note, "", heading, *lines]))


def _line(preset: Preset) -> Content:
    if preset.problem:
        return Content.assemble(preset.name, ("  cannot be read", "$error"))
    return Content.assemble(preset.name, ("" if preset.shipped else "  yours", "dim"))
