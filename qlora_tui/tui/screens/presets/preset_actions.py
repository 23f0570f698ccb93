"""What the keys of the presets screen do with preset files, with undo."""

from __future__ import annotations

import shlex
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from textual.app import SuspendNotSupported
from textual.screen import ModalScreen

from qlora_tui.errors import UserError
from qlora_tui.formatting import format_path
from qlora_tui.recipe.presets import OverwriteError, Preset, PresetSnapshot, delete, restore, take_snapshot
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.modals.dialogs import ConfirmScreen, ErrorScreen, TextPromptScreen
from qlora_tui.tui.screens.presets.preset_files import edit, export_preset, import_preset, save_as

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp


@dataclass(frozen=True)
class _PresetChange:
    """A change of a user's preset file, for undo."""

    before: PresetSnapshot
    after: PresetSnapshot
    previous_preset: tuple[str, Recipe] | None
    """The preset that the recipe had started from when it was saved."""


class PresetActions(ModalScreen[None]):
    """A screen with a preset under the cursor."""

    def __init__(self) -> None:
        super().__init__()
        self._undo: list[_PresetChange] = []
        """Changes made in this window, oldest first."""

    @property
    def qlora_app(self) -> QloraApp:
        """The app, typed."""
        return cast("QloraApp", self.app)

    @property
    @abstractmethod
    def current(self) -> Preset | None:
        """The preset under the cursor."""

    @abstractmethod
    def refresh_list(self, select: str | None = None) -> None:
        """Read the presets again, with the cursor on ``select``."""

    @abstractmethod
    def action_leave(self) -> None:
        """Leave the field for the name, or the screen."""

    def action_delete(self) -> None:
        """Delete one of the user's own."""
        preset = self.current
        if preset is not None and self.qlora_app.try_or_show_error(
            lambda: self._remember(delete(preset.name))
        ):
            self.notify(f"Deleted {preset.name}. Press {key_name('presets.undo')} here to undo.")
            self.refresh_list()

    def action_undo(self) -> None:
        """Undo the last deletion, save or import in this window."""
        if not self._undo:
            key = key_name("app.undo")
            self.notify(f"No preset was changed here. Press Esc, then {key} to undo changes of the recipe.")
            return
        last = self._undo[-1]
        # What was edited since is somebody's work: then restore asks.
        self._restore(last, overwrite=take_snapshot(last.before.name) == last.after)

    def _restore(self, change: _PresetChange, *, overwrite: bool) -> None:
        before = change.before
        try:
            restore(before, overwrite=overwrite)
        except OverwriteError as problem:
            self._confirm_overwrite(problem, lambda: self._restore(change, overwrite=True))
        except UserError as problem:
            self.app.push_screen(ErrorScreen(problem))
        else:
            self._undo.pop()
            if change.previous_preset is not None:
                self.qlora_app.workbench.undo_saved_as(before.name, change.previous_preset)
                self.qlora_app.recipe_edited()
            self.refresh_list(before.name)
            done = "Removed" if before.content is None else "Restored"
            self.notify(f"Undone. {done} your preset {before.name}.")

    def _remember(self, before: PresetSnapshot, previous_preset: tuple[str, Recipe] | None = None) -> None:
        self._undo.append(_PresetChange(before, take_snapshot(before.name), previous_preset))

    def action_edit(self) -> None:
        """Open the user's file in the editor, and check it on return."""
        preset = self.current
        if preset is None:
            return
        try:
            with self.app.suspend():
                tried = self.qlora_app.try_or_show_error(lambda: edit(preset))
        except SuspendNotSupported:
            self.notify(
                "This terminal cannot run an editor inside the app. "
                f"Edit the file yourself: {format_path(preset.path)}",
                severity="warning",
            )
            return
        self.refresh_list(preset.name)
        after = self.current
        if tried and after is not None and after.problem is not None:
            self.app.push_screen(ErrorScreen(after.problem))

    def action_import_preset(self) -> None:
        """Ask for a file and copy it to the user's presets."""
        self._ask(
            "Import a preset", "Path of a TOML file:", lambda path: self._import_preset(path, overwrite=False)
        )

    def action_export_preset(self) -> None:
        """Ask for a place and copy the preset there."""
        preset = self.current
        if preset is not None:
            self._ask(
                f"Export {preset.name}",
                "Path of a file or folder:",
                lambda path: self._export_preset(preset, path),
            )

    def _import_preset(self, path: Path, *, overwrite: bool) -> None:
        try:
            self._remember(import_preset(path, overwrite=overwrite))
        except OverwriteError as problem:
            self._confirm_overwrite(problem, lambda: self._import_preset(path, overwrite=True))
        except UserError as problem:
            self.app.push_screen(ErrorScreen(problem))
        else:
            self.refresh_list(path.stem)
            self.notify(f"Imported {path.stem}. Press {key_name('presets.undo')} here to undo.")

    def _export_preset(self, preset: Preset, target: Path) -> None:
        file = target / preset.path.name if target.is_dir() else target

        def write() -> None:
            if self.qlora_app.try_or_show_error(lambda: export_preset(preset, target)):
                self.notify(f"Exported to {file}.")

        if file.exists():
            self._confirm_overwrite(
                UserError("File already exists", what=f"{file} would be replaced."), write
            )
        else:
            write()

    def save(self, name: str, note: str, *, overwrite: bool) -> None:
        """Save the recipe as a preset; ask before another is replaced."""
        workbench = self.qlora_app.workbench
        try:
            before = save_as(name, workbench.recipe, note=note, own=workbench.preset, overwrite=overwrite)
        except OverwriteError as problem:
            self._confirm_overwrite(problem, lambda: self.save(name, note, overwrite=True))
            return
        except UserError as problem:
            self.app.push_screen(ErrorScreen(problem))
            return
        self._remember(before, workbench.saved_as(name))
        self.qlora_app.recipe_edited()
        self.notify(
            f"Saved the settings as {name}, without the model and the data. Use it with "
            f"--preset {shlex.quote(name)}. Press {key_name('presets.undo')} here to undo."
        )
        self.action_leave()
        self.refresh_list(name)

    def _ask(self, title: str, words: str, then: Callable[[Path], None]) -> None:
        def on_result(text: str | None) -> None:
            if text and text.strip():
                then(Path(text.strip()).expanduser())

        self.app.push_screen(TextPromptScreen(title, words), on_result)

    def _confirm_overwrite(self, problem: UserError, yes: Callable[[], None]) -> None:
        def on_result(agreed: bool | None) -> None:
            if agreed:
                yes()

        text = f"{problem.what} {problem.why}".strip()
        self.app.push_screen(ConfirmScreen(problem.title, text, yes="Replace it", no="Keep it"), on_result)
