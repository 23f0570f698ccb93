"""Finds the spans of a rendered conversation that are in the loss, which are the assistant's turns.

For each assistant turn in the loss, the conversation is rendered up to the turn (with the generation prompt,
as the model sees it before it answers) and up to the turn's end. The text that the second rendering adds is
the text to learn, including its turn-end token.

Some templates rewrite earlier turns (Qwen3 drops old reasoning, Mistral moves the system prompt, gpt-oss
closes earlier turns with another token). With such a template, the turn is found in the whole conversation by
marking its text. If the rewriting removed reasoning, which would then never be trained, or the turn cannot be
found, the conversation up to that turn becomes a separate sample, exactly as the model sees it at inference.

If a prompt opens a thought (DeepSeek-R1's), the turn's reasoning follows, or without reasoning the end of the
thought. Any other text that a prompt writes before an answer (in Gemma 4 without thinking, an empty thought)
is put before the last answer, outside the loss, even if the template omits it there. White space after an
opened thought belongs to the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from qlora_tui.data.chat_template import ChatTemplate, Span, Tools, Turns
from qlora_tui.data.conversation import RowRejectedError
from qlora_tui.data.template_capabilities import OPENED, TAGS, after_thought, answered, tags_of

_OPEN, _CLOSE = "\U000f0002", "\U000f0003"
_PROBES = ("\U000f0004", "\U000f0005")
PRIVATE = re.compile("[\U000f0000-\U000f0005]")
"""Characters used as internal marks, which are removed from every text before rendering."""


class SampleText(Struct, frozen=True):
    """A text as the model sees it, and its spans in the loss, in characters."""

    text: str
    spans: tuple[Span, ...]
    weights: tuple[float, ...] = ()
    """Loss weight of each span; empty if every weight is 1."""


class _SpanFinder:
    """Finds the spans of one conversation that are in the loss; use :func:`find_assistant_spans`."""

    def __init__(
        self,
        template: ChatTemplate,
        turns: Turns,
        tools: Tools | None,
        special: re.Pattern[str],
        eos: str,
        reasoning_in_loss: bool,
    ):
        self._template = template
        self._reasoning_in_loss = reasoning_in_loss
        self._turns = list(turns)
        self._tools = tools
        self._special = special
        self._eos = eos
        self._prompts: dict[int, str] = {}

    def samples(self, weights: Mapping[int, float]) -> list[SampleText]:
        """Render the whole conversation with its spans in the loss, and turns that need a separate sample.

        ``weights`` maps each turn in the loss to its loss weight.
        """
        template, turns = self._template, self._turns
        whole = self._after_its_prompt(template.render(turns, self._tools))
        spans: list[Span] = []
        span_weights: list[float] = []
        separate: list[SampleText] = []
        for i, weight in weights.items():
            is_last = i == len(turns) - 1
            ended = whole if is_last else template.render(turns[: i + 1], self._tools)
            start = self._start(i, ended)
            reasoning = _reasoning(turns[i])
            if start is None:
                separate.append(_with_weights(self._after_prompt(i, ended, reasoning), weight))
                continue
            answer_span: Span | None = (start, len(ended))
            if not is_last and not (whole.startswith(ended) and start < len(ended)):
                answer_span = self._in_rewritten(i, whole, ended, start)
            if reasoning and reasoning not in ended[start:]:
                separate.append(_with_weights(self._with_reasoning(i, ended, start, reasoning), weight))
            elif answer_span is None or (reasoning and reasoning not in whole[slice(*answer_span)]):
                separate.append(_with_weights(self._separate_sample(ended, start, reasoning), weight))
            else:
                stopped = self._with_stop(whole, answer_span)
                spans.append(self._trained_part(whole, stopped, reasoning))
                span_weights.append(weight)
        weighted_spans = [
            (span, weight) for span, weight in zip(spans, span_weights, strict=True) if span[0] < span[1]
        ]
        if not weighted_spans:
            if not separate:
                raise RowRejectedError("template-refuses", "The template omits the assistant's turns.")
            return separate
        spans = [span for span, _ in weighted_spans]
        marked = self._by_marks(whole, spans) if template.has_generation_marks else spans
        span_weights = [
            next((weight for turn_span, weight in weighted_spans if _overlap(turn_span, span)), 1.0)
            for span in marked
        ]
        return [*separate, _with_weights(self._end_turn(whole, marked), *span_weights)]

    def everything(self) -> SampleText:
        """Render the whole conversation with all of its text in the loss.

        Without ``reasoning_in_loss``, the reasoning is left out of the loss.
        """
        whole = self._template.render(self._turns, self._tools)
        sample = self._end_turn(whole, [(0, len(whole))]) if self._turns[-1]["role"] == "assistant" else None
        sample = sample or SampleText(whole, ((0, len(whole)),))
        if self._reasoning_in_loss:
            return sample
        spans, at = [], 0
        for turn in self._turns:
            reasoning = _reasoning(turn) if turn["role"] == "assistant" else ""
            place = sample.text.find(reasoning, at) if reasoning else -1
            if place >= 0:
                spans.append((at, place))
                at = after_thought(sample.text, place + len(reasoning))
        return SampleText(sample.text, (*spans, (at, len(sample.text))))

    def _after_its_prompt(self, whole: str) -> str:
        """Return ``whole`` with the last answer right after its prompt, as at inference.

        The template may omit text of this prompt before an answer. A thought that the prompt opens is closed
        if the answer has no reasoning.
        """
        last = len(self._turns) - 1
        prompt = self._prompt_for(last)
        start = None if whole.startswith(prompt) else self._start(last, whole)
        if start is None:
            return whole
        if _reasoning(self._turns[last]):
            is_opened = OPENED.search(prompt) and prompt.rstrip() == whole[:start].rstrip()
            return prompt + whole[start:].lstrip() if is_opened else whole
        if OPENED.search(prompt):
            return answered(prompt, "", whole[start:])
        return prompt + whole[start:] if prompt.startswith(whole[:start]) else whole

    def _separate_sample(self, text: str, start: int, reasoning: str) -> SampleText:
        """Build a separate sample for the turn from ``start`` to the end of ``text``."""
        return self._end_turn(text, [self._trained_part(text, (start, len(text)), reasoning)])

    def _trained_part(self, text: str, span: Span, reasoning: str) -> Span:
        """Return the part of ``span`` in the loss: all of it, or only the text after the reasoning."""
        start, end = span
        place = text.find(reasoning, start, end) if reasoning and not self._reasoning_in_loss else -1
        return span if place < 0 else (min(after_thought(text, place + len(reasoning)), end), end)

    def _start(self, i: int, ended: str) -> int | None:
        """Find the start of turn ``i``'s answer in ``ended``, the text that ends with it.

        If the text does not begin with the prompt (which may open a ``<think>`` that the text lacks), the
        answer begins where the two diverge, but never inside a token. None if the answer changes the earlier
        text.
        """
        prompt = self._prompt_for(i)
        if prompt and ended.startswith(prompt):
            return len(prompt)
        before = self._before(i) if prompt else ""
        if self._header(i) and not ended.startswith(before):
            return None
        probes = [self._probe(i, character) for character in _PROBES]
        start = len(_shared_start([ended, *probes, *([prompt] if prompt else [])]))
        tokens = (*self._special.finditer(ended), *TAGS.finditer(ended))
        inside = next((m for m in tokens if m.start() < start < m.end()), None)
        return inside.start() if inside else start

    def _before(self, i: int) -> str:
        return self._template.render(self._turns[:i], self._tools)

    def _header(self, i: int) -> str:
        """Return the text that the prompt adds before turn ``i``; empty if it also changes earlier text."""
        prompt, before = self._prompt_for(i), self._before(i) if i else ""
        return prompt[len(before) :] if prompt.startswith(before) else ""

    def _after_prompt(self, i: int, ended: str, reasoning: str) -> SampleText:
        """Build a separate sample for an answer whose presence makes the template drop earlier text.

        gpt-oss drops the text next to a tool call. The model sees this text when it answers, so the sample
        has it.
        """
        header = self._header(i)
        core = self._core_in(self._turns[: i + 1], i, ended)
        begin = ended.rfind(header, 0, core[0]) if core else -1
        if begin < 0:
            raise RowRejectedError(
                "template-refuses", f"Turn {i + 1} cannot be found in the rendered template."
            )
        prompt = self._prompt_for(i)
        return self._separate_sample(prompt + ended[begin + len(header) :], len(prompt), reasoning)

    def _prompt_for(self, i: int) -> str:
        """Return the prompt that the model receives before turn ``i``; empty if there is none."""
        if i not in self._prompts:
            try:
                text = self._template.render(self._turns[:i], self._tools, prompt=True) if i else ""
            except RowRejectedError:
                text = ""
            self._prompts[i] = text
        return self._prompts[i]

    def _probe(self, i: int, character: str) -> str:
        """Render the conversation up to turn ``i``, with ``character`` as its answer."""
        turn: dict[str, Any] = {"role": "assistant", "content": character}
        if isinstance(self._turns[i].get("content"), list):
            turn["content"] = [{"type": "text", "text": character}]
        return self._template.render([*self._turns[:i], turn], self._tools)

    def _in_rewritten(self, i: int, whole: str, ended: str, start: int) -> Span | None:
        """Find turn ``i`` in ``whole``, whose text up to this turn differs from ``ended``.

        ``whole`` is the whole conversation. ``ended`` is the conversation up to the turn, in which the turn
        begins at ``start``. None if the turn is not found.
        """
        there = self._core_in(self._turns[: i + 1], i, ended)
        here = self._core_in(self._turns, i, whole)
        if there is None or here is None or there[0] < start:
            return None
        core_start, core_end = here
        before, after = ended[start : there[0]], ended[there[1] :]
        begin = self._begin(whole, core_start, before, self._header(i))
        if begin is None:
            if TAGS.sub("", before).strip():
                return None
            begin = core_start
        return begin, core_end + self._closing(after, whole[core_end:])

    def _begin(self, whole: str, core_start: int, before: str, header: str) -> int | None:
        """Return the start of the turn whose core begins at ``core_start``; None if it cannot be determined.

        ``before`` is the text between header and core when the turn is the last in the conversation. In
        ``whole``, the core is preceded by all of this text or, directly after the header, by only its end.
        """
        if whole[:core_start].endswith(before):
            return core_start - len(before)
        for opening in filter(None, (header, header.partition("<think>")[0])):
            begin = whole.rfind(opening, 0, core_start) + len(opening)
            if begin >= len(opening) and before.endswith(whole[begin:core_start]):
                return begin
        return None

    def _closing(self, after: str, rest: str) -> int:
        """Count the characters at the start of ``rest`` that close the turn.

        They are those that ``rest`` shares with ``after``, the text that closes the turn if it is the last.

        Special tokens are compared as a whole, because ``<|end|>`` and ``<|endoftext|>`` share a prefix.
        """
        same = 0
        for one, other in zip(self._pieces(after), self._pieces(rest), strict=False):
            if one != other:
                if not self._special.fullmatch(one) and not self._special.fullmatch(other):
                    same += len(_shared_start([one, other]))
                break
            same += len(one)
        return same

    def _pieces(self, text: str) -> list[str]:
        pieces, at = [], 0
        for match in self._special.finditer(text):
            pieces += [text[at : match.start()], match[0]]
            at = match.end()
        return [piece for piece in (*pieces, text[at:]) if piece]

    def _core_in(self, turns: Turns, i: int, text: str) -> Span | None:
        """Find the core of turn ``i`` in the rendered ``text`` of ``turns``.

        None if the core is not rendered, or if the template fails on the marks around it.
        """
        if not _core(turns[i]):
            return None
        try:
            marked = self._template.render([*turns[:i], _with_marks(turns[i]), *turns[i + 1 :]], self._tools)
        except RowRejectedError:
            return None
        begin, end = marked.find(_OPEN), marked.find(_CLOSE)
        if begin < 0 or end < begin or marked.replace(_OPEN, "").replace(_CLOSE, "") != text:
            return None
        return begin, end - 1

    def _with_reasoning(self, i: int, ended: str, start: int, reasoning: str) -> SampleText:
        """Build a separate sample for a turn whose reasoning the template drops even from the last answer.

        DeepSeek-R1's template does so: its prompt opens ``<think>``, and the model continues from there.
        """
        prompt = self._prompt_for(i) or ended[:start]
        return self._separate_sample(
            answered(prompt, reasoning, ended[start:], tags_of(self._template.literals)),
            len(prompt),
            reasoning,
        )

    def _with_stop(self, whole: str, span: Span) -> Span:
        """Extend ``span`` by the next token if nothing else closes the turn (``<|user|>`` in GLM)."""
        start, end = span
        following = self._special.match(whole, end)
        return (start, following.end()) if following and not self._is_closed(whole[start:end]) else span

    def _is_closed(self, answer: str) -> bool:
        specials = list(self._special.finditer(answer))
        return bool(specials) and not answer[specials[-1].end() :].strip()

    def _by_marks(self, whole: str, spans: list[Span]) -> list[Span]:
        """Narrow each span to the template's own generation marks inside it.

        A span without marks stays as it is, and so do all spans if the marks change the text.
        """
        text, marks = self._template.render_marked(self._turns, self._tools)
        if text != whole:
            return spans
        result: list[Span] = []
        for span in spans:
            # Some templates also mark the turn header and an empty thought, which belong to the prompt.
            inside = [(max(m[0], span[0]), min(m[1], span[1])) for m in marks if _overlap(m, span)]
            # Other templates omit white space after the header, which the prompt does not have either.
            if inside and not whole[span[0] : inside[0][0]].strip():
                inside[0] = (span[0], inside[0][1])
            result += inside or [span]
        return sorted(set(result))

    def _end_turn(self, text: str, spans: list[Span]) -> SampleText:
        """Cut the text after its last span.

        If that removes nothing and the template leaves the turn open, add the end-of-text token.
        """
        start, end = spans[-1]
        if end < len(text):  # a last turn that has a separate sample
            text = text[:end]
        elif self._eos and not self._is_closed(text[start:]):
            text += self._eos
            spans = [*spans[:-1], (start, len(text))]
        return SampleText(text, tuple(spans))


def find_assistant_spans(
    template: ChatTemplate,
    turns: Turns,
    weights: Sequence[float],
    tools: Tools | None,
    special: re.Pattern[str],
    eos: str,
    everything: bool = False,
    reasoning_in_loss: bool = True,
) -> list[SampleText]:
    """Render the texts of one conversation, with the spans of each that are in the loss.

    ``weights`` has the loss weight of each turn; turns after the last weighted one are left out, because
    nothing is learned from them. With ``everything`` the text of all turns is in the loss, with weight 1.
    Without ``reasoning_in_loss`` the reasoning of an answer and its tags are input only. ``special`` matches
    any special token, ``eos`` is the end-of-text token. Raises ``RowRejectedError`` if the template rejects
    the conversation, or if no turn is in the loss.
    """
    if everything:
        return [_SpanFinder(template, turns, tools, special, eos, reasoning_in_loss).everything()]
    in_loss = {i: weight for i, weight in enumerate(weights) if weight}
    if not in_loss:
        raise RowRejectedError("no-answer", "No assistant turn is in the loss.")
    turns = turns[: max(in_loss) + 1]
    return _SpanFinder(template, turns, tools, special, eos, reasoning_in_loss).samples(in_loss)


def _with_weights(sample: SampleText, *weights: float) -> SampleText:
    return sample if set(weights) == {1.0} else SampleText(sample.text, sample.spans, weights)


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _shared_start(texts: Sequence[str]) -> str:
    """Return the longest common prefix of the texts."""
    low, high = min(texts), max(texts)
    same = next(
        (n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high))
    )
    return low[:same]


def _content(turn: Any) -> str:
    content = turn.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _core(turn: Any) -> str:
    """Return the text that identifies a turn: its content or, if empty, the name of the called tool."""
    text = _content(turn).strip()
    if not text and turn.get("tool_calls"):
        return str(turn["tool_calls"][0]["function"]["name"])
    return text


def _reasoning(turn: Any) -> str:
    """Return the reasoning of a turn before its answer."""
    content = _content(turn)
    inside = content.split("</think>")[0].rpartition("<think>")[2] if "</think>" in content else ""
    return (str(turn.get("reasoning_content") or "") or inside).strip()


def _with_marks(turn: Any) -> dict[str, Any]:
    """Return the turn with marks around its core."""
    text, core = _content(turn), _core(turn)
    if not text.strip():
        call, *rest = turn["tool_calls"]
        named = {**call["function"], "name": f"{_OPEN}{core}{_CLOSE}"}
        return {**turn, "tool_calls": [{**call, "function": named}, *rest]}
    at = text.index(core)
    marked = f"{text[:at]}{_OPEN}{core}{_CLOSE}{text[at + len(core) :]}"
    if isinstance(turn["content"], list):
        return {**turn, "content": [{"type": "text", "text": marked}]}
    return {**turn, "content": marked}
