"""Base classes of all screens. A screen has a top bar, a recipe strip if it edits the recipe, a body, and a
footer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast

from textual import on
from textual.app import ComposeResult
from textual.events import ScreenResume
from textual.geometry import Region, Size
from textual.messages import Prune
from textual.screen import ModalScreen, Screen
from textual.strip import Strip
from textual.widget import Widget

from qlora_tui.errors import UserError
from qlora_tui.tui import process
from qlora_tui.tui.breakpoints import AIRY_CELLS, ROOMY_CELLS, WIDE_CELLS
from qlora_tui.tui.commands import Command, screen_commands
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.line_filters import dimmed
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.textual_compat import add_size_classes
from qlora_tui.tui.widgets import column  # noqa: F401  # the style sheets name its layout
from qlora_tui.tui.widgets.bars import CommandFooter, TopBar

if TYPE_CHECKING:
    from qlora_tui.recipe.schema import Recipe
    from qlora_tui.runs.directory import RunDir
    from qlora_tui.tui.app import QloraApp
    from qlora_tui.tui.widgets.recipe_strip import RecipeStrip

Answer = TypeVar("Answer")
_FREEZE_AFTER_S = 4.0
"""Seconds from the first display of a screen until its objects are exempted from garbage collection. By then,
the long-lived objects of the screen exist.
"""


class CancelsWorkersFirst(Widget):
    """A widget that cancels its workers, and the workers of its descendants, before any of these widgets is
    removed.

    Textual cancels workers only after it has removed the widgets. A worker that finishes while the app quits
    would then query a widget that no longer exists.
    """

    async def on_prune(self, event: Prune) -> None:
        for worker in list(self.workers):
            if self in worker.node.ancestors_with_self:
                worker.cancel()


class DimsScreenBehind(Widget):
    """Mixin for a dialog that dims the screen behind it. With enough colors, a translucent background dims
    that screen (``app.tcss``). Otherwise, this mixin draws the text of that screen dim, except the mark of
    the current screen in the top line, and leaves a blank column at each side of the dialog, so that no cut
    words touch its frame.
    """

    def render_lines(self, crop: Region) -> list[Strip]:
        """Return the rendered lines of the screen behind the dialog. The contents of the dialog are drawn by
        its children.
        """
        lines = super().render_lines(crop)
        if self.app.has_class("-surfaces"):
            return lines
        frames = [child.region for child in self.children if child.display]
        return [
            self._quiet(line, y, crop.x, [each for each in frames if each.y <= y < each.bottom])
            for y, line in enumerate(lines, crop.y)
        ]

    def _quiet(self, line: Strip, y: int, left: int, frames: Sequence[Region]) -> Strip:
        line = Strip(dimmed(line, keeps_reverse=y == 0), line.cell_length)
        for frame in frames:
            for x in (frame.x - 1 - left, frame.right - left):
                if 0 <= x < line.cell_length:
                    line = Strip.join([line.crop(0, x), Strip.blank(1), line.crop(x + 1)])
        return line


class Dialog(ModalScreen[Answer], DimsScreenBehind):
    """A framed screen over another screen, which remains visible."""


class OnQloraApp(Widget):
    """Base class of this app's widgets, whose ``app`` is typed as :class:`QloraApp`."""

    @property
    def app(self) -> QloraApp:  # type: ignore[override]  # Textual's property returns App[object]
        """The app, typed as QloraApp."""
        return cast("QloraApp", super().app)

    def ask(self, dialog: ModalScreen[Answer | None], then: Callable[[Answer], object]) -> None:
        """Open a dialog, and call ``then`` with its answer. Do not call ``then`` if the dialog was closed or
        the answer is no.

        The dialog opens at once, so that keys typed ahead reach the dialog. ``then`` may be a coroutine
        function. If ``then`` raises UserError, the error is shown.
        """

        async def on_result(answer: Answer | None) -> None:
            if answer is not None and answer is not False:
                try:
                    outcome = then(answer)
                    if isawaitable(outcome):
                        await outcome
                except UserError as problem:
                    self.app.show_error(problem)

        self.app.push_screen(dialog, on_result)


class WorkScreen(Screen[None], CancelsWorkersFirst, OnQloraApp):
    """Base class of the screens that the user switches between, such as Train. Subclasses define ``MODE`` and
    ``compose_body``.

    Textual calls ``on_mount`` and ``on_screen_resume`` of each class in the hierarchy, and calls those of
    this class last. A subclass must not call them with ``super()``: they would run twice, and subscribe the
    screen twice.
    """

    MODE: ClassVar[str]
    """Name of the screen in ``app.MODES`` and in ``commands.toml``."""
    SCREEN_COMMANDS: ClassVar[tuple[Command, ...]] = ()
    """The commands of this screen, from ``commands.toml``."""
    FOOTER_APP_COMMANDS: ClassVar[frozenset[str]] = frozenset()
    """Ids of the app's commands that the footer includes on this screen."""
    EDITS_RECIPE: ClassVar[bool] = False
    """Whether the screen edits the recipe. If so, the recipe strip is shown below the top bar."""
    STRIP_TELLS: ClassVar[Literal["nothing", "problem", "step"]] = "step"
    """What the recipe strip says if the model cannot be trained: ``nothing``, the ``problem``, or the problem
    and the ``step`` that solves it. Screens that show the problem themselves use ``nothing``.
    """
    IS_DENSE: ClassVar[bool] = False
    """Whether the panels need many rows. If so, they end with an empty row only in a window of at least
    ``ROOMY_CELLS`` rows.
    """
    _strip: RecipeStrip
    _styled_for: object = None
    """The app's style context when the style sheets were last applied to the whole screen."""
    # Textual must not focus the first field: a digit pressed before the screen sets its own focus would be
    # typed into this field.
    AUTO_FOCUS = ""

    def __init_subclass__(cls, **options: Any) -> None:
        if hasattr(cls, "MODE"):
            cls.SCREEN_COMMANDS = screen_commands(cls.MODE)
        cls.BINDINGS = [command.binding() for command in cls.SCREEN_COMMANDS]
        super().__init_subclass__(**options)

    @property
    def help_state(self) -> str:
        """Name of the screen's current state in ``help.toml``, which has a help text for each state; empty
        for the default state.
        """
        return ""

    @property
    def watched_run(self) -> RunDir | None:
        """The run that the screen watches; None if it watches no run."""
        return None

    def command_label(self, command_id: str) -> str | None:
        """Return the label that the footer currently has for a command of this screen; empty for the default
        label, None if the footer leaves the command out.
        """
        return ""

    def has_command(self, action: str) -> bool:
        """Return whether an action, given by its name without parameters, belongs to a command of this
        screen.
        """
        return any(action == command.action.partition("(")[0] for command in self.SCREEN_COMMANDS)

    def compose(self) -> ComposeResult:
        # Set the classes before there are widgets. If they were set later, the style sheets would be applied
        # to all widgets again for each class.
        add_size_classes(self)
        self._set_room(self.app.size)
        yield TopBar(self.MODE)
        if self.EDITS_RECIPE:
            # Imported here, because the recipe strip imports the memory package. Home, which is painted
            # first, has no recipe strip and need not wait.
            from qlora_tui.tui.widgets.recipe_strip import RecipeStrip

            self._strip = RecipeStrip(tells=self.STRIP_TELLS)
            yield self._strip
        yield from self.compose_body()
        yield CommandFooter(self.FOOTER_APP_COMMANDS, self.command_label)

    def compose_body(self) -> Iterable[Widget]:
        """Yield the screen's own widgets, which are between the top bar and the footer."""
        return ()

    def on_mount(self) -> None:
        self.app.recipe_changed.subscribe(self, self._recipe_changed, immediate=True)
        self.app.system_status_changed.subscribe(self, self._system_status_changed, immediate=True)
        self.set_timer(_FREEZE_AFTER_S, process.freeze_objects)
        self._styled_for = self.app.style_context()

    def on_resize(self) -> None:
        self._set_room(self.size)

    def _set_room(self, size: Size) -> None:
        """Set the CSS classes for a window of this size."""
        is_wide, height = size.width >= WIDE_CELLS, size.height
        classes = {
            "-airy": is_wide and height >= AIRY_CELLS,
            "-padded": is_wide and height >= (ROOMY_CELLS if self.IS_DENSE else AIRY_CELLS),
            "-roomy": height >= ROOMY_CELLS,
        }
        self.update_classes(classes, animate=False)

    @on(ScreenResume)
    def _keep_styles(self, event: ScreenResume) -> None:
        """If nothing that the style sheets depend on has changed, keep Textual from applying them to every
        widget again.
        """
        context = self.app.style_context()
        event.refresh_styles = context != self._styled_for
        self._styled_for = context

    def on_screen_resume(self) -> None:
        self.refresh_now()

    def refresh_now(self) -> None:
        """Show the current recipe and system status. Both may have changed while another screen was shown."""
        self._recipe_changed(self.app.workbench.recipe)
        self._system_status_changed(self.app.system_status)

    def action_step_setting(self, path: str, direction: int = 1) -> None:
        """Step the setting at ``path`` to its next value up (``direction`` 1) or down (-1)."""
        from qlora_tui.recipe.fields import fields, get_setting  # Home does not need these
        from qlora_tui.tui.setting_stepper import step_value

        value = get_setting(self.app.workbench.recipe, path)
        self.app.edit(path, step_value(fields()[path], value, direction))

    def notify_undoable(self, text: str) -> None:
        """Notify the user of a change to the recipe. ``text`` is followed by the key that undoes the
        change.
        """
        self.notify(f"{text} Press {key_name('app.undo')} to undo.")

    def show_recipe(self, recipe: Recipe) -> None:
        """Show the recipe. Called when this screen becomes the current screen, and when the recipe
        changes.
        """

    def show_system_status(self, system_status: SystemStatus) -> None:
        """Show the state of GPU and runs. Called about once a second while this is the current screen."""

    def _recipe_changed(self, recipe: Recipe) -> None:
        if self.is_current:
            self._show_recipe_strip()
            self.show_recipe(recipe)

    def _show_recipe_strip(self) -> None:
        if self.EDITS_RECIPE:
            app = self.app
            is_newer = app.draft.is_newer
            app.show_exact_memory()
            self._strip.show_recipe(
                app.workbench, app.memory_budget, app.run_budget, is_changed_elsewhere=is_newer
            )

    def _system_status_changed(self, system_status: SystemStatus) -> None:
        if self.is_current:
            self.query_one(TopBar).show_status(system_status)
            if self.EDITS_RECIPE:
                self._strip.show_running(is_running=system_status.active is not None)
            self.show_system_status(system_status)
