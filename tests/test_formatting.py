from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tui.formatting import abbreviate_home, capitalize, format_loss, short_model_name, uncapitalize


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("HOME/data/a.jsonl: line 3.", "~/data/a.jsonl: line 3."),
        ("Move 'HOME/a' to HOME/b.", "Move '~/a' to ~/b."),
        ("/mnt/HOME/a and HOMEother/a stay.", "/mnt/HOME/a and HOMEother/a stay."),
    ],
)
def test_paths_in_the_home_folder_begin_with_a_tilde(text: str, shown: str) -> None:
    home = str(Path.home())
    assert abbreviate_home(text.replace("HOME", home)) == shown.replace("HOME", home)


@pytest.mark.parametrize(
    ("model_id", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M"),
        ("/home/a/converted/SmolLM2-135M-Instruct.Q4_1-fa7256748bd9", "SmolLM2-135M-Instruct"),
        ("gemma-3-270m-Q4_K_M.gguf", "gemma-3-270m"),
        ("models/tiny.gguf", "tiny"),
        ("org/tiny-Q8_0", "tiny-Q8_0"),
        ("", ""),
    ],
)
def test_a_models_short_name_has_no_hash_or_quantization(model_id: str, name: str) -> None:
    assert short_model_name(model_id) == name


@pytest.mark.parametrize(
    ("text", "small"),
    [("Too large", "too large"), ("GGUF is not read", "GGUF is not read"), ("A", "a"), ("", "")],
)
def test_only_a_words_first_letter_is_lowered(text: str, small: str) -> None:
    assert uncapitalize(text) == small
    assert capitalize(small) == text


@pytest.mark.parametrize("text", ["LoRA is too large", "DoRA", "Q4_K is not read", "NaN in a layer", "GGUF"])
def test_a_name_keeps_its_capital_within_a_sentence(text: str) -> None:
    assert uncapitalize(text) == text


@pytest.mark.parametrize("text", ["llama.cpp splits it", "q_proj has no weights", "data.packing is on"])
def test_a_name_of_code_stays_small_at_a_sentences_start(text: str) -> None:
    assert capitalize(text) == text


@pytest.mark.parametrize(
    ("loss", "text"), [(2.9, "2.90"), (143.2, "143"), (0.0103, "0.0103"), (12.0, "12.0")]
)
def test_a_loss_in_a_column_keeps_its_zeros(loss: float, text: str) -> None:
    assert format_loss(loss) == text
