"""The closed form against storages counted in a real step on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.model_types.tiny_config import settings_of
from qlora_tui.catalog.described import describe
from qlora_tui.memory import Device, estimate, trainer_execution
from qlora_tui.memory.estimate import closed_form
from qlora_tui.memory.layout import build_layout
from qlora_tui.recipe.schema import Data, Lora, Quantization, Recipe
from qlora_tui.recipe.training_settings import Training
from tests.catalog.configs import config
from tests.memory.step_cases import traced_step

pytestmark = pytest.mark.slow

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("checkpointing", "dropout", "method", "dtype"),
    [
        (True, 0.0, "nf4", "float32"),
        (False, 0.0, "nf4", "float32"),
        (False, 0.1, "none", "float32"),
        (True, 0.0, "int8", "float32"),
        (False, 0.0, "int8", "float32"),
        (True, 0.0, "nf4", "bfloat16"),
        (False, 0.1, "nf4", "bfloat16"),
    ],
)
def test_a_real_step_holds_what_was_predicted(
    checkpointing: bool, dropout: float, method: Any, dtype: Any
) -> None:
    recipe = Recipe(
        quantization=Quantization(method=method, compute_dtype=dtype),
        lora=Lora(dropout=dropout),
        data=Data(max_length=512),
        training=Training(
            micro_batch_size=2,
            gradient_checkpointing="on" if checkpointing else "off",
            gradient_accumulation=1,
            optimizer="adamw",
        ),
    )
    execution = trainer_execution(recipe, Device(kind="cpu"))
    predicted = closed_form(recipe, describe(TINY), execution)["step"]
    assert predicted == pytest.approx(_measured(TINY, recipe, dropout), rel=0.06)


@pytest.mark.parametrize("kept_layers", [1, 2, 3])
def test_a_real_step_with_kept_layers_holds_what_was_predicted(kept_layers: int) -> None:
    recipe = Recipe(
        quantization=Quantization(compute_dtype="float32"),
        data=Data(max_length=512),
        training=Training(micro_batch_size=2, gradient_accumulation=1, optimizer="adamw"),
    )
    execution = replace(trainer_execution(recipe, Device(kind="cpu")), kept_layers=kept_layers)
    predicted = closed_form(recipe, describe(TINY), execution)["step"]
    assert predicted == pytest.approx(_measured(TINY, recipe, 0.0, kept_layers=kept_layers), rel=0.06)


@pytest.mark.parametrize(
    ("method", "checkpointing", "dtype"),
    [
        ("dpo", True, "float32"),
        ("dpo", False, "bfloat16"),
        ("kto", True, "bfloat16"),
        ("orpo", False, "float32"),
        ("simpo", True, "float32"),
    ],
)
def test_a_real_step_on_preferences_holds_what_was_predicted(
    method: Any, checkpointing: bool, dtype: Any
) -> None:
    recipe = Recipe(
        quantization=Quantization(compute_dtype=dtype),
        data=Data(max_length=256, preferences=method),
        training=Training(
            micro_batch_size=2,
            gradient_checkpointing="on" if checkpointing else "off",
            gradient_accumulation=1,
            optimizer="adamw",
        ),
    )
    execution = trainer_execution(recipe, Device(kind="cpu"))
    predicted = closed_form(recipe, describe(TINY), execution)["step"]
    assert predicted == pytest.approx(_measured(TINY, recipe, 0.0), rel=0.06)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gemma3_text", "qwen3_moe"])
def test_the_trace_of_a_type_is_a_real_step_on_the_cpu(model_type: str) -> None:
    """Queries wider than values, windows, and experts in float32."""
    from transformers import AutoConfig

    training = Training(micro_batch_size=2, gradient_accumulation=1, optimizer="adamw")
    quantization = Quantization(method="none", compute_dtype="float32")
    recipe = Recipe(quantization=quantization, data=Data(max_length=512), training=training)
    execution = trainer_execution(recipe, Device(kind="cpu"))
    values = AutoConfig.for_model(model_type, **settings_of(model_type)).to_dict()
    traced = traced_step(values, recipe, execution).step_bytes
    assert traced == pytest.approx(_measured(values, recipe, 0.0), rel=0.02)


def test_a_step_of_real_widths_uses_the_predicted_memory() -> None:
    recipe = Recipe(
        quantization=Quantization(compute_dtype="float32"),
        data=Data(max_length=128),
        training=Training(micro_batch_size=1, gradient_checkpointing="off", gradient_accumulation=1),
    )
    model = config("HuggingFaceTB/SmolLM2-135M") | {"num_hidden_layers": 6}
    execution = trainer_execution(recipe, Device(kind="cpu"))
    predicted = closed_form(recipe, describe(model), execution)["step"]
    assert predicted == pytest.approx(_measured(model, recipe, 0.0), rel=0.06)


DEEP = TINY | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
"""Layer inputs of 2 MiB at 1,024 tokens, and tensors of 5.5 MiB in between."""


def _deep_recipe(checkpointing: Any) -> Recipe:
    return Recipe(
        quantization=Quantization(compute_dtype="float32"),
        data=Data(max_length=256),
        training=Training(
            micro_batch_size=4,
            gradient_checkpointing=checkpointing,
            gradient_accumulation=1,
            optimizer="adamw",
        ),
    )


@pytest.mark.usefixtures("quick_trainers")
def test_a_step_on_a_cpu_leaves_the_gaps_in_the_heap_that_were_predicted() -> None:
    command = [sys.executable, "-m", "tests.memory.test_measured"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = dict(line.split() for line in done.stdout.splitlines()[-2:])
    architecture, cpu = describe(DEEP), Device(kind="cpu")
    for checkpointing in ("on", "off"):
        recipe = _deep_recipe(checkpointing)
        step = closed_form(recipe, architecture, trainer_execution(recipe, cpu))["step"]
        gaps = estimate(recipe, architecture, device=cpu).bytes_of("fragmentation")
        # From one process to the next, as much is measured or up to two fifths more.
        assert step + gaps == pytest.approx(int(grown[checkpointing]), rel=0.3), checkpointing


def print_growth() -> None:
    """Print by how many bytes two steps grow a process, with checkpoints and without, each in a fork."""
    describe(DEEP)
    _model_and_batch(TINY, _deep_recipe("on"))  # imports what both need
    for checkpointing in ("on", "off"):
        child = os.fork()
        if not child:
            print(checkpointing, _growth(checkpointing), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


def _growth(checkpointing: Any) -> int:
    """Return by how many bytes two steps grow this process, whose kernels a short one has loaded."""
    from qlora_tui.training.host import release_free_memory
    from qlora_tui.training.memory_meter import peak_resident_bytes

    recipe = _deep_recipe(checkpointing)
    model, batch = _model_and_batch(DEEP, recipe)
    short = {key: value[:, :32] for key, value in batch.items() if key != "segments"}
    model(**short, segments=[32]).loss.backward()
    model.zero_grad()
    release_free_memory()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    for _ in range(2):
        model(**batch).loss.backward()
        model.zero_grad()
    return peak_resident_bytes() - before


def test_ranks_and_alphas_by_pattern_are_those_that_peft_makes() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_tui.training.adapter import add_lora, trained_parameters

    lora = Lora(
        rank=4,
        alpha=8.0,
        rank_pattern={"all-linear": 8, "1-2.q_proj": 32, "model.layers.2.mlp.down_proj": 2},
        alpha_pattern={"q_proj": 64.0},
    )
    recipe, architecture = Recipe(lora=lora), describe(TINY)
    factory: Any = AutoModelForCausalLM
    model = add_lora(factory.from_config(AutoConfig.for_model(**TINY)), lora, architecture)
    layout = build_layout(recipe, architecture, trainer_execution(recipe, Device(kind="cpu")))
    assert trained_parameters(model) == layout.adapter_parameters
    adapters = {name: part for name, part in model.named_modules() if hasattr(part, "scaling")}
    for name, rank, alpha in (
        ("0.self_attn.q_proj", 8, 64),
        ("1.self_attn.q_proj", 32, 64),
        ("1.self_attn.k_proj", 8, 8),
        ("2.mlp.down_proj", 2, 8),
    ):
        part = adapters[f"base_model.model.model.layers.{name}"]
        assert (part.r["default"], part.scaling["default"]) == (rank, alpha / rank)


def _measured(values: dict[str, Any], recipe: Recipe, dropout: float, *, kept_layers: int = 0) -> int:
    import torch

    from qlora_tui.data.store import BAD, GOOD
    from qlora_tui.engine.recorder import StorageRecorder
    from qlora_tui.training.loss import IGNORED, loss_positions
    from qlora_tui.training.preferences import PreferenceObjective
    from qlora_tui.training.scoring import no_grad_eval

    model, batch = _model_and_batch(values, recipe, dropout, kept_layers)
    objective = PreferenceObjective.of(recipe)
    if objective is None:
        with StorageRecorder(device="cpu") as storages:
            model(**batch).loss.backward()
        return int(storages.peak_bytes)
    rows, length = recipe.rows_per_pass, recipe.data.max_length
    batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, IGNORED)
    batch["loss_positions"] = loss_positions(batch["labels"])
    batch |= {"sides": [GOOD, BAD] * (rows // 2), "answer_tokens": [length - 1] * rows}
    with StorageRecorder(device="cpu") as storages:
        if objective.needs_divergence:
            objective.divergence(model, batch)
        torch.autograd.backward(objective.summed_loss(model, model, batch, 1.0))
        with no_grad_eval(model):  # a validation
            objective.summed_loss(model, model, batch, 1.0)
    return int(storages.peak_bytes)


def _model_and_batch(
    values: dict[str, Any], recipe: Recipe, dropout: float = 0.0, kept_layers: int = 0
) -> tuple[Any, dict[str, Any]]:
    """Prepare a model of random weights like the trainer, and a micro-batch of the longest samples."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_tui.training import model as model_loading
    from qlora_tui.training import packed_attention
    from qlora_tui.training.adapter import add_lora
    from qlora_tui.training.loss import ChunkedHead, find_head, use_loss

    torch.manual_seed(0)
    factory: Any = AutoModelForCausalLM
    dtype = getattr(torch, recipe.quantization.compute_dtype)
    model = factory.from_config(AutoConfig.for_model(**values), attn_implementation="sdpa", dtype=dtype)
    if recipe.quantization.method != "none":
        _quantize(model, recipe.quantization.method)
    model_loading.freeze(model)
    assert packed_attention.use_packed_attention(model)
    if recipe.training.gradient_checkpointing != "off":
        model_loading.checkpoint_activations(model, preserve_rng_state=bool(dropout))
        assert model_loading.apply_kept_layers(model, kept_layers)
    model.enable_input_require_grads()
    head = find_head(model)
    assert isinstance(head, ChunkedHead)
    use_loss(model, head)
    model = add_lora(model, recipe.lora, describe(values)).train()
    rows, length = recipe.rows_per_pass, recipe.data.max_length
    ids = torch.randint(0, model.config.vocab_size, (1, rows * length))
    positions = torch.arange(length).repeat(rows)[None]
    return model, {"input_ids": ids, "labels": ids, "position_ids": positions, "segments": [length] * rows}


def _quantize(model: Any, method: str) -> None:
    """Every linear module but the head, through bitsandbytes itself."""
    from torch import nn

    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        parent, _, leaf = name.rpartition(".")
        quantized = _eight_bits(module) if method == "int8" else _four_bits(module)
        setattr(model.get_submodule(parent), leaf, quantized.to("cpu"))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = method == "nf4", method == "int8"


def _four_bits(module: Any) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(
        module.in_features,
        module.out_features,
        bias=False,
        compute_dtype=module.weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
    )
    layer.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
    return layer


def _eight_bits(module: Any) -> Any:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    layer = Linear8bitLt(
        module.in_features, module.out_features, bias=False, has_fp16_weights=False, threshold=6.0
    )
    layer.weight = Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
    return layer


if __name__ == "__main__":
    print_growth()
