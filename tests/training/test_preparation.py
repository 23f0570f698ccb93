"""What the log of a run says of its data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_tui.recipe.schema import Data, Recipe, Source, Training
from qlora_tui.runs.directory import RunDir
from tests.data.families import family

pytestmark = pytest.mark.slow


@pytest.mark.slow
def test_files_that_are_not_read_are_in_the_log(tmp_path: Path) -> None:
    from qlora_tui.training.preparation import _tokenize

    for name in ("rows.jsonl", "dev_blog.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    lines: list[str] = []
    ignore = lambda *_: None  # noqa: E731
    reporter = SimpleNamespace(phase=ignore, progress=ignore, log=lines.append)
    recipe = Recipe(data=Data(sources=(Source(path=str(tmp_path)),)))
    context: Any = SimpleNamespace(recipe=recipe, reporter=reporter, checkpoint=None)
    assert _tokenize(context, family("chatml")).counts.rows == 4
    assert [line for line in lines if "dev_blog.jsonl" in line]


def test_every_process_takes_what_the_first_chose_from_the_least_memory() -> None:
    from qlora_tui.training import preparation
    from qlora_tui.training.prepared_run import AttemptContext

    asked: list[tuple[int, int]] = []
    first = Recipe(training=Training(micro_batch_size=4, gradient_accumulation=2, optimizer="adamw"))

    def choose(recipe: Recipe, longest: int, free_bytes: int, **settings: Any) -> Recipe:
        asked.append((free_bytes, settings["processes"]))
        return recipe

    meter: Any = SimpleNamespace(free_bytes=lambda: 24, choose_step=choose, set_recipe=lambda recipe: None)
    dist = SimpleNamespace(all_gather=lambda value: [value, 12], broadcast=lambda value: first, world_size=2)
    ignore = lambda event: None  # noqa: E731
    context: Any = AttemptContext(
        run=RunDir(Path()),
        recipe=Recipe(),
        checkpoint=None,
        reporter=SimpleNamespace(emit=ignore),  # type: ignore[arg-type]
        requests=SimpleNamespace(),  # type: ignore[arg-type]
        dist=dist,  # type: ignore[arg-type]
    )
    data: Any = SimpleNamespace(train=SimpleNamespace(lengths=lambda: [5, 9]))
    assert preparation._choose_step(context, data, meter).recipe.training == first.training
    assert asked == [(12, 2)]
