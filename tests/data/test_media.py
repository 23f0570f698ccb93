from __future__ import annotations

from typing import Any

import pytest

from qlora_tui.data.conversation import Message
from qlora_tui.data.media import media_column, medium_of, placeholder


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


def test_a_placeholder_beside_a_code_block_is_named() -> None:
    text = "<image>\n```python\nprint(1)\n```\nDoes this draw it?"
    assert placeholder((Message("user", text),)) == "Turn 1 has the placeholder <image>."


def test_types_of_parts_are_told_apart() -> None:
    assert medium_of("image_url") == "an image"
    assert medium_of("input_audio") == "audio"
    assert medium_of("video") == "a video"
    assert medium_of("text") is None
    assert medium_of("file") is None
