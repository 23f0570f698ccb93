"""The replay of a run's allocations, compared with the walk of a step."""

from __future__ import annotations

import pytest

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.memory import Device, estimate, replay, trainer_execution
from qlora_tui.memory.layers import build_layout
from qlora_tui.memory.replay import Pool
from qlora_tui.memory.step import profile_step
from qlora_tui.recipe.schema import Data, Lora, Quantization, Recipe, Training
from tests.catalog.configs import config

MODELS = ("Qwen/Qwen2.5-0.5B", "google/gemma-2-2b", "meta-llama/Llama-3.1-8B")


def _replayed(recipe: Recipe, name: str) -> Pool:
    architecture, execution = parse_architecture(config(name)), trainer_execution(recipe, Device())
    layout = build_layout(recipe, architecture, execution)
    return replay.replay(layout, profile_step(layout))


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
