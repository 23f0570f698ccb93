"""The draft file, which stores the recipe being edited.

With the draft, no edit is lost if the terminal is closed or the power fails. All windows of the app under one
user account share this file. Each window remembers what it last read from the file or wrote to it. If another
window has changed the file since, the app asks which recipe to keep.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.files import atomic_write, read_regular, sync
from qlora_tui.locks import locked
from qlora_tui.recipe.fields import diff_recipes
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import dump, parse, read_text, to_recipe, validate
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.workbench import FIRST_PRESET, Workbench

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp
    from qlora_tui.tui.screens.modals.dialogs import DraftChoice

_PRESET_COMMENT = "# began as "
"""Start of the draft's first line, before the preset's name."""
_LOCK_S = 0.5
"""Seconds to wait for another window to finish writing the draft."""


@dataclass(frozen=True)
class SavedDraft:
    """Contents of the draft file."""

    recipe: Recipe | None = None
    """The recipe in the draft; None if there is no draft or it could not be read."""
    preset: str = ""
    """Name of the preset that the recipe started from; empty for the defaults."""
    error: UserError | None = None
    """Why the draft could not be read, and where the unreadable file was moved."""


class Draft:
    """The draft file, and what this window of the app last read from the file or wrote to it."""

    def __init__(self) -> None:
        self._known: str | None = None
        """Text that this window last read from the file or wrote to it."""
        self._seen: tuple[int, int] | None = None
        """Inode and modification time (ns) of the file when it was last compared with ``_known``."""
        self._is_loaded = False
        self.is_newer = False
        """Whether the file held another window's text at the last comparison in :meth:`is_changed_elsewhere`.
        """
        self._aside: Path | None = None
        self._is_settled = False
        """Whether this window has written the draft since its last conflict with another window. If so, the
        next conflict uses a new file for :attr:`aside`.
        """

    def load(self) -> SavedDraft:
        """Read the draft. An unreadable draft is moved aside, so that saving does not overwrite it."""
        with _draft_lock():
            self._known, self._is_loaded = None, True
            try:
                content = _content()
                if content is None:
                    return SavedDraft()
                recipe, preset = _read_draft()
                self._known = content
                return SavedDraft(recipe, preset)
            except UserError as problem:
                return SavedDraft(error=_move_aside(problem))
            except OSError as error:
                unreadable = UserError("", what=f"{draft_path()}: {error.strerror or error}.")
                return SavedDraft(error=_move_aside(unreadable))

    def save(self, workbench: Workbench, *, replace: bool = False) -> bool:
        """Write the workbench's recipe to the draft and return True. If another window has changed the draft,
        write the recipe to the file :attr:`aside` instead, and return False.

        With ``replace``, the workbench's recipe goes into the draft in any case, and another window's recipe
        into :attr:`aside`. Raises OSError if a file cannot be written.
        """
        text = f"{_PRESET_COMMENT}{workbench.preset}\n{dump(workbench.recipe)}"
        with _draft_lock():
            on_disk = _content()
            if on_disk is not None and on_disk not in (self._known, text):
                if self._is_settled:
                    self._aside, self._is_settled = None, False
                atomic_write(self.aside, _encoded(on_disk if replace else text), durable=True)
                if not replace:
                    return False
            if on_disk != text:
                atomic_write(draft_path(), text, durable=True)
            self._known, self._is_settled, self.is_newer = text, True, False
        return True

    @property
    def aside(self) -> Path:
        """Path of a second file. If two windows have both changed the draft, the recipe that is not kept in
        the draft is saved here.
        """
        if self._aside is None:
            self._aside = _free_name("other")
        return self._aside

    def is_changed_elsewhere(self) -> bool:
        """Return whether another window has changed the file since the last call. True if the file has been
        modified, and its text differs from what this window last read or wrote.
        """
        try:
            status = draft_path().stat()
            if not self._is_loaded or self._seen == (status.st_ino, status.st_mtime_ns):
                return False
            self._seen = (status.st_ino, status.st_mtime_ns)
            self.is_newer = _content() not in (self._known, None)
            return self.is_newer
        except OSError:
            return False


def open_workbench(draft: Draft) -> Workbench:
    """Return a workbench with the draft's recipe. If there is no draft, or if it cannot be read, return a
    workbench with a new recipe.

    A missing or damaged preset does not affect the recipe.
    """
    saved = draft.load()
    preset_error = None
    for name in (saved.preset or FIRST_PRESET, FIRST_PRESET):
        # Either preset may be a damaged file in the user's folder.
        try:
            workbench = Workbench(saved.recipe, name)
            break
        except UserError as problem:
            preset_error = preset_error or problem
    else:
        workbench = Workbench(saved.recipe, preset="")
    workbench.preset_error, workbench.draft_error = preset_error, saved.error
    return workbench


def save_or_ask(app: QloraApp) -> None:
    """Save the workbench as the draft. If another window has changed the draft, ask whose recipe to keep.

    Raises OSError if the draft cannot be written.
    """
    from qlora_tui.tui.screens.modals.dialogs import DraftChangedScreen

    if app.draft.save(app.workbench) or isinstance(app.screen, DraftChangedScreen):
        return
    other_draft = Draft()
    other = open_workbench(other_draft)
    if other.draft_error is not None:
        app.notify(str(other.draft_error), severity="warning")
        app.draft.save(app.workbench)
        return

    def on_result(choice: DraftChoice | None) -> None:
        if choice == "mine":
            app.draft.save(app.workbench, replace=True)
        elif choice == "theirs":
            _adopt(app, other_draft, other)

    changes = [str(change) for change in diff_recipes(app.workbench.recipe, other.recipe)]
    app.push_screen(DraftChangedScreen(changes, app.draft.aside), on_result)


def reload_recipe(app: QloraApp) -> None:
    """Load the recipe that another window has saved. If no other window has changed the draft, notify the
    user instead.

    Undo restores this window's recipe. Raises UserError if the draft cannot be read.
    """
    draft = Draft()
    other = open_workbench(draft)
    if other.draft_error is not None:
        raise other.draft_error
    if app.draft.is_changed_elsewhere() or app.draft.is_newer:
        _adopt(app, draft, other)
    else:
        app.notify("No other window has changed the recipe.")


def _adopt(app: QloraApp, draft: Draft, other: Workbench) -> None:
    app.draft = draft
    app.workbench.adopt(other)
    app.recipe_edited()
    app.notify(f"Loaded the other window's recipe. Press {key_name('app.undo')} to restore yours.")


def tell_of_change(app: QloraApp) -> None:
    """If another window has changed the draft, tell the user how to load the other window's recipe."""
    from qlora_tui.tui.screens.modals.dialogs import DraftChangedScreen

    # The app has no screens while it closes.
    is_asking = any(isinstance(screen, DraftChangedScreen) for screen in app.screen_stack)
    if app.screen_stack and not is_asking and app.draft.is_changed_elsewhere():
        app.notify(
            f"Another window changed the recipe. Press {key_name('app.reload')} to load it. If you edit "
            f"first, the app asks which recipe to keep.",
            severity="warning",
        )
        app.recipe_changed.publish(app.workbench.recipe)


def draft_written_at() -> float:
    """Return the Unix time at which the draft was last written; 0 if there is no draft."""
    try:
        return draft_path().stat().st_mtime
    except OSError:
        return 0.0


def draft_path() -> Path:
    return paths.state_dir() / "draft.toml"


def _content() -> str | None:
    """Return the draft as text, with invalid UTF-8 as surrogate escapes; None if there is no draft."""
    try:
        return read_regular(draft_path()).decode(errors="surrogateescape")
    except FileNotFoundError:
        return None


def _read_draft() -> tuple[Recipe, str]:
    """Return the recipe in the draft and the name of the preset that the recipe started from.

    Raises UserError if the draft cannot be read as a recipe.
    """
    text, origin = read_text(draft_path()), str(draft_path())
    layer = parse(text, origin)
    validate(layer, origin, text)
    return to_recipe(layer, origin), text.partition("\n")[0].removeprefix(_PRESET_COMMENT).strip()


def _move_aside(problem: UserError) -> UserError:
    """Move an unreadable draft aside, and return the error to show."""
    aside = _free_name("damaged")
    try:
        draft_path().rename(aside)
        sync(aside.parent)
        message = (
            f"The draft was moved to {aside}: open that file in an editor, or with the version of "
            "qlora-tui that wrote it."
        )
    except OSError as error:
        message = (
            f"Move {draft_path()} to another folder: qlora-tui could not move it ({error.strerror or error})."
        )
    return UserError(
        "The recipe being edited could not be read", what=problem.what, why=problem.why, fix=message
    )


def _free_name(why: str) -> Path:
    aside = draft_path().with_name(f"{draft_path().name}.{why}-{time.strftime('%Y%m%d-%H%M%S')}")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}-2")
    return aside


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


@contextmanager
def _draft_lock() -> Iterator[None]:
    """Lock the draft, so that no other window writes it while the context is active. If the lock cannot be
    taken, continue without it.
    """
    with ExitStack() as stack:
        with suppress(UserError):
            stack.enter_context(locked(paths.state_dir() / "draft.lock", patience_s=_LOCK_S))
        yield
