"""Messages between the app and the engine: JSON lines, one envelope each. Loads no torch.

A request is sent as :class:`RequestEnvelope` on the engine's stdin. The class of the request determines the
types of the parts and of the result in the reply. A reply consists of several :data:`Message` objects with
the number of the request: any number of status lines and parts, then the result or a failure. The engine
handles one request at a time, except for chat answers, completions and inspections of data, which proceed
concurrently.

This module also has the path of the engine's log, which both sides use.
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
    """Name of the GPU, such as ``NVIDIA GeForce RTX 4090``, or of the CPU."""
    dtype: str
    context_tokens: int
    seconds: float
    memory_bytes: int
    """Memory used by the model, on the GPU if there is one, otherwise on the host."""
    thinking: ThinkingSupport = ThinkingSupport()
    decides: bool = False
    """Whether the adapters answer with decisions."""


class EngineRequest(
    Struct, Generic[PartT, ResultT], frozen=True, kw_only=True, tag_field="ask", omit_defaults=True
):
    """A request to the engine. Its reply has any number of parts, and then a result."""


class LoadChat(EngineRequest[Never, ChatReady], frozen=True, kw_only=True, tag="load_chat"):
    """Load a model for chat, replacing the current one."""

    source: ChatSource


class OfferAdapters(EngineRequest[Never, None], frozen=True, kw_only=True, tag="offer_adapters"):
    """Replace the adapters that can be used with the loaded model."""

    adapters: dict[str, str]
    """Folder of each adapter, by name."""


class Generate(EngineRequest[TextChunk, GenerationResult], frozen=True, kw_only=True, tag="generate"):
    """Request to answer a conversation with the loaded model. The answer is streamed."""

    messages: tuple[ChatMessage, ...]
    adapter_name: str
    """Name of what answers: ``base``, or an adapter or GGUF file of the source, such as ``adapter`` or
    ``step-120``.
    """
    sampling: Sampling = Sampling()
    thinking: Thinking = "auto"


class Complete(EngineRequest[CompletionPart, CompletionResult], frozen=True, kw_only=True, tag="complete"):
    """Compute a completion for a program. Completions by the same adapter are computed together."""

    completion: Completion


class Decide(EngineRequest[Never, Decided], frozen=True, kw_only=True, tag="decide"):
    """Return the probability of each option as the answer to a conversation. Fails if no options are known
    for the adapter.
    """

    messages: tuple[ChatMessage, ...]
    adapter_name: str


class MeasureEffect(EngineRequest[Never, Effect], frozen=True, kw_only=True, tag="measure_effect"):
    """Compare an adapter with its base on held-out data.

    A Stop ends the comparison early, with the samples compared so far.
    """

    adapter_name: str


class CountTokens(EngineRequest[Never, int], frozen=True, kw_only=True, tag="count_tokens"):
    """Count the tokens of a text with the loaded model's tokenizer, without a chat template."""

    text: str


class Unload(EngineRequest[Never, None], frozen=True, kw_only=True, tag="unload"):
    """Unload the model and free its memory."""


class InspectData(EngineRequest[Report, Report | None], frozen=True, kw_only=True, tag="inspect_data"):
    """Inspect a source of data. The parts are increasingly complete reports.

    A Stop ends the inspection at the next report, which is then the result.
    """

    source: Source
    data: Data
    """Data settings, which determine what is truncated and trained."""
    model: str = ""
    """Model whose tokens are counted. If empty, characters are counted."""
    template: str = "auto"


class ShowRow(EngineRequest[Never, Shown], frozen=True, kw_only=True, tag="show_row"):
    """Show one row as the model will see it."""

    source: Source
    row: int
    path: str = ""
    """File of the source; empty for its first file."""
    data: Data
    model: str = ""
    """Model whose tokenizer and template are used. If empty, the row is shown as in the file."""
    template: str = "auto"


class ShowFields(EngineRequest[Never, dict[str, str]], frozen=True, kw_only=True, tag="show_fields"):
    """Show the columns of a file of unknown format, with the beginning of the first value of each."""

    source: Source


class ShowFormats(
    EngineRequest[Never, tuple[FormatChoice, ...]], frozen=True, kw_only=True, tag="show_formats"
):
    """Read the first rows of a source's first file, once as each format."""

    source: Source
    preferences: str
    """The recipe's ``data.preferences``."""


class Stop(EngineRequest[Never, Never], frozen=True, kw_only=True, tag="stop"):
    """Stop an earlier request at once. Only the stopped request is answered, with its result so far."""

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
    """A request with its number, as one line."""

    number: int
    request: AnyRequest


class ReplyEnvelope(Struct, frozen=True):
    """A reply with the number of its request, as one line."""

    number: int
    reply: Message


_encoder = msgspec.json.Encoder()
_request_decoder = msgspec.json.Decoder(RequestEnvelope)
_reply_decoder = msgspec.json.Decoder(ReplyEnvelope)


def encode(envelope: RequestEnvelope | ReplyEnvelope) -> bytes:
    """Encode an envelope as one line, including the newline."""
    return _encoder.encode(envelope) + b"\n"


def decode_request(line: bytes) -> RequestEnvelope:
    """Decode a request. Raises msgspec.MsgspecError if it is invalid."""
    return _request_decoder.decode(line)


def decode_reply(line: bytes) -> ReplyEnvelope:
    """Decode a reply. Raises msgspec.MsgspecError if it is invalid."""
    return _reply_decoder.decode(line)


def encode_value(value: object) -> msgspec.Raw:
    """Encode the value of a part or a result."""
    return msgspec.Raw(_encoder.encode(value))


def decode_value(message: Part | Result, request: EngineRequest[Any, Any]) -> Any:
    """Decode the value of a part or a result, whose type the request's class determines."""
    (base,) = type(request).__orig_bases__  # type: ignore[attr-defined]  # of each class with a generic base
    part, result = get_args(base)
    return msgspec.json.decode(message.value, type=part if isinstance(message, Part) else result)


_ENOUGH_BYTES = 1 << 20


def log_path() -> Path:
    """Return the path of the log of the engine and its libraries."""
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
