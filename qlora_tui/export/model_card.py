"""A model card: what the model is, what it was trained on and how. Contains no paths of this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath

from qlora_tui.recipe.diff import format_value
from qlora_tui.recipe.schema import Recipe


def render_model_card(recipe: Recipe, *, from_hub: bool) -> str:
    """Return README.md for a merged model. ``from_hub``: refer to the base by its hub id."""
    base = recipe.model.id if from_hub else PurePath(recipe.model.id).name
    lora, training = recipe.lora, recipe.training
    title = recipe.name or f"{PurePath(base).name}, fine-tuned"
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if from_hub:
        front += [f"base_model: {base}", "base_model_relation: finetune"]
    front += ["tags:", "- qlora", "- lora", "---"]
    kind = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
    base_weights = {"none": "16-bit weights"}.get(
        recipe.quantization.method, f"{recipe.quantization.method.upper()} weights"
    )
    sources = ", ".join(PurePath(source.path).name for source in recipe.data.sources) or "not recorded"
    overrides = (("Rank overrides", lora.rank_pattern), ("Alpha overrides", lora.alpha_pattern))
    rows = [
        ("Base model", base),
        ("Method", f"{kind} on {base_weights}, merged into the 16-bit base"),
        ("Rank, alpha, dropout", f"{lora.rank}, {lora.alpha:g}, {lora.dropout:g}"),
        *((label, format_value(table)) for label, table in overrides if table),
        ("Target modules", ", ".join(lora.target_modules)),
        *([("Token rows", _code(lora.trainable_tokens))] if lora.trainable_tokens else []),
        ("Data", sources),
        ("Trained on", _trained_part(recipe)),
        ("Effective batch", f"{recipe.effective_batch} rows of at most {recipe.data.max_length:,} tokens"),
        ("Learning rate", f"{training.learning_rate:g}, {training.lr_scheduler}"),
        ("Length", f"{training.max_steps:,} steps" if training.max_steps else f"{training.epochs:g} epochs"),
    ]
    table = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
    note = [recipe.note, ""] if recipe.note else []
    return "\n".join([*front, "", f"# {title}", "", *note, *table, ""])


def _code(tokens: Iterable[str]) -> str:
    # A pipe would end the table cell.
    return ", ".join(f"`{token}`" for token in tokens).replace("|", r"\|")


def _trained_part(recipe: Recipe) -> str:
    """Describe which parts of the conversations were trained on."""
    return "the assistant's turns" if recipe.data.train_on == "assistant" else "whole conversations"
