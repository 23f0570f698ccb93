"""Traces a few layers of each kind, and repeats their allocations for the other layers.

The layers of a model are all equal, or a few kinds of layers alternate with a fixed period. For example, 48
equal layers have a period of one, and three layers of another mixer followed by one of full attention have a
period of four. Therefore a model of only four periods is built and run, and the events of its second period
are repeated for the periods that were left out. If the events of the second and the third period are not all
equal, :func:`repeat_step` returns None, and the whole model is traced.

A layer may free storages of its own or of neighboring layers. A copy of the layer frees the same storages of
the layers at the same distances.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.memory.allocator import Event
from qlora_tui.memory.recording import Mark, MicroStep
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.targets import rank_of, resolve_targets
from qlora_tui.training.model_class import read_config

LONGEST_PERIOD = 12
PERIODS = 4
"""Number of traced periods: the first and the last, whose neighbors differ from those of the other periods,
and two to compare.
"""
LEAST_SAVED = 4
"""Minimum number of layers that a repetition must save."""
T = TypeVar("T")


@dataclass(frozen=True)
class Repetition:
    """A shortened model of ``built`` layers. The ``period`` layers that begin with layer ``first`` are
    repeated in the whole model.
    """

    built: int
    first: int
    period: int
    times: int
    """Number of additional copies of the period in the whole model."""

    @property
    def added(self) -> int:
        """Number of layers that the whole model has in addition to the built ones."""
        return self.times * self.period

    def repeats(self, layer: int | None) -> bool:
        """Return whether a built layer is repeated in the whole model."""
        return layer is not None and self.first <= layer < self.first + self.period

    def source(self, layer: int) -> int:
        """Return the built layer that a layer of the whole model is a copy of."""
        end = self.first + self.period
        if layer < end:
            return layer
        if layer < end + self.added:
            return self.first + (layer - self.first) % self.period
        return layer - self.added

    def place(self, layer: int) -> int:
        """Return the index that a built layer has in the whole model."""
        return layer if layer < self.first + self.period else layer + self.added

    def spread(
        self, values: Sequence[T], layer_of: Callable[[T], int | None], moved: Callable[[T, int], T]
    ) -> list[T]:
        """Return ``values`` extended to the whole model: the values of a repeated layer are copied for each
        copy of the layer.

        ``values`` are in the order of the layers. ``moved`` returns a copy of a value for the layer with the
        given index.
        """
        end = self.first + self.period
        start = next((at for at, value in enumerate(values) if (layer_of(value) or 0) >= end), len(values))
        result = list(values[:start])
        once = [value for value in values if self.repeats(layer_of(value))]
        for copy in range(1, self.times + 1):
            result += [moved(value, (layer_of(value) or 0) + copy * self.period) for value in once]
        for value in values[start:]:
            layer = layer_of(value)
            result.append(value if layer is None else moved(value, self.place(layer)))
        return result


def find_repetition(kinds: Sequence[Hashable]) -> Repetition | None:
    """Return the repetition that builds the fewest layers; None if none is worthwhile."""
    best: Repetition | None = None
    count = len(kinds)
    for period in range(1, LONGEST_PERIOD + 1):
        start = count - period
        while start > 0 and kinds[start - 1] == kinds[start - 1 + period]:
            start -= 1
        built = start + PERIODS * period + (count - start) % period
        saved = count - built
        if saved >= LEAST_SAVED and (best is None or built < best.built):
            best = Repetition(built, start + period, period, saved // period)
    return best


def layer_kinds(values: Mapping[str, Any], architecture: Architecture, recipe: Recipe) -> list[Hashable]:
    """Return the kind of each layer: its modules with their ranks, its parameters, and its settings."""
    ranks = {m.name: rank_of(recipe.lora, m) for m in resolve_targets(recipe.lora, architecture.targets)}
    kinds: list[list[Hashable]] = [[] for _ in range(architecture.layers)]
    for module in (*architecture.modules, *architecture.expert_modules):
        if module.layer is not None and module.part != "vision":
            shape = (module.in_features, module.out_features, module.bias, module.quantizable)
            kinds[module.layer].append((module.kind, module.part, *shape, ranks.get(module.name, 0)))
    for parameter in architecture.parameters:
        if parameter.layer is not None and parameter.role != "vision":
            kinds[parameter.layer].append((parameter.role, parameter.shape))
    text = read_config(values).get_text_config()
    for _, setting in _layer_settings(text, architecture.layers):
        for kind, value in zip(kinds, setting, strict=True):
            kind.append(repr(value))
    return [tuple(kind) for kind in kinds]


def shortened(values: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return a config with only the first ``layers`` layers."""
    config = read_config(values)
    text = config.get_text_config()
    settings = list(_layer_settings(text, text.num_hidden_layers))
    text.num_hidden_layers = layers
    for name, setting in settings:
        setattr(text, name, setting[:layers])
    short: dict[str, Any] = config.to_dict()
    return short


def _layer_settings(text: Any, layers: int) -> Iterable[tuple[str, list[Any]]]:
    """Yield the settings that have a value for each layer."""
    for name, value in sorted(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            yield name, value


Key = tuple[str, int, int]
"""A storage: the part of the step that allocates it, this part's layer (-1 if outside layers), and the index
of the storage among the part's allocations.
"""


def repeat_step(step: MicroStep, repetition: Repetition) -> MicroStep | None:
    """Return the micro-step of the whole model; None if the layers' events do not repeat."""
    parts = _parts(step)
    keys = {
        number: (*part, place)
        for part, (_, events) in parts.items()
        for place, number in enumerate(number for number, size in events if size > 0)
    }
    near: set[tuple[str, str, int]] = set()
    for layer in range(repetition.first, repetition.first + repetition.period):
        for kind in ("forward", "backward"):
            pair = [
                _relative(parts.get((kind, each), (None, ()))[1], each, keys)
                for each in (layer, layer + repetition.period)
            ]
            if not pair[0] or pair[0] != pair[1]:
                return None
            near.update((kind, part, away) for part, away, _, _ in pair[0] if away is not None)
    try:
        return _Writer(step, repetition, keys, near).write(parts)
    except KeyError:  # a storage that lives longer than in the neighboring layers
        return None


_Part = tuple[str, int]


def _parts(step: MicroStep) -> dict[_Part, tuple[Mark, Sequence[Event]]]:
    """Return the events of each part of the step, in order."""
    parts: dict[_Part, tuple[Mark, Sequence[Event]]] = {}
    ends = [mark.at for mark in step.marks[1:]] + [len(step.events)]
    for mark, end in zip(step.marks, ends, strict=True):
        before, _, number = mark.name.rpartition(" of layer ")
        part = (mark.phase, int(number)) if before else (mark.name, -1)
        parts[part] = mark, step.events[mark.at : end]
    return parts


def _relative(
    events: Sequence[Event], layer: int, keys: Mapping[int, Key]
) -> list[tuple[str, int | None, int, int]]:
    """Identify the storage of each event relative to ``layer``. Return (part that allocates the storage,
    distance in layers, number within the part, size); the distance is None outside layers.
    """
    relative: list[tuple[str, int | None, int, int]] = []
    for number, size in events:
        part, of_layer, place = keys[number]
        relative.append((part, of_layer - layer if of_layer >= 0 else None, place, size))
    return relative


class _Writer:
    """Writes the events of the whole model, with new storage numbers."""

    def __init__(
        self,
        step: MicroStep,
        repetition: Repetition,
        keys: Mapping[int, Key],
        near: Collection[tuple[str, str, int]],
    ) -> None:
        """Start with an empty step. ``near`` identifies the storages that the parts of a layer allocate or
        free. Each entry has the part, the part that allocates the storage, and the distance in layers between
        the two.
        """
        self._step, self._repetition, self._keys, self._near = step, repetition, keys, near
        self._events: list[Event] = []
        self._items = [""]
        self._marks: list[Mark] = []
        self._alive: dict[Key, int] = {}
        """Numbers of the live storages, by their key with the layer index in the whole model."""
        self._gradients: set[int] = set()
        self._backward_at = 0

    def write(self, parts: Mapping[_Part, tuple[Mark, Sequence[Event]]]) -> MicroStep | None:
        repetition = self._repetition
        count = repetition.built + repetition.added
        written: set[str] = set()
        for (kind, layer), (mark, _) in parts.items():
            if layer < 0:
                self._write_part(parts, mark, (kind, layer), layer)
            elif kind not in written:
                written.add(kind)
                for whole in range(count) if kind == "forward" else range(count - 1, -1, -1):
                    self._write_part(parts, mark, (kind, repetition.source(whole)), whole)
        left = set(self._alive.values()) - self._gradients
        lasting = {number for number in left if self._items[number] != "adapter"}
        if lasting:
            return None
        return MicroStep(
            tuple(self._events),
            self._items,
            tuple(self._marks),
            self._backward_at,
            frozenset(self._gradients),
        )

    def _write_part(
        self, parts: Mapping[_Part, tuple[Mark, Sequence[Event]]], mark: Mark, part: _Part, whole: int
    ) -> None:
        if mark.name == "loss backward":
            self._backward_at = len(self._events)
        name = f"{mark.name.rpartition(' of layer ')[0]} of layer {whole}" if whole >= 0 else mark.name
        self._marks.append(Mark(mark.phase, name, len(self._events)))
        for number, size in parts[part][1]:
            if size > 0:
                self._allocate(number, size, whole)
            else:
                self._free(number, size, part, whole)

    def _allocate(self, number: int, size: int, whole: int) -> None:
        kind, layer, place = self._keys[number]
        copies = [whole]
        if layer < 0 and self._repetition.repeats(self._step.layers.get(number)):
            # A layer's storage that is allocated before the layers.
            copies = [-1 - copy for copy in range(self._repetition.times + 1)]
        for copy in copies:
            new = len(self._items)
            self._items.append(self._step.items[number])
            self._events.append((new, size))
            self._alive[kind, copy, place] = new
            if number in self._step.gradients:
                self._gradients.add(new)

    def _free(self, number: int, size: int, part: _Part, whole: int) -> None:
        repetition, (kind, of_layer, place) = self._repetition, self._keys[number]
        if of_layer < 0:
            copies = [-1]
        elif (part[0], kind, of_layer - part[1]) in self._near:
            copies = [whole + of_layer - part[1]]
        else:  # storages that live until the end in every layer
            copies = [repetition.place(of_layer)]
            if repetition.repeats(of_layer):
                copies += [of_layer + copy * repetition.period for copy in range(1, repetition.times + 1)]
        for copy in copies:
            self._events.append((self._alive.pop((kind, copy, place)), size))
