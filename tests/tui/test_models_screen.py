from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from msgspec.structs import replace
from textual.pilot import Pilot
from textual.widgets import Input

from qlora_tui.catalog.local_models import converted_dir, hub_cache_dir
from qlora_tui.catalog.outline import read_outline
from qlora_tui.catalog.starter_models import starter_file
from qlora_tui.errors import UserError
from qlora_tui.memory.budget import budget_for
from qlora_tui.memory.estimate import with_precision
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.screens.models import downloads, model_facts, model_list
from qlora_tui.tui.screens.models.screen import ModelsScreen
from qlora_tui.tui.widgets.controls import ViList
from qlora_tui.worker import start_detached
from tests.catalog.conftest import tiny_repo
from tests.catalog.fake_hub import FakeHub, serve
from tests.catalog.models import make_cached, make_model
from tests.support.polling import wait_for
from tests.tui.screen_assertions import text_of, wait_for_text
from tests.tui.workstation import config_folder, config_of, open_on, settle

TINY = "org/tiny"


@pytest.fixture(autouse=True)
def short_home(private_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths begin with ~ whatever folder a test runs in, and the disk has the same room."""
    monkeypatch.setenv("HOME", str(private_home))
    monkeypatch.setattr(model_facts, "disk_free_bytes", lambda folder: 70 << 30)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub on this machine, for the app in this process and for the children it starts."""
    repos = {
        TINY: tiny_repo(6 << 20, downloads=1_200_000),
        "org/tiny-gated": tiny_repo(gated=True, downloads=5),
    }
    with serve(FakeHub(repos)) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        yield served


def make_three() -> None:
    """One in the cache, one converted here, one with pickled weights only."""
    snapshot = make_cached(
        hub_cache_dir(), "Qwen/Qwen2.5-7B-Instruct", config_of("Qwen__Qwen2.5-7B"), shards=2
    )
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Qwen\n")
    make_model(converted_dir() / "SmolLM2-135M-Instruct", config_of("HuggingFaceTB__SmolLM2-135M"))
    pickled = make_cached(hub_cache_dir(), "old/pickled", config_of("openai-community__gpt2"))
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")


async def test_the_selected_model_is_marked_in_the_list_and_typing_filters_it(hub: FakeHub) -> None:
    make_three()
    app = open_on("models")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(
            pilot, "On this machine (3)", "135M", "7.62B", "needs", "~6.3 GiB", "✗ old/pickled"
        )
        await pilot.press("j", "j")
        await wait_for_text(pilot, "✗ Only pickled weights", "gpt2")
        await pilot.press("k")
        await wait_for_text(
            pilot,
            "license  apache-2.0",
            "context  131,072",
            "152,064",
            "●  1,024  ~6.3 GiB   ~15.3 GiB",
        )
        await pilot.press("enter")
        assert app.workbench.recipe.model.id == "Qwen/Qwen2.5-7B-Instruct"
        await wait_for_text(pilot, "● Qwen/Qwen2.5-7B-Instruct", "balanced · Qwen2.5-7B-Instruct")
        await pilot.press("u")
        assert app.workbench.recipe.model.id == ""

        await pilot.press("slash", *"smollm2")
        await wait_for_text(pilot, "On this machine (1)", "SmolLM2-135M-Instruct")
        await pilot.press("down", "enter")
        assert app.workbench.recipe.model.id == "SmolLM2-135M-Instruct"
    assert hub.requests == []


async def test_enter_searches_the_hub_and_fetches_one_models_config(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = open_on("models")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "No models on this machine yet.", "Press [d] to download", "SmolLM2")
        with monkeypatch.context() as unreachable:
            unreachable.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
            await pilot.press("slash", *"tiny", "enter")
            await wait_for_text(pilot, "Cannot reach the Hub")
        await pilot.press("escape")
        assert isinstance(app.screen, ModelsScreen)
        # The text typed would hide the models of this machine.
        await wait_for_text(pilot, "The Hub was not searched for 'tiny'")
        assert app.screen.query_one(Input).value == ""

        await pilot.press("slash", *"tiny", "enter")
        await wait_for_text(
            pilot, "On the Hub, for 'tiny' (2)", "↓1.20M", "gated", "Enter  Load its details from the Hub"
        )
        await pilot.press("enter")
        await wait_for_text(pilot, "[d]  Download", "layers     2 ×", "license    apache-2.0", "●  1,024")
        await pilot.press("enter")
        await wait_for_text(pilot, "✗ cannot train")
        assert app.workbench.recipe.model.id == TINY
        assert [r.path for r in hub.requests if "resolve" in r.path and "config.json" not in r.path] == []
        await pilot.press("j", "enter")
        await wait_for_text(pilot, "The model is gated", "hf auth login")


async def search_tiny(pilot: Pilot[Any]) -> None:
    await wait_for_text(pilot, "No models")
    await pilot.press("slash", *"tiny", "enter")
    await wait_for_text(pilot, "(2)")


@pytest.mark.slow
def test_the_largest_first_model_that_leaves_half_of_the_memory_is_before_the_others_by_size() -> None:
    budget = budget_for(None, 12 << 30)
    demo, *listed = model_list.starters(Recipe(), budget)
    assert demo.is_demo and demo.verdict.word == "fits"
    recommended, *others = [each.architecture.total_params for each in listed]
    small = [each for each in listed if each.verdict.needed_bytes <= budget.bytes / 2]
    assert 1 < len(small) < len(listed) and recommended == max(
        each.architecture.total_params for each in small
    )
    assert others == sorted(others)

    # A wide list says between name and figures what they are good for.
    models = model_list.ListedModels(starters=(demo, *listed))
    for width, has_notes in ((80, False), (135, True)):
        lines = [line for _, line in models.lines("", "", width)]
        assert max(line.cell_length for line in lines) <= width
        assert (demo.model.good_for in lines[1].plain) == has_notes


async def test_a_model_to_start_with_is_found_or_downloaded(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    smallest = replace(starter_file().models[0], id=TINY, gated=True)
    monkeypatch.setattr(model_list, "starter_file", lambda: replace(starter_file(), models=(smallest,)))
    app = open_on("models")
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "Good first models", "(demo)", TINY, "1.1 GiB")
        await pilot.press("j")
        await wait_for_text(
            pilot, "[d]  Download about 1.1 GiB", "Find it on the Hub", "layers    28 ×", "gated", "NF4"
        )
        assert hub.requests == []
        await pilot.press("enter")
        await wait_for_text(pilot, f"On the Hub, for '{TINY}'", "Enter  Load its details")
        assert "Good first models" not in text_of(app)
    app = open_on("models")
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "Good first models", TINY)
        await pilot.press("j", "d")
        await wait_for_text(pilot, "On this machine (1)", "Enter  Select this model")
        assert "Good first models" not in text_of(app), "it is on this machine now"


def half_is_there() -> bool:
    """Half of the weights has come: where the hub stalls."""
    # A file may be renamed after it was listed.
    with suppress(FileNotFoundError):
        return any(file.stat().st_size >= 1 << 20 for file in hub_cache_dir().rglob("*.incomplete"))
    return False


async def test_a_download_is_stopped_kept_continued_and_ends_in_the_list(hub: FakeHub) -> None:
    hub.stalls = threading.Event()
    app = open_on("models")
    async with app.run_test(size=(120, 40)) as pilot:
        await search_tiny(pilot)
        await pilot.press("d")
        await wait_for_text(pilot, "↓ org/tiny", "[x] stop")
        wait_for(half_is_there, saying="half of the weights")
        await pilot.press("d", "x")
        await settle(pilot)
        assert "[x] stop" not in text_of(app)
        hub.stalls.set()
        hub.stalls = None
        await pilot.press("d")
        await wait_for_text(pilot, "On this machine (1)", "Enter  Select this model", "here")
        assert "[x] stop" not in text_of(app)
        await pilot.press("enter")
        assert app.workbench.recipe.model.id == TINY
    assert any(range_ and range_ != "bytes=0-" for range_ in hub.ranges(""))


async def test_a_download_goes_on_when_the_app_is_closed(hub: FakeHub) -> None:
    hub.stalls = threading.Event()
    app = open_on("models")
    async with app.run_test(size=(80, 24)) as pilot:
        await search_tiny(pilot)
        await pilot.press("d")
        wait_for(half_is_there, saying="half of the weights")
        await pilot.press("2")
        await pilot.press("1")
        await wait_for_text(pilot, "↓ org/tiny")
        await pilot.press("q")
    hub.stalls.set()
    wait_for(lambda: list(hub_cache_dir().rglob("refs/main")), saying="the download's end")


async def test_a_folder_is_opened_by_its_path(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "mine", config_of("HuggingFaceTB__SmolLM2-135M"))
    app = open_on("models")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "No models")
        await pilot.press("o")
        app.screen.query_one(Input).value = f"{tmp_path}/nothing"
        await pilot.press("enter")
        await wait_for_text(pilot, "No name here contains 'nothing'")
        app.screen.query_one(Input).value = f"{tmp_path}/m"
        await wait_for_text(pilot, "mine  ", " bytes")
        assert "No name here" not in text_of(app), "the error is of what was typed before"
        await pilot.press("tab")
        assert app.screen.query_one(Input).value.endswith("mine/")
        await pilot.press("enter")
        await wait_for_text(pilot, "● mine", "folder")
        assert app.workbench.recipe.model.id == str(folder)
    async with open_on("models").run_test(size=(120, 40)) as pilot:
        # Another recipe, after a restart.
        await wait_for_text(pilot, "On this machine (1)", "mine")


async def test_folders_of_the_settings_are_looked_through_and_a_config_alone_is_for_estimates(
    tmp_path: Path,
) -> None:
    for name in ("one", "two"):
        make_model(tmp_path / "publisher" / name, config_of("HuggingFaceTB__SmolLM2-135M"))
    folder = tmp_path / "planned"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of("HuggingFaceTB__SmolLM2-135M")))
    app = open_on("models", model_folders=(str(tmp_path),))
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "On this machine (3)", "one", "two", "planned")
        list_ = app.screen.query_one(ViList)
        for name in ("one", "two", "planned"):
            await pilot.press("g")
            while not str(list_.current).endswith(name):
                await pilot.press("j")
        await wait_for_text(
            pilot,
            "No weights",
            "▸ [/]  Search the Hub. Download",
            "Enter  Select it for estimates only",
        )
        await pilot.press("enter")
        await wait_for_text(pilot, "Model set to planned, for estimates only.")
        assert app.workbench.recipe.model.id == str(folder)
        assert isinstance(app.screen, ModelsScreen)


async def test_a_model_without_its_tokenizer_is_named_where_it_is_estimated(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, "Qwen__Qwen2.5-7B")
    (folder / "tokenizer.json").unlink()
    app = open_on("models", model=str(folder), model_folders=(str(folder.parent),))
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "has no tokenizer.json", "▸ [/]  Search the Hub. Download")
        for screen in "134250":
            await pilot.press(screen)
            await wait_for_text(pilot, "no tokenizer")
            await settle(pilot)
            # A model that cannot be trained has no verdict "fits", and the reason is told once.
            shown = text_of(pilot.app)
            reasons = re.findall("(?:annot train:|✗) no tokenizer", shown)
            assert (len(reasons), re.findall("GiB +fits", shown)) == (1, []), shown


def test_a_child_that_ends_early_is_an_error_with_cause_and_fix(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.stalls = threading.Event()

    async def follow(number: signal.Signals | None) -> UserError:
        download = downloads.start(TINY)
        async for _ in download.follow():
            if number is not None:
                os.kill(download.pid, number)
        assert download.problem is not None
        return download.problem

    killed = asyncio.run(follow(signal.SIGKILL))
    hub.stalls.set()
    assert "was killed by SIGKILL" in killed.what
    assert "out of memory" in killed.why and "Close other programs" in killed.fix
    monkeypatch.setattr(
        downloads,
        "start_download",
        lambda model_id, errors: start_detached("json:missing", stdout=subprocess.PIPE, stderr=errors),
    )
    broken = asyncio.run(follow(None))
    assert "ended with exit code 1" in broken.what
    assert "AttributeError" in broken.why and "Start the download again" in broken.fix


def test_a_model_with_a_short_context_is_compared_in_int8() -> None:
    model = read_outline(config_of("HuggingFaceTB__SmolLM2-135M"))
    recipe = with_precision(replace_setting(Recipe(), "data.max_length", 256), "int8")
    fit = model_facts.model_fit(replace(model, max_positions=256), recipe, budget_for(None, 24 << 30))
    assert fit.precisions == ("int8", "fp16")
    assert [row.value for row in fit.lengths] == [256]
