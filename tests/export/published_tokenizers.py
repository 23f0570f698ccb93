"""Small tokenizers with the rules of published ones: normalizer, pre-tokenizer, post-processor, decoder.

The rules are those of each model's ``tokenizer.json``; vocabulary and merges are trained on a short text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_WORDS = (
    "the quick brown fox jumps over the lazy dog",
    "def main(argv: list[str]) -> int:\n    return sum(map(int, argv[1:]))\n\n\nif __name__ == '__main__':",
    "I'm sure they'll say we've been there, DON'T they? It's HE'S and I'D; you're",
    "In 1984 and 2024 there were 1234567 of 3.14159 at 50% or 1,000,000.00 dollars",
    "café naïve résumé Ångström ÉCOLE Élève über straße GROẞ Ĳssel Ελλάδα Москва МОСКВА",
    "こんにちは世界 我想在apple工作1314151天 한국어 안녕하세요 ไทย हिन्दी नमस्ते",
    "🚀 😶‍🌫️ ✅ 🦙🦙 👩‍👩‍👧‍👦 →←∑∫√",
    "a  b   c    d     e\t\tf \t g\r\nh\n\n\ni \n j",
    'http://example.org/path/to?x=1&y=2#z /usr/local/bin C:\\Windows <div class="a">b</div> {"k": [1, 2]}',
)
TEXTS = [*_WORDS, *(f" {word}" for line in _WORDS for word in line.split(" "))]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT4 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _GPT4.replace("{1,3}", "")
_QWEN35 = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_END = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_TEKKEN_END}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_TEKKEN_END}"
)


def _split(regex: str, behavior: str = "Isolated") -> dict[str, Any]:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": regex},
                "behavior": behavior,
                "invert": behavior == "Removed",
            },
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }


_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2]}


def _added(content: str, number: int, **flags: bool) -> dict[str, Any]:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **usual, **flags}


def _begins_with(token: str, number: int) -> dict[str, Any]:
    """Return the post-processor of a tokenizer that puts ``token`` before a text."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    sequences = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [first, sequences[0]],
        "pair": [first, *sequences],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def _byte_level(
    pre_tokenizer: dict[str, Any],
    special: Sequence[str],
    *,
    ignore_merges: bool = False,
    normalizer: dict[str, Any] | None = None,
    begins_with: str = "",
    user_defined: Sequence[str] = (),
) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    content = json.loads(tokenizer.to_str()) | {"pre_tokenizer": pre_tokenizer, "normalizer": normalizer}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1100, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    built: dict[str, Any] = json.loads(tokenizer.to_str())
    model = built["model"]
    model["ignore_merges"] = ignore_merges
    if ignore_merges:
        # As in Llama 3, some tokens are whole words that no merge makes.
        model["merges"] = [pair for pair in model["merges"] if len("".join(pair)) < 6]
    size = len(model["vocab"])
    built["added_tokens"] = [
        _added(text, size + i, special=text in special) for i, text in enumerate([*special, *user_defined])
    ]
    if begins_with:
        built["post_processor"] = _begins_with(begins_with, size + special.index(begins_with))
    return built


def _sentencepiece(
    first: Sequence[str],
    rules: dict[str, Any],
    *,
    begins_with: str,
    user_defined: Sequence[str] = (),
    added: Sequence[dict[str, Any]] = (),
    bytes_first: bool = True,
) -> dict[str, Any]:
    """Build a BPE with ``byte_fallback`` as transformers converts one from SentencePiece."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=700, show_progress=False))
    by_id = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    pieces = [text for text, _ in by_id if len(text) > 1] + [text for text, _ in by_id if len(text) == 1]
    pieces = [text for text in pieces if text not in user_defined and not set(text) & set(" \t\r\n")]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    order = [*first, *raw, *user_defined, *pieces] if bytes_first else [*first, *user_defined, *raw, *pieces]
    vocab = {text: number for number, text in enumerate(order)}
    merges = []
    for text in [text for text in user_defined if set(text) == {"▁"}] + pieces:
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    special = [_added(text, vocab[text], rstrip=bool(added) and text == "</s>") for text in first]
    defined = [_added(text, vocab[text], special=False) for text in user_defined]
    more = [token | {"id": len(vocab) + number} for number, token in enumerate(added)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [*special, *defined, *more],
        "post_processor": _begins_with(begins_with, vocab[begins_with]),
        "model": model | {"vocab": vocab, "merges": merges},
        **rules,
    }


_LLAMA2 = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "pre_tokenizer": None,
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
}
_METASPACE = _LLAMA2 | {
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    },
}
_GEMMA = {
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "pre_tokenizer": {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    },
}
_LLAMA3_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_RUNS = [
    *("\n" * n for n in range(1, 12)),
    *("▁" * n for n in range(2, 12)),
    *("\t" * n for n in range(1, 5)),
]
_PHI3 = [
    _added(text, 0, rstrip=text != "<|endoftext|>")
    for text in ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
]

KINDS: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, str]]] = {
    "llama-2": (
        lambda: _sentencepiece(("<unk>", "<s>", "</s>"), _LLAMA2, begins_with="<s>"),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
    "llama-2, prefix on the first word only": (
        lambda: _sentencepiece(("<unk>", "<s>", "</s>"), _METASPACE, begins_with="<s>"),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
    "phi-3": (
        lambda: _sentencepiece(("<unk>", "<s>", "</s>"), _LLAMA2, begins_with="<s>", added=_PHI3),
        {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"},
    ),
    "gemma": (
        lambda: _sentencepiece(
            ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
            _GEMMA,
            begins_with="<bos>",
            user_defined=[*_RUNS, "<table>", "</table>"],
            bytes_first=False,
        ),
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    ),
    "llama-3": (
        lambda: _byte_level(
            _split(_GPT4), _LLAMA3_TOKENS, ignore_merges=True, begins_with="<|begin_of_text|>"
        ),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "smollm3": (
        lambda: _byte_level(_split(_GPT4), _CHATML, ignore_merges=True, user_defined=["<think>", "</think>"]),
        {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    ),
    "qwen2": (
        lambda: _byte_level(
            _split(_QWEN2), _CHATML, normalizer={"type": "NFC"}, user_defined=["<tool_call>", "</tool_call>"]
        ),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
    "qwen3.5": (
        lambda: _byte_level(_split(_QWEN35), _CHATML, normalizer={"type": "NFC"}),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
    "llama-3, spelled otherwise": (
        lambda: _byte_level(
            _split(_GPT4.replace(_CONTRACTIONS, "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")),
            _LLAMA3_TOKENS,
            ignore_merges=True,
            begins_with="<|begin_of_text|>",
        ),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "mistral-nemo": (
        lambda: _byte_level(
            _split(_TEKKEN),
            ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
            ignore_merges=True,
            begins_with="<s>",
        ),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
    "phi-4-mini": (
        lambda: _byte_level(
            _split(_GPT4O, "Removed"), ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
        ),
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    ),
    "phi-4": (
        lambda: _byte_level(
            _split(_GPT4, "Removed"), ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>")
        ),
        {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
    ),
    "olmo-2": (
        lambda: _byte_level(
            _split(_GPT4, "Removed"),
            ("<|endoftext|>", "<|endofprompt|>"),
            user_defined=["|||IP_ADDRESS|||", "  ", "    "],
        ),
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    ),
    "glm-4": (
        lambda: _byte_level(
            _split(_GPT4, "Removed"),
            ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
        ),
        {"eos_token": "<|user|>", "pad_token": "<|endoftext|>"},
    ),
    "smollm2": (
        lambda: _byte_level(_DIGITS, _CHATML),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"},
    ),
    "granite": (
        lambda: _byte_level(_DIGITS, ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")),
        {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
    "gpt-2": (
        lambda: _byte_level(_GPT2, ("<|endoftext|>",)),
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    ),
}  # fmt: skip
"""By name: builds the content of ``tokenizer.json``, and the special tokens of ``tokenizer_config.json``."""


def write_tokenizer(folder: Path, name: str, template: str) -> Path:
    """Write the tokenizer ``name`` to a folder; returns it."""
    build, special = KINDS[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(build()))
    (folder / "tokenizer_config.json").write_text(json.dumps(special | {"chat_template": template}))
    return folder
