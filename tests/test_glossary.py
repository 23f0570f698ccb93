"""The words of the app and what they mean."""

from __future__ import annotations

import pytest

from qlora_tui.glossary import GLOSSARY, explain


@pytest.mark.parametrize("term", GLOSSARY)
def test_each_meaning_reads_as_a_sentence(term: str) -> None:
    sentence = explain(term)
    assert sentence[0].isupper() or not sentence[0].isalpha()
    assert sentence.endswith(".") and not sentence.endswith("..") and "`" not in sentence
