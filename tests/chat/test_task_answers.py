"""Prompts and references of validation rows, and the answers of base and adapter to them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qlora_tui.chat.chat_types import GREEDY, ChatSource
from qlora_tui.chat.task_answers import BATCH_ROWS, AnswerStore, answer_all, answer_prompts
from qlora_tui.cli import main
from qlora_tui.data.conversation import Message, ToolCall
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Data, Source
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.task_metrics.decisions import read_decider
from qlora_tui.runs.task_metrics.task_evaluation import read_task_evaluation
from qlora_tui.training.task_prompts import TaskPrompt, TaskRows, answer_limit, last_answer, task_prompts
from tests.data.families import tokenizer_json

pytestmark = pytest.mark.slow

END = frozenset({9})


@pytest.mark.parametrize(
    ("ids", "mask", "bounds"),
    [
        ((1, 2, 3, 9, 4), (0, 0, 1, 1, 0), (2, 4)),
        ((1, 2, 9, 3, 4, 9), (0, 1, 1, 0, 1, 1), (4, 6)),
        ((1, 2, 3, 9, 7), (0, 0, 1, 1, 1), (2, 4)),  # a line end after the turn end is in the loss
        ((1, 2, 3, 4), (0, 0, 1, 1), None),  # cut before its end
        ((1, 2, 9), (1, 1, 1), None),  # no prompt
        ((1, 2, 9), (0, 0, 1), None),  # an empty answer
        ((1, 2, 9), (0, 0, 0), None),
    ],
)
def test_the_last_answer_is_the_reference(
    ids: tuple[int, ...], mask: tuple[int, ...], bounds: tuple[int, int] | None
) -> None:
    assert last_answer(ids, mask, END) == bounds


class FakeSamples:
    """One sample for each row number, of a prompt of one token and an answer of that number."""

    def __init__(self, *rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def origin(self, i: int) -> tuple[int, int]:
        return 0, self._rows[i]

    def file_name(self, i: int) -> str:
        return ""

    def token_ids(self, i: int) -> tuple[int, ...]:
        return (1, 100 + i, 9)

    def loss_mask(self, i: int) -> tuple[int, ...]:
        return (0, 1, 1)


def test_a_row_of_several_turns_has_one_prompt() -> None:
    samples: Any = FakeSamples(1, 2, 2, 3, 4)
    prompts = task_prompts(samples, END, 9)
    assert [(prompt.row, prompt.reference[0]) for prompt in prompts] == [
        (1, 100),
        (2, 102),
        (3, 103),
        (4, 104),
    ]
    assert [prompt.row for prompt in task_prompts(samples, END, 2)] == [1, 3]


def test_stored_answers_are_not_computed_again(tmp_path: Path) -> None:
    prompts = [(number,) * (1 + number % 5) for number in range(40)]
    file, batches, done = tmp_path / "answers.jsonl", list[int](), list[int]()

    def answer(batch: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        batches.append(len(batch))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return [(prompt[0], 9) for prompt in batch]

    with pytest.raises(KeyboardInterrupt):
        answer_all(prompts, AnswerStore(file, int), 32, answer, done.append)
    with file.open("ab") as torn:
        torn.write(b'{"prompt": "cut')
    answers = answer_all(prompts, AnswerStore(file, int), 32, answer, done.append)
    assert answers == [(prompt[0], 9) for prompt in prompts]
    assert batches == [BATCH_ROWS, BATCH_ROWS, BATCH_ROWS, 40 - 2 * BATCH_ROWS]
    assert done == [0, 16, 16, 32, 40]
    assert (
        answer_all(prompts, AnswerStore(file, int), 32, answer, done.append) == answers and len(batches) == 4
    )


def test_long_prompts_are_answered_in_small_batches(tmp_path: Path) -> None:
    prompts = [(number,) * 2000 for number in range(5)] + [(7,)]
    sizes: list[int] = []

    def answer(batch: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        sizes.append(len(batch))
        return [(9,) for _ in batch]

    answer_all(prompts, AnswerStore(tmp_path / "answers.jsonl", int), 512, answer, lambda done: None)
    assert sizes == [3, 3]


def test_an_answer_may_be_longer_than_the_references() -> None:
    assert [answer_limit(longest, 2048) for longest in (2, 22, 60, 5000)] == [32, 64, 96, 512]
    assert answer_limit(5000, 256) == 128


def test_batched_answers_are_those_of_the_chat(
    tiny_source: ChatSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from qlora_tui.chat import session as session_module
    from qlora_tui.chat.loading import load_session

    session = load_session(tiny_source)
    session.ensure_loaded("adapter")
    questions = ["what", "what is the colour of the fox", "who sat in an oak and said little"]
    prompts = [session.prompt((Message("user", question),)) for question in questions]
    sampling = msgspec.structs.replace(GREEDY, max_new_tokens=8)
    for name in ("base", "adapter"):
        together = session.greedy_batch(name, prompts, 8)
        for question, ids in zip(questions, together, strict=True):
            stream = session.ask((Message("user", question),), adapter_name=name, sampling=sampling)
            list(stream)
            assert stream.outcome is not None
            assert session.decode(ids).strip() == stream.outcome.text.strip()

    def run_out(*args: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(session_module, "answer_greedily", run_out)
    with pytest.raises(UserError, match=r"[Mm]emory"):
        session.greedy_batch("adapter", prompts, 8)


@pytest.mark.usefixtures("quick_trainers")
def test_evaluate_compares_a_run_with_its_base(
    tiny_source: ChatSource,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [
        {"instruction": f"what is fox {number}", "output": "red" if number % 2 else "blue"}
        for number in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "rows.jsonl")
    data = Data(sources=(Source(path=path),), validation_path=path)
    run = create_run(msgspec.structs.replace(tiny_source.recipe, data=data))
    shutil.copytree(tiny_source.adapters["adapter"], run.adapter_dir)
    assert main(["evaluate", run.id, "--json"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [metric["name"] for metric in printed["metrics"]] == ["accuracy"]
    assert sorted(printed["decisions"]["options"]) == ["blue", "red"]
    assert read_decider(run.adapter_dir) is not None
    evaluation = read_task_evaluation(run)
    assert evaluation is not None and len(evaluation.rows) == evaluation.validation_rows == 8
    assert {row.reference for row in evaluation.rows} == {"red", "blue"}
    assert {row.base for row in evaluation.rows} | {row.adapter for row in evaluation.rows} <= {"red", "blue"}
    assert evaluation.loss.rows == 8 and evaluation.loss.before != evaluation.loss.after
    assert main(["evaluate", run.id, "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "8 validation prompts" in out and "row 1" in out and "each with a choice between 2 options" in out
    assert "too few to calibrate" in out
    # An evaluation that was killed goes on with the scores that it has.
    with monkeypatch.context() as patched:
        patched.setattr("qlora_tui.chat.session.ChatSession.score_options", None)
        answer_prompts(run, None)
    again = read_task_evaluation(run)
    assert again is not None and again.decisions == evaluation.decisions


def test_a_run_without_prompts_is_refused(tiny_source: ChatSource, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "the fox is red"}\n' * 4)
    data = Data(sources=(Source(path=str(file)),), validation_path=str(file))
    run = create_run(msgspec.structs.replace(tiny_source.recipe, data=data))
    shutil.copytree(tiny_source.adapters["adapter"], run.adapter_dir)
    with pytest.raises(UserError, match="No prompts to answer"):
        answer_prompts(run, 4)


def test_calls_are_read_as_the_template_writes_them(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(tokenizer_json(), {"eos_token": "</s>"}, "")
    call = {"name": "weather", "arguments": {"city": "Oslo"}}
    turns = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "tool_calls": [{"function": call}]}]
    row = {"messages": turns, "tools": [{"type": "function", "function": {"name": "weather"}}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    rows = TaskRows(Data(sources=(Source(path=str(tmp_path / "rows.jsonl")),)), tokenizer)

    def ids(text: str) -> tuple[int, ...]:
        return (*tokenizer.encode(text), tokenizer.turn_end_ids[0])

    written = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
    prompt = TaskPrompt(0, 1, "", ids("Rain?"), ids(written), 0)
    of_calls = rows.row(prompt, ids("Rain."), ids(written.replace("Oslo", "Bergen")))
    assert (of_calls.reference_calls, of_calls.base_calls) == ((ToolCall("weather", {"city": "Oslo"}),), ())
    assert of_calls.adapter_calls[0].arguments == {"city": "Bergen"}
    words = rows.row(prompt._replace(reference=ids("No.")), ids("No."), ids(written))
    assert (words.tools, words.reference_raw, words.adapter_calls) == ((), "", ())
