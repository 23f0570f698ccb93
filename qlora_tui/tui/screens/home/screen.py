"""The Home screen: GPU, runs, queue and recipe at a glance, and the suggested next step."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.actions import SkipAction
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.css.query import NoMatches
from textual.geometry import Size
from textual.widget import Widget
from textual.widgets import OptionList

from qlora_tui.remote.calls import refuse_on_box
from qlora_tui.tui import clock
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.ui_state import load_ui_state, save_ui_state
from qlora_tui.tui.widgets.controls import Drawing, Lines, Panel, ViList, ViScroll

if TYPE_CHECKING:
    from pathlib import Path

    from qlora_tui.recipe.schema import Recipe
    from qlora_tui.runs.directory import RunDir
    from qlora_tui.tui.screens.home.next_step import NextStep
    from qlora_tui.tui.screens.home.panel_lines import HomeLayout
    from qlora_tui.tui.screens.home.reader import HomeFacts, HomeReader
    from qlora_tui.tui.screens.train.screen import TrainScreen
    from qlora_tui.tui.workbench import Workbench

_LAST_SEEN_INTERVAL_S = 30.0
_SIDE, _WIDE_SIDE = 42, 60
"""Width of the right column, in cells: in most windows, and in a very wide window. The style sheet has the
same widths.
"""
_MAX_RECENT, _MAX_RECENT_IF_COMPACT = 12, 4
"""Maximum height of the panel with earlier runs, in rows, if there is also room for a chart: normally, and in
the compact layout.
"""
_FRAME = 5
"""Width of a panel's border, padding and scroll bar, in cells."""
_SHORT_FRAME = 3
_NUMBERS_HEIGHT = 38
"""Minimum height of the window, in rows, at which the panel ``The run in numbers`` is shown."""
_PRESETS_HEIGHT = 50
"""Minimum height of the window, in rows, at which presets are listed while there is no run."""
_LEAST_MODELS, _ROWS_BESIDE_MODELS = 5, 30
"""Minimum number of recommended models in the list, and number of rows that the other panels need."""


class HomeScreen(WorkScreen):
    """The Home screen: machine, active or last run, queue, recipe, and the suggested next step."""

    MODE = "home"
    # The CSS is in the class instead of a .tcss file, because Textual cannot load a file for the first
    # screen.
    DEFAULT_CSS = """
    HomeScreen {
        #home {
            height: 1fr;
            scrollbar-size-vertical: 1;
        }
        #home-parts {
            height: 1fr;
            min-height: 20;
        }
        #home-main {
            width: 1fr;
        }
        #home-side {
            width: 42;
        }
        #run-panel {
            height: 1fr;
        }
        #run-graph {
            margin-top: 1;
        }
        #recent-runs, #numbers {
            height: auto;
        }
        /* The other panels of the column keep all their rows. */
        #numbers-panel, #presets-panel, #shapes-panel {
            height: 1fr;
            min-height: 5;
        }
        #way-panel, &.-first #run-panel {
            display: none;
        }
        &.-very-wide #home-side {
            width: 60;
        }
        &.-low {
            #run-panel {
                height: auto;
            }
            #run-graph {
                height: 1;
                min-height: 1;
            }
            #recent-panel {
                height: 1fr;
            }
        }
        /* The active run must stand out from the next one. */
        &.-active #recipe {
            color: $text-muted;
        }
        /* Without a run, show the steps that lead to one. */
        &.-first #way-panel {
            display: block;
        }
        &.-narrow, &.-short {
            #home-parts {
                layout: vertical;
                min-height: 14;
            }
            #home-main {
                width: 100%;
                height: 1fr;
            }
            #home-side {
                width: 100%;
                height: auto;
            }
            #run-graph {
                margin-top: 0;
                min-height: 1;
            }
            &.-first #home-parts {
                min-height: 0;
            }
            &.-first #home-main {
                height: auto;
            }
        }
    }
    """
    FOOTER_APP_COMMANDS: ClassVar[frozenset[str]] = frozenset({"app.check_machine"})

    def __init__(self) -> None:
        super().__init__()
        self._facts_shown: HomeFacts | None = None
        self.downloading_demo = False
        """Whether the demo's model is being downloaded. The panel for the next step then shows the
        progress.
        """
        self._reader: HomeReader | None = None
        self._started_at = clock.now()
        self._seen_at = load_ui_state().last_seen or self._started_at
        self._reading = False

    def compose_body(self) -> Iterable[Widget]:
        with ViScroll(id="home"):
            yield Panel("Next step", Lines(id="next"), id="next-panel")
            yield Panel("Models", ViList(id="models-to-choose", classes="quiet"), id="models-panel")
            with Horizontal(id="home-parts"):
                with Vertical(id="home-main"):
                    yield Panel(
                        "Run",
                        Lines(id="run"),
                        Drawing(id="run-graph", classes="graph"),
                        keys=(("go.train", "open"), ("home.export", "export")),
                        id="run-panel",
                    )
                    yield Panel("From a model to your adapter", Lines(id="way"), id="way-panel")
                    keys = (("app.presets", "open one"),)
                    yield Panel("Presets", Drawing(id="presets"), keys=keys, id="presets-panel")
                    keys = (("go.runs", "all runs"),)
                    yield Panel("Earlier runs", Drawing(id="recent-runs"), keys=keys, id="recent-panel")
                with Vertical(id="home-side"):
                    yield Panel("The run in numbers", Drawing(id="numbers"), id="numbers-panel")
                    keys = (("app.check_machine", "check this machine"),)
                    yield Panel("Machine", Lines(id="gpu"), keys=keys, id="machine-panel")
                    yield Panel("Queue", Lines(id="queue"), id="queue-panel")
                    keys = (("app.presets", "presets"),)
                    yield Panel("Next run", Lines(id="recipe"), keys=keys, id="recipe-panel")
                    keys = (("go.data", "open data"),)
                    yield Panel(
                        "What your data may look like", Drawing(id="shapes"), keys=keys, id="shapes-panel"
                    )

    def on_mount(self) -> None:
        for hidden in ("#models-panel", "#presets-panel", "#shapes-panel"):
            self.query_one(hidden).display = False
        _save_last_seen()
        self.set_interval(_LAST_SEEN_INTERVAL_S, _save_last_seen)

    def on_screen_resume(self) -> None:
        if self._reader is not None:
            self._reader.invalidate_models()

    def refresh_now(self) -> None:
        # The recipe is read in the thread with everything else, so that the first frame does not wait for it.
        self._system_status_changed(self.app.system_status)

    def show_recipe(self, recipe: Recipe) -> None:
        self.start_reading()

    def show_system_status(self, system_status: SystemStatus) -> None:
        self.start_reading()

    def start_reading(self) -> None:
        """Read the panels' contents in a worker, unless a read is in progress."""
        if not self._reading:
            self._reading = True
            self._read()

    @work(group="read")
    async def _read(self) -> None:
        app = self.app
        try:
            await app.shown.wait()
            if not app.system_status.is_known:
                # Suggest nothing before the system status is known. A suggestion could be wrong, and Enter
                # would carry it out.
                self.query_one("#gpu", Lines).show(Content.styled("looking…", "dim"))
                return
            await asyncio.to_thread(import_module, "qlora_tui.tui.screens.home.reader")
            facts = await asyncio.to_thread(self._facts, app.workbench, app.system_status, self.size)
            if facts.is_partial and self._reader is not None:
                self._show_facts(facts)
                recipe, counts = app.workbench.recipe, app.counts
                await asyncio.to_thread(self._reader.look_ahead, recipe, app.system_status, counts)
                facts = await asyncio.to_thread(self._facts, app.workbench, app.system_status, self.size)
        finally:
            self._reading = False
        self._show_facts(facts)
        if facts.is_estimate:
            app.count_samples()

    def _show_facts(self, facts: HomeFacts) -> None:
        self._facts_shown = facts
        for panel, lines in facts.lines.items():
            self.query_one(f"#{panel}", Lines).show(lines)
        self._show_next()
        self._show_run(facts)

    @property
    def _last_run(self) -> RunDir:
        """The active run or, if there is none, the last run. Raises SkipAction if there are no runs."""
        run = self.app.system_status.active_or_last
        if run is None:
            raise SkipAction
        return run

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Return whether a command is available. The commands of an active run require an active run; the
        demo requires that there is none.
        """
        is_active = self.app.system_status.active is not None
        if action in ("pause", "stop", "demo"):
            return is_active == (action != "demo")
        return super().check_action(action, parameters)

    async def action_next(self) -> None:
        """Carry out the suggested step."""
        if self.suggestion is not None and not self.downloading_demo:
            await self.run_action(self.suggestion.action)

    async def action_watch(self) -> None:
        """Switch to the Train screen, with the active run or, if there is none, the last run."""
        from qlora_tui.tui.screens.train.screen import show_run

        await show_run(self.app, self._last_run)

    async def action_pause(self) -> None:
        """Watch the active run, and ask whether to pause it."""
        screen = await self._watch_active_run()
        screen.action_pause()

    async def action_stop(self) -> None:
        """Watch the active run, and ask whether to stop it."""
        screen = await self._watch_active_run()
        screen.action_stop()

    async def _watch_active_run(self) -> TrainScreen:
        from qlora_tui.tui.screens.train.screen import TrainScreen

        await self.action_watch()
        if not isinstance(self.app.screen, TrainScreen):
            raise SkipAction
        return self.app.screen

    async def action_resume(self) -> None:
        """Put the last run back into the queue to resume it, and watch it."""
        from qlora_tui.runs import actions as run_actions
        from qlora_tui.tui.threads import act_on_run

        act_on_run(self, self._last_run, run_actions.resume, lambda _: self.call_next(self.action_watch))

    async def action_prepare(self) -> None:
        """Switch to the Train screen, where the recipe is checked and launched."""
        from qlora_tui.tui.screens.train.screen import prepare_run

        await prepare_run(self.app)

    async def action_chat(self) -> None:
        """Chat with the last run's adapter."""
        from qlora_tui.tui.screens.chat.screen import show_chat

        await show_chat(self.app, self._last_run)

    def action_export(self) -> None:
        """Open the dialog that exports the last run's adapter."""
        from qlora_tui.tui.screens.runs.export_dialog import show_export_dialog

        show_export_dialog(self.app, self._last_run)

    @property
    def suggestion(self) -> NextStep | None:
        """The suggested step; None until Home's facts have been read for the first time."""
        return None if self._facts_shown is None else self._facts_shown.steps[0]

    def _show_next(self) -> None:
        """Show the suggested step and the alternatives. Unless the list of models has the focus, Enter is the
        key of the suggested step.
        """
        facts = self._facts_shown
        if facts is None or self.downloading_demo:
            return
        from qlora_tui.tui.screens.home.panel_lines import next_lines

        is_first = facts.last is None and not self._layout(self.size).is_compact
        has_enter = not self.query_one("#models-to-choose").has_focus
        lines = partial(next_lines, facts.steps, is_large=is_first, has_enter=has_enter)
        self.query_one("#next", Lines).show(lines)

    def _show_models(self) -> None:
        """Show the models to choose from, if there are any, and the key that chooses one."""
        facts = self._facts_shown
        if facts is None or facts.models is None:
            return
        from qlora_tui.tui.screens.home.first_lines import model_lines, models_title

        list_ = self.query_one("#models-to-choose", ViList)
        title = models_title(list_.current, list_.has_focus, self.app.memory_budget)
        self.query_one("#models-panel", Panel).show_title(title)
        most = max(_LEAST_MODELS, self.size.height - _ROWS_BESIDE_MODELS)
        list_.show(partial(model_lines, facts.models, most))

    def on_option_list_option_highlighted(self) -> None:
        self._show_models()

    def on_descendant_focus(self) -> None:
        self._show_models()
        self._show_next()

    def on_descendant_blur(self) -> None:
        self.on_descendant_focus()

    async def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Put the selected model into the recipe if the model is on this machine; otherwise, offer to
        download the model.
        """
        from qlora_tui.tui.screens.models.model_list import DEMO_LINE, LOCAL, STARTER
        from qlora_tui.tui.screens.models.screen import show_download

        chosen = event.option_id or ""
        if chosen == DEMO_LINE:
            await self.action_demo()
        elif chosen.startswith(LOCAL):
            self.app.edit("model.id", chosen.removeprefix(LOCAL))
        elif chosen.startswith(STARTER):
            await show_download(self.app, chosen.removeprefix(STARTER))

    async def action_demo(self) -> None:
        """Prepare a run with the demo's model. If the model is missing, ask whether to download it first."""
        refuse_on_box("The demo cannot be started from here", "demo")
        from qlora_tui.demo.demo_model import is_ready, model_folder
        from qlora_tui.tui.screens.models.downloads import ask_for_demo

        def download() -> None:
            self.downloading_demo = True
            self._download_demo()

        if self.downloading_demo:
            return
        if is_ready():
            await self._prepare_demo(model_folder())
            return
        then = (
            " The recipe is then set to this model and the 133 conversations that come with the app; "
            f"press {key_name('app.undo')} to undo. Training starts only when you launch it."
        )
        ask_for_demo(self, then, download)

    @work(group="demo")
    async def _download_demo(self) -> None:
        from qlora_tui.tui.screens.models import downloads

        download = downloads.start_demo()
        async for _ in download.follow():
            self.query_one("#next", Lines).show(Content(f"{download.status_text}…"))
        self.downloading_demo = False
        self.start_reading()
        if download.problem is not None:
            self.app.show_error(download.problem)
        elif download.path is not None:
            await self._prepare_demo(download.path)

    async def _prepare_demo(self, model: Path) -> None:
        from qlora_tui.demo.demo_run import demo_recipe

        self.app.load_recipe(demo_recipe(model))
        if self.is_current:
            await self.action_prepare()
        else:
            self.notify(
                "Downloaded the demo model and set the recipe to it. "
                f"Press {key_name('go.train')} to check and launch a run."
            )

    def _facts(self, workbench: Workbench, system_status: SystemStatus, size: Size) -> HomeFacts:
        from qlora_tui.tui.screens.home.reader import HomeReader

        if self._reader is None:
            self._reader = HomeReader(self._seen_at, self._started_at)
        self.app.recall_trace()
        budgets, now = (self.app.run_budget, self.app.memory_budget), clock.now()
        for budget in budgets:
            workbench.plan_use(budget)
        return self._reader.read(workbench, budgets, system_status, now, self._layout(size), self.app.counts)

    @property
    def _trains_on_cpu(self) -> bool:
        status = self.app.system_status
        return status.gpu is None and status.trains_on == "cpu"

    def _layout(self, size: Size) -> HomeLayout:
        from qlora_tui.tui.screens.home.panel_lines import HomeLayout

        if not (self.has_class("-tall") and not self.has_class("-narrow")):
            width = size.width - _SHORT_FRAME
            return HomeLayout(width, width, width, is_compact=True)
        side = _WIDE_SIDE if self.has_class("-very-wide") else _SIDE
        return HomeLayout(
            size.width - _FRAME,
            size.width - side - _FRAME,
            side - _FRAME,
            is_compact=False,
            is_large=self.has_class("-very-wide"),
        )

    def _show_run(self, facts: HomeFacts) -> None:
        """Show the titles, charts and keys that depend on the runs."""
        from qlora_tui.tui.render.loss import summary_lines
        from qlora_tui.tui.screens.home.panel_lines import numbers_lines, recent_lines

        is_new, is_active = facts.last is None, self.app.system_status.active is not None
        self.set_class(is_new, "-first")
        self.set_class(is_active, "-active")
        self.refresh_bindings()
        self.query_one("#models-panel").display = facts.models is not None
        # If there are models to choose from, Tab must move to their list.
        self.query_one("#home").can_focus = facts.models is None
        self._show_models()
        panel = self.query_one("#run-panel", Panel)
        panel.show_title("Run" if is_new or is_active else "Last run")
        first, others = facts.steps
        offered = {step.command for step in (first, *others)}
        keys = [("go.train", "watch")] if is_active else [("go.train", "open"), ("home.export", "export")]
        panel.show_keys(() if is_new else [key for key in keys if key[0] not in offered])
        graph = self.query_one("#run-graph", Drawing)
        graph.visible = not is_new
        graph.show(partial(summary_lines, facts.last))
        layout = self._layout(self.size)
        # In a small window without a GPU, hide the panel to make room for the run's loss. The top bar says
        # that there is no GPU.
        says_more = is_new or not layout.is_compact or not self._trains_on_cpu
        self.query_one("#machine-panel").display = says_more
        recipe = self.app.workbench.recipe
        has_recipe = bool(recipe.model.id or recipe.data.sources)
        self.query_one("#recipe-panel").display = has_recipe or not (is_new and layout.is_compact)
        self.query_one("#queue-panel").display = bool(self.app.system_status.waiting_ids)
        numbers = self.query_one("#numbers-panel", Panel)
        has_room = self.size.height >= _NUMBERS_HEIGHT and not layout.is_compact
        has_numbers = facts.last is not None and (layout.is_large or bool(facts.last.evaluations))
        numbers.display = has_room and has_numbers
        if facts.last is not None:
            draw = partial(numbers_lines, facts.last, layout.is_large)
            self.query_one("#numbers", Drawing).show(draw)
        numbers.show_title("The run in numbers" if layout.is_large else "Validation")
        workbench = self.app.workbench
        preset = f"{workbench.preset or 'defaults'}{'*' if workbench.modified else ''}"
        title = Content(f"Next run · {preset}")
        if self.app.draft.is_newer:
            from qlora_tui.tui.widgets.recipe_strip import reload_hint

            title = reload_hint()  # the panel has no room for the preset as well
        self.query_one("#recipe-panel", Panel).show_title(title)
        # While there is no run, the presets are shown in the place of the run's panel.
        has_rows = layout.is_large and self.size.height >= _PRESETS_HEIGHT
        for name in ("#presets-panel", "#shapes-panel"):
            self.query_one(name).display = is_new and has_rows
        if is_new and has_rows:
            from qlora_tui.tui.screens.home.first_lines import preset_lines, shape_lines

            presets = partial(preset_lines, facts.presets, workbench.preset)
            self.query_one("#presets", Drawing).show(presets)
            self.query_one("#shapes", Drawing).show(shape_lines)
        self.query_one("#recent-panel").display = bool(facts.recent)
        recent = partial(recent_lines, facts.recent, clock.now())
        self.query_one("#recent-runs", Drawing).show(recent)
        self.call_after_refresh(self._divide_rows)

    def on_resize(self) -> None:
        super().on_resize()
        if self._facts_shown is not None:  # the first frame waits for no module that divides rows
            self.call_after_refresh(self._divide_rows)

    def _divide_rows(self) -> None:
        """Divide the rows below the run's text between its chart and the earlier runs. If a chart and one
        earlier run do not both fit, the chart is one line.
        """
        from qlora_tui.tui.render.plot import LEAST_CHART

        try:
            names = ("home-main", "run-panel", "run", "run-graph", "recent-panel")
            main, panel, text, graph, recent = (self.query_one(f"#{name}") for name in names)
        except NoMatches:  # the screen is being closed
            return
        taken = panel.gutter.height + panel.styles.margin.height + graph.styles.margin.height
        rows = main.size.height - taken - text.size.height
        rows -= recent.styles.margin.height  # which no height includes
        least = recent.gutter.height + 1 if recent.display else 0
        is_low = rows < LEAST_CHART + least
        most = _MAX_RECENT_IF_COMPACT if self._layout(self.size).is_compact else _MAX_RECENT
        self.set_class(is_low, "-low")
        recent.styles.max_height = max(1, rows) if is_low else min(most, rows - LEAST_CHART)


def _save_last_seen() -> None:
    """Save the current time as the time at which the app was last in use. At the next start, Home announces
    runs that have ended since this time.
    """
    save_ui_state(last_seen=clock.now())
