"""The Data screen on real files through real engines: rows, sources, problems and their fixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input

from qlora_tui.demo.conversations import CONVERSATIONS
from qlora_tui.recipe.schema import Source
from qlora_tui.tui.screens.modals.file_picker import FilePickerScreen
from tests.data.fake_dataset_hub import dataset_hub
from tests.data.test_trainable_tokens import WIDTH
from tests.data.test_trainable_tokens import model as faint_model
from tests.data.thinkers import SMOLLM3
from tests.tui.data_screen import data_app, screen_of
from tests.tui.sample_data import readable_model, ticket, tickets, write_rows
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until
from tests.tui.workstation import config_folder, open_on


async def test_keys_move_between_rows_and_from_problem_to_problem(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    async with data_app(model, "tickets.jsonl", max_length=1024).run_test(size=(120, 40)) as pilot:
        await wait_for_text(
            pilot, "row 1 of 40", "<|im_start|>assistant", "Parcel 1 is on its way.<|im_end|>↵"
        )
        await pilot.press("l")
        await wait_for_text(pilot, "row 2 of 40", "Parcel 2")
        await pilot.press("h", "h")
        await wait_for_text(pilot, "row 1 of 40")
        await pilot.press("colon")
        await pilot.press(*"17", "enter")
        await wait_for_text(pilot, "row 17 of 40", "Where is parcel 17?")

        await wait_for_text(pilot, "No answer to learn: 1 row, left out", "Duplicate row: 1 row, used")
        await wait_for_text(pilot, "too few to learn much", "n next")
        await pilot.press("n")
        await wait_for_text(pilot, "row 39 of 40", "⚠ Duplicate row")
        await pilot.press("n")
        await wait_for_text(pilot, "row 40 of 40", "This row cannot be used.")
        await pilot.press("n")
        await wait_for_text(pilot, "row 39 of 40")
        pilot.app.screen.query_one("#problems").focus()
        # The last line is not about rows: it says that there are few steps.
        await pilot.press("G", "enter", "k", "enter")
        await wait_for_text(pilot, "row 40 of 40")


async def test_a_large_window_shows_the_next_rows_too(model: str, here: Path) -> None:
    write_rows(here / "three.jsonl", [ticket(number) for number in (1, 2, 3)])
    async with data_app(model, "three.jsonl").run_test(size=(200, 60)) as pilot:
        await wait_for_text(pilot, "Where is parcel 1?", "row 2 ·", "Where is parcel 2?", "row 3 ·")
        await pilot.press("right")
        await wait_for_text(pilot, "row 2 of 3", "row 3 ·")
        await wait_until(pilot, lambda: "Where is parcel 1?" not in text_of(pilot.app))
        await pilot.resize_terminal(100, 30)
        await wait_until(pilot, lambda: "row 3 ·" not in text_of(pilot.app))


async def test_steps_count_the_weight_of_the_source(model: str, here: Path) -> None:
    write_rows(here / "pairs.jsonl", [{"prompt": f"Why {n}?", "completion": f"So {n}."} for n in range(40)])
    app = data_app(model, "pairs.jsonl", packing=False, validation_fraction=0.0)
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "5 per epoch")
        app.edit("data.sources", (Source(path="pairs.jsonl", weight=3.0),))
        await wait_for_text(pilot, "15 per epoch")


async def test_keys_change_length_split_weight_and_loss_mask(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    app = data_app(model, "tickets.jsonl", max_length=64)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "✂ 64")
        await pilot.press("plus", "t", "a", "b")
        data = app.workbench.recipe.data
        assert (data.max_length, data.overflow, data.train_on, data.packing) == (
            128,
            "split",
            "everything",
            False,
        )
        await pilot.press("s")
        pilot.app.screen.query_one(Input).value = "1.5"
        await pilot.press("enter")
        await wait_for_text(pilot, "Enter a share below 1, or the path")
        pilot.app.screen.query_one(Input).value = "tickets.jsonl"
        await pilot.press("enter")
        assert app.workbench.recipe.data.validation_path == str(here / "tickets.jsonl")
        await pilot.press("w")
        pilot.app.screen.query_one(Input).value = "2.5"
        await pilot.press("enter")
        assert app.workbench.recipe.data.sources[0].weight == 2.5
        await pilot.press("minus", "minus", "minus", "minus", "minus")
        assert app.workbench.recipe.data.max_length == 16


async def test_a_row_is_shown_while_a_large_file_is_read(model: str, here: Path) -> None:
    answer = "On its way. " * 1000
    write_rows(
        here / "large.jsonl",
        (f'{{"prompt": "Where is parcel {n}?", "completion": "{answer}"}}' for n in range(1, 10_001)),
    )
    app = data_app(model, "large.jsonl")
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "Where is parcel 1?")
        screen = screen_of(app)
        assert screen.report is None or not screen.report.complete
        screen.action_row(8_999)
        await wait_for_text(pilot, "Where is parcel 9000?")
        assert screen.report is None or not screen.report.complete
        await pilot.press("h")
        await wait_for_text(pilot, "Where is parcel 8999?")


FILE_ERRORS: tuple[tuple[list[Any] | None, tuple[str, ...]], ...] = (
    (None, ("✗ No such data", "odd.jsonl does not exist.", "▸ Check the path", "[o] open")),
    ([], ("✗ Empty file", "odd.jsonl is empty.", "[x] remove this one")),
    (["{oops"] * 3, ("✗ Not valid JSON", "Line 1 is not valid JSON", "▸ Correct the line")),
    ([{"a": "b"}] * 3, ("✗ No usable field", "Its rows contain:", "[c] map the columns")),
)


async def test_a_files_error_is_shown_in_place_of_the_sample(model: str, here: Path) -> None:
    async with data_app(model, "odd.jsonl").run_test(size=(120, 40)) as pilot:
        for content, says in FILE_ERRORS:
            if content is not None:
                write_rows(here / "odd.jsonl", content)
                await pilot.press("f5")
            await wait_for_text(pilot, *says)
            await pilot.press("x")
            await wait_for_text(pilot, "No data yet.")
            await pilot.press("u")
            await wait_for_text(pilot, *says)


async def test_opening_a_file_replaces_an_unusable_one_or_the_demos(model: str, here: Path) -> None:
    write_rows(here / "odd.jsonl", [{"foo": 1}] * 3)
    own = tickets(here / "tickets.jsonl")
    more = write_rows(here / "more.jsonl", [ticket(n) for n in range(1, 4)])
    app = data_app(model)

    def opened() -> list[str]:
        return [source.path for source in app.workbench.recipe.data.sources]

    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        for first, shown, replaced in (
            ("odd.jsonl", "✗ No usable field", "Replaced odd.jsonl"),
            (str(CONVERSATIONS), "conversations.jsonl", "Replaced the demo's data"),
        ):
            app.edit("data.sources", (Source(path=first),))
            await wait_for_text(pilot, shown, "[o] open" if first == "odd.jsonl" else "row 1 of")
            screen_of(app).add_source(own)
            await wait_for_text(pilot, "Where is parcel 1?", replaced)
            assert opened() == [str(own)]
            screen_of(app).add_source(more)
            assert opened() == [str(own), str(more)]
            await pilot.press("u", "u")
            assert opened() == [first]


async def test_a_second_file_is_announced_and_can_replace_the_first(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    tickets(here / "other.jsonl")
    app = data_app(model, "tickets.jsonl")
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "Parcel 1", "Source")
        await pilot.press("o")
        await wait_for_text(pilot, "Add data")
        await pilot.press(*"other", "enter")
        await wait_for_text(pilot, "Mix of 2 files", "Tokens of other.jsonl", "the recipe trains on 2 files")
        await pilot.press("O")
        await wait_for_text(pilot, "Train on other data")
        await pilot.press(*"other", "enter")
        await wait_for_text(pilot, "Replaced 2 files with other.jsonl")
        assert [Path(s.path).name for s in app.workbench.recipe.data.sources] == ["other.jsonl"]


async def test_a_file_fixed_on_disk_is_read_again_on_return(model: str, here: Path) -> None:
    file = write_rows(here / "tickets.jsonl", ["{broken", ticket(1)])
    app = data_app(model, "tickets.jsonl")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "Not valid JSON")
        write_rows(file, [ticket(1), ticket(2)])
        await pilot.press("3", "2")
        # With more epochs it has steps enough.
        app.edit("training.epochs", 40.0)
        shown = await wait_for_text(pilot, "Parcel 1 is on its way", "Problems: none found")
        # No row has a problem to go to or to fix.
        assert "Not valid JSON" not in shown and "n next" not in shown and "m fix" not in shown
        write_rows(file, ["{broken", ticket(1)])
        await pilot.press("f5")
        await wait_for_text(pilot, "Not valid JSON")


async def test_a_file_is_found_by_partial_name_by_its_path_or_as_a_recent_one(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    tickets(here / "other.jsonl")
    (here / "picture.png").touch()
    (here / "set").mkdir()
    tickets(here / "set" / "tickets.jsonl")
    app = open_on("data", model=model)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("o")
        await wait_for_text(pilot, "other.jsonl", "tickets.jsonl", "../")
        assert isinstance(app.screen, FilePickerScreen)
        assert "picture.png" not in text_of(app)
        await pilot.press(*"nothing", "enter")
        await wait_for_text(pilot, "No name here contains 'nothing'")
        await pilot.press("ctrl+u", *"kets")
        await pilot.press("enter")
        await wait_for_text(pilot, "Where is parcel 1?")
        await pilot.press("o")
        await wait_for_text(pilot, "recent")
        await pilot.press("down", "down", "enter")
        await pilot.pause()
        sources = app.workbench.recipe.data.sources
        assert [Path(source.path).name for source in sources] == ["tickets.jsonl", "tickets.jsonl"]

        await pilot.press("O")
        app.screen.query_one(Input).value = f"{here}/se"
        await pilot.pause()
        await pilot.press("tab")
        await wait_for_text(pilot, "tickets.jsonl")
        await pilot.press("ctrl+o")
        await wait_for_text(pilot, "set", "Where is parcel 1?")
        assert [source.path for source in app.workbench.recipe.data.sources] == [str(here / "set")]


async def test_rows_and_problems_go_through_every_file_of_a_folder(model: str, here: Path) -> None:
    (here / "set").mkdir()
    write_rows(here / "set" / "a.jsonl", [ticket(1), ticket(2)])
    write_rows(here / "set" / "b.jsonl", [ticket(3), ticket(3)])
    write_rows(here / "set" / "c.jsonl", [ticket(4), ticket(5), ticket(5)])
    async with data_app(model, "set").run_test(size=(120, 40)) as pilot:
        await wait_for_text(
            pilot,
            "a.jsonl row 1 of 2",
            "Duplicate row: 1 row, used  b.jsonl",
            "Duplicate row: 1 row, used  c.jsonl",
        )
        await pilot.press("h", "l")
        await wait_for_text(pilot, "a.jsonl row 2 of 2", "Where is parcel 2?")
        await pilot.press("l")
        await wait_for_text(pilot, "b.jsonl row 1 of 2", "Where is parcel 3?")
        await pilot.press("h")
        await wait_for_text(pilot, "a.jsonl row 2 of 2")
        await pilot.press("n")
        await wait_for_text(pilot, "b.jsonl row 2 of 2", "⚠ Duplicate row")
        await pilot.press("n")
        await wait_for_text(pilot, "c.jsonl row 3 of 3", "⚠ Duplicate row")
        await pilot.press("l")
        await wait_for_text(pilot, "c.jsonl row 3 of 3")
        await pilot.press("colon", *"b 1", "enter")
        await wait_for_text(pilot, "b.jsonl row 1 of 2")
        assert "⚠ Duplicate row" not in text_of(pilot.app).split("b.jsonl row 1")[1].split("Duplicate")[0]


@pytest.mark.slow
async def test_a_dataset_of_the_hub_is_opened_by_its_id(
    model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(f'{{"prompt": "Where is parcel {n}?", "completion": "Here."}}\n' for n in range(3))
    about = b"---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n---\n"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with dataset_hub({"README.md": about, "train.jsonl": rows.encode()}) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        app = open_on("data", model=model)
        async with app.run_test(size=(120, 40)) as pilot:
            await pilot.press("o")
            await pilot.press(*"owner/parcels")
            await wait_for_text(pilot, "hub  owner/parcels")
            await pilot.press("enter")
            await wait_for_text(pilot, "owner/parcels  hub", "row 1 of 3", "Where is parcel 0?")
            assert app.workbench.recipe.data.sources[0].path == "owner/parcels"


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


async def test_rows_are_not_left_out_where_none_would_remain(model: str, here: Path) -> None:
    image = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": image}, {"role": "assistant", "content": "A cat."}]
    write_rows(here / "cats.jsonl", [{"messages": messages}] * 3)
    app = data_app(model, "cats.jsonl")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_until(pilot, lambda: text_of(app).count("No row can be used") == 2)
        text = text_of(app).lower()
        assert "3 rows, run blocked" in text and "leave" not in text and "bad rows" not in text


async def test_a_key_leaves_bad_rows_out_and_takes_it_back(model: str, here: Path) -> None:
    rows: list[Any] = [ticket(n) for n in range(1, 21)]
    rows[6] = '{"messages": oops'
    write_rows(here / "tickets.jsonl", rows)
    app = data_app(model, "tickets.jsonl")
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(
            pilot, "✗ Not valid JSON: 1 row, run blocked", "▸ [m] leave 1 bad row out", "X skip bad rows"
        )
        await pilot.press("X")
        await wait_for_text(pilot, "⚠ Not valid JSON: 1 row, left out", "Runs will leave out 1 bad row.")
        app.clear_notifications()
        await wait_for_text(pilot, "X refuse bad rows")
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


def thinking_model(home: Path) -> str:
    """A model whose template can think, or not."""
    folder = Path(readable_model(home))
    config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": SMOLLM3}))
    return str(folder)


def rows(path: Path) -> Path:
    """Three answers, one of them with reasoning."""
    said = ("a small dog", "<think>\nI count.\n</think>\n\n51", "rain")
    return write_rows(
        path,
        [
            {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": text}]}
            for n, text in enumerate(said)
        ],
    )


async def test_keys_change_the_reasoning_setting_and_the_screen_shows_it(tmp_path: Path) -> None:
    app = open_on("data", model=thinking_model(tmp_path))
    app.workbench.set("data.sources", (Source(path=str(rows(tmp_path / "rows.jsonl"))),))
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "Reasoning: 1 of 3 rows, learned", "Thinking: on for the 1")
        await pilot.press("R")
        await wait_for_text(pilot, "Reasoning: 1 of 3 rows, only read")
        await pilot.press("r")
        await wait_for_text(pilot, "Thinking: on for every row")
        await pilot.press("r")
        await wait_for_text(pilot, "Reasoning: 1 of 3 rows, left out", "Thinking: off for every row")
        data = app.workbench.recipe.data
        assert (data.thinking, data.reasoning_in_loss) == ("off", False)
