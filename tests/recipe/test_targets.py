"""Target patterns: what they touch, and how a selection becomes patterns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.errors import UserError
from qlora_tui.recipe import targets
from qlora_tui.recipe.schema import Lora
from tests.recipe.strategies import SomeModule, llama, models, patterns


def names(patterns: list[str], modules: list[SomeModule]) -> list[str]:
    return [module.name for module in targets.match_modules(patterns, modules)]


def chosen(*layers_and_kinds: tuple[int, str]) -> set[str]:
    return {module.name for module in llama(24) if (module.layer, module.kind) in {*layers_and_kinds}}


def test_all_linear_touches_every_module() -> None:
    assert targets.match_modules(["all-linear"], llama(3)) == llama(3)


def test_a_kind_is_touched_in_every_layer() -> None:
    assert names(["v_proj"], llama(2)) == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    ]


def test_layers_are_counted_from_zero_and_both_ends_count() -> None:
    touched = targets.match_modules(["1-2,4.q_proj"], llama(6))
    assert [module.layer for module in touched] == [1, 2, 4]


def test_all_linear_in_some_layers() -> None:
    assert targets.match_modules(["1.all-linear"], llama(3)) == [
        module for module in llama(3) if module.layer == 1
    ]


def test_overlapping_patterns_touch_a_module_once() -> None:
    assert targets.match_modules(["q_proj", "0-1.q_proj", "q_proj"], llama(2)) == targets.match_modules(
        ["q_proj"], llama(2)
    )


def test_a_vision_tower_is_touched_by_full_name_only() -> None:
    eye = SomeModule("vision.layers.0.q_proj", "q_proj", 0, "vision")
    model = [*llama(1), eye]
    assert eye not in targets.match_modules(["all-linear", "q_proj", "0.q_proj"], model)
    assert targets.match_modules([eye.name], model) == [eye]


def test_matches_agrees_with_select() -> None:
    model = llama(3)
    assert [m for m in model if targets.matches(["1-2.q_proj", "k_proj"], m)] == targets.match_modules(
        ["1-2.q_proj", "k_proj"], model
    )


def test_an_unknown_kind_lists_all_kinds_and_the_closest() -> None:
    with pytest.raises(UserError) as caught:
        targets.match_modules(["3-5.q_porj"], llama(8))
    assert str(caught.value) == (
        'Unknown target module: lora.target_modules has "3-5.q_porj", but the model has no q_porj.\n'
        "  The model's module kinds are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.\n"
        "  Did you mean 3-5.q_proj?"
    )
    assert caught.value.exit_code == 2


def test_layers_the_model_has_not_are_an_error() -> None:
    with pytest.raises(UserError, match=r"no such layers.*\n  q_proj is in layers 0-7"):
        targets.match_modules(["30-31.q_proj"], llama(8))


@pytest.mark.parametrize(
    "pattern",
    ["", " ", "*", "q_proj ", "3", "3-5", "3-.q_proj", "-3.q_proj", "1,,2.q_proj", "1.2.q_proj", "a b"],
)
def test_what_is_no_pattern(pattern: str) -> None:
    assert targets.syntax_error(pattern)


@given(patterns)
def test_every_pattern_of_the_grammar_parses(pattern: str) -> None:
    assert targets.syntax_error(pattern) is None


@given(st.lists(patterns, min_size=1, max_size=5))
def test_a_comma_list_splits_into_its_patterns(some: list[str]) -> None:
    assert targets.split_patterns(", ".join(some)) == some


@given(st.data())
def test_compress_and_select_round_trip(data: st.DataObject) -> None:
    model = data.draw(models())
    selection = set(data.draw(st.lists(st.sampled_from(model), unique=True))) if model else set()
    written = targets.to_patterns([module.name for module in selection], model)
    assert not any(targets.syntax_error(pattern) for pattern in written)
    assert set(targets.match_modules(written, model)) == selection


@given(st.data())
def test_whole_kinds_and_layers_round_trip(data: st.DataObject) -> None:
    model = data.draw(models())
    layers = data.draw(st.sets(st.integers(0, 7)))
    kinds = data.draw(st.sets(st.sampled_from(["q_proj", "k_proj", "up_proj"])))
    selection = {m for m in model if m.part != "vision" and (m.layer in layers or m.kind in kinds)}
    written = targets.to_patterns([module.name for module in selection], model)
    assert set(targets.match_modules(written, model)) == selection
    assert len(written) <= len(selection)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (["all-linear"], ("all-linear",)),
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
        (["8-23.q_proj"], ("8-23.q_proj",)),
        (["8-15.all-linear"], ("8-15.all-linear",)),
        (["0-3,7.all-linear"], ("0-3,7.all-linear",)),
        (["0,1,2,5.k_proj"], ("0-2,5.k_proj",)),
        (["8-23.all-linear", "q_proj"], ("8-23.all-linear", "q_proj")),
        (["8-23.all-linear", "2-7.q_proj"], ("8-23.all-linear", "2-7.q_proj")),
        (["model.layers.3.mlp.up_proj"], ("3.up_proj",)),
        (["0-23.q_proj", "k_proj", "v_proj"], ("q_proj", "k_proj", "v_proj")),
    ],
)
def test_compress_writes_what_a_person_would(pattern: list[str], expected: tuple[str, ...]) -> None:
    model = llama(24)
    assert targets.to_patterns(names(pattern, model), model) == expected


def test_modules_that_share_kind_and_layer_are_named_fully() -> None:
    gpt2 = [SomeModule(f"h.{n}.{block}.c_proj", "c_proj", n) for n in range(2) for block in ("attn", "mlp")]
    assert targets.to_patterns([module.name for module in gpt2[:3]], gpt2) == ("0.c_proj", "h.1.attn.c_proj")


@given(st.data())
def test_assigning_gives_the_named_modules_their_number_and_no_other(data: st.DataObject) -> None:
    model = data.draw(models().filter(bool))
    own = st.sampled_from(sorted(module.name for module in model))
    lora = Lora(rank_pattern=data.draw(st.dictionaries(own, st.sampled_from([4, 8, 16]), max_size=6)))
    marked = data.draw(st.sets(own))
    table = targets.assign_pattern_values(lora.rank_pattern, lora.rank, marked, 8, model)
    for module in model:
        expected = 8 if module.name in marked else targets.rank_of(lora, module)
        assert targets.rank_of(Lora(rank_pattern=table), module) == expected


def test_of_two_patterns_that_fit_the_later_holds() -> None:
    lora = Lora(rank_pattern={"q_proj": 8, "1.all-linear": 4})
    first, second = targets.match_modules(["q_proj"], llama(2))
    assert (targets.rank_of(lora, first), targets.rank_of(lora, second)) == (8, 4)


def test_a_rank_for_a_missing_module_names_its_setting() -> None:
    with pytest.raises(UserError) as caught:
        targets.resolve_targets(Lora(rank_pattern={"q_porj": 8}), llama(2))
    assert 'lora.rank_pattern has "q_porj"' in caught.value.what
    assert "q_proj" in caught.value.fix


def mixture(layers: int) -> list[SomeModule]:
    """Llama's attention, and experts."""
    experts = [
        SomeModule(f"model.layers.{layer}.mlp.experts.{name}", f"experts.{name}", layer, "expert")
        for layer in range(layers)
        for name in ("gate_up_proj", "down_proj")
    ]
    return [module for module in llama(layers) if "attn" in module.name] + experts


def test_all_linear_leaves_experts_out() -> None:
    assert {module.part for module in targets.match_modules(["all-linear"], mixture(2))} == {"other"}


def test_experts_are_named_by_projection_and_layers() -> None:
    assert names(["1-2.experts.down_proj"], mixture(4)) == [
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.2.mlp.experts.down_proj",
    ]
    everything = {module.name for module in mixture(4)}
    assert targets.to_patterns(everything, mixture(4)) == (
        "all-linear",
        "experts.gate_up_proj",
        "experts.down_proj",
    )


@pytest.mark.parametrize(("setting", "value"), [("dropout", 0.1), ("use_dora", True)])
def test_settings_that_peft_lacks_for_experts_are_refused(setting: str, value: float) -> None:
    lora = Lora(target_modules=("experts.down_proj",), **{setting: value})  # type: ignore[arg-type]  # either
    with pytest.raises(UserError, match="Not for experts") as refused:
        targets.resolve_targets(lora, mixture(1))
    assert f"lora.{setting}" in refused.value.what
    attention = Lora(target_modules=("q_proj",), **{setting: value})  # type: ignore[arg-type]  # either
    assert len(targets.resolve_targets(attention, mixture(1))) == 1
