"""Renders chat templates as transformers does, but without importing transformers.

The environment (sandbox, block trimming, ``tojson``, ``raise_exception``, ``strftime_now``, the
``generation`` tag) follows ``transformers/utils/chat_template_utils.py``; a test checks that both render the
same. Two things differ: the date is pinned, so that the same row gives the same tokens every day, and a
template is compiled and rendered in a child process that is killed if it takes too long
(:mod:`qlora_tui.data.confined`).

``stock_template`` returns a template for base models without one, which the trainer saves with the adapter.
Each stock template ends an assistant turn with a token that the base model knows: the turn-end token of the
template's format if the vocabulary has it, else the end-of-text token. The strings around the turns
(``<|im_start|>``, ``### Response:``) are plain text to a model that has no such tokens.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qlora_tui.data.confined import Confined, KilledError
from qlora_tui.data.conversation import RowRejectedError

T = TypeVar("T")

PINNED_DATE = datetime(2024, 7, 26)
"""The date that templates get as today's date; Llama 3's template falls back to the same date."""

Turns = Sequence[Mapping[str, Any]]
"""Messages in the form that templates read: role, content, tool_calls and so on."""
Tools = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
"""Start and end, in characters."""

MAX_CPU_S = 5.0
"""Maximum processor time of one rendering, in seconds. A long conversation takes some milliseconds."""
MAX_MEMORY_BYTES = 256 << 20
_MAX_EXHAUSTED = 3
"""Number of times that a template may run out of memory before it is given up; each may take seconds."""
_renderer = Confined(__name__, cpu_s=MAX_CPU_S, memory_bytes=MAX_MEMORY_BYTES)


class TemplateCompileError(Exception):
    """Raised if a template cannot be compiled."""


class ChatTemplate:
    """A compiled template with the special tokens it may use."""

    def __init__(self, text: str, variables: Mapping[str, Any]):
        self.text = text
        self._variables = dict(variables)
        self._failures: list[str] = []
        """Why renderings were killed or ran out of memory; shared by copies."""
        try:
            self.literals, self.names, self.has_generation_marks = self._call(_facts)
        except RowRejectedError as refused:
            raise TemplateCompileError(refused.reason) from None

    def with_variables(self, variables: Mapping[str, Any]) -> ChatTemplate:
        """Return this compiled template with additional variables, such as ``enable_thinking=False``."""
        if not variables:
            return self
        other = copy.copy(self)
        other._variables = {**self._variables, **variables}
        return other

    def render(self, turns: Turns, tools: Tools | None = None, prompt: bool = False) -> str:
        """Render the conversation as text; with ``prompt``, up to the beginning of the assistant's answer.

        Raises ``RowRejectedError`` with the template's own message if the template rejects the conversation.
        """
        return self._call(_rendered, self._variables, turns, tools, prompt)

    def render_marked(self, turns: Turns, tools: Tools | None = None) -> tuple[str, list[Span]]:
        """Render the conversation as text, with the spans of the template's own generation marks."""
        return self._call(_rendered_with_marks, self._variables, turns, tools)

    def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        # Otherwise each row of a large file would take as long as the first.
        if len(self._failures) >= _MAX_EXHAUSTED:
            raise RowRejectedError("template-refuses", self._failures[-1])
        try:
            return _renderer.call(function, self.text, *arguments)
        except KilledError as killed:
            reason = f"The template fails: {killed}."
            if killed.timed_out:
                reason = f"The template takes more than {_renderer.cpu_s:g} seconds for one conversation."
            self._failures += [reason] * _MAX_EXHAUSTED
        except MemoryError:
            taken = f"more than {_renderer.memory_bytes >> 20} MiB for one conversation"
            self._failures.append(f"The template takes {taken}.")
        raise RowRejectedError("template-refuses", self._failures[-1])


class _CompiledTemplate:
    """A template in the process that renders it."""

    def __init__(self, text: str) -> None:
        self.marks = _GenerationSpans()
        environment = _environment(self.marks)
        tree = environment.parse(text)
        code = environment.compile(tree, filename="<the model's chat template>")
        self.literals = "\0".join(_literals(tree))
        """All text that the template itself can write, joined."""
        self.names = frozenset(name.name for name in tree.find_all(jinja2.nodes.Name))
        """Names of all variables that the template reads or sets."""
        self.template = jinja2.Template.from_code(environment, code, environment.globals)


_compiled = lru_cache(maxsize=16)(_CompiledTemplate)


def _facts(text: str) -> tuple[str, frozenset[str], bool]:
    """Return the text that a template itself writes, its variables, and whether it has generation marks."""
    try:
        compiled = _compiled(text)
    except (jinja2.TemplateError, RecursionError, OverflowError) as error:
        raise RowRejectedError("template-refuses", str(error) or type(error).__name__) from None
    return compiled.literals, compiled.names, compiled.marks.in_template


def _rendered(text: str, variables: dict[str, Any], turns: Turns, tools: Tools | None, prompt: bool) -> str:
    with _errors_in_words():
        return _require_whole_characters(
            _compiled(text).template.render(
                messages=turns, tools=tools, documents=None, add_generation_prompt=prompt, **variables
            )
        )


def _rendered_with_marks(
    text: str, variables: dict[str, Any], turns: Turns, tools: Tools | None
) -> tuple[str, list[Span]]:
    compiled = _compiled(text)
    with _errors_in_words(), compiled.marks.collected() as (written, spans):
        for piece in compiled.template.generate(
            messages=turns, tools=tools, documents=None, add_generation_prompt=False, **variables
        ):
            written.append(piece)
        return _require_whole_characters("".join(written)), list(spans)


@contextmanager
def _errors_in_words() -> Iterator[None]:
    """Raise ``RowRejectedError`` for any exception of a template, which is an untrusted program."""
    try:
        yield
    except (RowRejectedError, MemoryError):
        raise
    except Exception as error:
        reason = f"The template fails: {type(error).__name__}: {error}"
        if isinstance(error, jinja2.TemplateError) and error.message:
            reason = f"The template says: {error.message}"
        raise RowRejectedError("template-refuses", reason) from None


def _require_whole_characters(text: str) -> str:
    """Return the text. Raises ``RowRejectedError`` if the text holds half of a surrogate pair.

    Rows never do, but JSON and jinja accept an escape of such a half in a template.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowRejectedError(
            "template-refuses",
            "The template outputs an unpaired surrogate (half a character), which no tokenizer can encode.",
        ) from None
    return text


class _GenerationSpans:
    """Records the start and end of generation blocks while a template is rendered."""

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

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Look up a name as the sandbox does, but items first: ``message.role`` is never an attribute."""
        if type(obj) is dict and attribute in obj and not hasattr(dict, attribute):
            return obj[attribute]
        return super().getattr(obj, attribute)


def _environment(marks: _GenerationSpans) -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.marks = marks
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = PINNED_DATE.strftime
    return environment


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


_TURN_ENDS = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>"}
_TEMPLATES = Path(__file__).with_name("templates")
"""Folder of the stock templates, in which ``BEGIN`` and ``TURN_END`` stand for tokens of the tokenizer."""


def stock_template(name: str, added_tokens: Container[str], begins_with_bos: bool) -> str:
    """Return the stock template ``name`` for a tokenizer with these added tokens."""
    end = _TURN_ENDS.get(name, "")
    end = f"'{end}'" if end and end in added_tokens else "eos_token"
    text = (_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    begin = "{{- bos_token -}}\n" if begins_with_bos else ""
    return text.replace("TURN_END", end).replace("BEGIN", begin)
