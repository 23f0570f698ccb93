"""The launch half of the Train screen: the recipe as a form, and its checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.app import ComposeResult
from textual.containers import Container, VerticalScroll
from textual.content import Content
from textual.widgets import Static

from qlora_tui.formatting import abbreviate_home
from qlora_tui.recipe.conflicts import require_runnable
from qlora_tui.recipe.fields import fields
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions as run_actions
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.machine_checks import Check, CheckKind, Outcome
from qlora_tui.runs.preflight import errors
from qlora_tui.runs.suggested_fix import SuggestedFix
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.modals.confirm import ConfirmScreen
from qlora_tui.tui.screens.train.settings_form import SettingsForm
from qlora_tui.tui.widgets.panel import Panel
from qlora_tui.tui.widgets.static_update import update_if_changed

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

_NOT_IN_FORM = frozenset(("data.sources", "note"))
"""Sources are chosen on the Data screen, which shows what is in them; notes where a preset is saved."""
_HEAD = 19
"""Cells of a check's sign, word and name."""
SIGNS: dict[Outcome, tuple[str, str]] = {
    "ok": ("✓ ok", "$success"),
    "note": ("· note", "$accent"),
    "warning": ("! warning", "$warning"),
    "error": ("✗ error", "$error"),
}


def _paths() -> list[str]:
    """The name, then training: that is what is decided here."""
    order = {"": 0, "training": 1, "data": 2, "lora": 3, "quantization": 4, "model": 5}
    known = [field for field in fields().values() if field.path not in _NOT_IN_FORM]
    known.sort(key=lambda field: order.get(field.section, len(order)))
    return [field.path for field in known]


class LaunchPane(Container):
    """A form at the left or on top, the checks beside or under it."""

    def __init__(self) -> None:
        super().__init__(id="launch")

    def compose(self) -> ComposeResult:
        yield Panel("Recipe", SettingsForm(_paths(), id="recipe-form"), id="recipe-panel")
        with Panel("Checks", id="checks-panel"), VerticalScroll(id="checks-side", can_focus=False):
            yield CheckList()

    def show_recipe(self, recipe: Recipe, base: Recipe) -> None:
        """The recipe as it is now, beside its preset."""
        self.query_one(SettingsForm).show(recipe, base)

    def show_checks(self, checks: tuple[Check, ...]) -> None:
        """The results of the checks, and whether the run can start."""
        self.query_one(CheckList).show(checks)


class CheckList(Static):
    """Whether the run can start; then the checks, what is wrong first, each with its fix."""

    def __init__(self) -> None:
        super().__init__("Checking what the run needs…", id="checks")
        self._checks: tuple[Check, ...] = ()

    def show(self, checks: tuple[Check, ...]) -> None:
        """Show these, wrapped beside their names."""
        self._checks = checks
        if self.size.width:
            update_if_changed(self, Content("\n").join([_conclusion(checks), *self._lines(self.size.width)]))

    def on_resize(self) -> None:
        """Wrap the lines for the new width."""
        if self._checks:
            self.show(self._checks)

    def _lines(self, width: int) -> list[Content]:
        lines: list[Content] = []
        width_left = max(20, width - _HEAD)
        offered = first_fix(self._checks)
        for check in worst_first(self._checks):
            sign, style = SIGNS[check.outcome]
            head = Content.assemble((f"{sign:<10}", style), (f"{check.label:<9}", "bold"))
            if offered is not None and check.suggested_fix is offered:
                fix = f" ▸ {key_name('train.fix')} {offered.label}"
            else:
                fix = f" ▸ {abbreviate_home(check.fix)}" if check.fix else ""
            wrapped = Content.assemble(abbreviate_home(check.text), (fix, "$accent")).wrap(width_left)
            lines += [head + wrapped[0], *(Content(" " * _HEAD) + piece for piece in wrapped[1:])]
        return lines


def worst_first(checks: tuple[Check, ...]) -> list[Check]:
    """The checks in the order in which they are shown."""
    return sorted(checks, key=lambda check: list(SIGNS).index(check.outcome), reverse=True)


def first_fix(checks: tuple[Check, ...]) -> SuggestedFix | None:
    """The fix that one key applies: that of the first check shown that has one."""
    return next((check.suggested_fix for check in worst_first(checks) if check.suggested_fix), None)


def _conclusion(checks: tuple[Check, ...]) -> Content:
    wrong = errors(checks)
    if wrong:
        names = ", ".join(dict.fromkeys(check.label for check in wrong))
        return Content.styled(
            f"Not ready: {names}. Press {key_name('train.recheck')} to check again.", "bold $error"
        )
    waits = any(check.kind is CheckKind.QUEUE and check.outcome == "note" for check in checks)
    return Content.styled(
        f"Ready. Press {key_name('train.launch')} to {'queue' if waits else 'launch'} it.", "bold $success"
    )


async def launch(app: QloraApp, checks: tuple[Check, ...]) -> RunDir | None:
    """Queue the workbench's recipe after confirming failed checks. Returns None if the user declines.

    Raises UserError if it could not run at all.
    """
    recipe = app.workbench.recipe
    require_runnable(recipe)
    for check in checks:
        if check.problem is not None:
            raise check.problem
    failed = "\n".join(f"{check.label}: {check.text}" for check in errors(checks))
    if failed and not await app.push_screen_wait(ConfirmScreen("Launch anyway?", failed, "Launch")):
        return None
    return run_actions.submit(recipe)
