"""Where in a rendered conversation the assistant speaks.

For each assistant turn that trains, the conversation is rendered up to the turn (with the generation
prompt, as the model sees it when it is to answer) and up to the turn's end: what the second has
more is what the model should say, its turn-end token included.

Some templates rewrite the past (Qwen3 drops old reasoning, Mistral moves the system prompt, gpt-oss
closes earlier turns with another token). Then the turn is found in the whole conversation by marking
its text; and where rewriting has removed reasoning, which would so never be learned, or the turn
cannot be found, the conversation up to that turn becomes a sample of its own, just as the model will
meet it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from qlora_tui.data.conversation import RowRefused
from qlora_tui.data.template import ChatTemplate, Span, Tools, Turns

_OPEN, _CLOSE = "\U000f0002", "\U000f0003"
_PROBES = ("\U000f0004", "\U000f0005")
PRIVATE = re.compile("[\U000f0000-\U000f0005]")
"""Characters this program uses as marks; taken out of every text before it is rendered."""


class Layout(Struct, frozen=True):
    """A text the model sees, and the spans of it that train, in characters."""

    text: str
    spans: tuple[Span, ...]


class _Finder:
    """Finds the assistant's spans in one conversation."""

    def __init__(
        self, template: ChatTemplate, turns: Turns, tools: Tools | None, special: re.Pattern[str], eos: str
    ):
        self._template = template
        self._turns = list(turns)
        self._tools = tools
        self._special = special
        self._eos = eos
        self._marked: str | None = None

    def layouts(self, training: Sequence[int]) -> list[Layout]:
        """The whole conversation with the spans of the turns ``training``, and samples of their own."""
        template, turns = self._template, self._turns
        whole = template.render(turns, self._tools)
        spans: list[Span] = []
        own: list[Layout] = []
        for i in training:
            is_last = i == len(turns) - 1
            ended = whole if is_last else template.render(turns[: i + 1], self._tools)
            start = self._start(i, ended)
            if is_last or (whole.startswith(ended) and start < len(ended)):
                spans.append((start, len(ended)))
                continue
            found = self._in_rewritten(i, whole, ended, start)
            if found is None or self._lost_reasoning(i, whole[slice(*found)]):
                own.append(self._closed(ended, [(start, len(ended))]))
            else:
                spans.append(found)
        if template.has_generation_marks:
            spans = self._by_marks(whole, spans)
        main = [self._closed(whole, spans)] if spans else []
        return own + main

    def _start(self, i: int, ended: str) -> int:
        """Where the answer of turn ``i`` begins in the text that ends with it."""
        try:
            asked = self._template.render(self._turns[:i], self._tools, prompt=True) if i else None
        except RowRefused:
            asked = None
        if asked is not None and ended.startswith(asked):
            return len(asked)
        probes = [self._probe(i, character) for character in _PROBES]
        return len(_shared_start([ended, *probes, *([asked] if asked is not None else [])]))

    def _probe(self, i: int, character: str) -> str:
        """The same text, but with an answer no text begins with."""
        turn = {"role": "assistant", "content": character}
        if isinstance(self._turns[i].get("content"), list):
            turn["content"] = [{"type": "text", "text": character}]  # type: ignore[assignment]
        return self._template.render([*self._turns[:i], turn], self._tools)

    def _in_rewritten(self, i: int, whole: str, ended: str, start: int) -> Span | None:
        """Turn ``i`` in a whole conversation whose beginning is not ``ended``; None if not found."""
        core = _content(self._turns[i]).strip()
        target = ended[start:]
        at = target.find(core) if core else -1
        marked = self._marked_whole(whole)
        if at < 0 or marked is None:
            return None
        first, last = marked.find(f"{_OPEN}{i}{_OPEN}"), marked.find(f"{_CLOSE}{i}{_CLOSE}")
        if first < 0 or last < 0:
            return None
        content_start, content_end = len(_unmarked(marked[:first])), len(_unmarked(marked[:last]))
        before, after = target[:at], target[at + len(core) :]
        begins = (
            content_start - len(before)
            if before and whole[:content_start].endswith(before)
            else content_start
        )
        return begins, content_end + self._closing(after, whole[content_end:])

    def _closing(self, after: str, rest: str) -> int:
        """How much of ``rest`` closes the turn, given what closes it where it is the last.

        They are compared token by token at special tokens, for ``<|end|>`` and ``<|endoftext|>`` begin
        alike. A turn that earlier turns close with another token is closed by that one token.
        """
        same = 0
        for one, other in zip(self._pieces(after), self._pieces(rest), strict=False):
            if one != other:
                if not self._special.fullmatch(one) and not self._special.fullmatch(other):
                    same += len(_shared_start([one, other]))
                break
            same += len(one)
        if not self._special.search(rest[:same]):
            following = self._special.match(rest, same)
            return following.end() if following else same
        return same

    def _pieces(self, text: str) -> list[str]:
        pieces, at = [], 0
        for match in self._special.finditer(text):
            pieces += [text[at : match.start()], match[0]]
            at = match.end()
        return [piece for piece in (*pieces, text[at:]) if piece]

    def _marked_whole(self, whole: str) -> str | None:
        """The whole with each assistant text between marks; None if the template is put off by them."""
        if self._marked is None:
            turns = [
                _with_marks(turn, i) if turn["role"] == "assistant" else turn
                for i, turn in enumerate(self._turns)
            ]
            try:
                self._marked = self._template.render(turns, self._tools)
            except RowRefused:
                self._marked = ""
        return self._marked if _unmarked(self._marked) == whole else None

    def _lost_reasoning(self, i: int, found: str) -> bool:
        turn = self._turns[i]
        reasoning = str(turn.get("reasoning_content") or "").strip()
        content = _content(turn)
        if not reasoning and "</think>" in content:
            reasoning = content.split("</think>")[0].rpartition("<think>")[2].strip()
        return bool(reasoning) and reasoning not in found

    def _by_marks(self, whole: str, spans: list[Span]) -> list[Span]:
        """The template's own generation marks, where it has put any on a turn that trains."""
        text, marks = self._template.render_marked(self._turns, self._tools)
        if text != whole:
            return spans
        result: list[Span] = []
        for span in spans:
            inside = [m for m in marks if m[0] < span[1] and span[0] < m[1]]
            result += inside or [span]
        return sorted(set(result))

    def _closed(self, text: str, spans: list[Span]) -> Layout:
        """With an end-of-text token after a last answer that the template leaves open."""
        start, end = spans[-1]
        if end == len(text) and self._eos:
            specials = list(self._special.finditer(text, start))
            if not specials or text[specials[-1].end() :].strip():
                text += self._eos
                spans = [*spans[:-1], (start, len(text))]
        return Layout(text, tuple(spans))


def lay_out(
    template: ChatTemplate,
    turns: Turns,
    trains: Sequence[bool],
    tools: Tools | None,
    special: re.Pattern[str],
    eos: str,
) -> list[Layout]:
    """The texts of one conversation and what trains in each.

    ``trains`` says for each turn whether the model should learn it; turns after the last of them are
    left out, for nothing is learned from them. ``special`` matches any special token, ``eos`` is the
    end-of-text token. Raises ``RowRefused`` where the template does.
    """
    training = [i for i, wanted in enumerate(trains) if wanted]
    if not training:
        raise RowRefused("no-answer", "No assistant turn trains.")
    return _Finder(template, turns[: training[-1] + 1], tools, special, eos).layouts(training)


def _shared_start(texts: Sequence[str]) -> str:
    """The longest text that all begin with."""
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


def _with_marks(turn: Any, i: int) -> dict[str, Any]:
    text = _content(turn)
    core = text.strip()
    if not core:
        return dict(turn)
    lead, trail = text[: text.index(core)], text[text.index(core) + len(core) :]
    marked = f"{lead}{_OPEN}{i}{_OPEN}{core}{_CLOSE}{i}{_CLOSE}{trail}"
    if isinstance(turn["content"], list):
        return {**turn, "content": [{"type": "text", "text": marked}]}
    return {**turn, "content": marked}


_MARK = re.compile(f"{_OPEN}\\d+{_OPEN}|{_CLOSE}\\d+{_CLOSE}")


def _unmarked(text: str) -> str:
    return _MARK.sub("", text)
