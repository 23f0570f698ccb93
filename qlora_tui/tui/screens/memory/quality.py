"""The key of the Memory screen that measures what quantization changes in the base's predictions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from threading import Event
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from qlora_tui.memory.quality import Quality, describe_quality, measure_in_child
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.widgets.controls import ViScroll
from qlora_tui.worker import JobStopped, Progress


class QualityScreen(ModalScreen[bool]):
    """The result of a measurement, in sentences. Returns whether to leave the worst layers in 16 bits."""

    CSS_PATH = "../modals/modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("k", "dismiss(True)", "Keep these layers in 16 bits"),
        Binding("escape,q", "dismiss(False)", "Close"),
    ]

    def __init__(self, quality: Quality) -> None:
        super().__init__()
        self._sentences = describe_quality(quality)

    def compose(self) -> ComposeResult:
        with ViScroll(classes="dialog") as dialog:
            dialog.border_title = "What quantization changes"
            dialog.border_subtitle = dialog_keys(self.BINDINGS)
            yield Static(Content("\n\n".join(self._sentences)))

    def on_mount(self) -> None:
        self.query_one(ViScroll).focus()


class QualityMeasurement:
    """A measurement that runs in a child, at most one at a time."""

    def __init__(self, show: Callable[[], None]) -> None:
        """``show``: called in the app's thread when :attr:`progress` has changed."""
        self._show = show
        self._stop: Event | None = None
        self.progress = ""
        """How far it is; empty while there is none."""

    def stop(self) -> bool:
        """Stop the measurement. Return whether there was one."""
        if self._stop is None:
            return False
        self._stop.set()
        return True

    async def measure(self, recipe: Recipe) -> Quality | None:
        """Return the quality of the recipe's quantization; None if it was stopped. Raises UserError."""
        self._stop = stop = Event()
        loop = asyncio.get_running_loop()

        def on_progress(progress: Progress) -> None:
            share = f" {progress.done / progress.total:.0%}" if progress.total else ""
            loop.call_soon_threadsafe(self._set_progress, f"quality: {progress.text}{share}")

        self._set_progress("quality: starting")
        try:
            return await asyncio.to_thread(
                measure_in_child, recipe, on_progress=on_progress, should_stop=stop.is_set
            )
        except JobStopped:
            return None
        finally:
            # Leaving the app cancels this worker, but not its thread, for whose end the app would wait.
            stop.set()
            self._stop = None
            self._set_progress("")

    def _set_progress(self, text: str) -> None:
        if self._stop is not None or not text:
            self.progress = text
            self._show()
