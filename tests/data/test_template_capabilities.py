"""What a template cannot say is written into the text of a turn, and nothing of the turn is lost."""

from __future__ import annotations

import pytest

from qlora_tui.data.conversation import Conversation, Message, ToolCall
from qlora_tui.data.render import prompt_text, render, render_text
from qlora_tui.data.tokenizer import ChatTokenizer
from tests.data.conversation_shapes import assistant, user
from tests.data.families import family, tokenizer_json

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


CALLS_OR_WORDS = """{% for m in messages %}[{{ m.role }}]{% if m.content %}{{ m.content }}\
{% else %}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}\
{% endif %}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""
EMPTY_THOUGHT = """{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}\
{% if add_generation_prompt %}[assistant]{% if not enable_thinking %}<no thought>{% endif %}{% endif %}"""


def with_template(template: str) -> ChatTokenizer:
    return ChatTokenizer(tokenizer_json(("</s>", "<EOS>"), ()), {"eos_token": "<EOS>"}, template)


def test_a_call_is_kept_where_the_template_writes_either_words_or_calls() -> None:
    turns = (
        Message("user", "Rain?"),
        Message("assistant", "Let me look.", tool_calls=CALL),
        Message("tool", "No.", name="rain"),
        Message("assistant", "It is dry."),
    )
    rendered = render_text(Conversation(turns), with_template(CALLS_OR_WORDS))
    (sample,) = rendered.samples
    assert "[assistant]rain" in sample.text and "Let me look." not in sample.text
    assert "answer-changed" in rendered.notes


def test_the_last_answer_stands_after_all_that_its_prompt_writes() -> None:
    turns = (user("Q1"), assistant("A1"), user("Q2"), assistant("A2"))
    tokenizer = with_template(EMPTY_THOUGHT)
    (sample,) = render_text(Conversation(turns), tokenizer).samples
    start, end = sample.spans[-1]
    assert sample.text[:start] == prompt_text(turns[:-1], tokenizer, thinking="off")
    assert sample.text[start:end] == "A2</s>" and "[assistant]A1" in sample.text
