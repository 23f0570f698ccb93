"""Names that are not those of a setting: other spellings, which are read, and misspellings, for hints.

``RENAMED``  keys of version 0.1: read without a note, in their own section
``ALIASES``  keys of other trainers with the same meaning and values: read in any section or above the first
             one, with a note that names ours
``VALUES``   other spellings of a value: those of version 0.2 and of other trainers
``REMOVED``  settings and values that this version no longer has: what to do instead
``RELATED``  keys of other trainers that need another value here: not read, but named in the error's hint
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qlora_tui.recipe.fields import fields, sections

RENAMED = {
    "lora.token_rows": "lora.trainable_tokens",
    "data.too_long": "data.overflow",
    "training.micro_batch": "training.micro_batch_size",
    "training.schedule": "training.lr_scheduler",
    "training.warmup": "training.warmup_ratio",
    "training.evaluate_every": "training.eval_every",
}
ALIASES = {
    "base_model": "model.id",
    "bnb_4bit_compute_dtype": "quantization.compute_dtype",
    "bnb_4bit_use_double_quant": "quantization.double_quantization",
    "cutoff_len": "data.max_length",
    "early_stopping_patience": "training.early_stopping",
    "embedding_learning_rate": "training.embedding_learning_rate",
    "embedding_lr": "training.embedding_learning_rate",
    "eval_steps": "training.eval_every",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "logging_steps": "training.log_every",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_r": "lora.rank",
    "lora_target_modules": "lora.target_modules",
    "loraplus_lr_ratio": "training.lora_plus_ratio",
    "lr": "training.learning_rate",
    "lr_scheduler_type": "training.lr_scheduler",
    "max_seq_length": "data.max_length",
    "model_name_or_path": "model.id",
    "neftune_noise_alpha": "training.neftune_alpha",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "optim": "training.optimizer",
    "per_device_train_batch_size": "training.micro_batch_size",
    "r": "lora.rank",
    "report_to": "training.report_to",
    "sample_packing": "data.packing",
    "save_steps": "training.checkpoint_every",
    "save_total_limit": "training.keep_checkpoints",
    "sequence_len": "data.max_length",
    "val_set_size": "data.validation_fraction",
}
VALUES: dict[str, dict[Any, str]] = {"training.gradient_checkpointing": {True: "on", False: "off"}}
REMOVED: dict[str, dict[str, str]] = {
    "lora.init_weights": {
        "random": "",
        "eva": "leave it out, or name an adapter that peft initialized with EVA in lora.init_from",
        "loftq": "leave it out, or train with LoftQ in peft (replace_lora_weights_loftq); an adapter that "
        "began with it is exported by the version that trained it",
    },
    "training.optimizer": {"muon": 'write "adamw", or "lion", whose states are as small'},
}
"""By the value; empty where it is what every run does today, so that the setting is ignored."""
RELATED = {
    "additional_target": "lora.train_embeddings",
    "attn_implementation": "model.attention",
    "batch_size": "training.micro_batch_size",
    "bnb_4bit_quant_type": "quantization.method",
    "dataset": "data.sources",
    "embedding_lr_scale": "training.embedding_learning_rate",
    "load_in_4bit": "quantization.method",
    "load_in_8bit": "quantization.method",
    "lora_modules_to_save": "lora.train_embeddings",
    "modules_to_save": "lora.train_embeddings",
    "precision": "quantization.method",
    "trainable_token_indices": "lora.trainable_tokens",
    "validation_share": "data.validation_fraction",
    "validation_split": "data.validation_fraction",
    "warmup": "training.warmup_ratio",
    "warmup_steps": "training.warmup_ratio",
}


def resolve(section: str, key: str) -> str | None:
    """Resolve an alias to its setting, as ``section.key``; None if ``key`` is not an alias.

    ``section`` is empty above the sections of a file.
    """
    path = f"{section}.{key}" if section else key
    if path in fields():
        return None
    return RENAMED.get(path) or ALIASES.get(key)


def canonical_value(path: str, value: Any) -> Any:
    """Return our spelling of the value of a setting, ``section.key``; any other value as it is."""
    spellings = VALUES.get(path, {})
    return spellings.get(value, value) if isinstance(value, bool) else value


def is_ignored(path: str, value: Any) -> bool:
    """Whether a removed setting has the value that every run has today."""
    return path not in fields() and isinstance(value, str) and REMOVED.get(path, {}).get(value) == ""


def canonical(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the layer with our spelling of every key and value. ``layer`` has passed validation."""
    result: dict[str, Any] = {}
    for section, key, value in _entries(layer):
        path = resolve(section, key)
        if path is not None:
            section, _, key = path.rpartition(".")
        if is_ignored(f"{section}.{key}", value):
            continue
        value = canonical_value(f"{section}.{key}", value)
        if section:
            result.setdefault(section, {})[key] = value
        else:
            result[key] = value
    return result


def notes(layer: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each key of another trainer in the layer, naming the setting it is read as."""
    spelled = [(key, resolve(section, key)) for section, key, _ in _entries(layer) if key in ALIASES]
    return [f"{key} is read as {path}." for key, path in spelled if path]


def duplicates(layer: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield keys that set the same setting as another key: (section, key, other key as written, setting)."""
    first: dict[str, str] = {}
    for section, key, _ in _entries(layer):
        written = f"{section}.{key}" if section else key
        path = resolve(section, key) or written
        if path in first:
            yield section, key, first[path], path
        first.setdefault(path, written)


def _entries(layer: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield (section, key, value) of a layer; the section is empty for keys above the sections."""
    for name, value in layer.items():
        if name in sections() and isinstance(value, Mapping):
            for key, inner in value.items():
                yield name, key, inner
        else:
            yield "", name, value


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate most similar to ``word``, ignoring case and dashes; None if none is similar."""
    from difflib import get_close_matches  # only an error needs it, and it takes a tenth of the import time

    by_plain = {normalize_key(candidate): candidate for candidate in candidates}
    matches = get_close_matches(normalize_key(word), by_plain, n=1)
    return by_plain[matches[0]] if matches else None


def did_you_mean(word: str, candidates: Iterable[str], shape: str = "{}") -> str:
    """``did you mean [lora]?``, or an empty string. ``shape`` is the format of the candidate."""
    match = closest(word, candidates)
    return f"did you mean {shape.format(match)}?" if match else ""


def hint_for_key(section: str, key: str) -> str:
    """Hint for ``section.key``, an unknown setting. ``section`` is empty at the top of a file."""
    normalized = normalize_key(key)
    section_keys = [field.key for field in fields().values() if field.section == section]
    homes = [field for field in fields().values() if field.key == normalized]
    if normalized not in section_keys and homes:
        home = homes[0].section
        return f"put {normalized} in [{home}]" if home else f"put {normalized} at the top, above the sections"
    if related := ALIASES.get(normalized) or RELATED.get(normalized):
        return f"did you mean {related}?"
    match = closest(key, section_keys)
    if match:
        return f"did you mean {f'{section}.{match}' if section else match}?"
    by_key = {field.key: field.path for field in fields().values()}
    for spelled in ({path: path for path in fields()}, by_key):
        if match := closest(key, spelled):
            return f"did you mean {spelled[match]}?"
    if not section:
        return "the sections are " + ", ".join(f"[{name}]" for name in sections())
    return f"[{section}] takes " + ", ".join(section_keys)


def normalize_key(word: str) -> str:
    """Normalize a key's case and dashes."""
    return word.lower().replace("-", "_")
