"""Random recipes and models, for the property tests."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import Struct

from qlora_tui.recipe.fields import Field, fields, source_fields
from qlora_tui.recipe.schema import Recipe, Source


class SomeModule(Struct, frozen=True):
    """A linear module, as ``targets`` looks at one."""

    name: str
    kind: str
    layer: int | None
    part: str = "other"


KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "c_proj"]

kinds = st.sampled_from(KINDS)
_run = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda run: f"{min(run)}-{max(run)}")
_layers = st.lists(st.integers(0, 40).map(str) | _run, min_size=1, max_size=4).map(",".join)
patterns = st.one_of(
    st.just("all-linear"),
    kinds,
    st.tuples(_layers, st.just("all-linear") | kinds).map(".".join),
    st.tuples(st.integers(0, 40), kinds).map(lambda at: f"model.layers.{at[0]}.self_attn.{at[1]}"),
)


def values(field: Field) -> st.SearchStrategy[Any]:
    """Any value the field takes."""
    match field.kind:
        case "choice":
            return st.sampled_from(field.choices)
        case "bool":
            return st.booleans()
        case "int":
            assert field.minimum is not None and field.maximum is not None
            return st.integers(int(field.minimum), int(field.maximum) - field.exclusive_maximum)
        case "float":
            return st.floats(
                field.minimum,
                field.maximum,
                exclude_min=field.exclusive_minimum,
                exclude_max=field.exclusive_maximum,
                allow_subnormal=False,
            )
        case "text":
            return st.text(min_size=field.min_length, max_size=field.max_length or 30)
        case "texts":
            items = patterns if field.key in ("target_modules", "skip") else st.text(max_size=20)
            return st.lists(items, min_size=field.min_length, max_size=4).map(tuple)
        case "tables":
            return st.lists(sources(), max_size=3).map(tuple)
        case "numbers":
            whole = st.integers(1, 1024)
            return st.dictionaries(patterns, whole if "rank" in field.key else whole.map(float), max_size=3)
        case "names":
            return st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3)


def sources() -> st.SearchStrategy[Source]:
    return st.builds(Source, **{key: values(field) for key, field in source_fields().items()})


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Recipes with a few or with all settings changed, conflicts not excluded."""
    chosen = draw(st.lists(st.sampled_from(sorted(fields())), unique=True) | st.just(sorted(fields())))
    recipe = Recipe()
    for path in chosen:
        section, _, key = path.rpartition(".")
        value = draw(values(fields()[path]))
        if section:
            changed = msgspec.structs.replace(getattr(recipe, section), **{key: value})
            recipe = msgspec.structs.replace(recipe, **{section: changed})
        else:
            recipe = msgspec.structs.replace(recipe, **{key: value})
    return recipe


@st.composite
def models(draw: st.DrawFn) -> list[SomeModule]:
    """Layers that need not be alike, several modules of a kind, some outside layers, a vision tower."""
    modules: list[SomeModule] = []
    for layer in range(draw(st.integers(0, 7))):
        for kind in draw(st.lists(kinds, unique=True, max_size=4)):
            for block in draw(st.sampled_from([["attn"], ["attn"], ["attn", "mlp"]])):
                modules.append(SomeModule(f"model.layers.{layer}.{block}.{kind}", kind, layer))
    for kind in draw(st.lists(kinds, unique=True, max_size=2)):
        modules.append(SomeModule(f"model.extra.{kind}", kind, None))
    for layer in draw(st.lists(st.integers(0, 7), unique=True, max_size=4).map(sorted)):
        name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        modules.append(SomeModule(name, "experts.gate_up_proj", layer, "expert"))
    for kind in draw(st.lists(kinds, unique=True, max_size=2)):
        modules.append(SomeModule(f"vision.layers.0.{kind}", kind, 0, "vision"))
    return modules


def llama(layers: int) -> list[SomeModule]:
    attention, mlp = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
    return [
        SomeModule(f"model.layers.{layer}.{block}.{kind}", kind, layer)
        for layer in range(layers)
        for block, names in (("self_attn", attention), ("mlp", mlp))
        for kind in names
    ]
