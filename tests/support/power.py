"""Power cuts: what a folder may contain after a cut, at every moment of some work.

:class:`Disk` watches the calls that change names or sync content. For each prefix of them it lays the folder
out again as a file system may leave it:

``least``   only what was synced: names by the last sync of their folder, content by the file's last sync
``most``    every change of a name, but content only as synced (ext4 and XFS commit names before content)
``killed``  the process died and the machine did not: everything as it was
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

Mode = Literal["least", "most", "killed"]
MODES: tuple[Mode, ...] = ("least", "most", "killed")
_NAMES = ("rename", "replace", "link", "unlink", "remove", "rmdir", "mkdir")


@dataclass(eq=False)
class _Node:
    """A file or a folder, whatever it is called."""

    is_dir: bool
    handle: int
    """Held open, so that its inode number is not given to another."""
    names: dict[str, _Node] = field(default_factory=dict)
    content: bytes = b""


@dataclass(frozen=True)
class _Change:
    """Something that happened to one node."""

    kind: Literal["names", "content", "synced"]
    node: _Node
    names: dict[str, _Node] = field(default_factory=dict)
    content: bytes = b""


class Disk:
    """The history of ``root`` while it is watched; what is there at first counts as synced."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._nodes: dict[int, _Node] = {}
        self._history: list[list[_Change]] = []
        self.calls: list[str] = []
        """What happened, a line each, for messages."""
        self._top = self._look(root, [])
        for node in list(self._nodes.values()):
            self._history.append([_Change("names", node, names=dict(node.names), content=node.content)])
            self._history.append([_Change("content", node, content=node.content)])
            self._history.append([_Change("synced", node)])
        self._first = len(self._history)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Record every call from now on."""
        for name in _NAMES:
            monkeypatch.setattr(os, name, self._recorded(name, getattr(os, name)))
        monkeypatch.setattr(os, "fsync", self._recorded("fsync", os.fsync))

    def cuts(self, to: Path) -> Iterator[tuple[str, Mode]]:
        """Write ``to`` as it is after each cut in turn; yield the last call before the cut, and the mode."""
        self._observe()
        for end in range(self._first, len(self._history) + 1):
            for mode in MODES:
                shutil.rmtree(to, ignore_errors=True)
                self._lay_out(to, end, mode)
                yield (self.calls[end - self._first - 1] if end > self._first else "nothing yet"), mode

    def close(self) -> None:
        """Close every file."""
        for node in self._nodes.values():
            os.close(node.handle)

    def _recorded(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **words: Any) -> Any:
            self._observe()
            answer = call(*args, **words)
            if name == "fsync":
                node = self._nodes.get(os.fstat(args[0]).st_ino)
                if node is not None:
                    self._note(f"fsync {self._path_of(node)}", [_Change("synced", node)])
            else:
                self._observe(f"{name} {' '.join(str(a) for a in args)}")
            return answer

        return recorded

    def _observe(self, call: str = "writing") -> None:
        changes: list[_Change] = []
        self._look(self._root, changes)
        if changes:
            self._note(call, changes)

    def _note(self, call: str, changes: list[_Change]) -> None:
        self._history.append(changes)
        self.calls.append(call.replace(str(self._root), ""))

    def _look(self, path: Path, changes: list[_Change]) -> _Node:
        inode = path.lstat().st_ino
        node = self._nodes.get(inode)
        if node is None:
            node = _Node(path.is_dir(), os.open(path, os.O_RDONLY))
            self._nodes[inode] = node
        if not node.is_dir:
            content = path.read_bytes()
            if content != node.content:
                node.content = content
                changes.append(_Change("content", node, content=content))
            return node
        names = {entry.name: self._look(entry, changes) for entry in sorted(path.iterdir())}
        if names != node.names:
            node.names = names
            changes.append(_Change("names", node, names=dict(names)))
        return node

    def _path_of(self, node: _Node) -> str:
        return str(Path(f"/proc/self/fd/{node.handle}").readlink())

    def _lay_out(self, to: Path, end: int, mode: Mode) -> None:
        now: dict[_Node, _Change] = {}
        synced: dict[_Node, _Change] = {}
        for change in (change for changes in self._history[:end] for change in changes):
            if change.kind != "synced":
                if change.kind == "names" or not change.node.is_dir:
                    now[change.node] = change
            elif change.node in now:
                synced[change.node] = now[change.node]
        names = synced if mode == "least" else now
        contents = now if mode == "killed" else synced

        def lay_out(node: _Node, path: Path) -> None:
            if not node.is_dir:
                path.write_bytes(contents[node].content if node in contents else b"")
                return
            path.mkdir()
            for name, child in (names[node].names if node in names else {}).items():
                lay_out(child, path / name)

        lay_out(self._top, to)


_WRITES = ("write", "fsync", "rename", "replace", "link", "mkdir")


def refuse_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every lock of a file fail, as on a network file system without them."""

    def no_locks(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)


class FaultyDisk:
    """The ``at``-th call that writes fails with ``code``; later ones too where the fault is ``lasting``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, code: int, *, lasting: bool = False) -> None:
        self.count = 0
        self._at, self._code, self._lasting = at, code, lasting
        for name in _WRITES:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        monkeypatch.setattr(os, "open", self._counted(os.open, creating_only=True))

    @property
    def has_failed(self) -> bool:
        """Whether the call that was to fail was reached."""
        return self.count >= self._at

    def _counted(self, call: Callable[..., Any], *, creating_only: bool = False) -> Callable[..., Any]:
        def counted(*args: Any, **words: Any) -> Any:
            if creating_only and not args[1] & os.O_CREAT:
                return call(*args, **words)
            self.count += 1
            if self.count == self._at or (self._lasting and self.count > self._at):
                raise OSError(self._code, os.strerror(self._code))
            return call(*args, **words)

        return counted
