"""What is published: the sdist, the wheel built from it, and the command that the wheel installs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import qlora_tui

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Published:
    """The two files of a release, built as a release builds them."""

    source: Path
    """The unpacked sdist."""
    wheel: Path
    """Built from :attr:`source`."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("published")
    build("--sdist", ROOT, folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz")
    build("--wheel", source, folder)
    (wheel,) = folder.glob("*.whl")
    return Published(source, wheel)


@pytest.fixture(scope="module")
def clean_python(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment into which pip installed the wheel; only the dependencies come from this one."""
    environment = tmp_path_factory.mktemp("clean") / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "--no-index", "--no-deps", str(published.wheel)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # Its path alone: the `.pth` files in it, such as that of an editable qlora-tui, are not read from here.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def build(kind: str, source: Path, out: Path) -> None:
    """Build one distribution without network."""
    command = [sys.executable, "-m", "build", kind, "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)


def output_of(command: list[str], home: Path) -> str:
    """Output of a command in a private home, without this checkout on Python's path."""
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, env=environment, cwd=home, check=True, capture_output=True, text=True)
    return done.stdout


def test_the_wheel_installs_the_command(clean_python: Path, tmp_path: Path) -> None:
    command = str(clean_python.parent / "qlora-tui")
    assert output_of([command, "--version"], tmp_path).strip() == f"qlora-tui {qlora_tui.__version__}"
    assert "balanced" in output_of([command, "presets"], tmp_path)


def test_the_wheel_carries_presets_and_themes(clean_python: Path, tmp_path: Path) -> None:
    code = (
        "from qlora_tui.paths import shipped_dir;"
        "print(*sorted(p.name for kind in ('presets', 'themes') for p in shipped_dir(kind).glob('*.toml')))"
    )
    carried = output_of([str(clean_python), "-c", code], tmp_path).split()
    assert carried == sorted(p.name for kind in ("presets", "themes") for p in (ROOT / kind).glob("*.toml"))
    assert "balanced.toml" in carried


def test_the_wheel_is_typed_and_contains_no_tests(published: Published) -> None:
    with zipfile.ZipFile(published.wheel) as archive:
        names = archive.namelist()
    assert "qlora_tui/py.typed" in names
    version = f"qlora_tui-{qlora_tui.__version__}"
    assert {name.partition("/")[0] for name in names} == {
        "qlora_tui",
        f"{version}.data",
        f"{version}.dist-info",
    }


def test_the_sdist_holds_every_tracked_file(published: Published) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tracked = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    assert [name for name in tracked if not (published.source / name).is_file()] == []
