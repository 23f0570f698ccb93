"""Thoughts and answer are separated, however the text is split into pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.chat.chat_types import ThinkingSupport
from qlora_tui.data.thought_splitter import ThoughtSplitter, marks_in_template
from qlora_tui.recipe.schema import Thinking

THINK, GPT_OSS = marks_in_template(""), marks_in_template("<|channel|>analysis<|message|>")
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
CASES: dict[str, tuple[str, str, str]] = {
    "thought": ("<think>\nOne.\n</think>\n\nTwo.", "One.\n", "Two."),
    "empty thought": ("<think>\n\n</think>\n\nTwo.", "", "Two."),
    "no thought": ("Two.\n", "", "Two.\n"),
    "white space first": ("\n  <think>a</think>b", "a", "b"),
    "white space only": (" \n", "", " \n"),
    "about the tag": ("Write <think>a</think> here.", "", "Write <think>a</think> here."),
    "tag in a thought": ("<think>a <think> b</think>c", "a <think> b", "c"),
    "a second thought": ("<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
    "never ended": ("<think>a < b and </thin", "a < b and </thin", ""),
    "begun like a tag": ("<thing> is <th", "", "<thing> is <th"),
    "only closed": ("</think>Two.", "", "Two."),
}


def split(text: str, cuts: list[int], splitter: ThoughtSplitter) -> tuple[str, str]:
    """Thought and answer of a text fed in pieces."""
    heard = {True: "", False: ""}
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(places):
        for said in splitter.feed(text[start:end]):
            heard[said.thought] += said.text
    for said in splitter.rest():
        heard[said.thought] += said.text
    return heard[True], heard[False]


@pytest.mark.parametrize("case", CASES)
@given(cuts=st.lists(st.integers(0, 60), max_size=60))
def test_however_it_is_cut_thought_and_answer_are_the_same(case: str, cuts: list[int]) -> None:
    text, thought, answer = CASES[case]
    assert split(text, cuts, ThoughtSplitter(THINK)) == (thought, answer)


@given(cuts=st.lists(st.integers(0, 40), max_size=40))
def test_a_thought_the_prompt_has_opened_needs_no_tag(cuts: list[int]) -> None:
    assert split("One.\n</think>\n\nTwo.", cuts, ThoughtSplitter(THINK, in_thought=True)) == (
        "One.\n",
        "Two.",
    )


@given(cuts=st.lists(st.integers(0, 120), max_size=120))
def test_channels_of_gpt_oss_are_thought_and_answer(cuts: list[int]) -> None:
    text = f"{ANALYSIS}One.<|end|><|start|>assistant{FINAL}Two."
    assert split(text, cuts, ThoughtSplitter(GPT_OSS)) == ("One.", "Two.")
    assert split(f"{FINAL}Two.", cuts, ThoughtSplitter(GPT_OSS)) == ("", "Two.")


def test_other_families_marks_are_known_by_their_templates() -> None:
    gemma = marks_in_template("'<|channel>thought\n'\0<channel|>")
    assert split("<|channel>thought\nOne.<channel|>Two.", [], ThoughtSplitter(gemma)) == ("One.", "Two.")
    mistral = marks_in_template("[THINK]\0[/THINK]")
    assert split("[THINK]One.[/THINK]Two.", [], ThoughtSplitter(mistral)) == ("One.", "Two.")


def test_a_thought_is_given_out_while_it_comes() -> None:
    splitter = ThoughtSplitter(THINK)
    assert splitter.feed("<think>") == [] and splitter.in_thought
    assert [said.text for said in splitter.feed("One")] == ["One"]
    assert splitter.feed("</") == []
    assert [said.text for said in splitter.feed("b>")] == ["</b>"]


@pytest.mark.parametrize(
    ("known", "setting", "says"),
    [
        (ThinkingSupport(kind="none"), "off", "no switch"),
        (ThinkingSupport(kind="none"), "auto", ""),
        (ThinkingSupport(kind="always"), "off", "always opens a thought"),
        (ThinkingSupport(kind="switch", variable="enable_thinking"), "off", ""),
        (
            ThinkingSupport(kind="effort", variable="reasoning_effort", off="low"),
            "off",
            "reasoning_effort = low",
        ),
        (ThinkingSupport(kind="effort", variable="reasoning_effort", off="low"), "on", ""),
    ],
)
def test_a_setting_that_does_something_else_is_explained(
    known: ThinkingSupport, setting: Thinking, says: str
) -> None:
    effect = known.effect_of(setting)
    assert says in effect and bool(effect) == bool(says)
