"""The settings screen, and what it writes to config.toml."""

from __future__ import annotations

import pytest
from textual.widgets import Input

from qlora_tui.errors import UserError
from qlora_tui.settings import Settings, config_path, load_settings, save_setting
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.themes import theme_names
from tests.tui.screen_assertions import wait_for_text, wait_until

FILE = """\
# My settings.
model_folders = ["/tmp"]  # the big disk

[keymap]
"train.stop" = "x"
"""


def write_config(text: str) -> None:
    config_path().parent.mkdir(parents=True, exist_ok=True)
    config_path().write_text(text)


def test_saving_a_setting_keeps_comments_and_other_settings() -> None:
    write_config(FILE)
    settings = save_setting("notify.bell", False)
    assert not settings.notify.bell and settings.keymap == {"train.stop": "x"}
    assert load_settings() == settings
    text = config_path().read_text()
    assert text.startswith(FILE[: FILE.index("[keymap]")]) and '"train.stop" = "x"' in text
    assert save_setting("notify.bell", None).notify.bell
    linked = config_path().rename(config_path().with_name("dotfiles.toml"))
    config_path().symlink_to(linked)
    save_setting("mouse", False)
    assert config_path().is_symlink() and "mouse = false" in linked.read_text()
    assert "bell" not in config_path().read_text()


@pytest.mark.parametrize(
    ("name", "value"), [("quantized_cache_gib", -1.0), ("notify.webhook", "ftp://x"), ("card_gib", 0.0)]
)
def test_a_setting_out_of_bounds_leaves_the_file(name: str, value: object) -> None:
    write_config(FILE)
    with pytest.raises(UserError, match="not changed"):
        save_setting(name, value)
    assert config_path().read_text() == FILE


def test_a_damaged_config_file_is_not_overwritten() -> None:
    write_config("theme = ")
    with pytest.raises(UserError, match=r"config\.toml"):
        save_setting("theme", "paper")
    assert config_path().read_text() == "theme = "


async def test_a_theme_is_shown_at_once_and_saved_once_it_is_chosen() -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("f6")
        await wait_for_text(pilot, "Settings", "auto", "Colors of the app")
        await pilot.press("enter")
        await wait_for_text(pilot, "Enter apply", "chosen by the terminal's number of colors")
        names = theme_names()
        await pilot.press("down")
        await wait_until(pilot, lambda: app.theme == names[1])
        await pilot.press("escape")
        await wait_until(pilot, lambda: app.theme == "harbour")
        assert not config_path().exists()
        await pilot.press("enter", "down", "enter")
        await wait_until(pilot, lambda: load_settings().theme == names[1] == app.theme)
        await pilot.press("backspace")
        assert app.theme == "harbour" and "theme" not in config_path().read_text()
        await pilot.press("l")
        after = names[(names.index("auto") + 1) % len(names)]
        assert app.theme == after == load_settings().theme


async def test_what_is_typed_is_checked_and_saved() -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("f6")
        await wait_for_text(pilot, "Colors of the app")
        await pilot.press(*"jjj", "enter", "x", "enter")
        await wait_for_text(pilot, "must be a number above 0")
        await pilot.press("backspace", "1", "2", "enter")
        await wait_for_text(pilot, "12  default: none")
        assert app.memory_budget.bytes == 12 << 30
        assert load_settings().gpu_memory_gib == 12

        await pilot.press(*"jjj", "enter", *"/nope", "enter")
        await wait_for_text(pilot, "There is no folder /nope.")
        assert app.screen.query_one(Input).value == "/nope"
        await pilot.press(*["backspace"] * 5, *"/tmp", "enter")
        await wait_until(pilot, lambda: load_settings().model_folders == ("/tmp",))


def test_without_a_file_the_defaults_hold() -> None:
    assert load_settings() == Settings()


def test_what_the_user_wrote_is_read() -> None:
    config_path().write_text('theme = "paper"\nmodel_folders = ["/models"]\n[keymap]\n"train.stop" = "x"\n')
    settings = load_settings()
    assert settings.theme == "paper"
    assert settings.model_folders == ("/models",)
    assert settings.keymap == {"train.stop": "x"}


@pytest.mark.parametrize(
    "text", ['them = "paper"', "theme = 3", "theme = ", "card_gib = -1", '[notify]\nwebhook = "ftp://x"']
)
def test_a_wrong_file_is_explained(text: str) -> None:
    config_path().write_text(text)
    with pytest.raises(UserError) as caught:
        load_settings()
    assert str(config_path()) in str(caught.value)
    assert "theme" in caught.value.fix
