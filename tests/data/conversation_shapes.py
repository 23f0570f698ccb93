"""Conversations of many shapes, for tests that hold masks to a reference."""

from __future__ import annotations

from qlora_tui.data.conversation import Conversation, Message, ToolCall

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str, reasoning: str = "", train: bool = True) -> Message:
    return Message("assistant", text, train, reasoning)


def system(text: str) -> Message:
    return Message("system", text)


def call(place: str, text: str = "") -> Message:
    return Message("assistant", text, tool_calls=(ToolCall("get_weather", {"place": place}),))


def tool(text: str) -> Message:
    return Message("tool", text, name="get_weather")


SHAPES: dict[str, tuple[Message, ...]] = {
    "single": (user("What is a fox?"), assistant("A small wild dog.")),
    "system": (system("Answer in one line."), user("What is a fox?"), assistant("A small wild dog.")),
    "two-turns": (user("Hi"), assistant("Hello."), user("Bye"), assistant("See you.")),
    "system-two-turns": (
        system("Be brief."),
        user("Hi"),
        assistant("Hello."),
        user("Bye"),
        assistant("See you."),
    ),
    "many-turns": tuple(m for n in range(6) for m in (user(f"Question {n}?"), assistant(f"Answer {n}."))),
    "same-answers": (
        user("a"),
        assistant("Yes."),
        user("a"),
        assistant("Yes."),
        user("a"),
        assistant("Yes."),
    ),
    "answer-repeats-question": (user("Yes."), assistant("Yes."), user("Yes."), assistant("Yes.")),
    "unicode": (
        user("Grüße 🦊 — 你好"),
        assistant("狐狸 is 🦊🏽, naïve café. مرحبا"),
        user("ok"),
        assistant("👍"),
    ),
    "trailing-spaces": (user("Hi  "), assistant("Hello.   "), user("Bye\n\n"), assistant("See you. \n")),
    "leading-spaces": (user("  Hi"), assistant("  Hello."), user("\nBye"), assistant("\n\nSee you.")),
    "only-trailing-line": (user("Hi"), assistant("Hello.\n")),
    "code": (user("Write it."), assistant("```python\ndef f(x):\n    return {'a': [x]}\n```\n\nDone.")),
    "one-letter": (user("a"), assistant("b")),
    "digits": (user("1+1"), assistant("2")),
    "very-long": (user("word " * 800), assistant("answer " * 800)),
    "long-then-short": (user("x"), assistant("long " * 400), user("y"), assistant("z")),
    "markup-in-text": (user("What is <b>bold</b>?"), assistant("<b>bold</b> & {{ braces }} {% raw %}")),
    "looks-like-roles": (
        user("user: hi\nassistant: hello"),
        assistant("assistant\nuser\nsystem\n### Response:"),
    ),
    "ends-with-user": (user("Hi"), assistant("Hello."), user("Anyone there?")),
    "new-lines": (user("a\n\n\nb"), assistant("1\n\n2\n\n\n3"), user("c"), assistant("4\n5")),
    "empty-user": (user(""), assistant("Say something.")),
    "punctuation": (user("?!"), assistant("...!?"), user("—"), assistant("«»")),
    "thinking-last": (user("17*3?"), assistant("51", "17*3 is 51.")),
    "thinking-in-text": (user("17*3?"), assistant("<think>\n17*3 is 51.\n</think>\n\n51")),
    "thinking-each-turn": (
        user("1?"),
        assistant("one", "It is one."),
        user("2?"),
        assistant("two", "It is two."),
    ),
    "tool": (user("Rain in Oslo?"), call("Oslo"), tool("rain"), assistant("Yes, it rains.")),
    "tool-with-words": (user("Oslo?"), call("Oslo", "Let me look."), tool("rain"), assistant("It rains.")),
    "two-tools": (
        user("Oslo and Rome?"),
        call("Oslo"),
        tool("rain"),
        call("Rome"),
        tool("sun"),
        assistant("Rain and sun."),
        user("Thanks"),
        assistant("Welcome."),
    ),
}


def conversation(shape: str) -> Conversation:
    messages = SHAPES[shape]
    return Conversation(messages, (TOOL,) if any(m.role == "tool" for m in messages) else ())
