"""Our masks on published templates, compared with TRL's generation marks in them.

The ``trl`` package ships the chat templates of some thirty families twice: as published, and with
``{% generation %}`` around what the assistant says. For every family and every conversation shape, what we
label on the published template is compared with what the marks enclose. Where they differ, ``KNOWN``
says how and who is right; anything not said there fails.
"""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from msgspec.structs import replace

from qlora_tui.data.chat_template import ChatTemplate
from qlora_tui.data.conversation import RowRejectedError
from qlora_tui.data.render import render_text
from qlora_tui.data.template_capabilities import (
    adapt_conversation,
    probe_template,
    resolve_thinking,
    separate_reasoning,
    variables,
)
from qlora_tui.data.tokenizer import ChatTokenizer
from tests.data.conversation_shapes import SHAPES, conversation
from tests.data.families import tokenizer_json

_FOUND = importlib.util.find_spec("trl")
FOLDER = Path(_FOUND.origin).parent / "chat_templates" if _FOUND and _FOUND.origin else Path("no-trl")
PAIRS = sorted(p.stem.removesuffix("_training") for p in FOLDER.glob("*_training.jinja"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PAIRS, reason="trl is not installed: pip install --no-deps trl"),
]

_TOKENS = re.compile(
    r"<\|[^|<>\s'\"]{2,40}\|>|<｜[^｜<>]{2,40}｜>|<\|?[a-z_]{4,20}\|>|<\|[a-z_]{4,20}>|<[a-z_]+_of_[a-z]+>|</s>"
)


class Known(NamedTuple):
    """A difference that is understood: cut out of one side, and the rest must be equal."""

    why: str
    theirs: str = ""
    """A pattern cut from the start of each of their stretches."""
    thoughts: bool = False
    """Whether empty thoughts, and line ends after them, are cut from both sides."""
    end: str = ""
    """The pattern cut from the very end of both sides."""


_PROMPT = (
    "They train on the role header too. The prompt gives it to the model, which never has to say it: ours."
)
_CLOSED = " Ours closes at once the thought that the prompt opens, where a row has none."
_EMPTY = (
    "Of a row without reasoning, which is rendered with thinking off, theirs trains the empty thought. The "
    "prompt gives it to the model: ours."
)
_HISTORY = (
    "Theirs shows (empty) thoughts in earlier turns, which the published template drops, as the model's "
    "prompt will. Ours labels earlier answers as the published template shows them, and gives a turn with "
    "real thoughts a sample of its own."
)
KNOWN: dict[str, Known] = {
    "deepseek_r1_distill": Known(
        _PROMPT + _CLOSED, "<｜Assistant｜>(<think>\n)?|<｜tool▁outputs▁end｜>", thoughts=True
    ),
    "deepseekv3": Known(_PROMPT + _CLOSED, "<｜Assistant｜>|<｜tool▁outputs▁end｜>", thoughts=True),
    "gptoss": Known(_PROMPT, r"<\|start\|>assistant"),
    "muse_glimmer": Known(_PROMPT, r"<\|start\|>assistant"),
    "qwen2_5": Known(_PROMPT + " Here it is the new line after it.", "\n"),
    "qwen3": Known(_HISTORY, thoughts=True),
    "qwen3_5_nothink": Known(_HISTORY, "<think>\n", thoughts=True),
    "qwen3_5_think": Known(_HISTORY, "<think>\n", thoughts=True),
    "qwen3_6": Known(_HISTORY, "<think>\n", thoughts=True),
    "qwen3_8": Known(_EMPTY, "<think>\n", thoughts=True),
    "glm4moe": Known(
        _HISTORY
        + " After the last answer theirs puts <|user|>, ours the end-of-text token: the model stops at both.",
        thoughts=True,
        end=r"<\|user\|>|<EOS>",
    ),
    "llava_next": Known(
        "Ours labels the blank the template puts after the end token, as it does new lines.", end=" "
    ),
    **{
        f"nemotron_3_{size}": Known(_PROMPT + " Its prompt opens <think>.", "<think>\n?", thoughts=True)
        for size in ("nano", "super", "ultra", "5_lightning")
    },
}

_THOUGHTS = (
    "Ours trains the thoughts of every turn, earlier ones in samples of their own; theirs only of the last, "
    "where the published template shows no others."
)
_LOST_THOUGHTS = (
    "The published template drops thoughts even from the last answer. Ours trains them, after its prompt."
)
_GEMMA_TOOLS = (
    "Ours trains <|tool_response>, at which the model stops to wait for the tool, and the header after the "
    "tool's answer, which the template writes there but its prompt does not give."
)
DISAGREED: dict[tuple[str, str], str] = {
    **{("deepseekv3", f"thinking-{shape}"): _LOST_THOUGHTS for shape in ("last", "in-text", "each-turn")},
    ("diffusion_gemma", "thinking-each-turn"): _THOUGHTS,
    ("diffusion_gemma", "tool"): _GEMMA_TOOLS,
    ("diffusion_gemma", "tool-with-words"): _GEMMA_TOOLS,
    ("diffusion_gemma", "two-tools"): _GEMMA_TOOLS,
    ("glm4moe", "thinking-each-turn"): _THOUGHTS,
    ("gptoss", "thinking-each-turn"): _THOUGHTS,
    (
        "gptoss",
        "tool-with-words",
    ): "Words beside a tool call vanish once the answer is given. Ours trains them.",
    **{
        (f"nemotron_3_{s}", "thinking-each-turn"): _THOUGHTS
        for s in ("nano", "super", "ultra", "5_lightning")
    },
}
"""Family and shape of each difference that is of substance, with who is right and why."""


@cache
def _special(template: str) -> tuple[str, ...]:
    return tuple(sorted({*_TOKENS.findall(template), "<BOS>", "<EOS>", "</s>"}))


@cache
def _tokenizer(name: str) -> ChatTokenizer:
    template = (FOLDER / f"{name}.jinja").read_text()
    added = tokenizer_json(_special(template), ("<think>", "</think>"))
    return ChatTokenizer(added, {"bos_token": "<BOS>", "eos_token": "<EOS>"}, template)


@cache
def _marked_template(name: str) -> ChatTemplate:
    return ChatTemplate((FOLDER / f"{name}_training.jinja").read_text(), _tokenizer(name).special_tokens)


def _ours(name: str, shape: str) -> list[str]:
    rendered = render_text(conversation(shape), _tokenizer(name))
    return [sample.text[a:b] for sample in rendered.samples for a, b in sample.spans]


def _theirs(name: str, shape: str) -> list[str]:
    template = _marked_template(name)
    traits = probe_template(template)
    # Told to think, or not to, as ours is.
    template = template.with_variables(
        variables(traits.switch, resolve_thinking("auto", traits.switch, conversation(shape)))
    )
    one = conversation(shape)
    if traits.switch is not None and traits.reasoning:
        # Reasoning written into an answer goes where the template looks for it, as ours does.
        one = replace(one, messages=separate_reasoning(one.messages))
    turns, trains, tools, _ = adapt_conversation(one, traits)
    last = max(i for i, wanted in enumerate(trains) if wanted)
    text, marks = template.render_marked(turns[: last + 1], tools)
    marks = [mark for mark in marks if mark[0] < mark[1]]
    joined: list[tuple[int, int]] = []
    for start, end in marks:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return [text[a:b] for a, b in joined]


def _compared(name: str, shape: str) -> tuple[str, str]:
    """What both label, less the known difference."""
    ours, theirs = _ours(name, shape), _theirs(name, shape)
    known = KNOWN.get(name)
    if known is None:
        return "|".join(ours), "|".join(theirs)
    if known.theirs:
        theirs = [re.sub(f"^(?:{known.theirs})", "", stretch) for stretch in theirs]
    if known.thoughts:
        ours, theirs = (
            [re.sub(r"^\n*((<think>)?\n*</think>)?\n*", "", s) for s in side] for side in (ours, theirs)
        )
    if known.end:
        ours, theirs = ([re.sub(f"(?:{known.end})$", "", s) for s in side] for side in (ours, theirs))
    return "|".join(ours), "|".join(theirs)


@pytest.mark.parametrize("name", PAIRS)
def test_our_masks_equal_the_marks_of_the_reference(name: str) -> None:
    different = {}
    for shape in SHAPES:
        try:
            ours, theirs = _compared(name, shape)
        except RowRejectedError as refused:
            different[shape] = refused.reason
            continue
        if ours != theirs:
            different[shape] = f"{ours!r} is not {theirs!r}"
    assert different.keys() == {shape for family, shape in DISAGREED if family == name}, different
