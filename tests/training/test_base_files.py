"""Weight files of a base that are not those of its ``config.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Model, Quantization, Recipe
from qlora_tui.training.compute_device import find_device
from qlora_tui.training.model import load_base
from tests.training.families import build

pytestmark = pytest.mark.slow


OTHER_WORDS = ({"vocab_size": 200}, "is 300 x 64 in the files, but 200 x 64 in config.json")


@pytest.mark.parametrize(
    ("method", "changes", "reason"),
    [
        *((method, *OTHER_WORDS) for method in ("none", "nf4", "int8")),
        ("nf4", {"intermediate_size": 64}, "down_proj.weight is 64 x 96 in the files, but 64 x 64 in"),
        ("nf4", {"num_hidden_layers": 3}, "lacks model.layers.2."),
        ("nf4", {"num_hidden_layers": 1}, "has 2 layers in its files, but 1 in config.json"),
        (
            "none",
            {"quantization_config": {"load_in_4bit": True}},
            "weight is .* in the files, but .* x 1 in config.json",
        ),
    ],
)
def test_a_size_that_the_files_do_not_have_is_refused_by_name(
    tmp_path: Path, method: Literal["none", "nf4", "int8"], changes: dict[str, Any], reason: str
) -> None:
    build("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    quantization = Quantization(method=method, compute_dtype="float32")
    recipe = Recipe(model=Model(id=str(tmp_path)), quantization=quantization)
    with pytest.raises(UserError, match=reason):
        load_base(tmp_path, recipe, find_device(recipe), "segments")
