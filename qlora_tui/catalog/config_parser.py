"""From a ``config.json`` to an ``Architecture``: no weights, no torch, a few milliseconds.

The tables in ``families/`` describe the structure of a family; this module reads the sizes they need from the
file and expands them. Read by the estimate, the LoRA screen, the model list and the trainer.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from qlora_tui.catalog import described
from qlora_tui.catalog.architecture_types import Architecture, Experts, OutputHead
from qlora_tui.catalog.families import COMPOSITE, FAMILY
from qlora_tui.catalog.family_spec import (
    ConfigFields,
    Family,
    NotInTableError,
    SizeField,
    Sizes,
    check_bounds,
    config_problem,
    embeddings,
    evaluate,
    expand,
)
from qlora_tui.catalog.library_types import config_class, config_classes, is_encoder, text_generators
from qlora_tui.catalog.outline import read_outline
from qlora_tui.errors import UserError
from qlora_tui.files import read_bounded
from qlora_tui.installation import install_command

MAX_CONFIG_BYTES = 4 << 20
"""Largest config file in bytes. Real ones are kilobytes; those that list all unquantized modules are up to a
megabyte."""
COMMON_SIZES: dict[str, SizeField] = {
    "layers": SizeField(("num_hidden_layers", "n_layer", "n_layers", "num_layers")),
    "hidden": SizeField(("hidden_size", "n_embd", "n_embed")),
    "heads": SizeField(("num_attention_heads", "n_head", "num_heads")),
    "kv_heads": SizeField(("num_key_value_heads",), default="heads"),
    "head_dim": SizeField(("head_dim",), default="hidden_per_head"),
    "vocab": SizeField(("vocab_size",)),
    "positions": SizeField(("max_position_embeddings", "n_positions", "seq_length"), default=0),
}
"""Sizes of every family. ``positions`` 0 means that the file does not say, and no parameter depends on it."""

DENSE_WIDTH = SizeField(("intermediate_size", "n_inner", "ffn_dim"))
ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation")


def parse_architecture(config: Mapping[str, Any] | Path) -> Architecture:
    """Return the architecture that a config describes.

    ``config`` is the parsed ``config.json``, the file, or the folder that holds it. Raises UserError, naming
    the field, for an unknown family, a missing field, or an invalid value.
    """
    if isinstance(config, Path):
        file = config / "config.json" if config.is_dir() else config
        return _parse(ConfigFields(load_config(file), str(file)))
    return _parse(ConfigFields(config, "config.json"))


def load_config(file: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Load the JSON object in ``file``.

    Raises UserError when the file cannot be read, is larger than ``max_bytes``, or is not a JSON object.
    """
    try:
        values = json.loads(read_bounded(file, max_bytes))
    except FileNotFoundError:
        raise config_problem(str(file), "the file does not exist") from None
    except OSError as error:
        raise config_problem(str(file), f"it cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise config_problem(str(file), "it is not JSON") from None
    if not isinstance(values, dict):
        raise config_problem(str(file), "it is not a JSON object")
    return values


def _parse(fields: ConfigFields) -> Architecture:
    model_type = fields.text(("model_type",))
    if model_type is None:
        raise fields.missing("model_type")
    with suppress(NotInTableError):
        if model_type in FAMILY:
            family = FAMILY[model_type]
            return _assemble(fields, model_type, family, family.base, read_sizes(family, fields))
        if model_type in COMPOSITE:
            return _parse_composite(fields, model_type)
    check_bounds(fields.values, fields.where)
    if (description := described.stored(fields.values)) is not None:
        return description.result()
    if (refusal := type_problem(fields)) is not None:
        raise refusal
    return read_outline(fields.values, fields.where)


def type_problem(fields: ConfigFields) -> UserError | None:
    """Return why the installed transformers loads no language model of a config's type; None if it may.

    The process that builds the model (:mod:`.described`) has the last word.
    """
    model_type = fields.text(("model_type",)) or ""
    types, generators = config_classes(), text_generators()
    if not types or not generators:
        return None
    if model_type in types:
        values = {**config_class(model_type).defaults, **fields.values}
        if model_type not in generators:
            reason = "for which transformers has no class that does"
        elif values.get("is_encoder_decoder") is True:
            reason = "which has an encoder next to its decoder"
        elif is_encoder(model_type) and values.get("is_decoder") is not True:
            reason = "an encoder, whose tokens see those after them"
        else:
            return None
        return UserError(
            "This model does not generate text",
            what=f"{fields.where}: model_type is {model_type!r}, {reason}.",
            why="Fine-tuning here needs a causal language model, with its output head.",
            fix="Choose a model that continues text, such as Qwen, Llama or Gemma.",
        )
    close_matches = difflib.get_close_matches(model_type, sorted(generators), n=1, cutoff=0.75)
    return UserError(
        "Model type unknown to transformers",
        what=f"{fields.where}: model_type is {model_type!r}.",
        why=f"The installed transformers {described.library_version()} has no model of this type.",
        fix=(f"The closest type it has is {close_matches[0]!r}. " if close_matches else "")
        + f"If the model is newer, upgrade with `{install_command('transformers')}`.",
    )


def _parse_composite(fields: ConfigFields, model_type: str) -> Architecture:
    composite = COMPOSITE[model_type]
    family = FAMILY[composite.text]
    text = fields.child("text_config")
    sizes = read_sizes(family, text)
    if composite.tied is not None:
        family = dataclasses.replace(family, tied=fields.flag("tie_word_embeddings", composite.tied))
        text = ConfigFields({k: v for k, v in text.values.items() if k != "tie_word_embeddings"}, text.where)
    if fields.values.get("audio_config") is not None:
        raise NotInTableError
    architecture = _assemble(fields, model_type, family, composite.base, sizes, text)
    if composite.tower is None or fields.values.get("vision_config") is None:
        return architecture
    tower = composite.tower
    vision = fields.child("vision_config")
    vision_sizes = {**read_sizes(tower, vision), "text_hidden": sizes["hidden"]}
    expanded = expand(tower, tower.base, vision_sizes, _layers(tower, vision, vision_sizes), vision=True)
    return msgspec.structs.replace(
        architecture,
        modules=(*architecture.modules, *expanded.modules),
        parameters=(*architecture.parameters, *expanded.parameters),
    )


def read_sizes(family: Family, fields: ConfigFields) -> dict[str, int]:
    """Read the sizes and flags that the tables of ``family`` use. Raises UserError naming an invalid
    field."""
    size_fields = {**COMMON_SIZES, **_dense_width(family), **family.sizes}
    sizes: dict[str, int] = {}
    for name, size in size_fields.items():
        sizes[name] = _read_size(fields, size, sizes)
    for flag, default in family.flags.items():
        sizes[flag] = int(fields.flag(flag, default))
    if family.adjust:
        family.adjust(fields, sizes)
    sizes["q"] = sizes["heads"] * sizes["head_dim"]
    sizes["kv"] = sizes["kv_heads"] * sizes["head_dim"]
    return sizes


def _dense_width(family: Family) -> dict[str, SizeField]:
    used = any("inner" in _width_names(entry) for entry in family.layer)
    return {"inner": DENSE_WIDTH} if used else {}


def _width_names(entry: object) -> set[str]:
    text = f"{getattr(entry, 'fan_in', '')}+{getattr(entry, 'fan_out', '')}"
    return set(text.replace("*", "+").split("+"))


def _read_size(fields: ConfigFields, size: SizeField, sizes: dict[str, int]) -> int:
    value = fields.size(size.keys, minimum=size.minimum) if size.keys else None
    if value is not None:
        return value
    default = size.default
    if size.null_value is not None and fields.first(size.keys) is not None:
        default = size.null_value
    if default is None:
        raise fields.missing(size.keys[0])
    if isinstance(default, int):
        return default
    if default == "hidden_per_head" and sizes["hidden"] % sizes["heads"]:
        raise config_problem(
            fields.where,
            f"hidden_size {sizes['hidden']} is not a multiple of num_attention_heads {sizes['heads']}"
            " and there is no head_dim",
        )
    return evaluate(default, {**sizes, "hidden_per_head": sizes["hidden"] // sizes["heads"]})


def _layers(family: Family, fields: ConfigFields, sizes: Sizes) -> list[Sizes]:
    return family.per_layer(fields, sizes) if family.per_layer else [{}] * sizes["layers"]


def _assemble(
    outer: ConfigFields,
    model_type: str,
    family: Family,
    base: str,
    sizes: dict[str, int],
    text: ConfigFields | None = None,
) -> Architecture:
    """Build the architecture. ``outer`` is the whole file; ``text`` the nested config of the language model,
    if any."""
    fields = text or outer
    sizes["hidden_per_head"] = sizes["hidden"] // sizes["heads"]
    expanded = expand(family, base, sizes, _layers(family, fields, sizes))
    tied = fields.flag("tie_word_embeddings", family.tied)
    dense = any(module.part == "mlp" for module in expanded.modules)
    return Architecture(
        model_type=model_type,
        layers=sizes["layers"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["inner"] if dense else None,
        heads=sizes["heads"],
        kv_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        vocab_size=sizes["vocab"],
        max_positions=sizes["positions"] or None,
        tied_head=tied,
        activation=fields.text(ACTIVATIONS) or family.activation,
        gated=family.gated,
        residual_dropout=_residual_dropout(fields, family),
        attention_dropout=_attention_dropout(fields, family),
        final_logit_softcapping=_softcap(fields, family, "final_logit_softcapping", 30.0),
        logit_scale=_logit_scale(fields, family),
        dtype=_dtype(fields) or _dtype(outer),
        quantized_as=_quantized_as(outer),
        experts=_experts(sizes, family),
        modules=tuple(expanded.modules),
        embeddings=embeddings(family, base, sizes),
        head=OutputHead(
            family.head.name,
            evaluate(family.head.fan_in, sizes),
            sizes["vocab"],
            bool(family.head.bias),
            tied,
        ),
        parameters=tuple(expanded.parameters),
        attention_softcap=_softcap(fields, family, "attn_logit_softcapping", 50.0) is not None,
        own_attention=family.own_attention,
        own_norms=family.own_norms,
    )


_DROPOUT_KEYS = {
    "gpt2": "resid_pdrop",
    "gpt_bigcode": "resid_pdrop",
    "opt": "dropout",
    "phi": "resid_pdrop",
    "seed_oss": "residual_dropout",
    "starcoder2": "residual_dropout",
}
_DEFAULT_DROPOUT_0_1 = ("gpt2", "gpt_bigcode", "opt", "seed_oss")


def _residual_dropout(fields: ConfigFields, family: Family) -> float:
    """Return ``resid_pdrop``, ``dropout`` (OPT) or ``hidden_dropout``; GPT-2 and OPT default to 0.1."""
    key = _DROPOUT_KEYS.get(family.model_types[0], "hidden_dropout")
    return _probability(fields, key, 0.1 if family.model_types[0] in _DEFAULT_DROPOUT_0_1 else 0.0)


def _attention_dropout(fields: ConfigFields, family: Family) -> float:
    """Return ``attn_pdrop`` (GPT-2) or ``attention_dropout``, whose default is 0.1 in three families."""
    name = family.model_types[0]
    key = "attn_pdrop" if name in ("gpt2", "gpt_bigcode") else "attention_dropout"
    return _probability(fields, key, 0.1 if name in ("gpt2", "gpt_bigcode", "seed_oss") else 0.0)


def _probability(fields: ConfigFields, key: str, default: float) -> float:
    value = fields.values.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise fields.invalid(key, "a number from 0 up to 1")
    return float(value)


def _softcap(fields: ConfigFields, family: Family, key: str, default: float) -> float | None:
    """Return the cap of Gemma's ``cap · tanh(x / cap)``, for which only the second generation has a class
    default."""
    if "gemma2" in family.model_types and key not in fields.values:
        return default
    return fields.number(key)


def _logit_scale(fields: ConfigFields, family: Family) -> float | None:
    """Return the logit factor: Cohere multiplies by ``logit_scale``, Granite divides by its own."""
    if family.model_types[0] in ("cohere", "cohere2"):
        return fields.number("logit_scale") or 0.0625
    if family.model_types[0] in ("granite", "granitemoe"):
        return 1.0 / (fields.number("logits_scaling") or 1.0)
    return None


def _dtype(fields: ConfigFields) -> str | None:
    name = fields.text(("dtype", "torch_dtype"))
    return name.removeprefix("torch.") if name else None


def _quantized_as(fields: ConfigFields) -> str | None:
    if fields.values.get("quantization_config") is None:
        return None
    return fields.child("quantization_config").text(("quant_method",)) or "an unnamed method"


def _experts(sizes: Sizes, family: Family) -> Experts | None:
    if not sizes.get("experts"):
        return None
    return Experts(
        sizes["experts"], sizes["per_token"], sizes["expert_inner"], sizes.get("shared_inner") or None
    )
