"""Reads facts about a ``model_type`` from the source of the installed transformers, without importing it.

Importing transformers takes seconds; parsing the few files with its tables and the defaults of a config class
takes milliseconds. A file with an unexpected form gives no facts; a process that imports the library then
describes the model (:mod:`.described`).
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_GENERATES_TEXT = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
)
_MAX_DEPTH = 8
"""Maximum number of config classes in a chain of inheritance."""
_PARSER = threading.Lock()


@dataclass(frozen=True)
class ConfigClass:
    """A config class of transformers, as read from its source."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of keys that a ``config.json`` leaves out."""
    attribute_map: Mapping[str, str] = field(default_factory=dict)
    """The class's own name of each standard key, such as ``n_embd`` for ``hidden_size``."""
    modules: frozenset[str] = frozenset()
    """Modules in the class's plan for tensor parallelism, such as ``layers.*.self_attn.q_proj``."""
    text: str | None = None
    """``model_type`` of the language model's nested config if the file leaves it out."""


@lru_cache(maxsize=1)
def config_classes() -> Mapping[str, str]:
    """Return the name of the config class of every ``model_type``; empty if the source cannot be read."""
    names: dict[str, str] = {}
    for file in ("auto_mappings.py", "configuration_auto.py"):
        names |= _tables(file).get("CONFIG_MAPPING_NAMES", {})
    return names


@lru_cache(maxsize=1)
def text_generators() -> Mapping[str, frozenset[str]]:
    """Return the classes that generate text, for every ``model_type`` that has one."""
    tables = _tables("modeling_auto.py")
    classes: dict[str, frozenset[str]] = {}
    for table in _GENERATES_TEXT:
        for name, loaded in tables.get(table, {}).items():
            classes[name] = classes.get(name, frozenset()) | {loaded}
    return classes


def is_encoder(model_type: str) -> bool:
    """Return whether models of a type fill in masked tokens, and therefore attend to later tokens."""
    return model_type in _tables("modeling_auto.py").get("MODEL_FOR_MASKED_LM_MAPPING_NAMES", {})


@lru_cache(maxsize=64)
def config_class(model_type: str) -> ConfigClass:
    """Return the facts about a type's config class that the source states; empty if it cannot be read."""
    name = config_classes().get(model_type)
    modules = _tables("auto_mappings.py").get("SPECIAL_MODEL_TYPE_TO_MODULE_NAME", {})
    modules = modules | _tables("configuration_auto.py").get("SPECIAL_MODEL_TYPE_TO_MODULE_NAME", {})
    module = modules.get(model_type, model_type).replace("-", "_")
    return (
        _read_class(f"models/{module}/configuration_{module}.py", name, _MAX_DEPTH) if name else ConfigClass()
    )


@lru_cache(maxsize=4)
def _tables(file: str) -> dict[str, dict[str, str]]:
    """Return the string tables in a file of ``transformers/models/auto``, keyed by their name."""
    tables: dict[str, dict[str, str]] = {}
    for node in _body(f"models/auto/{file}"):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
        elif (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Attribute)
            and isinstance(node.value.func.value, ast.Name)
            and node.value.func.attr == "update"
        ):
            name, value = node.value.func.value.id, node.value
        else:
            continue
        tables[name] = tables.get(name, {}) | dict(_entries(value))
    return tables


def _entries(value: ast.expr) -> Iterator[tuple[str, str]]:
    """Yield the literal entries of a table, which are pairs or a dict."""
    for node in ast.walk(value):
        if isinstance(node, ast.Tuple) and len(node.elts) == 2:
            pairs = [(node.elts[0], node.elts[1])]
        elif isinstance(node, ast.Dict):
            pairs = [(key, each) for key, each in zip(node.keys, node.values, strict=True) if key is not None]
        else:
            continue
        for key, each in pairs:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                named = each.elts[0] if isinstance(each, ast.Tuple) and each.elts else each
                yield key.value, str(getattr(named, "value", ""))


def _read_class(path: str, name: str, depth: int) -> ConfigClass:
    body = _body(path)
    found = next((node for node in body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if found is None or not depth:
        return ConfigClass()
    origins = {
        alias.asname or alias.name: (node.module or "", node.level)
        for node in body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    defaults: dict[str, Any] = {}
    attribute_map: dict[str, str] = {}
    modules: frozenset[str] = frozenset()
    text: str | None = None
    for base in found.bases:
        if isinstance(base, ast.Name):
            module, level = origins.get(base.id, ("", 0))
            file = f"models/{module.replace('.', '/')}.py" if level == 2 else path
            inherited = _read_class(file, base.id, depth - 1)
            defaults |= inherited.defaults
            attribute_map |= inherited.attribute_map
            modules, text = inherited.modules, inherited.text
    for node in found.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if not isinstance(target, ast.Name) or not isinstance(value, ast.expr):
            continue
        if target.id in ("sub_configs", "sub_configs_defaults"):
            text = _text_type(value, body) or text
            continue
        try:
            literal = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, RecursionError):
            continue
        if target.id == "attribute_map" and isinstance(literal, dict):
            attribute_map |= literal
        elif target.id == "base_model_tp_plan" and isinstance(literal, dict):
            modules = frozenset(literal)
        elif isinstance(node, ast.AnnAssign):
            defaults[target.id] = literal
    return ConfigClass(defaults, attribute_map, modules, text)


def _text_type(sub_configs: ast.expr, body: list[ast.stmt]) -> str | None:
    """Return the ``model_type`` of ``text_config`` in a class's table of nested configs."""
    for node in ast.walk(sub_configs):
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant) or key.value != "text_config":
                continue
            if isinstance(value, ast.Call):
                named = [each.value for each in value.keywords if each.arg == "model_type"]
                return str(named[0].value) if named and isinstance(named[0], ast.Constant) else None
            classes = [each for each in body if isinstance(each, ast.ClassDef)]
            found = [each for each in classes if isinstance(value, ast.Name) and each.name == value.id]
            for each in found[0].body if found else ():
                if isinstance(each, ast.Assign) and getattr(each.targets[0], "id", "") == "model_type":
                    return str(getattr(each.value, "value", ""))
    return None


def parse_source(source: str | bytes) -> ast.Module:
    """Parse Python source, one thread at a time.

    CPython 3.11 counts the depth of the trees of all threads together, and raises SystemError if a garbage
    collection lets another thread parse in between.
    """
    with _PARSER:
        return ast.parse(source)


@lru_cache(maxsize=16)
def _body(path: str) -> list[ast.stmt]:
    """Return the statements of a file of transformers; empty if it is not installed or cannot be parsed."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return []
    try:
        return parse_source((Path(spec.origin).parent / path).read_bytes()).body
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return []
