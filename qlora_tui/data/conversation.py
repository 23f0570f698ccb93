"""What a conversation is, whatever file it came from."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

Role = Literal["system", "user", "assistant", "tool"]


class ToolCall(Struct, frozen=True):
    """One function the assistant asks for."""

    name: str
    arguments: Any = {}
    """The parsed JSON, nearly always an object."""
    id: str = ""


class Message(Struct, frozen=True):
    """One turn."""

    role: Role
    content: str
    train: bool = True
    """Whether the model learns to say it; looked at for assistant turns only."""
    reasoning: str = ""
    """What the assistant thought before it answered, where the file keeps that apart from the answer."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    """Which call a tool turn answers."""
    name: str = ""
    """The tool that answers, for a tool turn."""
    weight: float = 1.0
    """How much each of its tokens counts in the loss, as the file says; 0 is not to train it."""


class Conversation(Struct, frozen=True):
    """One row of a data file."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """Functions offered to the assistant, as JSON schemas in OpenAI's wrapping."""
    text: str = ""
    """Plain text to continue; then there are no messages."""
    source: int = 0
    """Index of the recipe's source."""
    row: int = 0
    """Its number in the file, from 1; the line number in JSONL and text files."""

    @property
    def answers(self) -> list[Message]:
        """The assistant turns that train."""
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
