"""The app class: screens, the recipe being edited, and the system status, polled once a second."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from importlib import import_module
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar

from textual import work
from textual.actions import ActionParseResult, SkipAction
from textual.binding import BindingType
from textual.dom import DOMNode
from textual.events import Resize
from textual.signal import Signal
from textual.worker import WorkerFailed

from qlora_tui.errors import UserError
from qlora_tui.formatting import GIB, format_sizes
from qlora_tui.remote.calls import UNREACHABLE, current
from qlora_tui.settings import Settings
from qlora_tui.tui import desktop
from qlora_tui.tui.breakpoints import TALL_CELLS, VERY_WIDE_CELLS, WIDE_CELLS, is_too_small
from qlora_tui.tui.command_palette import CommandProvider, Palette
from qlora_tui.tui.commands import EVERYWHERE, NUMBERED_SCREENS
from qlora_tui.tui.key_names import key_names
from qlora_tui.tui.process import AppThreads, DiskFaults, install_shutdown_handlers
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.themed_app import ThemedApp
from qlora_tui.tui.threads import run_stoppable

if TYPE_CHECKING:
    from qlora_tui.memory.budget import MemoryBudget
    from qlora_tui.recipe.schema import Recipe
    from qlora_tui.runs.directory import RunDir
    from qlora_tui.tui.draft import Draft
    from qlora_tui.tui.system_monitor import BoxMonitor, SystemMonitor
    from qlora_tui.tui.workbench import Workbench

# The first frame shows neither a recipe nor a modal, so the modules for recipes and modals are imported where
# they are first used.

SYSTEM_POLL_INTERVAL_S = 1.0
_SETTLE_S = 0.3
_PLAN_SETTLE_S = 0.1
"""Seconds from the last change of the recipe to the calculation of the memory that its run will use."""
_LONG_NOTICE_S = 10.0
"""Time that warnings, errors and late replies from another machine stay on the screen, in seconds."""
_TELL_AGAIN_S = 20.0
"""Minimum number of seconds between two notifications that the machine given with ``--host`` does not
respond.
"""


def _make_screen(mode: str) -> WorkScreen:
    """Return a new instance of the numbered screen with the name ``mode``, after importing its class."""
    module = import_module(f"qlora_tui.tui.screens.{mode}.screen")
    screen: WorkScreen = getattr(module, f"{mode.title()}Screen")()
    return screen


class QloraApp(ThemedApp):
    """The app: its screens, the recipe being edited, and the state that all screens share."""

    TITLE = "qlora-tui"
    CSS_PATH = "app.tcss"
    MODES: ClassVar[dict[str, Any]] = {
        entry.name: partial(_make_screen, entry.name) for entry in NUMBERED_SCREENS
    }
    DEFAULT_MODE = "home"
    COMMANDS: ClassVar[set[Any]] = {CommandProvider}
    BINDINGS: ClassVar[list[BindingType]] = [command.binding() for command in EVERYWHERE]
    # Not a ClassVar: Textual declares it as an attribute of the instance.
    HORIZONTAL_BREAKPOINTS = [  # noqa: RUF012
        (0, "-narrow"),
        (WIDE_CELLS, "-wide"),
        (VERY_WIDE_CELLS, "-very-wide"),
    ]
    VERTICAL_BREAKPOINTS = [(0, "-short"), (TALL_CELLS, "-tall")]  # noqa: RUF012

    def __init__(self, settings: Settings | None = None, *, watched_run: RunDir | None = None) -> None:
        super().__init__(settings or Settings())
        self._watched_run = watched_run
        self.system_status = SystemStatus()
        self.recipe_changed: Signal[Recipe] = Signal(self, "recipe changed")
        self.system_status_changed: Signal[SystemStatus] = Signal(self, "system status changed")
        self._monitor: BoxMonitor | SystemMonitor | None = None
        self.disk_faults = DiskFaults()
        self.deleted_runs: list[str] = []
        """Ids of the runs that the user has deleted since the app started, in order of deletion. Restored
        runs are removed from the list.
        """
        self.counts = 0
        """How many times an attempt to count the recipe's samples has ended with a new count or an error.
        When this number increases, screens replace their estimates of the number of samples with the exact
        number, if it is known.
        """
        self.count_problem: UserError | None = None
        """Why the samples of the recipe's data could not be counted; None if they could, or before the first
        count.
        """
        self._counting: object = None
        self.farewell: list[str] = []
        """Lines to print to the terminal after the app has exited."""
        self._told_unreachable_at = -_TELL_AGAIN_S
        self._polling = False
        self._is_small = False
        self._has_quit = False

    @cached_property
    def workbench(self) -> Workbench:
        """The recipe being edited and its undo history, restored from the draft file on first use."""
        from qlora_tui.tui.draft import open_workbench

        workbench = open_workbench(self.draft)
        workbench.on_outline = partial(self.call_later, self._describe_model)  # the caller may be in a thread
        for problem in (workbench.draft_error, workbench.preset_error):
            if problem is not None:
                self.call_later(partial(self.notify, str(problem), severity="warning"))
        return workbench

    @cached_property
    def draft(self) -> Draft:
        """The draft file, which stores the recipe being edited between sessions."""
        from qlora_tui.tui.draft import Draft

        return Draft()

    @work(exclusive=True, group="describe")
    async def _describe_model(self, model: str) -> None:
        """Read the exact architecture of the model with the id ``model`` in a separate process, then refresh
        everything that depends on the architecture.
        """
        from qlora_tui.catalog.local_models import describe_model

        problem, tell = None, self.watch_verdict()
        try:
            await run_stoppable(describe_model, model)
        except UserError as error:
            problem = error
        if self.workbench.recipe.model.id != model:
            return
        self.workbench.forget_architecture()
        if problem is not None:
            self.workbench.refuse_outline(model, problem)
        self.recipe_changed.publish(self.workbench.recipe)
        tell("The model's structure was read")

    def watch_verdict(self) -> Callable[[str], None]:
        """Record whether the recipe fits in memory (the verdict), and return a function to call when the
        estimate may have changed.

        The function takes the reason for the change. If the new verdict differs from the recorded one, the
        function notifies the user of the reason and of both verdicts. If the recipe or the available memory
        is no longer the same, the function does nothing.
        """
        recipe, budget = self.workbench.recipe, self.memory_budget
        before = self.workbench.verdict(budget)

        def tell(why: str) -> None:
            if before is None or (recipe, budget.bytes) != (self.workbench.recipe, self.memory_budget.bytes):
                return
            now = self.workbench.verdict(self.memory_budget)
            if now is not None and now.word != before.word:
                figures = format_sizes(now.needed_bytes, "of", now.available_bytes)
                self.notify(f"{why}: {figures}, {now.word}. Previous estimate: {before.word}.")

        return tell

    def count_samples(self) -> None:
        """Count the samples in the recipe's data in a separate process, then refresh everything that depends
        on the count. Do nothing if the recipe has no model or no data, or if the model, the data and the
        seed of the split are the same as in the last count.
        """
        from qlora_tui.data.sources import every_source, source_stamps

        recipe = self.workbench.recipe
        stamps = [source_stamps(source) for source in every_source(recipe.data)]
        wanted = (recipe.data, recipe.model, recipe.split_seed, stamps)
        if wanted != self._counting and recipe.has_model_and_data:
            self._counting, self.count_problem = wanted, None
            self._count_samples(recipe)

    @work(exclusive=True, group="count")
    async def _count_samples(self, recipe: Recipe) -> None:
        from qlora_tui.runs.expected_time import count_data

        try:
            # While a key is held down, the recipe changes many times. Only its last state is counted.
            await asyncio.sleep(_SETTLE_S)
            is_news = await run_stoppable(count_data, recipe)
        except UserError as problem:
            self.count_problem, is_news = problem, True
        if is_news:
            self.counts += 1
            self.recipe_changed.publish(self.workbench.recipe)

    def recall_trace(self) -> bool:
        """Load the stored traces of the recipe's training step, one for each device that estimates are shown
        for. Return True if any of them was not already in use. Reads files, so call it in a thread.
        """
        from qlora_tui.runs.exact_memory import recall_trace

        recipe, architecture = self.workbench.recipe, self.workbench.architecture()
        if isinstance(architecture, UserError):
            return False
        devices = {budget.device for budget in (self.memory_budget, self.run_budget)}
        found = [recall_trace(recipe, architecture, device) for device in devices]
        return any(found)

    @work(exclusive=True, group="recall")
    async def show_exact_memory(self) -> None:
        """If a trace of the recipe's training step is stored, show the exact memory on every screen. Then
        calculate and show the memory that a run will use, unless it is known.
        """
        if await asyncio.to_thread(self.recall_trace):
            self.recipe_changed.publish(self.workbench.recipe)
        verdict = self.workbench.verdict(self.memory_budget)
        if verdict is not None and not verdict.used_bytes:
            await asyncio.sleep(_PLAN_SETTLE_S)
            await asyncio.to_thread(self.workbench.plan_use, self.memory_budget)
            self.recipe_changed.publish(self.workbench.recipe)

    @property
    def memory_budget(self) -> MemoryBudget:
        """The device that estimates are for, and its memory. If the user's settings have a GPU size, this is
        a GPU of that size; otherwise, it is this machine's GPU or CPU.
        """
        from qlora_tui.memory.budget import budget_for

        given = self.settings.gpu_memory_gib
        return budget_for(self.system_status.gpu, None if given is None else round(given * GIB))

    @property
    def run_budget(self) -> MemoryBudget:
        """The device that a run on this machine would use, and its memory, regardless of the GPU size in the
        user's settings.

        If the driver reports nothing about the GPU that a run would use, this equals :attr:`memory_budget`.
        """
        from qlora_tui.memory.budget import budget_for

        status = self.system_status
        is_reported = status.gpu is not None or status.trains_on == "cpu"
        return budget_for(status.gpu) if is_reported else self.memory_budget

    async def action_quit(self) -> None:
        """Exit at once. Nothing is lost: runs and exports continue, and the app prints how to return to
        them.
        """
        screen = self.screen_stack[0]
        watched = screen.watched_run if isinstance(screen, WorkScreen) else None
        self.farewell = self.system_status.continues_without_app(watched)
        self._has_quit = True
        self.exit()

    def on_load(self) -> None:
        self.show_first_theme()
        self.set_keymap(self.settings.keymap)

    def on_mount(self) -> None:
        self._report_settings()
        self.write_escape(desktop.PUSH_TITLE)
        if not self.is_headless:
            install_shutdown_handlers(lambda exit_code: self.exit(return_code=exit_code))
            asyncio.get_running_loop().set_default_executor(AppThreads())
        if self._watched_run is not None:
            self.call_after_refresh(self._watch, self._watched_run)
        self.set_interval(SYSTEM_POLL_INTERVAL_S, self._start_polling)
        self.call_after_refresh(self._start_polling)

    async def _watch(self, run: RunDir) -> None:
        from qlora_tui.tui.screens.train.screen import show_run

        await show_run(self, run)

    def on_unmount(self) -> None:
        self.write_escape(desktop.POP_TITLE)

    @work
    async def _report_settings(self) -> None:
        """Report errors in the settings and themes as soon as the first screen can show notifications."""
        await self.shown.wait()
        problems = self.theme_problems
        if self.settings.keymap:
            from qlora_tui.tui.key_names import validate_keymap

            problems += validate_keymap(self.settings.keymap)
        for problem in problems:
            self.notify(problem, severity="warning")

    def apply_settings(self, settings: Settings) -> None:
        """Apply settings that were changed while the app is running."""
        before, self.settings = self.settings, settings
        self.show_wanted_theme()
        if settings.gpu_memory_gib != before.gpu_memory_gib:
            self.recipe_changed.publish(self.workbench.recipe)

    def edit(self, path: str, value: Any) -> bool:
        """Change a setting of the recipe and return True if its value changed.

        If the value is not allowed, show the error and return False.
        """
        try:
            changed = self.workbench.set(path, value)
        except UserError as problem:
            self.show_error(problem)
            return False
        if changed:
            self.recipe_edited()
        return changed

    def load_recipe(self, recipe: Recipe) -> bool:
        """Replace the recipe being edited and return True; return False if ``recipe`` is the same.

        The model's files are read again, because the model may have been downloaded in the meantime.
        """
        changed = self.workbench.replace(recipe)
        if changed:
            self.workbench.forget_architecture()
            self.recipe_edited()
        return changed

    def recipe_edited(self) -> None:
        """Save the workbench's recipe and refresh the screens after a change."""
        from qlora_tui.tui.draft import save_or_ask

        try:
            save_or_ask(self)
        except OSError as error:
            # The edit stays in memory, and is saved with the first edit after the disk is writable again.
            if not self.disk_faults.notify(self, error):
                raise
        self.recipe_changed.publish(self.workbench.recipe)

    def action_command_palette(self) -> None:
        """Open the command palette, unless it is open."""
        if self.use_command_palette and not isinstance(self.screen, Palette):
            self.push_screen(Palette())

    def copy_to_clipboard(self, text: str) -> None:
        """Copy ``text`` to the clipboard in every available way, and notify the user which ways were used."""
        self.remember_copied(text)
        self._copy(text)

    @work(group="copy")
    async def _copy(self, text: str) -> None:
        await desktop.copy(self, text)

    def notify(self, message: str, *, markup: bool = False, **how: Any) -> None:
        """Show a notification as plain text, since names of runs and files may contain brackets.

        The notification replaces earlier ones except warnings and errors, which stay for their full time:
        ``_LONG_NOTICE_S``, unless ``timeout`` is given.
        """
        self.dismiss_information()
        if how.get("severity", "information") != "information":
            how.setdefault("timeout", _LONG_NOTICE_S)
        super().notify(message, markup=False, **how)

    def action_dismiss_notifications(self) -> None:
        self.clear_notifications()

    def show_error(self, problem: UserError) -> None:
        """Show an error in a modal."""
        from qlora_tui.tui.screens.modals.dialogs import ErrorScreen

        self.push_screen(ErrorScreen(problem))

    def notify_error(self, problem: UserError) -> None:
        """Show an error as a notification, which does not interrupt what the user is doing."""
        self.notify(f"{problem.what} {problem.fix}", title=problem.title, severity="error")

    def try_or_show_error(self, act: Callable[[], object]) -> bool:
        """Call ``act`` and return True. If it raises UserError, show the error in a modal and return
        False.
        """
        try:
            act()
        except UserError as problem:
            self.show_error(problem)
            return False
        return True

    def on_resize(self, event: Resize) -> None:
        """Cover the screen with a message when the window has become too small for the app."""
        was_small, self._is_small = self._is_small, is_too_small(event.size)
        if self._is_small and not was_small:
            from qlora_tui.tui.screens.modals.dialogs import TooSmallScreen

            self.call_after_refresh(self.push_screen, TooSmallScreen())

    async def run_action(
        self,
        action: str | ActionParseResult,
        default_namespace: DOMNode | None = None,
        namespaces: Mapping[str, DOMNode] | None = None,
    ) -> bool:
        """Run an action. If it raises UserError, show the error in a modal and return True. Keys that were
        pressed after the app has quit, and arrive together with that key, have no effect.
        """
        if self._has_quit:
            return True
        try:
            return await super().run_action(action, default_namespace, namespaces)
        except UserError as problem:
            self.show_error(problem)
            return True

    def intercept_error(self, error: Exception) -> bool:
        """Handle a worker's UserError or SkipAction, or a disk error, and return True; otherwise return
        False.
        """
        cause = error.error if isinstance(error, WorkerFailed) else None
        if isinstance(cause, UserError) and cause.code == UNREACHABLE:
            # A background read that fails is repeated every second, so notify the user only occasionally.
            # The top line always shows the problem.
            if monotonic() - self._told_unreachable_at > _TELL_AGAIN_S:
                self._told_unreachable_at = monotonic()
                self.notify_error(cause)
        elif isinstance(cause, UserError):
            self.show_error(cause)
        if isinstance(cause, UserError | SkipAction):
            return True
        return self.disk_faults.handle(self, error)

    async def action_go(self, mode: str) -> None:
        """Switch to the numbered screen with the name ``mode``."""
        if mode != self.current_mode:
            await self.switch_mode(mode)

    def action_help(self) -> None:
        from qlora_tui.tui.screens.modals.help import screen_help

        here = self.screen
        if isinstance(here, WorkScreen):
            self.push_screen(screen_help(self, here.MODE, here.help_state))

    def action_keys(self) -> None:
        from qlora_tui.tui.screens.modals.help import all_keys_screen

        self.push_screen(all_keys_screen())

    def action_help_quit(self) -> None:
        """Tell the user which key quits the app, since Ctrl+C does not."""
        self.notify(f"Press {key_names('app.quit')} to quit the app. Runs continue without it.")

    def action_presets(self) -> None:
        from qlora_tui.tui.screens.presets.screen import PresetsScreen

        self.push_screen(PresetsScreen())

    def action_settings(self) -> None:
        from qlora_tui.tui.screens.settings.screen import SettingsScreen

        self.push_screen(SettingsScreen())

    def action_assume_gpu(self) -> None:
        from qlora_tui.tui.screens.modals.dialogs import ask_gpu_size

        ask_gpu_size(self)

    def action_check_machine(self) -> None:
        from qlora_tui.tui.screens.modals.dialogs import MachineReportScreen

        self.push_screen(MachineReportScreen())

    async def action_simulate_key(self, key: str) -> None:
        """Press ``key`` after the user has clicked its name."""
        # The app sends the key, after the click is handled. A key sent by the clicked panel would skip the
        # panel's own bindings.
        self.call_later(self.simulate_key, key)

    def action_undo(self) -> None:
        from qlora_tui.tui.workbench import undo_recipe

        undo_recipe(self)

    def action_reload(self) -> None:
        from qlora_tui.tui.draft import reload_recipe

        reload_recipe(self)

    def action_redo(self) -> None:
        from qlora_tui.tui.workbench import redo_recipe

        redo_recipe(self)

    def _start_polling(self) -> None:
        # Poll in a worker, so that a slow GPU driver does not delay key presses.
        if not self._polling:
            self._polling = True
            self._poll()

    @work(group="poll")
    async def _poll(self) -> None:
        try:
            await self.shown.wait()
            system_status = await asyncio.to_thread(self._poll_in_thread)
        finally:
            self._polling = False
        from qlora_tui.tui.draft import tell_of_change

        tell_of_change(self)
        for news in system_status.ended_runs:
            desktop.notify_run_ended(self, news)
        for problem in self.reload_themes():
            self.notify(problem, severity="warning")
        if self.has_class("-away") and not system_status.box_silent_s:
            # The other machine responds again, so its model files can be read.
            self.workbench.forget_architecture()
            self.recipe_changed.publish(self.workbench.recipe)
        self.set_class(system_status.box_silent_s > 0, "-away")
        link = current()
        while link is not None and link.late_replies:
            self.notify(link.late_replies.popleft(), title=link.box.name, timeout=_LONG_NOTICE_S)
        gpu_changed = system_status.gpu != self.system_status.gpu
        self.system_status = system_status
        self.system_status_changed.publish(system_status)
        if gpu_changed:
            self.recipe_changed.publish(self.workbench.recipe)

    def _poll_in_thread(self) -> SystemStatus:
        # Imported here, so that the first frame, which is shown before the first poll, does not wait for
        # these modules.
        from qlora_tui.tui.system_monitor import BoxMonitor, SystemMonitor

        link = current()
        if self._monitor is None and link is not None:
            self._monitor = BoxMonitor(link)
        elif self._monitor is None:
            from qlora_tui.runs import actions

            actions.empty_trash(actions.KEPT_S)
            self._monitor = SystemMonitor()
        return self._monitor.poll_and_recover()
