"""Presets: the shipped ones, and finding, saving, deleting and restoring the user's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.recipe import presets, toml
from qlora_tui.recipe.schema import Data, Lora, Model, Recipe, Source
from tests.recipe.strategies import recipes

SHIPPED = [
    "balanced",
    "continued-pretraining",
    "cpu-demo",
    "paper",
    "preference-dpo",
    "preference-orpo",
    "quality",
    "small-card",
    "style",
]


def mine(name: str = "mine") -> Path:
    return paths.user_presets_dir() / f"{name}.toml"


def test_shipped_presets_are_valid_and_have_descriptions() -> None:
    listed = presets.list_presets()
    assert [preset.name for preset in listed] == SHIPPED
    assert all(preset.shipped and preset.note and not preset.problem for preset in listed)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_preset_survives_the_round_trip(name: str) -> None:
    recipe = presets.find_preset(name).recipe()
    assert toml.to_recipe(toml.parse(toml.dump(recipe), name)) == recipe


def test_a_users_preset_hides_the_shipped_one() -> None:
    mine("paper").write_text("[lora]\nrank = 3\n")
    paper = presets.find_preset("paper")
    assert not paper.shipped and paper.recipe().lora.rank == 3
    assert [preset.name for preset in presets.list_presets()] == SHIPPED


def test_a_broken_preset_is_listed_with_its_problem() -> None:
    mine("typo").write_text("[lora]\nrnak = 3\n")
    mine("latin").write_bytes(b"note = '\xe9'\n")
    mine("folder").mkdir()
    broken = {preset.name: preset for preset in presets.list_presets() if preset.problem}
    assert sorted(broken) == ["folder", "latin", "typo"]
    with pytest.raises(UserError, match=r"typo\.toml, line 2: lora\.rnak"):
        broken["typo"].recipe()


def test_a_file_name_that_is_not_text_is_tolerated() -> None:
    Path(os.fsdecode(bytes(paths.user_presets_dir()) + b"/\xff.toml")).touch()
    assert [preset.name for preset in presets.list_presets() if not preset.shipped] == ["?"]


def test_without_a_home_the_shipped_presets_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/proc/none")
    assert [preset.name for preset in presets.list_presets()] == SHIPPED
    with pytest.raises(UserError, match="No folder for presets"):
        presets.save("mine", Recipe())


def test_an_unknown_preset_names_the_near_one() -> None:
    with pytest.raises(UserError) as caught:
        presets.find_preset("smal_card.toml")
    assert str(caught.value) == (
        'Unknown preset: There is no preset "smal_card.toml".\n'
        "  The presets are balanced, continued-pretraining, cpu-demo, paper, preference-dpo, "
        "preference-orpo, quality, small-card, style.\n"
        "  Did you mean small-card?"
    )


def test_opening_a_preset_keeps_model_and_data() -> None:
    current = Recipe(
        name="n",
        model=Model(id="m", revision="r", attention="eager"),
        data=Data(sources=(Source(path="a"),), validation_path="v", max_length=64),
        lora=Lora(rank=99, init_from="f"),
    )
    opened = presets.find_preset("paper").recipe(current)
    assert (opened.name, opened.model.id, opened.model.revision) == ("n", "m", "r")
    assert (opened.data.sources, opened.data.validation_path) == (current.data.sources, "v")
    assert (opened.model.attention, opened.data.max_length, opened.lora.rank) == ("auto", 512, 64)
    assert opened.lora.init_from == "f"


def test_saving_keeps_the_settings_and_leaves_out_model_and_data() -> None:
    recipe = Recipe(
        name="n",
        note="of the run",
        model=Model(id="m", revision="r", attention="sdpa"),
        data=Data(sources=(Source(path="a"),), validation_path="v", max_length=64),
        lora=Lora(rank=3, init_from="f"),
    )
    path = presets.save("mine", recipe, note="why")
    header, _, body = path.read_text().partition("\n")
    assert header.startswith("# Written by qlora-tui")
    assert body == (
        'note = "why"\n\n[model]\nattention = "sdpa"\n\n[lora]\nrank = 3\n\n[data]\nmax_length = 64\n'
    )
    assert presets.find_preset("mine").note == "why"


@given(recipes())
@pytest.mark.slow
def test_a_saved_preset_opens_as_what_was_saved(recipe: Recipe) -> None:
    presets.save("mine", recipe)
    assert presets.find_preset("mine").recipe(recipe) == recipe


def test_a_preset_may_leave_to_the_recipe_what_it_needs() -> None:
    """Early stopping without validation data conflicts in a recipe; in a preset the data is yet to come."""
    path = mine("early")
    path.write_text("[training]\nearly_stopping = 2\n[data]\nvalidation_fraction = 0\n")
    assert presets.find_preset("early").problem is None


def test_the_app_replaces_what_it_wrote() -> None:
    presets.save("mine", Recipe(lora=Lora(rank=3)))
    presets.save("mine", Recipe(lora=Lora(rank=4)))
    assert presets.find_preset("mine").recipe().lora.rank == 4


def test_a_linked_preset_is_written_to_its_target(tmp_path: Path) -> None:
    target = tmp_path / "dotfiles.toml"
    presets.save("mine", Recipe()).rename(target)
    mine().symlink_to(target)
    presets.save("mine", Recipe(lora=Lora(rank=3)))
    assert mine().is_symlink() and "rank = 3" in target.read_text()


@pytest.mark.parametrize("edit", ["by hand", "another line", "without its first line", "emptied", "not text"])
def test_what_a_person_wrote_or_edited_is_not_replaced_unasked(edit: str) -> None:
    path = presets.save("mine", Recipe(lora=Lora(rank=3)))
    written = path.read_bytes()
    content = {
        "by hand": b"[lora]\nrank = 5\n",
        "another line": written + b"alpha = 3\n",
        "without its first line": written.partition(b"\n")[2],
        "emptied": b"",
        "not text": b"\xff\xfe",
    }[edit]
    path.write_bytes(content)
    with pytest.raises(presets.OverwriteError, match="edited by hand"):
        presets.save("mine", Recipe())
    assert path.read_bytes() == content
    presets.save("mine", Recipe(lora=Lora(rank=9)), overwrite=True)
    assert presets.find_preset("mine").recipe().lora.rank == 9


@pytest.mark.parametrize(
    "name", ["", " ", "a/b", "../a", "a\\b", ".hidden", "-option", " a", "a\n", "a\0", "x" * 61, "mine.toml"]
)
def test_a_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="Invalid preset name"):
        presets.save(name, Recipe())
    assert list(paths.user_presets_dir().iterdir()) == []


def test_an_invalid_recipe_is_not_saved() -> None:
    with pytest.raises(UserError, match=r"lora\.rank must be"):
        presets.save("mine", Recipe(lora=Lora(rank=0)))
    assert not mine().exists()


def test_a_full_disk_is_a_problem_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    path = presets.save("mine", Recipe(lora=Lora(rank=3)))
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="No space left"):
        presets.save("mine", Recipe(lora=Lora(rank=4)))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def no_space(_: int) -> None:
    raise OSError(28, os.strerror(28))


def test_a_deletion_is_undone() -> None:
    mine().write_bytes(b"[lora]\nrank = 5 # by hand\n")
    snapshot = presets.delete("mine")
    assert not mine().exists()
    presets.restore(snapshot)
    assert mine().read_bytes() == b"[lora]\nrank = 5 # by hand\n"


def test_undoing_a_save_restores_the_previous_file_or_none() -> None:
    nothing = presets.take_snapshot("mine")
    first = presets.save("mine", Recipe(lora=Lora(rank=3))).read_bytes()
    something = presets.take_snapshot("mine")
    presets.save("mine", Recipe(lora=Lora(rank=4)))
    presets.restore(something)
    assert mine().read_bytes() == first
    presets.restore(nothing)
    assert not mine().exists()


def test_an_undo_does_not_lose_an_edit_made_since() -> None:
    presets.save("mine", Recipe())
    snapshot = presets.delete("mine")
    mine().write_text("[lora]\nrank = 5\n")
    with pytest.raises(presets.OverwriteError):
        presets.restore(snapshot)
    presets.restore(snapshot, overwrite=True)
    assert mine().read_bytes() == snapshot.content


def test_deleting_what_hides_a_shipped_preset_brings_it_back() -> None:
    presets.save("paper", Recipe(lora=Lora(rank=3)))
    presets.delete("paper")
    assert presets.find_preset("paper").shipped


def test_a_shipped_preset_cannot_be_deleted() -> None:
    with pytest.raises(UserError, match="is a bundled preset"):
        presets.delete("paper")
    with pytest.raises(UserError, match='You have no preset "none"'):
        presets.delete("none")
