"""What the column beside the conversation says: settings, tokens and saved conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from textual.content import Content

from qlora_tui.chat.chat_types import GenerationResult, Sampling
from qlora_tui.engine.protocol import ChatReady
from qlora_tui.formatting import format_bytes, format_duration, format_float, format_path, truncate_middle
from qlora_tui.recipe.schema import Thinking
from qlora_tui.tui.render.charts import labeled, meter
from qlora_tui.tui.screens.chat.adapter_pair import AdapterPair
from qlora_tui.tui.screens.chat.saved_conversations import SavedConversation
from qlora_tui.tui.screens.chat.text import answering_text, thinking_text

_LABEL = 12
_row = partial(labeled, cells=_LABEL)
_AGE = 10
"""Cells of the age of a conversation."""
_NOW_S = 60.0
_CHARACTERS_PER_TOKEN = 4
"""Of English text, roughly."""


def settings_lines(
    sampling: Sampling, system_prompt: str, pair: AdapterPair, thinking: Thinking, ready: ChatReady | None
) -> list[Content]:
    """Who answers, and every setting of the sampling."""
    rows = [("answers", answering_text(pair) or f"{pair.left} only")]
    if thinks := thinking_text(thinking, ready):
        rows.append(("thinking", thinks))
    if sampling.temperature:
        rows += [
            ("temperature", format_float(sampling.temperature, 3)),
            ("top-p", format_float(sampling.top_p, 3)),
            ("top-k", f"{sampling.top_k}" if sampling.top_k else "all"),
        ]
    else:
        rows.append(("temperature", "0, greedy"))
    penalty = sampling.repetition_penalty
    rows += [
        ("penalty", "none" if penalty == 1 else format_float(penalty, 3)),
        ("max tokens", f"{sampling.max_new_tokens:,}"),
        ("seed", "random" if sampling.seed is None else str(sampling.seed)),
    ]
    lines = [_row(label, value) for label, value in rows]
    lines.append(_row("system", " ".join(system_prompt.split()) or "none"))
    return lines


def token_lines(
    outcomes: Mapping[str, GenerationResult], ready: ChatReady | None, width: int
) -> list[Content]:
    """How full the context of each adapter is after its last answer, and how fast that was."""
    if ready is None:
        return [Content.styled("Loaded with the first prompt.", "dim")]
    lines = [
        _row("model", f"{ready.dtype}, {format_bytes(ready.memory_bytes)}"),
        _row("context", f"{ready.context_tokens:,} tokens"),
    ]
    for name, outcome in outcomes.items():
        used = outcome.prompt_tokens + outcome.new_tokens
        label = truncate_middle(name, _LABEL - 1)
        lines.append(meter(label, used / ready.context_tokens, f"{used:,}", _LABEL, width))
        speed = f", {format_float(outcome.tokens_per_s, 3)}/s" if outcome.tokens_per_s else ""
        answer = f"{outcome.prompt_tokens:,} read, {outcome.new_tokens:,} written{speed}"
        lines.append(Content.styled(f"  {answer}", "dim"))
    return lines


def history_lines(
    conversations: Sequence[tuple[Path, SavedConversation]], transcript: Path | None, now: float, width: int
) -> list[Content]:
    """Where the transcript is, and the saved conversations with this run, the newest first."""
    if not conversations:
        return [Content.styled("None yet. Each is saved as you chat.", "dim")]
    lines = [conversation_line(saved, now, width) for _, saved in conversations]
    if transcript is not None:
        lines.insert(0, Content.styled(truncate_middle(format_path(transcript), width), "dim"))
    return lines


def conversation_line(saved: SavedConversation, now: float, width: int) -> Content:
    """``4 min ago  Where is my parcel? (3)``: age, first prompt, and the number of prompts."""
    seconds = now - saved.at
    age = "just now" if seconds < _NOW_S else f"{format_duration(seconds)} ago"
    prompt = " ".join(saved.turns[0].prompt.split())
    number = f" ({len(saved.turns)})" if len(saved.turns) > 1 else ""
    left = max(8, width - max(_AGE, len(age)) - 2 - len(number))
    shown = prompt if len(prompt) <= left else prompt[: left - 1] + "…"
    return Content.assemble((f"{age:<{_AGE}}  ", "dim"), shown, (number, "dim"))


def prompt_title(text: str, tokens: int | None) -> Content:
    """``Message · 12 tokens``: counted by the tokenizer, or estimated where no model is loaded."""
    if not text:
        return Content("Message")
    known = tokens is not None
    number = tokens if tokens is not None else max(1, round(len(text) / _CHARACTERS_PER_TOKEN))
    words = f"{'' if known else 'about '}{number:,} token{'' if number == 1 else 's'}"
    return Content.assemble("Message", (f" · {words}", "not bold $text-muted"))
