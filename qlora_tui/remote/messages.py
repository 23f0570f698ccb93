"""The messages between an app and its box, one JSON object per line, and the conversion of values to JSON.

The app begins with :class:`Known`. The box responds with :class:`Hello`, sends the files that the app lacks,
and then sends every change. A :class:`Call` has an id, so that the box executes a call that changes
something only once, even if the app sends it again.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct

from qlora_tui.errors import UserError

LONGEST_LINE_BYTES = 64 << 20
_PACKAGE = "qlora_tui."
READ_THERE = "read_there"
"""Name of the method with which the box creates an argument that describes its machine.

Such an argument is not sent.
"""


class KnownFile(Struct, frozen=True, array_like=True):
    """A file of a run in the app's mirror."""

    path: str
    """Path relative to the runs folder."""
    size: int
    mtime_ns: int
    """Modification time on the box, in nanoseconds since the Unix epoch."""
    end_crc: int
    """CRC-32 of the last bytes of a growing file; 0 for other files.

    It shows whether new bytes can be appended to the app's copy.
    """


class Known(Struct, frozen=True, tag="known"):
    """The files that the app has. This is its first message to the box."""

    files: tuple[KnownFile, ...]


class Call(Struct, frozen=True, tag="call"):
    """A function of this program to call on the box."""

    id: str
    function: str
    """Import path of the function, such as ``qlora_tui.runs.actions:stop``."""
    arguments: msgspec.Raw
    """Arguments by parameter name, as JSON."""
    changes: bool
    """Whether the function changes something, so that it must not run twice."""


class Ping(Struct, frozen=True, tag="ping"):
    """A sign that the app is alive. If no message arrives for a minute, the box closes the connection."""


ToBox: TypeAlias = Known | Call | Ping


class Hello(Struct, frozen=True, tag="hello"):
    """The first message of the box."""

    state_dir: str
    """Path of the box's state folder."""


class Piece(Struct, frozen=True, tag="piece"):
    """Content of a file: the next bytes of a growing file, or all bytes of any other file.

    ``data`` is empty if the content stays on the box.
    """

    path: str
    offset: int
    data: bytes
    mtime_ns: int
    size: int
    """Size of a growing file up to the end of these bytes.

    For any other file, its full size, even if its content stays on the box.
    """


class Gone(Struct, frozen=True, tag="gone"):
    """A file or folder was deleted. Its path is relative to the runs folder."""

    path: str


class Whole(Struct, frozen=True, tag="whole"):
    """All of a run's files have been sent, so the run may be shown from now on."""

    run: str


class Queue(Struct, frozen=True, tag="queue"):
    """The ids of the waiting runs."""

    ids: tuple[str, ...]


class Machine(Struct, frozen=True, tag="machine"):
    """The state of the box's machine, sent once a second."""

    status: msgspec.Raw


class Reply(Struct, frozen=True, tag="reply"):
    """The value that a called function returned, or the exception that it raised."""

    id: str
    value: msgspec.Raw = msgspec.Raw(b"null")
    error: msgspec.Raw = msgspec.Raw(b"null")

    @property
    def failed(self) -> bool:
        """Whether the function raised an exception."""
        return bytes(self.error) != b"null"


FromBox: TypeAlias = Hello | Piece | Gone | Whole | Queue | Machine | Reply
to_box_decoder: msgspec.json.Decoder[ToBox] = msgspec.json.Decoder(ToBox)
from_box_decoder: msgspec.json.Decoder[FromBox] = msgspec.json.Decoder(FromBox)


def line(message: ToBox | FromBox) -> bytes:
    """Encode a message as one line, including the newline."""
    return msgspec.json.encode(message) + b"\n"


def to_json(value: object) -> msgspec.Raw:
    """Encode a value of this program, which may contain structs, dataclasses, paths and errors."""
    return msgspec.Raw(msgspec.json.encode(msgspec.to_builtins(value, enc_hook=_encode)))


def from_json(encoded: bytes | msgspec.Raw, kind: Any) -> Any:
    """Decode a value of type ``kind``. Raises msgspec.MsgspecError."""
    return from_builtins(msgspec.json.decode(encoded), kind)


def from_builtins(value: object, kind: Any) -> Any:
    """Convert a decoded value to type ``kind``. Raises msgspec.MsgspecError."""
    return msgspec.convert(value, kind, dec_hook=_decode)


def arguments_of(function: Callable[..., object], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the arguments of a call by parameter name, without those that the box creates itself."""
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    return {name: value for name, value in given.items() if not hasattr(value, READ_THERE)}


def result_type(function: Callable[..., object]) -> Any:
    """Return the type that a function returns."""
    return typing.get_type_hints(function)["return"]


def call_function(name: str, encoded: msgspec.Raw) -> msgspec.Raw:
    """Call a function of this program by its import path, and return the result as JSON.

    Raises the function's exceptions, ValueError for a function outside this program, and
    msgspec.MsgspecError for arguments of the wrong type.
    """
    module, _, attribute = name.partition(":")
    if not module.startswith(_PACKAGE):
        raise ValueError(name)
    function = getattr(import_module(module), attribute)
    hints = typing.get_type_hints(function)
    given = msgspec.json.decode(encoded)
    typed = {key: from_builtins(value, hints[key]) for key, value in given.items()}
    for key, kind in hints.items():
        if key not in (*typed, "return") and hasattr(kind, READ_THERE):
            typed[key] = getattr(kind, READ_THERE)()
    return to_json(function(**typed))


def _encode(value: Any) -> object:
    if isinstance(value, Path):
        return str(value)
    if hasattr(type(value), READ_THERE):
        return None
    if isinstance(value, UserError):
        kind = type(value)
        # Errors with their own __reduce__ are rebuilt in their class, others as a plain UserError.
        own = kind.__reduce__ is not UserError.__reduce__
        made_of: Any = value.__reduce__()[1] if own else ()
        is_plain = vars(value).keys() <= value.fields().keys()
        name = f"{kind.__module__}:{kind.__qualname__}" if own or is_plain else ""
        return {
            "class": name,
            "fields": value.fields(),
            "made_of": made_of,
        }
    raise NotImplementedError(type(value))


def _decode(kind: type, value: Any) -> Any:
    if issubclass(kind, Path):
        return Path(value)
    if hasattr(kind, READ_THERE):
        return getattr(kind, READ_THERE)()
    if issubclass(kind, UserError):
        return _error(value)
    raise NotImplementedError(kind)


def _error(record: Any) -> UserError:
    """Rebuild an error in its class if this process has imported that class, otherwise as a plain UserError.

    No module is imported because the box names it. Raises msgspec.ValidationError if the record is not an
    error of this program.
    """
    known: dict[str, Any] = {f"{kind.__module__}:{kind.__qualname__}": kind for kind in _errors(UserError)}
    try:
        kind = known.get(record["class"])
        if kind is not None and record["made_of"]:
            made: UserError = kind(*record["made_of"])
            return made
        error = UserError(**record["fields"])
        error.__class__ = kind or UserError
    except (KeyError, TypeError, ValueError) as problem:
        raise msgspec.ValidationError("an error without its fields") from problem
    return error


def _errors(kind: type[UserError]) -> Iterator[type[UserError]]:
    for each in kind.__subclasses__():
        yield each
        yield from _errors(each)
