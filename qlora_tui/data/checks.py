"""Checks on a conversation that can be read, and on the samples made from it.

Each finding is a kind of ``problems.CHECKS`` and an example. ``row_result`` calls them for each row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from qlora_tui.data.conversation import Conversation, Message
from qlora_tui.data.sample_tokens import TokenizedSample
from qlora_tui.data.tokenizer import ChatTokenizer

Finding = tuple[str, str]
"""Kind and example."""

_ALLOWED_AFTER: dict[str, tuple[str, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("assistant", "tool"),
}

_CALL_MARKS = ("<tool_call>", "<functioncall>", "<function_call>", "<function=", "[TOOL_CALLS]")

_CONTROL_CHARACTERS = "[\\x00-\\x08\\x0b\\x0e-\\x1f]"
"""Control characters that no text needs."""
_CONTROL = re.compile(_CONTROL_CHARACTERS)
_DAMAGE = re.compile(
    "\ufffd"  # what decoders write for invalid bytes
    "|\u00c3[\u0080-\u00bf\u0192\u201a\u2030\u0152\u0160\u0161\u0153]"  # Ã©: UTF-8 read as Latin-1
    "|\u00e2\u20ac[\u2122\u0153\u009d\u201c\u201d\u02dc\u00a6\u00a2]"  # â€™: the same for quotes, dashes
    "|\u00c2[\u00a0-\u00bf](?![\u00c0-\u024f])"  # Â°
    "|" + _CONTROL_CHARACTERS
)

_SECRETS = re.compile(
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"
    r"|\bAKIA[0-9A-Z]{16}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{36,}\b"
    r"|\bgithub_pat_[A-Za-z0-9_]{50,}\b"
    r"|\bhf_[A-Za-z0-9]{30,}\b"
    r"|\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}\b"
    r"|\bxox[abprs]-[A-Za-z0-9-]{20,}\b"
    r"|\bAIza[0-9A-Za-z_-]{35}\b"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"
)
_SECRET_MARKS = (
    *("-----BEGIN", "AKIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
    *("hf_", "sk-", "xox", "AIza", "eyJ"),
)
"""Substrings that every secret contains: searching for them is a hundred times faster than the pattern."""
_SECRET_MARKS_WITHOUT_LINE = tuple(mark for mark in _SECRET_MARKS if "_" not in mark)
_SECRET_SHOWN_CHARACTERS = 6


def conversation_findings(conversation: Conversation) -> Iterator[Finding]:
    """Yield the findings on a conversation that need no tokenizer."""
    disorder = _disorder(conversation)
    if disorder:
        yield "role-order", disorder
    for number, message in enumerate(conversation.messages, 1):
        if message.role == "assistant" and not (
            message.content.strip() or message.tool_calls or message.reasoning
        ):
            yield "empty-answer", f"Turn {number} is empty."
            break
    if conversation.messages and conversation.messages[-1].role == "user":
        yield "ends-with-user", f"Turn {len(conversation.messages)}, the last, is the user's."
    text = conversation.text or "\n".join(m.content for m in conversation.messages)
    damage = (_CONTROL if text.isascii() else _DAMAGE).search(text)
    if damage:
        yield "encoding-damage", text[max(0, damage.start() - 30) : damage.end() + 30]
    marks = _SECRET_MARKS if "_" in text else _SECRET_MARKS_WITHOUT_LINE
    secret = _SECRETS.search(text) if any(map(text.__contains__, marks)) else None
    if secret:
        yield "secret", f"{secret[0][:_SECRET_SHOWN_CHARACTERS]}… ({len(secret[0])} characters)"


def sample_findings(
    tokenizer: ChatTokenizer, conversation: Conversation, rendered: Sequence[TokenizedSample], train_on: str
) -> Iterator[Finding]:
    """Yield the findings on the samples of a conversation, before any truncation."""
    notes = rendered[0].notes
    if "control-tokens" in notes:
        yield "control-tokens", _control_token(tokenizer, conversation)
    if "answer-changed" in notes:
        yield "answer-changed", conversation.answers[-1].content if conversation.answers else ""
    for sample in rendered:
        ids = sample.token_ids
        if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id, tokenizer.bos_id]:
            yield "double-bos", tokenizer.decode(ids[:8])
        if train_on != "assistant" or not conversation.messages:
            continue
        if 0 not in sample.loss_mask:
            yield "everything-trained", tokenizer.decode(ids[:60])
        if 1 in sample.loss_mask and not _ends_in_the_loss(tokenizer, sample):
            end = tokenizer.turn_end_ids[-1] if tokenizer.turn_end_ids else None
            kind = "pad-hides-end" if end is not None and end == tokenizer.pad_id else "turn-end-untrained"
            yield kind, tokenizer.decode(ids[-20:])


def _disorder(conversation: Conversation) -> str:
    """Return which turn is out of order; empty if none is."""
    before = ""
    for number, message in enumerate(conversation.messages, 1):
        if message.role not in _ALLOWED_AFTER[before]:
            shown = "a tool call" if before == "call" else before or "nothing"
            return f"Turn {number} is {message.role}, after {shown}."
        before = "call" if _calls(message) else message.role
    return ""


def _calls(message: Message) -> bool:
    """Return whether a turn calls a tool, also in its text as in the Hermes and Glaive data sets."""
    return bool(message.tool_calls) or (
        message.role == "assistant" and any(mark in message.content for mark in _CALL_MARKS)
    )


def _ends_in_the_loss(tokenizer: ChatTokenizer, sample: TokenizedSample) -> bool:
    """Return whether the last span in the loss ends with a special token, ignoring white space."""
    last = sample.loss_mask.rindex(1)
    first = sample.loss_mask.rfind(b"\x00", 0, last) + 1
    for token in reversed(sample.token_ids[first : last + 1]):
        if token in tokenizer.special_ids:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False


def _control_token(tokenizer: ChatTokenizer, conversation: Conversation) -> str:
    for text in (conversation.text, *(m.content for m in conversation.messages)):
        match = tokenizer.control_pattern.search(text)
        if match:
            return text[max(0, match.start() - 40) : match.end() + 40]
    return "In the tools, a tool call or the thoughts."
