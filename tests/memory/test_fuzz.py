"""No config and no recipe makes a traceback or a negative number."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.catalog.library_types import text_generators
from qlora_tui.cli.estimate import as_json
from qlora_tui.errors import UserError
from qlora_tui.memory import Correction, Device, estimate
from qlora_tui.memory.calibration import MAX_FACTOR, MIN_FACTOR
from qlora_tui.recipe.fields import fields, get_setting, replace_setting
from qlora_tui.recipe.schema import Data, Lora, Quantization, Recipe
from qlora_tui.recipe.training_settings import Training
from tests.catalog.configs import config as config_of
from tests.memory.models import tinyllama
from tests.recipe.strategies import recipes

pytestmark = pytest.mark.slow

KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "num_local_experts",
    "num_experts_per_tok",
    "n_embd",
    "n_layer",
    "n_head",
    "n_positions",
    "ffn_dim",
)
SIZES = st.one_of(
    st.integers(1, 8).map(lambda n: n * 64),
    st.integers(-2, 2**40),
    st.none(),
    st.text(max_size=3),
    st.floats(),
)
CONFIGS = st.fixed_dictionaries(
    {"model_type": st.sampled_from(sorted(text_generators()))},
    optional={
        **dict.fromkeys(KEYS, SIZES),
        "tie_word_embeddings": st.one_of(st.booleans(), st.none(), st.just(3)),
    },
)
CORRECTIONS = st.none() | st.builds(
    Correction,
    runs=st.integers(1, 20),
    factor=st.floats(MIN_FACTOR, MAX_FACTOR),
    outside_bytes=st.none() | st.integers(0, 2**42),
    low=st.floats(1e-6, 2),
    high=st.floats(1e-6, 1e6),
)
DEVICES = st.builds(
    Device,
    kind=st.sampled_from(["cuda", "cpu"]),
    capability=st.sampled_from([(7, 5), (8, 6), (9, 0)]),
    correction=CORRECTIONS,
)
REAL = (
    "meta-llama/Llama-3.2-1B",
    "deepseek-ai/DeepSeek-V2-Lite",
    "mistralai/Mixtral-8x7B-v0.1",
    "LiquidAI/LFM2-350M",
)
TARGETS = st.sampled_from([("all-linear",), ("q_proj",), ("0.all-linear",), ("0-2.q_proj", "q_proj")])


@settings(max_examples=80, deadline=None)
@given(config=CONFIGS, recipe=recipes(), device=DEVICES)
def test_any_config_gives_an_estimate_or_a_problem(
    config: dict[str, Any], recipe: Recipe, device: Device
) -> None:
    try:
        architecture = parse_architecture(config)
        estimated = estimate(recipe, architecture, device=device)
    except UserError as problem:
        assert problem.what
        return
    assert all(item.bytes > 0 for item in estimated.items)
    assert 0 <= estimated.band.low_bytes <= estimated.process_bytes <= estimated.band.high_bytes


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(REAL), recipe=recipes(), targets=TARGETS, device=DEVICES)
def test_any_recipe_on_a_real_model_adds_up(
    name: str, recipe: Recipe, targets: tuple[str, ...], device: Device
) -> None:
    recipe = replace_setting(recipe, "lora.target_modules", targets)
    for key in ("rank_pattern", "alpha_pattern"):  # drawn for modules that this model need not have
        pattern = get_setting(recipe, f"lora.{key}")
        recipe = replace_setting(
            recipe, f"lora.{key}", {targets[0]: next(iter(pattern.values()))} if pattern else {}
        )
    _adds_up(recipe, name, device)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("name", REAL)
def test_every_setting_at_its_bounds_adds_up(name: str, kind: Literal["cuda", "cpu"]) -> None:
    for path, field in fields().items():
        for value in field.choices or (field.minimum, field.maximum):
            if value is None or (isinstance(value, str) and field.kind != "choice"):
                continue
            bound = int(value) if field.kind == "int" else value
            _adds_up(replace_setting(Recipe(), path, bound), name, Device(kind=kind))


def test_the_largest_recipe_never_fits_and_changes_are_not_negative() -> None:
    recipe = Recipe(
        quantization=Quantization(method="none", compute_dtype="float32"),
        lora=Lora(rank=1024, dropout=0.9, use_dora=True),
        data=Data(max_length=1_048_576),
        training=Training(micro_batch_size=4096, gradient_checkpointing="off"),
    )
    for available in (1, 1 << 30, 1 << 62):
        report = as_json(recipe, tinyllama(), available, Device())
        assert report["precisions"]["fp16"]["verdict"] == ("fits" if available == 1 << 62 else "does not fit")
        assert all(change["total_bytes"] > 0 for change in report["cheapest_changes"])
        assert all((report["what_fits"][key] or 0) >= 0 for key in ("sequence_length", "micro_batch", "rank"))


def _adds_up(recipe: Recipe, name: str, device: Device) -> None:
    for method in ("nf4", "int8", "none"):
        estimated = estimate(
            replace_setting(recipe, "quantization.method", method), _real(name), device=device
        )
        assert sum(item.bytes for item in estimated.items) == estimated.process_bytes
        assert all(item.bytes > 0 for item in estimated.items)
        assert 0 < estimated.allocated_bytes <= estimated.reserved_bytes <= estimated.process_bytes
        assert 0 <= estimated.band.low_bytes <= estimated.process_bytes <= estimated.band.high_bytes


@cache
def _real(name: str) -> Architecture:
    return parse_architecture(config_of(name))
