"""What holds for the masks of every published chat template, with and without thoughts and tools.

Read are the templates in the installed ``trl``, and those below the folder in ``QLORA_TUI_TEMPLATES``, such
as ``vendor/llama.cpp/models/templates`` of the source package of ``llama-cpp-python``.
"""

from __future__ import annotations

import importlib.util
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.data.conversation import Conversation, Message, RowRejectedError, ToolCall
from qlora_tui.data.render import RenderedConversation, prompt_text, render_text
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.recipe.schema import Thinking
from tests.data.conversation_shapes import TOOL, assistant, system, tool, user
from tests.data.families import tokenizer_json

_TRL = importlib.util.find_spec("trl")
_FOLDERS = [
    *([Path(_TRL.origin).parent / "chat_templates"] if _TRL and _TRL.origin else []),
    *map(Path, filter(None, [os.environ.get("QLORA_TUI_TEMPLATES")])),
]
TEMPLATES = {
    path.stem: path
    for folder in _FOLDERS
    for path in sorted(folder.rglob("*.jinja"))
    if not path.stem.endswith("_training")
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TEMPLATES, reason="trl is not installed: pip install --no-deps trl"),
]
_TOKENS = re.compile(
    r"<\|[^|<>\s'\"]{2,40}\|>|<｜[^｜<>]{2,40}｜>|<\|?[a-z_]{4,20}\|>|<\|[a-z_]{4,20}>|<[a-z_]+_of_[a-z]+>"
    r"|</s>|\[/?[A-Z_]{3,20}\]|<\w+_turn>"
)
_END = re.compile(r"(<[^<>\s]+>|\[[A-Z_/]+\])\s*\Z")


def call(words: str = "") -> Message:
    return Message("assistant", words, tool_calls=(ToolCall("get_weather", {"place": "PARIS"}),))


SHAPES: dict[str, tuple[Message, ...]] = {
    "plain": (user("QUESTION"), assistant("ANSWER 1")),
    "system": (
        system("SYSTEM"),
        user("QUESTION"),
        assistant("ANSWER 1"),
        user("QUESTION"),
        assistant("ANSWER 2"),
    ),
    "thoughts": (
        *(system("SYSTEM"), user("QUESTION"), assistant("ANSWER 1", "THOUGHT 1")),
        *(user("QUESTION"), assistant("ANSWER 2", "THOUGHT 2")),
    ),
    "tool": (user("QUESTION"), call(), tool("RESULT"), assistant("ANSWER 1")),
    "tool and words": (user("QUESTION"), call("WORDS"), tool("RESULT"), assistant("ANSWER 1")),
}
KNOWN: dict[str, str] = {
    "Apriel-1.6-15b-Thinker-fixed": "Its prompt begins the thoughts in words of its own.",
    "NVIDIA-Nemotron-Nano-v2": "It writes words and calls of a last answer in another way than earlier ones.",
    "tencent-Hy3": "Its effort, which decides what the prompt opens, is not that of the row.",
}
"""Templates for which something does not hold, with the reason."""


@cache
def _tokenizer(name: str) -> ChatTokenizer:
    template = TEMPLATES[name].read_text()
    special = tuple(sorted({*_TOKENS.findall(template), "<BOS>", "<EOS>"}))
    tokens = tokenizer_json(special, ("<think>", "</think>"))
    return ChatTokenizer(tokens, {"bos_token": "<BOS>", "eos_token": "<EOS>"}, template)


def _faults(name: str, shape: str) -> list[str]:
    """What does not hold for this template and conversation."""
    tokenizer, messages = _tokenizer(name), SHAPES[shape]
    tools: tuple[dict[str, Any], ...] = (TOOL,) if shape.startswith("tool") else ()
    try:
        rendered = render_text(Conversation(messages, tools), tokenizer)
    except RowRejectedError:
        return []
    shown = "\0".join(sample.text for sample in rendered.samples)
    trained = "\0".join(sample.text[a:b] for sample in rendered.samples for a, b in sample.spans)
    answers = [message for message in messages if message.role == "assistant"]
    wanted = [message.content for message in answers if message.content.startswith("ANSWER")]
    wanted += [message.reasoning for message in answers if message.reasoning]
    wanted += ["PARIS"] if tools else []
    faults = [f"{word} is trained {trained.count(word)} times" for word in wanted if trained.count(word) != 1]
    if shape == "tool and words" and "WORDS" not in trained and "answer-changed" not in rendered.notes:
        faults.append("words are lost without a note")
    faults += [f"{word} is trained" for word in ("QUESTION", "SYSTEM", "RESULT") if word in trained]
    given = [message.content for message in messages if message.role in ("system", "tool")]
    given += [str(TOOL["function"]["description"])] if tools else []  # type: ignore[index]  # it is an object
    faults += [f"{word} is lost" for word in given if word not in shown]
    ends = [sample.text[slice(*sample.spans[-1])] for sample in rendered.samples]
    faults += [f"no end: {end[-20:]!r}" for end in ends if not _END.search(end)]
    return [*faults, *_after_another_prompt(rendered, tokenizer, messages, tools)]


def _after_another_prompt(
    rendered: RenderedConversation,
    tokenizer: ChatTokenizer,
    messages: tuple[Message, ...],
    tools: tuple[dict[str, Any], ...],
) -> list[str]:
    """Whether the last answer is trained after another text than the model gets when it is asked."""
    switch = tokenizer.traits.switch
    quiet: Thinking = "off" if switch and switch.can_turn_off else "auto"
    thinking: Thinking = "on" if any(message.reasoning for message in messages) else quiet
    sample = rendered.samples[-1]
    before, prompt = (
        sample.text[: sample.spans[-1][0]],
        prompt_text(messages[:-1], tokenizer, tools, thinking),
    )
    return [] if before == prompt else [f"trained after {before[-40:]!r}, not {prompt[-40:]!r}"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_is_what_the_model_has_to_say(name: str) -> None:
    faults = {shape: found for shape in SHAPES if (found := _faults(name, shape))}
    assert bool(faults) == (name in KNOWN), faults
