"""The Data screen on real files, through real engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from qlora_tui.data.dataset_report import Piece, Shown
from qlora_tui.demo.conversations import CONVERSATIONS
from qlora_tui.recipe.schema import Data, Recipe, Source
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import Finished
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.data.file_picker import FilePickerScreen
from qlora_tui.tui.screens.data.screen import DataScreen
from qlora_tui.tui.screens.data.text import row_line
from tests.data.fake_dataset_hub import dataset_hub
from tests.data.test_untrained_tokens import WIDTH
from tests.data.test_untrained_tokens import model as faint_model
from tests.tui.fake_runs import FakeRun, write_fake_run
from tests.tui.sample_data import readable_model, ticket, tickets, write_rows
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until
from tests.tui.workstation import config_folder, open_on, settle

Snapshot = Callable[..., bool]
SIZES = [(80, 24), (120, 40), (200, 60)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files are named as the user standing beside them would."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(private_home: Path) -> str:
    return readable_model(private_home)


def data_app(model: str, *sources: str | Source, **settings: object) -> QloraApp:
    app = open_on("data", model=model)
    given = tuple(Source(path=s) if isinstance(s, str) else s for s in sources)
    app.workbench.set("data.sources", given)
    for key, value in settings.items():
        app.workbench.set(f"data.{key}", value)
    return app


def screen_of(app: Any) -> DataScreen:
    assert isinstance(app.screen, DataScreen)
    return app.screen


async def whole(pilot: Pilot[Any]) -> None:
    """Until every row has been read, and what follows from it is shown."""
    await settle(pilot)
    await settle(pilot)


@pytest.mark.parametrize("size", SIZES)
def test_looks_of_a_file(snap_compare: Snapshot, model: str, here: Path, size: tuple[int, int]) -> None:
    tickets(here / "tickets.jsonl")
    app = data_app(model, "tickets.jsonl", max_length=128)
    assert snap_compare(app, terminal_size=size, run_before=whole)


@pytest.mark.parametrize("size", SIZES[:2])
def test_looks_of_a_row_with_a_problem_and_two_sources(
    snap_compare: Snapshot, model: str, here: Path, size: tuple[int, int]
) -> None:
    tickets(here / "tickets.jsonl")
    write_rows(here / "mail.jsonl", [{"prompt": "a", "completion": "b"}])
    app = data_app(model, Source(path="tickets.jsonl", weight=2), "mail.jsonl", max_length=128)

    async def move(pilot: Pilot[Any]) -> None:
        await whole(pilot)
        await pilot.press("N")
        await whole(pilot)

    assert snap_compare(app, terminal_size=size, run_before=move)


@pytest.mark.parametrize("size", SIZES[:2])
def test_looks_of_no_data(snap_compare: Snapshot, model: str, size: tuple[int, int]) -> None:
    assert snap_compare(open_on("data", model=model), terminal_size=size, run_before=settle)


@pytest.mark.parametrize("size", SIZES[:2])
def test_looks_of_rows_in_no_known_format(
    snap_compare: Snapshot, model: str, here: Path, size: tuple[int, int]
) -> None:
    write_rows(here / "odd.jsonl", [{"frage": "Wo?", "antwort": "Hier.", "n": 1}] * 3)
    assert snap_compare(data_app(model, "odd.jsonl"), terminal_size=size, run_before=whole)


async def test_a_row_shows_trained_tokens_and_keys_move_between_rows(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    async with data_app(model, "tickets.jsonl").run_test(size=(120, 40)) as pilot:
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


async def test_the_help_shows_keys_as_they_are_on_the_keyboard(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    async with data_app(model, "tickets.jsonl").run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "row 1 of 40")
        await pilot.press("question_mark")
        assert "colon" not in await wait_for_text(pilot, "Help: Data", "Go to a row by number.")


async def test_rows_called_by_their_lines_are_not_beyond_the_last(model: str, here: Path) -> None:
    write_rows(here / "spaced.jsonl", [ticket(1), "", "", ticket(2)])
    async with data_app(model, "spaced.jsonl").run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "row 1 of 4", "2 rows")


async def test_the_problem_key_cycles_and_enter_opens_a_problems_rows(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    async with data_app(model, "tickets.jsonl", max_length=1024).run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "No answer to learn ×1", "Duplicate row ×1")
        await pilot.press("n")
        await wait_for_text(pilot, "row 39 of 40", "⚠ Duplicate row")
        await pilot.press("n")
        await wait_for_text(pilot, "row 40 of 40", "This row cannot be used.")
        await pilot.press("n")
        await wait_for_text(pilot, "row 39 of 40")
        problems = pilot.app.screen.query_one("#problems")
        problems.focus()
        await pilot.press("G", "enter")
        await wait_for_text(pilot, "row 40 of 40")


async def test_the_fix_key_trains_tokens_the_model_never_learned(private_home: Path, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    folder = config_folder(private_home, "HuggingFaceTB__SmolLM2-135M")
    faint_model(folder, {"<|im_end|>": [0.0] * WIDTH})
    app = data_app(str(folder), "tickets.jsonl")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "⚠ The base model has never learned these", "▸ [m] train <|im_end|>")
        await pilot.press("m")
        assert list(app.workbench.recipe.lora.trainable_tokens) == ["<|im_end|>"]
        assert any("<|im_end|>" in notification.message for notification in app._notifications)
        await wait_until(pilot, lambda: "never learned" not in text_of(app))
        await pilot.press("m", "u")
        assert not app.workbench.recipe.lora.trainable_tokens
        await wait_for_text(pilot, "never learned these")


async def test_the_fix_key_trains_on_the_chosen_answers_of_preferences(model: str, here: Path) -> None:
    rows = [{"prompt": f"Which {n}?", "chosen": f"This {n}.", "rejected": "That."} for n in range(1, 6)]
    write_rows(here / "pairs.jsonl", rows)
    app = data_app(model, "pairs.jsonl")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "✗ Preference data", "[m] train on the chosen answers only", "[o] open")
        await pilot.press("m")
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
        text = await wait_for_text(pilot, "⚠ Long text ×1", "▸ [m] split into")
        rows = int(text.partition("[m] split into ")[2].split(" ")[0])
        await pilot.press("m")
        assert app.workbench.recipe.data.overflow == "split"
        await wait_for_text(pilot, f"3 rows → {rows + 2} samples")
        assert "Long text" not in text_of(app)


async def test_the_fix_key_is_off_without_a_fixable_problem(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    app = data_app(model, "tickets.jsonl", max_length=1024)
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "Duplicate row ×1")
        before = app.workbench.recipe
        await pilot.press("m")
        assert app.workbench.recipe == before


async def test_without_a_model_rows_are_shown_as_stored(here: Path) -> None:
    tickets(here / "tickets.jsonl")
    async with data_app("", "tickets.jsonl").run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "Select a model with [1]", "Where is parcel 1?", "chars", "40 rows")


async def test_a_missing_model_is_explained_above_the_row(here: Path) -> None:
    tickets(here / "tickets.jsonl")
    async with data_app("org/none", "tickets.jsonl").run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "✗ Model not found", "Where is parcel 1?", "40 rows")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, ("✗ No such data", "odd.jsonl does not exist.", "▸ Check the path", "[o] open")),
        ([], ("✗ Empty file", "odd.jsonl is empty.", "[x] remove this one")),
        (["{oops"] * 3, ("✗ Not valid JSON", "Line 1 is not valid JSON", "▸ Fix the line")),
        ([{"a": "b"}] * 3, ("✗ No usable field", "Its rows contain:", "[c] map the columns")),
    ],
)
async def test_a_files_error_is_shown_in_place_of_the_sample(
    model: str, here: Path, content: list[Any] | None, says: tuple[str, ...]
) -> None:
    if content is not None:
        write_rows(here / "odd.jsonl", content)
    async with data_app(model, "odd.jsonl").run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, *says)
        await pilot.press("x")
        await wait_for_text(pilot, "No data yet.")
        await pilot.press("u")
        await wait_for_text(pilot, *says)


async def test_opening_a_file_replaces_an_unusable_one(model: str, here: Path) -> None:
    write_rows(here / "odd.jsonl", [{"foo": 1}] * 3)
    good = tickets(here / "tickets.jsonl")
    other = write_rows(here / "other.jsonl", [ticket(n) for n in range(1, 4)])
    app = data_app(model, "odd.jsonl")
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "✗ No usable field", "[o] open")
        screen_of(app).add_source(good)
        await wait_for_text(pilot, "Where is parcel 1?", "Replaced odd.jsonl")
        assert [s.path for s in app.workbench.recipe.data.sources] == [str(good)]
        screen_of(app).add_source(other)
        assert [s.path for s in app.workbench.recipe.data.sources] == [str(good), str(other)]
        await pilot.press("u", "u")
        assert [s.path for s in app.workbench.recipe.data.sources] == ["odd.jsonl"]


async def test_a_file_fixed_on_disk_is_read_again_on_return(model: str, here: Path) -> None:
    file = write_rows(here / "tickets.jsonl", ["{broken", ticket(1)])
    app = data_app(model, "tickets.jsonl")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "Not valid JSON")
        write_rows(file, [ticket(1), ticket(2)])
        await pilot.press("3", "2")
        await wait_for_text(pilot, "Parcel 1 is on its way", "No problems found")
        assert "Not valid JSON" not in text_of(app)
        write_rows(file, ["{broken", ticket(1)])
        await pilot.press("f5")
        await wait_for_text(pilot, "Not valid JSON")


async def test_the_first_own_data_replaces_the_demos(model: str, here: Path) -> None:
    own = tickets(here / "tickets.jsonl")
    app = data_app(model, str(CONVERSATIONS))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await wait_for_text(pilot, "conversations.jsonl")
        screen_of(app).add_source(own)
        await wait_for_text(pilot, "Replaced the demo's data", "Parcel 1")
        assert [source.path for source in app.workbench.recipe.data.sources] == [str(own)]
        screen_of(app).add_source(own.with_name("more.jsonl"))
        assert len(app.workbench.recipe.data.sources) == 2
        await pilot.press("u", "u")
        assert [source.path for source in app.workbench.recipe.data.sources] == [str(CONVERSATIONS)]


async def test_removing_a_source_asks_where_its_list_is_hidden(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    app = data_app(model, "tickets.jsonl")
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        shown = await wait_for_text(pilot, "Parcel 1")
        assert "x Remove" in shown.splitlines()[-1]
        await pilot.press("v", "v")
        await wait_until(pilot, lambda: screen_of(app).query_one("#sources").region.height == 0)
        await pilot.press("x")
        await wait_for_text(pilot, "Remove the source?", "tickets.jsonl")
        await pilot.press("n")
        assert app.workbench.recipe.data.sources
        await pilot.press("v", "x")
        await wait_for_text(pilot, "Removed tickets.jsonl")
        assert not app.workbench.recipe.data.sources


async def test_removing_a_source_keeps_another_of_the_same_file(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    app = data_app(model, "tickets.jsonl", "tickets.jsonl")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "Parcel 1")
        await pilot.press("x")
        await wait_until(pilot, lambda: len(app.workbench.recipe.data.sources) == 1)


async def test_a_model_for_estimates_has_no_tokenizer(private_home: Path, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    config_only = str(config_folder(private_home, "Qwen__Qwen2.5-7B"))
    async with data_app(config_only, "tickets.jsonl").run_test(size=(120, 40)) as pilot:
        shown = await wait_for_text(pilot, "No tokenizer yet", "Qwen2.5-7B is selected for estimates only")
        assert "nothing to train" not in shown


async def test_one_broken_line_is_named_and_the_others_are_read(model: str, here: Path) -> None:
    rows: list[Any] = [ticket(n) for n in range(1, 21)]
    rows[6] = '{"messages": oops'
    write_rows(here / "tickets.jsonl", rows)
    async with data_app(model, "tickets.jsonl").run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "20 rows → 19 samples", "✗ Not valid JSON ×1")
        await pilot.press("n")
        await wait_for_text(
            pilot, "This row cannot be used.", "Line 7 is not valid JSON", "▸ Correct or remove the line"
        )


async def test_columns_of_an_unknown_format_can_be_mapped_in_place(model: str, here: Path) -> None:
    write_rows(here / "odd.jsonl", [{"frage": f"Wo ist {n}?", "antwort": "Hier."} for n in range(9)])
    async with data_app(model, "odd.jsonl").run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "✗ No usable field")
        await pilot.press("c")
        await wait_for_text(pilot, "Columns of prompt-completion", "frage, antwort")
        await pilot.press(*"frage", "tab", *"antwort", "enter")
        await wait_for_text(pilot, "prompt-completion: frage, antwort", "9 rows → 9 samples", "Wo ist 0?")


async def test_the_format_key_reads_the_rows_in_another(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    app = data_app(model, "tickets.jsonl")
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("f")
        assert app.workbench.recipe.data.sources[0].format == "messages"


async def test_the_format_key_skips_formats_that_do_not_fit(model: str, here: Path) -> None:
    write_rows(here / "pairs.jsonl", [{"prompt": f"Q {n}", "completion": f"A {n}"} for n in range(3)])
    app = data_app(model, "pairs.jsonl")
    formats: list[str] = []
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        while not formats or formats[-1] != "auto":
            await pilot.press("f")
            formats.append(app.workbench.recipe.data.sources[0].format)
            await wait_for_text(pilot, "3 rows → 3 samples")
        await wait_for_text(pilot, "Format detected.")
    assert "prompt-completion" in formats and "messages" not in formats


async def test_the_format_key_tries_every_format_where_none_is_detected(model: str, here: Path) -> None:
    write_rows(here / "odd.jsonl", [{"a": 1}])
    app = data_app(model, "odd.jsonl")
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("f")
        assert app.workbench.recipe.data.sources[0].format == "messages"
        await wait_for_text(pilot, "✗ Not in that format", "which needs messages")


async def test_the_statistics_alone_still_show_why_nothing_can_be_read(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    app = data_app(model, "tickets.jsonl")
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "row 1 of 40")
        await pilot.press("v")
        await wait_for_text(pilot, "max length")
        app.workbench.set("data.sources", (Source(path="missing.jsonl"),))
        app.recipe_edited()
        await wait_for_text(pilot, "✗ No such data")


async def test_rows_left_out_are_counted_apart_from_those_cut(model: str, here: Path) -> None:
    long, short = "why? " * 100, "so."
    pairs = [(short, short), (long, short), (short, long)]
    write_rows(here / "pairs.jsonl", [{"prompt": p, "completion": c} for p, c in pairs])
    async with data_app(model, "pairs.jsonl", max_length=64).run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "3 rows → 2 samples (1 left out)")
        await wait_for_text(
            pilot, "over 64: 1 cut right · 1 left out", "answers only", "in loss read  control"
        )


async def test_plain_text_is_not_called_answers_only(model: str, here: Path) -> None:
    (here / "book.txt").write_text("A long story.\n")
    async with data_app(model, "book.txt").run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "everything in loss")


async def test_a_broken_row_has_the_sign_of_its_problem(model: str, here: Path) -> None:
    write_rows(here / "tickets.jsonl", [ticket(1), "{bad", ticket(2)])
    async with data_app(model, "tickets.jsonl").run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "✗ Not valid JSON")
        await pilot.press("n")
        await wait_for_text(pilot, "row 2 of 3")
        assert "⚠ Not valid JSON" not in text_of(pilot.app)


async def test_keys_change_length_split_weight_and_loss_mask(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    app = data_app(model, "tickets.jsonl", max_length=64)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "✂ 64")
        await pilot.press("plus", "t", "e", "b")
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


def trained_before(recipe: Recipe) -> None:
    """A run of it has finished, at 10 tokens a second."""
    run = write_fake_run(FakeRun(state="queued", recipe=recipe))
    with EventWriter(run.events_path) as log:
        log.append(Finished(at=1.0, step=9, seconds=9.0, tokens_per_s=10.0))


async def test_costs_of_other_lengths_include_the_last_runs_time(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    app = data_app(model, "tickets.jsonl", max_length=64)
    trained_before(app.workbench.recipe)
    async with app.run_test(size=(120, 40)) as pilot:
        text = await wait_for_text(pilot, "max length", "▸ now", "p90", "memory      time", "fits")
        assert "in all, about" in text
        (line,) = [line for line in text.splitlines() if "▸ now" in line]
        assert "64" in line
        assert "MiB" in line


async def test_the_cost_of_a_length_fits_one_line(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    app = data_app(model, "tickets.jsonl", max_length=64)
    trained_before(app.workbench.recipe)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "max length", "about 8 min")
        await pilot.press("v")
        text = await wait_for_text(pilot, "▸ now", "p50")
        lines = [
            line for line in text.splitlines() if any(f" {name} " in line[:9] for name in ("now", "p50"))
        ]
        assert len(lines) == 2
        assert all("MiB  fits" in line for line in lines)


async def test_a_row_is_shown_while_a_large_file_is_read(model: str, here: Path) -> None:
    write_rows(here / "large.jsonl", [ticket(n) for n in range(1, 12_001)])
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


async def test_the_row_past_the_end_is_not_shown(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    app = data_app(model, "tickets.jsonl")
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await wait_for_text(pilot, "row 1 of 40")
        await pilot.press("colon", *"99", "enter")
        await wait_for_text(pilot, "ends before row 99", "row 1 of 40")


async def test_the_statistics_can_fill_the_window(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    async with data_app(model, "tickets.jsonl").run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "row 1 of 40", "No answer to learn")
        await pilot.press("v")
        text = await wait_for_text(pilot, "column 'messages'", "max length", "▸ The row has no")
        assert "<|im_start|>" not in text
        await pilot.press("v")
        await wait_for_text(pilot, "<|im_start|>")
        assert "No answer to learn" not in text_of(pilot.app)
        await pilot.press("v")
        await wait_for_text(pilot, "<|im_start|>", "No answer to learn")


async def test_a_file_is_found_by_partial_name_and_remembered(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    tickets(here / "other.jsonl")
    (here / "picture.png").touch()
    app = open_on("data", model=model)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("o")
        await wait_for_text(pilot, "other.jsonl", "tickets.jsonl", "../")
        assert isinstance(app.screen, FilePickerScreen)
        assert "picture.png" not in text_of(app)
        await pilot.press(*"kets")
        await pilot.press("enter")
        await wait_for_text(pilot, "Where is parcel 1?")
        await pilot.press("o")
        await wait_for_text(pilot, "recent")
        await pilot.press("down", "down", "enter")
        await pilot.pause()
        assert [Path(s.path).name for s in app.workbench.recipe.data.sources] == [
            "tickets.jsonl",
            "tickets.jsonl",
        ]


@pytest.mark.parametrize(
    ("width", "end"), [(80, "calls-as-text"), (58, "tools-as-text …"), (45, "in loss …")]
)
def test_notes_on_a_row_never_end_in_the_middle(width: int, end: str) -> None:
    piece = Piece("a", in_loss=True, special=False)
    shown = Shown(1, ((piece,),), (256,), (62,), notes=("tools-as-text", "calls-as-text"))
    words = row_line(("", 1), None, shown, Data(max_length=256), width).plain
    assert words.rstrip().endswith(end) and len(words) <= width


@pytest.mark.parametrize(("too_long", "in_loss"), [("cut-right", "256 of 256"), ("split", "1,000 of 1,000")])
def test_a_split_row_counts_all_its_tokens_in_the_loss(too_long: Any, in_loss: str) -> None:
    trained = (256, 256, 256, 232) if too_long == "split" else (256,)
    shown = Shown(1, tuple((Piece("x", True, False),) for _ in trained), (1000,), trained)
    words = row_line(("", 1), None, shown, Data(max_length=256, overflow=too_long), 80).plain
    assert f"{in_loss} tokens in loss" in words


async def test_the_file_dialogs_keys_are_not_covered_by_notifications(model: str, here: Path) -> None:
    app = data_app(model)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("o")
        await wait_for_text(pilot, "Enter open · Tab complete · Ctrl+O open folder · Esc close")
        assert app.screen.query_one("#keys").region.bottom < 6


async def test_single_turn_rows_do_not_open_the_column_mapping(model: str, here: Path) -> None:
    turn = {"message_id": "a", "parent_id": None, "role": "prompter", "text": "Hi"}
    app = data_app(model, str(write_rows(here / "turns.jsonl", [turn] * 3)))
    async with app.run_test(size=(120, 40)) as pilot:
        shown = await wait_for_text(pilot, "Conversations in pieces", "Join the turns")
        assert "Press [c]" not in shown


async def test_a_path_can_be_typed_completed_or_chosen_as_folder(model: str, here: Path) -> None:
    (here / "set").mkdir()
    tickets(here / "set" / "tickets.jsonl")
    app = open_on("data", model=model)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("o")
        await pilot.press(*"nothing", "enter")
        await wait_for_text(pilot, "No name here contains 'nothing'")
        app.screen.query_one(Input).value = f"{here}/se"
        await pilot.pause()
        await pilot.press("tab")
        await wait_for_text(pilot, "tickets.jsonl")
        await pilot.press("ctrl+o")
        await wait_for_text(pilot, "set", "Where is parcel 1?")
        assert app.workbench.recipe.data.sources[0].path == str(here / "set")


async def test_rows_and_problems_go_through_every_file_of_a_folder(model: str, here: Path) -> None:
    (here / "set").mkdir()
    write_rows(here / "set" / "a.jsonl", [ticket(1), ticket(2)])
    write_rows(here / "set" / "b.jsonl", [ticket(3), ticket(3)])
    write_rows(here / "set" / "c.jsonl", [ticket(4), ticket(5), ticket(5)])
    async with data_app(model, "set").run_test(size=(120, 40)) as pilot:
        await wait_for_text(
            pilot, "a.jsonl row 1 of 2", "Duplicate row ×1  b.jsonl", "Duplicate row ×1  c.jsonl"
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


@pytest.mark.slow
async def test_a_dataset_that_cannot_be_had_says_why(model: str) -> None:
    app = open_on("data", model=model)
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.press("o")
        await pilot.press(*"owner/parcels", "enter")
        await wait_for_text(
            pilot, "✗ No such data", "owner/parcels is neither a local file nor a dataset", "[x] remove"
        )
