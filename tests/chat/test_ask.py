"""The command line's chat."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from qlora_tui.chat.chat_types import GREEDY, ChatSource, Sampling
from qlora_tui.cli.main import main
from qlora_tui.data.thought_splitter import TextChunk
from qlora_tui.runs.directory import RunDir, create_run

pytestmark = pytest.mark.slow

SHORT = msgspec.structs.replace(GREEDY, max_new_tokens=8)
PROMPT = "what is the colour of the fox"


@pytest.fixture
def run(tiny_source: ChatSource) -> RunDir:
    """A run on the tiny model that left an adapter and a checkpoint."""
    run = create_run(tiny_source.recipe)
    shutil.copytree(tiny_source.adapters["adapter"], run.adapter_dir)
    checkpoint = run.checkpoints_dir / "step-2"
    shutil.copytree(tiny_source.adapters["step-2"], checkpoint)
    (checkpoint / "complete").touch()
    return run


def text(pieces: Iterator[TextChunk]) -> str:
    """What is answered, without thoughts."""
    return "".join(said.text for said in pieces if not said.thought)


def typed(*lines: str) -> Iterator[str]:
    yield from lines
    raise EOFError


@pytest.mark.parametrize("option", [("--greedy",), ("--seed", "7")])
def test_an_answer_can_be_reproduced(
    option: tuple[str, ...], run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_tui.chat import chat_types
    from qlora_tui.chat.repl import generate_once

    short = partial(Sampling, max_new_tokens=24)
    monkeypatch.setattr(chat_types, "Sampling", short)
    monkeypatch.setattr(chat_types, "GREEDY", short(temperature=0.0))
    ask = ("chat", run.id, "--prompt", PROMPT, "--json")
    assert main([*ask, *option]) == 0
    said = json.loads(capsys.readouterr().out)
    sampling = msgspec.convert(said["sampling"], Sampling)
    assert (sampling.temperature, sampling.seed) == ((0, None) if len(option) == 1 else (0.7, 7))
    assert text(generate_once(run, PROMPT, sampling=sampling)) == said["answer"]


@pytest.mark.parametrize("options", [("--greedy", "--seed", "7"), ("--seed", "-1"), ("--seed", str(2**32))])
def test_what_is_no_seed_is_a_wrong_call(options: tuple[str, ...], run: RunDir) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["chat", run.id, *options])
    assert refused.value.code == 2


def test_base_adapter_and_checkpoint_answer_differently(run: RunDir) -> None:
    from qlora_tui.chat.chat_sources import run_source
    from qlora_tui.chat.repl import compare_answers, generate_once

    adapter = text(generate_once(run, PROMPT, sampling=SHORT))
    base = text(generate_once(run, PROMPT, base=True, sampling=SHORT))
    checkpoint = text(generate_once(run, PROMPT, checkpoint=2, sampling=SHORT))
    assert len({adapter, base, checkpoint}) == 3
    said: list[str] = []
    first, second, alone = compare_answers(
        run_source(run),
        [(PROMPT, PROMPT), (PROMPT,)],
        max_new_tokens=SHORT.max_new_tokens,
        base_answers=1,
        on_status=said.append,
    )
    assert said[-1] == "  5 of 5 answers"
    assert (first.base, first.adapter) == (base.strip(), adapter.strip())
    assert (first.turn, second.turn, alone.turn) == (1, 2, 1)
    assert second.base is not None and alone.base is None and alone.adapter == first.adapter


def test_a_conversation_switches_voices_and_begins_again(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlora_tui.chat.repl import generate_once, run_repl

    lines = typed(PROMPT, "/new", "/adapter base", PROMPT, "/adapter nobody", "/help", "")
    prompts: list[str] = []

    def ask_user(prompt: str) -> str:
        prompts.append(prompt)
        return next(lines)

    run_repl(run, sampling=SHORT, ask_user=ask_user)
    out, notes = capsys.readouterr()
    assert text(generate_once(run, PROMPT, sampling=SHORT)) in out
    assert text(generate_once(run, PROMPT, base=True, sampling=SHORT)) in out
    assert prompts == ["adapter> "] * 3 + ["base> "] * 5
    assert "Available: base, adapter, step-2." in notes
    assert "tokens" in notes


def test_ctrl_c_stops_the_answer_and_not_the_conversation(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlora_tui.chat import repl
    from qlora_tui.chat.decoding import PrefixCache
    from qlora_tui.chat.generation import AnswerStream

    pieces = AnswerStream.__iter__

    def interrupted(reply: AnswerStream[PrefixCache]) -> Iterator[TextChunk]:
        yield next(pieces(reply))
        raise KeyboardInterrupt

    monkeypatch.setattr(AnswerStream, "__iter__", interrupted)
    lines = typed(PROMPT, PROMPT)
    repl.run_repl(run, sampling=SHORT, ask_user=lambda prompt: next(lines))
    assert capsys.readouterr().err.count("Stopped.") == 2


def test_a_too_long_question_does_not_end_the_conversation(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlora_tui.chat.repl import run_repl

    lines = typed("fox " * 4000, PROMPT)
    run_repl(run, base=True, sampling=SHORT, ask_user=lambda prompt: next(lines))
    notes = capsys.readouterr().err
    assert "too long" in notes
    assert "8 tokens" in notes


def test_an_adapters_own_tokenizer_and_template_are_used(run: RunDir, tiny_model: Path) -> None:
    from qlora_tui.chat.chat_sources import run_source
    from qlora_tui.chat.loading import load_session
    from qlora_tui.data.conversation import Message

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, run.adapter_dir)
    (run.adapter_dir / "chat_template.jinja").write_text("ask {{ messages[0]['content'] }} answer")
    session = load_session(run_source(run))
    assert session.tokenizer.decode(session.prompt([Message("user", "fox")])) == "ask fox answer"
