"""Reads a tokenizer's files in a model folder as transformers does, and limits the work they can cause.

``tokenizer_config.json`` and ``special_tokens_map.json`` name the special tokens; the chat template may be in
any of four places; and tokens may be missing from ``tokenizer.json``. ``tokenizer.json`` is like a program
that a library runs without limits: three replacements of one character by a thousand turn a word into
gigabytes. The possible expansion is computed from the file, before anything is encoded. A regular expression
that repeats a repetition makes the library panic. A panic is not an ``Exception``, so ``panics_as_errors``
turns it into a ``UserError``. ``PROBE`` is encoded first, so that the panic occurs before any other text is
encoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from qlora_tui.catalog.config_parser import MAX_CONFIG_BYTES
from qlora_tui.catalog.model_validation import TOOL_TEMPLATE
from qlora_tui.errors import UserError
from qlora_tui.files import read_bounded

MAX_BYTES = 64 << 20
"""Maximum size of a ``tokenizer.json``; the largest vocabularies take about 35 MB."""
MAX_EXPANSION = 16.0
"""Maximum number of characters that a normalizer or decoder may produce for one character."""
LONGEST_TOKEN = 4096
"""Maximum number of characters of a token.

The longest tokens in use are lines of a few hundred spaces or dashes.
"""
LONGEST_PATTERN = 8192
MAX_STEPS = 64
"""Maximum number of steps of a normalizer, decoder or pre-tokenizer."""
_CHUNK = 16
_PROBED = (*range(0x20, 0x7F), 0xE9, 0x416, 0x5B57, 0x1F600)
PROBE = "".join(f"{chr(code) * 32} " for code in _PROBED) + "\n\t\n"
"""Runs of one character, which cause the most work for a pattern that repeats a repetition."""


def check_tokenizer(content: dict[str, Any]) -> float:
    """Return the maximum number of characters that the normalizer produces for one character.

    Raises ValueError if the tokenizer exceeds a limit.
    """
    _check_vocabulary(content)
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        steps = list(_steps(content.get(part)))
        if len(steps) > MAX_STEPS:
            raise ValueError(f"its {part} has more than {MAX_STEPS} steps")
        for step in steps:
            _check_pattern(part, step)
    normalizer, decoder = (_expansion(content.get(part)) for part in ("normalizer", "decoder"))
    if max(normalizer, decoder) > MAX_EXPANSION:
        raise ValueError(f"it turns one character into more than {MAX_EXPANSION:.0f}")
    return normalizer


def check_normalizer(backend: Any) -> None:
    """Raise ValueError if a character table (``Precompiled``) expands one character to a long text."""
    if backend.normalizer is None:
        return
    for first in (*range(0x20, 0xD800, _CHUNK), *range(0xE000, 0x10000, _CHUNK)):
        text = "".join(map(chr, range(first, first + _CHUNK)))
        # One Arabic ligature becomes 18 letters; no sixteen consecutive characters come near the limit.
        if len(backend.normalizer.normalize_str(text)) > MAX_EXPANSION * _CHUNK:
            raise ValueError(f"it turns one character into more than {MAX_EXPANSION:.0f} near U+{first:04X}")


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise UserError if the tokenizers library panics."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise UserError(
            "The tokenizer failed",
            what=f"The model's tokenizer cannot encode or decode a text: {error}.",
            why="The model's tokenizer.json is damaged, or needs something that the tokenizers "
            "library cannot do.",
            fix="Download the model's tokenizer files again, or choose another copy of the model.",
        ) from None


def is_panic(error: BaseException) -> bool:
    """Return whether an exception is a panic of a Rust library. The class of panics cannot be imported."""
    return type(error).__name__ == "PanicException"


def _check_vocabulary(content: Mapping[str, Any]) -> None:
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    tokens: Iterator[Any] = iter(())
    if isinstance(vocabulary, dict):
        tokens = iter(vocabulary)
    elif isinstance(vocabulary, list):
        tokens = (entry[0] for entry in vocabulary if isinstance(entry, list) and entry)
    added = content.get("added_tokens")
    added_tokens = [t.get("content") for t in added if isinstance(t, dict)] if isinstance(added, list) else []
    affixes = ("continuing_subword_prefix", "end_of_word_suffix", "unk_token")
    names = [model.get(key) for key in affixes] if isinstance(model, dict) else []
    for group in (tokens, added_tokens, names):
        if any(isinstance(token, str) and len(token) > LONGEST_TOKEN for token in group):
            raise ValueError(f"it has a token of more than {LONGEST_TOKEN:,} characters")


def _steps(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a normalizer, pre-tokenizer, decoder or post-processor, flattening sequences."""
    pending = [value]
    while pending:
        step = pending.pop()
        if isinstance(step, list):
            pending.extend(step)
        elif isinstance(step, dict):
            yield step
            pending += [part for part in step.values() if isinstance(part, list)]


def _check_pattern(part: str, step: Mapping[str, Any]) -> None:
    for value in step.values():
        if isinstance(value, str) and step.get("type") != "Precompiled" and len(value) > LONGEST_TOKEN:
            raise ValueError(f"its {part} has a text of more than {LONGEST_TOKEN:,} characters")
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if isinstance(regex, str) and len(regex) > LONGEST_PATTERN:
        raise ValueError(f"its {part} has a pattern of more than {LONGEST_PATTERN:,} characters")


def _expansion(value: Any) -> float:
    factor = 1.0
    for step in _steps(value):
        if step.get("type") == "Prepend":
            factor += 1
        text, pattern = step.get("content"), step.get("pattern")
        if isinstance(text, str) and isinstance(pattern, dict):
            literal = pattern.get("String")
            if isinstance(literal, str):
                factor *= max(1.0, len(text) / max(1, len(literal)))
            else:
                factor *= 1 + len(text)  # a regular expression may match the empty text at each character
    return factor


_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is no file. Raises ``UserError``."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_bounded(path, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(
            "Broken tokenizer",
            what=f"{path} is not valid JSON: {error}.",
            fix="Download the model's tokenizer files again.",
        ) from error
    return value if isinstance(value, dict) else {}


def special_tokens_by_name(config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, str]:
    """Return special tokens by name, from ``tokenizer_config.json``, or else ``special_tokens_map.json``."""
    extra = config.get("extra_special_tokens")
    named = {**older, **config, **(extra if isinstance(extra, dict) else {})}
    wanted = {f"{role}_token" for role in _ROLES} | (extra.keys() if isinstance(extra, dict) else set())
    tokens = {}
    for name in wanted & named.keys():
        token = named[name]
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def own_templates(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the folder's template, and its template for conversations with tools; empty if missing."""
    path = folder / "chat_template.jinja"
    named: dict[str, str] = {}
    held = config.get("chat_template")
    if isinstance(held, str):
        named["default"] = held
    elif isinstance(held, list):
        named.update(
            (part["name"], part["template"])
            for part in held
            if isinstance(part, dict)
            and isinstance(part.get("name"), str)
            and isinstance(part.get("template"), str)
        )
    if not named:
        processor = read_json_object(folder / "chat_template.json").get("chat_template")
        if isinstance(processor, str):
            named["default"] = processor
    if path.is_file():
        named = {"default": _template_text(path)}  # in transformers it replaces those in the config
    tool_path = folder / TOOL_TEMPLATE
    if tool_path.is_file():
        named["tool_use"] = _template_text(tool_path)
    return named.get("default", ""), named.get("tool_use", "") if named.get("default") else ""


def _template_text(path: Path) -> str:
    try:
        return read_bounded(path, MAX_CONFIG_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "Broken chat template",
            what=f"{path} cannot be read: {error}.",
            fix="Download the model's tokenizer files again.",
        ) from error


def with_declared_tokens(tokenizer_json: str, config: Mapping[str, Any]) -> str:
    """Add the tokens that only ``tokenizer_config.json`` declares, as transformers does."""
    declared = config.get("added_tokens_decoder")
    if not isinstance(declared, dict):
        return tokenizer_json
    with panics_as_errors():
        backend = Tokenizer.from_str(tokenizer_json)
    have = backend.get_added_tokens_decoder()
    missing = [
        AddedToken(
            token["content"],
            single_word=bool(token.get("single_word")),
            lstrip=bool(token.get("lstrip")),
            rstrip=bool(token.get("rstrip")),
            normalized=bool(token.get("normalized", not token.get("special"))),
            special=bool(token.get("special")),
        )
        for number, token in sorted(declared.items(), key=lambda item: int(item[0]))
        if isinstance(token, dict) and int(number) not in have
    ]
    if not missing:
        return tokenizer_json
    backend.add_tokens(missing)
    return backend.to_str()
