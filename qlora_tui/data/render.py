"""Computes token ids and loss mask of a conversation by tokenizing text and spans from ``assistant_spans``.

``render`` is for one conversation (the Data screen, ``data show``), and ``render_many`` for a batch (the
trainer's preparation). Both use the same code, so the displayed text is the trained text. Control tokens
inside the text of a turn are encoded as ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.data.assistant_spans import SampleText, find_assistant_spans
from qlora_tui.data.chat_template import ChatTemplate
from qlora_tui.data.conversation import Conversation, Message, RowRejectedError
from qlora_tui.data.dataset_report import Piece
from qlora_tui.data.row import MAX_CHARACTERS
from qlora_tui.data.samples import (
    TokenizedSample,
    mark_control_tokens,
    span_edges,
    tokenize_by_span,
    tokenize_sample,
)
from qlora_tui.data.template_capabilities import (
    TemplateCapabilities,
    adapt_conversation,
    reasoning_of,
    resolve_thinking,
    separate_reasoning,
    variables,
    without_reasoning,
)
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.recipe.schema import Data, Thinking

TrainOn = Literal["assistant", "everything"]


class RenderedConversation(Struct, frozen=True):
    """A conversation as text, before it is tokenized."""

    samples: tuple[SampleText, ...]
    notes: tuple[str, ...]


class RenderOptions(Struct, frozen=True):
    """Settings of a recipe's ``data`` that affect how a conversation is rendered."""

    train_on: TrainOn = "assistant"
    thinking: Thinking = "auto"
    reasoning_in_loss: bool = True

    @classmethod
    def of(cls, data: Data) -> RenderOptions:
        """Return the options in ``data``."""
        return cls(data.train_on, data.thinking, data.reasoning_in_loss)


DEFAULT = RenderOptions()


def render(
    conversation: Conversation, tokenizer: ChatTokenizer, options: RenderOptions = DEFAULT
) -> list[TokenizedSample]:
    """Return the samples of one conversation: one, or more if the template rewrites earlier turns.

    Raises ``RowRejectedError`` if the conversation cannot be rendered.
    """
    result = next(render_many([conversation], tokenizer, options))
    if isinstance(result, RowRejectedError):
        raise result
    return result


def render_many(
    conversations: Sequence[Conversation], tokenizer: ChatTokenizer, options: RenderOptions = DEFAULT
) -> Iterator[list[TokenizedSample] | RowRejectedError]:
    """Yield the samples of each conversation, in order, or the error that explains why it has none."""
    rendered = [_render_or_reject(conversation, tokenizer, options) for conversation in conversations]
    samples = [sample for one in rendered if isinstance(one, RenderedConversation) for sample in one.samples]
    marked = iter(
        tokenizer.encode_marked([sample.text for sample in samples], list(map(span_edges, samples)))
    )
    for one in rendered:
        if isinstance(one, RowRejectedError):
            yield one
        else:
            yield [tokenize_sample(sample, next(marked), tokenizer, one.notes) for sample in one.samples]


def _render_or_reject(
    conversation: Conversation, tokenizer: ChatTokenizer, options: RenderOptions
) -> RenderedConversation | RowRejectedError:
    try:
        rendered = render_text(conversation, tokenizer, options)
    except RowRejectedError as refused:
        return refused
    characters = int(tokenizer.expansion * sum(len(sample.text) for sample in rendered.samples))
    if characters > MAX_CHARACTERS:
        return RowRejectedError("too-large", f"{characters:,} characters; the limit is {MAX_CHARACTERS:,}.")
    return rendered


def prompt_ids(
    messages: Sequence[Message],
    tokenizer: ChatTokenizer,
    tools: Sequence[dict[str, Any]] = (),
    thinking: Thinking = "auto",
    template_variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of the prompt for an answer to ``messages``, as in training.

    If ``template_variables`` sets the template's thinking variable, that value overrides ``thinking``.
    Otherwise ``auto`` leaves thinking to the template's default. Raises ``RowRejectedError``.
    """
    return prompt_text_ids(prompt_text(messages, tokenizer, tools, thinking, template_variables), tokenizer)


def prompt_text_ids(text: str, tokenizer: ChatTokenizer) -> list[int]:
    """Return the token ids of a text that ``prompt_text`` returned, or of its beginning."""
    return tokenize_by_span(SampleText(text, ()), tokenizer, ()).token_ids


def prompt_text(
    messages: Sequence[Message],
    tokenizer: ChatTokenizer,
    tools: Sequence[dict[str, Any]] = (),
    thinking: Thinking = "auto",
    template_variables: Mapping[str, Any] | None = None,
) -> str:
    """Return the text that ``prompt_ids`` tokenizes: the prompt for an answer to ``messages``.

    Control tokens inside a message are put between private marks. Raises ``RowRejectedError``.
    """
    template, traits = _template_of(tokenizer, bool(tools))
    given = dict(template_variables or {})
    if traits.switch is not None and traits.switch.variable in given:
        thinking = "off" if given[traits.switch.variable] in traits.switch.off.values() else "on"
    template = template.with_variables({**variables(traits.switch, thinking), **given})
    conversation = _prepared(Conversation(tuple(messages), tuple(tools)), traits, thinking)
    turns, _, kept_tools, _ = adapt_conversation(conversation, traits)
    turns, _ = _neutral_turns(turns, tokenizer)
    if kept_tools:
        kept_tools, _ = _neutral_value(kept_tools, tokenizer.control_pattern)
    return template.render(turns, kept_tools, prompt=True)


def pieces(tokenizer: ChatTokenizer, token_ids: Sequence[int], loss_mask: bytes) -> list[Piece]:
    """Split a sample into texts to display. Each is entirely inside or outside the loss, and each special
    token is separate.
    """
    shown: list[Piece] = []
    start = 0
    for end in range(1, len(token_ids) + 1):
        special = token_ids[start] in tokenizer.special_ids
        continues = (
            end < len(token_ids)
            and not special
            and token_ids[end] not in tokenizer.special_ids
            and loss_mask[end] == loss_mask[start]
        )
        if not continues:
            shown.append(Piece(text_at(tokenizer, token_ids, start, end), bool(loss_mask[start]), special))
            start = end
    return shown


def trained_texts(tokenizer: ChatTokenizer, token_ids: Sequence[int], loss_mask: bytes) -> tuple[str, ...]:
    """Return the text of each token in the loss, except a sample's first token, which is never predicted."""
    return tuple(
        text_at(tokenizer, token_ids, place, place + 1)
        for place in range(1, len(token_ids))
        if loss_mask[place]
    )


def text_at(tokenizer: ChatTokenizer, ids: Sequence[int], start: int, end: int) -> str:
    """Decode ``ids[start:end]`` in context: some decoders drop a space at the start of a text."""
    if ids[start] in tokenizer.special_ids or start == 0:
        return tokenizer.decode(ids[start:end])
    before = max(0, start - 4)
    context = tokenizer.decode(ids[before:start])
    both = tokenizer.decode(ids[before:end])
    return both[len(context) :] if both.startswith(context) else tokenizer.decode(ids[start:end])


def render_text(
    conversation: Conversation, tokenizer: ChatTokenizer, options: RenderOptions = DEFAULT
) -> RenderedConversation:
    """Render the texts of one conversation and their spans in the loss. Raises ``RowRejectedError``."""
    eos = tokenizer.special_tokens.get("eos_token", "")
    if not conversation.messages:
        bos = tokenizer.special_tokens.get("bos_token", "") if tokenizer.begins_with_bos else ""
        text, marked = mark_control_tokens(conversation.text, tokenizer.control_pattern)
        return RenderedConversation(
            (SampleText(bos + text + eos, ((0, len(bos + text + eos)),)),),
            ("control-tokens",) if marked else (),
        )
    template, traits = _template_of(tokenizer, bool(conversation.tools))
    thinking = resolve_thinking(options.thinking, traits.switch, conversation)
    template = template.with_variables(variables(traits.switch, thinking))
    turns, weights, tools, notes = adapt_conversation(_prepared(conversation, traits, thinking), traits)
    notes += _notes_on_thinking(conversation, traits, thinking, options)
    turns, marked = _neutral_turns(turns, tokenizer)
    if tools:
        tools, in_tools = _neutral_value(tools, tokenizer.control_pattern)
        marked = marked or in_tools
    if marked:
        notes.append("control-tokens")
    special, everything = tokenizer.special_pattern, options.train_on == "everything"
    samples = find_assistant_spans(
        template, turns, weights, tools, special, eos, everything, options.reasoning_in_loss
    )
    if "answer-changed" not in notes and not all(
        _without_reasoning(turn, samples) for turn, wanted in zip(turns, weights, strict=True) if wanted
    ):
        notes.append("answer-changed")
    if any(sample.weights for sample in samples):
        notes.append("weights")
    return RenderedConversation(tuple(samples), tuple(notes))


def _template_of(tokenizer: ChatTokenizer, with_tools: bool) -> tuple[ChatTemplate, TemplateCapabilities]:
    if with_tools:
        return tokenizer.tool_template, tokenizer.tool_traits
    return tokenizer.template, tokenizer.traits


def _prepared(conversation: Conversation, traits: TemplateCapabilities, thinking: Thinking) -> Conversation:
    """Return the conversation without reasoning if thinking is off. Otherwise, reasoning inside an answer is
    moved to its own field if the template has a thinking switch and does not need ``<think>`` tags in the
    content.
    """
    if thinking == "off":
        return replace(conversation, messages=without_reasoning(conversation.messages))
    if traits.switch is not None and (traits.reasoning or traits.own_tags):
        return replace(conversation, messages=separate_reasoning(conversation.messages))
    return conversation


def _notes_on_thinking(
    conversation: Conversation, traits: TemplateCapabilities, thinking: Thinking, options: RenderOptions
) -> list[str]:
    """Return notes on how a conversation's reasoning was handled, and whether thinking was on or off.

    A conversation with reasoning has one of ``reasoning-learned``, ``reasoning-read`` (not in the loss) and
    ``reasoning-left-out``; and ``reasoning-split`` if each turn with reasoning has a separate sample. If the
    prompt opens a thought although thinking is off or there is no reasoning, the other note is
    ``thought-closed``. Otherwise, it is ``thinking-on`` or ``thinking-off`` if the template has a switch and
    ``thinking`` is not ``auto``.
    """
    notes = []
    reasons = [i for i, m in enumerate(conversation.messages) if m.role == "assistant" and reasoning_of(m)]
    if reasons and thinking == "off":
        notes.append("reasoning-left-out")
    elif reasons:
        notes.append("reasoning-learned" if options.reasoning_in_loss else "reasoning-read")
        last = max(i for i, message in enumerate(conversation.messages) if message.role == "assistant")
        if traits.forgets_reasoning and any(i < last and conversation.messages[i].train for i in reasons):
            notes.append("reasoning-split")
    if traits.opens_thought and (thinking == "off" or not reasons):
        notes.append("thought-closed")
    elif traits.switch is not None and thinking != "auto":
        notes.append(f"thinking-{thinking}")
    return notes


def _without_reasoning(turn: Mapping[str, Any], samples: Sequence[SampleText]) -> bool:
    """Return whether the answer of a turn, apart from its reasoning, appears in a sample."""
    content = turn.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    answer = content.rpartition("</think>")[2].strip()
    return any(answer in sample.text for sample in samples)


def _neutral_turns(
    turns: list[dict[str, Any]], tokenizer: ChatTokenizer
) -> tuple[list[dict[str, Any]], bool]:
    """Mark the control tokens in the texts of turns; return the turns and whether any had a control token.

    In an assistant's text only special tokens are marked: ``<think>`` and ``<tool_call>`` are tokens that the
    model should generate.
    """
    result, any_marked = [], False
    for turn in turns:
        pattern = tokenizer.said_pattern if turn["role"] == "assistant" else tokenizer.control_pattern
        neutral = {"role": turn["role"]}
        rest, marked = _neutral_value({k: v for k, v in turn.items() if k != "role"}, pattern)
        result.append({**neutral, **rest})
        any_marked = any_marked or marked
    return result, any_marked


def _neutral_value(value: Any, pattern: re.Pattern[str]) -> tuple[Any, bool]:
    """Neutralize every string inside ``value``; return the new value and whether anything changed."""
    if isinstance(value, str):
        return mark_control_tokens(value, pattern)
    if isinstance(value, Mapping):
        pairs = {key: _neutral_value(item, pattern) for key, item in value.items()}
        return {key: item for key, (item, _) in pairs.items()}, any(marked for _, marked in pairs.values())
    if isinstance(value, list):
        items = [_neutral_value(item, pattern) for item in value]
        return [item for item, _ in items], any(marked for _, marked in items)
    return value, False
