"""Rows processed by other processes give the same results, and no process is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from qlora_tui.data import chat_template, confined, dataset_scan
from qlora_tui.data.confined import Confined
from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.dataset_scan import open_worker_pool
from qlora_tui.data.inspection import inspect
from qlora_tui.data.read import raw_rows
from qlora_tui.data.row_result import Batch, RowProcessor, batches
from qlora_tui.data.sources import open_source
from qlora_tui.recipe.schema import Data, Recipe, Source
from tests.data.families import CHATML, family, tokenizer_for
from tests.support.polling import wait_for

pytestmark = pytest.mark.slow

ROWS = 500


def written(tmp_path: Path) -> Path:
    """Rows of all kinds: normal, with a system prompt, weighted, long, empty, duplicate, blank, broken."""
    path = tmp_path / "rows.jsonl"
    lines = []
    for n in range(ROWS):
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": f"question {n % 300}? sk-"},
            {"role": "assistant", "content": f"the answer é {n % 300} " * (1 + n % 40)},
        ]
        if n % 5 == 0:
            turns.insert(0, {"role": "system", "content": "Be kind. <|im_end|>"})
        if n % 7 == 0:
            turns[-1]["weight"] = 0.5
        if n % 50 == 3:
            turns[-1]["content"] = ""
        lines.append("" if n % 90 == 1 else json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def by_two(monkeypatch: pytest.MonkeyPatch) -> list[Confined]:
    """Process even the smallest file in two children, from its first row on; returns them."""
    monkeypatch.setattr(dataset_scan, "MIN_PARALLEL_BYTES", 0)
    monkeypatch.setattr(dataset_scan, "MIN_CHILD_BYTES", 0)
    monkeypatch.setattr(dataset_scan, "cores", lambda: 2)
    children: list[Confined] = []

    class Started(Confined):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.start()
            children.append(self)

    monkeypatch.setattr(dataset_scan, "Confined", Started)
    return children


def recipe(path: Path) -> Recipe:
    return Recipe(data=Data(sources=(Source(path=str(path)),), max_length=120, overflow="split"))


def in_batches(path: Path) -> Iterator[Batch]:
    (file,) = open_source(Source(path=str(path)), "refuse")[0]
    return batches(file, raw_rows(path), lambda: True)


def test_the_set_is_the_same_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    path = written(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    here = prepare_dataset(recipe(path), family("chatml"))
    request.getfixturevalue("by_two")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    there = prepare_dataset(recipe(path), family("chatml"))
    assert not there.cached
    assert there.data_hash == here.data_hash
    assert (there.counts, there.problems, there.notes) == (here.counts, here.problems, here.notes)
    names = sorted(file.name for file in here.folder.iterdir())
    assert names == sorted(file.name for file in there.folder.iterdir())
    for name in names:
        assert (here.folder / name).read_bytes() == (there.folder / name).read_bytes()


def test_a_report_is_the_same_with_and_without_a_model(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = Source(path=str(written(tmp_path)))
    here = [inspect(source, tokenizer) for tokenizer in (None, family("strips"))]
    request.getfixturevalue("by_two")
    assert [inspect(source, tokenizer) for tokenizer in (None, family("strips"))] == here


def test_what_a_dead_child_had_is_done_here(tmp_path: Path, by_two: list[Confined]) -> None:
    path = written(tmp_path)
    outcomes = RowProcessor(Data(), family("chatml"))
    expected = [outcomes.process(batch) for batch in in_batches(path)]
    results = []
    with open_worker_pool(outcomes, 1) as work:
        for number, one in enumerate(work(in_batches(path))):
            for child in by_two[: number + 1]:
                if child.pid is not None:
                    os.kill(child.pid, signal.SIGKILL)
            results.append(one)
    assert results == expected


def test_long_rows_are_few_in_a_batch_whatever_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"messages": [{"role": "user", "content": "x" * 300_000}]}] * 12))
    assert max(len(batch.rows) for batch in in_batches(path)) == 4


def test_children_that_never_start_are_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_scan, "MIN_PARALLEL_BYTES", 0)
    monkeypatch.setattr(dataset_scan, "MIN_CHILD_BYTES", 0)
    monkeypatch.setattr(dataset_scan, "cores", lambda: 2)
    monkeypatch.setattr(dataset_scan, "__name__", "qlora_tui.no_such_module")
    outcomes = RowProcessor(Data(), family("chatml"))
    path = written(tmp_path)
    with open_worker_pool(outcomes, 1) as work:
        assert list(work(in_batches(path))) == [outcomes.process(batch) for batch in in_batches(path)]


def test_no_child_is_left_when_the_reading_ends_early(tmp_path: Path, by_two: list[Confined]) -> None:
    path = written(tmp_path)
    with open_worker_pool(RowProcessor(Data(), family("chatml")), 1) as work:
        next(work(in_batches(path)))
        pids = [child.pid or 0 for child in by_two]
        assert len(pids) == 2 and all(map(psutil.pid_exists, pids))
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.usefixtures("by_two")
def test_a_row_that_kills_a_child_is_named(tmp_path: Path) -> None:
    """The child renders in place and is killed; here the template is rendered in a child of its own."""
    path = written(tmp_path)
    endless = "{{ (messages | length) ** (9 ** 9) }}"
    hanging = f"{{% if messages[1:] and 'é 77 ' in messages[1].content %}}{endless}{{% endif %}}"
    renderer = Confined("qlora_tui.data.chat_template", cpu_s=0.2, memory_bytes=1 << 28)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template, "_renderer", renderer)
        patch.setattr(dataset_scan, "_BATCH_CPU_S", 0.4)
        report = inspect(Source(path=str(path)), tokenizer_for(hanging + CHATML))
    (refused,) = (problem for problem in report.problems if problem.kind == "template-refuses")
    assert refused.rows and "takes more than 0.2 seconds" in refused.example


def test_children_end_with_a_parent_that_is_killed() -> None:
    script = (
        "from qlora_tui.data.confined import Confined\n"
        "child = Confined('qlora_tui.data.row_result', cpu_s=9, memory_bytes=1 << 28)\n"
        "child.start()\n"
        "print(child.pid, flush=True)\n"
        "input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not psutil.pid_exists(pid))


def test_a_child_without_calls_ends_and_is_started_again() -> None:
    child = Confined("qlora_tui.data.row_result", cpu_s=9, memory_bytes=1 << 28, prepare=_end_when_idle)
    first = child.call(os.getpid)
    wait_for(lambda: psutil.Process(first).status() == psutil.STATUS_ZOMBIE)
    assert child.call(os.getpid) != first
    child.close()


def _end_when_idle() -> None:
    confined._IDLE_S = 0.01


def test_a_child_loads_nothing_heavy() -> None:
    script = (
        "import sys, qlora_tui.data.confined, qlora_tui.data.row_result, qlora_tui.data.arrow_rows\n"
        "print(*({'torch', 'transformers', 'numpy', 'textual', 'pyarrow'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_small_data_starts_no_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_scan, "Confined", None)
    small = tmp_path / "small.jsonl"
    small.write_text("".join(written(tmp_path).read_text().splitlines(keepends=True)[:99]))
    prepare_dataset(recipe(small), family("chatml"))
