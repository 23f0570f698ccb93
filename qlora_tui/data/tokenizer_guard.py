"""Limits on a ``tokenizer.json``: it is a program, run by a library without limits.

Three replacements of one character by a thousand turn a word into gigabytes. The possible expansion is
computed from the file, before anything is encoded. A regular expression that repeats a repetition makes the
library panic, which is not an ``Exception``; it becomes a ``UserError``, at the latest with the first text,
which is a probe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qlora_tui.errors import UserError

MAX_BYTES = 64 << 20
"""Most bytes of a ``tokenizer.json``; the largest vocabularies take some 35 MB."""
MAX_EXPANSION = 16.0
"""Most characters that a normalizer or decoder makes of one."""
LONGEST_TOKEN = 4096
"""Most characters of a token. The longest in use are lines of some hundred spaces or dashes."""
LONGEST_PATTERN = 8192
MAX_STEPS = 64
"""Most steps of a normalizer, decoder or pre-tokenizer."""
_CHUNK = 16
_PROBED = (*range(0x20, 0x7F), 0xE9, 0x416, 0x5B57, 0x1F600)
PROBE = "".join(f"{chr(code) * 32} " for code in _PROBED) + "\n\t\n"
"""Runs of one character, the most work for a pattern that repeats a repetition."""


def check_tokenizer(content: dict[str, Any]) -> float:
    """Return the most characters that the normalizer makes of one. Raises ValueError over a bound."""
    _check_vocabulary(content)
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        steps = list(_steps(content.get(part)))
        if len(steps) > MAX_STEPS:
            raise ValueError(f"its {part} has more than {MAX_STEPS} steps")
        for step in steps:
            _check_pattern(part, step)
    normalizer, decoder = (_expansion(content.get(part)) for part in ("normalizer", "decoder"))
    if max(normalizer, decoder) > MAX_EXPANSION:
        raise ValueError(f"it makes more than {MAX_EXPANSION:.0f} characters of one")
    return normalizer


def check_normalizer(backend: Any) -> None:
    """Raise ValueError where a character table (``Precompiled``) makes a long text of one character."""
    if backend.normalizer is None:
        return
    for first in (*range(0x20, 0xD800, _CHUNK), *range(0xE000, 0x10000, _CHUNK)):
        text = "".join(map(chr, range(first, first + _CHUNK)))
        # One Arabic ligature becomes 18 letters; no sixteen neighbors come near this.
        if len(backend.normalizer.normalize_str(text)) > MAX_EXPANSION * _CHUNK:
            raise ValueError(f"it makes more than {MAX_EXPANSION:.0f} characters of one near U+{first:04X}")


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise UserError where the tokenizers library panics."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise UserError(
            "The tokenizer failed",
            what=f"The model's tokenizer cannot encode or decode a text: {error}.",
            why="Its tokenizer.json is damaged, or asks for more than the library can do.",
            fix="Download the model's tokenizer files again, or choose another copy of the model.",
        ) from None


def is_panic(error: BaseException) -> bool:
    """Return whether an exception is a panic of a Rust library; its class cannot be imported."""
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
