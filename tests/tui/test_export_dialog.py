"""The export dialog of the Runs screen, without export processes."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from textual.pilot import Pilot

from qlora_tui.catalog.adapters import WEIGHTS
from qlora_tui.cli.subcommand import better_weights
from qlora_tui.memory.budget import budget_for
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.toml import dump
from qlora_tui.runs import exports
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import ALL_STEPS_DONE
from qlora_tui.runs.exports import (
    ExportRequest,
    ExportStatus,
    read_exports,
    start_export,
    write_export_status,
)
from qlora_tui.runs.result_weights import better_checkpoint
from qlora_tui.runs.run_summary import RunSummary, summarize
from qlora_tui.runs.status import Status
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.models.downloads import DownloadsPanel
from qlora_tui.tui.screens.runs import export_dialog, export_formats
from qlora_tui.tui.screens.runs.export_dialog import weights_line
from qlora_tui.tui.widgets.bars import TopBar
from tests.tui.fake_runs import FakeRun, write_fake_run
from tests.tui.screen_assertions import wait_for_text, wait_until
from tests.tui.workstation import config_folder

pytestmark = pytest.mark.slow


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunDir:
    monkeypatch.setattr(exports, "start_detached", lambda *args, **how: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    run = write_fake_run(FakeRun(name="tickets", state="finished", steps=10, total=10))
    run.adapter_dir.mkdir(exist_ok=True)
    (run.adapter_dir / "adapter_config.json").write_text("{}")
    return run


@pytest.fixture
def base(run: RunDir, private_home: Path) -> Path:
    """The run's base, which is on this machine."""
    folder = config_folder(private_home, "Qwen__Qwen2.5-7B")
    run.recipe_path.write_text(dump(replace_setting(run.recipe(), "model.id", str(folder))))
    return folder


def save_checkpoints(run: RunDir, *steps: int) -> None:
    for step in steps:
        folder = run.checkpoints_dir / f"step-{step}"
        folder.mkdir(parents=True)
        for name in ("adapter_config.json", "complete"):
            (folder / name).write_text("{}")


async def open_dialog(pilot: Pilot[None]) -> str:
    await pilot.press("6")
    await wait_for_text(pilot, "tickets")
    await pilot.press("e")
    return await wait_for_text(pilot, "Export tickets")


async def test_a_format_that_needs_an_absent_base_says_so_and_downloads_it(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.adapter_dir / WEIGHTS).touch()
    os.truncate(run.adapter_dir / WEIGHTS, 155 << 20)
    started: list[str] = []
    monkeypatch.setattr(DownloadsPanel, "start", lambda self, model: started.append(model))
    async with QloraApp().run_test(size=(80, 24)) as pilot:
        await open_dialog(pilot)
        # The sizes follow from the number of parameters that the run recorded.
        await wait_for_text(
            pilot,
            "GGUF Q8_0                  ~7.6 GiB  llama.cpp, LM Studio",
            "Merged model, 16-bit      ~14.3 GiB  transformers, vLLM",
            "Best for                     Download",
            "Ollama, Q8_0      ~7.6 GiB  ollama run                   14.3 GiB",
            "Adapter folder              155 MiB  several adapters",
        )
        # What can be exported at once comes first, with the cursor on it.
        await wait_for_text(pilot, "Enter export", "folder      ~/models/tickets-adapter")
        await pilot.press("j", "j")
        shown = await wait_for_text(
            pilot, "'Qwen/Qwen2.5-7B-Instruct' is not on this machine.", "the base (~14.3 GiB)"
        )
        assert "File" not in shown and "Enter export" not in shown
        await pilot.press("enter")
        await wait_for_text(pilot, "Download the base model?")
        assert not started
        await pilot.press("enter")
        await wait_until(pilot, lambda: started)
    assert started == ["Qwen/Qwen2.5-7B-Instruct"]
    assert read_exports(run) == []


@pytest.mark.usefixtures("base")
async def test_an_export_is_started_and_followed(run: RunDir, tmp_path: Path) -> None:
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        # The adapter's weights are not there.
        assert "0 bytes" not in await open_dialog(pilot)
        await wait_for_text(pilot, "Adapter folder              unknown  several")
        await wait_for_text(pilot, "tickets-Q8_0")
        await pilot.press("enter")
        await wait_for_text(
            pilot, "The export continues when", "Exports of this run", "Q8_0  Starting", "x cancel"
        )
        (export,) = read_exports(run)
        assert export.request.out == str(tmp_path / "models" / "tickets-Q8_0.gguf")
        await wait_until(pilot, lambda: bool(app.system_status.exports))
        assert "exporting Q8_0" in TopBar.status_options(app.system_status)[0]
        assert app.system_status.continues_without_app() == [
            "The export of tickets (Q8_0) continues.",
            "Come back: qlora-tui",
        ]
        done = ExportStatus(
            state="finished",
            at=time.time(),
            paths=(export.request.out,),
            bytes=7_000,
            summary="Q8_0 is near.",
            verdict="same top token in 97%, KL 0.004",
            command="llama-server -m it",
        )
        write_export_status(export.folder, done)
        await wait_for_text(pilot, "✓ Q8_0  7 KiB  same top token in 97%, KL 0.004", "▸ llama-server -m it")
        await wait_for_text(pilot, "y copy command")
        await pilot.press("escape")
        assert "✓ Q8_0" in await wait_for_text(pilot, "✓ Q8_0")


async def test_a_canceled_export_is_started_again_with_one_key(run: RunDir, tmp_path: Path) -> None:
    request = ExportRequest(form="merge", out=str(tmp_path / "merged"), checkpoint=5)
    write_export_status(start_export(run, request).folder, ExportStatus(state="canceled", at=time.time()))
    async with QloraApp().run_test(size=(120, 40)) as pilot:
        await open_dialog(pilot)
        await pilot.press("up")
        await wait_for_text(pilot, "left no files", "r start again")
        await pilot.press("r")
        await wait_for_text(pilot, "The export continues when", "merged model  Starting")
        (again,) = read_exports(run)
        assert again.request == request
        # It is running now.
        await pilot.press("r")
        assert [export.folder for export in read_exports(run)] == [again.folder]


@pytest.mark.usefixtures("base")
def test_every_choice_has_a_size_and_the_disk_its_room(monkeypatch: pytest.MonkeyPatch, run: RunDir) -> None:
    base = export_formats.base_of(run)
    choices = {each.id: each for each in export_formats.export_choices(base, budget_for(None), 155 << 20)}
    sizes = {id_: choice.size for id_, choice in choices.items()}
    assert sizes == {
        "gguf": "~7.5 GiB",
        "ollama": "~7.5 GiB",
        "merge": "~14.2 GiB",
        "adapter": "155 MiB",
        "hub": "155 MiB",
    }
    monkeypatch.setattr(export_formats, "disk_free_bytes", lambda folder: 10 << 30)
    assert export_formats.free_space(choices["gguf"]).plain.startswith("10.0 GiB free for ")
    assert export_formats.free_space(choices["merge"]).plain.startswith("✗ only 10.0 GiB free")


async def test_a_canceled_export_is_deleted_with_one_key(run: RunDir, tmp_path: Path) -> None:
    folder = start_export(run, ExportRequest(form="merge", out=str(tmp_path / "merged"))).folder
    write_export_status(folder, ExportStatus(state="canceled", at=time.time()))
    async with QloraApp().run_test(size=(120, 40)) as pilot:
        await open_dialog(pilot)
        await pilot.press("up")
        await wait_for_text(pilot, "r start again  D delete")
        await pilot.press("D")
        await wait_for_text(pilot, "Deleted")
        assert read_exports(run) == []


@pytest.mark.usefixtures("base")
async def test_without_llama_cpp_only_its_types_are_missing(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_formats, "is_installed", lambda: False)
    async with QloraApp().run_test(size=(100, 30)) as pilot:
        await open_dialog(pilot)
        await wait_for_text(pilot, "GGUF Q8_0", "Without llama.cpp", "[export]")
        await pilot.press("t")
        await wait_for_text(pilot, "GGUF F16")
        await pilot.press("t")
        await wait_for_text(pilot, "GGUF Q8_0")


@pytest.mark.usefixtures("base")
async def test_type_and_checkpoint_are_chosen_by_key(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_formats, "is_installed", lambda: True)
    save_checkpoints(run, 5, 10)
    async with QloraApp().run_test(size=(80, 24)) as pilot:
        await open_dialog(pilot)
        await pilot.press("up")
        await wait_for_text(pilot, "Upload the adapter", "t type  c checkpoint")
        await pilot.press("t", "t", "t", "c", "c")
        await wait_for_text(pilot, "Upload GGUF F16", "weights     step 5", "repository  tickets-step-5")
        await pilot.press("enter")
        await wait_for_text(pilot, "GGUF on the Hub  Starting")
        (export,) = read_exports(run)
        assert (export.request.file_type, export.request.checkpoint) == ("F16", 5)


def test_the_weights_of_an_export_are_named_and_worse_ones_are_a_warning(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = RunSummary(
        run=run,
        name="tickets",
        status=Status(state="finished", at=1.0, detail=ALL_STEPS_DONE),
        step=1200,
        total_steps=1200,
        loss=1.0,
        best=(1.287, 640),
        evaluations=((0, 2.7), (640, 1.287), (1200, 1.342)),
    )
    last = weights_line(summary, None)
    assert last.plain == (
        "step 1,200 (last), validation 1.342; best 1.287 at step 640, which is no longer saved"
    )
    assert last.spans[0].style == "$warning"
    beside = replace(summary, evaluations=((0, 2.7), (640, 1.287), (800, 1.301), (1200, 1.342)))
    assert weights_line(beside, None, (None, 1200, 800)).plain.endswith(
        "no longer saved. ▸ [c] step 800, 1.301"
    )
    assert weights_line(summary, 1200, (1200, 640)).plain.endswith("best 1.287 at step 640. ▸ [c] step 640")
    best = weights_line(summary, 640)
    assert best.plain == "step 640 (best), validation 1.287; the last step has 1.342"
    assert not best.spans
    early = replace(
        summary, status=Status(state="finished", at=1.0, detail="the adapter is from the best step, 640")
    )
    assert "(the adapter is from the best step, 640)" in weights_line(early, None).plain
    assert better_checkpoint(summary, ()) is None, "the checkpoint of step 640 is gone"
    assert better_checkpoint(summary, (640,)) == 640 and better_checkpoint(early, (640,)) is None
    save_checkpoints(run, 640)
    monkeypatch.setattr("qlora_tui.runs.run_summary.summarize", lambda run: summary)
    assert better_weights(run, "export") == (
        "The validation loss is 1.287 at step 640, and 1.342 at step 1,200. To export step 640 instead: "
        "--checkpoint 640"
    )


@pytest.mark.usefixtures("base")
async def test_notably_better_weights_than_the_last_are_proposed(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoints(run, 5, 8)
    read = summarize(run)
    summary = replace(read, best=(1.2, 5), evaluations=((0, 2.7), (5, 1.2), (10, 1.3)))
    monkeypatch.setattr(export_dialog, "summarize", lambda run: summary)
    async with QloraApp().run_test(size=(80, 24)) as pilot:
        await open_dialog(pilot)
        await wait_for_text(pilot, "weights     step 5 (best), validation 1.200; the last step has 1.300")
        await wait_for_text(pilot, "file        ~/models/tickets-step-5")
        await pilot.press("c")
        await wait_for_text(pilot, "weights     step 10 (last), validation 1.300; best 1.200 at step 5")
        await pilot.press("c", "c", "enter")
        await wait_for_text(pilot, "Starting")
        (export,) = read_exports(run)
        assert export.request.checkpoint == 5
