from __future__ import annotations

import ast
import re
from math import nan
from pathlib import Path

import pytest

import qlora_tui
from qlora_tui.formatting import (
    GIB,
    abbreviate_home,
    capitalize,
    format_count,
    format_loss,
    format_loss_change,
    format_nats,
    format_percent,
    format_points,
    format_progress,
    format_rate,
    format_sizes,
    format_small_percent,
    format_speed,
    format_wait,
    short_model_name,
    shorten_name,
    uncapitalize,
    with_exponent,
)


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


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (6.3, 12, "6.3 of 12.0 GiB"),
        (0.25, 12, "256 MiB of 12.0 GiB"),
        (0.25, 0.5, "256 of 512 MiB"),
    ],
)
def test_two_sizes_share_a_unit_only_if_they_have_the_same(first: float, second: float, text: str) -> None:
    assert format_sizes(round(first * GIB), "of", round(second * GIB)) == text


@pytest.mark.parametrize("text", ["LoRA is too large", "DoRA", "Q4_K is not read", "NaN in a layer", "GGUF"])
def test_a_name_keeps_its_capital_within_a_sentence(text: str) -> None:
    assert uncapitalize(text) == text


@pytest.mark.parametrize("text", ["llama.cpp splits it", "q_proj has no weights", "data.packing is on"])
def test_a_name_of_code_stays_small_at_a_sentences_start(text: str) -> None:
    assert capitalize(text) == text


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (format_loss(2.9), "2.900"),
        (format_loss(143.2), "143.200"),
        (format_loss(nan), "NaN"),
        (format_loss(None), "NA"),
        (format_loss_change(-0.0231), "-0.023"),
        (format_loss_change(-0.0004), "0.000"),
        (format_loss_change(0.0), "0.000"),
        (format_nats(0.00401), "0.004"),
        (format_nats(5.7e-5), "<0.0001"),
        (format_nats(-4.2e-11), "<0.0001"),
        (format_nats(0.0), "0"),
        (format_rate(2e-4), "0.0002"),
        (format_rate(5.7321e-5), "5.73e-5"),
        (with_exponent("0.00011"), "1.1e-4"),
        (with_exponent("5.73e-5"), "5.73e-5"),
        (with_exponent("1,000"), "1e3"),
        (format_speed(8.26), "8.3"),
        (format_speed(1239.6), "1,240"),
        (format_count(4812), "4,812"),
        (format_count(106_836), "107K"),
        (format_count(999_700), "1.00M"),
        (format_count(134_515_008), "135M"),
        (format_count(7_615_616_512), "7.62B"),
        (format_progress(20, 1081), "20 of 1,081"),
        (format_small_percent(0.00363), "0.36%"),
        (format_small_percent(0.0999), "10%"),
        (format_percent(0.97), "97%"),
        (format_points(-0.124), "-12"),
        (format_points(-0.001), "0"),
        (format_wait(0.44), "0.4 s"),
        (format_wait(95), "95 s"),
    ],
)
def test_numbers_of_a_kind_have_one_format(shown: str, text: str) -> None:
    assert shown == text


_OWN_FORMATS = {
    "tui/render/plot.py": "labels of an axis have the decimals of its step",
    "tui/render/picture.py": "coordinates of an SVG file",
    "tui/screens/runs/sweep_charts.py": "labels of an axis with powers of ten",
    "tui/setting_stepper.py": "rounds a number that is not shown",
    "runs/metrics_table.py": "a CSV file for programs",
    "runs/suggested_fix.py": "rounds a setting that is not shown",
    "runs/suggestions.py": "rounds a learning rate",
}
"""Modules that format a float themselves, and why."""


def test_screens_and_runs_format_no_float_themselves() -> None:
    package = Path(qlora_tui.__file__).parent
    lines = {
        path.relative_to(package).as_posix(): _formatted_floats(path.read_text("utf-8"))
        for path in (
            *package.glob("tui/**/*.py"),
            *package.glob("runs/**/*.py"),
            *package.glob("export/*.py"),
        )
    }
    assert {name: found for name, found in lines.items() if found and name not in _OWN_FORMATS} == {}
    assert [name for name in _OWN_FORMATS if not lines.get(name)] == [], "these need no exception"


def test_a_format_of_a_float_is_noticed() -> None:
    assert _formatted_floats('f"{loss:.3g}"\nf"{rows:,}"\nf"{share:.1%}"\nf"{rate:g}"') == [1, 3, 4]


def _formatted_floats(source: str) -> list[int]:
    """Return the lines of f-strings that round a number, by a specification such as ``.3g`` or ``g``."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FormattedValue)
        and isinstance(node.format_spec, ast.JoinedStr)
        and any(
            isinstance(part, ast.Constant) and re.search(r"\.[1-9][0-9]*[fge%]|\.0%|^g$", str(part.value))
            for part in node.format_spec.values
        )
    ]


@pytest.mark.parametrize(
    ("name", "length", "shown"),
    [
        ("mistralai/Ministral-3-14B-Instruct-2512-BF16", 36, "…/Ministral-3-14B-Instruct-2512-BF16"),
        ("mistralai/Ministral-3-14B-Instruct-2512-BF16", 30, "…tral-3-14B-Instruct-2512-BF16"),
        ("SmolLM2-135M-Instruct", 15, "SmolLM2-135M-I…"),
        ("smollm2-135m-demo-20261130-0606", 18, "smollm2-135m-…0606"),
        ("tickets.jsonl", 10, "tickets.j…"),
        ("ab", 2, "ab"),
    ],
)
def test_a_name_is_cut_where_that_tells_the_least(name: str, length: int, shown: str) -> None:
    assert shorten_name(name, length) == shown and len(shown) <= length
