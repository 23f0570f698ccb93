from __future__ import annotations

import pytest
from textual.app import App, ComposeResult

from qlora_tui.gpu.metrics import GpuDevice
from qlora_tui.memory.budget import budget_for
from qlora_tui.tui.screens.home.reader import gpu_lines
from qlora_tui.tui.system_monitor import SystemMonitor
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.widgets.bars import TopBar
from tests.support.nvml_stub import install_nvml_stub, install_torch
from tests.tui.screen_assertions import text_of


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
    lines = " ".join(line.plain for line in gpu_lines(status, budget_for(status.gpu), None, 80))
    assert home in lines and ("CPU, slowly" in lines) == (bar == "no GPU")
