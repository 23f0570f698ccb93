"""What a template cannot say is written into the text of a turn, and nothing of the turn is lost."""

from __future__ import annotations

import pytest

from qlora_tui.data.conversation import Conversation, Message, ToolCall
from qlora_tui.data.render import render
from tests.data.families import family

CALL = (ToolCall("rain", {"at": "Oslo"}),)
WRITTEN = '<tool_call>\n{"name": "rain", "arguments": {"at": "Oslo"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("reasoning", "content", "said"),
    [
        ("", "", WRITTEN),
        ("", "Let me look.", f"Let me look.\n{WRITTEN}"),
        ("Look first.", "", f"<think>\nLook first.\n</think>\n\n{WRITTEN}"),
        ("Look first.", "Wait.", f"<think>\nLook first.\n</think>\n\nWait.\n{WRITTEN}"),
    ],
)
def test_a_call_as_text_keeps_what_was_thought_and_said(reasoning: str, content: str, said: str) -> None:
    turns = (Message("user", "Rain?"), Message("assistant", content, reasoning=reasoning, tool_calls=CALL))
    tokenizer = family("chatml")
    (sample,) = render(Conversation(turns), tokenizer)
    assert f"assistant\n{said}<|im_end|>" in tokenizer.decode(sample.token_ids)
    assert "calls-as-text" in sample.notes
