"""What was probably meant by a key that is no setting, a section that is none, or a value off the list."""

from __future__ import annotations

from collections.abc import Iterable

from qlora_tui.recipe.fields import fields, sections

ALIASES = {
    "attn_implementation": "model.attention",
    "base_model": "model.id",
    "batch_size": "training.micro_batch",
    "bnb_4bit_compute_dtype": "quantization.compute_dtype",
    "bnb_4bit_quant_type": "quantization.method",
    "bnb_4bit_use_double_quant": "quantization.double_quantization",
    "cutoff_len": "data.max_length",
    "dataset": "data.sources",
    "early_stopping_patience": "training.early_stopping",
    "eval_steps": "training.evaluate_every",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "load_in_4bit": "quantization.method",
    "load_in_8bit": "quantization.method",
    "logging_steps": "training.log_every",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_r": "lora.rank",
    "lora_target_modules": "lora.target_modules",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.schedule",
    "lr_scheduler_type": "training.schedule",
    "max_seq_length": "data.max_length",
    "micro_batch_size": "training.micro_batch",
    "model_name_or_path": "model.id",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "optim": "training.optimizer",
    "per_device_train_batch_size": "training.micro_batch",
    "r": "lora.rank",
    "sample_packing": "data.packing",
    "save_steps": "training.checkpoint_every",
    "save_total_limit": "training.keep_checkpoints",
    "sequence_len": "data.max_length",
    "trainable_token_indices": "lora.token_rows",
    "val_set_size": "data.validation_fraction",
    "validation_share": "data.validation_fraction",
    "validation_split": "data.validation_fraction",
    "warmup_ratio": "training.warmup",
}
"""What peft, transformers and the other trainers call it, or the app's own screens."""


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like ``word``, whatever its case and dashes; None where none is near."""
    from difflib import get_close_matches  # only an error needs it, and it costs a tenth of the import

    by_plain = {normalize_key(candidate): candidate for candidate in candidates}
    matches = get_close_matches(normalize_key(word), by_plain, n=1)
    return by_plain[matches[0]] if matches else None


def did_you_mean(word: str, candidates: Iterable[str], shape: str = "{}") -> str:
    """``did you mean [lora]?``, or nothing. ``shape`` is how the candidate is written."""
    match = closest(word, candidates)
    return f"did you mean {shape.format(match)}?" if match else ""


def hint_for_key(section: str, key: str) -> str:
    """What to do about ``section.key``, which is no setting. ``section`` is empty at the top of a file."""
    normalized = normalize_key(key)
    section_keys = [field.key for field in fields().values() if field.section == section]
    homes = [field for field in fields().values() if field.key == normalized]
    if normalized not in section_keys and homes:
        home = homes[0].section
        return f"put {normalized} in [{home}]" if home else f"put {normalized} at the top, above the sections"
    if normalized in ALIASES:
        return f"did you mean {ALIASES[normalized]}?"
    match = closest(key, section_keys)
    if match:
        return f"did you mean {f'{section}.{match}' if section else match}?"
    path = closest(key, [field.path for field in fields().values()]) or _closest_key(key)
    if path:
        return f"did you mean {path}?"
    if not section:
        return "the sections are " + ", ".join(f"[{name}]" for name in sections())
    return f"[{section}] takes " + ", ".join(section_keys)


def _closest_key(key: str) -> str | None:
    by_key = {field.key: field.path for field in fields().values()}
    match = closest(key, by_key)
    return by_key[match] if match else None


def normalize_key(word: str) -> str:
    """A key without what people vary in it: case and dashes."""
    return word.lower().replace("-", "_")
