"""What holds on every screen: digits, clicks, the palette, own keys, the top bar, the strip of the recipe."""

from __future__ import annotations

import asyncio
import gc
import re
import shutil
from importlib import import_module
from pathlib import Path
from weakref import ReferenceType, ref

import pytest
from rich.style import Style
from textual.app import App, ComposeResult
from textual.widget import Widget

from qlora_tui.gpu.metrics import GpuDevice
from qlora_tui.memory.budget import budget_for
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.commands import COMMANDS, SCREENS, Command, ScreenEntry, screen_commands
from qlora_tui.tui.key_names import validate_keymap
from qlora_tui.tui.screens.home.panel_lines import gpu_lines
from qlora_tui.tui.system_monitor import SystemMonitor
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.widgets.bars import TopBar
from tests.support.nvml_stub import install_nvml_stub, install_torch
from tests.tui.fake_runs import FakeRun, write_fake_run
from tests.tui.sample_data import readable_model
from tests.tui.screen_assertions import segments_of, text_in, text_of, wait_for_text, wait_until
from tests.tui.workstation import config_folder, open_on, settle

WAY_OUT = ("^P Palette", "? Help")


async def test_a_digit_typed_while_a_screen_opens_switches_screens(private_home: Path) -> None:
    app = open_on("home", model=readable_model(private_home))
    async with app.run_test(size=(80, 24)) as pilot:
        for mode in ("models", "data", "memory", "lora", "train", "runs"):
            opening = app.switch_mode(mode)
            while app.screen.focused is None:
                await asyncio.sleep(0)
            app.simulate_key("0")
            await opening
            await wait_until(pilot, lambda: app.current_mode == "home")


async def test_a_key_is_named_in_panel_or_footer_and_a_click_on_it_presses_it(private_home: Path) -> None:
    app = open_on("models", model=readable_model(private_home))
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        footer = (await wait_for_text(pilot, "r rescan", *WAY_OUT)).splitlines()[-1]
        assert "/ Search" in footer and "Download" not in footer and "Rescan" not in footer
        for words, shown in (
            ("u undo", "Nothing to undo"),
            ("o Open path", "Open a model"),
            ("? Help", "Esc close"),
        ):
            # Its panel grows with the list of models.
            lines = (await wait_for_text(pilot, words, "Good first models")).splitlines()
            y = next(number for number, line in enumerate(lines) if words in line)
            await pilot.click(offset=(lines[y].index(words), y))
            await wait_for_text(pilot, shown)
            app.clear_notifications()
            while len(app.screen_stack) > 1:
                await pilot.press("escape")
        await pilot.press("G")
        await wait_for_text(pilot, "d Download")
        await pilot.resize_terminal(80, 24)
        await wait_for_text(pilot, "/ Search")


@pytest.mark.slow
@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
async def test_the_footer_leaves_out_the_keys_that_texts_and_borders_name(
    private_home: Path, size: tuple[int, int]
) -> None:
    write_fake_run(FakeRun(state="finished", steps=300, total=300))
    app = open_on("home", model=readable_model(private_home))
    async with app.run_test(size=size) as pilot:
        for digit in "01234567":
            await pilot.press(digit)
            await settle(pilot)
            *above, footer = text_of(app).splitlines()
            shown = re.findall(r"(?:^|  )(\S+) [A-Z]", footer)
            named = set(re.findall(r"\[(\S)\]", "\n".join(above[1:])))
            assert not named & set(shown), (digit, footer)


@pytest.mark.parametrize("theme", ["terminal-dark", "harbour"])
async def test_behind_a_dialog_a_screen_is_dimmed_and_has_no_keys_and_no_focus(
    private_home: Path, theme: str
) -> None:
    app = open_on("models", model=readable_model(private_home), theme=theme)
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "Good first models", *WAY_OUT)
        await settle(pilot)
        before = segments_of(app)
        assert text_in(before).count("╭") == 1
        await pilot.press("p")
        shown = await wait_for_text(pilot, "Enter open")
        assert shown.count("╭") == 1 and "╭─ Presets" in shown
        assert not shown.splitlines()[-1].strip()
        if theme == "terminal-dark":
            behind = [segment.style or Style() for segment in segments_of(app)[0]]
            assert all(style.dim and style.color is None for style in behind)
            assert [one.text for one in segments_of(app)[0] if one.style and one.style.reverse] == [
                " 1 Model "
            ]
            x = next(line.index("╭") for line in shown.splitlines() if "╭" in line)
            assert {line[x - 1] for line in shown.splitlines() if line[x : x + 1] == "│"} == {" "}
        await pilot.press("escape")
        await wait_until(pilot, lambda: segments_of(app) == before)


async def test_closed_screens_are_freed(private_home: Path) -> None:
    """Textual keeps the keys of every footer and what a thousand closed widgets had painted."""
    app = open_on("home", model=readable_model(private_home))
    closed: list[list[ReferenceType[object]]] = []

    def are_freed() -> bool:
        gc.collect()
        # The last screen is freed later.
        return not any(part() for parts in closed[:-1] for part in parts)

    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, *WAY_OUT)
        for _ in range(3):
            await pilot.press("question_mark")
            await wait_for_text(pilot, "Esc close")
            widgets = app.screen.walk_children(Widget, with_self=True)
            closed.append([ref(part) for widget in widgets for part in (widget, widget._styles_cache)])
            await pilot.press("q")
            await wait_until(pilot, lambda: len(app.screen_stack) == 1)
        await wait_until(pilot, are_freed)


async def test_a_key_of_ones_own_is_named_wherever_keys_are(private_home: Path) -> None:
    app = open_on("home", keymap={"home.demo": "x", "app.presets": "f9", "train.stopp": "y"})
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "train.stopp", "Did you mean train.stop?")
        await pilot.press("escape")
        await wait_for_text(pilot, "F9 presets")
        await pilot.press("question_mark")
        await wait_for_text(pilot, "x  ", "Download the 135M demo model")
        await pilot.press("escape", "ctrl+p", *"demo")
        await wait_until(pilot, lambda: bool(re.search(r"Demo +Download .* x\W*\n", text_of(app))))
        await pilot.press("escape", "escape", "f1")
        await wait_for_text(pilot, "Help: all keys", "F1   app.keys", "app.undo")
        await pilot.press("G")
        await wait_for_text(pilot, "presets.undo")


@pytest.mark.parametrize("screen", SCREENS, ids=lambda screen: screen.name)
def test_every_command_has_its_action(screen: ScreenEntry) -> None:
    module = import_module(f"qlora_tui.tui.screens.{screen.name}.screen")
    screen_class = getattr(module, f"{screen.name.title()}Screen")
    for command in (*screen_commands(screen.name), screen.opened_by):
        namespace, _, action = command.action.partition("(")[0].rpartition(".")
        assert hasattr(QloraApp if namespace else screen_class, f"action_{action}"), command.id


def test_a_letter_that_ends_something_does_nothing_else_on_any_screen() -> None:
    by_letter: dict[str, list[Command]] = {}
    for command in COMMANDS.values():
        for key in command.key.split(","):
            by_letter.setdefault(key, []).append(command)
    letters = {key: commands for key, commands in by_letter.items() if len(key) == 1}
    for letter, commands in letters.items():
        assert len({command.ends for command in commands}) == 1, (letter, commands)
    assert {command.label for command in letters["Z"]} == {"Stop and save"}
    assert {command.label for command in letters["e"]} == {"Export"}


def test_a_keymap_with_mistakes_gets_a_sentence_for_each() -> None:
    assert validate_keymap({"train.stop": "f9", "train.pause": "ctrl+x,f10"}) == []
    (unwritten,) = validate_keymap({"train.stop": "^x"})
    assert 'the key "^x", which does not exist. Write "ctrl+x"' in unwritten
    assert validate_keymap({"train.stop": "ctrl+shift+f9,semicolon,é"}) == []
    (misspelled,) = validate_keymap({"train.stop": "ctrl+entr"})
    assert 'the key "ctrl+entr", which does not exist. Write "ctrl+enter"' in misspelled
    (spaced,) = validate_keymap({"train.stop": "f9, f8"})
    assert 'Write "f8"' in spaced
    (shared,) = validate_keymap({"train.stop": "z"})
    assert "train.stop and train.pause both have the key z" in shared
    assert validate_keymap({"train.stop": "z", "train.pause": "s"}) == []
    (everywhere,) = validate_keymap({"train.stop": "q"})
    assert "train.stop and app.quit both have the key q" in everywhere


async def test_texts_name_the_keys_of_the_users_keymap() -> None:
    keymap = {"go.train": "f7", "models.filter": "ctrl+f", "app.undo": "z"}
    app = open_on("runs", keymap=keymap)
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "No runs yet. Press F7 to launch one.")
        await app.action_go("models")
        await wait_for_text(pilot, "Ctrl+F name; Enter", "z undo", "F7 Train")
        await app.action_go("memory")
        await pilot.press("question_mark")
        await wait_for_text(pilot, "Help: Memory", "z undo")


async def test_nothing_is_repainted_while_nothing_changes() -> None:
    class Bar(App[None]):
        def compose(self) -> ComposeResult:
            yield TopBar("home")

    app = Bar()
    async with app.run_test(size=(80, 3)) as pilot:
        bar = app.query_one(TopBar)
        refreshes: list[None] = []
        refresh = bar.refresh
        bar.refresh = lambda *a, **k: refreshes.append(None) or refresh(*a, **k)  # type: ignore[method-assign,func-returns-value]
        bar.show_status(SystemStatus())
        assert not refreshes
        bar.show_status(SystemStatus(waiting_ids=("a", "b")))
        assert refreshes
        await pilot.pause()
        assert "2 waiting" in text_of(app)


def test_a_gpu_that_says_nothing_is_na_and_never_zero() -> None:
    gpu = GpuDevice(0, "NVIDIA GeForce RTX 4090", None, None, None, None)
    assert "NA" in TopBar.status_options(SystemStatus(gpu=gpu))[0]


@pytest.mark.parametrize(
    ("scenario", "environ", "cuda", "bar", "home"),
    [
        ("one_gpu", {}, "12.4", "RTX 4090 91%", "RTX 4090"),
        ("one_gpu", {}, None, "RTX 4090 unusable", "built for the CPU"),
        ("no_driver", {}, None, "no GPU", "Training runs on the CPU"),
        ("one_gpu", {"QLORA_TUI_GPU": "cpu"}, None, "no GPU", "The CPU is chosen"),
        ("sliced", {}, "12.4", "unknown GPU", "a slice of a GPU"),
        ("mismatch", {}, "12.4", "no usable GPU", "The NVIDIA driver was updated"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch,
    scenario: str,
    environ: dict[str, str],
    cuda: str | None,
    bar: str,
    home: str,
) -> None:
    install_nvml_stub(monkeypatch, scenario)
    install_torch(monkeypatch, cuda)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    status = SystemMonitor().poll_and_recover()
    assert bar in TopBar.status_options(status)[0]
    lines = " ".join(line.plain for line in gpu_lines(status, budget_for(status.gpu), 80, is_compact=True))
    assert home in lines and ("CPU, slowly" in lines) == (bar == "no GPU")


async def test_a_model_without_weights_would_fit_but_cannot_train(private_home: Path) -> None:
    model = config_folder(private_home, "Qwen__Qwen2.5-7B", has_weights=False)
    app = open_on("lora", model=str(model))
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "✗ no weights", "NF4 would fit: uses", "of 24.0 GiB, needs at least ~6.3")
        await pilot.press("3")
        await wait_for_text(pilot, "NF4 would fit", "✗ no weights")
        await pilot.press("0")
        await wait_for_text(pilot, " GiB  ✗ cannot train", "weights, or", "cannot train: no weights")
        for file in ("model.safetensors", "tokenizer.json"):
            shutil.copy(config_folder(private_home, "Qwen__Qwen2.5-0.5B") / file, model)
        await pilot.press("1", "r", "4")
        await wait_for_text(pilot, "NF4 fits: uses", "needs at least ~6.3")
