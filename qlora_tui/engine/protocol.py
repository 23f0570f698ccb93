"""Messages between the app and the engine: JSON lines, one envelope each. Loads no torch.

A request is sent as :class:`RequestEnvelope` on the engine's stdin; its class names the types of its parts
and of its result. Each reply is a :data:`Message` with the request's number: any number of status lines and
parts, then the result or a failure. The engine handles one request at a time, except for chat answers and
completions, which are generated concurrently.

The engine's log, which both sides name, is here too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any, Generic, Never, TypeAlias, TypeVar, get_args

import msgspec
from msgspec import Struct

from qlora_tui.chat.chat_types import ChatSource, Decided, Effect, GenerationResult, Sampling, ThinkingSupport
from qlora_tui.chat.completion_types import Completion, CompletionPart, CompletionResult
from qlora_tui.data.conversation import Message as ChatMessage
from qlora_tui.data.dataset_report import Report, Shown
from qlora_tui.data.sources import FormatChoice
from qlora_tui.data.thought_splitter import TextChunk
from qlora_tui.paths import state_dir
from qlora_tui.recipe.schema import Data, Source, Thinking
from qlora_tui.worker import Failure, Progress, Result

PartT = TypeVar("PartT")
ResultT = TypeVar("ResultT")


class ChatReady(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The model that was loaded for chat."""

    adapter_names: tuple[str, ...]
    device: str
    """``NVIDIA GeForce RTX 4090``, or the CPU's name."""
    dtype: str
    context_tokens: int
    seconds: float
    memory_bytes: int
    """Memory used by the model: of the GPU, or of the host without one."""
    thinking: ThinkingSupport = ThinkingSupport()
    decides: bool = False
    """Whether answers of its adapters are decisions."""
    writes_tools: bool = False
    """Whether the chat template writes tools; otherwise they are described in the system prompt."""


class EngineRequest(
    Struct, Generic[PartT, ResultT], frozen=True, kw_only=True, tag_field="ask", omit_defaults=True
):
    """A request to the engine, whose reply has any number of parts and a result."""


class LoadChat(EngineRequest[Never, ChatReady], frozen=True, kw_only=True, tag="load_chat"):
    """Load a model for chat, replacing the current one."""

    source: ChatSource


class OfferAdapters(EngineRequest[Never, None], frozen=True, kw_only=True, tag="offer_adapters"):
    """Replace the list of adapters that the loaded model can be asked with."""

    adapters: dict[str, str]
    """Folder of each by name."""


class Generate(EngineRequest[TextChunk, GenerationResult], frozen=True, kw_only=True, tag="generate"):
    """Answer a conversation with the loaded model, piece by piece."""

    messages: tuple[ChatMessage, ...]
    adapter_name: str
    """One of the source's adapters: ``base``, ``adapter``, ``step-120``."""
    sampling: Sampling = Sampling()
    thinking: Thinking = "auto"


class Complete(EngineRequest[CompletionPart, CompletionResult], frozen=True, kw_only=True, tag="complete"):
    """Answer a program. Requests to one adapter are computed together."""

    completion: Completion


class Decide(EngineRequest[Never, Decided], frozen=True, kw_only=True, tag="decide"):
    """Say how probable each option is as the answer to a conversation, if answers are decisions."""

    messages: tuple[ChatMessage, ...]
    adapter_name: str


class MeasureEffect(EngineRequest[Never, Effect], frozen=True, kw_only=True, tag="measure_effect"):
    """Compare an adapter with its base on held-out data.

    A Stop ends it early, with the samples compared so far.
    """

    adapter_name: str


class CountTokens(EngineRequest[Never, int], frozen=True, kw_only=True, tag="count_tokens"):
    """Count the tokens of a text, without those of a chat template, by the loaded model's tokenizer."""

    text: str


class Unload(EngineRequest[Never, None], frozen=True, kw_only=True, tag="unload"):
    """Free the memory of the model."""


class InspectData(EngineRequest[Report, Report | None], frozen=True, kw_only=True, tag="inspect_data"):
    """Inspect a data file, in reports that are each more complete than the last.

    The result is None if the request was stopped before the first report.
    """

    source: Source
    data: Data
    """Settings that decide what is truncated and trained."""
    model: str = ""
    """Model whose tokens are counted; empty counts characters."""
    template: str = "auto"


class ShowRow(EngineRequest[Never, Shown], frozen=True, kw_only=True, tag="show_row"):
    """Show one row as the model will see it."""

    source: Source
    row: int
    path: str = ""
    """File of the source; empty is its first."""
    data: Data
    model: str = ""
    """Model whose tokenizer and template are used; empty shows the row as in the file."""
    template: str = "auto"


class ShowFields(EngineRequest[Never, dict[str, str]], frozen=True, kw_only=True, tag="show_fields"):
    """Show the columns of a file of unknown format, with the beginning of the first value of each."""

    source: Source


class ShowFormats(
    EngineRequest[Never, tuple[FormatChoice, ...]], frozen=True, kw_only=True, tag="show_formats"
):
    """Try the first rows of a source's first file in every format."""

    source: Source
    preferences: str
    """The recipe's ``data.preferences``."""


class Stop(EngineRequest[Never, Never], frozen=True, kw_only=True, tag="stop"):
    """Stop an earlier request at once, whose result is the reply."""

    request_number: int
    """Number of the request to stop."""


AnyRequest: TypeAlias = (
    LoadChat
    | OfferAdapters
    | Generate
    | Complete
    | Decide
    | MeasureEffect
    | CountTokens
    | Unload
    | InspectData
    | ShowRow
    | ShowFields
    | ShowFormats
    | Stop
)


class Part(Struct, frozen=True, tag="part"):
    """A part of the reply to a request."""

    value: msgspec.Raw


Message: TypeAlias = Progress | Part | Result | Failure


class RequestEnvelope(Struct, frozen=True):
    """A numbered request: one line."""

    number: int
    request: AnyRequest


class ReplyEnvelope(Struct, frozen=True):
    """A reply to the request of that number: one line."""

    number: int
    reply: Message


_encoder = msgspec.json.Encoder()
_request_decoder = msgspec.json.Decoder(RequestEnvelope)
_reply_decoder = msgspec.json.Decoder(ReplyEnvelope)


def encode(envelope: RequestEnvelope | ReplyEnvelope) -> bytes:
    """Encode an envelope as one line, newline included."""
    return _encoder.encode(envelope) + b"\n"


def decode_request(line: bytes) -> RequestEnvelope:
    """Decode a request; raises msgspec.MsgspecError if it is not valid."""
    return _request_decoder.decode(line)


def decode_reply(line: bytes) -> ReplyEnvelope:
    """Decode a reply; raises msgspec.MsgspecError if it is not valid."""
    return _reply_decoder.decode(line)


def encode_value(value: object) -> msgspec.Raw:
    """Encode the value of a part or a result."""
    return msgspec.Raw(_encoder.encode(value))


def decode_value(message: Part | Result, request: EngineRequest[Any, Any]) -> Any:
    """Decode the value of a part or a result, which has the type that the request's class names."""
    (base,) = type(request).__orig_bases__  # type: ignore[attr-defined]  # of each class with a generic base
    part, result = get_args(base)
    return msgspec.json.decode(message.value, type=part if isinstance(message, Part) else result)


_ENOUGH_BYTES = 1 << 20


def log_path() -> Path:
    """Path of the output of the engine and its libraries."""
    return state_dir() / "engine.log"


def truncated_log() -> Path:
    """Return the log's path, after emptying a log that is too large."""
    path = log_path()
    if path.exists() and path.stat().st_size > _ENOUGH_BYTES:
        path.write_bytes(b"")
    return path


def open_log() -> IO[bytes]:
    """Open the log for appending, or the null device: an unwritable log must not stop the engine."""
    try:
        return truncated_log().open("ab")
    except OSError:
        return Path(os.devnull).open("ab")
