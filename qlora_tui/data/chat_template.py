"""A chat template, rendered as transformers renders it but without importing it.

The environment (sandbox, block trimming, ``tojson``, ``raise_exception``, ``strftime_now``, the
``generation`` tag) follows ``transformers/utils/chat_template_utils.py``; a test checks that both render the
same. Two things differ: the date is pinned, so that the same row gives the same tokens every day, and time
and memory are bounded (:mod:`qlora_tui.data.template_guard`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Protocol, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qlora_tui.data.conversation import RowRejectedError
from qlora_tui.data.template_guard import (
    MAX_ADDED_MEMORY_BYTES,
    MAX_CPU_S,
    Bounded,
    TemplateStopped,
    check_number,
    multiplied,
    raised,
)

PINNED_DATE = datetime(2024, 7, 26)
"""Today, for templates that print it: the date Llama 3's template falls back to."""

Turns = Sequence[Mapping[str, Any]]
"""Messages in the form templates read: role, content, tool_calls and so on."""
Tools = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
"""Start and end, in characters."""


_MAX_WASTED_S = 3.0
"""Processor time that renderings which run out of memory may take together."""
_TOO_SLOW = f"The template takes more than {MAX_CPU_S:.0f} seconds for one conversation."


class TemplateCompileError(Exception):
    """The template cannot be compiled."""


class ChatTemplate:
    """A compiled template with the special tokens it may use."""

    def __init__(self, text: str, variables: Mapping[str, Any]):
        self.text = text
        self._variables = dict(variables)
        self._marks = _GenerationSpans()
        self._wasted_s: list[float] = []
        """Processor time of each rendering that ran out of memory; shared by copies, as ``_stopped`` is."""
        self._stopped: list[str] = []
        """Why the template is no longer rendered: one rendering took too long."""
        environment = _environment(self._marks)
        try:
            with Bounded():
                # Jinja computes constant expressions here.
                tree = environment.parse(text)
                code = environment.compile(tree, filename="<the model's chat template>")
            self.literals = "\0".join(_literals(tree))
            """All text that the template itself writes, joined."""
            self.names = frozenset(name.name for name in tree.find_all(jinja2.nodes.Name))
            """Every variable that the template reads or sets."""
            self._template = jinja2.Template.from_code(environment, code, environment.globals)
        except TemplateStopped:
            raise TemplateCompileError(_TOO_SLOW) from None
        except (jinja2.TemplateError, RecursionError, MemoryError, OverflowError) as error:
            raise TemplateCompileError(str(error) or type(error).__name__) from error
        self.has_generation_marks = self._marks.in_template

    def with_variables(self, variables: Mapping[str, Any]) -> ChatTemplate:
        """Return this compiled template with more variables set, such as ``enable_thinking=False``."""
        if not variables:
            return self
        other = copy.copy(self)
        other._variables = {**self._variables, **variables}
        return other

    def render(self, turns: Turns, tools: Tools | None = None, prompt: bool = False) -> str:
        """Render the conversation as text; with ``prompt``, up to where the assistant begins.

        Raises ``RowRejectedError`` with the template's own message where it rejects the conversation.
        """
        self._refuse_if_stopped()
        bounded = Bounded()
        try:
            with bounded:
                text = self._template.render(
                    messages=turns,
                    tools=tools,
                    documents=None,
                    add_generation_prompt=prompt,
                    **self._variables,
                )
        except TemplateStopped:
            raise self._stop() from None
        except Exception as error:  # a template is a program by a third party and may raise anything
            raise self._rejection(error, bounded) from error
        return _require_whole_characters(text)

    def render_marked(self, turns: Turns, tools: Tools | None = None) -> tuple[str, list[Span]]:
        """Render the conversation as text, with the spans of the template's own generation marks."""
        self._refuse_if_stopped()
        with self._marks.collected() as (written, spans):
            bounded = Bounded()
            try:
                with bounded:
                    for piece in self._template.generate(
                        messages=turns,
                        tools=tools,
                        documents=None,
                        add_generation_prompt=False,
                        **self._variables,
                    ):
                        written.append(piece)
            except TemplateStopped:
                raise self._stop() from None
            except Exception as error:
                raise self._rejection(error, bounded) from error
            return _require_whole_characters("".join(written)), list(spans)

    def _rejection(self, error: Exception, bounded: Bounded) -> RowRejectedError:
        """The error of one row. A template that keeps running out of memory is not tried any longer."""
        reason = _in_words(error)
        if isinstance(error, MemoryError):
            self._wasted_s.append(bounded.seconds())
            if sum(self._wasted_s) > _MAX_WASTED_S:
                self._stopped.append(reason)
        return RowRejectedError("template-refuses", reason)

    def _refuse_if_stopped(self) -> None:
        # Otherwise each row of a large file would take that long.
        if self._stopped:
            raise RowRejectedError("template-refuses", self._stopped[0])

    def _stop(self) -> RowRejectedError:
        self._stopped.append(_TOO_SLOW)
        return RowRejectedError("template-refuses", _TOO_SLOW)


def _require_whole_characters(text: str) -> str:
    """Return the text. Raises ``RowRejectedError`` where it holds half of a surrogate pair.

    Rows never do, but JSON and jinja read an escape of one in a template.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowRejectedError(
            "template-refuses", "The template writes half of a character, which no tokenizer can read."
        ) from None
    return text


def _in_words(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"The template takes more than {MAX_ADDED_MEMORY_BYTES >> 20} MiB for one conversation."
    if isinstance(error, jinja2.TemplateError) and error.message:
        return f"The template says: {error.message}"
    return f"The template fails: {type(error).__name__}: {error}"


class _GenerationSpans:
    """Records where generation blocks begin and end while a template is rendered."""

    def __init__(self) -> None:
        self.in_template = False
        self._open: tuple[list[str], list[Span]] | None = None

    @contextmanager
    def collected(self) -> Iterator[tuple[list[str], list[Span]]]:
        self._open = ([], [])
        try:
            yield self._open
        finally:
            self._open = None

    def note(self, block: str) -> None:
        if self._open is not None:
            written, spans = self._open
            start = sum(len(piece) for piece in written)
            spans.append((start, start + len(block)))


class _Caller(Protocol):
    def __call__(self) -> str: ...


class _GenerationTag(jinja2.ext.Extension):
    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        cast(_Environment, self.environment).marks.in_template = True
        return jinja2.nodes.CallBlock(self.call_method("_block"), [], [], body).set_lineno(line)

    def _block(self, caller: _Caller) -> str:
        block = caller()
        cast(_Environment, self.environment).marks.note(block)
        return block


class _Environment(ImmutableSandboxedEnvironment):
    marks: _GenerationSpans
    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a product or power whose numbers stay within the bound."""
        return raised(left, right) if operator == "**" else multiplied(left, right)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call as the sandbox does, and reject results that are numbers over the bound."""
        return check_number(super().call(*args, **kwargs))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Look up as the sandbox does, but the item first: ``message.role`` is never an attribute."""
        if type(obj) is dict and attribute in obj and not hasattr(dict, attribute):
            return obj[attribute]
        return super().getattr(obj, attribute)


def _environment(marks: _GenerationSpans) -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.marks = marks
    environment.filters["tojson"] = _tojson
    as_number = environment.filters["int"]
    environment.filters["sum"] = _sum
    environment.filters["int"] = lambda *args, **kwargs: check_number(as_number(*args, **kwargs))
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = PINNED_DATE.strftime
    return environment


@jinja2.pass_environment
def _sum(environment: jinja2.Environment, values: Any, attribute: Any = None, start: Any = 0) -> Any:
    """Sum like jinja2's filter, in steps that can be interrupted: adding lists copies the sum each time."""
    attribute_of = make_attrgetter(environment, attribute) if attribute is not None else None
    total = start
    for value in values:
        total = total + (attribute_of(value) if attribute_of else value)
    return total


def _literals(tree: jinja2.nodes.Template) -> Iterator[str]:
    for data in tree.find_all(jinja2.nodes.TemplateData):
        yield data.data
    for constant in tree.find_all(jinja2.nodes.Const):
        if isinstance(constant.value, str):
            yield constant.value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
