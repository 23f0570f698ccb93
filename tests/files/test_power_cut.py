"""Files and folders over a power cut at any moment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_tui.checksums import checked_folder, mismatch
from qlora_tui.files import atomic_write
from qlora_tui.publishing import restore_earlier
from tests.support.power import Disk


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def disk(root: Path) -> Iterator[Disk]:
    watched = Disk(root)
    yield watched
    watched.close()


def test_a_durable_file_is_old_or_new_after_a_cut(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atomic_write(root / "file", "old")
    disk = Disk(root)
    with monkeypatch.context() as watched:
        disk.watch(watched)
        atomic_write(root / "file", "new", durable=True)
    seen = {}
    for _, mode in disk.cuts(tmp_path / "after"):
        seen[mode] = (tmp_path / "after/file").read_text()
        assert seen[mode] in ("old", "new")
    assert set(seen.values()) == {"new"}, "it is on the disk on return"
    disk.close()


def test_the_watched_disk_loses_what_is_not_synced(
    root: Path, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as watched:
        disk.watch(watched)
        atomic_write(root / "file", "new")
    last: dict[str, bytes | None] = {}
    for _, mode in disk.cuts(tmp_path / "after"):
        file = tmp_path / "after/file"
        last[mode] = file.read_bytes() if file.exists() else None
    assert last == {"least": None, "most": b"", "killed": b"new"}


def fill(folder: Path, text: str) -> None:
    (folder / "weights").write_text(text * 100)
    (folder / "templates").mkdir()
    (folder / "templates/one.jinja").write_text(text)


@pytest.mark.slow
def test_a_published_folder_is_whole_after_any_cut(
    root: Path, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as watched:
        disk.watch(watched)
        with checked_folder(root / "adapter") as draft:
            fill(draft, "new")
    after, there = tmp_path / "after", {}
    for call, mode in disk.cuts(after):
        there[mode] = (after / "adapter").exists()
        if there[mode]:
            assert mismatch(after / "adapter") is None, (call, mode)
            assert (after / "adapter/templates/one.jinja").read_text() == "new", (call, mode)
    assert all(there.values()), "it is on the disk on return"


@pytest.mark.slow
def test_an_earlier_folder_stands_until_the_new_one_does(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with checked_folder(root / "adapter") as draft:
        fill(draft, "old")
    disk = Disk(root)
    with monkeypatch.context() as watched:
        disk.watch(watched)
        with checked_folder(root / "adapter") as draft:
            fill(draft, "new")
    after, text = tmp_path / "after", {}
    for call, mode in disk.cuts(after):
        restore_earlier(after / "adapter")
        assert mismatch(after / "adapter") is None, (call, mode)
        text[mode] = (after / "adapter/templates/one.jinja").read_text()
        assert text[mode] in ("old", "new"), (call, mode)
    assert set(text.values()) == {"new"}
    assert [path.name for path in root.iterdir()] == ["adapter"]
    disk.close()
