"""No config and no recipe makes a traceback or a negative number."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tui.catalog.architecture import known_model_types, read_architecture
from qlora_tui.errors import Problem
from qlora_tui.memory import Device, as_json, estimate
from qlora_tui.recipe.schema import Data, Lora, Quantization, Recipe, Training

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
    {"model_type": st.sampled_from(sorted(known_model_types()))},
    optional={
        **dict.fromkeys(KEYS, SIZES),
        "tie_word_embeddings": st.one_of(st.booleans(), st.none(), st.just(3)),
    },
)
RECIPES = st.builds(
    Recipe,
    quantization=st.builds(
        Quantization,
        method=st.sampled_from(["nf4", "fp4", "int8", "none"]),
        double_quantization=st.booleans(),
        compute_dtype=st.sampled_from(["auto", "bfloat16", "float16", "float32"]),
    ),
    lora=st.builds(Lora, rank=st.integers(1, 1024), dropout=st.floats(0, 0.9), use_dora=st.booleans()),
    data=st.builds(Data, max_length=st.integers(16, 1_048_576)),
    training=st.builds(
        Training,
        micro_batch=st.integers(1, 4096),
        gradient_accumulation=st.integers(1, 64),
        gradient_checkpointing=st.booleans(),
        optimizer=st.sampled_from(["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]),
    ),
)
DEVICES = st.builds(
    Device, kind=st.sampled_from(["cuda", "cpu"]), capability=st.sampled_from([(7, 5), (8, 6), (9, 0)])
)


@settings(max_examples=80, deadline=None)
@given(config=CONFIGS, recipe=RECIPES, device=DEVICES)
def test_any_config_gives_an_estimate_or_a_problem(
    config: dict[str, Any], recipe: Recipe, device: Device
) -> None:
    try:
        architecture = read_architecture(config)
        made = estimate(recipe, architecture, device=device)
    except Problem as problem:
        assert problem.what
        return
    assert all(item.bytes > 0 for item in made.items)
    assert 0 <= made.band.low_bytes <= made.process_bytes <= made.band.high_bytes


@settings(max_examples=40, deadline=None)
@given(recipe=RECIPES, device=DEVICES)
def test_any_recipe_on_a_real_model_adds_up(recipe: Recipe, device: Device) -> None:
    from tests.memory.models import tinyllama

    made = as_json(recipe, tinyllama(), None, device=device)
    for one in made["precisions"].values():
        assert sum(one["items"].values()) == one["total_bytes"]
        assert 0 < one["tiers"]["allocated"] <= one["tiers"]["reserved"] <= one["tiers"]["process"]
