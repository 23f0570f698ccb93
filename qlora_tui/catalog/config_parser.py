"""Converts a ``config.json`` to an ``Architecture``, usually in a few milliseconds, without weights or torch.

If a process has already read this architecture from transformers (:mod:`.described`), the stored result is
returned; otherwise, an outline is derived from the config's fields. If a field that the outline needs is
missing, such a process is started, which takes seconds. The estimate, the LoRA screen, the model list and the
trainer use this module.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_tui.catalog import described
from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_fields import (
    MISSING,
    ConfigFields,
    check_bounds,
    config_problem,
    no_text_generator,
    stored_as,
)
from qlora_tui.catalog.library_types import config_class, config_classes, is_encoder, text_generators
from qlora_tui.catalog.outline import read_outline
from qlora_tui.errors import UserError
from qlora_tui.files import read_bounded
from qlora_tui.installation import install_command

MAX_CONFIG_BYTES = 4 << 20
"""Maximum size of a config file in bytes.

Real config files have a few kilobytes; those that list all unquantized modules have up to a megabyte.
"""


def parse_architecture(config: Mapping[str, Any] | Path) -> Architecture:
    """Return the architecture that a config describes.

    ``config`` is the parsed ``config.json``, the file, or the folder that holds it. Raises UserError, naming
    the field, for an unknown type, a missing field, or an invalid value.
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
    except RecursionError:
        raise config_problem(str(file), "it is nested too deeply") from None
    except ValueError:
        raise config_problem(str(file), "it is not JSON") from None
    if not isinstance(values, dict):
        raise config_problem(str(file), "it is not a JSON object")
    return values


def _parse(fields: ConfigFields) -> Architecture:
    model_type = fields.text(("model_type",))
    if model_type is None:
        raise fields.missing("model_type")
    check_bounds(fields.values, fields.where)
    _check_stored(fields)
    if (description := described.stored(fields.values)) is not None:
        return description.result()
    if (refusal := type_problem(fields)) is not None:
        raise refusal
    try:
        return read_outline(fields.values, fields.where)
    except UserError as unclear:
        if unclear.code != MISSING or not config_classes():
            raise
        # The class has this field under another name, or explains why not. Few types need this process.
        return described.describe(fields.values)


def _check_stored(fields: ConfigFields) -> None:
    """Raise UserError if a config specifies the quantization of its weights in an unknown form."""
    method = stored_as(fields.values)
    if method is not None and not isinstance(method, str):
        raise fields.invalid("quantization_config", "an object with quant_method, the name of a method")


def type_problem(fields: ConfigFields) -> UserError | None:
    """Return why the installed transformers cannot load a config's type as a language model.

    None if no reason is found, or if the source of transformers cannot be read. The process that builds the
    model (:mod:`.described`) makes the final decision.
    """
    model_type = fields.text(("model_type",)) or ""
    types, generators = config_classes(), text_generators()
    if not types or not generators:
        return None
    if model_type in types:
        values = {**config_class(model_type).defaults, **fields.values}
        if model_type not in generators:
            reason = "for which transformers has no class that generates text"
        elif values.get("is_encoder_decoder") is True:
            reason = "which has an encoder next to its decoder"
        elif is_encoder(model_type) and values.get("is_decoder") is not True:
            reason = "an encoder, whose tokens attend to later ones"
        else:
            return None
        return no_text_generator(f"{fields.where}: model_type is {model_type!r}, {reason}")
    close_matches = difflib.get_close_matches(model_type, sorted(generators), n=1, cutoff=0.75)
    return UserError(
        "Model type unknown to transformers",
        what=f"{fields.where}: model_type is {model_type!r}.",
        why=f"The installed transformers {described.library_version()} has no model of this type.",
        fix=(f"The closest type it has is {close_matches[0]!r}. " if close_matches else "")
        + f"If the model is newer, upgrade with `{install_command('transformers')}`.",
    )
