"""The draft: the recipe being edited, in a file, so that a closed terminal or a power cut loses no edit.

One file serves all apps of an account. Each remembers what it last read or wrote there, and sees so whether
another has changed it since; then it asks whose recipe stays.
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
"""First line of the draft, before the preset's name."""
_LOCK_S = 0.5
"""How long another app may take to write its draft."""


@dataclass(frozen=True)
class SavedDraft:
    """What the file held."""

    recipe: Recipe | None = None
    """None where there is no draft, or it could not be read."""
    preset: str = ""
    """Name of the preset that the recipe started as; empty for the defaults."""
    error: UserError | None = None
    """Why the draft could not be read, and where its copy is."""


class Draft:
    """The draft file as one app knows it."""

    def __init__(self) -> None:
        self._known: str | None = None
        """What this app last read or wrote."""
        self._seen: tuple[int, int] | None = None
        """Inode and time of the file when it was last compared with that."""
        self._aside: Path | None = None
        self._is_settled = False
        """Whether the draft was written since the last conflict: the next one needs another file."""

    def load(self) -> SavedDraft:
        """Read the draft. One that cannot be read is moved aside, so that a save does not overwrite it."""
        with _draft_lock():
            self._known = None
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
        """Write the workbench to the disk; False where another app changed the draft, which then stays.

        Both are on the disk afterwards: what is not in the draft is in :attr:`aside`, which with ``replace``
        is the other app's. Raises OSError.
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
            self._known, self._is_settled = text, True
        return True

    @property
    def aside(self) -> Path:
        """Where the recipe is that lost against another app's."""
        if self._aside is None:
            self._aside = _free_name("other")
        return self._aside

    def is_changed_elsewhere(self) -> bool:
        """Whether another app has changed the draft since the last call, and since this app wrote it."""
        try:
            status = draft_path().stat()
            if self._known is None or self._seen == (status.st_ino, status.st_mtime_ns):
                return False
            self._seen = (status.st_ino, status.st_mtime_ns)
            return _content() not in (self._known, None)
        except OSError:
            return False


def open_workbench(draft: Draft) -> Workbench:
    """The workbench as it was left; a fresh one where there is no draft, or it cannot be read.

    A preset that was deleted or damaged since takes nothing of the recipe with it.
    """
    saved = draft.load()
    preset_error = None
    for name in (saved.preset or FIRST_PRESET, FIRST_PRESET):
        # The user may have a preset of either name, and have broken it.
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
    """Save the workbench as the draft; where another app changed that, ask whose recipe to keep.

    Raises OSError.
    """
    from qlora_tui.tui.screens.modals.dialogs import DraftChangedScreen

    if app.draft.save(app.workbench) or isinstance(app.screen, DraftChangedScreen):
        return
    other_draft = Draft()
    other = open_workbench(other_draft)
    if other.draft_error is not None:
        app.notify(str(other.draft_error), severity="warning", timeout=10)
        app.draft.save(app.workbench)
        return

    def on_result(choice: DraftChoice | None) -> None:
        if choice == "mine":
            app.draft.save(app.workbench, replace=True)
        elif choice == "theirs":
            app.draft = other_draft
            app.workbench.adopt(other)
            app.recipe_edited()
            app.notify(f"Loaded the other app's recipe. Press {key_name('app.undo')} to restore yours.")

    changes = [str(change) for change in diff_recipes(app.workbench.recipe, other.recipe)]
    app.push_screen(DraftChangedScreen(changes, app.draft.aside), on_result)


def tell_of_change(app: QloraApp) -> None:
    """Say once for each change that another app has changed the draft, which this app does not show."""
    from qlora_tui.tui.screens.modals.dialogs import DraftChangedScreen

    # While the app closes it has no screens.
    is_asking = any(isinstance(screen, DraftChangedScreen) for screen in app.screen_stack)
    if app.screen_stack and not is_asking and app.draft.is_changed_elsewhere():
        app.notify(
            "Another app changed the recipe. This one shows its own, and your next edit asks whose stays.",
            severity="warning",
            timeout=10,
        )


def draft_written_at() -> float:
    """Unix time of the last change of the recipe; 0 where there was none."""
    try:
        return draft_path().stat().st_mtime
    except OSError:
        return 0.0


def draft_path() -> Path:
    return paths.state_dir() / "draft.toml"


def _content() -> str | None:
    """The draft as text, whatever bytes are in it; None where there is none."""
    try:
        return read_regular(draft_path()).decode(errors="surrogateescape")
    except FileNotFoundError:
        return None


def _read_draft() -> tuple[Recipe, str]:
    """The recipe and the name of the preset it began as. Raises UserError."""
    text, origin = read_text(draft_path()), str(draft_path())
    layer = parse(text, origin)
    validate(layer, origin, text)
    return to_recipe(layer, origin), text.partition("\n")[0].removeprefix(_PRESET_COMMENT).strip()


def _move_aside(problem: UserError) -> UserError:
    """Keep a draft that cannot be read under another name; what to say of it."""
    aside = _free_name("damaged")
    try:
        draft_path().rename(aside)
        sync(aside.parent)
        message = f"It was saved as {aside}: open it in an editor, or with the version that wrote it."
    except OSError as error:
        message = f"Move {draft_path()} away: that failed here ({error.strerror or error})."
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
    """Keep other apps from writing meanwhile, where the file system has locks."""
    with ExitStack() as stack:
        with suppress(UserError):
            stack.enter_context(locked(paths.state_dir() / "draft.lock", patience_s=_LOCK_S))
        yield
