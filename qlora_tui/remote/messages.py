"""The lines between an app and its box, one JSON object each, and how values become JSON.

The app begins with :class:`Known`. The box answers with :class:`Hello`, then sends what it has that the app
lacks, and from then on what changes. A :class:`Call` has an id: a box carries out a call that changes
something once, however often it is sent.
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
"""Method of a class whose values describe the machine: the box reads its own instead of being sent one."""


class KnownFile(Struct, frozen=True, array_like=True):
    """A file of a run that the app has a copy of."""

    path: str
    """Relative to the folder of the runs."""
    size: int
    mtime_ns: int
    """When it was last changed, on the box."""
    end_crc: int
    """CRC of its last bytes: whether what follows continues it."""


class Known(Struct, frozen=True, tag="known"):
    """What the app has: the first line to the box."""

    files: tuple[KnownFile, ...]


class Call(Struct, frozen=True, tag="call"):
    """A function of this program to call on the box."""

    id: str
    function: str
    """``qlora_tui.runs.actions:stop``."""
    arguments: msgspec.Raw
    """Values by the names of parameters."""
    changes: bool
    """Whether it changes something, and must not be carried out twice."""


class Ping(Struct, frozen=True, tag="ping"):
    """The app is there: without one for a while, the box ends its side."""


ToBox: TypeAlias = Known | Call | Ping


class Hello(Struct, frozen=True, tag="hello"):
    """The box is there: its first line."""

    state_dir: str
    """Its state folder."""


class Piece(Struct, frozen=True, tag="piece"):
    """Bytes of a file: those of a file that grows, or a whole one."""

    path: str
    offset: int
    data: bytes
    mtime_ns: int
    size: int
    """Size of the file with these bytes; larger for a file whose content stays on the box."""


class Gone(Struct, frozen=True, tag="gone"):
    """A file or a folder that is not there any more, relative to the folder of the runs."""

    path: str


class Whole(Struct, frozen=True, tag="whole"):
    """All of a run's files have been sent: from now on it may be shown."""

    run: str


class Queue(Struct, frozen=True, tag="queue"):
    """The ids of the waiting runs."""

    ids: tuple[str, ...]


class Machine(Struct, frozen=True, tag="machine"):
    """The state of the box, once a second."""

    status: msgspec.Raw


class Reply(Struct, frozen=True, tag="reply"):
    """What the function of a call returned or raised."""

    id: str
    value: msgspec.Raw = msgspec.Raw(b"null")
    error: msgspec.Raw = msgspec.Raw(b"null")

    @property
    def failed(self) -> bool:
        """Whether it raised."""
        return bytes(self.error) != b"null"


FromBox: TypeAlias = Hello | Piece | Gone | Whole | Queue | Machine | Reply
to_box_decoder: msgspec.json.Decoder[ToBox] = msgspec.json.Decoder(ToBox)
from_box_decoder: msgspec.json.Decoder[FromBox] = msgspec.json.Decoder(FromBox)


def line(message: ToBox | FromBox) -> bytes:
    """Encode a message as one line, newline included."""
    return msgspec.json.encode(message) + b"\n"


def to_json(value: object) -> msgspec.Raw:
    """Encode a value of this program: structs, dataclasses, paths and errors."""
    return msgspec.Raw(msgspec.json.encode(msgspec.to_builtins(value, enc_hook=_encode)))


def from_json(encoded: bytes | msgspec.Raw, kind: Any) -> Any:
    """Decode a value of this type. Raises msgspec.MsgspecError."""
    return from_builtins(msgspec.json.decode(encoded), kind)


def from_builtins(value: object, kind: Any) -> Any:
    """Return a decoded value as this type. Raises msgspec.MsgspecError."""
    return msgspec.convert(value, kind, dec_hook=_decode)


def arguments_of(function: Callable[..., object], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the arguments of a call by the names of its parameters, but those that a box finds itself."""
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    return {name: value for name, value in given.items() if not hasattr(value, READ_THERE)}


def result_type(function: Callable[..., object]) -> Any:
    """Return the type that a function returns."""
    return typing.get_type_hints(function)["return"]


def call_function(name: str, encoded: msgspec.Raw) -> msgspec.Raw:
    """Call a function of this program by its import path. Raises what it raises, and UserError."""
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
        # A class that says how it is made again keeps what it adds; of others a plain error is left.
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
    """Return an error as its class, if this process knows that; nothing is imported for a name from there.

    Raises msgspec.ValidationError for what is no error of this program.
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
