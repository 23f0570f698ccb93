"""From training to files that llama.cpp answers from: F16, Q8_0 and Q4_K_M of a run.

The model is random, with what is special about SmolLM2-135M, at half its width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from qlora_tui.catalog.gguf_file_types import LADDER
from qlora_tui.cli.main import main
from qlora_tui.runs.directory import RunDir, all_runs
from tests.export.export_sources import make_source

pytest.importorskip("llama_cpp_py_sync")
pytestmark = pytest.mark.slow

SMOLLM2: dict[str, Any] = {
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
BOUNDS = {"F16": 0.001, "Q8_0": 0.002, "Q4_K_M": 0.02}
"""Largest mean KL divergence of each type, in nats."""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that has learned its few rows, on 4-bit weights, of a model like SmolLM2-135M.

    Nine heads on three key heads, one matrix as embedding and head, and rows that are not of whole K blocks.
    """
    from qlora_tui.recipe.toml import dump

    source = make_source(tmp_path, quantization="nf4", initializer_range=0.03, **SMOLLM2)
    training = replace(source.recipe.training, max_steps=30, learning_rate=1e-2, micro_batch_size=4)
    recipe = replace(source.recipe, training=training)
    (tmp_path / "recipe.toml").write_text(dump(recipe))
    code = main(["train", str(tmp_path / "recipe.toml"), "--json"])
    run = all_runs()[0]
    assert code == 0, run.log_path.read_text()
    return run


@pytest.mark.usefixtures("quick_trainers")
def test_a_trained_run_is_exported_in_every_form(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    out = tmp_path / "out"
    arguments = ["export", "gguf", run.id, str(out), "--quant", ",".join(BOUNDS), "--json"]
    assert main(arguments) == 0, capsys.readouterr().err
    written = json.loads(capsys.readouterr().out)
    assert written["base"]["chosen"] == "dequantized" and not written["unchecked_because"]
    for file in written["files"]:
        proof = file["proof"]
        assert proof["divergence"] < BOUNDS[file["file_type"]] < proof["effect"]
        assert proof["rows"] and not proof["different_rows"] and not proof["problem"]
        if file["file_type"] != "Q4_K_M":
            assert proof["top1_matches"] > 0.9 * proof["positions"]

    # The smallest type within a bound is kept, and nothing else.
    capsys.readouterr()
    best = tmp_path / "best.gguf"
    arguments = ["export", "gguf", run.id, str(best), "--quant", "auto", "--within", "0.03", "--json"]
    assert main(arguments) == 0
    output = capsys.readouterr()
    (file,) = json.loads(output.out)["files"]
    tried = [kind for kind in LADDER if f"Trying {kind}" in output.err]
    assert file["file_type"] == tried[-1] and tried == list(LADDER[: len(tried)])
    assert file["proof"]["divergence"] <= 0.03 and file["path"] == str(best)
    assert {path.name for path in tmp_path.glob("*.gguf")} == {"best.gguf"}
