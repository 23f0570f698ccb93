"""The Model screen: models on this machine and on the Hub, and the memory that each would need."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from textual import work
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.events import Key
from textual.widget import Widget
from textual.widgets import Input, OptionList, Static

from qlora_tui.catalog.hub import HubModel, search_models
from qlora_tui.catalog.local_models import LocalModel, describe_models, list_local_models
from qlora_tui.errors import UserError
from qlora_tui.formatting import uncapitalize
from qlora_tui.recipe.schema import Recipe
from qlora_tui.remote.calls import current
from qlora_tui.tui.key_names import highlight_keys, key_hint, key_name, name_keys
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.screens.modals.dialogs import TextPromptScreen
from qlora_tui.tui.screens.modals.file_picker import FilePickerScreen
from qlora_tui.tui.screens.models import downloads
from qlora_tui.tui.screens.models.downloads import DEMO, DownloadsPanel
from qlora_tui.tui.screens.models.model_facts import (
    Facts,
    ModelSide,
    PartsPanel,
    can_be_completed,
    demo_facts,
    fetch_hub_facts,
    hub_facts,
    is_model_folder,
    local_facts,
    need,
    read_license,
    starter_facts,
    storage_words,
)
from qlora_tui.tui.screens.models.model_list import HUB, LOCAL, ListedModels, Starter, list_title, starters
from qlora_tui.tui.threads import run_stoppable
from qlora_tui.tui.ui_state import add_recent, load_ui_state, recent_paths
from qlora_tui.tui.widgets.controls import Panel, TextField, ViList

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

EMPTY = (
    "No models on this machine yet. Press {models.download} to download one of these, or {models.filter} to "
    "search the Hub by name."
)
SEARCH = "name; Enter searches the Hub too"
_FRAME = 5
"""Cells of the list's frame that its title cannot use."""


class ModelsScreen(WorkScreen):
    """The Model screen: a list of models, and the facts about the model under the cursor."""

    MODE = "models"
    CSS_PATH = "models.tcss"
    EDITS_RECIPE = True
    STRIP_TELLS = "problem"

    def __init__(self) -> None:
        super().__init__()
        self._models = ListedModels()
        self._searched: list[Path] = []
        """Folders of the last scan, in addition to the folders that are always scanned."""
        self._storage = ""
        """Size of the models on this machine and the free disk space, in words; empty until they are
        known.
        """

    @property
    def help_state(self) -> str:
        return "empty" if not self._models.local else ""

    def compose_body(self) -> Iterable[Widget]:
        with Horizontal(id="models-parts"):
            with Vertical(id="models-main"):
                with Panel("Models", keys=(("models.rescan", "rescan"),), id="models-panel"):
                    with Horizontal(id="models-filter-line"):
                        yield Static(highlight_keys(name_keys("{models.filter} ")), id="models-filter-label")
                        yield TextField(placeholder=SEARCH, compact=True, id="models-filter")
                    yield Static(highlight_keys(name_keys(EMPTY)), id="models-empty")
                    yield ViList(id="models-list")
                yield DownloadsPanel()
                parts = PartsPanel()
                yield parts
            yield ModelSide(parts)

    def on_mount(self) -> None:
        self.query_one("#models-empty").display = False
        self.query_one(ViList).focus()
        self.action_rescan()

    def show_recipe(self, recipe: Recipe) -> None:
        self._show_list()
        self._show_facts()
        self._estimate_needs()

    def action_rescan(self) -> None:
        """List the models on this machine again, and check again whether the recipe's model can be
        trained.
        """
        self.app.workbench.forget_architecture()
        self._show_recipe_strip()
        self._start_scan()

    def action_filter(self) -> None:
        """Focus the search field."""
        self.query_one(Input).focus()

    def action_open_path(self) -> None:
        """Ask for the folder of a model, a folder that contains such folders, or a GGUF file, and list the
        models in it.
        """
        known = (Path(self.app.workbench.recipe.model.id).parent, *map(Path, self.app.settings.model_folders))
        start = next((folder for folder in known if folder.is_absolute() and folder.is_dir()), None)
        if (link := current()) is not None:
            self._ask_for_path_there(link.box.name)
            return
        picker = FilePickerScreen("Open a model", "models", (".gguf",), start, is_one=is_model_folder)
        self.ask(picker, self._start_scan)

    def _ask_for_path_there(self, box: str) -> None:
        """Ask the user to type a path on the other machine, whose name is ``box``, since the file browser
        cannot list that machine's folders.
        """

        def search(path: str) -> None:
            self._start_scan(Path(path))

        text = f"A model's folder, a folder of such folders, or a GGUF file on {box}: an absolute path."
        self.ask(TextPromptScreen(f"Open a model on {box}", text, "/", _absolute_problem), search)

    def on_resize(self) -> None:
        # The title and the bars have their new width only after the layout. A taller window may also have
        # bars for ranks.
        self.call_after_refresh(self._show_facts)

    def on_input_changed(self) -> None:
        """List only models whose name contains the text typed in the search field."""
        self._show_list()
        self._show_facts()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Search the Hub for the text in the search field, unless the field is empty."""
        self.query_one(ViList).focus()
        if event.value.strip():
            self._search(event.value.strip())

    def on_option_list_option_highlighted(self) -> None:
        """Show the facts of the model under the cursor."""
        self._show_facts()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Put the selected model into the recipe if it is on this machine, or if its details have been
        fetched from the Hub.

        For any other search result, fetch the details or, if the model cannot be trained, show why. For a
        recommended model, search the Hub. For the demo's model, offer to download it.
        """
        match self._models.find(event.option.id):
            case LocalModel() as model:
                self._choose(model)
            case HubModel() as model:
                facts = self._models.hub_facts.get(model.id)
                if (here := self._models.copy_here(model)) is not None:
                    self._choose(here)
                elif model.refusal is not None:
                    self.app.show_error(model.refusal)
                elif facts is not None and facts.architecture is not None:
                    self.app.workbench.forget_architecture()
                    how = f"To train it, press {key_name('models.download')} to download it."
                    self._set_model(model.id, f"{model.id}, for estimates only. {how}")
                else:
                    self._fetch_hub_facts(model.id)
            case Starter(is_demo=True):
                self.action_download()
            case Starter(id=id_):
                self._search(id_)

    def on_key(self, event: Key) -> None:
        """If Down or Escape is pressed in the search field, move the focus to the list."""
        if event.key in ("down", "escape") and self.query_one(Input).has_focus:
            self.query_one(ViList).focus()

    @property
    def selected_hub_model(self) -> str:
        """Hub id of the model under the cursor if the model can be downloaded from the Hub. This applies to
        search results, recommended models except the demo's, and local models with missing files. Empty for
        any other line.
        """
        match self._models.find(self.query_one(ViList).current):
            case LocalModel() as model:
                return model.id if can_be_completed(model) else ""
            case HubModel(id=id_) | Starter(id=id_, is_demo=False):
                return id_
            case _:
                return ""

    def action_download(self) -> None:
        """Download the model under the cursor. If it is the demo's model, ask first."""
        panel = self.query_one(DownloadsPanel)
        if self.selected_hub_model:
            panel.start(self.selected_hub_model)
        else:
            downloads.ask_for_demo(self, "", lambda: panel.start(DEMO))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Return whether an action is available. The download action is available for a search result, a
        recommended model, and a local model that lacks files that the Hub has.
        """
        if action == "download":
            model = self._models.find(self.query_one(ViList).current)
            return bool(self.selected_hub_model) or isinstance(model, Starter)
        return super().check_action(action, parameters)

    def action_cancel(self) -> None:
        """Stop the download that was started last. It can be continued later."""
        self.query_one(DownloadsPanel).stop_newest()

    async def on_downloads_panel_ended(self, event: DownloadsPanel.Ended) -> None:
        """If the download is complete, list its model and move the cursor to it; if the download failed, show
        the error.
        """
        download = event.download
        if download.problem is not None:
            self._models.hub_facts.pop(download.id, None)
            self.app.show_error(download.problem)
        elif download.path is not None:
            self.notify(f"Downloaded {download.name}. Press Enter to select it.")
            self.app.workbench.forget_architecture()
            # Clear the search text, because the name of the model on this machine may not contain it.
            self.query_one(Input).value = ""
            await self._scan(select=download.path)

    def _choose(self, model: LocalModel) -> None:
        if model.refusal is not None and model.architecture is None:
            self.app.show_error(model.refusal)
            return
        if model.refusal is not None:
            # The model's config.json is enough for estimates.
            what_next = f"for estimates only. To train it: {uncapitalize(model.refusal.fix)}"
            self._set_model(model.id, f"{model.name}, {what_next}")
        else:
            what_next = f"Next: {key_name('go.data')} Data, {key_name('go.memory')} Memory."
            self._set_model(model.id, f"{model.name}. {what_next}")

    def _set_model(self, id_: str, words: str) -> None:
        self.app.edit("model.id", id_)
        self.app.edit("model.revision", "main")
        self.notify(f"Model set to {words}")

    @work(exclusive=True, group="scan")
    async def _start_scan(self, choose: Path | None = None) -> None:
        await self._scan(choose=choose)

    async def _scan(self, select: Path | None = None, choose: Path | None = None) -> None:
        folders = [Path(folder) for folder in self.app.settings.model_folders]
        current = self.app.workbench.recipe.model.id
        if current.startswith(("/", "~", ".")):
            folders.append(Path(current))
        if choose is not None:
            folders.append(choose)
        is_first = self._models.local is None
        self._searched = [*folders, *recent_paths("models")]
        local = await self._list_local()
        if is_first and select is None:
            select = next((m.path for m in local if current in (m.id, str(m.path))), None)
        within = [m for m in local if choose is not None and m.path.is_relative_to(choose)]
        self._show_list(LOCAL + str(within[0].path if within else select))
        if choose is not None and not within:
            self.notify("No model was found at this path.", severity="warning")
        elif choose is not None:
            add_recent("models", choose)
            if len(within) == 1:
                self._choose(within[0])
        self._show_facts()
        self._storage = storage_words(local)
        self._estimate_needs()
        self._describe()

    async def _list_local(self) -> list[LocalModel]:
        """List the models on this machine, read the licenses in their model cards, store both, and return the
        models.
        """
        local = await asyncio.to_thread(list_local_models, self._searched)
        known = [model.path for model in local if model.architecture is not None]
        self._models.licenses = await asyncio.to_thread(lambda: {path: read_license(path) for path in known})
        self._models.local = local
        return local

    @work(exclusive=True, group="structure")
    async def _describe(self) -> None:
        """Read the exact structure of each model for which only an outline is known. If any structure was
        read, list the models again.
        """
        if await run_stoppable(describe_models, self._models.local or ()):
            await self._list_local()
            self._show_list()
            self._show_facts()
            self._estimate_needs()

    @work(exclusive=True, group="search")
    async def _search(self, query: str) -> None:
        self.notify(f"Searching the Hub for {query!r}…", timeout=2)
        self._models.query = query
        try:
            self._models.hub = await asyncio.to_thread(search_models, query)
        except UserError as problem:
            # Clear the search text too, since it would still filter the models on this machine.
            self._models.hub, self.query_one(Input).value = None, ""
            self._show_list()
            self.app.show_error(problem)
            return
        self._show_list(HUB + self._models.hub[0].id if self._models.hub else None)

    @work(exclusive=True, group="hub facts")
    async def _fetch_hub_facts(self, model_id: str) -> None:
        self._models.hub_facts[model_id] = await asyncio.to_thread(fetch_hub_facts, model_id)
        self._show_facts()

    def _show_list(self, select: str | None = None) -> None:
        if self._models.local is None:
            return
        list_ = self.query_one(ViList)
        self.query_one("#models-empty").display = not self._models.local and not self._models.hub
        words = self.query_one(Input).value.strip().lower()
        chosen = self.app.workbench.recipe.model.id
        list_.show(partial(self._models.lines, words, chosen), select)

    def _show_facts(self) -> None:
        recipe, budget = self.app.workbench.recipe, self.app.memory_budget
        model = self._models.find(self.query_one(ViList).current)
        architecture = None
        title = "Model"
        lines: Facts = []
        match model:
            case LocalModel():
                title, lines = model.name, local_facts(model, recipe)
                architecture = model.architecture
            case HubModel():
                facts = self._models.hub_facts.get(model.id)
                speed = load_ui_state().download_bytes_per_s or None
                title, lines = model.id, hub_facts(model, facts, speed)
                architecture = facts.architecture if facts is not None else None
            case Starter():
                title, architecture = model.id, model.architecture
                lines = starter_facts(model.model, model.architecture, model.download_bytes)
                if model.is_demo:
                    lines = demo_facts(model.model, model.architecture)
        self._show_title()
        self.refresh_bindings()
        side = self.query_one(ModelSide)
        side.show(title, lines)
        side.estimate(architecture, recipe, budget)

    def _show_title(self) -> None:
        """Show the title of the list: what Enter does, an explanation of the column ``needs``, the size of
        the models, and the free disk space. The last parts are left out if they do not fit.
        """
        panel = self.query_one("#models-panel", Panel)
        match self._models.find(self.query_one(ViList).current):
            case LocalModel():
                hint = key_hint("Enter", "select it")
            case Starter(is_demo=True):
                hint = key_hint("Enter", "download it")
            case HubModel() | Starter():
                hint = key_hint("Enter", "look it up")
            case _:
                hint = Content("")
        parts = list_title(hint, self.app.memory_budget)
        parts += [Content.styled(self._storage, "not bold $text-muted")] if self._storage else []
        while len(parts) > 1 and Content("   ").join(parts).cell_length > panel.outer_size.width - _FRAME:
            parts.pop()
        panel.show_title(Content("   ").join(parts))

    @work(exclusive=True, group="needs")
    async def _estimate_needs(self) -> None:
        """Estimate the memory that each model on this machine needs, and decide which models to recommend."""
        if self._models.local is None:
            return  # the scan for local models is still running; it calls this method when it ends
        recipe, budget = self.app.workbench.recipe, self.app.memory_budget
        known = [(m.path, m.architecture) for m in self._models.local if m.architecture is not None]
        self._models.needs = await asyncio.to_thread(
            lambda: {path: need(architecture, recipe, budget) for path, architecture in known}
        )
        if self._models.lists_starters:
            self._models.starters = await asyncio.to_thread(starters, recipe, budget)
        self._show_list()


async def show_download(app: QloraApp, model_id: str) -> None:
    """Switch to the Model screen, and start downloading a model from the Hub."""
    await app.switch_mode("models")
    if isinstance(app.screen, ModelsScreen):
        app.screen.query_one(DownloadsPanel).start(model_id)


def _absolute_problem(path: str) -> str:
    return "" if path.startswith("/") else "The path does not begin with /."
