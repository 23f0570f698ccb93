"""Files saved from a chat: transcripts as Markdown, and conversations that can be continued. Files of a
chat with a run are usually in the run's folder. Files of a chat with a base model alone are next to the
folder of all runs. :func:`transcript_path` has the details.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec
from msgspec import Struct
from textual.content import Content

from qlora_tui import paths
from qlora_tui.chat.chat_types import Sampling
from qlora_tui.decoding import read_json
from qlora_tui.files import atomic_write, private_dir
from qlora_tui.formatting import format_duration, format_number
from qlora_tui.remote.calls import current
from qlora_tui.runs.directory import RunDir
from qlora_tui.tui import clock
from qlora_tui.tui.screens.chat.turn import ChatTurn

_MAX_LISTED = 50
_MAX_BYTES = 1 << 24
_AGE = 10
"""Width of a conversation's age, in cells."""
_NOW_S = 60.0


class SavedAnswer(Struct, frozen=True, omit_defaults=True):
    """One adapter's answer."""

    text: str
    thought: str = ""


class SavedTurn(Struct, frozen=True):
    """A prompt and its answers by adapter."""

    prompt: str
    answers: dict[str, SavedAnswer]


class SavedConversation(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Contents of a conversation file."""

    at: float
    """Unix time of the last answer."""
    turns: tuple[SavedTurn, ...]
    system_prompt: str = ""


_CONVERSATIONS = msgspec.json.Decoder(SavedConversation)


def transcript_path(run: RunDir | None) -> Path:
    """Return the path of today's transcript.

    The transcript is in the run's folder. For a base model without a run, and for a deleted run, it is in a
    folder that all such chats share. For a run on another machine (``--host``), it is on this machine, next
    to the copies of that machine's runs.
    """
    if run is not None and current() is not None:
        folder = paths.state_dir() / "chats" / run.id
    else:
        home = run.path if run is not None and run.path.exists() else paths.state_dir()
        folder = home / "chats"
    return folder / time.strftime("%Y%m%d.md", time.localtime(clock.now()))


def format_setting(value: float) -> str:
    """Format a setting with all of its digits, so that the user can type it to get the same value. A seed,
    for example, must not be rounded.
    """
    return str(value) if isinstance(value, int) else format_number(value)


def append_exchange(
    run: RunDir | None,
    prompt: str,
    answers: dict[str, str],
    sampling: Sampling,
    system_prompt: str = "",
    thoughts: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Append a prompt, its sampling settings and its answers to today's transcript, and return the path of
    the transcript. Raises OSError.

    ``answers`` and ``thoughts`` are texts by adapter name.
    """
    path = transcript_path(run)
    private_dir(path.parent)
    settings = ", ".join(
        f"{name} {format_setting(getattr(sampling, name))}"
        for name in sampling.__struct_fields__
        if getattr(sampling, name) is not None
    )
    lines = [f"## {time.strftime('%H:%M', time.localtime(clock.now()))}", "", f"*{settings}*", ""]
    if system_prompt:
        lines += ["**system**", "", system_prompt, ""]
    lines += [*(f"> {line}" for line in prompt.splitlines()), ""]
    for adapter_name, text in answers.items():
        lines += [f"**{adapter_name}**", ""]
        if thought := thoughts.get(adapter_name):
            lines += ["<details><summary>Thought</summary>", "", thought, "", "</details>", ""]
        lines += [text or "*no answer*", ""]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return path


def new_conversation_path(run: RunDir | None) -> Path:
    """Return an unused path for a conversation file, in the folder of the run's transcripts."""
    folder = transcript_path(run).parent
    stem = time.strftime("%Y%m%d-%H%M%S", time.localtime(clock.now()))
    path, number = folder / f"{stem}.json", 2
    while path.exists():
        path = folder / f"{stem}-{number}.json"
        number += 1
    return path


def save_conversation(path: Path, turns: Sequence[ChatTurn], system_prompt: str) -> None:
    """Write the turns with at least one answer to a conversation file. Raises OSError."""
    saved = []
    for turn in turns:
        answers = {
            name: SavedAnswer(answer.text, answer.thought)
            for name, answer in turn.answers.items()
            if answer.text or answer.thought
        }
        if answers:
            saved.append(SavedTurn(turn.prompt, answers))
    conversation = SavedConversation(at=clock.now(), turns=tuple(saved), system_prompt=system_prompt)
    private_dir(path.parent)
    atomic_write(path, msgspec.json.encode(conversation))


def list_conversations(run: RunDir | None) -> list[tuple[Path, SavedConversation]]:
    """Return (path, conversation) pairs of the newest saved conversations with a run, newest first.
    Unreadable files are left out. ``run``: None for conversations with a base model alone.
    """
    try:
        paths = sorted(transcript_path(run).parent.glob("*.json"), reverse=True)[:_MAX_LISTED]
    except OSError:
        return []
    listed = [(path, saved) for path in paths if (saved := _read(path)) is not None]
    return sorted(listed, key=lambda each: -each[1].at)


def _read(path: Path) -> SavedConversation | None:
    saved = read_json(path, _CONVERSATIONS, _MAX_BYTES)
    return saved if saved is not None and saved.turns else None


def conversation_line(saved: SavedConversation, now: float, width: int) -> Content:
    """Return a line with a conversation's age, its first prompt, and its number of prompts if it has several:
    ``4 min ago   Where is my parcel? (3)``.
    """
    seconds = now - saved.at
    age = "just now" if seconds < _NOW_S else f"{format_duration(seconds)} ago"
    return prompt_line(age, saved.turns[0].prompt, len(saved.turns), width)


def prompt_line(age: str, prompt: str, turns: int, width: int) -> Content:
    """Return a line with a conversation's age, its first prompt, and its number of prompts if above 1."""
    number = f" ({turns})" if turns > 1 else ""
    room = max(8, width - max(_AGE, len(age)) - 2 - len(number))
    shown = Content(" ".join(prompt.split())).truncate(room, ellipsis=True)
    return Content.assemble((f"{age:<{_AGE}}  ", "dim"), shown, (number, "dim"))
