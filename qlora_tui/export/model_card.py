"""A model card: what the model is, what it was trained on, and how. Contains no paths of this machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, TypeAlias

from qlora_tui.data.sources import is_hub_dataset
from qlora_tui.formatting import (
    format_loss,
    format_number,
    format_percent,
    format_rate,
    pluralize,
    short_model_name,
)
from qlora_tui.recipe.fields import format_value
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.describe import format_energy
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import Finished
from qlora_tui.runs.view import RunView

CardForm: TypeAlias = Literal["adapter", "merged", "gguf"]
_FRONT: dict[CardForm, tuple[str, str]] = {
    "adapter": ("peft", "adapter"),
    "merged": ("transformers", "finetune"),
    "gguf": ("gguf", "quantized"),
}
"""Library of each form, and its relation to the base (the Hub's ``base_model_relation``)."""


@dataclass(frozen=True)
class CardResults:
    """Results that a card reports in addition to the recipe. Empty fields are unknown."""

    rows: tuple[tuple[str, str], ...] = ()
    """Losses, tokens and energy from the run's events, as label and text."""
    effect: str = ""
    """What the adapter changes, in a sentence."""
    proof: str = ""
    """How the files were compared with the trained model, in sentences."""
    license_id: str = ""
    """License of the base model."""


def run_rows(run: RunDir) -> tuple[tuple[str, str], ...]:
    """Return rows of a card from a run's events."""
    view = RunView(run)
    view.refresh()
    rows = []
    if view.data:
        rows.append(
            (
                "Samples",
                f"{view.data.samples:,}, with {view.data.trained_tokens:,} trained tokens in an epoch",
            )
        )
    if len(view.series):
        first, last = view.series.loss[0], view.series.loss[-1]
        rows.append(("Steps", f"{view.step:,}"))
        rows.append(
            (
                "Training loss",
                f"{format_loss(first)} at the first recorded step, {format_loss(last)} at the last",
            )
        )
    scored = [e for e in view.evaluations if e.loss is not None]
    if scored:
        parts = (
            [f"{format_loss(view.loss_before_training)} before training"] if view.loss_before_training else []
        )
        if view.best is not None and view.best.loss is not None:
            parts.append(f"{format_loss(view.best.loss)} best (step {view.best.step:,})")
        if scored[-1].step > 0:
            parts.append(f"{format_loss(scored[-1].loss)} last")
        rows.append(("Validation loss", ", ".join(parts)))
    if view.accuracy is not None and view.trained_evaluation is not None:
        base = f" (base model {format_percent(view.base_accuracy)})" if view.base_accuracy is not None else ""
        rows.append(("Exact answers", f"{format_percent(view.accuracy)} of the validation rows{base}"))
    if view.environment:
        rows.append(("Trained with", view.environment.device))
    energy = format_energy(view.ending, with_cost=False) if isinstance(view.ending, Finished) else ""
    if energy:
        rows.append(("Energy of the GPU", energy))
    return tuple(rows)


def render_model_card(
    recipe: Recipe,
    *,
    from_hub: bool,
    form: CardForm = "merged",
    repo: str = "",
    results: CardResults | None = None,
    is_dequantized: bool = False,
) -> str:
    """Return the README.md of a model.

    Args:
        recipe: Recipe of the training. Its note is the user's own, and is not included.
        from_hub: Whether the base is named by its Hub id; otherwise by the last part of its path.
        form: What the card describes.
        repo: Repository on the Hub, to say how the model is loaded; empty for a folder.
        results: Results of the training and checks.
        is_dequantized: Whether the adapter was merged into the dequantized base weights of training instead
            of the stored ones.
    """
    results = results or CardResults()
    base = recipe.model.id if from_hub else short_model_name(recipe.model.id)
    lora, training = recipe.lora, recipe.training
    title = recipe.name or f"{PurePath(base).name}, fine-tuned"
    library, relation = _FRONT[form]
    front = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    if results.license_id:
        front.append(f"license: {results.license_id}")
    if from_hub:
        front += [f"base_model: {base}", f"base_model_relation: {relation}"]
    paths = [source.path for source in recipe.data.sources]
    datasets = [path for path in paths if is_hub_dataset(path)]
    sources = ", ".join(path if path in datasets else PurePath(path).name for path in paths)
    if datasets:
        front += ["datasets:", *(f"- {name.partition(':')[0]}" for name in datasets)]
    front += ["tags:", "- qlora-tui", "- qlora", "- lora", *(["- gguf"] if form == "gguf" else []), "---"]
    kind = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
    base_weights = {"none": "16-bit weights"}.get(
        recipe.quantization.method, f"{recipe.quantization.method.upper()} weights"
    )
    merged = ", merged into the 16-bit base"
    if form == "adapter":
        merged = ""
    elif is_dequantized:
        merged = ", merged into these weights, dequantized"
    overrides = (("Rank overrides", lora.rank_pattern), ("Alpha overrides", lora.alpha_pattern))
    rows = [
        ("Base model", base),
        ("Method", f"{kind} on {base_weights}{merged}"),
        ("Rank, alpha, dropout", f"{lora.rank}, {format_number(lora.alpha)}, {format_number(lora.dropout)}"),
        *((label, format_value(table)) for label, table in overrides if table),
        ("Target modules", ", ".join(lora.target_modules)),
        *([("Started from", _adapter_name(lora.init_from))] if lora.init_from else []),
        *([("Token rows", _code(lora.trainable_tokens))] if lora.trainable_tokens else []),
        *([("Embedding and head", "trained in full")] if lora.train_embeddings else []),
        ("Data", sources or "not recorded"),
        ("Trained on", _trained_part(recipe)),
        (
            "Effective batch",
            f"{pluralize(recipe.effective_batch, 'row')} of at most {recipe.data.max_length:,} tokens",
        ),
        ("Learning rate", f"{format_rate(training.learning_rate)}, {training.lr_scheduler}"),
        (
            "Length",
            pluralize(training.max_steps, "step")
            if training.max_steps
            else f"{format_number(training.epochs)} epochs",
        ),
        *results.rows,
        *([("License of the base", results.license_id)] if results.license_id else []),
    ]
    table = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
    sentences = [part for text in (results.effect, results.proof) if text for part in ("", text)]
    use = ["", "## Use", "", *_use(form, repo, base if from_hub else "")] if repo else []
    return "\n".join([*front, "", f"# {title}", "", *table, *sentences, *use, ""])


def _use(form: CardForm, repo: str, base: str) -> list[str]:
    """Return the code that loads the content of ``repo``. ``base`` is empty if it is not on the Hub."""
    match form:
        case "gguf":
            return ["With llama.cpp:", "", "```sh", f"llama-server -hf {repo}", "```"]
        case "merged":
            name = "AutoModelForCausalLM"
            lines = [f"from transformers import {name}", "", f'model = {name}.from_pretrained("{repo}")']
        case "adapter" if base:
            name = "AutoPeftModelForCausalLM"
            lines = [f"from peft import {name}", "", f'model = {name}.from_pretrained("{repo}")']
        case "adapter":
            lines = [
                "from peft import PeftModel",
                "from transformers import AutoModelForCausalLM",
                "",
                'base = AutoModelForCausalLM.from_pretrained("FOLDER")  # of the base model',
                f'model = PeftModel.from_pretrained(base, "{repo}")',
            ]
    return ["```python", *lines, "```"]


def _adapter_name(folder: str) -> str:
    """Return the run or the folder name of an adapter, without its path."""
    path = PurePath(folder)
    return path.parent.name if path.name == "adapter" else path.name


def _code(tokens: Iterable[str]) -> str:
    # A pipe would end the table cell.
    return ", ".join(f"`{token}`" for token in tokens).replace("|", r"\|")


def _trained_part(recipe: Recipe) -> str:
    """Describe which parts of the conversations were trained on."""
    return "the assistant's turns" if recipe.data.train_on == "assistant" else "whole conversations"
