"""What the log of a run says of its data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_tui.recipe.schema import Data, Recipe, Source
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
