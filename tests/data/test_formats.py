"""Layouts of rows: which one a file has, and the conversations that it gives."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_tui.data.conversation import (
    Conversation,
    Message,
    RowRejectedError,
    ToolCall,
    media_column,
    medium_of,
    placeholder,
)
from qlora_tui.data.formats import RowFormat, detect, parse
from qlora_tui.data.row import Row
from qlora_tui.errors import UserError

U, A, S = "user", "assistant", "system"
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
PLAIN = (Message("user", "Hi"), Message("assistant", "Hello"))


def read(value: Any, wanted: str = "auto", columns: dict[str, str] | None = None) -> tuple[str, Conversation]:
    row = Row(1, value)
    detection = detect([row], "file", wanted, columns)
    return detection.layout.format, parse(row, detection.layout)


@pytest.mark.parametrize(
    ("value", "format_"),
    [
        ({"messages": CHAT}, "messages"),
        ({"conversation": json.dumps(CHAT)}, "messages"),
        ({"odd_name": CHAT}, "messages"),
        (CHAT, "messages"),
        ({"conversations": SHAREGPT}, "sharegpt"),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "alpaca"),
        ({"instruction": "Hi", "context": "", "response": "Hello", "category": "x"}, "alpaca"),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt-completion"),
        ({"Prompt": "Hi", "Response": "Hello"}, "prompt-completion"),
        ({"input": "Hi", "output": "Hello"}, "prompt-completion"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt-completion"),
        ({"question": "Hi", "answer": "Hello"}, "question-answer"),
        ({"question": "Hi", "answers": {"text": ["Hello", "Hey"], "start": [0, 0]}}, "question-answer"),
        ({"conversation": [{"input": "Hi", "output": "Hello"}]}, "sharegpt"),
        ({"conversation": [{"human": "Hi", "assistant": "Hello"}], "category": "x"}, "sharegpt"),
        ({"conversations": ["Hi", "Hello"], "source": "x"}, "sharegpt"),
        ({"contents": [{"role": "user", "parts": [{"text": "Hi"}]},
                       {"role": "model", "parts": [{"text": "Hello"}]}]}, "messages"),
        ({"User": "Hi", "Assistant": "Hello"}, "prompt-completion"),
        ({"human": "Hi", "assistant": "Hello"}, "prompt-completion"),
        ({"src": "Hi", "tgt": "Hello"}, "prompt-completion"),
        ({"dialogue": "Hi", "summary": "Hello", "id": "1"}, "prompt-completion"),
        ({"article": "Hi", "highlights": "Hello"}, "prompt-completion"),
        ({"text": "Hi", "summary": "Hello", "title": "x"}, "prompt-completion"),
        ({"text": "Hi", "summary": ["Hello"], "title": "x"}, "prompt-completion"),
        ({"question": "Hi", "answers": [{"text": "Hello", "score": 3}]}, "question-answer"),
        ({"text": "Hi", "label": "Hello"}, "decision"),
        ({"sentence": "Hi", "label": 1, "label_text": "Hello"}, "decision"),
    ],
)  # fmt: skip
def test_common_formats_are_found_and_read(value: Any, format_: str) -> None:
    detection, conversation = read(value)
    assert detection == format_
    assert [(m.role, m.content) for m in conversation.messages] == [(U, "Hi"), (A, "Hello")]


@pytest.mark.parametrize(
    ("value", "format_", "columns"),
    [
        ({"question": "Q", "answers": ["a", "b"]}, "question-answer", ("question", "answers")),
        ({"text": "T", "labels": ["sport", "news"]}, "decision", ("text", "labels")),
        ({"source": "web", "question": "Q", "answer": "A"}, "question-answer", ("question", "answer")),
        ({"source": "S", "target": "T"}, "prompt-completion", ("source", "target")),
        ({"source": "web", "target": "T", "text": "x"}, "decision", ("text", "target")),
        ({"article": "a", "summary": "s", "question": "Q", "answer": "A"}, "question-answer",
         ("question", "answer", "article")),
        ({"prompt": "P", "completion": "C", "text": "t", "summary": "s"}, "prompt-completion",
         ("prompt", "completion")),
        ({"instruction": "Sort", "items": ["b", "a"], "output": "a, b"}, "alpaca",
         ("instruction", "output")),
        ({"dialogue": ["b", "a"], "question": "Q", "answer": "A"}, "question-answer",
         ("question", "answer")),
    ],
)  # fmt: skip
def test_columns_are_taken_for_what_they_are_beside_the_others(
    value: Any, format_: str, columns: tuple[str, ...]
) -> None:
    layout = detect([Row(1, value)], "file").layout
    assert layout.format == format_
    assert tuple(layout.columns.values()) == columns


def test_questions_without_answers_are_no_conversation() -> None:
    with pytest.raises(UserError, match="No usable field"):
        read({"turns": ["Who?", "And why?"], "category": "x"})


@pytest.mark.parametrize(("scores", "is_refused"), [((3, 3), False), ((3, 9), True)])
def test_answers_with_different_scores_are_compared(scores: tuple[int, int], is_refused: bool) -> None:
    answers = [{"text": "Hello", "score": scores[0]}, {"text": "Hey", "score": scores[1]}]
    try:
        assert read({"question": "Hi", "answers": answers})[1].messages == PLAIN
    except UserError as error:
        assert is_refused and error.title == "Better and worse answers are mixed"
    else:
        assert not is_refused


def test_calls_are_the_answer_where_tools_are_offered() -> None:
    row = {"query": "Hi", "answers": '[{"name": "w", "arguments": {"a": 1}}]', "tools": '[{"name": "w"}]'}
    _, conversation = read(row)
    assert conversation.messages[1].tool_calls == (ToolCall("w", {"a": 1}),)
    assert [tool["function"]["name"] for tool in conversation.tools] == ["w"]
    _, without = read({key: row[key] for key in ("query", "answers")})
    assert not without.messages[1].tool_calls


@pytest.mark.parametrize(
    "value",
    [
        {"instruction": "Hi", "output": "Hello", "examples": [{"input": "a", "output": "b"}]},
        {"instruction": "Hi", "output": "Hello", "tags": ["a", "b"]},
        {"question": "Hi", "answer": "Hello", "turns": "two"},
    ],
)
def test_examples_and_lists_of_words_are_no_conversation(value: Any) -> None:
    assert [m.content for m in read(value)[1].messages] == ["Hi", "Hello"]


def test_texts_in_turn_alternate_to_the_last() -> None:
    _, conversation = read({"dialog": ["a", "b", "c"]})
    assert [(m.role, m.content) for m in conversation.messages] == [(U, "a"), (A, "b"), (U, "c")]


def test_single_turn_rows_are_rejected_unlike_other_role_rows() -> None:
    turn = {"message_id": "x", "parent_id": None, "role": "prompter", "text": "Hi"}
    with pytest.raises(UserError) as raised:
        read(turn)
    assert raised.value.title == "Conversations are split across rows" and "'role'" in raised.value.what
    for labels in ({"name": ["spam"], "value": [0.0]}, "good"):
        with pytest.raises(UserError, match="Conversations are split across rows"):
            read({**turn, "labels": labels})
    assert read({"text": "Hi", "labels": {"name": ["spam"]}})[0] == "text"
    assert read(turn, "text")[0] == "text"
    assert read({**turn, "role": "chapter"})[0] == "text"
    assert read({"role": "user", "text": "Hi"})[0] == "text"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"translation": {"en": "a", "fr": "b"}, "id": "1"}, "'translation' holds an object"),
        ({"FAQ": "Hi", "Reply": "Hello"}, 'prompt = "FAQ", completion = "Reply"'),
        (
            {"name": "a", "story": "A long one.", "moral": "Be kind."},
            'prompt = "story", completion = "moral"',
        ),
        ({"tag": "a", "Reply": "In a den.", "prompt": "Where do"}, 'prompt = "prompt", completion = "Reply"'),
        ({"body": {"role": "x"}, "title": "A fox"}, "'body' holds an object"),
        ({"tokens": [1, 2]}, 'prompt = "…"'),
    ],
)
def test_a_refusal_says_how_these_columns_are_mapped(value: Any, words: str) -> None:
    with pytest.raises(UserError) as raised:
        read(value)
    assert words in raised.value.fix


TEXTS = ["Red.", "Blue."]


@pytest.mark.parametrize(
    ("value", "columns"),
    [
        ({"instruction": "Hi", "output": TEXTS}, {}),
        ({"instruction": TEXTS, "output": "Hello"}, {}),
        ({"instruction": "Hi", "output": "Hello", "input": TEXTS}, {}),
        ({"instruction": "Hi", "output": [{"text": text} for text in TEXTS]}, {}),
        ({"prompt": "Hi", "completion": TEXTS}, {}),
        ({"prompt": TEXTS, "completion": "Hello"}, {}),
        ({"prompt": "Hi", "chosen": TEXTS, "rejected": "No"}, {}),
        ({"question": TEXTS, "answer": "Hello"}, {}),
        ({"text": TEXTS, "label": "colors"}, {}),
        ({"text": TEXTS}, {}),
        ({"a": "Hi", "b": TEXTS}, {"prompt": "a", "completion": "b"}),
    ],
)
def test_several_texts_in_a_cell_are_never_joined(value: Any, columns: dict[str, str]) -> None:
    detection = detect([Row(1, dict.fromkeys(value, "a b"))], "file", "auto", columns, "chosen")
    with pytest.raises(RowRejectedError, match="a list of 2 texts") as caught:
        parse(Row(2, value), detection.layout)
    assert caught.value.kind == "wrong-format"


@pytest.mark.parametrize("summary", [["a", "b"], [], json.dumps(["a", "b"])])
def test_a_list_of_summaries_never_makes_plain_text_of_the_article(summary: Any) -> None:
    rows = [Row(n, {"article": "A long text", "text": "A long text", "summary": summary}) for n in (1, 2)]
    layout = detect(rows, "file").layout
    assert layout.columns["completion"] == "summary"
    if isinstance(summary, list):
        with pytest.raises(RowRejectedError):
            parse(rows[0], layout)


def test_one_text_in_a_list_and_typed_parts_are_a_text() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    for answer in (["Hello"], parts):
        assert read({"instruction": "Hi", "output": answer})[1].messages == PLAIN


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        ("instruction", "output"),
        ("instruction", "response"),
        ("prompt", "completion"),
        ("prompt", "completions"),
        ("prompt", "responses"),
        ("query", "Generations"),
    ],
)
@pytest.mark.parametrize("texts", [TEXTS, ["Bright red.", "Deep blue."]])
def test_lists_of_answers_stop_whatever_their_length(prompt: str, answers: str, texts: list[str]) -> None:
    with pytest.raises(UserError, match="Better and worse answers are mixed") as raised:
        read({prompt: "Hi", answers: texts})
    assert repr(answers) in raised.value.what


def test_one_answer_in_a_list_is_no_prompt_alone() -> None:
    with pytest.raises(UserError, match="Better and worse answers are mixed"):
        read({"prompt": "Hi", "completions": ["Hello"]})


def test_conversations_written_out_as_text_are_told() -> None:
    for text, reported in (("### Human: a### Assistant: b", True), ("Once upon a time", False)):
        said = detect([Row(1, {"text": text})], "f").evidence
        assert any("### Human:" in sentence for sentence in said) is reported


def test_plain_text_is_read_as_text() -> None:
    assert read({"text": "Once upon a time", "url": "x"})[1].text == "Once upon a time"
    assert read("Once upon a time")[1].text == "Once upon a time"


def test_alpaca_puts_the_input_under_the_instruction_and_keeps_history() -> None:
    row = {
        "instruction": "Sum up.",
        "input": "A tale.",
        "output": "Short.",
        "system": "S",
        "history": [["q", "a"]],
    }
    messages = read(row)[1].messages
    assert [(m.role, m.content) for m in messages] == [
        (S, "S"), (U, "q"), (A, "a"), (U, "Sum up.\n\nA tale."), (A, "Short."),
    ]  # fmt: skip


def test_sharegpt_tool_roles_become_calls_and_answers() -> None:
    tool = {"name": "find", "parameters": {}}
    turns = [
        {"from": "human", "value": "Look"},
        {"from": "gpt", "value": "Wait."},
        {"from": "function_call", "value": json.dumps({"name": "find", "arguments": '{"q": 1}'})},
        {"from": "observation", "value": "found"},
        {"from": "gpt", "value": "Here."},
    ]
    conversation = read({"conversations": turns, "system": "Be brief.", "tools": json.dumps([tool])})[1]
    assert conversation.messages == (
        Message("system", "Be brief."),
        Message("user", "Look"),
        Message("assistant", "Wait.", tool_calls=(ToolCall("find", {"q": 1}),)),
        Message("tool", "found"),
        Message("assistant", "Here."),
    )
    assert conversation.tools == ({"type": "function", "function": tool},)


def test_openai_tool_calls_reasoning_and_parts_are_read() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "developer", "content": "D"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "name": "f", "content": {"x": 1}},
        {"role": "assistant", "content": "done"},
    ]
    messages = read({"messages": turns})[1].messages
    assert messages[0] == Message("system", "D")
    assert messages[1].content == "ab"
    assert messages[2] == Message(
        "assistant", "", reasoning="hm", tool_calls=(ToolCall("f", {"a": 1}, "c1"),)
    )
    assert messages[3] == Message("tool", '{"x": 1}', tool_call_id="c1", name="f")


@pytest.mark.parametrize(
    ("flag", "trains"),
    [
        ({}, True),
        ({"train": False}, False),
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"loss_weight": "0"}, False),
        ({"train": "False"}, False),
        ({"train": "yes"}, True),
        ({"loss": True}, True),
    ],
)
def test_flags_say_which_turns_train(flag: dict[str, Any], trains: bool) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **flag}]
    assert read({"messages": turns})[1].messages[1].train is trains


@pytest.mark.parametrize("key", ["train", "weight", "loss_weight", "loss"])
@pytest.mark.parametrize("value", ["high", [1], [], {"x": 0}, {}])
def test_a_flag_that_is_no_number_is_refused(key: str, value: Any) -> None:
    with pytest.raises(RowRejectedError, match=f"'{key}' of a turn is") as caught:
        read({"messages": [CHAT[0], {**CHAT[1], key: value}]})
    assert caught.value.kind == "wrong-format"


def test_a_flag_of_null_is_not_set() -> None:
    assert read({"messages": [CHAT[0], {**CHAT[1], "train": None, "weight": 0}]})[1].messages[1].weight == 0


@pytest.mark.parametrize("arguments", ["{bad", "[1]", "Rome", '"Rome"', [1], 3, '{"a": 1} {'])
@pytest.mark.parametrize("shape", ["messages", "role", "part", "answer"])
def test_arguments_that_are_no_object_are_refused(arguments: Any, shape: str) -> None:
    call = {"name": "f", "arguments": arguments}
    rows = {
        "messages": {"messages": [CHAT[0], {**CHAT[1], "tool_calls": [{"id": "c", "function": call}]}]},
        "role": {"conversations": [SHAREGPT[0], {"from": "function_call", "value": json.dumps(call)}]},
        "part": {"messages": [CHAT[0], {"role": A, "content": [{"type": "tool_call", "value": call}]}]},
        "answer": {"question": "Hi", "answers": json.dumps([call]), "tools": '[{"name": "f"}]'},
    }
    row = Row(1, rows[shape])
    layout = detect([row], "file").layout
    with pytest.raises(RowRejectedError, match="arguments of 'f' are not a JSON object") as caught:
        parse(row, layout)
    assert caught.value.kind == "wrong-format"


@pytest.mark.parametrize("arguments", ["", " ", None, "{}", {}])
def test_a_call_may_have_no_arguments(arguments: Any) -> None:
    calls = [{"name": "f", "arguments": arguments}]
    messages = read({"messages": [CHAT[0], {**CHAT[1], "tool_calls": calls}]})[1].messages
    assert messages[1].tool_calls == (ToolCall("f"),)


@pytest.mark.parametrize("weight", [-1, 2000, float("nan"), float("inf")])
def test_a_weight_that_can_be_no_weight_is_refused(weight: float) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": weight}]
    with pytest.raises(RowRejectedError, match="Turn 2 has the weight"):
        parse(Row(1, {"messages": turns}), RowFormat("messages", {"messages": "messages"}))


def test_only_the_completion_of_a_chat_prompt_trains() -> None:
    row = {
        "prompt": [*CHAT, {"role": "user", "content": "And?"}],
        "completion": [{"role": "assistant", "content": "So."}],
    }
    assert [m.content for m in read(row)[1].answers] == ["So."]


def test_columns_can_be_mapped_by_hand() -> None:
    row = {"frage": "Hi", "antwort": "Hello", "note": "x"}
    for columns in ({"prompt": "frage", "completion": "antwort"}, {"question": "frage", "answer": "antwort"}):
        assert read(row, columns=columns)[1].messages == PLAIN


def test_integer_labels_take_their_names_from_the_mapping() -> None:
    columns = {"text": "s", "label": "y", "label_names": "bad, good"}
    assert read({"s": "Fine!", "y": 1}, columns=columns)[1].messages[1].content == "good"
    assert read({"s": "Fine!", "y": "0"}, columns=columns)[1].messages[1].content == "bad"
    with pytest.raises(RowRejectedError, match="has no name"):
        read({"s": "Fine!", "y": 2}, columns=columns)


def test_several_labels_of_a_text_are_read_with_commas_between() -> None:
    assert read({"text": "T", "labels": ["sport", "news"]})[1].messages[1].content == "sport, news"
    columns = {"text": "s", "label": "y", "label_names": "bad, good"}
    assert read({"s": "T", "y": [1, 0]}, columns=columns)[1].messages[1].content == "good, bad"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "media",
        ),
        ({"messages": [{"role": "user", "content": "x", "images": ["a.png"]}]}, "media"),
        (
            {"messages": [*CHAT, {"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}]},
            "wrong-format",
        ),
        ({"messages": [{**CHAT[0], "tool_calls": [{"name": "f"}]}, CHAT[1]]}, "wrong-format"),
        ({"messages": [CHAT[0], {**CHAT[1], "train_detail": [{"begin_offset": 0}]}]}, "wrong-format"),
        ({"instruction": "a", "output": "b", "history": "c"}, "wrong-format"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown-role"),
        ({"messages": [{"role": "user", "content": ""}]}, "empty-row"),
        ({"instruction": "x", "output": "  "}, "empty-row"),
        ({"instruction": " ", "output": "x"}, "empty-row"),
        ({"prompt": "x", "completion": None}, "empty-row"),
        ({"text": " "}, "empty-row"),
        ({"prompt": "x", "completion": float("nan")}, "empty-row"),
        ({"text": "x", "label": float("nan")}, "empty-row"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_refused_by_kind(value: Any, kind: str) -> None:
    with pytest.raises(RowRejectedError) as caught:
        read(value)
    assert caught.value.kind == kind
    assert caught.value.reason.endswith(".")


def test_fields_of_nulls_are_no_tool_calls() -> None:
    call = {"name": None, "arguments": None}
    turns = [{**turn, "function_call": call, "tool_calls": []} for turn in CHAT]
    assert read({"messages": turns})[1].messages == PLAIN


def test_a_history_of_turns_is_read() -> None:
    row = {"instruction": "And?", "output": "So.", "history": CHAT}
    assert [m.content for m in read(row)[1].messages] == ["Hi", "Hello", "And?", "So."]
    assert read({"history": CHAT, "id": 1})[1].messages == PLAIN


def test_the_evidence_says_that_other_answers_are_not_used() -> None:
    rows = [
        Row(1, {"question": "Q", "answers": {"text": ["a", "b"]}}),
        Row(2, {"question": "Q", "answers": ["a"]}),
    ]
    assert "the first of several answers is trained on in 1 row" in detect(rows, "file").evidence


def test_a_part_that_is_not_text_is_named_precisely() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "file"}]}]
    with pytest.raises(RowRejectedError, match=r"^Turn 2 has a part of type 'file'\.$"):
        read({"messages": turns})


@pytest.mark.parametrize("value", [{}, [], 3, None, [1, 2]])
def test_a_row_that_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(RowRejectedError) as caught:
        parse(Row(4, value), RowFormat("alpaca", {"instruction": "instruction", "output": "output"}))
    assert caught.value.kind == "bad-row"


def test_a_row_that_lacks_the_column_is_refused() -> None:
    with pytest.raises(RowRejectedError, match="no 'output'"):
        parse(
            Row(4, {"instruction": "x"}),
            RowFormat("alpaca", {"instruction": "instruction", "output": "output"}),
        )


def test_nothing_usable_names_what_was_found() -> None:
    with pytest.raises(UserError, match="No usable field") as caught:
        detect([Row(1, {"id": 3, "url": "x"})], "things.jsonl")
    assert "things.jsonl" in caught.value.what
    assert "id, url" in caught.value.what
    assert "columns" in caught.value.fix


def test_a_format_that_does_not_fit_the_file_is_reported() -> None:
    with pytest.raises(UserError, match="The data is not in this format"):
        detect([Row(1, {"text": "x"})], "file", "alpaca")


def test_mapping_errors_offer_the_near_match() -> None:
    with pytest.raises(UserError, match="No such column") as column:
        detect(
            [Row(1, {"antwort": "x", "frage": "y"})],
            "file",
            "auto",
            {"prompt": "fragen", "completion": "antwort"},
        )
    assert "'frage'" in column.value.fix
    with pytest.raises(UserError, match="Unknown part") as part:
        detect([Row(1, {"a": "x"})], "file", "auto", {"promt": "a"})
    assert "'prompt'" in part.value.fix


def test_a_chosen_format_reads_turns_in_either_spelling() -> None:
    assert read({"messages": CHAT}, "sharegpt")[1].messages == PLAIN
    assert read({"conversations": SHAREGPT}, "messages")[1].messages == PLAIN


@pytest.mark.parametrize(
    ("fields", "column"),
    [
        ({"images": ["a.jpg"]}, "images"),
        ({"text": "x", "image": "a.jpg"}, "image"),
        ({"Image": {"bytes": b"x", "path": None}}, "Image"),
        ({"photo": {"bytes": b"x", "path": "a.png"}}, "photo"),
        ({"sound": {"array": [0.1], "sampling_rate": 16000}}, "sound"),
        ({"frames": [{"bytes": b"x", "path": "a.png"}]}, "frames"),
        ({"image_url": "https://example.org/a.png"}, "image_url"),
        ({"audio_path": "a.wav"}, "audio_path"),
        ({"video": "a.mp4"}, "video"),
        ({"file_name": "A.PNG", "text": "x"}, "file_name"),
    ],
)
def test_a_column_with_a_medium_is_named(fields: dict[str, Any], column: str) -> None:
    assert repr(column) in media_column(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"images": []},
        {"image": None, "audio": "", "videos": {}},
        {"images": 0, "video": False},
        {"imagery": "vivid", "imagination": "x", "audience": "all"},
        {"file_name": "notes.txt", "path": "src/image.py"},
        {"meta": {"bytes": 12, "path": "x", "lines": 3}},
    ],
)
def test_a_row_of_text_has_no_medium(fields: dict[str, Any]) -> None:
    assert media_column(fields) == ""


@pytest.mark.parametrize(
    "text",
    [
        "<image>What is it?",
        "<image>\nWhat is it?",
        " <image><image> Which?",
        "What is it?<image>",
        "Look at this:\n<video>\nWhat runs?",
        "<audio>",
    ],
)
def test_a_placeholder_is_named_with_its_turn(text: str) -> None:
    tag = next(tag for tag in ("<image>", "<video>", "<audio>") if tag in text)
    turns = (Message("user", "Hi"), Message("assistant", "Yes"), Message("user", text))
    assert placeholder(turns) == f"Turn 3 has the placeholder {tag}."


@pytest.mark.parametrize(
    "tag",
    ["<img>a/b.jpeg</img>", "<audio>a.wav</audio>", "<|image_pad|>", "<|image_1|>", "<image 1>", "<image_2>"],
)
def test_a_medium_inside_a_sentence_is_named(tag: str) -> None:
    assert placeholder((Message("user", f"Look at {tag} closely."),)) == f"Turn 1 has the placeholder {tag}."
    assert not placeholder((Message("user", f"Why not write\n```\n{tag}\n```?"), Message("assistant", tag)))


@pytest.mark.parametrize(
    "text",
    [
        "Why is <img></img> wrong, and <img>text</img> too?",
        "<video>Your browser plays none.</video>",
        "What does the <video> element do in HTML?",
        "Explain <audio> and <video> tags",
        "<video>\n  <source src='a.mp4'>\n</video>",
        "Use <img src='a.png'>",
        "a < b > c",
    ],
)
def test_a_question_about_markup_has_no_placeholder(text: str) -> None:
    assert placeholder((Message("user", text), Message("assistant", text))) == ""


@pytest.mark.parametrize(
    "text",
    [
        "Use the tag:\n\n```html\n<image>\n```\n\nSVG has <image> elements.",
        "~~~\n<video>\n~~~",
        "1. Like this:\n   ```\n   <audio>\n   ```",
        "An answer that was cut off:\n```html\n<image>\n",
    ],
)
def test_a_code_block_has_no_placeholder(text: str) -> None:
    assert placeholder((Message("user", text), Message("assistant", text))) == ""


def test_an_answer_may_be_an_element_of_html() -> None:
    question = Message("user", "Which element plays a film?")
    assert placeholder((question, Message("assistant", "<video>"))) == ""
    assert placeholder((question, Message("assistant", "<image>"))) == "Turn 2 has the placeholder <image>."


def test_types_of_parts_are_told_apart() -> None:
    assert medium_of("image_url") == "an image"
    assert medium_of("input_audio") == "audio"
    assert medium_of("video") == "a video"
    assert medium_of("text") is None
    assert medium_of("file") is None
