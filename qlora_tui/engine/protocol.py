"""Messages between the app and the engine: JSON lines, one envelope each. Loads no torch.

A request travels as :class:`RequestEnvelope` on the engine's stdin. Each reply carries the request's number,
and exactly one ``final`` reply ends it. The engine handles one request at a time, except for chat answers,
which are generated side by side.
"""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import msgspec
from msgspec import Struct

from qlora_tui.chat.chat_types import ChatSource, GenerationResult, Sampling, TextChunk, ThinkingSupport
from qlora_tui.chat.effect import Effect
from qlora_tui.data.conversation import Message
from qlora_tui.data.dataset_report import Report, Shown
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Data, Source, Thinking


class EngineRequest(Struct, frozen=True, kw_only=True, tag_field="ask", omit_defaults=True):
    """A question to the engine."""


class LoadChat(EngineRequest, frozen=True, kw_only=True, tag="load_chat"):
    """Hold this model ready to talk, in place of the one held. Replies: Stage…, then ChatReady."""

    source: ChatSource


class Generate(EngineRequest, frozen=True, kw_only=True, tag="generate"):
    """Answer a conversation with the model that is loaded. Replies: Text…, then Done."""

    messages: tuple[Message, ...]
    adapter_name: str
    """One of the source's voices: ``base``, ``adapter``, ``step-120``."""
    sampling: Sampling = Sampling()
    thinking: Thinking = "auto"


class MeasureEffect(EngineRequest, frozen=True, kw_only=True, tag="measure_effect"):
    """Compare a voice of the loaded model with its base on held-out data. Replies: Stage…, EffectMeasured.

    A Stop ends it early, with what was compared so far.
    """

    adapter_name: str


class Unload(EngineRequest, frozen=True, kw_only=True, tag="unload"):
    """Give back the memory of the model. Reply: Unloaded."""


class InspectData(EngineRequest, frozen=True, kw_only=True, tag="inspect_data"):
    """Look a data file over. Replies: DataReport…, each better than the last, then DataInspected."""

    source: Source
    data: Data
    """The settings that decide what is cut and trained."""
    model: str = ""
    """Count in this model's tokens; empty counts characters."""
    template: str = "auto"


class ShowRow(EngineRequest, frozen=True, kw_only=True, tag="show_row"):
    """One row as the model will see it. Reply: RowShown."""

    source: Source
    row: int
    path: str = ""
    """Which file of the source; empty is its first."""
    data: Data
    model: str = ""
    """Empty shows the row as the file has it."""
    template: str = "auto"


class ShowFields(EngineRequest, frozen=True, kw_only=True, tag="show_fields"):
    """What the rows of a file hold whose format nobody knows. Reply: FieldsShown."""

    source: Source


class Stop(EngineRequest, frozen=True, kw_only=True, tag="stop"):
    """End the answer to an earlier question at once; that question's Done is the reply."""

    request_number: int
    """The number of that question."""


class EngineReply(Struct, frozen=True, kw_only=True, tag_field="reply", omit_defaults=True):
    """An answer of the engine, or a part of one."""

    final: ClassVar[bool] = True
    """Whether nothing more follows."""


class StatusUpdate(EngineReply, frozen=True, kw_only=True, tag="stage"):
    """What is being done, for the one who waits: ``Loading SmolLM2-135M-Instruct``."""

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
    """Memory the model takes: of the card, or of the host where there is none."""
    thinking: ThinkingSupport = ThinkingSupport()


class Text(EngineReply, frozen=True, kw_only=True, tag="text"):
    """The next piece of an answer, or of a thought before it."""

    final: ClassVar[bool] = False
    chunk: TextChunk


class GenerationDone(EngineReply, frozen=True, kw_only=True, tag="done"):
    """An answer is complete, or was stopped."""

    outcome: GenerationResult


class EffectMeasured(EngineReply, frozen=True, kw_only=True, tag="effect_measured"):
    """What the adapter does; ``effect.sentence`` says it in words."""

    effect: Effect


class Unloaded(EngineReply, frozen=True, kw_only=True, tag="unloaded"):
    """No model is held."""


class DataReport(EngineReply, frozen=True, kw_only=True, tag="data_report"):
    """What is known of the data so far."""

    final: ClassVar[bool] = False
    report: Report


class DataInspected(EngineReply, frozen=True, kw_only=True, tag="data_inspected"):
    """Every row was read, or the question was stopped."""

    report: Report | None


class RowShown(EngineReply, frozen=True, kw_only=True, tag="row_shown"):
    """The row."""

    shown: Shown


class FieldsShown(EngineReply, frozen=True, kw_only=True, tag="fields_shown"):
    """The columns there are."""

    fields: dict[str, str]
    """Column to the beginning of what the first row with it holds."""


class Failure(EngineReply, frozen=True, kw_only=True, tag="failure"):
    """It cannot be done. :class:`EngineClient` raises it as the UserError it is."""

    title: str
    what: str
    why: str = ""
    fix: str = ""
    exit_code: int = 1

    @classmethod
    def of(cls, problem: UserError) -> Failure:
        """To send a UserError."""
        return cls(
            title=problem.title,
            what=problem.what,
            why=problem.why,
            fix=problem.fix,
            exit_code=problem.exit_code,
        )

    def problem(self) -> UserError:
        """To raise it again at the other end."""
        return UserError(self.title, what=self.what, why=self.why, fix=self.fix, exit_code=self.exit_code)


AnyRequest: TypeAlias = (
    LoadChat | Generate | MeasureEffect | Unload | InspectData | ShowRow | ShowFields | Stop
)
AnyReply: TypeAlias = (
    StatusUpdate
    | ChatReady
    | Text
    | GenerationDone
    | EffectMeasured
    | Unloaded
    | DataReport
    | DataInspected
    | RowShown
    | FieldsShown
    | Failure
)


class RequestEnvelope(Struct, frozen=True):
    """A numbered question: one line."""

    number: int
    request: AnyRequest


class ReplyEnvelope(Struct, frozen=True):
    """A reply to the question of that number: one line."""

    number: int
    reply: AnyReply


_encoder = msgspec.json.Encoder()
_request_decoder = msgspec.json.Decoder(RequestEnvelope)
_reply_decoder = msgspec.json.Decoder(ReplyEnvelope)


def encode(envelope: RequestEnvelope | ReplyEnvelope) -> bytes:
    """One line, newline included."""
    return _encoder.encode(envelope) + b"\n"


def decode_request(line: bytes) -> RequestEnvelope:
    """Raises msgspec.MsgspecError for what is no question."""
    return _request_decoder.decode(line)


def decode_reply(line: bytes) -> ReplyEnvelope:
    """Raises msgspec.MsgspecError for what is no reply."""
    return _reply_decoder.decode(line)
