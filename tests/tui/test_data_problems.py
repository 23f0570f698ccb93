"""The Data screen: rows with problems, the key that fixes them, formats and columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from textual.widgets import Input

from tests.data.test_trainable_tokens import WIDTH
from tests.data.test_trainable_tokens import model as faint_model
from tests.tui.data_screen import data_app
from tests.tui.sample_data import ticket, tickets, write_rows
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until
from tests.tui.workstation import config_folder


async def test_the_problem_key_cycles_and_enter_opens_a_problems_rows(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    async with data_app(model, "tickets.jsonl", max_length=1024).run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "No answer to learn: 1 row, left out", "Duplicate row: 1 row, used")
        await wait_for_text(pilot, "too few to learn much", "n next  m fix")
        await pilot.press("n")
        await wait_for_text(pilot, "row 39 of 40", "⚠ Duplicate row")
        await pilot.press("n")
        await wait_for_text(pilot, "row 40 of 40", "This row cannot be used.")
        await pilot.press("n")
        await wait_for_text(pilot, "row 39 of 40")
        problems = pilot.app.screen.query_one("#problems")
        problems.focus()
        # The last line is not about rows: it says that there are few steps.
        await pilot.press("G", "enter", "k", "enter")
        await wait_for_text(pilot, "row 40 of 40")


async def test_the_fix_key_trains_tokens_the_model_never_learned(private_home: Path, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    folder = config_folder(private_home, "HuggingFaceTB__SmolLM2-135M")
    faint_model(folder, {"<|im_end|>": [0.0] * WIDTH})
    app = data_app(str(folder), "tickets.jsonl")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "⚠ The base model has never learned", "▸ [m] train <|im_end|>")
        await pilot.press("m")
        assert list(app.workbench.recipe.lora.trainable_tokens) == ["<|im_end|>"]
        assert any("<|im_end|>" in notification.message for notification in app._notifications)
        await wait_until(pilot, lambda: "never learned" not in text_of(app))
        await pilot.press("m", "u")
        assert not app.workbench.recipe.lora.trainable_tokens
        await wait_for_text(pilot, "has never learned")


async def test_the_fix_key_offers_ways_to_train_on_preferences(model: str, here: Path) -> None:
    rows = [{"prompt": f"Which {n}?", "chosen": f"This {n}.", "rejected": "That."} for n in range(1, 6)]
    write_rows(here / "pairs.jsonl", rows)
    app = data_app(model, "pairs.jsonl")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "✗ Preference data", "[m] choose how to train on them", "[o] open")
        await pilot.press("m")
        await wait_for_text(pilot, "Chosen and rejected answers", "ORPO", "DPO", "SimPO", "chosen only")
        await pilot.press("j", "enter")
        assert app.workbench.recipe.preference_method == "dpo"
        await wait_for_text(pilot, "row 1 of 5", "── chosen ──", "This 1.", "── rejected ──", "That.")
        await pilot.press("u")
        await wait_for_text(pilot, "✗ Preference data")
        await pilot.press("m")
        await wait_for_text(pilot, "chosen only")
        await pilot.press("G", "enter")
        assert app.workbench.recipe.data.preferences == "chosen"
        assert "That." not in await wait_for_text(pilot, "row 1 of 5", "This 1.")
        await pilot.press("u")
        await wait_for_text(pilot, "✗ Preference data")


async def test_answers_without_a_known_prompt_are_mapped_by_parts(model: str, here: Path) -> None:
    rows = [{"frage": f"Which {n}?", "chosen": f"This {n}.", "rejected": "That."} for n in range(1, 6)]
    write_rows(here / "pairs.jsonl", rows)
    app = data_app(model, "pairs.jsonl", preferences="chosen")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "✗ Preference data without a prompt", "Press [c] to map the columns.")
        await pilot.press("c")
        await wait_for_text(pilot, "Columns of preference", "rejected")
        fields = {field.name: field for field in pilot.app.screen.query(Input)}
        fields["prompt"].value = "frage"
        fields["prompt"].focus()
        await pilot.press("enter")
        await wait_for_text(pilot, "row 1 of 5", "Which 1?", "This 1.")


async def test_the_fix_key_splits_a_long_text(model: str, here: Path) -> None:
    (here / "book.txt").write_text("the fox ran " * 300 + "\n\nShort.\n\nShort too.\n")
    app = data_app(model, "book.txt", max_length=64)
    async with app.run_test(size=(120, 40)) as pilot:
        text = await wait_for_text(pilot, "⚠ Long text: 1 row, cut right", "▸ [m] split into")
        rows = int(text.partition("[m] split into ")[2].split(" ")[0])
        await pilot.press("m")
        assert app.workbench.recipe.data.overflow == "split"
        await wait_for_text(pilot, f"{rows + 2} from 3 rows")
        assert "Long text" not in text_of(app)


async def test_a_key_leaves_bad_rows_out_and_takes_it_back(model: str, here: Path) -> None:
    rows: list[Any] = [ticket(n) for n in range(1, 21)]
    rows[6] = '{"messages": oops'
    write_rows(here / "tickets.jsonl", rows)
    app = data_app(model, "tickets.jsonl")
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(
            pilot, "✗ Not valid JSON: 1 row, run blocked", "▸ [m] leave 1 bad row out", "d skip bad rows"
        )
        await pilot.press("d")
        await wait_for_text(
            pilot, "⚠ Not valid JSON: 1 row, left out", "Runs leave 1 bad row out.", "d refuse bad rows"
        )
        assert app.workbench.recipe.data.bad_rows == "skip"
        await pilot.press("n")
        await wait_for_text(pilot, "This row is left out.", "⚠ Not valid JSON")
        await pilot.press("u")
        await wait_for_text(pilot, "✗ Not valid JSON: 1 row, run blocked")
        await pilot.press("m")
        assert app.workbench.recipe.data.bad_rows == "skip"


async def test_columns_of_an_unknown_format_can_be_mapped_in_place(model: str, here: Path) -> None:
    write_rows(here / "odd.jsonl", [{"frage": f"Wo ist {n}?", "antwort": "Hier."} for n in range(9)])
    async with data_app(model, "odd.jsonl").run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "✗ No usable field")
        await pilot.press("c")
        await wait_for_text(pilot, "Columns of prompt-completion", "frage, antwort")
        await pilot.press(*"frage", "tab", *"antwort", "enter")
        await wait_for_text(pilot, "prompt-completion: frage,", "9 from 9 rows", "Wo ist 0?")


async def test_formats_are_offered_with_the_rows_they_read(model: str, here: Path) -> None:
    rows = [{"prompt": f"Q {n}", "completion": f"A {n}"} for n in range(3)]
    write_rows(here / "pairs.jsonl", [*rows, {"prompt": "Q 4"}])
    app = data_app(model, "pairs.jsonl")
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await wait_for_text(pilot, "3 from 4 rows")
        await pilot.press("f")
        shown = await wait_for_text(pilot, "the first 4 rows", "! auto: prompt-completion  3 rows  now")
        assert "✗ messages                 0 rows       needs messages" in shown
        assert "! prompt-completion        3 rows       Q 0 → A 0" in shown
        await pilot.press("G", "k", "k", "k", "k", "enter")
        await wait_for_text(pilot, "Read as prompt-completion. Press [u] to undo.")
        assert app.workbench.recipe.data.sources[0].format == "prompt-completion"
        await pilot.press("f")
        await wait_for_text(pilot, "prompt-completion        3 rows  now")
        await pilot.press("escape")
    assert app.workbench.recipe.data.sources[0].format == "prompt-completion"
