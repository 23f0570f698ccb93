from __future__ import annotations

import csv
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import Evaluated, Step
from qlora_tui.runs.metrics_table import metrics_csv, metrics_parquet
from qlora_tui.runs.view import RunView
from qlora_tui.tui.render.loss import loss_svg
from screenshots.recorded_runs import recorded_run
from tests.cli.conftest import Call
from tests.tui.fake_runs import FakeRun, write_fake_run

SVG = "{http://www.w3.org/2000/svg}"


def run_with(folder: Path, losses: list[float]) -> RunView:
    run = RunDir(folder)
    with EventWriter(run.events_path) as log:
        log.append(Evaluated(at=1, step=0, loss=3.0))
        for number, loss in enumerate(losses, 1):
            log.append(
                Step(
                    at=1.0 + number,
                    step=number,
                    epoch=number / 10,
                    loss=None if math.isnan(loss) else loss,
                    learning_rate=1e-3,
                    grad_norm=1.5,
                    tokens=100 * number,
                    tokens_per_s=50.0,
                )
            )
        log.append(Evaluated(at=9, step=len(losses), loss=1.25, best=True))
    view = RunView(run)
    view.refresh()
    return view


def test_the_table_has_each_step_and_evaluation(tmp_path: Path) -> None:
    rows = list(csv.DictReader(metrics_csv(run_with(tmp_path, [2.0, math.nan, 1.5])).splitlines()))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["loss"] for row in rows] == ["", "2", "nan", "1.5"]
    assert [row["validation_loss"] for row in rows] == ["3", "", "", "1.25"]
    assert rows[1]["learning_rate"] == "0.001" and rows[3]["tokens"] == "300"


@pytest.mark.slow
def test_the_parquet_table_has_the_values_of_the_csv(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    view = run_with(tmp_path, [2.0, math.nan, 1.5])
    table = pyarrow.parquet.read_table(pyarrow.BufferReader(metrics_parquet(view)))
    rows = list(csv.DictReader(metrics_csv(view).splitlines()))
    assert len(rows) == table.num_rows == 4
    for row, values in zip(rows, table.to_pylist(), strict=True):
        assert {k: "" if v is None else f"{v:.8g}" for k, v in values.items()} == row
    assert table.schema.field("step").type == pyarrow.int64()


def test_the_picture_breaks_its_line_at_nan(tmp_path: Path) -> None:
    root = ET.fromstring(loss_svg(run_with(tmp_path, [2.0, 1.9, math.nan, 1.6, 1.5])))
    gray, mean = (
        [line for line in root.iter(f"{SVG}polyline") if line.get("stroke-width") == width]
        for width in ("1.0", "2.5")
    )
    assert len(gray) == 2 and len(mean) == 1
    heights = [float(point.split(",")[1]) for line in gray for point in line.attrib["points"].split()]
    assert heights == sorted(heights)
    assert len(list(root.iter(f"{SVG}circle"))) == len(list(root.iter(f"{SVG}polygon"))) == 1
    assert "best validation loss 1.250 at step 5" in "".join(root.itertext())


@pytest.mark.parametrize("suffix", ["csv", "svg", "parquet"])
def test_a_file_is_written_once(suffix: str, call: Call, tmp_path: Path) -> None:
    write_fake_run(FakeRun(name="owls <b>", state="finished", steps=60, total=60))
    file = tmp_path / f"owls.{suffix}"
    assert "Saved 60 steps" in call("runs", "save", "owls <b>", str(file)).out
    content = file.read_bytes()
    assert b"<b>" not in content
    assert "exists" in call("runs", "save", "owls <b>", str(file)).err and file.read_bytes() == content


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("loss.gif", "ends neither in .csv or .parquet nor in .svg or .png"),
        ("missing/loss.svg", "cannot be written"),
    ],
)
def test_a_file_that_cannot_be_written_is_explained(
    file: str, words: str, call: Call, tmp_path: Path
) -> None:
    write_fake_run(FakeRun(name="owls", state="finished", steps=60, total=60))
    assert words in call("runs", "save", "owls", str(tmp_path / file)).err


def test_a_run_without_steps_is_not_saved(call: Call, tmp_path: Path) -> None:
    write_fake_run(FakeRun(name="owls", state="queued", steps=0))
    assert "has not recorded any steps" in call("runs", "save", "owls", str(tmp_path / "x.csv")).err


@pytest.mark.parametrize(
    ("file", "words"),
    [("card.gif", "ends neither in .svg nor in .png"), ("missing/card.svg", "cannot be written")],
)
def test_a_card_that_cannot_be_saved_is_explained(file: str, words: str, call: Call, tmp_path: Path) -> None:
    recorded_run()
    assert words in call("runs", "card", "last", str(tmp_path / file)).err


def test_the_command_writes_a_card_once(call: Call, tmp_path: Path) -> None:
    recorded_run()
    file = tmp_path / "card.svg"
    assert "Saved the run card" in call("runs", "card", "last", str(file)).out
    assert "rainy day" in file.read_text()
    assert "exists" in call("runs", "card", "last", str(file)).err
    other = tmp_path / "other.svg"
    call("runs", "card", "last", str(other), "--without-answers")
    assert "rainy day" not in other.read_text()
