"""Decisions on every row of a file: whole, in order, once each, whatever happens in between."""

from __future__ import annotations

import csv
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qlora_tui.chat import prediction
from qlora_tui.chat.chat_sources import run_source
from qlora_tui.chat.chat_types import ADAPTER, BASE, ChatSource, Decided
from qlora_tui.chat.decide import decide, decide_one
from qlora_tui.chat.loading import load_session
from qlora_tui.chat.prediction import Prediction, predict
from qlora_tui.chat.task_answers import answer_prompts
from qlora_tui.cli import main
from qlora_tui.data.conversation import Conversation, Message
from qlora_tui.data.row import Row
from qlora_tui.data.row_writers import write_rows
from qlora_tui.errors import EXIT_FAILURE, EXIT_USAGE, UserError
from qlora_tui.files import private_dir
from qlora_tui.recipe.schema import Data, Source
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.task_metrics.decisions import Calibration, read_decider, write_decider
from tests.support.power import Disk

pytestmark = pytest.mark.slow

LABELS = ("red", "blue", "green")
ROWS = 30


def silent(done: int, total: int, text: str = "") -> None:
    """Report nothing."""


@pytest.fixture
def run(tiny_source: ChatSource, tmp_path: Path) -> RunDir:
    """A run whose decisions are measured."""
    path = tmp_path / "train.jsonl"
    rows = [{"text": f"what is fox {number}", "label": LABELS[number % 3]} for number in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(sources=(Source(path=str(path)),), validation_path=str(path))
    run = create_run(msgspec.structs.replace(tiny_source.recipe, data=data))
    shutil.copytree(tiny_source.adapters["adapter"], run.adapter_dir)
    answer_prompts(run, None)
    return run


def a_file(path: Path, rows: int = ROWS) -> Path:
    path.write_text("".join(f'{{"id": {number}, "text": "owl {number}"}}\n' for number in range(rows)))
    return path


def test_a_killed_prediction_goes_on_without_a_lost_or_doubled_row(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "_BATCH_ROWS", 8)
    file = a_file(tmp_path / "new.jsonl")
    whole = Prediction(run=str(run.path), file=str(file), out=str(tmp_path / "whole.jsonl"), threshold=0.5)
    assert predict(whole, silent).resumed == 0
    request = msgspec.structs.replace(whole, out=str(tmp_path / "out.jsonl"))

    def killed(done: int, total: int, text: str = "") -> None:
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(request, killed)
    (log,) = tmp_path.glob(".out.jsonl.*")
    with log.open("ab") as torn:
        torn.write(b'{"label": "re')
    other = msgspec.structs.replace(request, file=str(a_file(tmp_path / "other.jsonl", 3)))
    with pytest.raises(UserError, match="Another prediction is unfinished"):
        predict(other, silent)
    predicted = predict(request, silent)
    assert (predicted.rows, predicted.resumed) == (ROWS, 16)
    assert predicted.decided + predicted.abstained == ROWS and not predicted.undecided
    assert Path(request.out).read_text() == Path(whole.out).read_text()
    rows = [json.loads(line) for line in Path(request.out).read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(ROWS))
    assert {row["predicted_label"] for row in rows} <= set(LABELS)
    assert all(row["predicted_abstain"] == (row["predicted_probability"] < 0.5) for row in rows)
    assert not list(tmp_path.glob(".out.jsonl.*"))
    with pytest.raises(UserError, match="The output already exists"):
        predict(request, silent)


def test_only_decisions_on_other_data_are_kept_from_another_prediction(tmp_path: Path) -> None:
    log = tmp_path / ".out.csv.decisions"
    log.touch()
    for fingerprint in ("first", "second"):
        assert prediction._resume(log, fingerprint, replaces=False) == 0
    with log.open("a") as lines:
        lines.write('{"label": "red"}\n')
    assert prediction._resume(log, "second", replaces=False) == 1
    with pytest.raises(UserError, match="with other options"):
        prediction._resume(log, "third", replaces=False)
    log.write_text("somebody's file\n")
    with pytest.raises(UserError, match="Another prediction is unfinished"):
        prediction._resume(log, "second", replaces=False)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_after_a_cut_at_any_moment_the_same_command_ends_with_the_same_output(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Until it returns the output is whole or missing; then it is on the disk."""
    monkeypatch.setattr(prediction, "_BATCH_ROWS", 2)
    session = load_session(run_source(run))
    monkeypatch.setattr(prediction, "_session", lambda request: session)
    out = private_dir(tmp_path / "out") / f"out{suffix}"
    request = Prediction(run=str(run.path), file=str(a_file(tmp_path / "new.jsonl", 5)), out=str(out))
    disk = Disk(out.parent)
    with monkeypatch.context() as watched:
        disk.watch(watched)
        predict(request, silent)
    last, resumed = {}, set()
    for _, mode in disk.cuts(tmp_path / "after"):
        after = tmp_path / "after" / out.name
        last[mode] = after.read_bytes() if after.exists() else None
        assert last[mode] in (None, out.read_bytes())
        if last[mode] is None:
            private_dir(after.parent)
            predicted = predict(msgspec.structs.replace(request, out=str(after)), silent)
            resumed.add(predicted.resumed)
            assert after.read_bytes() == out.read_bytes()
    assert set(last.values()) == {out.read_bytes()}
    assert {0, 5} <= resumed
    disk.close()


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_memory_does_not_grow_with_the_file(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    def answered(session: object, decider: object, layout: object, batch: list[Row], request: object) -> Any:
        return [prediction._Line(label="red", probability=0.5) for _ in batch]

    monkeypatch.setattr(prediction, "_session", lambda request: object())
    monkeypatch.setattr(prediction, "_decided", answered)

    def peak_bytes(rows: int) -> int:
        file, out = tmp_path / f"{rows}{suffix}", tmp_path / f"{rows}.out{suffix}"
        write_rows(file, suffix, lambda: ({"id": str(n), "text": f"{n} owls" * 1000} for n in range(rows)))
        tracemalloc.start()
        assert predict(Prediction(run=str(run.path), file=str(file), out=str(out)), silent).rows == rows
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    few = peak_bytes(500)
    # All rows are 23 MB; reading decision.json takes 17.
    assert peak_bytes(2600) < few + 1_000_000


@pytest.mark.usefixtures("quick_trainers")
def test_the_command_writes_what_its_output_is_named(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mails.csv"
    file.write_text(f"body,when\nowl 1,1\n,2\n{'owl ' * 3000},3\n")
    command = ["predict", str(file), "--run", run.id, "--column", "text=body", "--probabilities"]
    table = tmp_path / "out.parquet"
    assert main([*command, "-o", str(table), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["undecided"] == 2
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(table).to_pylist()
    assert [row["when"] for row in rows] == ["1", "2", "3"]
    assert rows[1]["predicted_label"] is None and "empty" in rows[1]["predicted_problem"]
    assert rows[2]["predicted_label"] is None and "too long" in rows[2]["predicted_problem"]
    assert json.loads(rows[0]["predicted_probabilities"]).keys() == set(LABELS)
    assert main([*command, "-o", str(tmp_path / "out.csv")]) == 0
    assert "2 rows could not be predicted" in capsys.readouterr().out
    with (tmp_path / "out.csv").open(newline="") as lines:
        cells = list(csv.DictReader(lines))
    assert float(cells[0]["predicted_probability"]) == pytest.approx(rows[0]["predicted_probability"])
    for wrong in (
        [*command[:4], "-o", str(tmp_path / "x.csv")],  # no column text
        [*command, "-o", str(tmp_path / "x.txt")],
        [*command, "-o", str(file), "--replace"],
        [*command, "-o", str(table)],
    ):
        assert main(wrong) == EXIT_USAGE
    assert "mails.csv" in capsys.readouterr().err and file.read_text().startswith("body")
    assert main(["predict", str(tmp_path / "gone.csv"), *command[2:], "-o", str(table)]) == EXIT_FAILURE
    assert "Cannot read the data" in capsys.readouterr().err


def test_only_the_adapter_that_was_measured_is_calibrated(run: RunDir) -> None:
    decider = read_decider(run.adapter_dir)
    assert decider is not None and decider.calibration.rows == ROWS
    cold: Any = msgspec.structs.replace(decider, calibration=Calibration(temperature=0.05, rows=ROWS))
    write_decider(run.adapter_dir, cold)
    session = load_session(run_source(run))
    asked = (Message("user", "what is fox 1"),)
    (warm,) = decide(session, decider, ADAPTER, [Conversation(asked)])
    sharp, base = (decide_one(session, name, asked) for name in (ADAPTER, BASE))
    assert isinstance(warm, Decided)
    assert sharp.best.option == warm.best.option and sharp.best.probability > warm.best.probability
    assert sharp.is_calibrated and not base.is_calibrated
    assert sum(option.probability for option in base.options) == pytest.approx(1)
    with pytest.raises(UserError, match="more than 4,096 tokens"):
        decide_one(session, ADAPTER, (Message("user", "red blue " * 300_000),))
