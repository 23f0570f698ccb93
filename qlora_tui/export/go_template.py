"""Go templates as Ollama renders them, as far as :mod:`qlora_tui.export.ollama_template` writes them.

Ollama calls Go's text/template with ``System``, the text of all system messages, and ``Messages``, each with
``Role`` and ``Content`` (``template/template.go``). Here: ``if``, ``else if``, ``else``, ``range .Messages``,
string constants, ``eq``, ``not``, and variables that are true or false.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from qlora_tui.data.conversation import Message

_ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_EQUAL = re.compile(r'eq (\S+) ("[^"]*")')
_ASSIGNMENT = re.compile(r"(\$\w+) :?= (true|false)")
_PLAIN = re.compile(r'[^"{}]+')


def go_literal(text: str) -> str:
    """Return template source that writes ``text``.

    Characters that a Modelfile or a template would read otherwise become a constant: quotation marks, braces,
    and what Go does not print (``parser/parser.go`` of Ollama drops it).
    """

    def is_plain(character: str) -> bool:
        return bool(_PLAIN.fullmatch(character)) and (character.isprintable() or character in "\n\t")

    parts = []
    for plain, characters in groupby(text, is_plain):
        joined = "".join(characters)
        parts.append(joined if plain else f'{{{{ "{"".join(map(_escaped, joined))}" }}}}')
    return "".join(parts)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def render_go_template(source: str, messages: Sequence[Message]) -> str:
    """Return what Ollama sends to the model. Raises ValueError for a construct that is not known here."""
    collated = _collate(messages)
    values = {".System": "\n\n".join(m.content for m in messages if m.role == "system")}
    body, rest = _parse(_ACTION.split(source))
    if rest:
        raise ValueError("an end without its beginning")
    return body(_Scope(values, collated))


def _collate(messages: Sequence[Message]) -> list[Message]:
    """Join messages in a row by the same role, as Ollama does."""
    return [
        Message(role, "\n\n".join(message.content for message in group))
        for role, group in groupby(messages, lambda message: message.role)
    ]


@dataclass
class _Scope:
    values: Mapping[str, str]
    messages: Sequence[Message]
    variables: dict[str, bool] = field(default_factory=dict)

    def of_message(self, message: Message) -> _Scope:
        values = {**self.values, ".Role": message.role, ".Content": message.content}
        return _Scope(values, self.messages, self.variables)

    def test(self, condition: str) -> bool:
        if condition.startswith("not "):
            return not self.test(condition.removeprefix("not "))
        if match := _EQUAL.fullmatch(condition):
            return self.text(match[1]) == self.text(match[2])
        if condition.startswith("$") and condition in self.variables:
            return self.variables[condition]
        return bool(self.text(condition))

    def text(self, operand: str) -> str:
        if operand.startswith('"'):
            return str(json.loads(re.sub(r"\\U([0-9a-f]{8})", _surrogates, operand)))
        if operand not in self.values:
            raise ValueError(f"unknown: {operand}")
        return self.values[operand]


def _surrogates(match: re.Match[str]) -> str:
    return json.dumps(chr(int(match[1], 16)))[1:-1]


_Writer = Callable[[_Scope], str]


def _parse(tokens: list[str]) -> tuple[_Writer, list[str]]:
    """Parse text and actions in turn up to an ``else`` or ``end``; return the rest with that action first."""
    writers: list[_Writer] = []
    while True:
        text, rest = tokens[0], tokens[1:]
        writers.append(_constant(text))
        if not rest:
            return _joined(writers), []
        action = rest[0].strip()
        if action == "end" or action.startswith("else"):
            return _joined(writers), rest
        writer, tokens = _action(action, rest[1:])
        writers.append(writer)


def _constant(text: str) -> _Writer:
    return lambda scope: text


def _joined(writers: Sequence[_Writer]) -> _Writer:
    return lambda scope: "".join([writer(scope) for writer in writers])


def _action(action: str, rest: list[str]) -> tuple[_Writer, list[str]]:
    if action.startswith("if "):
        return _branch(action.removeprefix("if "), rest)
    if action == "range .Messages":
        body, rest = _parse(rest)
        return lambda scope: "".join(body(scope.of_message(m)) for m in scope.messages), _after_end(rest)
    if match := _ASSIGNMENT.fullmatch(action):
        return lambda scope: scope.variables.update({match[1]: match[2] == "true"}) or "", rest
    return lambda scope: scope.text(action), rest


def _branch(condition: str, rest: list[str]) -> tuple[_Writer, list[str]]:
    body, rest = _parse(rest)
    if not rest:
        raise ValueError("an if without its end")
    other: _Writer = _joined([])
    action = rest[0].strip()
    if action.startswith("else if "):
        other, rest = _branch(action.removeprefix("else if "), rest[1:])
    elif action == "else":
        other, rest = _parse(rest[1:])
        rest = _after_end(rest)
    else:
        rest = _after_end(rest)
    return lambda scope: body(scope) if scope.test(condition) else other(scope), rest


def _after_end(rest: list[str]) -> list[str]:
    if not rest or rest[0].strip() != "end":
        raise ValueError("a block without its end")
    return rest[1:]
