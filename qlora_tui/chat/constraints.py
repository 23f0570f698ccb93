"""Answers that satisfy a JSON schema or call a function: tokens that would violate the constraint are not
selected.

llguidance reads a grammar and the tokenizer, and determines which tokens may come next. A thought before the
answer is not constrained, nor are its marks. Calls are written as the chat template writes them
(:mod:`qlora_tui.data.tool_calls`), in llguidance's variant of Lark (docs/syntax.md of its repository).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.data.tool_calls import CallShape, Fields, named
from qlora_tui.errors import EXIT_USAGE, UserError

_OPTIONS = {"x-guidance": {"whitespace_pattern": r"(\n[ \t]{0,16}|[ ])?"}}
"""White space in JSON: compact or indented, and bounded, because a model might write blanks endlessly."""

_BLANK = r"/[ \n]{0,2}/"


class Grammars:
    """Creates constraints for the answers of models that share a tokenizer."""

    def __init__(self, tokenizer: ChatTokenizer, vocabulary: int, end_ids: Collection[int]) -> None:
        """Prepare the tokenizer for llguidance.

        ``vocabulary`` is the number of logits, which may exceed the number of tokens in the tokenizer. Raises
        UserError if llguidance is not installed.
        """
        try:
            self._library: Any = import_module("llguidance")
        except ImportError as error:
            raise UserError(
                "A library is missing",
                what="Answers that follow a JSON schema, and required tool calls, need llguidance.",
                fix="Install it: pip install 'qlora-tui[serve]'",
            ) from error
        added = tokenizer.backend.get_added_tokens_decoder()
        self._special = {token.content: token_id for token_id, token in added.items() if token.special}
        # Compiling the tokenizer takes a second, so it is done once.
        self._tokenizer = self._library.LLTokenizer(
            tokenizer.backend.to_str(), n_vocab=vocabulary, eos_token=sorted(end_ids)
        )

    def constraint(
        self,
        schema: Mapping[str, Any] | None = None,
        calls: Calls | None = None,
        mark_ids: Collection[int] = (),
    ) -> Constraint:
        """Return the constraint of one answer: a value that satisfies ``schema``, function calls, or either
        if both are given.

        Args:
            schema: JSON schema.
            calls: Functions that may be called. Without ``schema``, at least one must be called.
            mark_ids: Tokens that mark thoughts and may precede the answer.

        Raises:
            UserError: The schema is invalid, or uses a keyword that llguidance does not support.
        """
        rules = _Rules(self._special)
        wanted = [] if schema is None else [rules.json(schema)]
        if calls is not None:
            # After a thought there is often an empty line.
            wanted.append(f"{_BLANK if mark_ids else ''} {rules.calls(calls)}")
        matcher_class = self._library.LLMatcher
        grammar = matcher_class.grammar_from_lark(rules.grammar(" | ".join(wanted)))
        matcher = matcher_class(self._tokenizer, grammar)
        if matcher.is_error():
            raise _unusable(_error_of(matcher))
        return Constraint(matcher, mark_ids)


class Calls(NamedTuple):
    """Functions that may be called."""

    shape: CallShape
    functions: Mapping[str, Mapping[str, Any]]
    """JSON schema of the arguments, by function name."""
    single: bool = False
    """Whether exactly one call is allowed."""


class _Rules:
    """Builds the rules of a grammar. Each method returns an expression that refers to what it added."""

    def __init__(self, special: Mapping[str, int]) -> None:
        """Start an empty grammar. ``special`` has the ids of special tokens, by their text."""
        self._special = special
        self._rules: list[str] = []

    def grammar(self, start: str) -> str:
        """Return the complete grammar. Its start rule is the expression ``start``."""
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules])

    def rule(self, body: str, options: str = "") -> str:
        """Add a rule, and return its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def json(self, schema: Mapping[str, Any]) -> str:
        """Add a rule for JSON that satisfies a schema, and return its name."""
        return self.rule(f"%json {json.dumps({**schema, **_OPTIONS})}")

    def text(self, text: str) -> str:
        """Return an expression for a literal text, in which special tokens are written as tokens."""
        places = [(place, word) for word in self._special if (place := text.find(word)) >= 0]
        if not places:
            return json.dumps(text, ensure_ascii=False) if text else ""
        place, word = min(places, key=lambda found: (found[0], -len(found[1])))
        before, after = self.text(text[:place]), self.text(text[place + len(word) :])
        return f"{before} <[{self._special[word]}]> {after}"

    def calls(self, calls: Calls) -> str:
        """Add rules for calls, and return the name of the last rule.

        Only one call is allowed if ``calls.single``, or if the format has no further calls.
        """
        shape = calls.shape
        arguments = {
            name: self.json(_closed(schema))
            if shape.fields is None
            else self.fields(schema, shape.fields, schema)
            for name, schema in calls.functions.items()
        }

        def one_of(before: str) -> str:
            written = (f"{self.text(named(before, name))} {each}" for name, each in arguments.items())
            return self.rule(" | ".join(written))

        further = f"{one_of(shape.further)}*" if shape.further and not calls.single else ""
        return self.rule(f"{one_of(shape.first)} {further} {self.text(shape.last)}")

    def fields(self, schema: Mapping[str, Any], fields: Fields, root: Mapping[str, Any]) -> str:
        """Add rules for arguments, or for an object among them, and return the name of the last rule.

        Properties must be in the order of the schema, or sorted if the chat template sorts them.
        """
        properties, required = dict(schema.get("properties") or {}), schema.get("required") or ()
        if fields.is_sorted:
            properties = dict(sorted(properties.items()))
        separator = self.text(fields.separator)
        # Build from the last property on; for each, one rule after another property, and one for the
        # beginning.
        later = first = self.rule('""')
        for key, value in reversed(properties.items()):
            before = self.text(f"{fields.before_key}{key}{fields.after_key}")
            one = self.rule(f"{before} {self.value(value, fields, root)}")
            skipped = ("", "") if key in required else (f" | {later}", f" | {first}")
            later, first = (
                self.rule(f"{separator} {one} {later}{skipped[0]}"),
                self.rule(f"{one} {later}{skipped[1]}"),
            )
        return self.rule(f"{self.text(fields.begin)} {first} {self.text(fields.end)}")

    def value(self, schema: Any, fields: Fields, root: Mapping[str, Any]) -> str:
        """Add rules for a field's value and the text after it. Raises UserError if unsupported."""
        schema = schema if isinstance(schema, dict) else {}
        if choices := schema.get("anyOf") or schema.get("oneOf"):
            return self.rule(" | ".join(self.value(each, fields, root) for each in choices))
        kinds = schema.get("type") or _kinds(schema)
        options = [
            option
            for kind in ([kinds] if isinstance(kinds, str) else kinds)
            for option in self._values(kind, schema, fields, root)
        ]
        if not options:
            raise _unusable(
                f"An argument with the schema {json.dumps(schema)} is not supported in this model's format "
                "for tool calls"
            )
        return self.rule(" | ".join(options))

    def _values(
        self, kind: str, schema: Mapping[str, Any], fields: Fields, root: Mapping[str, Any]
    ) -> Iterator[str]:
        end, quote = self.text(fields.after_value), self.text(fields.quote)
        match kind:
            case "string" if "enum" in schema or "const" in schema:
                texts = [each for each in _constants(schema) if isinstance(each, str)]
                yield from (f"{quote} {self.text(each)} {quote} {end}" for each in texts)
            case "string" if fields.is_python:
                yield rf"{quote} /([^{fields.quote}\\\n]|\\[{fields.quote}\\n])*/ {quote}"
            case "string":
                closing = f"{quote} {end}".strip()
                # A special token occurs in no text; any other end is the first occurrence of its text.
                is_special = closing.startswith("<[")
                yield f"{quote} {self.rule(f'/(?s:.*)/ {closing}', '' if is_special else '[lazy]')}"
            case "boolean":
                yield from (f'"{word}" {end}' for word in fields.constants[:2])
            case "null":
                yield f'"{fields.constants[2]}" {end}'
            case "integer" | "number":
                yield f"{self.json(_only(schema, kind))} {end}"
            case "array" | "object" if not fields.quote:
                # Where other fields are plain text, these are JSON.
                yield f"{self.json({**_only(schema, kind), **_definitions(root)})} {end}"
            case "array":
                yield f'"[" {self._list(self.value(schema.get("items"), fields, root), fields)} "]"'
            case "object" if schema.get("properties") and not fields.is_python:
                yield self.fields(schema, fields, root)
            case "object" if not fields.is_python:
                key = f"/[^:,{{}}\\[\\]]+/ {self.text(fields.after_key)}"
                yield f'"{{" {self._list(f"{key} {self.value({}, fields, root)}", fields)} "}}"'

    def _list(self, item: str, fields: Fields) -> str:
        return f"({item} ({self.text(fields.separator)} {item})*)?"


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema of arguments, changed to forbid additional properties.

    It is not changed if it already has a rule for them, and they stay allowed if it names no properties.
    """
    return {"additionalProperties": "properties" not in schema, **schema}


def _constants(schema: Mapping[str, Any]) -> list[Any]:
    return list(schema.get("enum") or ([schema["const"]] if "const" in schema else []))


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    """Return the types of a schema without ``type``: the types of its constants, or all scalar types.

    A reference to another schema has none.
    """
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
    constants = [kinds[type(each)] for each in _constants(schema) if type(each) in kinds]
    return list(dict.fromkeys(constants or ([] if "$ref" in schema else kinds.values())))


def _only(schema: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {**schema, "type": kind}


def _definitions(root: Mapping[str, Any]) -> dict[str, Any]:
    return {name: root[name] for name in ("$defs", "definitions") if name in root}


class Constraint:
    """The tokens that may come next in one answer."""

    def __init__(self, matcher: Any, mark_ids: Collection[int]) -> None:
        self._matcher = matcher
        self._marks = sorted(mark_ids)
        self._has_begun = False

    def mask(self, logits: Tensor) -> Tensor:
        """Return logits (1, vocabulary) with minus infinity for each token that may not come next."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).flatten().bool()
        allowed = allowed[: logits.shape[-1]]
        if not self._has_begun:
            allowed[self._marks] = True
        return logits.float().masked_fill(~allowed.to(logits.device), float("-inf"))

    def add(self, token_id: int) -> None:
        """Advance the constraint by the token that was selected."""
        if not self._has_begun and token_id in self._marks:
            return
        self._has_begun = True
        self._matcher.consume_token(token_id)

    def applies(self, *, is_outside: bool) -> bool:
        """Return whether the next token is constrained. ``is_outside``: whether the token is part of a
        thought or a marker, and not of the answer proper.
        """
        return self._has_begun or not is_outside

    @property
    def is_satisfied(self) -> bool:
        """Return whether the value is complete and nothing may follow it. Raises UserError."""
        if self._matcher.is_error():
            raise _unusable(_error_of(self._matcher))
        return bool(self._matcher.is_stopped())


def _error_of(matcher: Any) -> str:
    return f"llguidance says: {matcher.get_error().strip().splitlines()[0].rstrip('.')}"


def _unusable(what: str) -> UserError:
    return UserError(
        "The JSON schema cannot be used",
        what=f"{what}.",
        fix="Correct the schema, or leave out what is not supported.",
        exit_code=EXIT_USAGE,
    )
