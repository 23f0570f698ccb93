"""Converts a chat template to Ollama's ``TEMPLATE``, if an equivalent one can be found.

Ollama does not run a model's Jinja template. It compares the template with a few that it knows, and otherwise
sends text without any turns. Therefore, the text that the training template writes before and after each turn
is extracted from rendered conversations, written as a Go template, and compared on other conversations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from jinja2 import Environment, StrictUndefined

from qlora_tui.data.conversation import Message, RowRejectedError
from qlora_tui.data.render import prompt_text
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.recipe.schema import Thinking

_SYSTEM, _FIRST, _SECOND, _THIRD, _ANSWER, _LATER = (
    f"qvz{word}" for word in ("system", "first", "second", "third", "answer", "later")
)
_TURNS = (
    Message("user", _FIRST),
    Message("assistant", _ANSWER),
    Message("user", _SECOND),
    Message("assistant", _LATER),
    Message("user", _THIRD),
)
_TEXTS = ("Why?", "two\nlines\n\nand a third", '<b>"1 & 2"</b> {{ .Content }}', "für 你好 🙂", "a  b")
"""Contents of the conversations that are compared."""
_OPERANDS = {".System": "system", ".Role": "message.role", ".Content": "message.content"}
"""Jinja expressions, by the equivalent Go template expressions."""


@dataclass(frozen=True)
class OllamaTemplate:
    """The Go template that is equivalent to a chat template."""

    text: str
    """Text of the template; empty if no equivalent one was found."""
    reason: str = ""
    """Why there is no template."""
    note: str = ""
    """A remaining difference, in a sentence."""


class _NotExpressible(Exception):
    pass


def ollama_template(tokenizer: ChatTokenizer, thinking: Thinking, *, adds_bos: bool) -> OllamaTemplate:
    """Return a Go template that renders conversations as in training.

    Args:
        tokenizer: Tokenizer with the training template.
        thinking: Whether the model was trained to think.
        adds_bos: Whether Ollama itself begins each text with the BOS token, as the file's ``add_bos_token``
            says. If so, the template must not write it.
    """
    if tokenizer.traits.thinks and thinking != "off":
        return OllamaTemplate("", "the model thinks, and its template handles thoughts in its own way")
    bos = tokenizer.special_tokens.get("bos_token", "") if adds_bos else ""

    def render(messages: Sequence[Message]) -> str:
        return prompt_text(messages, tokenizer, thinking=thinking).removeprefix(bos)

    try:
        with_system = render([Message("system", _SYSTEM), *_TURNS])
        text = _derived(render(_TURNS), with_system, _turn_begin(tokenizer))
        for conversation in sample_conversations():
            if render_go_template(text, conversation) != render(conversation):
                raise _NotExpressible("it renders a conversation differently from turn to turn")
        padded = [Message("user", "  a  ")]
        keeps_spaces = render_go_template(text, padded) == render(padded)
    except RowRejectedError as error:
        return OllamaTemplate("", f"it refuses a conversation with a system prompt ({error.reason})")
    except _NotExpressible as error:
        return OllamaTemplate("", str(error))
    note = (
        ""
        if keeps_spaces
        else "The model's template removes spaces around each message, which Ollama's template cannot do. "
        "Otherwise both render alike."
    )
    return OllamaTemplate(text, note=note)


def sample_conversations() -> list[list[Message]]:
    """Return conversations of one to five turns, with and without a system prompt."""
    turns = [Message("assistant" if n % 2 else "user", text) for n, text in enumerate(_TEXTS)]
    plain = [turns[:1], turns[:3], turns]
    return plain + [[Message("system", text), *some] for some in plain for text in _TEXTS[:2]]


def _turn_begin(tokenizer: ChatTokenizer) -> Callable[[str], str]:
    """Return a function that takes the text before a turn's content, and returns the part that belongs to the
    turn.
    """
    ends = {tokenizer.backend.id_to_token(number) for number in tokenizer.turn_end_ids}

    def turn_begin(text: str) -> str:
        begin = len(text)
        for match in reversed(list(tokenizer.special_pattern.finditer(text))):
            if match[0] in ends:
                break
            begin = match.start()
        return text[begin:] or text

    return turn_begin


def _derived(plain: str, with_system: str, turn_begin: Callable[[str], str]) -> str:
    """Return a Go template that writes the text around each turn. Raises _NotExpressible.

    Args:
        plain: The rendered conversation ``_TURNS``.
        with_system: The rendered conversation with a system turn before it.
        turn_begin: Removes the part of a text that belongs to the previous turn.
    """
    begin, to_answer, after_answer, again, after_later, end = _around(
        plain, (_FIRST, _ANSWER, _SECOND, _LATER, _THIRD)
    )
    before_system, after_system, *_ = _around(
        with_system, (_SYSTEM, _FIRST, _ANSWER, _SECOND, _LATER, _THIRD)
    )
    if (to_answer, after_answer) != (again, after_later):
        raise _NotExpressible("it writes the first turns differently from later ones")
    before_user = turn_begin(_common_suffix(begin, after_answer))
    after_user = _common_prefix(to_answer, end)
    begin = begin.removesuffix(before_user)
    is_joined = not after_system.endswith(before_user)
    if not is_joined:
        after_system = after_system[: len(after_system) - len(before_user)]
    always, begin, before_system = _shared_begin(begin, before_system)
    system = f"{go_literal(before_system)}{{{{ .Content }}}}{go_literal(after_system)}"
    user = go_literal(before_user)
    if is_joined:
        system += "{{ $joined = true }}"
        user = f"{{{{ if $joined }}}}{{{{ $joined = false }}}}{{{{ else }}}}{user}{{{{ end }}}}"
    before_answer = go_literal(to_answer.removeprefix(after_user))
    close = go_literal(after_answer[: len(after_answer) - len(before_user)])
    return "".join(
        (
            "{{ $joined := false }}" if is_joined else "",
            go_literal(always),
            f"{{{{ if not .System }}}}{go_literal(begin)}{{{{ end }}}}" if begin else "",
            f'{{{{ range .Messages }}}}{{{{ if eq .Role "system" }}}}{system}',
            f'{{{{ else if eq .Role "user" }}}}{user}{{{{ .Content }}}}{go_literal(after_user)}',
            f'{{{{ else if eq .Role "assistant" }}}}{before_answer}{{{{ .Content }}}}{close}',
            "{{ end }}{{ end }}",
            go_literal(end.removeprefix(after_user)),
        )
    )


def _around(text: str, words: Sequence[str]) -> list[str]:
    """Return the text before, between and after the words. Raises _NotExpressible."""
    parts = re.split("|".join(words), text)
    if re.findall("|".join(words), text) != list(words):
        raise _NotExpressible("it repeats, leaves out or moves a message")
    return parts


def _common_prefix(first: str, second: str) -> str:
    size = 0
    while first[size : size + 1] == second[size : size + 1] != "":
        size += 1
    return first[:size]


def _common_suffix(first: str, second: str) -> str:
    return _common_prefix(first[::-1], second[::-1])[::-1]


def _shared_begin(plain: str, with_system: str) -> tuple[str, str, str]:
    """Return the beginning that both texts share, and the rest of each text. If ``with_system`` does not
    begin with the whole of ``plain``, the shared beginning is empty.

    A default system prompt in ``plain`` may begin like a given one, and must not be split.
    """
    shared = _common_prefix(plain, with_system)
    if shared != plain:
        return "", plain, with_system
    return shared, "", with_system.removeprefix(shared)


def go_literal(text: str) -> str:
    """Return Go template source that writes ``text``.

    Characters with a meaning in a Modelfile or a template become a constant: quotation marks, braces, and
    characters that Go does not print (``parser/parser.go`` of Ollama drops these).
    """

    def is_plain(character: str) -> bool:
        return character not in '"{}' and (character.isprintable() or character in "\n\t")

    parts = []
    for plain, characters in groupby(text, is_plain):
        joined = "".join(characters)
        parts.append(joined if plain else f'{{{{ "{"".join(map(_escaped, joined))}" }}}}')
    return "".join(parts)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def render_go_template(source: str, messages: Sequence[Message]) -> str:
    """Return the text that Ollama sends to the model.

    Ollama calls Go's text/template with ``System``, the text of all system messages, and ``Messages``, each
    with ``Role`` and ``Content`` (``template/template.go``). Consecutive messages of one role are joined.
    This function supports the subset of the language that is used here, by converting it to Jinja: ``if``,
    ``else if``, ``else``, ``range .Messages``, string constants, ``eq``, ``not``, and boolean variables.

    Raises ValueError for any other construct.
    """
    texts: list[str] = []
    blocks: list[str] = []
    parts = ["{% set flags = namespace() %}"]

    def constant(text: str) -> str:
        texts.append(text)
        return f"texts[{len(texts) - 1}]"

    def operand(word: str) -> str:
        if word.startswith('"'):
            return constant(json.loads(re.sub(r"\\U([0-9a-f]{8})", _surrogates, word)))
        if re.fullmatch(r"\$\w+", word):
            return f"flags.{word[1:]}"
        if word not in _OPERANDS:
            raise ValueError(f"unknown: {word}")
        return _OPERANDS[word]

    def condition(words: str) -> str:
        if words.startswith("not "):
            return f"not {condition(words.removeprefix('not '))}"
        if match := re.fullmatch(r'eq (\S+) ("[^"]*")', words):
            return f"{operand(match[1])} == {operand(match[2])}"
        return operand(words)

    for number, part in enumerate(re.split(r"\{\{(.*?)\}\}", source, flags=re.DOTALL)):
        action = part.strip()
        if number % 2 == 0:
            parts.append(f"{{{{ {constant(part)} }}}}")
        elif action == "range .Messages":
            blocks.append("for")
            parts.append("{% for message in messages %}")
        elif action.startswith("if "):
            blocks.append("if")
            parts.append(f"{{% if {condition(action.removeprefix('if '))} %}}")
        elif action.startswith("else if "):
            parts.append(f"{{% elif {condition(action.removeprefix('else if '))} %}}")
        elif action == "else":
            parts.append("{% else %}")
        elif action == "end" and blocks:
            parts.append(f"{{% end{blocks.pop()} %}}")
        elif match := re.fullmatch(r"\$(\w+) :?= (true|false)", action):
            parts.append(f"{{% set flags.{match[1]} = {match[2]} %}}")
        else:
            parts.append(f"{{{{ {operand(action)} }}}}")
    if blocks:
        raise ValueError("a block without its end")
    template = Environment(undefined=StrictUndefined).from_string("".join(parts))
    joined = [
        Message(role, "\n\n".join(message.content for message in group))
        for role, group in groupby(messages, lambda message: message.role)
    ]
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    return template.render(texts=texts, messages=joined, system=system)


def _surrogates(match: re.Match[str]) -> str:
    return json.dumps(chr(int(match[1], 16)))[1:-1]
