"""Conversations kept as JSON beside the transcripts, so that one can be opened again and continued."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from qlora_tui.decoding import decode_json
from qlora_tui.files import atomic_write, private_dir, read_regular
from qlora_tui.runs.directory import RunDir
from qlora_tui.tui import clock
from qlora_tui.tui.screens.chat.chat_turn import ChatTurn
from qlora_tui.tui.screens.chat.transcript import transcript_path

_MAX_LISTED = 50
_MAX_BYTES = 1 << 24


class SavedAnswer(Struct, frozen=True, omit_defaults=True):
    """What one adapter answered."""

    text: str
    thought: str = ""


class SavedTurn(Struct, frozen=True):
    """A prompt, and the answers by adapter."""

    prompt: str
    answers: dict[str, SavedAnswer]


class SavedConversation(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The content of a file."""

    at: float
    """Unix time of the last answer."""
    turns: tuple[SavedTurn, ...]
    system_prompt: str = ""


_CONVERSATIONS = msgspec.json.Decoder(SavedConversation)


def new_conversation_path(run: RunDir | None) -> Path:
    """Return a path that does not exist yet, in the folder of the run's transcripts."""
    folder = transcript_path(run).parent
    stem = time.strftime("%Y%m%d-%H%M%S", time.localtime(clock.now()))
    path, number = folder / f"{stem}.json", 2
    while path.exists():
        path = folder / f"{stem}-{number}.json"
        number += 1
    return path


def save_conversation(path: Path, turns: Sequence[ChatTurn], system_prompt: str) -> None:
    """Write the turns that have an answer. Raises OSError."""
    saved = [SavedTurn(turn.prompt, _answers(turn)) for turn in turns]
    conversation = SavedConversation(
        at=clock.now(),
        turns=tuple(turn for turn in saved if turn.answers),
        system_prompt=system_prompt,
    )
    private_dir(path.parent)
    atomic_write(path, msgspec.json.encode(conversation))


def _answers(turn: ChatTurn) -> dict[str, SavedAnswer]:
    return {
        name: SavedAnswer(answer.text, answer.thought)
        for name, answer in turn.answers.items()
        if answer.text or answer.thought
    }


def list_conversations(run: RunDir | None) -> list[tuple[Path, SavedConversation]]:
    """Return the conversations with a run, the newest first; unreadable ones are left out."""
    try:
        paths = sorted(transcript_path(run).parent.glob("*.json"), reverse=True)[:_MAX_LISTED]
    except OSError:
        return []
    listed = [(path, saved) for path in paths if (saved := _read(path)) is not None]
    return sorted(listed, key=lambda each: -each[1].at)


def _read(path: Path) -> SavedConversation | None:
    try:
        saved = decode_json(read_regular(path, _MAX_BYTES), _CONVERSATIONS)
    except (OSError, msgspec.MsgspecError):
        return None
    return saved if saved.turns else None
