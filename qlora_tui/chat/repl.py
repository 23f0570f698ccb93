"""Chat on the command line: one answer, a conversation, or a comparison of base and adapter.

torch is imported in this process, and only when the model is loaded.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from qlora_tui.chat.chat_sources import choose_adapter, run_source
from qlora_tui.chat.chat_types import BASE, AnswerComparison, ChatSource, Sampling
from qlora_tui.data.conversation import Message
from qlora_tui.data.thought_splitter import TextChunk
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_speed, format_wait, pluralize
from qlora_tui.gpu.torch_env import configure_torch_env, faster_imports
from qlora_tui.recipe.schema import Thinking
from qlora_tui.runs.directory import RunDir
from qlora_tui.visible import visible

if TYPE_CHECKING:
    from qlora_tui.chat.decoding import PrefixCache
    from qlora_tui.chat.generation import AnswerStream
    from qlora_tui.chat.session import ChatSession

_HELP = (
    "/adapter NAME  choose who answers     /thinking on|off     /thought  show the last     /new  start over"
    "     /quit  (or Ctrl-D)     Ctrl-C stops an answer"
)


def generate_once(
    run: RunDir,
    prompt: str,
    *,
    base: bool = False,
    checkpoint: int | None = None,
    sampling: Sampling | None = None,
    thinking: Thinking = "auto",
) -> Iterator[TextChunk]:
    """Yield one answer in chunks, including thoughts; notes go to stderr. Raises UserError.

    ``thinking`` is on, off or ``auto``, which uses the setting of the training.
    """
    source = run_source(run)
    adapter_name = choose_adapter(source, base=base, checkpoint=checkpoint)
    session = _load(source, _note)
    _note_effect(session, thinking)
    reply = session.ask(
        [Message("user", prompt)], adapter_name=adapter_name, sampling=sampling, thinking=thinking
    )
    yield from _with_notes(reply)


def compare_answers(
    source: ChatSource,
    conversations: Sequence[Sequence[str]],
    *,
    max_new_tokens: int,
    base_answers: int | None = None,
    on_status: Callable[[str], None] = lambda words: None,
) -> list[AnswerComparison]:
    """Ask base and adapter the questions of each conversation, one after another.

    Each model continues from its own earlier answers, and always selects the most likely token. All
    conversations are answered together, turn by turn: on a CPU, a token for each of 15 conversations takes
    little longer than a token for one.

    Args:
        source: What to load; base and adapter share one copy of the base.
        conversations: Questions by conversation.
        max_new_tokens: Maximum number of tokens in an answer.
        base_answers: Number of conversations, counted from the first, that the base also answers; None for
            all.
        on_status: Called with a description of the current activity.

    Raises:
        UserError: The model cannot be loaded, or an answer fails.
    """
    session = _load(source, on_status)
    asked_of_base = conversations[:base_answers]
    total = sum(map(len, conversations)) + sum(map(len, asked_of_base))
    done = 0

    def ask_all(name: str, asked: Sequence[Sequence[str]]) -> list[list[tuple[str, bool]]]:
        """Return, for each conversation, its answers and whether each answer ended its turn."""
        nonlocal done
        answers: list[list[tuple[str, bool]]] = [[] for _ in asked]
        histories: list[list[Message]] = [[] for _ in asked]
        for turn in range(max(map(len, asked), default=0)):
            active = [number for number, questions in enumerate(asked) if turn < len(questions)]
            for number in active:
                histories[number].append(Message("user", asked[number][turn]))
            replies = session.answer_batch(name, [histories[number] for number in active], max_new_tokens)
            for number, (text, ended) in zip(active, replies, strict=True):
                histories[number].append(Message("assistant", text))
                answers[number].append((text, ended))
            done += len(active)
            on_status(f"  {done} of {total} answers")
        return answers

    of_adapter, of_base = ask_all(choose_adapter(source), conversations), ask_all(BASE, asked_of_base)
    return [
        AnswerComparison(
            prompt=question,
            turn=turn + 1,
            base=of_base[number][turn][0] if number < len(of_base) else None,
            adapter=of_adapter[number][turn][0],
            adapter_ended=of_adapter[number][turn][1],
        )
        for number, questions in enumerate(conversations)
        for turn, question in enumerate(questions)
    ]


def run_repl(
    run: RunDir,
    *,
    base: bool = False,
    checkpoint: int | None = None,
    sampling: Sampling | None = None,
    thinking: Thinking = "auto",
    ask_user: Callable[[str], str] = input,
) -> None:
    """Chat on stdin and stdout until end of file; notes go to stderr. Raises UserError."""
    source = run_source(run)
    adapter_name = choose_adapter(source, base=base, checkpoint=checkpoint)
    # Line editing for input(), if Python has it.
    with suppress(ImportError):
        import readline  # noqa: F401
    session = _load(source, _note)
    _note(_HELP)
    _note_effect(session, thinking)
    messages: list[Message] = []
    while True:
        try:
            # The line editing library does not write the prompt to sys.stdout.
            line = ask_user(f"{visible(adapter_name)}> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            continue
        if not line.startswith("/"):
            messages = _turn(session, adapter_name, [*messages, Message("user", line)], sampling, thinking)
            continue
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word == "/new":
            messages = []
        elif word == "/thinking" and rest in ("on", "off"):
            thinking = "on" if rest == "on" else "off"
            _note_effect(session, thinking)
        elif word == "/thought":
            thoughts = [message.reasoning for message in messages if message.reasoning]
            _note(thoughts[-1] if thoughts else "No thinking yet.")
        elif word == "/adapter" and rest in source.adapter_names:
            adapter_name = rest
        elif word == "/adapter":
            _note(f"Available: {', '.join(source.adapter_names)}.")
        else:
            _note(_HELP)


def _load(source: ChatSource, on_status: Callable[[str], None]) -> ChatSession:
    configure_torch_env()
    with faster_imports():
        from qlora_tui.chat.loading import load_session

    return load_session(source, on_status)


def _note_effect(session: ChatSession, thinking: Thinking) -> None:
    """Print a note if the thinking setting has no effect, or a different effect, with this model."""
    if words := session.thinking.effect_of(thinking):
        _note(words)


def _with_notes(reply: AnswerStream[PrefixCache]) -> Iterator[TextChunk]:
    """Yield the chunks of a reply, and print notes on thinking and its duration to stderr."""
    began, thought = 0.0, None
    for chunk in reply:
        if chunk.thought and thought is None:
            began = time.monotonic()
            _note("Thinking…")
        elif not chunk.thought and thought is not None:
            _note(
                f"Thought for {format_wait(time.monotonic() - began)}, {pluralize(thought.tokens, 'token')}."
            )
            thought = None
        thought = chunk if chunk.thought else thought
        yield chunk
    if reply.outcome is not None and reply.outcome.warning:
        _note(f"\n{reply.outcome.warning}")
    if reply.outcome is not None and reply.outcome.note:
        _note(f"\n{reply.outcome.note}")
    if thought is not None:
        _note(
            f"Still thinking after {pluralize(thought.tokens, 'token')} without an answer. "
            "--thinking off asks the model to answer at once."
        )


def _turn(
    session: ChatSession,
    adapter_name: str,
    messages: list[Message],
    sampling: Sampling | None,
    thinking: Thinking,
) -> list[Message]:
    """Print the answer while it is generated; return the conversation with the answer added.

    If the conversation is rejected, or the answer has nothing but thoughts, the question is removed instead.
    """
    answer = thought = ""
    try:
        reply = session.ask(messages, adapter_name=adapter_name, sampling=sampling, thinking=thinking)
    except UserError as problem:
        # Too long, or rejected by the template: the conversation stays unchanged.
        _note(str(problem))
        return messages[:-1]
    try:
        for chunk in _with_notes(reply):
            if chunk.thought:
                thought += chunk.text
                continue
            answer += chunk.text
            print(chunk.text, end="", flush=True)
    except KeyboardInterrupt:
        _note("\nStopped.")
    else:
        assert reply.outcome is not None
        print()
        _note(f"{reply.outcome.new_tokens:,} tokens, {format_speed(reply.outcome.tokens_per_s)} tok/s")
    if thought and not answer:
        return messages[:-1]
    return [*messages, Message("assistant", answer, reasoning=thought.strip())]


def _note(words: str) -> None:
    print(words, file=sys.stderr)
