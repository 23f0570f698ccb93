"""The commands that a message gives fit the environment that the program runs in."""

from __future__ import annotations

import json
import shlex
import sys
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from qlora_tui import installation
from qlora_tui.installation import install_command, torch_command, torch_command_needs

PYTHON = sys.executable
INDEX = "--index-url https://download.pytorch.org/whl/cu126"
UV_TOOL = "uv tool install --upgrade"
UV_PIP = f"uv pip install --python {PYTHON}"
OF_PACKAGE = '[tool]\nrequirements = [{ name = "qlora-tui" }]\n'
LOCAL = """[tool]
requirements = [
    { name = "qlora-tui", extras = ["lm-eval"], directory = "/my src" },
    { name = "mlflow", specifier = ">2" },
    { name = "mine", editable = "/mine" },
]
python = "3.12"
entrypoints = [{ name = "qlora-tui", install-path = "/bin/qlora-tui", from = "qlora-tui" }]
"""
FROM_GIT = """[tool]
requirements = [
    { name = "qlora-tui", git = "https://host/q?subdirectory=a&rev=v1" },
    { name = "tomli", marker = "python_version < '3.11'" },
]
"""
REST_OF_LOCAL = "--with 'mlflow>2' --with-editable /mine --python 3.12"
MARKED = shlex.join(["--with", "tomli ; python_version < '3.11'"])


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this an environment without installer, in which the program came from a package index."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(installation, "find_spec", lambda name: None)
    monkeypatch.setattr(installation, "version", lambda name: "2.13.0")
    monkeypatch.setattr(installation, "distribution", lambda name: PathDistribution(tmp_path))


@pytest.mark.parametrize(
    ("marker", "has_pip", "package", "extra", "torch"),
    [
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
            f"{UV_PIP} --upgrade mlflow",
            f"{UV_PIP} --upgrade 'qlora-tui[export]'",
            f"{UV_PIP} --reinstall-package torch torch {INDEX}",
        ),
    ],
    ids=["pipx", "venv with pip", "uv venv"],
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
    monkeypatch.setattr(installation, "find_spec", lambda name: has_pip or None)
    if marker:
        (tmp_path / marker).touch()
    assert install_command("mlflow") == package
    assert install_command("qlora-tui[export]") == extra
    assert torch_command("cu126") == torch
    assert torch_command_needs() == ""


@pytest.mark.parametrize(
    ("receipt", "package", "extra", "torch"),
    [
        (OF_PACKAGE, "qlora-tui --with mlflow", "'qlora-tui[export]'", "qlora-tui"),
        (
            LOCAL,
            f"'qlora-tui[lm-eval] @ file:///my%20src' {REST_OF_LOCAL}",
            f"'qlora-tui[lm-eval,export] @ file:///my%20src' {REST_OF_LOCAL}",
            f"'qlora-tui[lm-eval] @ file:///my%20src' {REST_OF_LOCAL}",
        ),
        (
            '[tool]\nrequirements = [{ name = "qlora-tui", editable = "/src" }]\n',
            "--editable /src --with mlflow",
            "--editable '/src[export]'",
            "--editable /src",
        ),
        (
            FROM_GIT,
            f"'qlora-tui @ git+https://host/q@v1#subdirectory=a' {MARKED} --with mlflow",
            f"'qlora-tui[export] @ git+https://host/q@v1#subdirectory=a' {MARKED}",
            f"'qlora-tui @ git+https://host/q@v1#subdirectory=a' {MARKED}",
        ),
    ],
    ids=["package", "folder", "editable", "git"],
)
def test_a_uv_tool_keeps_its_source_and_packages(
    tmp_path: Path, receipt: str, package: str, extra: str, torch: str
) -> None:
    (tmp_path / "uv-receipt.toml").write_text(receipt)
    assert install_command("mlflow") == f"{UV_TOOL} {package}"
    assert install_command("qlora-tui[export]") == f"{UV_TOOL} {extra}"
    install = "uv tool install --torch-backend cu126 --reinstall-package torch"
    assert torch_command("cu126") == f"{install} {torch}"
    assert torch_command_needs() == "uv 0.9.19 or newer"


def test_a_uv_tool_keeps_its_build_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "uv-receipt.toml").write_text(OF_PACKAGE)
    monkeypatch.setattr(installation, "version", lambda name: "2.13.0+cu126")
    assert install_command("mlflow") == f"{UV_TOOL} --torch-backend cu126 qlora-tui --with mlflow"


@pytest.mark.parametrize(
    "receipt",
    [
        "",
        "not TOML",
        f"{OF_PACKAGE}[tool.options]\nno-index = true\n",
        f'{OF_PACKAGE}constraints = [{{ name = "mlflow", specifier = "<3" }}]\n',
        '[tool]\nrequirements = [{ name = "qlora-tui", virtual = "/src" }]\n',
        '[tool]\nrequirements = [{ name = "qlora-tui", git = "https://host/q?lfs=true" }]\n',
        '[tool]\nrequirements = [{ name = "qlora-tui", directory = "src" }]\n',
    ],
)
def test_a_receipt_that_cannot_be_repeated_is_left_alone(tmp_path: Path, receipt: str) -> None:
    (tmp_path / "uv-receipt.toml").write_text(receipt)
    assert install_command("mlflow") == f"{UV_PIP} --upgrade mlflow"
    assert torch_command("cu126") == f"{UV_PIP} --reinstall-package torch torch {INDEX}"
    assert torch_command_needs() == ""


@pytest.mark.parametrize(
    ("origin", "program"),
    [
        ({"url": "file:///my%20src", "dir_info": {}}, "'qlora-tui[export] @ file:///my%20src'"),
        ({"url": "file:///my%20src", "dir_info": {"editable": True}}, "--editable '/my src[export]'"),
        (
            {"url": "https://host/q", "vcs_info": {"vcs": "git", "requested_revision": "v1"}},
            "'qlora-tui[export] @ git+https://host/q@v1'",
        ),
        ({"url": "https://host/q.whl", "archive_info": {}}, "'qlora-tui[export] @ https://host/q.whl'"),
        ([], "'qlora-tui[export]'"),
    ],
)
def test_an_extra_comes_from_where_the_program_came_from(
    tmp_path: Path, origin: object, program: str
) -> None:
    (tmp_path / "direct_url.json").write_text(json.dumps(origin))
    assert install_command("qlora-tui[export]") == f"{UV_PIP} --upgrade {program}"
