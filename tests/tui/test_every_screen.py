"""What holds on every screen: the way to everything else is in view, and a digit goes to its screen."""

from __future__ import annotations

import asyncio
import gc
from importlib import import_module
from pathlib import Path

import pytest

from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.commands import SCREENS, ScreenEntry, screen_commands
from qlora_tui.tui.key_names import validate_keymap
from tests.tui.sample_data import readable_model
from tests.tui.screen_assertions import wait_for_text, wait_until
from tests.tui.workstation import open_on

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


async def test_a_click_on_a_key_in_the_footer_presses_it(private_home: Path) -> None:
    app = open_on("home", model=readable_model(private_home))
    async with app.run_test(size=(80, 24)) as pilot:
        text = await wait_for_text(pilot, *WAY_OUT)
        await pilot.click(offset=(text.splitlines()[-1].index("? Help"), 23))
        await wait_for_text(pilot, "Esc close")


@pytest.mark.parametrize(
    ("words", "shown"),
    [("[u] Undo", "Nothing to undo"), ("o open path", "Open a path")],
)
async def test_a_click_on_a_key_anywhere_presses_it(private_home: Path, words: str, shown: str) -> None:
    app = open_on("models", model=readable_model(private_home))
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        lines = (await wait_for_text(pilot, words)).splitlines()
        y = next(number for number, line in enumerate(lines) if words in line)
        await pilot.click(offset=(lines[y].index(words), y))
        await wait_for_text(pilot, shown)


def count_objects() -> int:
    gc.collect()
    return len(gc.get_objects())


async def test_closed_screens_are_freed(private_home: Path) -> None:
    """Textual keeps the keys of every footer and what a thousand closed widgets had painted."""
    app = open_on("home", model=readable_model(private_home))

    async def open_and_close() -> int:
        for _ in range(5):
            await pilot.press("question_mark")
            await wait_for_text(pilot, "Esc close")
            await pilot.press("q")
            await wait_until(pilot, lambda: len(app.screen_stack) == 1)
        # The last screen is freed, and the one below it painted, a moment after it closed.
        counts: list[int] = []

        def has_settled() -> bool:
            counts.append(count_objects())
            return len(counts) >= 8 and max(counts[-8:]) - min(counts[-8:]) < 100

        await wait_until(pilot, has_settled)
        return counts[-1]

    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, *WAY_OUT)
        await open_and_close()
        before = await open_and_close()
        assert await open_and_close() < before + 1000


async def test_the_palette_lists_and_opens_other_screens_commands() -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("ctrl+p", *"rerun")
        await wait_for_text(pilot, "Rerun (R on Runs)")
        await pilot.press("enter")
        await wait_until(pilot, lambda: app.current_mode == "runs")
        await pilot.press("ctrl+p", *"filter")
        await wait_for_text(pilot, "Filter (/)")


async def test_a_key_of_ones_own_is_named_wherever_keys_are(private_home: Path) -> None:
    app = open_on("home", keymap={"home.demo": "x", "train.stopp": "y"})
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "train.stopp", "Did you mean train.stop?")
        await pilot.press("escape")
        await wait_for_text(pilot, "x Demo")
        await pilot.press("question_mark")
        await wait_for_text(pilot, "x      Download the 135M demo model")
        await pilot.press("escape", "ctrl+p", *"demo")
        await wait_for_text(pilot, "Demo (x)")
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
