"""Parses and writes ``lora.target_modules``: the linear modules that LoRA adapts, and their ranks.

A pattern is one of

* ``all-linear``: every linear module of the language model except the head;
* a kind, the last part of a module's name: ``q_proj``;
* a projection of all routed experts of a layer: ``experts.gate_up_proj``, ``experts.down_proj``, which
  ``all-linear`` does not include;
* any of these in some layers, counted from 0: ``8-23.q_proj``, ``0-3,7.all-linear``;
* the full dotted name of a single module.

Modules of a vision tower are matched only by their full name, because fine-tuning on text gives them no
gradient, and their layers are numbered separately.

The LoRA screen turns check boxes into patterns (:func:`to_patterns`) and back (:func:`match_modules`).
Memory estimates and training use :func:`resolve_targets`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import Protocol, TypeVar

from msgspec import Struct

from qlora_tui.errors import UsageError, UserError
from qlora_tui.formatting import capitalize
from qlora_tui.recipe.aliases import did_you_mean
from qlora_tui.recipe.schema import ALL_LINEAR, Lora

SETTINGS = ("lora.target_modules", "lora.rank_pattern", "lora.alpha_pattern")
"""Settings of the adapter that hold patterns."""
SKIP = "quantization.skip"
"""Setting whose patterns select modules that stay in 16 bits."""
_SYNTAX = "write all-linear, a module name (q_proj), layers and a name (8-23.q_proj), or a full module path"

_PATTERN = re.compile(
    r"(?:(?P<layers>\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)\.(?P<in_layers>(?:experts\.)?[A-Za-z_][\w-]*)"
    r"|(?P<kind>(?:experts\.)?[A-Za-z_][\w-]*)"
    r"|(?P<name>[A-Za-z_][\w-]*(?:\.[\w-]+)+))"
)
_ONLY_LAYERS = re.compile(r"\s*\d+(?:-\d+)?\s*")


class Module(Protocol):
    """The attributes that a pattern matches, as in ``catalog.architecture_types.LinearModule``."""

    @property
    def name(self) -> str:
        """Full dotted name: ``model.layers.0.self_attn.q_proj``."""

    @property
    def kind(self) -> str:
        """The last part of the name; for projections of experts, preceded by ``experts.``."""

    @property
    def layer(self) -> int | None:
        """Layer number from 0; None outside layers."""

    @property
    def part(self) -> str:
        """``vision`` for a module of a vision tower, ``expert`` for a projection of routed experts.

        Any other value is a linear module of the language model.
        """


ModuleT = TypeVar("ModuleT", bound=Module)
NumberT = TypeVar("NumberT", int, float)


class _Pattern(Struct, frozen=True):
    kind: str = ""
    """A kind or ``all-linear``; empty for a single module by name."""
    layers: tuple[tuple[int, int], ...] = ()
    """First and last layer of each range; empty for every layer."""
    name: str = ""

    def matches(self, module: Module) -> bool:
        if self.name:
            return module.name == self.name
        if module.part == "vision" or self.kind not in _kinds_of(module):
            return False
        if not self.layers:
            return True
        layer = module.layer
        return layer is not None and any(first <= layer <= last for first, last in self.layers)


def _kinds_of(module: Module) -> tuple[str, ...]:
    return (module.kind,) if module.part == "expert" else (ALL_LINEAR, module.kind)


class _PatternError(Exception):
    def __init__(self, message: str, hint: str):
        super().__init__(message)
        self.message = message
        self.hint = hint


def syntax_error(pattern: str) -> tuple[str, str] | None:
    """Return the error in a pattern, regardless of model, and the fix; None if the pattern parses."""
    try:
        _parse(pattern)
    except _PatternError as error:
        return error.message, error.hint
    return None


def matches(patterns: Iterable[str], module: Module) -> bool:
    """Return whether any of the patterns matches the module. Patterns of a valid recipe always parse."""
    return any(_parse(pattern).matches(module) for pattern in patterns)


def match_modules(
    patterns: Iterable[str], modules: Sequence[ModuleT], setting: str = SETTINGS[0]
) -> list[ModuleT]:
    """Return the modules that the patterns match, in the model's order.

    Raises UserError if a pattern matches nothing, such as an unknown name or layers that the model lacks.
    """
    parsed = [_parse_matching(pattern, modules, setting) for pattern in patterns]
    return [module for module in modules if any(pattern.matches(module) for pattern in parsed)]


def resolve_targets(lora: Lora, modules: Sequence[ModuleT]) -> list[ModuleT]:
    """Return the modules that get an adapter.

    Raises UserError if a pattern of targets, ranks or alphas matches nothing. Also raises UserError if
    experts are selected and dropout or DoRA is set, which peft does not support for experts.
    """
    for setting, patterns in zip(SETTINGS[1:], ([*lora.rank_pattern], [*lora.alpha_pattern]), strict=True):
        for pattern in patterns:
            _parse_matching(pattern, modules, setting)
    targets = match_modules(lora.target_modules, modules)
    if any(module.part == "expert" for module in targets):
        _check_settings_of_experts(lora)
    return targets


def _check_settings_of_experts(lora: Lora) -> None:
    for setting, applies in {"lora.dropout": lora.dropout > 0, "lora.use_dora": lora.use_dora}.items():
        if applies:
            raise UsageError(
                "Not for experts",
                what=f"{setting} is set, and lora.target_modules names experts.",
                why="peft has neither dropout nor DoRA for the parameters that hold all experts of a layer.",
                fix=f"Set {setting} = {'0' if setting == 'lora.dropout' else 'false'}, or target no experts.",
            )


def rank_of(lora: Lora, module: Module) -> int:
    """Return the rank that a module's adapter would have, whether or not the module is a target."""
    return _pattern_value(lora.rank_pattern, lora.rank, module)


def format_rank(lora: Lora) -> str:
    """Return ``r16``, or ``r8-32`` if patterns set other ranks."""
    ranks = {lora.rank, *lora.rank_pattern.values()}
    return f"r{lora.rank}" if len(ranks) == 1 else f"r{min(ranks)}-{max(ranks)}"


def alpha_of(lora: Lora, module: Module) -> float:
    """Return the alpha that a module's adapter would have, whether or not the module is a target."""
    return _pattern_value(lora.alpha_pattern, lora.alpha, module)


def _pattern_value(table: dict[str, NumberT], default: NumberT, module: Module) -> NumberT:
    return next((table[pattern] for pattern in reversed(table) if _parse(pattern).matches(module)), default)


def assign_pattern_values(
    table: dict[str, NumberT],
    default: NumberT,
    names: Collection[str],
    number: NumberT,
    modules: Sequence[Module],
) -> dict[str, NumberT]:
    """Return a table of short patterns: ``number`` for the named modules, the values of ``table`` for others.

    ``default`` is the value of a module without a pattern.
    """
    numbers = {m.name: number if m.name in names else _pattern_value(table, default, m) for m in modules}
    return {
        pattern: other
        for other in dict.fromkeys(numbers.values())
        if other != default
        for pattern in to_patterns([name for name, has in numbers.items() if has == other], modules)
    }


def _parse_matching(text: str, modules: Sequence[Module], setting: str) -> _Pattern:
    pattern = _parse(text)
    if not any(pattern.matches(module) for module in modules):
        raise _no_match_error(text, pattern, modules, setting)
    return pattern


def to_patterns(selected_names: Iterable[str], modules: Sequence[Module]) -> tuple[str, ...]:
    """Return short patterns that select exactly the named modules; empty if none is named.

    Whole kinds, and ranges of layers of a kind, become one pattern each. Full names are written only for
    modules of a vision tower, for modules outside layers, and for modules that share kind and layer with an
    unselected module. Returns the shorter of two forms: with and without ``all-linear`` for the layers that
    are selected completely.
    """
    chosen = set(selected_names)
    language = [module for module in modules if module.part not in ("vision", "expert")]
    experts = _Grid([module for module in modules if module.part == "expert"], chosen)
    vision = tuple(m.name for m in modules if m.part == "vision" and m.name in chosen)
    others = experts.patterns(frozenset()) + vision
    if language and all(module.name in chosen for module in language):
        return (ALL_LINEAR, *others)
    grid = _Grid(language, chosen)
    candidates = [grid.patterns(frozenset()), grid.patterns(grid.whole_layers)]
    return min(candidates, key=lambda patterns: (len(patterns), sum(map(len, patterns)))) + others


def split_patterns(text: str) -> list[str]:
    """Split a list of patterns at commas, except between layers: ``0-3,7.q_proj,k_proj`` has two items."""
    patterns: list[str] = []
    for piece in text.split(","):
        if patterns and _ONLY_LAYERS.fullmatch(patterns[-1].rpartition(",")[2]):
            patterns[-1] += "," + piece.strip()
        else:
            patterns.append(piece.strip())
    return patterns


class _Grid:
    """Modules in a grid with a cell for each kind and layer, and which cells are completely selected."""

    def __init__(self, modules: Sequence[Module], chosen: set[str]):
        self._cells: dict[str, dict[int | None, list[Module]]] = {}
        for module in modules:
            self._cells.setdefault(module.kind, {}).setdefault(module.layer, []).append(module)
        self._chosen = chosen
        self._full = {
            kind: {layer for layer, cell in row.items() if all(m.name in chosen for m in cell)}
            for kind, row in self._cells.items()
        }
        self._layers = sorted({m.layer for m in modules if m.layer is not None})
        broken = {module.layer for module in modules if module.name not in chosen}
        self.whole_layers = frozenset(set(self._layers) - broken)

    def patterns(self, covered: frozenset[int]) -> tuple[str, ...]:
        """Return patterns for the selection; one ``all-linear`` covers the layers in ``covered``."""
        patterns = [f"{_format_ranges(covered, self._layers)}.{ALL_LINEAR}"] if covered else []
        for kind, row in self._cells.items():
            full = self._full[kind]
            uncovered = full - covered
            if uncovered and len(full) == len(row):
                patterns.append(kind)
            elif uncovered:
                patterns += self._layer_patterns(kind, full, uncovered)
            for layer, cell in row.items():
                if layer not in full:
                    patterns += [module.name for module in cell if module.name in self._chosen]
        return tuple(patterns)

    def _layer_patterns(self, kind: str, full: set[int | None], uncovered: set[int | None]) -> list[str]:
        """Return patterns for the selected modules of one kind: a range of layers, and the names of modules
        outside layers. The range has either the ``uncovered`` layers, which no other pattern matches yet, or
        all ``full`` layers, which are selected completely. The shorter range is used.
        """
        places = sorted(layer for layer in self._cells[kind] if layer is not None)
        patterns = [module.name for module in self._cells[kind][None]] if None in uncovered else []
        candidates = [
            _format_ranges({layer for layer in some if layer is not None}, places)
            for some in (uncovered, full)
        ]
        shortest = min(candidates, key=len)
        return [f"{shortest}.{kind}", *patterns] if shortest and uncovered != {None} else patterns


def _format_ranges(layers: Iterable[int], places: Sequence[int]) -> str:
    """Return the layers as ranges, such as ``0-3,7``. ``places``: numbers of all existing layers. A range may
    include numbers of layers that do not exist.
    """
    included = set(layers)
    ranges: list[list[int]] = []
    joined = False
    for place in places:
        if place in included and joined:
            ranges[-1][1] = place
        elif place in included:
            ranges.append([place, place])
        joined = place in included
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


@lru_cache(maxsize=4096)
def _parse(pattern: str) -> _Pattern:
    match = _PATTERN.fullmatch(pattern)
    if not match:
        raise _PatternError(f'"{pattern}" is not a target pattern', _SYNTAX)
    if match["name"]:
        return _Pattern(name=match["name"])
    if match["kind"]:
        return _Pattern(kind=match["kind"])
    return _Pattern(kind=match["in_layers"], layers=tuple(map(_parse_range, match["layers"].split(","))))


def _parse_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    run = (int(first), int(last or first))
    if run[0] > run[1]:
        raise _PatternError(f'layers "{text}" run backwards', f"write {last}-{first}")
    return run


def _no_match_error(text: str, pattern: _Pattern, modules: Sequence[Module], setting: str) -> UserError:
    title = "Unknown target module"
    if pattern.name:
        names = [module.name for module in modules]
        hint = did_you_mean(pattern.name, names) or "the LoRA screen lists its modules"
        return _problem(title, f"The model has no module {pattern.name}.", hint)
    language = [module for module in modules if module.part != "vision"]
    kinds = list(dict.fromkeys(module.kind for module in language))
    if pattern.kind not in (ALL_LINEAR, *kinds):
        prefix = text[: len(text) - len(pattern.kind)]
        hint = did_you_mean(pattern.kind, [*kinds, ALL_LINEAR], prefix + "{}")
        what = f'{setting} has "{text}", but the model has no {pattern.kind}.'
        return _problem(title, what, hint, why=f"The model's module kinds are {', '.join(kinds) or 'none'}.")
    layers = sorted({m.layer for m in language if m.layer is not None and pattern.kind in _kinds_of(m)})
    has = f"{pattern.kind} is in layers {_format_ranges(layers, layers)}."
    what = f'{setting} has "{text}", but the model has no such layers.'
    return _problem(title, what, _SYNTAX, why=has)


def _problem(title: str, what: str, hint: str, why: str = "") -> UserError:
    fix = capitalize(hint)
    return UsageError(title, what=what, why=why, fix=fix)
