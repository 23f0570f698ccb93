"""A model's tokenizer and chat template, read from its folder without transformers or torch.

The trainer, the Data screen and the chat use this one class. Most current tokenizers split a text into words
before they search for tokens, and no word extends across a single space between two non-space characters. If
a tokenizer provably does so (``splits_on_spaces``), texts are encoded word by word: a word has the same
tokens everywhere, so a table lookup replaces the search.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct
from tokenizers import Encoding, Tokenizer

from qlora_tui.catalog.model_validation import TOKENIZER, UNUSABLE_TOKENIZER, tokenizer_problem
from qlora_tui.data.chat_template import ChatTemplate, TemplateCompileError, stock_template
from qlora_tui.data.conversation import RowRejectedError
from qlora_tui.data.template_capabilities import OPENED, THOUGHT_TAGS, TemplateCapabilities, probe_template
from qlora_tui.data.thought_splitter import ThoughtSplitter, marks_in_template
from qlora_tui.data.tokenizer_files import (
    MAX_BYTES,
    PROBE,
    check_normalizer,
    check_tokenizer,
    own_templates,
    panics_as_errors,
    read_json_object,
    special_tokens_by_name,
    with_declared_tokens,
)
from qlora_tui.decoding import decode_json
from qlora_tui.errors import UserError
from qlora_tui.files import read_bounded

OWN = "tokenizer"
"""Value of ``template_name`` if the tokenizer's own template is used."""
_JSON_OBJECT: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])


class ChatTokenizer:
    """Converts text to token ids, and conversations to text."""

    def __init__(
        self,
        tokenizer_json: str,
        special_tokens: Mapping[str, str],
        own_template: str,
        template: str = "auto",
        tool_template: str = "",
    ):
        """Build the tokenizer from its parts.

        ``special_tokens`` are keyed by name (``eos_token``); ``template`` is ``model.chat_template``. Raises
        ``UserError`` if the chosen template cannot be compiled.
        """
        self.folder: Path | None = None
        """Folder of the model; None if the tokenizer was not read from a folder."""
        self.asked_template = template
        # A str takes four bytes per character if one character is an emoji: 110 MB for Gemma.
        self._json = tokenizer_json.encode()
        self.expansion = check_tokenizer(decode_json(self._json, _JSON_OBJECT))
        """Maximum number of characters that the tokenizer's normalizer produces for one character."""
        with panics_as_errors():
            self.backend = Tokenizer.from_str(tokenizer_json)
            check_normalizer(self.backend)
            self.backend.encode(PROBE, add_special_tokens=False)
        self.backend.no_padding()
        self.backend.no_truncation()
        self.special_tokens = dict(special_tokens)
        self.bos_id = self._id("bos_token")
        self.eos_id = self._id("eos_token")
        self.pad_id = self._id("pad_token")
        self._added = self.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        """IDs that ``skip_special_tokens`` skips in decoding."""
        self.template_name = OWN if template == "auto" and own_template else template
        if self.template_name == "auto":
            self.template_name = "chatml"
        if self.template_name != OWN:
            own_template = stock_template(self.template_name, self.added_tokens, self.begins_with_bos)
            tool_template = ""
        self.template = self._compiled(own_template)
        self.tool_template = self._compiled(tool_template) if tool_template else self.template
        """Template for conversations with tools; nearly always equal to ``template``."""

    @classmethod
    def from_folder(cls, folder: Path, template: str = "auto") -> ChatTokenizer:
        """Load the tokenizer of a model folder. Raises ``UserError`` if it is missing or broken."""
        if missing := tokenizer_problem(folder, str(folder)):
            raise missing
        path = folder / TOKENIZER
        config = read_json_object(folder / "tokenizer_config.json")
        special = special_tokens_by_name(config, read_json_object(folder / "special_tokens_map.json"))
        own, with_tools = own_templates(folder, config)
        try:
            content = with_declared_tokens(read_bounded(path, MAX_BYTES).decode(), config)
            tokenizer = cls(content, special, own, template, with_tools)
        except UserError as problem:
            problem.code = problem.code or UNUSABLE_TOKENIZER
            raise
        except Exception as error:  # tokenizers raises bare Exception for a file it cannot read
            raise UserError(
                "Broken tokenizer",
                what=f"{path} cannot be read: {error}.",
                fix="Download the model's tokenizer files again.",
                code=UNUSABLE_TOKENIZER,
            ) from error
        tokenizer.folder = folder
        return tokenizer

    def __reduce__(self) -> tuple[type[ChatTokenizer], tuple[str, dict[str, str], str, str, str]]:
        """Pickle the tokenizer. Its chosen template becomes the copy's own template."""
        tools = "" if self.tool_template is self.template else self.tool_template.text
        return (ChatTokenizer, (self._json.decode(), self.special_tokens, self.template.text, "auto", tools))

    @property
    def has_own_template(self) -> bool:
        """Return whether the template is the tokenizer's own; if not, it is saved with the adapter."""
        return self.template_name == OWN

    @cached_property
    def traits(self) -> TemplateCapabilities:
        """Return the capabilities of the template."""
        return probe_template(self.template)

    @cached_property
    def tool_traits(self) -> TemplateCapabilities:
        """Return the capabilities of the template for conversations with tools."""
        return self.traits if self.tool_template is self.template else probe_template(self.tool_template)

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """Return the tokens outside the ordinary vocabulary, special or not, with their ids."""
        return {token.content: i for i, token in self._added.items()}

    @cached_property
    def begins_with_bos(self) -> bool:
        """Return whether the tokenizer puts its BOS token before plain text."""
        ids = self.backend.encode("a", add_special_tokens=True).ids
        return self.bos_id is not None and ids[:1] == [self.bos_id]

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash that changes whenever the same conversation could give different tokens."""
        templates = (self.template.text, self.tool_template.text)
        whole = json.dumps([self._json.decode(), self.special_tokens, *templates])
        return hashlib.sha256(whole.encode()).hexdigest()

    @cached_property
    def turn_end_ids(self) -> tuple[int, ...]:
        """Return the tokens at which an answer ends: end of text, and the template's turn end."""
        ends = [self.eos_id] if self.eos_id is not None else []
        turns = self.traits.example("a", "qvz")
        for tried in (turns, [*turns, turns[0]]):
            try:
                closing = self.template.render(tried).rpartition("qvz")[2]
            except RowRejectedError:
                continue
            if match := self.special_pattern.search(closing):
                token_id = self.added_tokens[match[0]]
                return tuple(ends) if token_id in ends else (*ends, token_id)
        return tuple(ends)

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Return a pattern that matches any special token."""
        return _any_of([t.content for t in self._added.values() if t.special])

    @cached_property
    def said_pattern(self) -> re.Pattern[str]:
        """Return a pattern of the tokens that are encoded as ordinary text in answers: special tokens, except
        the tags of a thought.
        """
        return _any_of(
            [t.content for t in self._added.values() if t.special and t.content not in THOUGHT_TAGS]
        )

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Return a pattern of the control tokens: special tokens, and added tokens that the template writes.

        Outside answers, they are encoded as ordinary text. White space is not a control token, although
        Gemma's line ends are added tokens that its template writes.
        """
        literals = self.template.literals + self.tool_template.literals
        written = (t.content for t in self._added.values() if t.special or t.content in literals)
        return _any_of([content for content in written if not content.isspace()])

    def encode(self, text: str) -> list[int]:
        """Encode ``text`` without BOS and EOS. Added tokens in the text are encoded as control tokens."""
        with panics_as_errors():
            return self.backend.encode(text, add_special_tokens=False).ids

    def encode_marked(self, texts: Sequence[str], places: Sequence[Sequence[int]]) -> list[Marked]:
        """Encode each text, and locate its ``places`` in the ids (see ``WordTokenCache.encode``)."""
        if self._words is not None:
            return self._words.encode(texts, places)
        return [
            Marked(encoding.ids, [token_at(encoding, place) for place in at])
            for encoding, at in zip(self._encode_batch(texts), places, strict=True)
        ]

    def encode_inside(self, piece: str, literal: bool = False) -> list[int]:
        """Encode a piece from the middle of a text; with ``literal`` its control tokens are ordinary text.

        A new line is put before the piece and removed afterwards, so that a tokenizer that begins every text
        with a space adds none here.
        """
        if not piece:
            return []
        backend = self._without_added if literal else self.backend
        with panics_as_errors():
            newline = backend.encode("\n", add_special_tokens=False).ids
            ids = backend.encode("\n" + piece, add_special_tokens=False).ids
            if ids[: len(newline)] == newline:
                ids = ids[len(newline) :]
            else:
                ids = backend.encode(piece, add_special_tokens=False).ids
        if literal and len(piece) > 1 and self.added_tokens.get(piece, -1) in ids:
            return self.encode_inside(piece[:1], True) + self.encode_inside(piece[1:], True)
        return ids

    def release_caches(self) -> None:
        """Release the encoding caches, 90 MB with Gemma's vocabulary; they are rebuilt when needed."""
        for name in ("_words", "_without_added"):
            self.__dict__.pop(name, None)
        clear = getattr(self.backend.model, "_clear_cache", None)  # tokenizers 0.21 and newer
        if clear is not None:
            clear()

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, including special tokens."""
        with panics_as_errors():
            return self.backend.decode(list(ids), skip_special_tokens=False)

    def _encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        with panics_as_errors():
            return self.backend.encode_batch(list(texts), add_special_tokens=False)

    @cached_property
    def _words(self) -> WordTokenCache | None:
        content = json.loads(self._json)
        try:
            if not splits_on_spaces(content):
                return None
            return WordTokenCache(self._encode_batch, isolated_added_tokens(content))
        except (AttributeError, KeyError, TypeError):
            # tokenizers also accepts shapes that it never writes, such as a list in place of an object.
            return None

    @cached_property
    def _without_added(self) -> Tokenizer:
        bare = json.loads(self._json)
        bare["added_tokens"] = []
        bare["post_processor"] = None
        return Tokenizer.from_str(json.dumps(bare))

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def _compiled(self, text: str) -> ChatTemplate:
        try:
            return ChatTemplate(text, self.special_tokens)
        except TemplateCompileError as error:
            raise UserError(
                "Broken chat template",
                what=f"The model's chat template cannot be compiled: {error}.",
                fix='Choose another template with model.chat_template = "chatml".',
            ) from error


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


_OPENING_TOKENS = 8
"""Number of tokens at a prompt's end that are searched for an opened thought."""


class AnswerDecoder:
    """Decodes answers of models with one tokenizer and chat template."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._marks = marks_in_template(tokenizer.template.literals)
        self._mark_ids = frozenset(
            token_id
            for token_id in tokenizer.special_ids
            if any((tokenizer.backend.id_to_token(token_id) or "\0") in mark.text for mark in self._marks)
        )

    @property
    def mark_tokens(self) -> frozenset[int]:
        """Return the added tokens, special or not, that are part of a thought's marks."""
        tokens = self._tokenizer.added_tokens
        return frozenset(tokens[text] for text in tokens if any(text in mark.text for mark in self._marks))

    def splitter(self, prompt: Sequence[int]) -> ThoughtSplitter:
        """Return a splitter of thoughts and answer for ``prompt``, which may have opened a thought."""
        opened = bool(OPENED.search(self._tokenizer.decode(prompt[-_OPENING_TOKENS:])))
        return ThoughtSplitter(self._marks, in_thought=opened)

    def keeping(self, literals: str) -> AnswerDecoder:
        """Return a decoder that also keeps the special tokens in ``literals`` in the text."""
        other = copy.copy(self)
        names = {
            token_id: self._tokenizer.backend.id_to_token(token_id)
            for token_id in self._tokenizer.special_ids
        }
        other._mark_ids |= {token_id for token_id, name in names.items() if name and name in literals}
        return other

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the ids, without special tokens except those that mark a thought."""
        backend = self._tokenizer.backend
        with panics_as_errors():
            if self._mark_ids.isdisjoint(token_ids):
                return backend.decode(list(token_ids), skip_special_tokens=True)
            runs = groupby(token_ids, self._mark_ids.__contains__)
            return "".join(backend.decode(list(ids), skip_special_tokens=not marks) for marks, ids in runs)

    def answer(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        """Return the text of an answer without its thoughts."""
        splitter = self.splitter(prompt)
        chunks = [*splitter.feed(self.decode(answer)), *splitter.rest()]
        return "".join(chunk.text for chunk in chunks if not chunk.thought).strip()


_MAX_CACHED_WORDS = 100_000
"""Maximum number of words in the cache, which is cleared when full.

With their tokens, the words take about 25 MB.
"""
_LONGEST_WORD = 48
"""Maximum number of characters of a cached word.

Longer words rarely repeat: addresses, code, text without spaces.
"""
_WORDS = re.compile(r"(?: ?\S+|\s+\S*)(?:(?! \S)\s+(?:\S+|$))*")
"""Matches a word with the white space before it, and all words after it up to the next single space."""

_CHAINED = re.compile(r" \S(?:.*\S)?", re.DOTALL)
"""Pattern of a word that begins with a space and ends without one."""


class Marked(Struct, frozen=True):
    """An encoded text."""

    ids: list[int]
    cuts: list[tuple[int, bool]]
    """Result of ``token_at`` for each requested position."""


def token_at(encoding: Encoding, character: int) -> tuple[int, bool]:
    """Return (index of the first token that begins at ``character`` or later, whether the token before it
    extends beyond ``character``).
    """
    token = encoding.char_to_token(character)
    if token is None:
        offsets = encoding.offsets
        token = next((i for i, (_, end) in enumerate(offsets) if end > character), len(offsets))
    if token < len(encoding.ids) and encoding.token_to_chars(token)[0] < character:  # type: ignore[index]
        return token + 1, True
    return token, False


class WordTokenCache:
    """Cache of the tokens of words."""

    def __init__(self, encode_batch: Callable[[list[str]], list[Encoding]], isolated: Iterable[str] = ()):
        """Set up the cache; ``isolated`` tokens split a text before any other step.

        See ``isolated_added_tokens``.
        """
        self._encode_batch = encode_batch
        self._words: dict[str, tuple[int, ...]] = {}
        self._inside: dict[tuple[str, int], tuple[int, bool]] = {}
        """Results of ``token_at`` for positions inside words."""
        longest_first = sorted(isolated, key=len, reverse=True)
        self._isolated = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def encode(self, texts: Sequence[str], places: Sequence[Sequence[int]]) -> list[Marked]:
        """Return the tokens of each text, and which of them begin at its ``places``.

        Places are character positions, ascending, excluding both ends of the text.
        """
        if len(self._words) + len(self._inside) > _MAX_CACHED_WORDS:
            self._words.clear()
            self._inside.clear()
        cut = [self._cut(text, at) for text, at in zip(texts, places, strict=True)]
        new = list(set().union(*(words for words, _ in cut)).difference(self._words))
        self._learn(new)
        encoded = [self._marked(words, marks) for words, marks in cut]
        for word in new:
            if len(word) > _LONGEST_WORD:
                del self._words[word]
        return encoded

    def _cut(self, text: str, places: Sequence[int]) -> _Cut:
        words: list[str] = []
        marks: list[tuple[int, int]] = []
        pending = deque(places)
        start = 0
        for number, piece in enumerate(self._isolated.split(text) if self._isolated else (text,)):
            parts = [piece] if number % 2 else _WORDS.findall(piece)
            end = start + len(piece)
            while pending and pending[0] < end:
                at, character = 0, pending.popleft() - start
                while character >= len(parts[at]):
                    character -= len(parts[at])
                    at += 1
                marks.append((len(words) + at, character))
            words += parts
            start = end
        return words, marks

    def _marked(self, words: list[str], marks: list[tuple[int, int]]) -> Marked:
        ids: list[int] = []
        cuts: list[tuple[int, bool]] = []
        done = 0
        for at, character in marks:
            ids.extend(chain.from_iterable(map(self._words.__getitem__, words[done:at])))
            done = at
            token, straddles = self._token_in(words[at], character) if character else (0, False)
            cuts.append((len(ids) + token, straddles))
        ids.extend(chain.from_iterable(map(self._words.__getitem__, words[done:])))
        return Marked(ids, cuts)

    def _learn(self, words: list[str]) -> None:
        """Encode words. Words that may follow each other are joined into one text, which is twice as fast."""
        chained = [word for word in words if _CHAINED.fullmatch(word)]
        alone = list(set(words).difference(chained))
        *encodings, chain_ = self._encode_batch([*alone, "".join(chained)])
        self._words.update(zip(alone, (tuple(encoding.ids) for encoding in encodings), strict=True))
        ids, ends = chain_.ids, [end for _, end in chain_.offsets]
        first = length = 0
        for word in chained:
            length += len(word)
            last = bisect_right(ends, length, first)
            self._words[word] = tuple(ids[first:last])
            first = last

    def _token_in(self, word: str, character: int) -> tuple[int, bool]:
        position = self._inside.get((word, character))
        if position is None:
            position = token_at(self._encode_batch([word])[0], character)
            if len(word) <= _LONGEST_WORD:
                self._inside[word, character] = position
        return position


_Cut: TypeAlias = tuple[list[str], list[tuple[int, int]]]
"""The words of a text, and for each position the index of its word and the character within that word."""

_CLASS = r"(?:\\p\{[LMN]\w?\}|\[(?:\\p\{[LMN]\w?\})+\]|\[\^\\s(?:\\p\{[LMN]\w?\})+\]|\[\\r\\n/?\])"
_SHORT_FORMS = r"\(\?i:'s\|'t\|'re\|'ve\|'m\|'ll\|'d\)"
_LEAD = r"(?: \?|\[\^\\r\\n\\p\{L\}\\p\{N\}\]\?)?"
_BLANKS = r"\\s\*\[\\r\\n\]\+|\\s\+\(\?!\\S\)|\\s\+"
_WORD = rf"(?:{_LEAD}(?:(?:{_CLASS}|{_SHORT_FORMS})(?:[+*?]|\{{\d(?:,\d)?\}})?)+|{_BLANKS})"
_PATTERN = re.compile(rf"(?:{_WORD}\|)+\\s\+")
"""Matches the patterns of pre-tokenizers that begin a word at every space.

With such a pattern, a word is only white space, or has at most one space, at its start. Examples are the
patterns of Llama 3, Qwen, gpt-oss, Mistral's Tekken and similar tokenizers.
"""


def splits_on_spaces(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether the words of a tokenizer (its ``tokenizer.json``) can be encoded separately.

    This requires that its pattern ends a word at every single space between two non-space characters, and
    that no other step considers text on both sides of such a space.
    """
    model, normalizer = tokenizer.get("model") or {}, tokenizer.get("normalizer")
    steps = _steps(tokenizer.get("pre_tokenizer"))
    return (
        model.get("type", "BPE") == "BPE"
        and not model.get("dropout")
        and (normalizer is None or normalizer.get("type") == "NFC")
        and all(_is_local(step) for step in steps)
        and any(_cuts(step) for step in steps)
        and not any(_looks_across(token) for token in tokenizer.get("added_tokens") or ())
    )


def isolated_added_tokens(tokenizer: Mapping[str, Any]) -> list[str]:
    """Return the added tokens that are split off before any other step, regardless of adjacent text.

    Empty if any of them depends on adjacent text (``lstrip``, ``rstrip`` or ``single_word``).
    """
    first = [token for token in tokenizer.get("added_tokens") or () if not token.get("normalized")]
    plain = not any(token.get(flag) for token in first for flag in ("lstrip", "rstrip", "single_word"))
    return [token["content"] for token in first] if plain else []


def _steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for one in pre_tokenizer["pretokenizers"] for step in _steps(one)]
    return [pre_tokenizer]


def _cuts(step: Mapping[str, Any]) -> bool:
    """Return whether a step ends a word at every single space between two non-space characters.

    ByteLevel does so if it uses its own pattern, which is GPT-2's.
    """
    if step["type"] == "ByteLevel":
        return bool(step.get("use_regex", True))
    pattern = (step.get("pattern") or {}).get("Regex", "")
    return step["type"] == "Split" and _PATTERN.fullmatch(pattern) is not None


def _is_local(step: Mapping[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return not step.get("add_prefix_space")
    if step["type"] == "Split":
        return _cuts(step) and step.get("behavior") == "Isolated" and not step.get("invert")
    return bool(step["type"] == "Digits")


def _looks_across(token: Mapping[str, Any]) -> bool:
    """Return whether an added token contains a single space between two non-space characters, or includes the
    white space after the token.
    """
    return bool(token.get("rstrip")) or re.search(r"\S \S", token["content"]) is not None
