"""The recipe being edited: its undo history, its model's architecture, and its memory estimates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_tui.errors import UserError
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.fields import diff_recipes, get_setting, replace_setting, replace_settings
from qlora_tui.recipe.layering import build_recipe
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import to_layer, to_recipe
from qlora_tui.tui.key_names import key_name

if TYPE_CHECKING:
    from qlora_tui.catalog.architecture_types import Architecture
    from qlora_tui.memory import Device, Estimate, Verdict
    from qlora_tui.memory.budget import MemoryBudget
    from qlora_tui.memory.estimate import Precision
    from qlora_tui.tui.app import QloraApp


# The packages for architectures and estimates are imported where they are first needed, because the first
# frame shows neither.

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
        """Start from ``recipe`` or, if it is None, from the recipe of the preset. An empty ``preset`` means
        the defaults.

        Raises UserError if the preset does not exist or is damaged.
        """
        preset_recipe = build_recipe(preset=preset) if preset else Recipe()
        self._now = _EditState(recipe or preset_recipe, preset, preset_recipe)
        self.preset_error: UserError | None = None
        """Why the preset that the recipe started from could not be opened."""
        self.draft_error: UserError | None = None
        """Why the draft could not be read, and where the unreadable file was moved."""
        self._undo: list[_EditState] = []
        self._redo: list[_EditState] = []
        self._architecture: tuple[str, Architecture | UserError] | None = None
        self.on_outline: Callable[[str], object] = lambda model: None
        """Called with the id of a model if only an outline of its architecture was read, not the exact
        architecture. May be called in any thread.
        """
        self._trainable: str | None = None
        """Id of the recipe's model if the last check found that this model can be trained; otherwise None."""
        self._compared: tuple[
            tuple[Architecture | UserError, Recipe, Device, dict[Precision, Estimate] | UserError], ...
        ] = ()
        self._used: tuple[tuple[tuple[Recipe, Estimate, int], int], ...] = ()
        """((recipe, estimate, bytes of available memory), bytes that a run will use), newest first."""

    @property
    def recipe(self) -> Recipe:
        """The recipe being edited."""
        return self._now.recipe

    @property
    def preset(self) -> str:
        """Name of the preset that the recipe started from; empty for the defaults."""
        return self._now.preset

    @property
    def preset_recipe(self) -> Recipe:
        """The preset's recipe, but with the current recipe's name, model, data and initial adapter."""
        return _with_own(self._now.preset_recipe, self.recipe)

    @property
    def modified(self) -> bool:
        """Whether the recipe differs from :attr:`preset_recipe`."""
        return self.recipe != self.preset_recipe

    def set(self, path: str, value: Any) -> bool:
        """Change the setting at ``path`` and return True; return False if the setting already has this value.

        Raises UserError if the value is not allowed.
        """
        changed = replace_setting(self.recipe, path, value)
        to_recipe(to_layer(changed), origin="this recipe")
        return self.replace(changed)

    def replace(self, recipe: Recipe) -> bool:
        """Replace the whole recipe, as one change that can be undone, and return True; return False if
        ``recipe`` is the same.
        """
        if recipe == self.recipe:
            return False
        self._change_to(_EditState(recipe, self._now.preset, self._now.preset_recipe))
        return True

    def adopt(self, other: Workbench) -> None:
        """Adopt another workbench's recipe and preset. Undo restores the previous recipe and preset."""
        self._change_to(other._now)

    def open_preset(self, name: str) -> None:
        """Apply a preset's settings, but keep the recipe's name, model, data and initial adapter.

        Raises UserError if the preset does not exist or is damaged.
        """
        preset_recipe = build_recipe(preset=name)
        changed = _with_own(preset_recipe, self.recipe)
        self._change_to(_EditState(changed, name, preset_recipe))

    def saved_as(self, name: str) -> tuple[str, Recipe]:
        """Record that the recipe was saved as preset ``name``. The recipe does not change, so :meth:`undo` is
        not affected.

        Returns the name and recipe of the preset that the recipe was based on before, for
        :meth:`undo_saved_as`.
        """
        previous_preset = self._now.preset, self._now.preset_recipe
        self._now = _EditState(self.recipe, name, self.recipe)
        return previous_preset

    def undo_saved_as(self, name: str, previous_preset: tuple[str, Recipe]) -> None:
        """Undo :meth:`saved_as`, given its argument and its return value, unless the preset has changed
        since.
        """
        if self.preset == name:
            self._now = _EditState(self.recipe, *previous_preset)

    def undo(self) -> bool:
        """Undo the last change and return True; return False if there is nothing to undo."""
        if not self._undo:
            return False
        self._redo.append(self._now)
        self._now = self._undo.pop()
        return True

    def redo(self) -> bool:
        """Redo the change that was undone last and return True; return False if there is nothing to redo."""
        if not self._redo:
            return False
        self._undo.append(self._now)
        self._now = self._redo.pop()
        return True

    def architecture(self) -> Architecture | UserError:
        """Return the architecture of the recipe's model, or the UserError that explains why it is unknown."""
        return self._architecture_of(self.recipe.model.id)

    def _architecture_of(self, model: str) -> Architecture | UserError:
        known = self._architecture  # Read once, because another thread may reset the cache at any time.
        if known is None or known[0] != model:
            known = self._architecture = (model, _read(model))
            if not isinstance(known[1], UserError) and known[1].is_outline:
                self.on_outline(model)
        return known[1]

    def refuse_outline(self, model: str, problem: UserError) -> None:
        """Make :meth:`architecture` return ``problem``, which says why the model's exact architecture is
        unknown.
        """
        self._architecture = (model, problem)
        self._compared = ()

    def model_refusal(self) -> UserError | None:
        """Return why the recipe's model cannot be trained; None if it can, or if the recipe has no model.

        Memory can be estimated even for a model that lacks the files for training. If the model can be
        trained, this result is cached. A problem is not cached, because another program may download the
        missing files at any time.
        """
        model = self.recipe.model.id
        if self._trainable == model:
            return None
        if not model:
            return None
        from qlora_tui.catalog.local_models import training_refusal

        try:
            refusal = training_refusal(model)
        except UserError as problem:
            # The other machine does not respond.
            return problem
        self._trainable = model if refusal is None else None
        return refusal

    def forget_architecture(self) -> None:
        """Discard what was read from the model's files, since the model may have been downloaded in the
        meantime. The files are read again when they are next needed.
        """
        self._architecture = None
        self._trainable = None
        self._compared = ()

    def comparison(self, device: Device) -> dict[Precision, Estimate] | UserError:
        """Return the estimates of the recipe's memory on ``device``, by precision, or the UserError that says
        why there are none.

        The estimates are cached until the recipe changes, since both the recipe strip and the screen request
        them.
        """
        return self._comparison_of(self.recipe, device)

    def _comparison_of(self, recipe: Recipe, device: Device) -> dict[Precision, Estimate] | UserError:
        # ``recipe`` is an argument, because the user may change ``self.recipe`` while a thread runs this.
        architecture, known = self._architecture_of(recipe.model.id), self._compared
        for of_architecture, of_recipe, of_device, compared in known:
            if of_architecture is architecture and (of_recipe, of_device) == (recipe, device):
                return compared
        compared = _compare(recipe, architecture, device)
        # Cached for two devices: the device that a run here would use, and the device that the user plans
        # for.
        self._compared = ((architecture, recipe, device, compared), *known[:1])
        return compared

    def estimate(self, device: Device) -> Estimate | None:
        """Return the estimate of the recipe's memory on ``device``; None if there is nothing to estimate."""
        return self._estimate_of(self.recipe, device)

    def _estimate_of(self, recipe: Recipe, device: Device) -> Estimate | None:
        from qlora_tui.memory.estimate import precision_of

        compared = self._comparison_of(recipe, device)
        return None if isinstance(compared, UserError) else compared[precision_of(recipe)]

    def verdict(self, budget: MemoryBudget) -> Verdict | None:
        """Return the verdict on whether the recipe fits the memory in ``budget``; None if nothing can be
        estimated. The verdict's ``used_bytes`` is 0 (unknown) until :meth:`plan_use` has returned for this
        recipe and budget.
        """
        from qlora_tui.memory import check_fit

        recipe = self.recipe
        estimated = self._estimate_of(recipe, budget.device)
        if estimated is None:
            return None
        used = self._used_bytes(recipe, estimated, budget)
        return replace(check_fit(estimated, budget.bytes), used_bytes=used)

    def plan_use(self, budget: MemoryBudget) -> None:
        """Calculate how much of the memory in ``budget`` a run of the recipe will use. Do nothing if the
        result is known, or if the recipe cannot be estimated. The calculation makes dozens of estimates, so
        call this method in a thread.
        """
        from qlora_tui.memory import choose_step

        # The user may edit the recipe meanwhile.
        recipe = self.recipe
        architecture = self._architecture_of(recipe.model.id)
        estimated = self._estimate_of(recipe, budget.device)
        if estimated is None or isinstance(architecture, UserError):
            return
        if not self._used_bytes(recipe, estimated, budget):
            choice = choose_step(recipe, architecture, budget.bytes, device=budget.device)
            of = recipe, estimated, budget.bytes
            self._used = ((of, choice.estimate.process_bytes), *self._used[:1])

    def _used_bytes(self, recipe: Recipe, estimated: Estimate, budget: MemoryBudget) -> int:
        """Return the bytes that a run with this recipe, estimate and budget will use; 0 if unknown."""
        return next((used for of, used in self._used if of == (recipe, estimated, budget.bytes)), 0)

    def _change_to(self, state: _EditState) -> None:
        """Make ``state`` the current state. Undo restores the previous state."""
        self._undo = [*self._undo, self._now][-_UNDO_STEPS:]
        self._redo.clear()
        self._now = state


def _compare(
    recipe: Recipe, architecture: Architecture | UserError, device: Device
) -> dict[Precision, Estimate] | UserError:
    from qlora_tui.memory import compare

    if isinstance(architecture, UserError):
        return architecture
    try:
        return compare(recipe, architecture, device=device)
    except UserError as problem:
        return problem


def undo_recipe(app: QloraApp) -> None:
    """Undo the last change to the recipe. If there is nothing to undo, notify the user."""
    nothing = "Nothing to undo: the recipe was not changed."
    _move(app, app.workbench.undo, "Undone", nothing, f"Press {key_name('app.redo')} to redo.")


def redo_recipe(app: QloraApp) -> None:
    """Redo the change that was undone last. If there is nothing to redo, notify the user."""
    nothing = "Nothing to redo: no change was undone."
    _move(app, app.workbench.redo, "Redone", nothing, f"Press {key_name('app.undo')} to undo.")


def open_preset(app: QloraApp, name: str) -> bool:
    """Open a preset, tell the user how many settings changed, and return True.

    If the preset cannot be opened, show the error and return False.
    """
    before = app.workbench.recipe
    if not app.try_or_show_error(lambda: app.workbench.open_preset(name)):
        return False
    app.recipe_edited()
    changes = _changes(before, app.workbench.recipe)
    app.notify(f"Opened {app.workbench.preset}: {changes}. Press {key_name('app.undo')} to undo.")
    return True


def _move(app: QloraApp, move: Callable[[], bool], done: str, nothing: str, reverse: str) -> None:
    workbench = app.workbench
    before, preset = workbench.recipe, workbench.preset
    if not move():
        app.notify(nothing)
        return
    app.recipe_edited()
    # A single changed setting is usually visible on the current screen. Undoing a preset changes many
    # settings, most of them on other screens, so the user is notified.
    if workbench.preset != preset:
        now = (
            f"the preset is {workbench.preset} again"
            if workbench.preset
            else "the recipe has no preset, as before"
        )
        app.notify(f"{done}: {now}, {_changes(before, workbench.recipe)}. {reverse}")


def _changes(before: Recipe, after: Recipe) -> str:
    from qlora_tui.recipe.fields import DESCRIPTIVE

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


_OWN = (
    *("name", "model.id", "model.revision", "lora.init_from"),
    *("data.sources", "data.validation_path"),
)
"""Settings that belong to a single run. Presets do not contain them."""


def _with_own(recipe: Recipe, source: Recipe) -> Recipe:
    return replace_settings(recipe, {path: get_setting(source, path) for path in _OWN})
