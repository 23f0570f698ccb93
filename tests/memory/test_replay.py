"""The replay of a run's allocations, beside the walk and beside what was measured."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from bench.published_rows import find_config, read_execution
from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.memory import Device, estimate, replay, trainer_execution
from qlora_tui.memory.layers import build_layout
from qlora_tui.memory.replay import Pool
from qlora_tui.memory.step import profile_step
from qlora_tui.recipe.schema import Data, Lora, Quantization, Recipe, Training
from tests.catalog.configs import CONFIGS, config

TABLE = Path(__file__).parent / "measured.csv"
MODELS = ("Qwen/Qwen2.5-0.5B", "google/gemma-2-2b", "meta-llama/Llama-3.1-8B")


def _rows() -> list[dict[str, str]]:
    with TABLE.open(newline="") as file:
        return [row for row in csv.DictReader(file) if "peak_reserved_MiB" in row["extra"]]


def _replayed(recipe: Recipe, name: str) -> Pool:
    architecture, execution = parse_architecture(config(name)), trainer_execution(recipe, Device())
    layout = build_layout(recipe, architecture, execution)
    return replay.replay(
        recipe, architecture, layout, execution, profile_step(layout, execution, recipe.lora.dropout)
    )


def test_reserved_memory_is_matched_like_allocated_memory() -> None:
    errors = {}
    for row in _rows():
        recipe, execution = read_execution(row)
        estimated = estimate(
            recipe, parse_architecture(find_config(row["model_id"], CONFIGS)), execution=execution
        )
        match = re.search(r"peak_reserved_MiB=(\d+)", row["extra"])
        assert match
        errors[row["id"]] = estimated.reserved_bytes / 2**20 / int(match[1]) - 1
        low, high = estimated.band.low_bytes, estimated.band.high_bytes
        process = re.search(r"process_MiB=([\d.]+)", row["extra"])
        assert process and low < float(process[1]) * 2**20 < high, row["id"]
    assert sum(map(abs, errors.values())) / len(errors) < 0.03, errors
    assert min(errors.values()) > -0.06 and max(errors.values()) < 0.16, errors


def test_an_unquantized_model_matches_the_measured_reserved_bytes() -> None:
    rows = [row for row in _rows() if row["quant"].startswith("none")]
    assert len(rows) >= 5
    for row in rows:
        recipe, execution = read_execution(row)
        estimated = estimate(
            recipe, parse_architecture(find_config(row["model_id"], CONFIGS)), execution=execution
        )
        measured = re.search(r"peak_reserved_MiB=(\d+)", row["extra"])
        assert measured and estimated.reserved_bytes / 2**20 == pytest.approx(int(measured[1]), rel=0.005)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("training", "dropout", "method"),
    [
        (Training(micro_batch_size=2, gradient_accumulation=1, optimizer="adamw"), 0.0, "nf4"),
        (Training(micro_batch_size=1, gradient_accumulation=8), 0.05, "nf4"),
        (Training(gradient_checkpointing="off", gradient_accumulation=1), 0.0, "none"),
    ],
)
def test_the_replays_peak_equals_the_walks(
    name: str, training: Training, dropout: float, method: str
) -> None:
    recipe = Recipe(
        quantization=Quantization(method=method),  # type: ignore[arg-type]  # one of its choices
        lora=Lora(dropout=dropout),
        data=Data(max_length=1024),
        training=training,
    )
    estimated = estimate(recipe, parse_architecture(config(name)))
    assert _replayed(recipe, name).allocated_bytes == pytest.approx(estimated.allocated_bytes, rel=0.01)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("accumulation", [1, 8])
def test_a_trained_embedding_is_replayed_as_it_is_walked(name: str, accumulation: int) -> None:
    recipe = Recipe(lora=Lora(train_embeddings=True), training=Training(gradient_accumulation=accumulation))
    estimated = estimate(recipe, parse_architecture(config(name)))
    assert _replayed(recipe, name).allocated_bytes == pytest.approx(estimated.allocated_bytes, rel=0.01)


@pytest.mark.parametrize("name", [*MODELS, "google/gemma-3-12b-it", "Qwen/Qwen3.5-27B"])
@pytest.mark.parametrize("rows", [1, 4])
def test_layers_between_equal_ones_need_no_full_replay(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(training=Training(micro_batch_size=rows), data=Data(max_length=2048))
    short = _replayed(recipe, name)
    monkeypatch.setattr(replay, "ENDS", 1000)
    whole = _replayed(recipe, name)
    assert short.reserved_bytes == pytest.approx(whole.reserved_bytes, rel=0.01)
