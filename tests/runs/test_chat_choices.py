"""Choices and edits of the chat as files that a recipe reads."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from msgspec.structs import replace

from qlora_tui import paths
from qlora_tui.data.conversation import Conversation, Message
from qlora_tui.data.sources import conversations, open_source
from qlora_tui.errors import UserError
from qlora_tui.locks import locked
from qlora_tui.recipe.conflicts import find_conflicts
from qlora_tui.recipe.schema import Data, Recipe
from qlora_tui.runs import chat_choices
from qlora_tui.runs.chat_choices import (
    ChoiceKind,
    Provenance,
    add_choice,
    choices_path,
    count_choices,
    recipe_on_choices,
)

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = (
    Message("system", "Be kind."),
    Message("user", "hi"),
    Message("assistant", "hello"),
    Message("user", "who are you"),
)


def prefer(prompt: tuple[Message, ...], chosen: str, rejected: str, provenance: Provenance) -> int:
    return add_choice("pairs", prompt, {"chosen": chosen, "rejected": rejected}, provenance)


def edit(prompt: tuple[Message, ...], answer: str, provenance: Provenance) -> int:
    return add_choice("edits", prompt, {"completion": answer}, provenance)


def provenance(turn: str) -> Provenance:
    return Provenance(
        id=turn, at=1.0, base=BASE, run="owls", answers={"chosen": "adapter"}, sampling={"temperature": 0.7}
    )


def rows_of(path: Path, preferences: str) -> list[Conversation]:
    """The conversations that a run would read."""
    source = recipe_on_choices(Recipe(), "pairs", "").data.sources[0]
    (file,), _ = open_source(replace(source, path=str(path)), preferences)
    rows = [conversation for _, conversation in conversations(file)]
    assert all(isinstance(each, Conversation) for each in rows)
    return [each for each in rows if isinstance(each, Conversation)]


def test_choices_are_preferences_that_a_run_reads() -> None:
    assert count_choices(BASE, "pairs") == 0
    assert prefer(PROMPT, "An owl.", "I am an owl, and I am.", provenance("chat/1")) == 1
    assert prefer(PROMPT[:2], "Hello.", "Hi.", provenance("chat/2")) == 2
    path = choices_path(BASE, "pairs")
    assert path.is_relative_to(paths.state_dir()) and stat.S_IMODE(path.stat().st_mode) == 0o600
    first, _ = rows_of(path, "chosen")
    assert [(m.role, m.content) for m in first.messages] == [
        *((message.role, message.content) for message in PROMPT),
        ("assistant", "An owl."),
    ]
    assert json.loads(path.read_text().splitlines()[0])["provenance"]["run"] == "owls"


def test_only_the_edited_answer_is_in_the_loss() -> None:
    assert edit(PROMPT, "An owl.", provenance("chat/1")) == 1
    (row,) = rows_of(choices_path(BASE, "edits"), "refuse")
    assert [message.content for message in row.answers] == ["An owl."]


def test_a_turn_that_is_judged_again_replaces_its_row() -> None:
    prefer(PROMPT, "one", "two", provenance("chat/1"))
    prefer(PROMPT, "three", "four", provenance("chat/2"))
    path = choices_path(BASE, "pairs")
    with path.open("a") as file:
        file.write('{"prompt": "a row of the user", "chosen": "a", "rejected": "b"}\n')
    assert prefer(PROMPT, "two", "one", provenance("chat/1")) == 3
    chosen = [json.loads(line)["chosen"] for line in path.read_text().splitlines()]
    assert [each if isinstance(each, str) else each[0]["content"] for each in chosen] == ["three", "a", "two"]


@pytest.mark.parametrize("kind", ["pairs", "edits"])
def test_the_run_goes_on_from_the_adapter_on_choices_alone(kind: str) -> None:
    recipe = Recipe()
    recipe = replace(recipe, model=replace(recipe.model, id=BASE))
    prepared = recipe_on_choices(recipe, "pairs" if kind == "pairs" else "edits", "owls")
    assert [source.path for source in prepared.data.sources] == [
        str(choices_path(BASE, "pairs" if kind == "pairs" else "edits"))
    ]
    assert prepared.lora.init_from == "owls" and not prepared.data.validation_path
    assert recipe_on_choices(recipe, "edits", "").lora == recipe.lora
    assert prepared.data.preferences == ("dpo" if kind == "pairs" else "refuse")
    replaying = replace(recipe, training=replace(recipe.training, replay_share=0.1))
    assert not find_conflicts(recipe_on_choices(replaying, "pairs", "owls"))


@pytest.mark.parametrize("run_id", ["owls", ""])
@pytest.mark.parametrize("kind", ["pairs", "edits"])
def test_choices_can_follow_a_run_of_any_method(kind: ChoiceKind, run_id: str) -> None:
    recipe = Recipe(data=Data(preferences="kto"))
    prepared = recipe_on_choices(recipe, kind, run_id)
    assert prepared.data.preferences == ("dpo" if kind == "pairs" else "refuse")
    assert not find_conflicts(prepared)


@pytest.mark.parametrize("other", ["evil/SmolLM2-135M-Instruct", "/models/b/SmolLM2-135M-Instruct"])
def test_two_models_of_one_name_share_no_choices(other: str) -> None:
    prefer(PROMPT, "one", "two", provenance("chat/1"))
    assert count_choices(other, "pairs") == 0 and choices_path(other, "pairs") != choices_path(BASE, "pairs")
    assert prefer(PROMPT, "one", "two", replace(provenance("chat/1"), base=other)) == 1
    assert count_choices(BASE, "pairs") == 1


def test_a_file_that_cannot_be_read_whole_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    edit(PROMPT, "An owl.", provenance("chat/1"))
    path = choices_path(BASE, "edits")
    before = path.read_bytes()
    monkeypatch.setattr(chat_choices, "_MAX_BYTES", len(before) - 1)
    with pytest.raises(UserError, match="is larger than"):
        edit(PROMPT, "A wise owl.", provenance("chat/2"))
    assert path.read_bytes() == before


def test_a_choice_waits_for_another_program_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    edit(PROMPT, "An owl.", provenance("chat/1"))
    path = choices_path(BASE, "edits")
    monkeypatch.setattr(chat_choices, "PATIENCE_S", 0.0)
    with locked(path.with_suffix(".lock")), pytest.raises(UserError, match="Another program is writing"):
        edit(PROMPT, "A wise owl.", provenance("chat/2"))
    assert count_choices(BASE, "edits") == 1
