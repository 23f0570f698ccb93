"""Sentences on how the reasoning in the data is handled, for ``data inspect`` and the Data screen.

Counted from the notes that ``render`` gives each conversation.
"""

from __future__ import annotations

from collections.abc import Mapping

from qlora_tui.data.template_capabilities import TemplateCapabilities
from qlora_tui.data.thinking import Switch
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.schema import Data, Thinking


def thinking_sentences(
    notes: Mapping[str, int], conversations: int, traits: TemplateCapabilities | None, data: Data
) -> tuple[str, ...]:
    """Return up to two sentences, on the reasoning and on the switch of the template.

    ``notes`` counts conversations by kind of note, ``conversations`` is their total number. Without a model
    (``traits`` is None) rows with reasoning are counted.
    """
    if traits is None:
        present = notes.get("reasoning-present", 0)
        where = f"{present:,} of {pluralize(conversations, 'row')}"
        return (f"Reasoning: {where}; choose a model to see how it is rendered.",) if present else ()
    left_out = notes.get("reasoning-left-out", 0)
    with_reasoning = notes.get("reasoning-learned", 0) + notes.get("reasoning-read", 0)
    sentences = []
    if with_reasoning or left_out:
        sentences.append(
            _on_reasoning(with_reasoning or left_out, conversations, bool(left_out), notes, data)
        )
    elif traits.thinks and conversations:
        sentences.append(f"Reasoning: in none of {pluralize(conversations, 'row')}.")
    on_switch = _on_switch(notes, with_reasoning, conversations, traits, data)
    return (*sentences, on_switch) if on_switch else tuple(sentences)


def _on_reasoning(rows: int, conversations: int, left_out: bool, notes: Mapping[str, int], data: Data) -> str:
    where = "to learn" if data.reasoning_in_loss else "only read"
    text = f"Reasoning: {rows:,} of {pluralize(conversations, 'row')}, {'left out' if left_out else where}"
    split = notes.get("reasoning-split", 0)
    if split:
        text += f"; the template drops it from earlier turns: {pluralize(split, 'row')} split into samples"
    return f"{text}."


def _on_switch(
    notes: Mapping[str, int],
    with_reasoning: int,
    conversations: int,
    traits: TemplateCapabilities,
    data: Data,
) -> str:
    switch = traits.switch
    if switch is None and traits.opens_thought:
        closed = notes.get("thought-closed", 0)
        closing = f"; it is closed at once in {pluralize(closed, 'row')} without reasoning" if closed else ""
        return f"Thinking: the template always opens a thought and has no switch{closing}."
    if switch is None:
        no_effect = data.thinking == "on" or (data.thinking == "off" and not notes.get("reasoning-left-out"))
        return (
            f"Thinking: {data.thinking} changes nothing, for this template has no switch."
            if no_effect
            else ""
        )
    if not switch.can_turn_off:
        return _on_effort(switch, data)
    on, off = notes.get("thinking-on", 0), notes.get("thinking-off", 0)
    if data.thinking == "on":
        empty = conversations - with_reasoning
        but = (
            f"; an empty thought is learned from {pluralize(empty, 'row')} without reasoning" if empty else ""
        )
        return f"Thinking: on for every row ({switch.variable}){but}."
    if data.thinking == "off" or (off and not on):
        why = "" if data.thinking == "off" else ", for none has reasoning"
        return f"Thinking: off for every row ({switch.variable}){why}."
    if on and off:
        return f"Thinking: on for the {on:,} with reasoning, off for {off:,} ({switch.variable})."
    return f"Thinking: on for every row ({switch.variable}), for each has reasoning." if on else ""


def _on_effort(switch: Switch, data: Data) -> str:
    name, least = switch.variable, switch.off[switch.variable]
    if data.thinking == "off":
        return f"Thinking: {name} = {least}; this template cannot turn it off."
    return f"Thinking: {name} as the template has it; it can be lowered, not turned off."


def prompt_thinking(setting: Thinking, notes: Mapping[str, int]) -> Thinking:
    """Return the prompt setting for a model trained on this data: as set or, with ``auto``, as most rows."""
    on, off = notes.get("thinking-on", 0), notes.get("thinking-off", 0)
    if setting != "auto" or not (on or off):
        return setting
    return "on" if on >= off else "off"
