"""An adapter that began as rounding errors (LoftQ) is only merged into the weights that have them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.errors import UserError
from qlora_tui.export.adapter_folder import export_adapter_folder
from qlora_tui.export.base_choice import choice_named, recorded_choice
from qlora_tui.export.journal import Journal
from qlora_tui.export.lora_export import export_lora
from qlora_tui.export.upload_files import check_form
from qlora_tui.recipe.schema import Lora, Recipe

pytestmark = pytest.mark.slow

SOURCE = ChatSource(recipe=Recipe(lora=Lora(init_weights="loftq")), adapters={"adapter": "missing"})


def test_the_4_bit_weights_are_chosen_without_measuring(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for choice in (
        choice_named("best", SOURCE, "adapter", journal),
        choice_named("dequantized", SOURCE, "adapter", journal),
        recorded_choice(journal, SOURCE, "adapter", "no reference", lambda words: None),
    ):
        assert choice.chosen == "dequantized"
        assert "(LoftQ)" in choice.sentence


def test_the_16_bit_weights_and_a_lone_adapter_are_refused(tmp_path: Path) -> None:
    refusal = "belongs to its 4-bit base"
    with pytest.raises(UserError, match=refusal):
        choice_named("original", SOURCE, "adapter", Journal(tmp_path))
    with pytest.raises(UserError, match=refusal):
        export_lora(SOURCE, "adapter", tmp_path / "lora.gguf")
    with pytest.raises(UserError, match=refusal):
        export_adapter_folder(SOURCE, "adapter", tmp_path / "folder")
    with pytest.raises(UserError, match=refusal):
        check_form(SOURCE, "adapter", "adapter", "", lambda words: None)
