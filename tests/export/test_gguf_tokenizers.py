"""Published kinds of tokenizers in GGUF files: llama.cpp splits text into the same tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_tui.adapters.merged_weights import MergedWeights
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.demo.conversations import CONVERSATIONS
from qlora_tui.errors import UserError
from qlora_tui.export.gguf_file.content import gguf_content
from qlora_tui.export.gguf_file.vocabulary import pre_tokenizer_name, read_vocabulary
from qlora_tui.export.llama_cpp.bindings import LlamaCpp
from qlora_tui.recipe.schema import Model, Recipe
from tests.export.gguf_files import write_base
from tests.export.published_tokenizers import KINDS, TEXTS, write_tokenizer
from tests.training.tiny_model import CHAT_TEMPLATE

pytest.importorskip("llama_cpp_py_sync")
pytestmark = pytest.mark.slow

PREFIX_ON_FIRST = "llama-2, prefix on the first word only"
STRANGE = [
    "", "hello", " hello", "  hello", "   hello world", "hello  ", "\n", "\n\n", " \n", "\n \n\n \t x",
    "a\r\nb\r\n\r\nc", "\t\tx", "x\t", "\x0b\x0cx", "\x00\x01\x7f", "\u200b\ufeff",
    " " * 50, "\n" * 20 + "a", "\t" * 9, "a" * 300, "the the  the", "end. \n\n  Next",
    "a\u00a0b\u3000c\u2003d", "\u2028\u2029a\x85b",
    "I'm HE'S don'T we'Ve 'twas ''s 'S", "''", "'", "we''ll", "foo_bar fooBar FooBARBaz HTTPServer",
    "1 12 123 1234 12345 3.14 1,000,000", "½ ² Ⅻ ٣٤ ١٢٣٤٥ 12３４５ x²y³", "1st 2nd v1.2.3-rc4",
    "café CAFÉ cafe\u0301", "Élève ÉCOLE école ÀÉÎ naïveÉ", "a\u0300\u0301b \u0301x", "İstanbul ıİ ß ẞ",
    "Москва МОСКВА мОСКВА", "ΑΒΓ αβγ ΆλφαΒήτα", "Ĳ ǅ ǆ ſ K Å ﬁ ﬂ ℌ 𝒳𝓎 𠀀",
    "我想在apple工作1314151天～", "こんにちは。世界！", "한국어 각", "ไทยกำลัง", "हिन्दी नमस्ते",
    "مرحبا بالعالم", "שלום", "🚀 (normal) 😶\u200d🌫️ ✅ 🦙🦙 👩‍👩‍👧",
    "<div>a</div>\n<table><tr>", "------======= ```python\nprint('x')\n```", "/usr/bin//x a/\nb",
    "....!!!??", "x = {'a': [1,2]}\n    y\n\t\tz", "_a_ __b__", "[PAD3] <0x41> <0x0A>",
    "<s> </s> x <unk>", "Hello<|im_end|>\nx<|end|> \n y",
]  # fmt: skip


def texts_for(tokenizer: ChatTokenizer, name: str) -> Iterable[str]:
    added = [text for text in tokenizer.added_tokens if text.strip(" \n\t▁")][:6]
    after_special = [f"{token}{text}" for token in added for text in STRANGE[:18]]
    begin = str(tokenizer.special_tokens["bos_token"]) if name == PREFIX_ON_FIRST else ""
    conversations = CONVERSATIONS.read_text().splitlines()
    return (begin + text for text in chain(STRANGE, after_special, TEXTS, conversations))


def write_model(folder: Path, name: str) -> ChatTokenizer:
    tokenizer = ChatTokenizer.from_folder(write_tokenizer(folder, name, CHAT_TEMPLATE))
    vocab = json.loads(tokenizer.backend.to_str())["model"]["vocab"]
    rows = max(*vocab.values(), *tokenizer.added_tokens.values()) + 3
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=rows, num_key_value_heads=2, **sizes)).save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("name", KINDS)
def test_llama_cpp_splits_text_as_each_published_tokenizer(tmp_path: Path, name: str) -> None:
    tokenizer = write_model(tmp_path / "model", name)
    known = read_vocabulary(tokenizer, 2000).differences
    file = write_base(tmp_path / "model", tmp_path / "model.gguf")
    different = []
    with LlamaCpp().open(str(file), context=8) as model:
        for text in texts_for(tokenizer, name):
            ours, theirs = tokenizer.encode(text), model.tokenize(text)
            if ours != theirs and not any(each.applies_to(text) for each in known):
                different.append(
                    (text, *([tokenizer.backend.id_to_token(i) for i in x] for x in (ours, theirs)))
                )
    assert not different


@pytest.mark.parametrize(
    "name, text, note",
    [
        ("qwen2", "cafe\u0301", "NFC"),
        ("mistral-nemo", " ÉCOLE", "accented capitals"),
        ("phi-4-mini", "नमस्ते", "combining marks"),
    ],
)
def test_what_llama_cpp_splits_otherwise_is_noted(tmp_path: Path, name: str, text: str, note: str) -> None:
    tokenizer = write_model(tmp_path / "model", name)
    difference = next(d for d in read_vocabulary(tokenizer, 2000).differences if note in d.note)
    assert difference.applies_to(text) and not difference.applies_to("école, plain 'text' 123 世界")
    file = write_base(tmp_path / "model", tmp_path / "model.gguf")
    with LlamaCpp().open(str(file), context=8) as model:
        assert model.tokenize(text) != tokenizer.encode(text)


@pytest.mark.parametrize(
    "name, template, note",
    [
        ("llama-3", "{{ bos_token }}{{ strftime_now('%d %b') }}", "prints the date"),
        ("qwen2", "{{ bos_token }}{{ messages[0]['content'] }}", "writes the EOS token in its place"),
        ("llama-3", "{{ bos_token }}{{ messages[0]['content'] }}", ""),
        ("qwen2", "{{ messages[0]['content'] }}", ""),
    ],
)
def test_prompts_that_llama_cpp_renders_otherwise_are_noted(
    tmp_path: Path, name: str, template: str, note: str
) -> None:
    tokenizer = ChatTokenizer.from_folder(write_tokenizer(tmp_path, name, template))
    notes = " ".join(read_vocabulary(tokenizer, 2000).prompt_notes)
    assert note in notes and bool(note) == bool(notes)


@pytest.mark.parametrize(
    "tokenizer, run, name",
    [
        ("phi-3", "phi-3", "phi-3"),
        ("phi-3", "mine", "mine (Phi-3)"),
        ("smollm2", "like-phi-3", "like-phi 3"),
        ("llama-2", "Phi3 rival", "Phi 3 rival"),
    ],
)
def test_only_phi_3_is_named_as_llama_cpp_recognizes_it(
    tmp_path: Path, tokenizer: str, run: str, name: str
) -> None:
    chat_tokenizer = write_model(tmp_path / "model", tokenizer)
    source = ChatSource(recipe=Recipe(name=run, model=Model(id=str(tmp_path / "model"))))
    weights = MergedWeights(tmp_path / "model", {tmp_path / "model" / "model.safetensors": {}})
    assert gguf_content(source, chat_tokenizer, weights).general["name"] == name


def test_two_tokens_written_alike_are_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, "gemma", CHAT_TEMPLATE)
    content = json.loads((folder / "tokenizer.json").read_text())
    size = len(content["model"]["vocab"])
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"] += [
        {"id": size, "content": "a b", **usual},
        {"id": size + 1, "content": "a▁b", **usual},
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="two of its tokens have the same text, 'a b'"):
        read_vocabulary(ChatTokenizer.from_folder(folder), size + 2)


def test_a_repeated_token_of_a_large_vocabulary_is_named(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, "gemma", CHAT_TEMPLATE)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    rows = 100_000
    vocab |= {f"[PAD{rows - 1}]": len(vocab)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="two of its tokens have the same text"):
        read_vocabulary(ChatTokenizer.from_folder(folder), rows)


@pytest.mark.parametrize("kind", ["Lowercase", "NFKC", "StripAccents"])
def test_texts_that_are_changed_otherwise_are_refused(tmp_path: Path, kind: str) -> None:
    folder = write_tokenizer(tmp_path, "smollm2", CHAT_TEMPLATE)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": kind}]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"changes texts by {kind}"):
        read_vocabulary(ChatTokenizer.from_folder(folder), 2000)


@pytest.mark.parametrize(
    "node", [{"type": "Whitespace"}, {"type": "Punctuation", "behavior": "Isolated"}, None]
)
def test_rules_that_split_otherwise_have_no_name(node: Any) -> None:
    with pytest.raises(UserError, match="no pre-tokenizer with this tokenizer's rules"):
        pre_tokenizer_name({"pre_tokenizer": node, "model": {}})
