"""The connection of an app to its box: keeps the mirror up to date, and calls functions on the box.

If the connection drops, the link reconnects automatically and repeats the requests that have no reply yet.
The box executes a request that changes something only once.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import count
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar
from uuid import uuid4

import msgspec
from msgspec import Struct

from qlora_tui import paths
from qlora_tui.errors import UserError, disk_problem, disk_problems
from qlora_tui.files import private_dir
from qlora_tui.recipe.schema import Data, Source
from qlora_tui.remote import calls, messages, uploads
from qlora_tui.remote.messages import Call, Hello, Known, Machine, Ping, Reply
from qlora_tui.remote.mirror import Mirror
from qlora_tui.remote.ssh import Box, Channel
from qlora_tui.worker import JobStopped

T = TypeVar("T")
Stamp: TypeAlias = tuple[tuple[str, int, int], ...]
"""Name, size and modification time of each file."""
_PING_S = 2.0
_SILENT_S = 20.0
"""Seconds without a message from the box after which the connection is closed."""
_UNCONFIRMED_S = 5.0
"""Seconds for which a call waits for a box that has stopped responding. A key press may wait for the call."""
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 15.0
"""Maximum seconds between two attempts to connect."""
_POLL_S = 0.2
LATE_S = 4.0
"""Seconds without a message after which the box counts as not responding. It sends a message every second."""


@dataclass
class _Request:
    line: bytes
    answered: threading.Event = field(default_factory=threading.Event)
    reply: Reply | None = None
    is_given_up: bool = False
    """Whether the caller has stopped waiting."""


class Link:
    """The connection of one app to one box."""

    def __init__(self, box: Box, state_dir: Path) -> None:
        self.box = box
        self.problem: UserError | None = None
        """Why the box cannot be reached; None while it is connected."""
        self.late_replies: deque[str] = deque()
        """Outcomes of requests whose callers have stopped waiting, in sentences."""
        self.sending = ""
        """Progress of a data transfer, in a sentence; empty if there is none."""
        self.kept: dict[object, Any] = {}
        """Cached results of functions with the decorator :func:`qlora_tui.remote.calls.at_box_once`."""
        self._state_dir = state_dir
        self._mirror = Mirror(state_dir)
        self._hello: Hello | None = None
        self._machine: deque[msgspec.Raw] = deque(maxlen=60)
        self._heard_at = time.monotonic()
        self._channel: Channel | None = None
        self._requests: dict[str, _Request] = {}
        self._sent: dict[str, tuple[Stamp, str]] = {}
        """Maps the path of sent data on this machine to its stamp and its path on the box."""
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._first_pass = threading.Event()

    def open(self, wait_s: float = 10.0) -> None:
        """Connect, and wait at most ``wait_s`` seconds until the mirror has all runs of the box.

        ssh may prompt at the terminal. Raises UserError.
        """
        channel = self.box.open_program("store", "stream")
        # From now on, the app uses the terminal.
        self.box = replace(self.box, asks=False)
        threading.Thread(target=self._run, args=(channel,), daemon=True, name="link").start()
        threading.Thread(target=self._watch, daemon=True, name="link watch").start()
        self._first_pass.wait(wait_s)

    def close(self) -> None:
        """Close the connection. Runs continue."""
        self._closed.set()
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    @property
    def silent_s(self) -> float:
        """Seconds since the last message from the box; 0 if the box responds in time."""
        silent = time.monotonic() - self._heard_at
        return silent if silent > LATE_S or not self.is_connected else 0.0

    @property
    def is_connected(self) -> bool:
        """Whether the channel to the box is open, as far as is known."""
        return self._channel is not None

    def machine_states(self) -> Iterator[msgspec.Raw]:
        """Yield the states of the box's machine that arrived since the last call, the newest last."""
        while self._machine:
            yield self._machine.popleft()

    def call(
        self, function: Callable[..., T], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, changes: bool
    ) -> T:
        """Call a function of this program on the box, for :func:`qlora_tui.remote.calls.at_box`.

        With ``changes``, the box executes the call only once. Raises the exceptions of the function, and
        UserError if the box does not respond.
        """
        if not self.is_connected:
            raise self.unreachable()
        given = messages.arguments_of(function, args, kwargs)
        should_stop: Callable[[], bool] = given.get("should_stop", lambda: False)
        # Callbacks are dropped, because the box reports no progress.
        given = {name: value for name, value in given.items() if not callable(value)}
        self.send_data(given)
        call = Call(
            id=uuid4().hex,
            function=f"{function.__module__}:{function.__qualname__}",
            arguments=self.there(messages.to_json(given)),
            changes=changes,
        )
        reply = self._ask(call, should_stop)
        if reply.failed:
            raise self._error_of(reply)
        try:
            result: T = messages.from_json(self.here(reply.value), messages.result_type(function))
        except ValueError as error:
            raise _not_understood(self.box.name, str(error)) from error
        return result

    def _error_of(self, reply: Reply) -> UserError:
        try:
            error: UserError = messages.from_json(self.here(reply.error), UserError)
        except ValueError as problem:
            return _not_understood(self.box.name, str(problem))
        return error

    def _ask(self, call: Call, should_stop: Callable[[], bool]) -> Reply:
        request = self._requests[call.id] = _Request(messages.line(call))
        self._write(request.line)
        dropped_at: float | None = None
        while not request.answered.wait(_POLL_S):
            if should_stop():
                self._requests.pop(call.id, None)
                raise JobStopped
            if not self.silent_s:
                dropped_at = None
                continue
            dropped_at = dropped_at or time.monotonic()
            if time.monotonic() - dropped_at < _UNCONFIRMED_S and not self._closed.is_set():
                continue
            if not call.changes:
                self._requests.pop(call.id, None)
                raise self.unreachable()
            request.is_given_up = True
            if request.answered.is_set():
                break
            raise self.unreachable().replace(
                title=f"{self.box.name} has not confirmed the request",
                why="The request was sent, and the connection dropped before the answer.",
                fix="Wait: as soon as the box answers, the app repeats the request and shows the outcome.",
            )
        self._requests.pop(call.id, None)
        assert request.reply is not None
        return request.reply

    def unreachable(self) -> UserError:
        """Return the error for a box that does not respond."""
        what = self.problem.what if self.problem else "The connection dropped."
        return UserError(
            f"{self.box.name} does not answer",
            what=what,
            why="The runs on the box continue.",
            fix="Try again once the box answers: the app reconnects by itself.",
            code=calls.UNREACHABLE,
        )

    def there(self, encoded: bytes | msgspec.Raw) -> msgspec.Raw:
        """Return JSON in which paths of runs and sent data on this machine become paths on the box."""
        if self._hello is None:
            return msgspec.Raw(encoded)
        pairs = {str(self._state_dir): self._hello.state_dir}
        pairs |= {local: place for local, (_, place) in list(self._sent.items())}
        return _with_paths(encoded, pairs)

    def here(self, encoded: bytes | msgspec.Raw) -> msgspec.Raw:
        """Return JSON in which paths of runs and sent data on the box become paths on this machine."""
        if self._hello is None:
            return msgspec.Raw(encoded)
        pairs = {place: local for local, (_, place) in list(self._sent.items())}
        return _with_paths(encoded, pairs | {self._hello.state_dir: str(self._state_dir)})

    def send_data(self, value: object) -> None:
        """Send the data files on this machine that ``value`` refers to as data sources or validation file.

        Files that the box has already are not sent again. Raises UserError.
        """
        for path in dict.fromkeys(_data_paths(value)):
            local = Path(path).expanduser()
            if "/" not in path or not local.exists() or local.is_relative_to(self._state_dir / "runs"):
                continue
            stamp = _stamp(local)
            if self._sent.get(path, ((), ""))[0] == stamp:
                continue
            if path in self._mirror.texts_there:
                self._check_same(path, local)
                self._sent[path] = (stamp, path)
                continue
            try:
                self._sent[path] = (stamp, uploads.send(self.box, local, self._progress_of(local)))
            finally:
                self.sending = ""

    def _check_same(self, path: str, local: Path) -> None:
        """Raise UserError if the file at ``path`` is not the same on this machine and on the box.

        A run on the box names this path. Such a local file is never sent, because a box must not choose which
        files are sent to it.
        """
        hash_there = self.call(uploads.data_hash, (path,), {}, changes=False)
        if hash_there != uploads.data_hash(str(local)):
            raise UserError(
                "The file does not contain this run's data",
                what=f"A run on {self.box.name} uses {path}, but the copy on this machine is different.",
                why="This copy was not sent, because a box must not choose which files are sent to it.",
                fix="To send this file, use another path, such as the path of a copy or of a link.",
            )

    def _progress_of(self, local: Path) -> Callable[[int, int], None]:
        def show(sent: int, size: int) -> None:
            share = sent / size if size else 1.0
            self.sending = f"Sending {local.name} to {self.box.name}: {share:.0%}"

        return show

    def start_job(self, job: str, *arguments: object, errors: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a job on the box, which continues if the connection drops. The messages of the job arrive on
        ``stdout`` of the returned process. The error output of the job and of ssh is written to ``errors``.

        Raises UserError if the box is not connected.
        """
        if not self.is_connected:
            raise self.unreachable()
        argv = self.box.program_argv("store", "job", job)
        pipe = subprocess.PIPE
        child = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=errors, start_new_session=True)
        assert child.stdin is not None
        with suppress(BrokenPipeError):
            child.stdin.write(msgspec.json.encode(arguments) + b"\n")
            child.stdin.close()
        child.stdin = None
        return child

    def engine_argv(self) -> list[str]:
        """Return the command that starts an engine on the box. Raises UserError."""
        if not self.is_connected:
            raise self.unreachable()
        return self.box.program_argv("store", "engine")

    def _run(self, channel: Channel) -> None:
        """Apply the box's messages until the link is closed, and reconnect whenever the connection drops.

        Ends early if a message of the box is refused.
        """
        pause_s = _FIRST_WAIT_S
        while not self._closed.is_set():
            began = time.monotonic()
            problem: UserError | None = None
            refused: UserError | None = None
            try:
                self._follow(channel)
            except UserError as error:
                refused = error
            except OSError as error:
                # Either the mirror could not be written, or the connection has ended, and the channel says
                # why.
                problem = disk_problem(error)
            except ValueError:
                pass
            problem = refused or problem or channel.ended_because()
            with self._lock:
                self._channel = None
            channel.close()
            self.problem = problem
            if refused is not None:
                return
            pause_s = _FIRST_WAIT_S if time.monotonic() - began > _LONGEST_WAIT_S else pause_s
            while not self._closed.wait(pause_s):
                pause_s = min(_LONGEST_WAIT_S, pause_s * 2)
                try:
                    channel = self.box.open_program("store", "stream")
                    break
                except UserError as error:
                    self.problem = error

    def _follow(self, channel: Channel) -> None:
        """Apply the messages of the box until the connection ends.

        Raises OSError, MsgspecError, and UserError for a message that is refused.
        """
        self._heard_at = time.monotonic()
        channel.write(messages.line(Known(self._mirror.known())))
        while line := channel.output.readline(messages.LONGEST_LINE_BYTES):
            if len(line) == messages.LONGEST_LINE_BYTES:
                raise _not_understood(self.box.name, "A line of the response is too long.")
            self._heard_at = time.monotonic()
            match messages.from_box_decoder.decode(line):
                case Hello() as hello:
                    self._hello = hello
                    with self._lock:
                        self._channel = channel
                        again = [request.line for request in self._requests.values()]
                    self.problem = None
                    for request in again:
                        channel.write(request)
                case Machine(status):
                    self._machine.append(status)
                    self._first_pass.set()
                case Reply() as reply:
                    self._answer(reply)
                case change:
                    self._mirror.apply(change)

    def _answer(self, reply: Reply) -> None:
        request = self._requests.get(reply.id)
        if request is None:
            return
        request.reply = reply
        request.answered.set()
        if request.is_given_up:
            self._requests.pop(reply.id, None)
            done = "The request that was not confirmed has been carried out."
            if reply.failed:
                done = str(self._error_of(reply))
            self.late_replies.append(done)

    def _watch(self) -> None:
        """Send pings every two seconds, and close a connection that is silent for too long."""
        while not self._closed.wait(_PING_S):
            self._write(messages.line(Ping()))
            channel = self._channel
            if channel is not None and time.monotonic() - self._heard_at > _SILENT_S:
                channel.process.kill()
                # The other channels of this connection hang as well.
                with suppress(Exception):
                    self.box.hang_up()

    def _write(self, line: bytes) -> None:
        with self._lock:
            if self._channel is not None:
                # The reading thread notices that the connection has ended.
                with suppress(OSError, ValueError):
                    self._channel.write(line)


def _not_understood(box: str, why: str) -> UserError:
    return UserError(
        f"The response of {box} cannot be read",
        what=why,
        fix="If you do not trust this box, do not work on it. Otherwise report a bug in qlora-tui.",
    )


def mirror_home(box: str) -> Path:
    """Return the folder that replaces XDG_STATE_HOME in an app that works on a box."""
    safe = "".join(each if each.isalnum() or each in "@.-_" else "_" for each in box).lstrip(".")
    return paths.state_dir() / "boxes" / (safe or "_")


def _is_taken(home: Path) -> bool:
    """Lock a mirror until this process ends; return whether this was possible."""
    handle = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return False
    except OSError:
        pass  # a file system without locks
    return True


def work_on(box: Box) -> Link:
    """Connect to a box and make this process work on it; return the link. Raises UserError."""
    homes = (mirror_home(box.name + (f"-{number}" if number > 1 else "")) for number in count(1))
    # A second app on the same box gets its own mirror.
    home = next(home for home in homes if _is_taken(private_dir(home)))
    os.environ["XDG_STATE_HOME"] = str(home)
    link = Link(box, paths.state_dir())
    link.open()
    calls.use(link)
    return link


def _stamp(path: Path) -> Stamp:
    """Return names, sizes and times of a file or of a folder's files, to detect changes. Raises UserError."""
    with disk_problems("The data could not be read", path, "Check the path and its permissions."):
        files = uploads.files_of(path)
        statuses = [(str(file), file.stat()) for file in files]
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in statuses)


def _data_paths(value: object) -> Iterator[str]:
    """Yield the paths of all data sources and validation files in a value."""
    if isinstance(value, Source):
        yield value.path
    elif isinstance(value, Data) and value.validation_path:
        yield value.validation_path
    if isinstance(value, Struct):
        for name in value.__struct_fields__:
            yield from _data_paths(getattr(value, name))
    elif is_dataclass(value):
        for each in fields(value):
            yield from _data_paths(getattr(value, each.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _data_paths(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _data_paths(item)


def _with_paths(encoded: bytes | msgspec.Raw, pairs: Mapping[str, str]) -> msgspec.Raw:
    """Return JSON with the prefix of each path replaced. Longer prefixes are matched first."""
    longest = sorted(pairs.items(), key=lambda pair: -len(pair[0]))

    def replaced(value: Any) -> Any:
        match value:
            case str():
                for before, after in longest:
                    if value == before or value.startswith(f"{before}/"):
                        return after + value[len(before) :]
                return value
            case list():
                return [replaced(item) for item in value]
            case dict():
                return {replaced(name): replaced(item) for name, item in value.items()}
            case _:
                return value

    return msgspec.Raw(json.dumps(replaced(json.loads(bytes(encoded)))).encode())
