"""Messages between the app and the engine: JSON lines, one envelope each. Loads no torch.

A request is sent as :class:`RequestEnvelope` on the engine's stdin. Each reply carries the request's number,
and exactly one ``final`` reply ends it. The engine handles one request at a time, except for chat answers,
which are generated concurrently.

The engine's log, which both sides name, is here too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, ClassVar, TypeAlias

import msgspec
from msgspec import Struct

from qlora_tui.chat.chat_types import ChatSource, Effect, GenerationResult, Sampling, ThinkingSupport
from qlora_tui.data.conversation import Message
from qlora_tui.data.dataset_report import Report, Shown
from qlora_tui.data.sources import FormatChoice
from qlora_tui.data.thought_splitter import TextChunk
from qlora_tui.errors import UserError
from qlora_tui.paths import state_dir
from qlora_tui.recipe.schema import Data, Source, Thinking


class EngineRequest(Struct, frozen=True, kw_only=True, tag_field="ask", omit_defaults=True):
    """A request to the engine."""


class LoadChat(EngineRequest, frozen=True, kw_only=True, tag="load_chat"):
    """Load a model for chat, replacing the current one. Replies: StatusUpdate…, then ChatReady."""

    source: ChatSource


class Generate(EngineRequest, frozen=True, kw_only=True, tag="generate"):
    """Answer a conversation with the loaded model. Replies: Text…, then GenerationDone."""

    messages: tuple[Message, ...]
    adapter_name: str
    """One of the source's adapters: ``base``, ``adapter``, ``step-120``."""
    sampling: Sampling = Sampling()
    thinking: Thinking = "auto"


class MeasureEffect(EngineRequest, frozen=True, kw_only=True, tag="measure_effect"):
    """Compare an adapter with its base on held-out data. Replies: StatusUpdate…, then EffectMeasured.

    A Stop ends it early, with the samples compared so far.
    """

    adapter_name: str


class CountTokens(EngineRequest, frozen=True, kw_only=True, tag="count_tokens"):
    """Count the tokens of a text with the tokenizer of the loaded model. Reply: TokensCounted."""

    text: str


class Unload(EngineRequest, frozen=True, kw_only=True, tag="unload"):
    """Free the memory of the model. Reply: Unloaded."""


class InspectData(EngineRequest, frozen=True, kw_only=True, tag="inspect_data"):
    """Inspect a data file. Replies: DataReport…, each more complete than the last, then DataInspected."""

    source: Source
    data: Data
    """Settings that decide what is truncated and trained."""
    model: str = ""
    """Model whose tokens are counted; empty counts characters."""
    template: str = "auto"


class ShowRow(EngineRequest, frozen=True, kw_only=True, tag="show_row"):
    """One row as the model will see it. Reply: RowShown."""

    source: Source
    row: int
    path: str = ""
    """File of the source; empty is its first."""
    data: Data
    model: str = ""
    """Model whose tokenizer and template are used; empty shows the row as in the file."""
    template: str = "auto"


class ShowFields(EngineRequest, frozen=True, kw_only=True, tag="show_fields"):
    """Show the columns of a file of unknown format. Reply: FieldsShown."""

    source: Source


class ShowFormats(EngineRequest, frozen=True, kw_only=True, tag="show_formats"):
    """Try the first rows of a source's first file in every format. Reply: FormatsShown."""

    source: Source
    preferences: str
    """The recipe's ``data.preferences``."""


class Stop(EngineRequest, frozen=True, kw_only=True, tag="stop"):
    """Stop the answer to an earlier request at once; that request's GenerationDone is the reply."""

    request_number: int
    """Number of the request to stop."""


class EngineReply(Struct, frozen=True, kw_only=True, tag_field="reply", omit_defaults=True):
    """A reply of the engine, or a part of one."""

    final: ClassVar[bool] = True
    """Whether it is the last reply to its request."""


class StatusUpdate(EngineReply, frozen=True, kw_only=True, tag="stage"):
    """Current activity, for display: ``Loading SmolLM2-135M-Instruct``."""

    final: ClassVar[bool] = False
    words: str


class ChatReady(EngineReply, frozen=True, kw_only=True, tag="chat_ready"):
    """The model is loaded."""

    adapter_names: tuple[str, ...]
    device: str
    """``NVIDIA GeForce RTX 4090``, or the CPU's name."""
    dtype: str
    context_tokens: int
    seconds: float
    memory_bytes: int
    """Memory used by the model: of the GPU, or of the host without one."""
    thinking: ThinkingSupport = ThinkingSupport()


class Text(EngineReply, frozen=True, kw_only=True, tag="text"):
    """The next piece of an answer, or of the reasoning before it."""

    final: ClassVar[bool] = False
    chunk: TextChunk


class GenerationDone(EngineReply, frozen=True, kw_only=True, tag="done"):
    """An answer is complete, or was stopped."""

    outcome: GenerationResult


class EffectMeasured(EngineReply, frozen=True, kw_only=True, tag="effect_measured"):
    """Effect of the adapter; ``effect.sentence`` describes it."""

    effect: Effect


class TokensCounted(EngineReply, frozen=True, kw_only=True, tag="tokens_counted"):
    """Tokens of a text, without those of a chat template."""

    tokens: int


class Unloaded(EngineReply, frozen=True, kw_only=True, tag="unloaded"):
    """No model is loaded."""


class DataReport(EngineReply, frozen=True, kw_only=True, tag="data_report"):
    """Report on the rows read so far."""

    final: ClassVar[bool] = False
    report: Report


class DataInspected(EngineReply, frozen=True, kw_only=True, tag="data_inspected"):
    """Every row was read, or the request was stopped."""

    report: Report | None


class RowShown(EngineReply, frozen=True, kw_only=True, tag="row_shown"):
    """One row as the model will see it."""

    shown: Shown


class FieldsShown(EngineReply, frozen=True, kw_only=True, tag="fields_shown"):
    """Columns of a file."""

    fields: dict[str, str]
    """Column name to the beginning of its value in the first row that has it."""


class FormatsShown(EngineReply, frozen=True, kw_only=True, tag="formats_shown"):
    """What each format reads of a file."""

    choices: tuple[FormatChoice, ...]


class Failure(EngineReply, frozen=True, kw_only=True, tag="failure"):
    """The request failed. :class:`EngineClient` raises it as the UserError it carries."""

    title: str
    what: str
    why: str = ""
    fix: str = ""
    code: str = ""
    exit_code: int = 1

    @classmethod
    def of(cls, problem: UserError) -> Failure:
        """Convert a UserError to a reply."""
        return cls(**problem.fields())

    def problem(self) -> UserError:
        """Convert the reply back to a UserError."""
        return UserError.of(self)


AnyRequest: TypeAlias = (
    LoadChat
    | Generate
    | MeasureEffect
    | CountTokens
    | Unload
    | InspectData
    | ShowRow
    | ShowFields
    | ShowFormats
    | Stop
)
AnyReply: TypeAlias = (
    StatusUpdate
    | ChatReady
    | Text
    | GenerationDone
    | EffectMeasured
    | TokensCounted
    | Unloaded
    | DataReport
    | DataInspected
    | RowShown
    | FieldsShown
    | FormatsShown
    | Failure
)


class RequestEnvelope(Struct, frozen=True):
    """A numbered request: one line."""

    number: int
    request: AnyRequest


class ReplyEnvelope(Struct, frozen=True):
    """A reply to the request of that number: one line."""

    number: int
    reply: AnyReply


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
