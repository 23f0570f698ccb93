"""Files of a tokenizer in a model folder, as transformers reads them.

``tokenizer_config.json`` and ``special_tokens_map.json`` name the special tokens; the chat template is in any
of four places; tokens may be missing from ``tokenizer.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from qlora_tui.catalog.config_parser import MAX_CONFIG_BYTES
from qlora_tui.catalog.model_validation import TOOL_TEMPLATE
from qlora_tui.data.tokenizer_guard import panics_as_errors
from qlora_tui.errors import UserError
from qlora_tui.foreign_files import read_bounded

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty without the file. Raises ``UserError``."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_bounded(path, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(
            "Broken tokenizer",
            what=f"{path} is not valid JSON: {error}.",
            fix="Download the model's tokenizer files again.",
        ) from error
    return value if isinstance(value, dict) else {}


def special_tokens_by_name(config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, str]:
    """Return special tokens by name, from ``tokenizer_config.json``, else ``special_tokens_map.json``."""
    extra = config.get("extra_special_tokens")
    named = {**older, **config, **(extra if isinstance(extra, dict) else {})}
    wanted = {f"{role}_token" for role in _ROLES} | (extra.keys() if isinstance(extra, dict) else set())
    tokens = {}
    for name in wanted & named.keys():
        token = named[name]
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def own_templates(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the folder's template, and the one for conversations with tools; each empty if missing."""
    path = folder / "chat_template.jinja"
    named: dict[str, str] = {}
    held = config.get("chat_template")
    if isinstance(held, str):
        named["default"] = held
    elif isinstance(held, list):
        named.update(
            (part["name"], part["template"])
            for part in held
            if isinstance(part, dict)
            and isinstance(part.get("name"), str)
            and isinstance(part.get("template"), str)
        )
    if not named:
        processor = read_json_object(folder / "chat_template.json").get("chat_template")
        if isinstance(processor, str):
            named["default"] = processor
    if path.is_file():
        named = {"default": _template_text(path)}  # in transformers it replaces those in the config
    tool_path = folder / TOOL_TEMPLATE
    if tool_path.is_file():
        named["tool_use"] = _template_text(tool_path)
    return named.get("default", ""), named.get("tool_use", "") if named.get("default") else ""


def _template_text(path: Path) -> str:
    try:
        return read_bounded(path, MAX_CONFIG_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "Broken chat template",
            what=f"{path} cannot be read: {error}.",
            fix="Download the model's tokenizer files again.",
        ) from error


def with_declared_tokens(tokenizer_json: str, config: Mapping[str, Any]) -> str:
    """Add the tokens that only ``tokenizer_config.json`` declares, as transformers does."""
    declared = config.get("added_tokens_decoder")
    if not isinstance(declared, dict):
        return tokenizer_json
    with panics_as_errors():
        backend = Tokenizer.from_str(tokenizer_json)
    have = backend.get_added_tokens_decoder()
    missing = [
        AddedToken(
            token["content"],
            single_word=bool(token.get("single_word")),
            lstrip=bool(token.get("lstrip")),
            rstrip=bool(token.get("rstrip")),
            normalized=bool(token.get("normalized", not token.get("special"))),
            special=bool(token.get("special")),
        )
        for number, token in sorted(declared.items(), key=lambda item: int(item[0]))
        if isinstance(token, dict) and int(number) not in have
    ]
    if not missing:
        return tokenizer_json
    backend.add_tokens(missing)
    return backend.to_str()
