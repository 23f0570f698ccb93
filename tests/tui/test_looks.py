"""Each screen as a picture at two sizes; and legible in every theme."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import pytest
from textual.pilot import Pilot

from qlora_tui import paths
from qlora_tui.catalog.described import describe
from qlora_tui.catalog.local_models import hub_cache_dir
from qlora_tui.chat.chat_types import ADAPTER, BASE
from qlora_tui.data.thought_splitter import TextChunk
from qlora_tui.recipe.presets import save
from qlora_tui.recipe.schema import Lora, Recipe, Source
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.chat.start import Starters
from qlora_tui.tui.screens.chat.turn import ChatTurn
from qlora_tui.tui.themes import load_themes
from qlora_tui.tui.ui_state import save_ui_state
from tests.catalog.models import make_cached
from tests.tui.chat_screen import OUTCOME, chat_of, finished
from tests.tui.data_screen import data_app, whole
from tests.tui.fake_runs import BEGAN, FakeRun, last_at, write_fake_run
from tests.tui.run_states import lost, no_memory, not_a_number, three_runs, watching
from tests.tui.sample_data import readable_model, tickets, write_rows
from tests.tui.screen_assertions import segments_of, wait_for_text, wait_until
from tests.tui.test_row_losses import measured_run
from tests.tui.test_themes import colors_of, illegible
from tests.tui.workstation import config_folder, config_of, go_to, open_on, settle

pytestmark = pytest.mark.usefixtures("same_machine", "here")

Before: TypeAlias = Callable[[Pilot[Any]], Awaitable[None]]
Scene: TypeAlias = Callable[[Path, Callable[[float], None]], tuple[QloraApp, Before]]
"""Takes the private home and what sets the clock; returns an app, and how it comes to show something."""

SHIPPED = {path.stem for path in paths.shipped_dir("themes").glob("*.toml")}
TRUECOLOR = [theme.name for theme in load_themes()[0] if not theme.ansi and theme.name in SHIPPED]


def keys(pressed: str, *texts: str, screen: tuple[str, str] | None = None) -> Before:
    """Press keys, and wait for texts; before that, go to a screen by its key and wait for its text."""

    async def before(pilot: Pilot[Any]) -> None:
        await settle(pilot)
        if screen:
            await go_to(pilot, *screen)
        await pilot.press(*pressed.split())
        await wait_for_text(pilot, *texts)
        await settle(pilot)

    return before


def home(_home: Path, _set_clock: object) -> tuple[QloraApp, Before]:
    three_runs()
    save_ui_state(last_seen=BEGAN - 1000)
    return QloraApp(), keys("", "while you were away", "tickets-b")


def models(_home: Path, _set_clock: object) -> tuple[QloraApp, Before]:
    name, pickled = "Qwen/Qwen2.5-7B-Instruct", "old/pickled"
    snapshot = make_cached(hub_cache_dir(), name, config_of("Qwen__Qwen2.5-7B"), shards=2)
    describe(config_of("Qwen__Qwen2.5-7B"))
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Qwen\n")
    snapshot = make_cached(hub_cache_dir(), pickled, config_of("openai-community__gpt2"))
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    return open_on("home", model=name), keys("1", "Good first models")


def data(home: Path, _set_clock: object) -> tuple[QloraApp, Before]:
    tickets(Path("tickets.jsonl"))
    write_rows(Path("mail.jsonl"), [{"prompt": "a", "completion": "b"}])
    two = (Source(path="tickets.jsonl", weight=2), "mail.jsonl")

    async def before(pilot: Pilot[Any]) -> None:
        await whole(pilot)
        await pilot.press("N")
        await whole(pilot)

    return data_app(readable_model(home), *two, max_length=128), before


def row_losses(home: Path, _set_clock: object) -> tuple[QloraApp, Before]:
    measured_run(tickets(Path("tickets.jsonl").absolute()))

    async def before(pilot: Pilot[Any]) -> None:
        await whole(pilot)
        # Once the list is open, what is under it is not laid out again.
        await wait_for_text(pilot, "Problems (4)")
        await pilot.pause()
        await pilot.press("B")
        await wait_for_text(pilot, "never learned")
        await pilot.press("space")

    return data_app(readable_model(home), "tickets.jsonl", max_length=128), before


def memory(home: Path, _set_clock: object) -> tuple[QloraApp, Before]:
    app = open_on("memory", model=str(config_folder(home, "Qwen__Qwen2.5-7B")), gpu_gib=12)
    app.workbench.set("data.max_length", 8192)
    app.workbench.set("training.micro_batch_size", 4)
    return app, settle


def lora(home: Path, _set_clock: object) -> tuple[QloraApp, Before]:
    app = open_on("home", model=str(config_folder(home, "Qwen__Qwen2.5-7B")))
    app.workbench.set("lora.target_modules", ("q_proj", "v_proj", "8-23.o_proj"))
    app.workbench.set("lora.rank", 32)

    async def before(pilot: Pilot[Any]) -> None:
        await go_to(pilot, "4", "every kind")
        await pilot.press("down", "right", "right", "V", "right", "right", "down")
        await settle(pilot)

    return app, before


def launch(home: Path, _set_clock: object) -> tuple[QloraApp, Before]:
    app = open_on("home", model=str(config_folder(home, "Qwen__Qwen2.5-7B")))
    return app, keys("5", "Cannot train: ")


def train(_home: Path, set_clock: Callable[[float], None]) -> tuple[QloraApp, Before]:
    running = FakeRun()
    # Otherwise the pace would be that of a run whose last step was an hour ago.
    set_clock(last_at(running) + 1)
    return QloraApp(), watching(write_fake_run(running))


def runs(_home: Path, _set_clock: object) -> tuple[QloraApp, Before]:
    three_runs()
    return QloraApp(), keys("j space", "tickets-a", "poems-c", "queue 1", screen=("6", "tickets-a"))


def comparison(_home: Path, _set_clock: object) -> tuple[QloraApp, Before]:
    three_runs()
    return QloraApp(), keys(
        "j space space space v", "3 runs compared", "Learning rate", screen=("6", "tickets-a")
    )


def chat(_home: Path, _set_clock: object) -> tuple[QloraApp, Before]:
    finished(ADAPTER, "step-800")

    async def before(pilot: Pilot[Any]) -> None:
        await wait_for_text(pilot, "not loaded yet")
        screen = chat_of(pilot.app)
        turn = ChatTurn("Where is my parcel?", (BASE, ADAPTER))
        screen.conversation.turns.append(turn)
        await screen.query_one("#conversation").mount(turn)
        screen.show_header()
        await turn.answers[ADAPTER].append_text(TextChunk(OUTCOME.text))
        await turn.answers[ADAPTER].end(OUTCOME)
        await turn.answers[BASE].append_text(TextChunk("I cannot know that."))
        cut = msgspec.structs.replace(OUTCOME, text="I cannot know that.", ending="most tokens")
        await turn.answers[BASE].end(cut)
        await settle(pilot)
        # The screen focuses the prompts by itself if nothing has the focus, at a time of its own.
        screen.query_one(Starters).focus()
        await settle(pilot)

    return open_on("chat"), before


def presets(home: Path, _set_clock: object) -> tuple[QloraApp, Before]:
    save("tickets", Recipe(lora=Lora(rank=8)), note="For support tickets.")
    app = open_on("memory", model=str(config_folder(home, "Qwen__Qwen2.5-7B")))
    return app, keys("p g j j", "Enter open")


PICTURES: dict[str, Scene] = {
    scene.__name__: scene
    for scene in (
        *(home, models, data, row_losses, memory, lora, launch, train, runs, comparison, chat, presets),
    )
}


def over(pressed: str, text: str) -> Scene:
    """A dialog, or another look of a screen, over runs and a model."""

    def scene(home: Path, _set_clock: object) -> tuple[QloraApp, Before]:
        three_runs()
        return open_on("home", model=str(config_folder(home, "Qwen__Qwen2.5-7B"))), keys(pressed, text)

    return scene


def watched(make: Callable[[], Any]) -> Scene:
    """A run on Train."""

    def scene(_home: Path, set_clock: Callable[[float], None]) -> tuple[QloraApp, Before]:
        run, now = make()
        set_clock(now)
        return QloraApp(), watching(run)

    return scene


SCENES = PICTURES | {
    "a filter": over("6 slash", "Part of a name"),
    "sampling": over("7 o", "Sampling"),
    "help": over("3 question_mark", "Help: Memory"),
    "all keys": over("f1", "Help: all keys"),
    "a file": over("2 o", "Tab complete"),
    "settings": over("f6", "Settings"),
    "a changed setting": over("f6 j l", "default: "),
    "a lost run": watched(lost),
    "no memory": watched(no_memory),
    "not a number": watched(not_a_number),
}


@pytest.mark.parametrize("size", [(80, 24), (120, 40)], ids=["80x24", "120x40"])
@pytest.mark.parametrize("scene", PICTURES)
def test_looks(
    snap_compare: Callable[..., bool],
    private_home: Path,
    set_clock: Callable[[float], None],
    scene: str,
    size: tuple[int, int],
) -> None:
    """Each screen as a picture at two sizes, the larger one after every word stood out in themes."""
    set_clock(BEGAN + 6000)
    app, before = PICTURES[scene](private_home, set_clock)

    async def then_legible(pilot: Pilot[Any]) -> None:
        await before(pilot)
        if size == (120, 40):
            usual = pilot.app.theme
            await check_legibility(pilot, scene)
            await dressed(pilot, usual)

    assert snap_compare(app, terminal_size=size, run_before=then_legible)


@pytest.mark.parametrize("scene", [each for each in SCENES if each not in PICTURES])
async def test_every_word_stands_out_in_every_theme(
    scene: str, private_home: Path, set_clock: Callable[[float], None]
) -> None:
    set_clock(BEGAN + 6000)
    app, before = SCENES[scene](private_home, set_clock)
    async with app.run_test(size=(120, 40)) as pilot:
        await before(pilot)
        await check_legibility(pilot, scene)


async def check_legibility(pilot: Pilot[Any], scene: str) -> None:
    """Every theme is on every fourth screen; what a theme makes of a color is the same on each."""
    app = pilot.app
    for theme in TRUECOLOR[list(SCENES).index(scene) % 4 :: 4]:
        await dressed(pilot, theme)
        assert not illegible(app), theme
    for theme in ("terminal-dark", "terminal-light"):
        await dressed(pilot, theme)
        assert colors_of(app) <= {"default", "standard"}, theme
        assert not illegible(app), theme


async def dressed(pilot: Pilot[Any], theme: str) -> None:
    """Switch to another theme, and wait until all of the screen has its colors."""
    app, before = pilot.app, segments_of(pilot.app)
    if app.theme != theme:
        app.theme = theme
        await wait_until(pilot, lambda: segments_of(app) != before)
    seen: list[object] = []

    def stays() -> bool:
        seen.append(segments_of(app))
        return len(seen) > 3 and seen[-1] == seen[-2] == seen[-3]

    await wait_until(pilot, stays)
