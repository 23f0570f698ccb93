from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from qlora_tui import publishing
from qlora_tui.errors import UserError
from qlora_tui.files import list_folder, sync
from qlora_tui.locks import locked
from qlora_tui.paths import state_dir
from qlora_tui.publishing import (
    abandoned_in,
    delete_abandoned,
    delete_unfinished,
    discard,
    draft_path,
    final_path,
    held_draft,
    is_abandoned,
    new_draft,
    publish,
    unfinished_drafts,
)
from tests.support.power import FaultyDisk, refuse_locks


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return draft_path(tmp_path / "model.gguf")


def test_a_path_in_a_draft_stands_for_its_result() -> None:
    inner = draft_path(draft_path(Path("/there/model")) / "files" / "model.gguf")
    assert final_path(inner / "files" / "F16.gguf") == Path("/there/model")
    assert final_path(Path("/there/model")) == Path("/there/model")


def test_ctrl_c_does_not_interrupt_the_deletion(draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = shutil.rmtree

    def interrupted(path: Path, *, ignore_errors: bool) -> None:
        # A signal that another thread takes, as in a process with torch.
        sender = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT))
        sender.start()
        sender.join()
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), held_draft(draft):
        pass
    assert not draft.exists()


def leave(draft: Path) -> Path:
    """A draft as a killed process leaves it."""
    stack = ExitStack()
    files = stack.enter_context(held_draft(draft))
    assert files is not None
    (files / "part").write_text("half")
    saved = shutil.copytree(draft, draft.with_name("saved"))
    stack.close()
    return saved.rename(draft)


@pytest.mark.parametrize("lock", ["", "mine", None])
def test_a_folder_without_our_marker_is_refused_and_stays(
    draft: Path, monkeypatch: pytest.MonkeyPatch, lock: str | None
) -> None:
    monkeypatch.setattr(publishing, "PATIENCE_S", 0.0)
    (draft / "files").mkdir(parents=True)
    (draft / "files/thesis.txt").write_text("mine")
    if lock is not None:
        (draft / "lock").write_text(lock)
    assert not is_abandoned(draft)
    delete_abandoned(draft)
    with pytest.raises(UserError, match="in the way"), held_draft(draft):
        pass
    assert (draft / "files/thesis.txt").exists()


def test_a_hidden_folder_next_to_an_export_stays(draft: Path) -> None:
    theirs = draft.parent / ".model.gguf.earlier"
    theirs.mkdir()
    with held_draft(draft):
        pass
    delete_abandoned(leave(draft))
    assert list(draft.parent.iterdir()) == [theirs]


def test_a_discarded_folder_is_gone_also_on_a_full_disk(draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for is_full in (False, True):
        (draft.parent / "run/files").mkdir(parents=True)
        if is_full:
            FaultyDisk(monkeypatch, 1, errno.ENOSPC, lasting=True)
        discard(draft.parent / "run")
        assert list(draft.parent.iterdir()) == []


def test_what_cannot_be_deleted_stays_marked(draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as stuck, held_draft(draft):
        stuck.setattr(shutil, "rmtree", lambda path, *, ignore_errors: None)
    assert abandoned_in(draft.parent) == [draft]
    delete_abandoned(draft)
    assert not draft.exists()


@pytest.mark.parametrize("earlier", [[], ["old"]])
def test_a_folder_whose_place_cannot_be_synced_is_not_published(
    draft: Path, monkeypatch: pytest.MonkeyPatch, earlier: list[str]
) -> None:
    final = final_path(draft)
    for name in earlier:
        (final / name).mkdir(parents=True)

    def fail_once(folder: Path) -> None:
        monkeypatch.setattr(publishing, "sync", sync)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError), held_draft(draft) as files:
        assert files is not None
        (files / "new").touch()
        monkeypatch.setattr(publishing, "sync", fail_once)
        publish(files, final)
    assert [path.name for path in list_folder(final)] == earlier
    assert not draft.exists()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_folders_that_a_file_system_cannot_sync_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        sync(tmp_path / "file")


def test_a_draft_is_held_by_one_at_a_time(draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "PATIENCE_S", 0.0)
    with held_draft(draft) as files, held_draft(draft) as second:
        assert files is not None and files.is_dir()
        assert second is None and not is_abandoned(draft)
    assert not draft.exists()


def test_what_a_killed_process_left_is_replaced(draft: Path) -> None:
    assert is_abandoned(leave(draft))
    with held_draft(draft) as files:
        assert files is not None and not list(files.iterdir())
    assert not draft.exists()


def test_only_an_abandoned_draft_is_deleted(draft: Path) -> None:
    delete_abandoned(draft)
    with held_draft(draft) as files:
        delete_abandoned(draft)
        assert files is not None and files.is_dir()
    delete_abandoned(leave(draft))
    assert not draft.exists()


def test_a_listed_draft_of_a_killed_process_is_found_and_deleted(draft: Path) -> None:
    with held_draft(draft, is_listed=True):
        assert not list(unfinished_drafts())
        saved = shutil.copytree(draft, draft.with_name("saved"))
        listed = shutil.copytree(state_dir() / "unfinished", draft.with_name("listed"))
    assert not list((state_dir() / "unfinished").iterdir())
    saved.rename(draft)
    shutil.copytree(listed, state_dir() / "unfinished", dirs_exist_ok=True)
    assert list(unfinished_drafts()) == [draft]
    delete_unfinished()
    assert not draft.exists() and not list((state_dir() / "unfinished").iterdir())


def test_a_draft_that_is_swept_off_the_list_too_early_is_listed(
    draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, listing = Path.mkdir, state_dir() / "unfinished"

    def sweep_first(folder: Path, **options: Any) -> None:
        if folder == draft:
            list(unfinished_drafts())
            assert not list(listing.iterdir())
        make(folder, **options)

    monkeypatch.setattr(Path, "mkdir", sweep_first)
    with held_draft(draft, is_listed=True):
        assert len(list(listing.iterdir())) == 1
    assert not list(listing.iterdir())


def test_without_locks_no_draft_is_left_or_unmarked(draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(draft)
    with monkeypatch.context() as mounted:
        refuse_locks(mounted)
        for held in (new_draft(draft.parent), held_draft(draft)):
            with pytest.raises(UserError, match="locks"), held:
                pass
    assert list(draft.parent.iterdir()) == [draft] and is_abandoned(draft)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_draft_deleted_while_it_is_locked_is_made_again(
    draft: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its previous holder deletes it between the creation of the folder and the lock."""
    deleted: list[str] = []

    def delete_once(now: str) -> None:
        if now == moment and not deleted:
            shutil.rmtree(draft)
            deleted.append(now)

    @contextmanager
    def delayed(path: Path, *, patience_s: float) -> Iterator[IO[str] | None]:
        delete_once("before")
        with locked(path, patience_s=patience_s) as lock:
            delete_once("after")
            yield lock

    monkeypatch.setattr(publishing, "locked", delayed)
    monkeypatch.setattr(publishing, "PATIENCE_S", 0.0)
    with held_draft(draft) as files:
        assert deleted and files is not None and files.is_dir()
        with held_draft(draft) as second:
            assert second is None
    assert not draft.exists()


def hold_often(draft: Path, times: int) -> None:
    while times:
        with held_draft(draft) as files:
            if files is not None:
                # Fails where another process holds it too.
                (draft.parent / "held").touch(exist_ok=False)
                (files / "part").touch()
                (draft.parent / "held").unlink()
                assert (files / "part").exists()
                times -= 1


@pytest.mark.slow
def test_processes_never_hold_a_draft_together(draft: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=hold_often, args=(draft, 40)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not list(draft.parent.iterdir())


def test_a_draft_whose_deletion_is_under_way_is_waited_for(
    draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The lock is gone, and the folder not yet.
    (draft / "files").mkdir(parents=True)
    monkeypatch.setattr(time, "sleep", lambda seconds: shutil.rmtree(draft))
    with held_draft(draft) as files:
        assert files is not None and not list(files.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_draft_of_another_user_is_refused(draft: Path) -> None:
    os.chown(leave(draft), 12345, 12345)
    with pytest.raises(PermissionError, match="another user"), held_draft(draft):
        pass


def test_a_listed_draft_that_has_no_marker_yet_is_deleted(tmp_path: Path) -> None:
    """A kill may come between its folder and its lock."""
    listed, own = (draft_path(tmp_path / name) for name in ("mine", "other"))
    with held_draft(listed, is_listed=True):
        entries = {entry: entry.read_bytes() for entry in (state_dir() / "unfinished").iterdir()}
    for entry, content in entries.items():
        entry.write_bytes(content)
    listed.mkdir()
    own.mkdir()
    assert list(unfinished_drafts()) == [listed]
    delete_unfinished()
    assert not listed.exists() and own.exists()
