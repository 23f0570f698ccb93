"""A model's tokenizer and chat template from its folder, without transformers and without torch.

The trainer, the Data screen and the chat use this one class.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Encoding, Tokenizer

from qlora_tui.data.chat_template import ChatTemplate, TemplateCompileError
from qlora_tui.data.conversation import RowRejectedError
from qlora_tui.data.stock_templates import stock_template
from qlora_tui.data.template_capabilities import TemplateCapabilities, probe_template
from qlora_tui.data.thinking import THOUGHT_TAGS
from qlora_tui.data.tokenizer_files import (
    own_templates,
    read_json_object,
    special_tokens_by_name,
    with_declared_tokens,
)
from qlora_tui.data.tokenizer_guard import (
    MAX_BYTES,
    PROBE,
    check_normalizer,
    check_tokenizer,
    panics_as_errors,
)
from qlora_tui.data.word_cache import (
    Marked,
    WordTokenCache,
    isolated_added_tokens,
    splits_on_spaces,
    token_at,
)
from qlora_tui.decoding import decode_json
from qlora_tui.errors import UserError
from qlora_tui.foreign_files import read_bounded

OWN = "tokenizer"
"""Value of ``template_name`` where the tokenizer's own template is used."""
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
        """``special_tokens`` are keyed by name (``eos_token``); ``template`` is ``model.chat_template``.

        Raises ``UserError`` if the chosen template cannot be compiled.
        """
        self.folder: Path | None = None
        """Folder of the model, if any."""
        self.asked_template = template
        # As a str it takes four bytes per character if one of them is an emoji: 110 MB for Gemma.
        self._json = tokenizer_json.encode()
        self.expansion = check_tokenizer(decode_json(self._json, _JSON_OBJECT))
        """Most characters that the tokenizer's normalizer makes of one."""
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
        """Ids that ``skip_special_tokens`` skips when decoding."""
        self.template_name = OWN if template == "auto" and own_template else template
        if self.template_name == "auto":
            self.template_name = "chatml"
        if self.template_name != OWN:
            own_template = stock_template(self.template_name, self.added_tokens, self.begins_with_bos)
            tool_template = ""
        self.template = self._compiled(own_template)
        self.tool_template = self._compiled(tool_template) if tool_template else self.template
        """Template for conversations with tools; nearly always the same as ``template``."""

    @classmethod
    def from_folder(cls, folder: Path, template: str = "auto") -> ChatTokenizer:
        """Load the tokenizer of a model folder. Raises ``UserError`` if it is missing or broken."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            has_old = any((folder / n).is_file() for n in ("tokenizer.model", "vocab.json", "spiece.model"))
            raise UserError(
                "No tokenizer",
                what=f"{folder} has no tokenizer.json.",
                why="It holds only an older form of tokenizer." if has_old else "",
                fix="Load it with transformers' AutoTokenizer and save_pretrained it to the folder."
                if has_old
                else "Download the model again, with its tokenizer files.",
            )
        config = read_json_object(folder / "tokenizer_config.json")
        special = special_tokens_by_name(config, read_json_object(folder / "special_tokens_map.json"))
        own, with_tools = own_templates(folder, config)
        try:
            content = with_declared_tokens(read_bounded(path, MAX_BYTES).decode(), config)
            tokenizer = cls(content, special, own, template, with_tools)
        except UserError:
            raise
        except Exception as error:  # tokenizers raises bare Exception for a file it cannot read
            raise UserError(
                "Broken tokenizer",
                what=f"{path} cannot be read: {error}.",
                fix="Download the model's tokenizer files again.",
            ) from error
        tokenizer.folder = folder
        return tokenizer

    def __reduce__(self) -> tuple[type[ChatTokenizer], tuple[str, dict[str, str], str, str, str]]:
        """Pickle with the chosen template as the tokenizer's own template."""
        tools = "" if self.tool_template is self.template else self.tool_template.text
        return (ChatTokenizer, (self._json.decode(), self.special_tokens, self.template.text, "auto", tools))

    @property
    def has_own_template(self) -> bool:
        """Return whether the template came with the tokenizer; else the trainer saves it with the adapter."""
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
        """Return the tokens outside the ordinary vocabulary, special or not, and their ids."""
        return {token.content: i for i, token in self._added.items()}

    @cached_property
    def begins_with_bos(self) -> bool:
        """Return whether the tokenizer puts its begin token before plain text."""
        ids = self.backend.encode("a", add_special_tokens=True).ids
        return self.bos_id is not None and ids[:1] == [self.bos_id]

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash that changes whenever the same conversation could give other tokens."""
        templates = (self.template.text, self.tool_template.text)
        whole = json.dumps([self._json.decode(), self.special_tokens, *templates])
        return hashlib.sha256(whole.encode()).hexdigest()

    @cached_property
    def turn_end_ids(self) -> tuple[int, ...]:
        """Return the tokens at which an answer ends: end of text, and the template's turn end."""
        ends = [self.eos_id] if self.eos_id is not None else []
        turns: list[dict[str, Any]] = [
            {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "qvz"))
        ]
        if self.traits.parts:
            turns = [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in turns]
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
        """Pattern that matches any special token."""
        return _any_of([t.content for t in self._added.values() if t.special])

    @cached_property
    def said_pattern(self) -> re.Pattern[str]:
        """Pattern of what an answer's text must not produce: special tokens, except the tags of a thought."""
        return _any_of(
            [t.content for t in self._added.values() if t.special and t.content not in THOUGHT_TAGS]
        )

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Pattern of what a user's text must not produce: special tokens, and words the template writes.

        White space is not a control token, though Gemma's line ends are added tokens that its template
        writes.
        """
        literals = self.template.literals + self.tool_template.literals
        written = (t.content for t in self._added.values() if t.special or t.content in literals)
        return _any_of([content for content in written if not content.isspace()])

    def encode(self, text: str) -> list[int]:
        """Encode ``text``, in which added tokens are control tokens; adds nothing before or after."""
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

        A new line is added before it and removed afterwards, so that a tokenizer that begins every text with
        a space adds none here.
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
            # tokenizers also reads shapes that it never writes, such as a list for an object.
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
                fix='Choose another with model.chat_template = "chatml".',
            ) from error


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
