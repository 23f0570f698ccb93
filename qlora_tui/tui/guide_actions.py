"""The commands of the guide through the first steps: to the next one, and hide or show its lines."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from qlora_tui.tui.first_steps import STEP_MODES, hide_guide, is_guide_hidden, read_first_steps
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.widgets.guide import Guide

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp


async def go_to_next_step(app: QloraApp) -> None:
    """Show the screen of the step after this screen's; from the last, of the first that is not done."""
    steps = await asyncio.to_thread(read_first_steps, app.workbench, app.memory_budget)
    mode = STEP_MODES[steps.after(app.current_mode)]
    if mode == app.current_mode:
        app.notify(
            f"Every step before the launch is done. Press {key_name('train.launch')} to start the run."
        )
    await app.action_go(mode)


def toggle_guide(app: QloraApp) -> None:
    """Hide the guide, or show it again, now and at later starts."""
    if not app.system_status.has_no_runs:
        app.notify("The guide ended with the first run. Home shows what to do next.")
        return
    hide_guide(hidden=not is_guide_hidden())
    for guide in app.screen.query(Guide):
        guide.show_or_hide()
    key, next_key = key_name("app.guide"), key_name("app.next_step")
    if is_guide_hidden():
        app.notify(f"Guide hidden. Press {key} to show it again.")
    else:
        app.notify(
            f"The guide is on each screen from Model to Train. Press {next_key} to go to the next step."
        )
