"""Encoding word by word gives what encoding the whole text gives."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qlora_tui.data import tokenizer as word_cache
from qlora_tui.data.chat_template import ChatTemplate
from qlora_tui.data.conversation import Conversation, RowRejectedError
from qlora_tui.data.render import render
from qlora_tui.data.tokenizer import (
    OWN,
    ChatTokenizer,
    WordTokenCache,
    isolated_added_tokens,
    splits_on_spaces,
    token_at,
)
from qlora_tui.errors import UserError
from tests.data.conversation_shapes import TOOL, assistant, user
from tests.data.families import CHATML, PARTS, STRIPS, TOOLS, family, tokenizer_json


def folder(tmp_path: Path, config: dict[str, Any] | None = None, **files: str) -> Path:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **(config or {})}))
    for name, content in files.items():
        path = tmp_path / name.replace("__", "/").replace("_jinja", ".jinja").replace("_json", ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    return tmp_path


def test_the_template_file_goes_before_the_config(tmp_path: Path) -> None:
    read = ChatTokenizer.from_folder(folder(tmp_path, {"chat_template": STRIPS}, chat_template_jinja=CHATML))
    assert (read.template.text, read.template_name, read.has_own_template) == (CHATML, OWN, True)


def test_templates_in_a_config_or_processor_file_are_read(tmp_path: Path) -> None:
    assert ChatTokenizer.from_folder(folder(tmp_path, {"chat_template": STRIPS})).template.text == STRIPS
    processor = folder(tmp_path, chat_template_json=json.dumps({"chat_template": CHATML}))
    assert ChatTokenizer.from_folder(processor).template.text == CHATML


@pytest.mark.parametrize("place", ["list", "folder"])
def test_a_template_for_tools_is_used_for_conversations_with_tools(tmp_path: Path, place: str) -> None:
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOLS}]
    if place == "list":
        model_folder = folder(tmp_path, {"chat_template": named})
    else:
        model_folder = folder(
            tmp_path, chat_template_jinja=CHATML, additional_chat_templates__tool_use_jinja=TOOLS
        )
    tokenizer = ChatTokenizer.from_folder(model_folder)
    turns = (user("a"), assistant("b"))
    plain, with_tools = (
        render(Conversation(turns), tokenizer)[0],
        render(Conversation(turns, (TOOL,)), tokenizer)[0],
    )
    assert "get_weather" not in tokenizer.decode(plain.token_ids)
    assert "get_weather" in tokenizer.decode(with_tools.token_ids)
    assert with_tools.notes == ()


def test_a_template_file_replaces_those_of_the_config(tmp_path: Path) -> None:
    named = [{"name": "default", "template": STRIPS}, {"name": "tool_use", "template": TOOLS}]
    tokenizer = ChatTokenizer.from_folder(
        folder(tmp_path, {"chat_template": named}, chat_template_jinja=CHATML)
    )
    assert tokenizer.template.text == CHATML and tokenizer.tool_template is tokenizer.template


def test_special_tokens_are_read_in_every_spelling(tmp_path: Path) -> None:
    model_folder = folder(
        tmp_path,
        {
            "bos_token": {"content": "<s>", "lstrip": False},
            "unk_token": None,
            "extra_special_tokens": {"x_token": "<User>"},
        },
        special_tokens_map_json=json.dumps({"pad_token": "<|endoftext|>", "eos_token": "<s>"}),
    )
    tokenizer = ChatTokenizer.from_folder(model_folder)
    assert tokenizer.special_tokens == {
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|endoftext|>", "x_token": "<User>",
    }  # fmt: skip
    assert tokenizer.decode([tokenizer.eos_id or 0]) == "</s>"
    assert tokenizer.pad_id == tokenizer.added_tokens["<|endoftext|>"]


def test_tokens_only_the_config_declares_are_added(tmp_path: Path) -> None:
    size = family("chatml").backend.get_vocab_size()
    extra = {str(size): {"content": "<|extra|>", "special": True}}
    tokenizer = ChatTokenizer.from_folder(folder(tmp_path, {"added_tokens_decoder": extra}))
    assert tokenizer.encode("a<|extra|>")[-1] == size
    assert size in tokenizer.special_ids


@pytest.mark.parametrize(("stock", "name"), [("auto", "chatml"), ("alpaca", "alpaca")])
def test_a_base_model_gets_a_stock_template_to_save(tmp_path: Path, stock: str, name: str) -> None:
    tokenizer = ChatTokenizer.from_folder(folder(tmp_path), stock)
    assert (tokenizer.template_name, tokenizer.has_own_template) == (name, False)
    again = ChatTokenizer.from_folder(folder(tmp_path, chat_template_jinja=tokenizer.template.text))
    turns = Conversation((user("a"), assistant("b")))
    assert render(turns, again) == render(turns, tokenizer)


def test_a_stock_template_can_be_chosen_over_the_models_own(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.from_folder(folder(tmp_path, {"chat_template": STRIPS}), "plain")
    assert tokenizer.template_name == "plain"


def test_the_fingerprint_changes_with_whatever_changes_tokens(tmp_path: Path) -> None:
    configs = (
        {"chat_template": CHATML},
        {"chat_template": STRIPS},
        {"chat_template": CHATML, "bos_token": "<s>"},
    )
    prints = {ChatTokenizer.from_folder(folder(tmp_path, config)).fingerprint for config in configs}
    assert len(prints) == 3
    assert ChatTokenizer.from_folder(folder(tmp_path, {"chat_template": CHATML})).fingerprint in prints


@pytest.mark.parametrize(
    ("file", "content", "title"),
    [
        ("tokenizer.json", None, "No tokenizer"),
        ("tokenizer.json", "{}", "Broken tokenizer"),
        ("tokenizer.json", "not json", "Broken tokenizer"),
        ("tokenizer_config.json", "{oops", "Broken tokenizer"),
        ("chat_template.jinja", "{% if %}", "Broken chat template"),
    ],
)
def test_a_broken_model_folder_says_what_is_broken(
    tmp_path: Path, file: str, content: str | None, title: str
) -> None:
    model_folder = folder(tmp_path)
    if content is None:
        (model_folder / file).unlink()
    else:
        (model_folder / file).write_text(content)
    with pytest.raises(UserError, match=title) as caught:
        ChatTokenizer.from_folder(model_folder)
    assert caught.value.fix


def test_an_older_tokenizer_says_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(UserError, match="No tokenizer") as caught:
        ChatTokenizer.from_folder(tmp_path)
    assert "AutoTokenizer" in caught.value.fix


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    held = json.loads(tokenizer_json())
    held["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<s>",
    }
    held["padding"] = {"strategy": {"Fixed": 64}, **padding}
    model_folder = folder(tmp_path)
    (model_folder / "tokenizer.json").write_text(json.dumps(held))
    ids = ChatTokenizer.from_folder(model_folder).encode("the answer is a small wild dog")
    assert len(ids) == len(family("chatml").encode("the answer is a small wild dog"))


def test_what_a_template_can_say_is_found_by_trying() -> None:
    assert family("chatml").traits.system
    assert not family("no-system").traits.system
    assert family("parts").traits.parts
    assert not family("chatml").traits.parts
    assert (family("tools").traits.tools, family("tools").traits.calls) == (True, "object")
    assert family("chatml").traits.calls == "text"
    assert family("drops-thinking").traits.reasoning
    assert not family("opens-thinking").traits.reasoning


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_a_template_is_kept_in_its_sandbox(text: str) -> None:
    with pytest.raises(RowRejectedError):
        ChatTemplate(text, {}).render([{"role": "user", "content": "a"}])


def test_a_template_that_fails_says_how() -> None:
    with pytest.raises(RowRejectedError, match="TypeError"):
        ChatTemplate("{{ messages[0].content + 1 }}", {}).render([{"role": "user", "content": "a"}])
    with pytest.raises(RowRejectedError, match="The template says: No\\."):
        ChatTemplate("{{ raise_exception('No.') }}", {}).render([])


def test_content_in_parts_reaches_a_template_that_wants_it() -> None:
    assert ChatTemplate(PARTS, {}).text == PARTS
    sample = render(Conversation((user("a"), assistant("b"))), family("parts"))[0]
    assert family("parts").decode(sample.token_ids) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )


def test_released_caches_change_no_ids() -> None:
    tokenizer = family("chatml")
    texts = ["the owl sees the fox", "a <|im_end|> in the text"]
    before = [tokenizer.encode(text) for text in texts]
    inside = tokenizer.encode_inside(texts[1], literal=True)
    marked = tokenizer.encode_marked(texts, [[], []])
    tokenizer.release_caches()
    assert "_without_added" not in vars(tokenizer) and "_words" not in vars(tokenizer)
    assert [tokenizer.encode(text) for text in texts] == before
    assert tokenizer.encode_inside(texts[1], literal=True) == inside
    assert tokenizer.encode_marked(texts, [[], []]) == marked


_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_FIRST = r"[^\r\n\p{L}\p{N}]?"
PATTERNS = {
    "llama3": rf"{_SHORT}|{_FIRST}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_SHORT}|{_FIRST}\p{{L}}+|\p{{N}}|{_REST}",
    "qwen3.5": rf"{_SHORT}|{_FIRST}[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-oss": rf"{_FIRST}[{_UPPER}]*[{_LOWER}]+{_SHORT}?|{_FIRST}[{_UPPER}]+[{_LOWER}]*{_SHORT}?"
    rf"|\p{{N}}{{1,3}}|{_REST}",
    "tekken": rf"{_FIRST}[{_UPPER}]*[{_LOWER}]+|{_FIRST}[{_UPPER}]+[{_LOWER}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""How these families cut words; gpt2's is ByteLevel's own."""
LETTERS = "aBé1٣.,'/!-\n\r\t\u00a0\u2003\x1c\x85你😀\u0301s"


@cache
def build_cache(name: str) -> Tokenizer:
    """A small tokenizer that cuts words in one of these ways."""
    tokenizer = Tokenizer(models.BPE())
    if name in PATTERNS:
        tokenizer.normalizer = normalizers.NFC() if name.startswith("qwen") else None
        split = pre_tokenizers.Split(Regex(PATTERNS[name]), behavior="isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if name == "smollm":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    lines = [
        *("a 1 é. B a 's \n\n  a  1 1,\t!! -- a/ B你 你\n a <|im_end|>\n", " ..  11 a'saBé\r\n"),
        *("a.\n\nb !\n a!\r\n", "\n\na!\n\nB.\n-\n", "/\n1,\r\n\r\n'\n\n"),
    ]
    tokenizer.train_from_iterator(lines * 20, trainer)
    stripping = AddedToken("<|im_end|>", lstrip=name == "gpt2", normalized=False, special=True)
    tokenizer.add_special_tokens([stripping, AddedToken("<|im_end|>!", normalized=False, special=True)])
    return tokenizer


def whole(tokenizer: Tokenizer, text: str, places: list[int]) -> tuple[list[int], list[tuple[int, bool]]]:
    """What the tokenizer itself says."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, [token_at(encoding, place) for place in places]


def by_words(tokenizer: Tokenizer, text: str, places: list[int]) -> tuple[list[int], list[tuple[int, bool]]]:
    """What the memo says, the words known or not."""
    memo = WordTokenCache(
        lambda texts: tokenizer.encode_batch(texts, add_special_tokens=False),
        isolated_added_tokens(json.loads(tokenizer.to_str())),
    )
    (first,), (again,) = memo.encode([text], [places]), memo.encode([text], [places])
    assert (first.ids, first.cuts) == (again.ids, again.cuts)
    return first.ids, first.cuts


@pytest.mark.parametrize("name", ["gpt2", "smollm", *PATTERNS])
def test_these_tokenizers_cut_at_spaces(name: str) -> None:
    assert splits_on_spaces(json.loads(build_cache(name).to_str()))


@pytest.mark.parametrize("name", ["gpt2", "smollm", *PATTERNS])
@given(data=st.data())
def test_word_by_word_gives_what_the_whole_text_gives(name: str, data: st.DataObject) -> None:
    pieces = st.sampled_from([*LETTERS, "<|im_end|>", "<|im_end|>!", " ", " ", "  ", "\n\n", "a", "word"])
    text = "".join(data.draw(st.lists(pieces, max_size=40)))
    places = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=4)))
    places = [place for place in places if place < len(text)]
    assert by_words(build_cache(name), text, places) == whole(build_cache(name), text, places)


@pytest.mark.parametrize("name", ["gpt2", "smollm", *PATTERNS])
@given(text=st.lists(st.sampled_from([*LETTERS, " ", " ", "  ", "\n\n", "word"]), max_size=40).map("".join))
@example(text="\n\nSure!\n\nHere is")
@example(text="\n")
@example(text="  a!\n ")
def test_no_word_of_the_tokenizer_reaches_across_a_cut(name: str, text: str) -> None:
    """Any trained tokens: a wrong split shows even where no token would span it."""
    words, _ = WordTokenCache(lambda _: [])._cut(text, [])
    assert "".join(words) == text
    assert _pieces(name, text) == [piece for word in words for piece in _pieces(name, word)]


def _pieces(name: str, text: str) -> list[str]:
    """What one of these tokenizers looks for tokens in."""
    tokenizer = build_cache(name)
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]


def test_a_token_that_absorbs_adjacent_whitespace_is_not_split_off() -> None:
    plain = {"content": "<a>", "normalized": False}
    assert isolated_added_tokens({"added_tokens": [plain, {"content": "<b>", "normalized": True}]}) == ["<a>"]
    for flag in ("lstrip", "rstrip", "single_word"):
        assert isolated_added_tokens({"added_tokens": [plain, {**plain, flag: True}]}) == []


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_every_kind_of_white_space_beside_a_space_is_heeded(name: str) -> None:
    blanks = [chr(n) for n in range(sys.maxunicode) if chr(n).isspace() or n in (0x180E, 0x200B, 0xFEFF)]
    for blank in blanks:
        for text in (f"a{blank} a", f"a {blank}a", f"a {blank} a", f"a{blank}", f"{blank} a"):
            assert by_words(build_cache(name), text, []) == whole(build_cache(name), text, [])


def test_a_full_word_cache_is_cleared_and_skips_long_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "_MAX_CACHED_WORDS", 3)
    words: list[str] = []

    def encode(texts: list[str]) -> Any:
        words.append("".join(texts))
        return build_cache("gpt2").encode_batch(texts, add_special_tokens=False)

    memo = WordTokenCache(encode)
    memo.encode(["a 1 é B 1"], [[]])
    memo.encode(["a 1", "x" * 100], [[], []])
    memo.encode(["a 1", "x" * 100], [[], []])
    assert [sorted(text) for text in words] == [sorted("a 1 é B"), sorted("a 1" + "x" * 100), ["x"] * 100]


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}},
        {"model": {"type": "Unigram"}},
        {"model": {"type": "BPE", "dropout": 0.1}},
        {"added_tokens": [{"content": "<a>", "rstrip": True}]},
        {"added_tokens": [{"content": "end of turn"}]},
    ],
)
def test_others_are_encoded_whole(change: dict[str, Any]) -> None:
    assert not splits_on_spaces({**json.loads(tokenizer_json()), **change})


@pytest.mark.parametrize(
    "pattern",
    [r"\p{L}+ \p{L}+|\s+", r"[^\p{L}]+|\s+", r"\s?\p{L}+|\s+", r".+|\s+", r"\p{L}+", r" ?\p{L}+ ?|\s+"],
)
def test_a_pattern_that_may_cross_a_space_is_not_cached(pattern: str) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    assert not splits_on_spaces({**json.loads(tokenizer_json()), "pre_tokenizer": split})
