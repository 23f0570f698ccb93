"""What may be wrong with a conversation that can be read and rendered."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_tui.data.conversation import Conversation


def conversation_findings(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Kind (see ``problems.CHECKS``) and example of each thing found."""
    disorder = _disorder(conversation)
    if disorder:
        yield "role-order", disorder


def _disorder(conversation: Conversation) -> str:
    """Which turn is out of order; empty if none is."""
    allowed = {
        "": ("system", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "assistant": ("user",),
        "called": ("tool",),
        "tool": ("assistant", "tool"),
    }
    before = ""
    for number, message in enumerate(conversation.messages, 1):
        if message.role not in allowed[before]:
            return f"Turn {number} is {message.role}, after {before or 'nothing'}."
        before = "called" if message.tool_calls else message.role
    return ""
