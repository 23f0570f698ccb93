"""Conversation types, independent of the file format."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

Role = Literal["system", "user", "assistant", "tool"]


class ToolCall(Struct, frozen=True):
    """One function call by the assistant."""

    name: str
    arguments: Any = {}
    """The parsed JSON arguments: an object in a row of data, any value in a generated answer."""
    id: str = ""


class Message(Struct, frozen=True):
    """One turn of a conversation."""

    role: Role
    content: str
    train: bool = True
    """Whether the model learns to say this turn; used for assistant turns only."""
    reasoning: str = ""
    """The assistant's reasoning before the answer, where the file stores it separately."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    """Id of the call that a tool turn answers."""
    name: str = ""
    """Name of the tool that answers, for a tool turn."""
    weight: float = 1.0
    """Loss weight of each of its tokens, from the file; 0 excludes the turn from training."""


class Conversation(Struct, frozen=True):
    """One row of a data file."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """Functions offered to the assistant, as JSON schemas in OpenAI's wrapping."""
    text: str = ""
    """Plain text to continue; messages are then empty."""
    source: int = 0
    """Index of the recipe's source."""
    row: int = 0
    """Row number in the file, from 1; the line number in JSONL and text files."""
    rejected: tuple[Conversation, ...] = ()
    """The same conversation with a rejected answer, where a run trains on both."""
    rated_good: bool | None = None
    """Whether its answer is rated good, where a run trains on ratings."""

    @property
    def answers(self) -> list[Message]:
        """Return the assistant turns in the loss."""
        return [m for m in self.messages if m.role == "assistant" and m.train]


class RowRejectedError(Exception):
    """A row that cannot become a conversation, or that a template cannot render.

    ``kind`` names the check (see ``problems.CHECKS``); the message is the reason.
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind
        self.reason = reason

    def __reduce__(self) -> tuple[type[RowRejectedError], tuple[str, str]]:
        return (RowRejectedError, (self.kind, self.reason))
