"""Thinking on, off and auto: rows are rendered like later prompts, with reasoning in its place."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_tui.data.conversation import Conversation, Message
from qlora_tui.data.render import RenderOptions, prompt_ids, render
from qlora_tui.data.samples import TokenizedSample
from qlora_tui.data.template_capabilities import reasoning_of, without_reasoning
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.recipe.schema import Thinking
from tests.data.conversation_shapes import assistant, system, user
from tests.data.families import FAMILIES, SPECIAL, family, tokenizer_json
from tests.data.thinkers import PUBLISHED, THINKERS, template_text, thinker

WHY = "Let me count: 17*3 is 51."
PLAIN = Conversation((system("Be brief."), user("17*3?"), assistant("51")))
REASONED = Conversation((system("Be brief."), user("17*3?"), assistant("51", WHY)))
INLINE = Conversation((system("Be brief."), user("17*3?"), assistant(f"<think>\n{WHY}\n</think>\n\n51")))
TURNS = Conversation((user("1?"), assistant("one"), user("2?"), assistant("two")))
REASONED_TURNS = Conversation(
    (user("1?"), assistant("one", "First."), user("2?"), assistant("two", "Second."))
)
ROWS = (PLAIN, REASONED, INLINE, TURNS, REASONED_TURNS)
SETTINGS: tuple[Thinking, ...] = ("auto", "on", "off")


def learned(tokenizer: ChatTokenizer, sample: TokenizedSample) -> str:
    """The text of the tokens that train."""
    return tokenizer.decode([t for t, flag in zip(sample.token_ids, sample.loss_mask, strict=True) if flag])


def asked_in_training(sample: TokenizedSample) -> list[int]:
    """The tokens before the last stretch that trains."""
    return sample.token_ids[: sample.loss_mask.rindex(b"\x00\x01") + 1]


def as_decided(setting: Thinking, row: Conversation, tokenizer: ChatTokenizer) -> Thinking:
    """What the notes of a row say of how it was rendered."""
    notes = render(row, tokenizer, RenderOptions(thinking=setting))[-1].notes
    return "on" if "thinking-on" in notes else "off" if "thinking-off" in notes else setting


@pytest.mark.parametrize("special_tags", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", THINKERS)
def test_training_asks_for_the_last_answer_as_chat_does(
    name: str, setting: Thinking, special_tags: bool
) -> None:
    tokenizer = thinker(name, special_tags)
    for row in ROWS:
        sample = render(row, tokenizer, RenderOptions(thinking=setting))[-1]
        chat = prompt_ids(row.messages[:-1], tokenizer, thinking=as_decided(setting, row, tokenizer))
        assert asked_in_training(sample) == chat, row


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", THINKERS)
def test_what_is_asked_is_what_the_template_itself_asks(name: str, setting: Thinking) -> None:
    tokenizer = thinker(name)
    switch = tokenizer.traits.switch
    variables = {} if switch is None or setting == "auto" else switch.on if setting == "on" else switch.off
    turns = [{"role": m.role, "content": m.content} for m in PLAIN.messages[:-1]]
    text = tokenizer.template.with_variables(variables).render(turns, prompt=True)
    assert prompt_ids(PLAIN.messages[:-1], tokenizer, thinking=setting) == tokenizer.encode(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_switch_asks_for_what_transformers_renders_with_it(name: str) -> None:
    import transformers.utils.chat_template_utils as library

    tokenizer = thinker(name)
    switch = tokenizer.traits.switch
    text = template_text(name).replace('strftime_now("%Y-%m-%d")', "'2024-07-26'")
    transformers: Any = library
    turns = [{"role": m.role, "content": m.content} for m in PLAIN.messages[:-1]]
    for variables in ({}, *((switch.on, switch.off) if switch else ())):
        (theirs,), _ = transformers.render_jinja_template(
            [turns], chat_template=text, add_generation_prompt=True, **tokenizer.special_tokens, **variables
        )
        assert tokenizer.template.with_variables(variables).render(turns, prompt=True) == theirs


EMPTY = {
    "qwen3": "<think>\n\n</think>\n\n",
    "qwen3_5_think": "<think>\n\n</think>\n\n",
    "qwen3_5_nothink": "<think>\n\n</think>\n\n",
    "qwen3_8": "<think>\n\n</think>\n\n",
    "smollm3": "<think>\n\n</think>\n",
    "deepseek-v3.1": "</think>",
    "glm4moe": "<think></think>",
    "nemotron_3_nano": "<think></think>",
}
"""The empty thought with which a template's prompt ends when it is told not to think."""


@pytest.mark.parametrize("name", [name for name in EMPTY if name in THINKERS])
@pytest.mark.parametrize("setting", ["auto", "off"])
def test_an_empty_thought_is_prompt_without_loss(name: str, setting: Thinking) -> None:
    tokenizer = thinker(name)
    sample = render(PLAIN, tokenizer, RenderOptions(thinking=setting))[-1]
    assert tokenizer.decode(asked_in_training(sample)).endswith(EMPTY[name])
    assert learned(tokenizer, sample).strip().startswith("51")
    assert "thinking-off" in sample.notes


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_thought_opened_by_the_prompt_is_closed_and_trained(name: str, setting: Thinking) -> None:
    if name not in PUBLISHED:
        pytest.skip("trl is not installed")
    tokenizer = thinker(name)
    for row in (PLAIN, TURNS):
        sample = render(row, tokenizer, RenderOptions(thinking=setting))[-1]
        assert tokenizer.decode(asked_in_training(sample)).endswith("<｜Assistant｜><think>\n")
        assert "\n</think>\n\n" + row.messages[-1].content in learned(tokenizer, sample)
        assert "thought-closed" in sample.notes


@pytest.mark.parametrize("row", [REASONED, INLINE])
@pytest.mark.parametrize("name", THINKERS)
def test_reasoning_and_answer_are_both_in_the_loss(name: str, row: Conversation) -> None:
    tokenizer = thinker(name)
    (sample,) = render(row, tokenizer)
    text = learned(tokenizer, sample)
    assert text.count(WHY) == 1 and "51" in text.partition(WHY)[2]
    assert "reasoning-learned" in sample.notes


@pytest.mark.parametrize("row", [REASONED, INLINE, REASONED_TURNS])
@pytest.mark.parametrize("name", THINKERS)
def test_reasoning_out_of_the_loss_is_read_before_the_answer(name: str, row: Conversation) -> None:
    tokenizer = thinker(name)
    with_it = render(row, tokenizer)
    without = render(row, tokenizer, RenderOptions(reasoning_in_loss=False))
    assert [s.token_ids for s in without] == [s.token_ids for s in with_it]
    for sample in without:
        text = learned(tokenizer, sample)
        assert not any(reasoning_of(m) in text for m in row.messages if m.role == "assistant")
        assert "think>" not in text
        assert "reasoning-read" in sample.notes
    assert sum(s.trained_count for s in without) < sum(s.trained_count for s in with_it)
    answers = "".join(learned(tokenizer, s) for s in without)
    said = [m.content.rpartition("</think>")[2].strip() for m in row.messages if m.role == "assistant"]
    assert all(answer in answers for answer in said)


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "gptoss", "nemotron_3_nano", "gemma4", "gemma4_v5"])
def test_reasoning_in_an_answer_goes_where_the_template_has_it(name: str) -> None:
    if name not in PUBLISHED:
        pytest.skip("trl is not installed")
    (apart,), (inline,) = render(REASONED, thinker(name)), render(INLINE, thinker(name))
    assert (inline.token_ids, inline.loss_mask) == (apart.token_ids, apart.loss_mask)


@pytest.mark.parametrize("name", THINKERS)
def test_off_takes_reasoning_out_of_the_row(name: str) -> None:
    tokenizer = thinker(name)
    for row in (REASONED, INLINE):
        (sample,) = render(row, tokenizer, RenderOptions(thinking="off"))
        (plain,) = render(PLAIN, tokenizer, RenderOptions(thinking="off"))
        assert (sample.token_ids, sample.loss_mask) == (plain.token_ids, plain.loss_mask)
        assert "reasoning-left-out" in sample.notes


def test_everything_trains_but_reasoning_that_is_out_of_the_loss() -> None:
    tokenizer = thinker("granite")
    sample = render(REASONED_TURNS, tokenizer, RenderOptions("everything", reasoning_in_loss=False))[0]
    text = learned(tokenizer, sample)
    assert "First." not in text and "Second." not in text
    assert all(said in text for said in ("1?", "one", "2?", "two"))


@pytest.mark.parametrize("name", THINKERS)
def test_reasoning_a_template_drops_from_history_is_learned_and_counted(name: str) -> None:
    tokenizer = thinker(name)
    samples = render(REASONED_TURNS, tokenizer)
    text = "".join(learned(tokenizer, sample) for sample in samples)
    assert text.count("First.") == text.count("Second.") == 1
    forgets = name not in ("smollm3", "granite", "qwen3_8")
    assert tokenizer.traits.forgets_reasoning == forgets
    assert ("reasoning-split" in samples[0].notes) == forgets == (len(samples) == 2)


@pytest.mark.parametrize("setting", ["auto", "on"])
@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_switch_and_without_reasoning_nothing_changes(name: str, setting: Thinking) -> None:
    if name == "opens-thinking":
        return
    tokenizer = family(name)
    for row in (Conversation(PLAIN.messages[1:]), TURNS):
        (default,), (sample,) = (
            render(row, tokenizer),
            render(row, tokenizer, RenderOptions(thinking=setting)),
        )
        assert sample == default
        assert not any("think" in note or "reason" in note for note in sample.notes)
        assert prompt_ids(row.messages[:-1], tokenizer, thinking=setting) == prompt_ids(
            row.messages[:-1], tokenizer
        )


def test_the_switches_of_templates_are_told_apart() -> None:
    switches = {name: thinker(name).traits.switch for name in THINKERS}
    assert switches["smollm3"] and switches["smollm3"].variable == "enable_thinking"
    assert switches["granite"] and (switches["granite"].variable, switches["granite"].default) == (
        "thinking",
        "off",
    )
    assert switches["deepseek-v3.1"] and switches["deepseek-v3.1"].default == "off"
    if PUBLISHED:
        assert switches["qwen3"] and (switches["qwen3"].variable, switches["qwen3"].default) == (
            "enable_thinking",
            "on",
        )
        assert switches["qwen3_5_nothink"] and switches["qwen3_5_nothink"].default == "off"
        assert switches["gptoss"] and not switches["gptoss"].can_turn_off
        assert switches["gptoss"].off == {"reasoning_effort": "low"}
        assert switches["deepseek_r1_distill"] is None and thinker("deepseek_r1_distill").traits.opens_thought


def test_rows_without_reasoning_use_the_default_of_a_fixed_effort() -> None:
    if "gptoss" not in PUBLISHED:
        pytest.skip("trl is not installed")
    tokenizer = thinker("gptoss")
    assert "Reasoning: medium" in tokenizer.decode(render(PLAIN, tokenizer)[0].token_ids)
    low = render(PLAIN, tokenizer, RenderOptions(thinking="off"))[0]
    assert "Reasoning: low" in tokenizer.decode(low.token_ids)


def test_dropped_reasoning_is_written_as_the_prompt_begins_it() -> None:
    tokenizer = thinker("deepseek-v3.1")
    (sample,) = render(REASONED, tokenizer)
    assert tokenizer.decode(sample.token_ids).endswith(f"<Assistant><think>{WHY}</think>51</s>")
    assert learned(tokenizer, sample) == f"{WHY}</think>51</s>"
    (closed,) = render(PLAIN, tokenizer, RenderOptions(thinking="on"))
    assert learned(tokenizer, closed) == "</think>51</s>"


def test_reasoning_that_gemma_4_omits_gets_its_own_tags() -> None:
    if "gemma4" not in PUBLISHED:
        pytest.skip("trl is not installed")
    (older,), (newer,) = render(REASONED, thinker("gemma4")), render(REASONED, thinker("gemma4_v5"))
    assert learned(thinker("gemma4"), older) == f"<|channel>thought\n{WHY}\n<channel|>51<turn|>\n"
    assert learned(thinker("gemma4_v5"), newer) == learned(thinker("gemma4"), older)


def test_history_is_sent_back_as_the_template_has_it() -> None:
    granite, r1 = thinker("granite"), thinker("deepseek-v3.1")
    history = REASONED_TURNS.messages[:-1]
    assert "First." in granite.decode(prompt_ids(history, granite, thinking="on"))
    assert "First." not in granite.decode(prompt_ids(history, granite, thinking="off"))
    assert "First." not in r1.decode(prompt_ids(history, r1, thinking="on"))


@pytest.mark.parametrize(
    ("content", "reasoning", "answer"),
    [
        ("<think>a</think>b", "a", "b"),
        ("a\n</think>\n\nb", "a", "b"),
        (" \n<think>\n\n</think>\n\nb", "", "b"),
        ("Use <think>a</think> here", "", "Use <think>a</think> here"),
        ("b", "", "b"),
        ("<think>never closed", "", "<think>never closed"),
    ],
)
def test_reasoning_in_a_text_is_what_stands_before_it(content: str, reasoning: str, answer: str) -> None:
    message = Message("assistant", content)
    assert reasoning_of(message) == reasoning
    assert without_reasoning([message])[0].content == answer
    question = Message("user", content)
    assert reasoning_of(question) == "" and without_reasoning([question]) == (question,)


def test_control_tokens_in_reasoning_are_still_plain_text() -> None:
    tokenizer = thinker("granite", special_tags=True)
    row = Conversation((user("a"), assistant("b", "x<|end|>y")))
    (sample,) = render(row, tokenizer)
    ends = sample.token_ids.count(tokenizer.added_tokens["<|end|>"])
    assert ends == 3 and "x<|end|>y" in tokenizer.decode(sample.token_ids)
    assert sample.token_ids.count(tokenizer.added_tokens["<think>"]) == 1


def test_white_space_that_the_prompt_does_not_give_is_learned() -> None:
    # The marks begin after it (LLaVA's template in axolotl).
    template = (
        "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}{{ ' ' }}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ ' ' + m.content + ' ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = ChatTokenizer(tokenizer_json(SPECIAL), {"eos_token": "</s>"}, template)
    conversation = Conversation((user("Hello"), assistant("there")))
    (sample,) = render(conversation, tokenizer)
    assert learned(tokenizer, sample) == " there</s>"
    assert asked_in_training(sample) == prompt_ids(conversation.messages[:-1], tokenizer)
