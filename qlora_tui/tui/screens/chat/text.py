"""Styled text of the Chat screen."""

from __future__ import annotations

from pathlib import Path

from textual.content import Content

from qlora_tui.chat.chat_types import Effect, Sampling
from qlora_tui.engine.protocol import ChatReady
from qlora_tui.formatting import format_bytes, format_float, format_path, truncate_middle
from qlora_tui.recipe.schema import Thinking
from qlora_tui.tui.key_names import name_keys
from qlora_tui.tui.render.charts import blocks, downsample
from qlora_tui.tui.screens.chat.adapter_pair import AdapterPair

NOTHING_TO_CHAT_WITH = (
    "Nothing to chat with yet.\n\nA run becomes available once it has saved a checkpoint. "
    "Press {go.train} to launch one.\n\nOr press {chat.source} to chat with the recipe's model as it is, "
    "before any training."
)
START = (
    "Ask what the data is about, and something else: all get the same prompt and the same seed.\n\n"
    "{chat.leave} leaves the field. Then {chat.history} continues a saved conversation, {chat.settings} sets "
    "sampling and system prompt, and {chat.source} selects another run or model."
)
HINT = "Enter: send · Ctrl+J: new line · {chat.leave}: leave, then {chat.settings}: sampling"
STOPPED_LOADING = "Stopped loading the model. Press {chat.leave}, then {chat.retry}, to try again."
UNLOADED = "Stopped because the model was unloaded. Press {chat.leave}, then {chat.retry}, to try again."
_MIN_NAME_WIDTH = 16
_MIN_COLUMNS = 8
"""Least number of columns that the layers are drawn in, however narrow the window."""
NOT_MEASURED = "Not measured: the model was unloaded. Press {chat.effect} to load it and measure."


def session_line(name: str, pair: AdapterPair, state: str, width: int) -> Content:
    """The run, its adapters (the active ones reversed), and the state; a long name is cut in its middle."""
    parts: list[Content | str | tuple[str, str]] = ["  "]
    for number, adapter_name in enumerate(dict.fromkeys((pair.left, pair.right))):
        if number:
            parts.append(" ")
        on = adapter_name in pair.active
        parts.append((f" {adapter_name} ", "reverse" if on else "not bold $text-muted"))
    rest = Content.assemble(*parts, (f"  {state}", "not bold $text-muted"))
    name = truncate_middle(name, max(_MIN_NAME_WIDTH, width - rest.cell_length))
    return Content.styled(name, "bold") + rest


def loaded_text(ready: ChatReady) -> str:
    """``RTX 4090 bfloat16, 5.2 GiB, context 32,768``."""
    return (
        f"{ready.device} {ready.dtype}, {format_bytes(ready.memory_bytes)}, context {ready.context_tokens:,}"
    )


def thinking_text(setting: Thinking, ready: ChatReady | None) -> str:
    """``thinking on``; empty where it is not known, or the model cannot think."""
    if ready is None:
        return "" if setting == "auto" else f"thinking {setting}"
    known = ready.thinking
    match known.kind:
        case "none":
            return ""
        case "always":
            return "always thinks"
        case "effort":
            return f"{known.variable} {known.off}" if setting == "off" else "thinks"
        case "switch":
            return f"thinking {known.default if setting == 'auto' else setting}"


def answering_text(pair: AdapterPair) -> str:
    """Which adapters answer, in words for terminals without color; empty where there is no choice."""
    if pair.single:
        return ""
    return "both answer" if pair.shown == "both" else f"only {pair.active[0]} answers"


def sampling_line(
    sampling: Sampling,
    system_prompt: str,
    transcript: Path | None,
    width: int,
    thinking: str = "",
    answering: str = "",
) -> Content:
    """Which adapters answer, thinking, sampling settings, and where the conversation is saved."""
    parts = [part for part in (answering, thinking) if part]
    parts.append("greedy" if not sampling.temperature else _sampling_words(sampling))
    parts.append(f"≤ {sampling.max_new_tokens} tokens")
    if sampling.seed is not None:
        parts.append(f"seed {sampling.seed}")
    if system_prompt:
        parts.append("system: " + " ".join(system_prompt.split()))
    line = " · ".join(parts)
    if transcript is None:
        key = name_keys("   {chat.settings} change")
        return Content.styled(line + key if len(line + key) <= width else line[:width], "dim")
    place = f"saved in {format_path(transcript)}"
    space_left = width - len(line)
    if len(place) + 2 > space_left:
        place = f"saved in …/{transcript.parent.name}/{transcript.name}"
    if len(place) + 2 > space_left:
        line = line[: max(0, width - len(place) - 3)] + "…"
        space_left = width - len(line)
    return Content.styled(line + " " * (space_left - len(place)) + place, "dim")


def effect_text(measured: Effect, width: int) -> Content:
    """The verdict, and under it the figures: mean KL, and how far each layer moved, from none to the most."""
    figures = f"KL {format_float(measured.mean_kl, 3)} nats"
    if measured.layers:
        first, last = measured.layers[0].layer, measured.layers[-1].layer
        most = max(measured.layers, key=lambda change: change.relative)
        before = f"{figures} · layers moved: {first} "
        after = f" {last}, most {format_float(most.relative * 100, 2)}% in {most.layer}"
        width_left = min(len(measured.layers), max(_MIN_COLUMNS, width - len(before + after)))
        columns = downsample([change.relative for change in measured.layers], width_left)
        figures = before + blocks(columns, 0.0, most.relative, 1)[0] + after
    warning = f"\n{measured.warning}" if measured.warning else ""
    return Content.assemble(measured.sentence, (warning, "$text-warning"), (f"\n{figures}", "$text-muted"))


def _sampling_words(sampling: Sampling) -> str:
    words = [f"temp {format_float(sampling.temperature, 3)}"]
    if sampling.top_p < 1:
        words.append(f"top-p {format_float(sampling.top_p, 3)}")
    if sampling.top_k:
        words.append(f"top-k {sampling.top_k}")
    if sampling.repetition_penalty != 1:
        words.append(f"penalty {format_float(sampling.repetition_penalty, 3)}")
    return " · ".join(words)
