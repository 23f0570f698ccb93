"""Steps on which the closed form of the estimate is held to the trace of a real one.

Each model is cut to two layers (what a further layer adds is the same again) and traced on the meta device:
two batch shapes × checkpointing × loss × targets × dropout. The figure is the step's peak beyond the frozen
weights and the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qlora_tui.memory import Device, ExecutionConfig, trainer_execution
from qlora_tui.memory.estimate import closed_form
from qlora_tui.memory.recording import StepTrace
from qlora_tui.recipe.schema import Data, Lora, Model, Quantization, Recipe
from qlora_tui.recipe.training_settings import Training
from qlora_tui.training.description import architecture_of
from tests.catalog.configs import CONFIGS

FAMILIES = {
    "Llama 3": "meta-llama__Llama-3.2-1B",
    "Mistral": "mistralai__Mistral-7B-v0.1",
    "Mixtral": "mistralai__Mixtral-8x7B-v0.1",
    "Qwen 2.5": "Qwen__Qwen2.5-7B",
    "Qwen 3": "Qwen__Qwen3-0.6B",
    "Gemma 2": "google__gemma-2-2b",
    "Gemma 3": "google__gemma-3-1b-it",
    "Phi-3": "microsoft__Phi-3-mini-4k-instruct",
    "Falcon": "tiiuae__falcon-7b",
    "GPT-2": "openai-community__gpt2",
    "StableLM": "stabilityai__stablelm-2-1_6b",
    "Cohere": "CohereLabs__c4ai-command-r-v01",
    "gpt-oss": "openai__gpt-oss-20b",
    "DeepSeek-V2": "deepseek-ai__DeepSeek-V2-Lite",
}
NARROW = {
    "Phi-3": ("qkv_proj",),
    "DeepSeek-V2": ("q_proj", "kv_b_proj"),
    "Falcon": ("query_key_value",),
    "GPT-2": ("c_attn",),
}
"""What stands for ``q_proj, v_proj`` where the projections are fused."""


@dataclass(frozen=True)
class Case:
    """One step to compare."""

    family: str
    rows: int = 1
    length: int = 1024
    checkpointing: bool = True
    loss: str = "chunked"
    wide: bool = True
    """All linear modules, or queries and values only."""
    dropout: float = 0.0
    method: str = "nf4"
    token_rows: int = 0
    """Tokens whose rows of embedding and head are trained."""
    embeddings: bool = False
    """Whether embedding and head are trained in whole."""


@dataclass(frozen=True)
class Compared:
    """Both figures, in bytes."""

    case: Case
    traced_bytes: int
    estimated_bytes: int

    @property
    def error_pct(self) -> float:
        """Positive is over."""
        return 100 * (self.estimated_bytes / self.traced_bytes - 1)


EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def cut_config(family: str, layers: int = 2, max_experts: int | None = None) -> dict[str, Any]:
    """A family's config with few layers, and with at most ``max_experts`` experts a layer."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{FAMILIES[family]}.json").read_text())
    for key in ("num_hidden_layers", "n_layer"):
        if key in config:
            config[key] = layers
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    for key in EXPERT_COUNTS:
        if max_experts is not None and key in config:
            config[key] = min(config[key], max_experts)
    return config


def recipe_of(case: Case) -> Recipe:
    """Return the recipe of a case."""
    targets = ("all-linear",) if case.wide else NARROW.get(case.family, ("q_proj", "v_proj"))
    return Recipe(
        model=Model(),
        quantization=Quantization(method="nf4" if case.method == "nf4" else "none"),
        lora=Lora(
            target_modules=targets,
            dropout=case.dropout,
            trainable_tokens=tuple(f"token {n}" for n in range(case.token_rows)),
            train_embeddings=case.embeddings,
        ),
        data=Data(max_length=case.length),
        training=Training(
            micro_batch_size=case.rows,
            gradient_accumulation=1,
            gradient_checkpointing="on" if case.checkpointing else "off",
            optimizer="adamw",
        ),
    )


def compare(case: Case, max_experts: int | None = None) -> Compared:
    """Trace and estimate one case, by default with all experts of a mixture."""
    config, recipe = cut_config(case.family, max_experts=max_experts), recipe_of(case)
    execution = trainer_execution(recipe, Device())
    if case.loss == "stock":
        execution = replace(execution, loss="stock")
    traced = traced_step(config, recipe, execution)
    return Compared(case, traced.step_bytes, closed_form(recipe, architecture_of(config), execution)["step"])


def traced_step(
    config: dict[str, Any],
    recipe: Recipe,
    execution: ExecutionConfig | None = None,
    *,
    room_bytes: int | None = None,
) -> StepTrace:
    """Trace a step of this project's trainer on a GPU, or another execution."""
    from qlora_tui.engine.trace_worker import trace_request
    from qlora_tui.runs.exact_memory import TraceRequest

    execution = execution or trainer_execution(recipe, Device())
    return trace_request(
        TraceRequest(config=config, recipe=recipe, execution=execution, room_bytes=room_bytes)
    )


# A covering array: any two columns hold both values together, neither, and each alone.
_PAIRS = [(False,) * 5] + [tuple((column - row) % 5 < 3 for column in range(5)) for row in range(5)]


def pairs_of_settings(family: str, method: str) -> Iterator[Case]:
    """The six cases in which each pair of values of five settings occurs."""
    for long, checkpointing, chunked, wide, dropout in _PAIRS:
        rows, length = (3, 512) if long else (1, 1024)
        loss, share = "chunked" if chunked else "stock", 0.05 if dropout else 0.0
        yield Case(family, rows, length, checkpointing, loss, wide, share, method)


def two_cases(family: str) -> tuple[Case, Case]:
    """A step with every setting at one value, and at the other."""
    return (
        Case(family, rows=2, length=512),
        Case(family, checkpointing=False, loss="stock", wide=False, dropout=0.05),
    )
