"""The device of a run: what a trainer asks of it before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlora_tui.gpu import torch_env
from qlora_tui.recipe.schema import Recipe
from qlora_tui.training.compute_device import find_device

pytestmark = pytest.mark.slow
Limit = tuple[float, int]


@pytest.mark.parametrize(
    ("release", "reserved", "limits"),
    [
        ("6.8.0-45-generic", 0, []),
        ("5.15.153.1-microsoft-standard-WSL2", 0, [(0.5, 1)]),
        # What this process holds already is no other program's.
        ("5.15.153.1-microsoft-standard-WSL2", 2, [(0.75, 1)]),
    ],
)
def test_on_wsl2_torch_holds_no_more_than_is_free(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    release: str,
    reserved: int,
    limits: list[tuple[float, int]],
) -> None:
    (tmp_path / "osrelease").write_text(release)
    monkeypatch.setattr(torch_env, "_KERNEL_RELEASE", tmp_path / "osrelease")
    set_limits: list[Limit] = []
    properties = SimpleNamespace(name="NVIDIA GeForce RTX 3060", major=8, minor=6, total_memory=8)
    for name, replacement in {
        "is_available": lambda: True,
        "get_device_properties": lambda index: properties,
        "mem_get_info": lambda index: (4, 8),
        "memory_reserved": lambda index: reserved,
        "set_per_process_memory_fraction": lambda share, index: set_limits.append((share, index)),
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    assert find_device(Recipe(), local_rank=1).total_bytes == 8
    assert set_limits == limits
