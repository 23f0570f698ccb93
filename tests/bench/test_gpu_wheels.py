"""Wheels for a GPU machine are small, and still valid wheels."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench.gpu_wheels import repack

CUDA = "bitsandbytes/libbitsandbytes_cuda130.so"
CPU = "bitsandbytes/libbitsandbytes_cpu.so"
METADATA = {
    "bitsandbytes-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 1.0\n",
    "bitsandbytes-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "bitsandbytes-1.0.dist-info/RECORD": "",
}


def write_wheel(folder: Path, *files: str) -> Path:
    wheel = folder / "bitsandbytes-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in (dict.fromkeys(files, "content") | METADATA).items():
            archive.writestr(name, content)
    return wheel


@pytest.mark.slow
def test_a_repacked_wheel_installs_without_other_cuda_libraries(tmp_path: Path) -> None:
    other = "bitsandbytes/libbitsandbytes_cuda118.so"
    wheel = write_wheel(tmp_path, "bitsandbytes/__init__.py", CUDA, CPU, other)
    repack(wheel)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
    subprocess.run([*install, str(tmp_path / "site"), str(wheel)], check=True, capture_output=True)
    assert (tmp_path / "site" / CUDA).read_text() == "content"
    assert not (tmp_path / "site" / other).exists()
    assert list(tmp_path.glob("*.part")) == []


def test_a_wheel_without_the_needed_library_is_refused(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "bitsandbytes/__init__.py", CPU)
    with pytest.raises(SystemExit, match="cuda130"):
        repack(wheel)
    assert wheel.exists() and list(tmp_path.glob("*.part")) == []
