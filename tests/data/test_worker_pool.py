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

from qlora_tui.data import worker_pool
from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.inspection import inspect
from qlora_tui.data.read import raw_rows
from qlora_tui.data.row_result import Batch, RowProcessor, batches
from qlora_tui.data.sources import open_source
from qlora_tui.data.template_guard import HANG_SIGNAL
from qlora_tui.data.worker_pool import WorkerPool, open_worker_pool
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Data, Recipe, Source
from tests.data.families import family
from tests.support.polling import wait_for

pytestmark = pytest.mark.slow

ROWS = 1200


def written(tmp_path: Path) -> Path:
    """Rows of all kinds: normal, with a system prompt, weighted, long, empty, duplicate, blank, broken."""
    path = tmp_path / "rows.jsonl"
    lines = []
    for n in range(ROWS):
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": f"question {n % 700}? sk-"},
            {"role": "assistant", "content": f"the answer é {n % 700} " * (1 + n % 40)},
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
def by_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process even the smallest file in two children, from its first row on."""
    monkeypatch.setattr(worker_pool, "MIN_PARALLEL_BYTES", 0)
    monkeypatch.setattr(worker_pool, "cores", lambda: 2)
    introduced = WorkerPool.work

    def work(self: WorkerPool, given: Any) -> Any:
        wait_for(lambda: self.ready)
        return introduced(self, given)

    monkeypatch.setattr(WorkerPool, "work", work)


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


@pytest.mark.usefixtures("by_two")
def test_what_a_dead_child_had_is_done_here(tmp_path: Path) -> None:
    path = written(tmp_path)
    outcomes = RowProcessor(Data(), family("chatml"))
    expected = [outcomes.process(batch) for batch in in_batches(path)]
    pool = WorkerPool(outcomes, 2)
    try:
        results = []
        for number, one in enumerate(pool.work(in_batches(path))):
            if number == 0:
                pool.children[0].kill()
            elif number == 3:
                pool.children[1].kill()
            results.append(one)
    finally:
        pool.close()
    assert results == expected


@pytest.mark.usefixtures("by_two")
def test_a_dead_child_is_given_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    sent = []
    ask = worker_pool._request

    def noted(child: Any, what: bytes) -> bytes:
        sent.append(child)
        return ask(child, what)

    pool = WorkerPool(RowProcessor(Data(), family("chatml")), 2)
    try:
        wait_for(lambda: pool._alive == 2)
        monkeypatch.setattr(worker_pool, "_request", noted)
        pool.children[0].kill()
        list(pool.work(in_batches(path)))
    finally:
        pool.close()
    assert sent.count(pool.children[0]) <= 1
    assert pool.children[1] in sent


def test_long_rows_are_few_in_a_batch_whatever_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"messages": [{"role": "user", "content": "x" * 300_000}]}] * 12))
    assert max(len(batch.rows) for batch in in_batches(path)) == 4


def test_children_that_never_start_are_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "MIN_PARALLEL_BYTES", 0)
    monkeypatch.setattr(worker_pool, "cores", lambda: 2)
    monkeypatch.setattr(worker_pool, "MODULE", "qlora_tui.no_such_module")
    outcomes = RowProcessor(Data(), family("chatml"))
    path = written(tmp_path)
    with open_worker_pool(outcomes, 1) as work:
        assert list(work(in_batches(path))) == [outcomes.process(batch) for batch in in_batches(path)]


@pytest.mark.usefixtures("by_two")
def test_no_child_is_left_when_the_reading_ends_early(tmp_path: Path) -> None:
    path = written(tmp_path)
    before = set(psutil.Process().children(recursive=True))
    with open_worker_pool(RowProcessor(Data(), family("chatml")), 1) as work:
        next(work(in_batches(path)))
        assert len(set(psutil.Process().children(recursive=True)) - before) == 2
    assert set(psutil.Process().children(recursive=True)) <= before


def test_children_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = (
        "from qlora_tui.data.row_result import RowProcessor\n"
        "from qlora_tui.data.worker_pool import WorkerPool\n"
        "from qlora_tui.recipe.schema import Data\n"
        "made = WorkerPool(RowProcessor(Data(), None), 2)\n"
        "print(*(child.pid for child in made.children), flush=True)\n"
        "input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not any(map(psutil.pid_exists, pids)))


def test_a_child_loads_nothing_heavy() -> None:
    script = (
        "import sys, qlora_tui.data.worker, qlora_tui.data.row_result\n"
        "print(*({'torch', 'transformers', 'numpy', 'textual', 'pyarrow'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_small_data_starts_no_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "WorkerPool", None)
    prepare_dataset(recipe(written(tmp_path)), family("chatml"))


@pytest.mark.usefixtures("by_two")
def test_children_live_through_their_work(tmp_path: Path) -> None:
    path = written(tmp_path)
    pool = WorkerPool(RowProcessor(Data(), family("chatml")), 2)
    try:
        wait_for(lambda: pool._alive == 2)
        list(pool.work(in_batches(path)))
        assert pool._alive == 2
    finally:
        pool.close()


@pytest.mark.usefixtures("by_two")
def test_a_template_that_hangs_a_child_is_named(tmp_path: Path) -> None:
    path = written(tmp_path)
    pool = WorkerPool(RowProcessor(Data(), family("chatml")), 2)
    try:
        wait_for(lambda: pool._alive == 2)
        with pytest.raises(UserError, match="The chat template hangs"):
            for _ in pool.work(in_batches(path)):
                for child in pool.children:
                    child.send_signal(HANG_SIGNAL)
    finally:
        pool.close()
