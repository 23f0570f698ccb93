"""The commands that a message gives fit the environment that the program runs in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qlora_tui import installation
from qlora_tui.installation import install_command, torch_command

PYTHON = sys.executable
INDEX = "--index-url https://download.pytorch.org/whl/cu126"


@pytest.mark.parametrize(
    ("marker", "has_pip", "package", "extra", "torch"),
    [
        (
            "uv-receipt.toml",
            False,
            "uv tool install --upgrade qlora-tui --with mlflow",
            "uv tool install --upgrade 'qlora-tui[export]'",
            "UV_TORCH_BACKEND=cu126 uv tool install --reinstall qlora-tui",
        ),
        (
            "pipx_metadata.json",
            True,
            "pipx runpip qlora-tui install --upgrade mlflow",
            "pipx runpip qlora-tui install --upgrade 'qlora-tui[export]'",
            f"pipx runpip qlora-tui install --force-reinstall torch {INDEX}",
        ),
        (
            "",
            True,
            f"{PYTHON} -m pip install --upgrade mlflow",
            f"{PYTHON} -m pip install --upgrade 'qlora-tui[export]'",
            f"{PYTHON} -m pip install --force-reinstall torch {INDEX}",
        ),
        (
            "",
            False,
            f"uv pip install --python {PYTHON} --upgrade mlflow",
            f"uv pip install --python {PYTHON} --upgrade 'qlora-tui[export]'",
            f"uv pip install --python {PYTHON} --reinstall-package torch torch {INDEX}",
        ),
    ],
    ids=["uv tool", "pipx", "venv with pip", "uv venv"],
)
def test_commands_fit_the_environment(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    marker: str,
    has_pip: bool,
    package: str,
    extra: str,
    torch: str,
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(installation, "find_spec", lambda name: has_pip or None)
    if marker:
        (tmp_path / marker).touch()
    assert install_command("mlflow") == package
    assert install_command("qlora-tui[export]") == extra
    assert torch_command("cu126") == torch
