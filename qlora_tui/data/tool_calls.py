"""Parses function calls in a model's answer, in the format in which its chat template writes them.

The format is derived from the template: the template renders an answer with known calls, and the text around
their names and arguments is the format. So this module reads the format that training taught the model to
write. There are five kinds of formats: a JSON object with name and arguments (Qwen, Hermes, Llama 3,
Granite), a name before a JSON object of arguments (DeepSeek, Mistral), a list of calls in Python (LFM2), a
name before arguments that are written one by one (Qwen3-Coder, GLM), and a name before an object with bare
keys and marked strings (Gemma 4). Calls in any other format stay text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.data.conversation import Conversation, Message, RowRejectedError, ToolCall
from qlora_tui.data.render import render_text
from qlora_tui.data.thought_splitter import begun_length
from qlora_tui.data.tokenizer import ChatTokenizer

Parse: TypeAlias = Callable[[str, Mapping[str, Any]], list[ToolCall] | None]
"""Parses a text that consists only of calls, with the schemas of their arguments; None for any other text."""

_NAME, _OTHER = "qvzcall", "qvzother"
_ARGUMENTS = {"qvzkey": "qvzvalue"}
_TWO_ARGUMENTS = {"qvzkey": "qvzvalue", "qvzkeyb": "qvzvalueb"}
_DECODER = json.JSONDecoder()
_MOST_TRIED = 100
"""Maximum number of places that are tried as the end of the last complete call."""


class Fields(Struct, frozen=True):
    """How arguments that are not a JSON object are written."""

    begin: str = ""
    before_key: str = ""
    after_key: str = ""
    after_value: str = ""
    separator: str = ""
    end: str = ""
    quote: str = ""
    """Mark around a string. Empty: strings are written as they are, and other values as JSON."""
    is_python: bool = False
    """Whether strings are written as in Python, with escapes."""
    constants: tuple[str, str, str] = ("true", "false", "null")
    is_sorted: bool = False
    """Whether keys are in alphabetical order."""


class CallShape(Struct, frozen=True):
    """The text that a template writes around the names and arguments of calls."""

    first: str
    """Text before the arguments of the first call; :func:`named` inserts the function's name."""
    further: str
    """Text between the arguments of two calls, which includes the name of the second function. Empty if an
    answer can have only one call.
    """
    last: str
    """Text after the arguments of the last call."""
    fields: Fields | None = None
    """How arguments are written; None for a JSON object."""


def argument_schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the JSON schema of each function's arguments, keyed by the function's name."""
    functions = [tool["function"] for tool in tools if "function" in tool]
    return {function["name"]: function.get("parameters") or {"type": "object"} for function in functions}


def named(text: str, name: str) -> str:
    """Return a text of a :class:`CallShape` with the name of a function inserted."""
    return text.replace(_NAME, name)


class CallFormat(Struct, frozen=True):
    """The format in which one chat template writes calls."""

    mark: str
    """Text at the start of the first call; empty if the call starts with its JSON object."""
    literals: str
    """All text around names and arguments."""
    parse: Parse
    shape: CallShape | None = None
    """The text to write for calls; None if they can only be read."""

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[ToolCall, ...]:
        """Parse ``text``, which begins with the mark, into calls; return none if it is not entirely calls.

        ``tools`` are the functions offered, as JSON schemas in OpenAI's format; calls of other functions are
        not accepted.
        """
        schemas = argument_schemas(tools)
        try:
            calls = self.parse(text, schemas) or []
        except (ValueError, TypeError, RecursionError):
            return ()
        for call in calls:
            is_named = isinstance(call.name, str) and call.name in schemas
            if not (is_named and isinstance(call.arguments, dict)):
                return ()
        return tuple(calls)

    def read_cut(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[ToolCall, ...]:
        """Return the complete calls at the beginning of a text that breaks off in the middle of a call."""
        shape = self.shape
        if shape is None or not shape.further:
            return ()
        opening = shape.further.partition(_NAME)[0]
        begun = begun_length(text, [opening, shape.last])
        # Arguments without an end mark may continue after a part of the text that ends a call.
        has_end = shape.fields is None or shape.fields.end
        fewest = 1 if has_end else len(shape.last)
        places = [len(text) - begun] if begun >= fewest else []
        places += reversed([match.start() for match in re.finditer(_loose(opening), text)])
        tried = (self.read(text[:place] + shape.last, tools) for place in places[:_MOST_TRIED])
        return next(filter(None, tried), ())


class CallText:
    """Holds back possible calls in a text that is fed in pieces, and parses them at the end."""

    def __init__(
        self, call_format: CallFormat, tools: Sequence[Mapping[str, Any]], *, must_call: bool = False
    ) -> None:
        """Start without text. With ``must_call`` the answer has only calls, so a call that cannot be parsed
        is dropped instead of returned as text.
        """
        self._format = call_format
        self._must_call = must_call
        self._mark = call_format.mark
        self._tools = tools
        self.calls: tuple[ToolCall, ...] = ()
        """The calls, which are set by :meth:`rest`."""
        self.pending = ""
        """Text that is held back; at the end, the calls, starting with their mark."""
        self._has_begun = False
        self._is_text = False

    def feed(self, text: str) -> str:
        """Return the text that is certainly not part of a call."""
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

    def rest(self, *, is_cut: bool = False) -> str:
        """Parse the calls at the end of the text; return the held-back text that is not a call.

        In a truncated text only the complete calls count.
        """
        if self._has_begun:
            self.calls = self._format.read(self.pending, self._tools)
            if is_cut and not self.calls:
                self.calls = self._format.read_cut(self.pending, self._tools)
        return "" if self.calls or self._must_call else self.pending


def call_format(tokenizer: ChatTokenizer) -> CallFormat | None:
    """Return the format in which a model's chat template writes calls; None if it cannot be determined."""
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
        # Some templates can write only one call.
        several = f"{one}{one.replace(_NAME, _OTHER)}"
        single = True
    else:
        single = False
    if _NAME not in one or "qvzvalue" not in one:
        return None
    written = (
        _objects(one, several)
        or _names_and_objects(one, several)
        or _python_calls(one, several)
        or _marked_texts(one, several)
        or _single_arguments(two, several)
    )
    if written is None or (shape := written.shape) is None:
        return written
    if shape.fields is not None:
        shape = replace(shape, fields=_observed(shape.fields, tokenizer))
    return replace(written, shape=replace(shape, further="") if single else shape)


def _observed(fields: Fields, tokenizer: ChatTokenizer) -> Fields:
    """Return ``fields``, completed with the constants and the order of keys that the template writes."""
    text = _written(tokenizer, ToolCall(_NAME, {"qvz3": True, "qvz2": False, "qvz1": None}))
    found = [re.search(word, text) for word in ("[Tt]rue", "[Ff]alse", "null|None")]
    words = [match[0] if match else "" for match in found]
    return replace(fields, constants=tuple(words), is_sorted=text.find("qvz1") < text.find("qvz3"))


def _written(tokenizer: ChatTokenizer, *calls: ToolCall) -> str:
    """Return the template's text for an answer with these calls, without the end of the turn."""
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
    # An empty thought before the calls is not part of them.
    return re.sub(r"\A(<think>\s*)?</think>\s*", "", text)


def _shape(one: str, several: str, arguments: str, fields: Fields | None = None) -> CallShape | None:
    """Return the shape of calls, or None if ``arguments`` do not follow the name.

    Args:
        one: Text with one call.
        several: Text with several calls.
        arguments: The arguments as they are written in both texts.
        fields: How arguments are written; None for a JSON object.
    """
    first, found, last = one.partition(arguments)
    if not found or _NAME not in first or _NAME in last:
        return None
    between, _, behind = several.partition(arguments)[2].partition(arguments)
    further = between.replace(_OTHER, _NAME) if _OTHER in between and _OTHER not in behind else ""
    return CallShape(first, further, last, fields)


def _json_shape(one: str, several: str) -> CallShape | None:
    objects = (one[start:end] for start, value, end in _json_objects(one) if value == _ARGUMENTS)
    written = next(objects, "")
    return _shape(one, several, written) if written else None


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
            shape=_json_shape(one, several),
        )
    return None


def _json_objects(text: str, place: int = 0) -> Iterator[tuple[int, Any, int]]:
    """Yield start, value and end of each JSON object at or after ``place``, including nested ones."""
    for match in re.compile(r"\{").finditer(text, place):
        try:
            value, end = _DECODER.raw_decode(text, match.start())
        except ValueError:
            continue
        yield match.start(), value, end


def _between_objects(several: str) -> str:
    """Return the text between the JSON objects of two calls; empty if there is only one object."""
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
    """Return arguments as an object; some formats write them as a string of JSON."""
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
        shape=_json_shape(one, several),
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


def _python_calls(one: str, several: str) -> CallFormat | None:
    """Return the format of calls that are written as a Python list of function calls."""
    match = re.search(r"\[qvzcall(\(qvzkey=(['\"])qvzvalue\2\))\]", one)
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

    fields = Fields(begin="(", after_key="=", separator=", ", end=")", quote=match[2], is_python=True)
    return CallFormat(
        mark=opening.split()[0],
        literals=opening + closing,
        parse=parse,
        shape=_shape(one, several, match[1], fields),
    )


def _marked_texts(one: str, several: str) -> CallFormat | None:
    """Return the format of calls whose arguments are an object with bare keys and marks around strings."""
    match = re.fullmatch(r"(.*?)qvzcall(\{qvzkey:(\S+?)qvzvalue\3\})(.*)", one, re.DOTALL)
    if match is None or not match[1].strip() or not match[4].strip():
        return None
    opening, arguments, quote, closing = match.groups()
    # The text after the last call is not always present.
    end = several.partition(arguments)[2].partition(opening)[0].strip() or closing.strip()
    head = re.compile(rf"\s*{_loose(opening.strip())}\s*([^\s{{}}]+?)\s*(?=\{{)")
    rest = _loose(closing.strip().removeprefix(end).strip())
    tail = re.compile(rf"\s*{_loose(end)}\s*(?:{rest})?\s*")

    def parse(text: str, schemas: Mapping[str, Any]) -> list[ToolCall] | None:
        calls: list[ToolCall] = []
        place = 0
        while place < len(text):
            named = head.match(text, place)
            if not named:
                return None
            value, place = _marked_value(text, named.end(), quote)
            ended = tail.match(text, place)
            if not ended:
                return None
            place = ended.end()
            calls.append(ToolCall(named[1], value))
        return calls

    fields = Fields(begin="{", after_key=":", separator=",", end="}", quote=quote)
    return CallFormat(
        mark=opening.split()[0],
        literals=one,
        parse=parse,
        shape=_shape(one, several, arguments, fields),
    )


def _marked_value(text: str, place: int, quote: str) -> tuple[Any, int]:
    """Return a value with strings between ``quote`` marks, and the value's end. Raises ValueError."""
    if text.startswith(quote, place):
        begin = place + len(quote)
        end = text.index(quote, begin)
        return text[begin:end], end + len(quote)
    opening = text[place : place + 1]
    if opening not in ("{", "["):
        scalar = re.compile(r"[^,\]}]+").match(text, place)
        return _scalar(scalar[0].strip() if scalar else ""), scalar.end() if scalar else place
    closing, place, items = "}" if opening == "{" else "]", place + 1, []
    while text[place : place + 1] != closing:
        key = ""
        if opening == "{":
            colon = text.index(":", place)
            key, place = text[place:colon].strip().removeprefix(quote).removesuffix(quote), colon + 1
        value, place = _marked_value(text, place, quote)
        items.append((key, value))
        if text[place : place + 1] == ",":
            place += 1
        elif text[place : place + 1] != closing:
            raise ValueError("neither a separator nor an end")
    return (dict(items) if opening == "{" else [value for _, value in items]), place + 1


def _single_arguments(two: str, several: str) -> CallFormat | None:
    """Return the format of calls that write each argument separately."""
    pieces = re.split("(qvzcall|qvzkeyb|qvzvalueb|qvzkey|qvzvalue)", two)
    if pieces[1::2] != [_NAME, "qvzkey", "qvzvalue", "qvzkeyb", "qvzvalueb"]:
        return None
    opening, first, between, following, _, closing = pieces[::2]
    # An argument ends with the text between two arguments, without the beginning of the next one.
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

    single = f"{before_key}qvzkey{between}qvzvalue{after_value}"
    fields = Fields(before_key=before_key, after_key=between, after_value=after_value)
    return CallFormat(
        mark=opening.split()[0],
        literals=two + several,
        parse=parse,
        shape=_shape(f"{opening}{_NAME}{after_name}{single}{end}", several, single, fields),
    )


def _typed(text: str, schema: Mapping[str, Any]) -> Any:
    """Convert an argument that is written as text to the type in its schema."""
    if schema.get("type") == "string":
        return text
    try:
        return _scalar(text)
    except ValueError:
        return text


def _scalar(text: str) -> Any:
    """Return a value that is written as JSON, or a constant written as in Python. Raises ValueError."""
    constants = {"True": True, "False": False, "None": None}
    return constants[text] if text in constants else json.loads(text)
