"""What is shown as a symbol, and what stays as it is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.visible import visible, visible_in_json


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b]52;c;x\x07", "a␛]52;c;x␇"),
        ("a\rb\x7f\x9b", "a␍b␡⟨U+009B⟩"),
        ("user\u202enimda", "user⟨U+202E⟩nimda"),
        ("pay\u200bpal\u2060", "pay⟨U+200B⟩pal⟨U+2060⟩"),
        ("\ufeffid", "⟨U+FEFF⟩id"),
        ("hi\U000e0068\U000e0069", "hi⟨U+E0068⟩⟨U+E0069⟩"),
        ("a\udc9bb", "a⟨U+DC9B⟩b"),
        ("é\u200b\u200b\u200b", "é\u200b⟨U+200B⟩⟨U+200B⟩"),
    ],
)
def test_what_a_terminal_would_obey_or_hide_becomes_a_symbol(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "two\n\tlines",
        "👩‍👩‍👧 ❤️ 1️⃣ 👍🏽",
        "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",  # the flag of Scotland
        "می‌خواهم",  # Persian, with a non-joiner
        "ภาษา\u200bไทย",  # Thai, with a break
        "שלום \u200fעולם\u200e",
        "naïve – “quoted” ▁▂▃ 葛\U000e0100",
    ],
)
def test_what_languages_and_emoji_need_stays(text: str) -> None:
    assert visible(text) == text


@given(st.text(st.characters(), max_size=40))
def test_any_text_becomes_safe_and_stays_as_it_then_is(text: str) -> None:
    once = visible(text)
    assert visible(once) == once
    assert not any(
        (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff" for c in once
    )


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_json_with_escapes_decodes_to_the_same(text: str) -> None:
    escaped = visible_in_json(json.dumps(text, ensure_ascii=False))
    assert json.loads(escaped) == text
    assert visible(escaped) == escaped
