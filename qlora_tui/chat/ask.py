"""The chat of the command line: one answer, a conversation, or base and adapter compared.

Torch is loaded with the first answer, in this process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from msgspec.structs import replace

from qlora_tui.chat.sources import chosen_voice, of_run
from qlora_tui.chat.terms import BASE, GREEDY, ChatSource, Compared, Sampling
from qlora_tui.data.conversation import Message
from qlora_tui.errors import Problem
from qlora_tui.gpu.before_torch import settle_before_torch
from qlora_tui.runs.directory import RunDir

if TYPE_CHECKING:
    from qlora_tui.chat.session import ChatSession

_HELP = "/voice NAME  who answers     /new  begin again     /quit  (or Ctrl-D)     Ctrl-C stops an answer"


def answer(
    run: RunDir,
    prompt: str,
    *,
    base: bool = False,
    checkpoint: int | None = None,
    sampling: Sampling | None = None,
) -> Iterator[str]:
    """One answer, in pieces as they come; notes go to stderr. Raises Problem."""
    source = of_run(run)
    voice = chosen_voice(source, base=base, checkpoint=checkpoint)
    session = _loaded(source, _note)
    yield from session.ask([Message("user", prompt)], voice=voice, sampling=sampling)


def compare(
    source: ChatSource, prompts: Sequence[str], *, max_new_tokens: int = 80, voice: str = ""
) -> list[Compared]:
    """What the base and an adapter (the final one unless told) answer to each prompt, greedily.

    One copy of the base serves both. Raises Problem.
    """
    voice = voice or chosen_voice(source)
    session = _loaded(source, lambda words: None)
    sampling = replace(GREEDY, max_new_tokens=max_new_tokens)

    def say(prompt: str, who: str) -> str:
        return "".join(session.ask([Message("user", prompt)], voice=who, sampling=sampling)).strip()

    return [Compared(prompt, base=say(prompt, BASE), adapter=say(prompt, voice)) for prompt in prompts]


def converse(
    run: RunDir,
    *,
    base: bool = False,
    checkpoint: int | None = None,
    sampling: Sampling | None = None,
    ask_user: Callable[[str], str] = input,
) -> None:
    """Talk on stdin and stdout until end of file; notes go to stderr. Raises Problem."""
    source = of_run(run)
    voice = chosen_voice(source, base=base, checkpoint=checkpoint)
    # Line editing for input(), where Python has it.
    with suppress(ImportError):
        import readline  # noqa: F401
    session = _loaded(source, _note)
    _note(_HELP)
    messages: list[Message] = []
    while True:
        try:
            line = ask_user(f"{voice}> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            continue
        if not line.startswith("/"):
            messages = _turn(session, voice, [*messages, Message("user", line)], sampling)
            continue
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word == "/new":
            messages = []
        elif word == "/voice" and rest in source.voices:
            voice = rest
        elif word == "/voice":
            _note(f"There are: {', '.join(source.voices)}.")
        else:
            _note(_HELP)


def _loaded(source: ChatSource, tell: Callable[[str], None]) -> ChatSession:
    settle_before_torch()
    from qlora_tui.chat.session import load_session

    return load_session(source, tell)


def _turn(
    session: ChatSession, voice: str, messages: list[Message], sampling: Sampling | None
) -> list[Message]:
    """Print the answer as it comes; the conversation with it."""
    said = ""
    try:
        reply = session.ask(messages, voice=voice, sampling=sampling)
    except Problem as problem:
        # Too long, or refused by the template: what was said before stands.
        _note(str(problem))
        return messages[:-1]
    try:
        for piece in reply:
            said += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        _note("\nStopped.")
    else:
        assert reply.outcome is not None
        print()
        _note(f"{reply.outcome.new_tokens} tokens, {reply.outcome.tokens_per_s:.1f} a second")
    return [*messages, Message("assistant", said)]


def _note(words: str) -> None:
    print(words, file=sys.stderr)
