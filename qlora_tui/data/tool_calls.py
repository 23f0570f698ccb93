"""Function calls in a model's answer, read in the way its chat template writes them.

The template is asked: it renders an answer with known calls, and what stands around their names and arguments
is the format. So what training taught a model to write is what is read here. There are four kinds: a JSON
object with name and arguments (Qwen, Hermes, Llama 3, Granite), a name before a JSON object of arguments
(DeepSeek, Mistral), a list of calls in Python (LFM2), and a name before single arguments (Qwen3-Coder, GLM).
A format of another kind is not read: such a call stays text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from msgspec import Struct

from qlora_tui.data.conversation import Conversation, Message, RowRejectedError, ToolCall
from qlora_tui.data.render import render_text
from qlora_tui.data.thought_splitter import begun_length
from qlora_tui.data.tokenizer import ChatTokenizer

Parse: TypeAlias = Callable[[str, Mapping[str, Any]], list[ToolCall] | None]
"""Calls in a text, all of which is calls, by the schemas of their arguments; None where it is not."""

_NAME, _OTHER = "qvzcall", "qvzother"
_ARGUMENTS = {"qvzkey": "qvzvalue"}
_TWO_ARGUMENTS = {"qvzkey": "qvzvalue", "qvzkeyb": "qvzvalueb"}
_DECODER = json.JSONDecoder()


class CallFormat(Struct, frozen=True):
    """How one chat template writes calls."""

    mark: str
    """Text with which the first call begins; empty if that is its JSON object."""
    literals: str
    """All that stands around names and arguments."""
    parse: Parse

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[ToolCall, ...]:
        """Return the calls that ``text``, from the mark on, consists of; none if it cannot be understood.

        ``tools``: the functions offered, as JSON schemas in OpenAI's wrapping; another one is not called.
        """
        functions = {tool["function"]["name"]: tool["function"] for tool in tools if "function" in tool}
        schemas = {name: function.get("parameters") or {} for name, function in functions.items()}
        try:
            calls = self.parse(text, schemas) or []
        except (ValueError, TypeError, RecursionError):
            return ()
        for call in calls:
            is_named = isinstance(call.name, str) and call.name in schemas
            if not (is_named and isinstance(call.arguments, dict)):
                return ()
        return tuple(calls)


class CallText:
    """Holds back what may be a call in a text that is fed in pieces, and reads it at the end."""

    def __init__(self, call_format: CallFormat, tools: Sequence[Mapping[str, Any]]) -> None:
        self._format = call_format
        self._mark = call_format.mark
        self._tools = tools
        self.calls: tuple[ToolCall, ...] = ()
        """The calls, from :meth:`rest` on."""
        self.pending = ""
        """What is held back: the calls, from their mark on, at the end."""
        self._has_begun = False
        self._is_text = False

    def feed(self, text: str) -> str:
        """Return the text that certainly is none."""
        if self._is_text:
            return text
        self.pending += text
        if self._has_begun:
            return ""
        if self._mark:
            place = self.pending.find(self._mark)
            self._has_begun = place >= 0
            if not self._has_begun:
                place = len(self.pending) - begun_length(self.pending, [self._mark])
        elif not (start := self.pending.lstrip()):
            place = 0
        else:
            self._has_begun = start.startswith("{")
            self._is_text = not self._has_begun
            place = len(self.pending) if self._is_text else 0
        ready, self.pending = self.pending[:place], self.pending[place:]
        return ready

    def rest(self) -> str:
        """Read the calls at the end of the text; return what is held back and is none."""
        if self._has_begun:
            self.calls = self._format.read(self.pending, self._tools)
        return "" if self.calls else self.pending


def call_format(tokenizer: ChatTokenizer) -> CallFormat | None:
    """Return how a model's chat template writes calls; None if it cannot be found out."""
    try:
        one, two, several = (
            _written(tokenizer, *calls)
            for calls in (
                [ToolCall(_NAME, _ARGUMENTS)],
                [ToolCall(_NAME, _TWO_ARGUMENTS)],
                [ToolCall(_NAME, _ARGUMENTS), ToolCall(_OTHER, _ARGUMENTS)],
            )
        )
    except RowRejectedError:
        try:
            one, two = (
                _written(tokenizer, ToolCall(_NAME, arguments)) for arguments in (_ARGUMENTS, _TWO_ARGUMENTS)
            )
        except RowRejectedError:
            return None
        # Some templates write only one call.
        several = f"{one}{one.replace(_NAME, _OTHER)}"
    if _NAME not in one or "qvzvalue" not in one:
        return None
    return (
        _objects(one, several)
        or _names_and_objects(one, several)
        or _python_calls(one)
        or _single_arguments(two, several)
    )


def _written(tokenizer: ChatTokenizer, *calls: ToolCall) -> str:
    """Return what the template writes for an answer with these calls, without the end of the turn."""
    tools = tuple(
        {
            "type": "function",
            "function": {"name": name, "description": "", "parameters": {"type": "object", "properties": {}}},
        }
        for name in (_NAME, _OTHER)
    )
    messages = (Message("user", "qvz"), Message("assistant", "", tool_calls=calls))
    sample = render_text(Conversation(messages, tools), tokenizer).samples[-1]
    text = sample.text[sample.spans[0][0] : sample.spans[-1][1]] if sample.spans else ""
    ends = {tokenizer.backend.id_to_token(token_id) or "" for token_id in tokenizer.turn_end_ids}
    last = max(text.rfind(word) for word in ("qvzvalue", _NAME, _OTHER))
    places = [place for end in ends if end and (place := text.find(end, last)) >= 0]
    text = text[: min(places, default=len(text))].strip()
    # An empty thought before the calls is none of them.
    return re.sub(r"\A(<think>\s*)?</think>\s*", "", text)


def _objects(one: str, several: str) -> CallFormat | None:
    """Return the format of calls that are JSON objects."""
    for start, value, end in _json_objects(one):
        if start > one.find(_NAME):
            break
        holder = next((each for each in _dicts(value) if _NAME in each.values()), None)
        if holder is None:
            continue
        name_key = next(key for key, item in holder.items() if item == _NAME)
        argument_keys = [key for key, item in holder.items() if _as_object(item) == _ARGUMENTS]
        if not argument_keys:
            continue
        around = [one[:start], one[end:], _between_objects(several)]
        literals = {part for text in around for part in re.split(r"[\s\[\],]+", text) if part}
        opening = one[:start].strip().rstrip("[").strip()
        skip = re.compile(
            "|".join([r"[\s\[\],;]+", *map(re.escape, sorted(literals, key=len, reverse=True))])
        )
        return CallFormat(
            mark=opening.split()[0] if opening else "",
            literals=" ".join(around),
            parse=_parse_objects(skip, name_key, argument_keys[0]),
        )
    return None


def _json_objects(text: str, place: int = 0) -> Iterator[tuple[int, Any, int]]:
    """Yield beginning, value and end of each JSON object from ``place`` on; of those inside others too."""
    for match in re.compile(r"\{").finditer(text, place):
        try:
            value, end = _DECODER.raw_decode(text, match.start())
        except ValueError:
            continue
        yield match.start(), value, end


def _between_objects(several: str) -> str:
    """Return what stands between the JSON objects of two calls; nothing if there is one."""
    ends = [0]
    for start, _, end in _json_objects(several):
        if start >= ends[-1]:
            ends.append(end)
    if len(ends) < 3:
        return ""
    return several[ends[-2] : several.find("{", ends[-2])]


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _dicts(inner)


def _as_object(value: Any) -> Any:
    """Return arguments, which some formats write as a string of JSON, as an object."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return None
    return value


def _parse_objects(skip: re.Pattern[str], name_key: str, arguments_key: str) -> Parse:
    def parse(text: str, schemas: Mapping[str, Any]) -> list[ToolCall] | None:
        calls: list[ToolCall] = []
        place = 0
        while True:
            while (match := skip.match(text, place)) and match.end() > place:
                place = match.end()
            if place == len(text):
                return calls
            value, place = _DECODER.raw_decode(text, place)
            holder = next((each for each in _dicts(value) if name_key in each), None)
            if holder is None:
                return None
            calls.append(ToolCall(holder[name_key], _as_object(holder.get(arguments_key, {}))))

    return parse


def _loose(text: str) -> str:
    """Return a pattern of a literal text in which all white space is optional."""
    return r"\s*".join(re.escape(part) for part in re.split(r"\s+", text))


def _names_and_objects(one: str, several: str) -> CallFormat | None:
    """Return the format of calls with a JSON object of arguments after the name."""
    name_end = one.find(_NAME) + len(_NAME)
    start, value, end = next(_json_objects(one, name_end), (0, None, 0))
    if value != _ARGUMENTS:
        return None
    opening, middle, closing = one[: name_end - len(_NAME)], one[name_end:start], one[end:]
    between = several[: several.find(_OTHER)].rpartition("}")[2]
    last = several[several.find(_OTHER) :].rpartition("}")[2]
    begin = re.compile(rf"\s*(?:{_loose(opening.strip())}|{_loose(between.strip())})\s*")
    head = re.compile(rf"([^\s{{}}<\[(|｜]+?)\s*{_loose(middle.strip())}\s*")
    tail = re.compile(rf"\s*(?:{_loose(closing.strip())}|{_loose(last.strip())})?\s*\Z")
    return CallFormat(
        mark=opening.split()[0] if opening.strip() else "",
        literals=opening + middle + between + closing,
        parse=_parse_names(begin, head, tail),
    )


def _parse_names(begin: re.Pattern[str], head: re.Pattern[str], tail: re.Pattern[str]) -> Parse:
    def parse(text: str, schemas: Mapping[str, Any]) -> list[ToolCall] | None:
        calls: list[ToolCall] = []
        place = 0
        while not (calls and tail.match(text, place)):
            started = begin.match(text, place)
            named = started and head.match(text, started.end())
            if not named:
                return None
            value, place = _DECODER.raw_decode(text, named.end())
            calls.append(ToolCall(named[1], value))
        return calls

    return parse


def _python_calls(one: str) -> CallFormat | None:
    """Return the format of calls in a list as Python writes it."""
    match = re.search(r"\[qvzcall\(qvzkey=(['\"])qvzvalue\1\)\]", one)
    if match is None or not (opening := one[: match.start()].strip()):
        return None
    closing = one[match.end() :].strip()

    def parse(text: str, schemas: Mapping[str, Any]) -> list[ToolCall] | None:
        body = text.strip().removeprefix(opening).strip()
        body = body.removesuffix(closing).strip() if closing else body
        try:
            tree = ast.parse(body, mode="eval").body
        except (SyntaxError, MemoryError):
            return None
        calls = []
        for each in tree.elts if isinstance(tree, ast.List) else []:
            if not isinstance(each, ast.Call) or not isinstance(each.func, ast.Name) or each.args:
                return None
            arguments = {word.arg: ast.literal_eval(word.value) for word in each.keywords if word.arg}
            calls.append(ToolCall(each.func.id, arguments))
        return calls

    return CallFormat(mark=opening.split()[0], literals=opening + closing, parse=parse)


def _single_arguments(two: str, several: str) -> CallFormat | None:
    """Return the format of calls that write each argument by itself."""
    pieces = re.split("(qvzcall|qvzkeyb|qvzvalueb|qvzkey|qvzvalue)", two)
    if pieces[1::2] != [_NAME, "qvzkey", "qvzvalue", "qvzkeyb", "qvzvalueb"]:
        return None
    opening, first, between, following, _, closing = pieces[::2]
    # What ends an argument is what is left of the text between two, without what begins the next.
    common = 0
    while common < min(len(first), len(following)) and first[-common - 1] == following[-common - 1]:
        common += 1
    common -= max(first[len(first) - common :].find("<"), 0)
    before_key, after_value = following[len(following) - common :], following[: len(following) - common]
    after_name = first[: len(first) - common]
    if not (after_value.strip() and between.strip() and before_key.strip() and opening.strip()):
        return None
    end = closing.removeprefix(after_value)
    argument = re.compile(
        rf"{_loose(before_key)}(?P<key>[^<>\n]+?){_loose(between)}(?P<value>.*?){_loose(after_value)}\s*",
        re.DOTALL,
    )
    begin = re.compile(rf"\s*{_loose(opening.strip())}\s*(?P<name>[^\s<>]+){_loose(after_name)}\s*")
    tail = re.compile(_loose(end) + r"\s*")

    def parse(text: str, schemas: Mapping[str, Any]) -> list[ToolCall] | None:
        calls: list[ToolCall] = []
        place = 0
        while place < len(text):
            named = begin.match(text, place)
            if not named:
                return None
            place, arguments = named.end(), {}
            properties = (schemas.get(named["name"]) or {}).get("properties") or {}
            while found := argument.match(text, place):
                arguments[found["key"]] = _typed(found["value"], properties.get(found["key"]) or {})
                place = found.end()
            ended = tail.match(text, place)
            if not ended:
                return None
            place = ended.end()
            calls.append(ToolCall(named["name"], arguments))
        return calls

    return CallFormat(mark=opening.split()[0], literals=two + several, parse=parse)


def _typed(text: str, schema: Mapping[str, Any]) -> Any:
    """Return an argument that is written as text in the type of its schema."""
    if schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
