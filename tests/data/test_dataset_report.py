"""Reports on reasoning and thinking in data, and how a model trained on it is prompted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.dataset_report import prompt_thinking
from qlora_tui.data.inspection import inspect
from qlora_tui.recipe.schema import Data, Recipe, Source, Thinking
from tests.data.families import FAMILIES, family
from tests.data.thinkers import thinker

PLAIN = ("What is a fox?", "A small wild dog.")
THOUGHT = ("17*3?", "<think>\n17*3 is 51.\n</think>\n\n51")


def rows(path: Path, *conversations: tuple[str, ...]) -> Source:
    """A file of conversations: question, answer, question, answer."""
    lines = [
        {
            "messages": [
                {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)
            ]
        }
        for turns in conversations
    ]
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Source(path=str(file))


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        ("smollm3", Data(), ("2 of 3 rows, learned", "on for the 2 rows with reasoning, off for 1 without")),
        ("smollm3", Data(reasoning_in_loss=False), ("only read",)),
        ("smollm3", Data(thinking="off"), ("2 of 3 rows, left out",)),
        ("smollm3", Data(thinking="on"), ("an empty thinking block is learned from 1 row",)),
        ("deepseek-v3.1", Data(), ("drops it from earlier turns: 1 row",)),
        ("chatml", Data(thinking="on"), ("on has no effect",)),
        ("opens-thinking", Data(), ("always opens a thinking block", "closed immediately in 1 row")),
    ],
)
def test_reasoning_is_counted_with_what_becomes_of_it(
    tmp_path: Path, model: str, data: Data, words: tuple[str, ...]
) -> None:
    source = rows(tmp_path, PLAIN, THOUGHT, (*THOUGHT, "Sure?", "<think>Yes.</think>Yes."))
    tokenizer = family(model) if model in FAMILIES else thinker(model)
    said = " ".join(inspect(source, tokenizer, data).thinking)
    assert all(word in said for word in words), said


def test_reasoning_is_counted_without_a_model(tmp_path: Path) -> None:
    report = inspect(rows(tmp_path, PLAIN, THOUGHT, (*THOUGHT, "Sure?", "Yes.")))
    assert report.thinking == ("Reasoning: 2 of 3 rows; choose a model to see how it is rendered.",)
    assert inspect(rows(tmp_path, PLAIN)).thinking == ()


def test_a_row_that_gives_no_sample_is_not_counted(tmp_path: Path) -> None:
    source = rows(tmp_path, THOUGHT, (THOUGHT[0] + " word" * 200, THOUGHT[1]))
    report = inspect(source, thinker("smollm3"), Data(max_length=64, overflow="drop"))
    assert report.counts.conversations == 1
    assert "Reasoning: 1 of 1 row, learned." in report.thinking


@pytest.mark.parametrize("change", [{"thinking": "off"}, {"thinking": "on"}, {"reasoning_in_loss": False}])
def test_either_setting_makes_another_tokenized_set(tmp_path: Path, change: dict[str, object]) -> None:
    source = rows(tmp_path, PLAIN, THOUGHT)
    tokenizer = thinker("smollm3")
    sets = [
        prepare_dataset(Recipe(data=Data(sources=(source,), validation_fraction=0.0, **settings)), tokenizer)  # type: ignore[arg-type]  # by name
        for settings in ({}, change)
    ]
    assert sets[0].folder != sets[1].folder and sets[0].data_hash != sets[1].data_hash
    assert not any(one.cached for one in sets)


@pytest.mark.parametrize(
    ("setting", "notes", "prompt_setting"),
    [
        ("auto", {"thinking-off": 3}, "off"),
        ("auto", {"thinking-on": 3, "thinking-off": 2}, "on"),
        ("auto", {"reasoning-learned": 3}, "auto"),
        ("off", {"thinking-on": 3}, "off"),
        ("on", {}, "on"),
    ],
)
def test_a_model_is_asked_as_most_rows_were_rendered(
    setting: Thinking, notes: dict[str, int], prompt_setting: Thinking
) -> None:
    assert prompt_thinking(setting, notes) == prompt_setting
