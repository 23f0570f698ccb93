"""First contact with a box: profiles that print, programs that are missing or of another version."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora_tui import __version__
from qlora_tui.errors import UserError
from qlora_tui.remote import ssh, uploads
from qlora_tui.remote.ssh import Box
from tests.remote.sshd import FakeBox

pytestmark = pytest.mark.slow


def test_the_program_is_found_behind_a_profile_that_prints(box: FakeBox) -> None:
    channel = Box("box", asks=False).open_program("--version")
    assert channel.output.read().startswith(b"qlora-tui ")
    channel.close()
    assert len(box.connections()) == 1


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (None, "not installed on box"),
        ("echo qlora-tui 0.1.9", "is version 0.1.9"),
        ("echo what is this", "is version is"),
    ],
)
def test_a_box_without_this_version_is_refused_with_the_command_that_installs_it(
    box: FakeBox, program: str | None, said: str
) -> None:
    if program is None:
        box.program.unlink()
    else:
        box.program.write_text(f"#!/bin/sh\n{program}\n")
    with pytest.raises(UserError, match=said) as error:
        Box("box", asks=False).open_program("store", "stream")
    assert "uv tool install" in error.value.fix


def test_why_a_box_cannot_be_reached_is_said_in_the_words_of_ssh(
    box: FakeBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="Could not resolve hostname"):
        Box("nowhere.invalid", asks=False).open_program("--version")
    (box.folder / "known_hosts").write_text("")
    with pytest.raises(UserError, match="Host key verification failed"):
        Box("box", asks=False).open_program("--version")
    monkeypatch.setenv("PATH", str(box.folder))
    with pytest.raises(UserError, match="ssh is not installed") as error:
        Box("box", asks=False).open_program("--version")
    assert "apt install openssh-client" in error.value.fix
    with pytest.raises(UserError, match="not a valid host name"):
        Box("-oProxyCommand=x")


def test_data_arrive_once_and_whole(box: FakeBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "rows"
    more, odd = tmp_path / "more", "it's \"a\nb.jsonl"
    for folder in (data, more):
        folder.mkdir()
    (data / "a.jsonl").write_text("a" * 1000)
    (more / "b.jsonl").write_text("")
    (more / odd).write_text("odd")
    (data / "more").symlink_to(more)
    there = uploads.send(Box("box", asks=False), data)
    assert (Path(there) / "more" / odd).read_text() == "odd"
    monkeypatch.chdir(data)
    assert uploads.send(Box("box", asks=False), Path()) == there
    assert (Path(there) / "a.jsonl").read_text() == "a" * 1000 and (Path(there) / "more/b.jsonl").exists()
    # What a cut has left is continued, and what is wrong is sent again.
    (Path(there) / "a.jsonl").rename(Path(there) / "a.jsonl.part")
    os.truncate(Path(there) / "a.jsonl.part", 300)
    sent: list[int] = []
    uploads.send(Box("box", asks=False), data, lambda done, total: sent.append(done))
    assert sent[0] == 1000 and (Path(there) / "a.jsonl").read_text() == "a" * 1000
    (Path(there) / "a.jsonl").unlink()
    (Path(there) / "a.jsonl.part").write_text("b" * 500)
    with pytest.raises(UserError, match="changed"):
        uploads.send(Box("box", asks=False), data)
    assert uploads.send(Box("box", asks=False), data) == there


@pytest.mark.parametrize(
    ("name", "said"),
    [(b"\xff.jsonl", "is not UTF-8"), (b"gone.jsonl", "not a file"), (b"pipe.jsonl", "not a file")],
)
def test_what_cannot_be_sent_is_named(name: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(name)
    if name.startswith(b"gone"):
        file.symlink_to("nowhere")
    elif name.startswith(b"pipe"):
        os.mkfifo(file)
    else:
        file.touch()
    with pytest.raises(UserError, match=said):
        uploads.send(Box("box"), tmp_path)


def test_a_box_whose_disk_is_full_says_so(box: FakeBox, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_bytes(os.urandom(3 << 20))
    program = box.program.read_text()
    box.program.write_text(program.replace("exec", "ulimit -f 100; exec"))
    with pytest.raises(UserError, match="limit on file sizes") as error:
        uploads.send(Box("box", asks=False), data)
    assert "has ended on box" in error.value.title
    box.program.write_text(program)
    assert Path(uploads.send(Box("box", asks=False), data)).read_bytes() == data.read_bytes()


@pytest.mark.parametrize("answer", ['{"path": "/x", "offset": -5}', "x" * (1 << 20)])
def test_a_box_that_gives_nonsense_is_left(
    answer: str, box: FakeBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "_END_S", 0.1)
    version = f"qlora-tui {__version__}"
    (box.folder / "answer").write_text(f"{answer}\n")
    box.program.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo {version} && exit\ncat {box.folder}/answer\nsleep 99\n'
    )
    (tmp_path / "a").write_text("a")
    with pytest.raises(UserError):
        uploads.send(Box("box", asks=False), tmp_path / "a")
