"""A thinking model in the chat: prompted as in training, its thoughts separate from its answer."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.chat.chat_sources import run_source
from qlora_tui.chat.chat_types import GREEDY, ChatSource, GenerationResult, ThinkingSupport
from qlora_tui.data.conversation import Message
from qlora_tui.data.render import RenderOptions, prompt_ids, render
from qlora_tui.data.thought_splitter import TextChunk, ThoughtSplitter, marks_in_template
from qlora_tui.recipe.schema import Data, Recipe, Thinking
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import encode
from tests.data.thinkers import DEEPSEEK_V31, GRANITE, SMOLLM3
from tests.support.step_events import a_data_set

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
        (ThinkingSupport(kind="always"), "off", "always opens a thinking block"),
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


QUESTION = Message("user", "what is the colour of the fox")
HISTORY = (QUESTION, Message("assistant", "red", reasoning="a fox is red"), Message("user", "and the dog"))
SHORT = msgspec.structs.replace(GREEDY, max_new_tokens=12)
TEMPLATES = {"smollm3": SMOLLM3, "deepseek-v3.1": DEEPSEEK_V31, "granite": GRANITE}


def described(run: RunDir, thinking: Thinking) -> None:
    """Let a run have decided so."""
    with run.events_path.open("ab") as events:
        events.write(encode(a_data_set(thinking=thinking)))


def test_thinking_follows_the_runs_data_unless_its_recipe_decides() -> None:
    run = create_run(Recipe())
    assert run_source(run).thinking == "auto"
    described(run, "off")
    assert run_source(run).thinking == "off"
    assert run_source(create_run(Recipe(data=Data(thinking="on")))).thinking == "on"


def test_a_run_of_before_is_asked_as_its_template_does() -> None:
    run = create_run(Recipe())
    with run.events_path.open("ab") as events:
        events.write(
            b'{"event":"data_ready","at":1.0,"samples":1,"validation_samples":0,"tokens":1,"trained_tokens":1,'
            b'"rows":1,"steps_per_epoch":1,"total_steps":1,"data_hash":"x"}\n'
        )
    assert run_source(run).thinking == "auto"


@pytest.fixture(scope="module")
def sessions(tiny_model: Path, tiny_source: ChatSource, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny model with the template of each thinking model."""
    from qlora_tui.chat.loading import load_session

    loaded = {}
    for name, template in TEMPLATES.items():
        folder = tmp_path_factory.mktemp("thinkers") / name
        shutil.copytree(tiny_model, folder)
        (folder / "chat_template.jinja").write_text(template)
        model = msgspec.structs.replace(tiny_source.recipe.model, id=str(folder))
        recipe = msgspec.structs.replace(tiny_source.recipe, model=model)
        loaded[name] = load_session(ChatSource(recipe=recipe, thinking="off"))
    return loaded


def heard(session: Any, answer: str, thinking: Thinking = "on", ends: bool = True) -> GenerationResult:
    """How the session hears a model that says ``answer``."""
    ids = session.tokenizer.encode(answer)
    last = [next(iter(session.end_ids))] if ends else []
    sampling = msgspec.structs.replace(SHORT, max_new_tokens=len(ids) + len(last))
    reply = session.ask([QUESTION], sampling=sampling, thinking=thinking)
    reply._tokens = lambda reused: iter([*ids, *last])
    pieces: list[TextChunk] = list(reply)
    outcome: GenerationResult = reply.outcome
    assert "".join(p.text for p in pieces if p.thought).strip() == outcome.thought
    assert "".join(p.text for p in pieces if not p.thought) == outcome.text
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("thinking", ["on", "off"])
def test_chat_asks_with_the_tokens_of_training(sessions: Any, name: str, thinking: Thinking) -> None:
    from qlora_tui.data.conversation import Conversation

    session = sessions[name]
    row = Conversation((*HISTORY, Message("assistant", "brown", reasoning="dogs are brown")))
    sample = render(row, session.tokenizer, RenderOptions(thinking=thinking))[-1]
    prompt = session.prompt(HISTORY, thinking)
    assert sample.token_ids[: len(prompt)] == prompt
    assert sample.loss_mask[len(prompt) - 1 : len(prompt) + 1] == b"\x00\x01"


@pytest.mark.slow
def test_unless_told_the_session_asks_as_its_source_says(sessions: Any) -> None:
    for session in sessions.values():
        off = prompt_ids([QUESTION], session.tokenizer, thinking="off")
        assert session.prompt([QUESTION]) == off != session.prompt([QUESTION], "on")


@pytest.mark.slow
def test_a_thought_is_apart_from_the_answer_and_counted(sessions: Any) -> None:
    session = sessions["smollm3"]
    outcome = heard(session, "<think>\na fox is red\n</think>\n\nred")
    assert (outcome.thought, outcome.text, outcome.thought_ended) == ("a fox is red", "red", True)
    assert 0 < outcome.thought_tokens <= len(session.tokenizer.encode("\na fox is red\n</think>"))
    assert outcome.thought_s > 0
    plain = heard(session, "red")
    assert (plain.thought, plain.text, plain.thought_tokens, plain.thought_s) == ("", "red", 0, 0.0)


@pytest.mark.slow
def test_a_thought_that_the_prompt_opens_is_a_thought(sessions: Any) -> None:
    session = sessions["deepseek-v3.1"]
    assert heard(session, "a fox is red</think>red").thought == "a fox is red"
    assert heard(session, "red", thinking="off").text == "red"


@pytest.mark.slow
def test_a_truncated_thought_gives_no_answer_and_says_so(sessions: Any) -> None:
    outcome = heard(sessions["smollm3"], "<think>\na fox is", ends=False)
    assert (outcome.text, outcome.thought, outcome.thought_ended) == ("", "a fox is", False)
    assert outcome.ending == "most tokens"


@pytest.mark.slow
def test_only_special_tokens_that_mark_a_thought_are_visible(sessions: Any) -> None:
    session = sessions["smollm3"]
    end = "<|im_end|>"
    ids = session.tokenizer.encode(f"red{end}")
    assert session.decode(ids) == "red"
    decoder = session._decoder
    before, decoder._mark_ids = decoder._mark_ids, frozenset(session.tokenizer.encode(end))
    try:
        assert session.decode(ids) == f"red{end}"
    finally:
        decoder._mark_ids = before


@pytest.mark.slow
def test_the_command_line_says_what_a_setting_does_not_do(
    tiny_source: ChatSource, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlora_tui.chat.repl import generate_once

    run = create_run(tiny_source.recipe)
    list(generate_once(run, QUESTION.content, base=True, sampling=SHORT, thinking="off"))
    assert "Turning thinking off has no effect" in capsys.readouterr().err
    list(generate_once(run, QUESTION.content, base=True, sampling=SHORT))
    assert "has no effect" not in capsys.readouterr().err
