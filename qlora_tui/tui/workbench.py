"""The recipe being edited, with undo, and what follows from it: architecture and estimates.

:mod:`qlora_tui.tui.draft` saves it to a file as it changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_tui.errors import UserError
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.fields import get_setting, replace_setting
from qlora_tui.recipe.layering import build_recipe
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import to_layer, to_recipe
from qlora_tui.tui.key_names import key_name

if TYPE_CHECKING:
    from qlora_tui.catalog.architecture_types import Architecture
    from qlora_tui.memory import Device, Estimate
    from qlora_tui.memory.estimate import Precision
    from qlora_tui.memory.recording import StepTrace
    from qlora_tui.tui.app import QloraApp

# The first frame shows neither architecture nor estimate, so it does not wait for their packages:
# they are imported where they are first needed.

_UNDO_STEPS = 200
FIRST_PRESET = "balanced"


@dataclass(frozen=True)
class _EditState:
    recipe: Recipe
    preset: str
    preset_recipe: Recipe


class Workbench:
    """The recipe being edited, with undo, redo and cached estimates."""

    def __init__(self, recipe: Recipe | None = None, preset: str = FIRST_PRESET) -> None:
        """Raises UserError where there is no such preset, or it is damaged."""
        preset_recipe = build_recipe(preset=preset) if preset else Recipe()
        self._now = _EditState(recipe or preset_recipe, preset, preset_recipe)
        self.preset_error: UserError | None = None
        """Why the preset that the recipe started from could not be opened."""
        self.draft_error: UserError | None = None
        """Why the draft could not be read, and where its copy is."""
        self._undo: list[_EditState] = []
        self._redo: list[_EditState] = []
        self._architecture: tuple[str, Architecture | UserError] | None = None
        self.on_outline: Callable[[str], object] = lambda model: None
        """Called, in any thread, with the id of a model when only its outline was read."""
        self._trainable: str | None = None
        """A model that can be trained."""
        self._compared: (
            tuple[Architecture | UserError, Recipe, Device, dict[Precision, Estimate] | UserError] | None
        ) = None
        self._traced: tuple[Recipe, Device, StepTrace] | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe being edited."""
        return self._now.recipe

    @property
    def preset(self) -> str:
        """Name of the preset it started as; empty for the defaults."""
        return self._now.preset

    @property
    def preset_recipe(self) -> Recipe:
        """The recipe as that preset gives it, with the current model and data."""
        return _with_model_and_data(self._now.preset_recipe, self.recipe)

    @property
    def modified(self) -> bool:
        """Whether the recipe differs from its preset."""
        return self.recipe != self.preset_recipe

    def set(self, path: str, value: Any) -> bool:
        """Change one setting, checked; False when it had that value already. Raises UserError."""
        changed = replace_setting(self.recipe, path, value)
        to_recipe(to_layer(changed), origin="this recipe")
        return self.replace(changed)

    def replace(self, recipe: Recipe) -> bool:
        """Change the whole recipe, undoably; False when nothing changed."""
        if recipe == self.recipe:
            return False
        self._change_to(_EditState(recipe, self._now.preset, self._now.preset_recipe))
        return True

    def adopt(self, other: Workbench) -> None:
        """Adopt the recipe and preset of another workbench; undo restores the old ones."""
        self._change_to(other._now)

    def open_preset(self, name: str) -> None:
        """Take a preset's settings, keeping model and data. Raises UserError."""
        preset_recipe = build_recipe(preset=name)
        changed = _with_model_and_data(preset_recipe, self.recipe)
        self._change_to(_EditState(changed, name, preset_recipe))

    def saved_as(self, name: str) -> tuple[str, Recipe]:
        """Record that the recipe was saved as preset ``name``: no change of the recipe, so nothing to undo.

        Returns the preset that it started from until now, for :meth:`undo_saved_as`.
        """
        previous_preset = self._now.preset, self._now.preset_recipe
        self._now = _EditState(self.recipe, name, self.recipe)
        return previous_preset

    def undo_saved_as(self, name: str, previous_preset: tuple[str, Recipe]) -> None:
        """Undo :meth:`saved_as`, given what that returned."""
        if self.preset == name:
            self._now = _EditState(self.recipe, *previous_preset)

    def undo(self) -> bool:
        """Back by one change; False at the beginning."""
        if not self._undo:
            return False
        self._redo.append(self._now)
        self._now = self._undo.pop()
        return True

    def redo(self) -> bool:
        """Forward again by one change; False at the end."""
        if not self._redo:
            return False
        self._undo.append(self._now)
        self._now = self._redo.pop()
        return True

    def architecture(self) -> Architecture | UserError:
        """Architecture of the recipe's model from its ``config.json``; a UserError if there is none."""
        model = self.recipe.model.id
        known = self._architecture  # a thread may ask while the app forgets it
        if known is None or known[0] != model:
            known = self._architecture = (model, _read(model))
            if not isinstance(known[1], UserError) and known[1].is_outline:
                self.on_outline(model)
        return known[1]

    def refuse_outline(self, model: str, problem: UserError) -> None:
        """Answer with the reason why the exact architecture of a model could not be read."""
        self._architecture = (model, problem)
        self._compared = None

    def model_refusal(self) -> UserError | None:
        """Why the recipe's model cannot be trained, though it may have an estimate; None if it can.

        Only that it can is cached: what is missing may be downloaded by another program.
        """
        model = self.recipe.model.id
        if self._trainable == model:
            return None
        if not model:
            return None
        from qlora_tui.catalog.local_models import training_refusal

        refusal = training_refusal(model)
        self._trainable = model if refusal is None else None
        return refusal

    def forget_architecture(self) -> None:
        """Read the model's files again when they are next needed: it may have been downloaded since."""
        self._architecture = None
        self._trainable = None
        self._compared = None

    def comparison(self, device: Device) -> dict[Precision, Estimate] | UserError:
        """The estimate in every precision; a UserError if there is nothing to estimate.

        Cached until the recipe changes, since strip and screen both need it.
        """
        known, architecture = self._compared, self.architecture()
        if known is None or known[0] is not architecture or known[1:3] != (self.recipe, device):
            known = self._compared = (architecture, self.recipe, device, self._compare(architecture, device))
        return known[3]

    def estimate(self, device: Device) -> Estimate | None:
        """The estimate in the recipe's precision; None if there is nothing to estimate."""
        from qlora_tui.memory.estimate import precision_of

        compared = self.comparison(device)
        return None if isinstance(compared, UserError) else compared[precision_of(self.recipe)]

    def use_trace(self, recipe: Recipe, device: Device, traced: StepTrace) -> None:
        """Use a traced step instead of the formula until the recipe changes."""
        self._traced = (recipe, device, traced)
        self._compared = None

    def trace_on(self, device: Device) -> StepTrace | None:
        """The traced step of the recipe as it is now, if there is one."""
        traced = self._traced
        return traced[2] if traced is not None and traced[:2] == (self.recipe, device) else None

    def _compare(
        self, architecture: Architecture | UserError, device: Device
    ) -> dict[Precision, Estimate] | UserError:
        from qlora_tui.memory import compare

        if isinstance(architecture, UserError):
            return architecture
        try:
            return compare(self.recipe, architecture, device=device, traced=self.trace_on(device))
        except UserError as problem:
            return problem

    def _change_to(self, state: _EditState) -> None:
        """Make this the current state; undo restores the one before."""
        self._undo = [*self._undo, self._now][-_UNDO_STEPS:]
        self._redo.clear()
        self._now = state


def undo_recipe(app: QloraApp) -> None:
    """Undo the last change of the recipe."""
    nothing = "Nothing to undo: the recipe was not changed."
    _move(app, app.workbench.undo, "Undone", nothing, f"Press {key_name('app.redo')} to redo.")


def redo_recipe(app: QloraApp) -> None:
    """Redo the change that was undone."""
    nothing = "Nothing to redo: no change was undone."
    _move(app, app.workbench.redo, "Redone", nothing, f"Press {key_name('app.undo')} to undo.")


def notify_opened(app: QloraApp, before: Recipe) -> None:
    """Show which preset was opened, and how much it changed."""
    changes = _changes(before, app.workbench.recipe)
    app.notify(f"Opened {app.workbench.preset}: {changes}. Press {key_name('app.undo')} to undo.")


def _move(app: QloraApp, move: Callable[[], bool], done: str, nothing: str, reverse: str) -> None:
    workbench = app.workbench
    before, preset = workbench.recipe, workbench.preset
    if not move():
        app.notify(nothing)
        return
    app.recipe_edited()
    # Screens show a change of one setting; a preset changes many, most of them on other screens.
    if workbench.preset != preset:
        now = (
            f"the preset is {workbench.preset} again"
            if workbench.preset
            else "the recipe has no preset again"
        )
        app.notify(f"{done}: {now}, {_changes(before, workbench.recipe)}. {reverse}")


def _changes(before: Recipe, after: Recipe) -> str:
    from qlora_tui.recipe.fields import DESCRIPTIVE, diff_recipes

    changes = [change for change in diff_recipes(before, after) if change.path not in DESCRIPTIVE]
    return f"{pluralize(len(changes), 'setting')} changed"


def _read(model: str) -> Architecture | UserError:
    if not model:
        return UserError(
            "No model yet",
            what="The recipe has no model.",
            fix=f"Press {key_name('go.models')} to select one.",
        )
    from qlora_tui.catalog.local_models import load_architecture

    try:
        return load_architecture(model)
    except UserError as problem:
        return problem


def _with_model_and_data(recipe: Recipe, source: Recipe) -> Recipe:
    for path in ("model.id", "model.revision", "lora.init_from", "data.sources", "data.validation_path"):
        recipe = replace_setting(recipe, path, get_setting(source, path))
    return recipe


# Home is painted without the recipe package, so the comparison is imported where it is used.
