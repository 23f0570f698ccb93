"""The Data screen: rows, statistics and settings, on real files through real engines."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from qlora_tui.data.dataset_report import Piece, Shown
from qlora_tui.recipe.schema import Data, Recipe, Source
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import Finished
from qlora_tui.tui.screens.data.text import row_title
from tests.tui.data_screen import data_app, screen_of, whole
from tests.tui.fake_runs import FakeRun, write_fake_run
from tests.tui.sample_data import ticket, tickets, write_rows
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until
from tests.tui.workstation import open_on, settle

Snapshot = Callable[..., bool]
SIZES = [(80, 24), (120, 40), (200, 60)]


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


async def test_figures_are_drawn_for_the_width_after_a_resize(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    async with data_app(model, "tickets.jsonl").run_test(size=(200, 60)) as pilot:
        await wait_for_text(pilot, "row 1 of 40", "to learn")
        await pilot.resize_terminal(80, 24)
        await wait_until(pilot, lambda: "…" not in text_of(pilot.app).partition("Lengths")[2])


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
        await wait_for_text(pilot, "2 from 3 rows, 1 left out")
        await wait_for_text(
            pilot, "over 64: 1 cut right · 1", "answers only", "only read   control    control to learn"
        )
        await pilot.press("l")
        # No token of it is shown, whose style would need the legend.
        assert "control to learn" not in await wait_for_text(pilot, "Nothing is left to learn within 64")


async def test_too_few_steps_come_with_what_to_do(model: str, here: Path) -> None:
    write_rows(here / "pairs.jsonl", [{"prompt": f"Why {n}?", "completion": f"So {n}."} for n in range(40)])
    async with data_app(model, "pairs.jsonl").run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "too few to learn much", "On [5] Train, raise Epochs", "(now 8)")


@pytest.mark.parametrize(("weight", "steps"), [(1.0, 5), (3.0, 15)])
async def test_steps_count_the_weight_of_the_source(
    model: str, here: Path, weight: float, steps: int
) -> None:
    write_rows(here / "pairs.jsonl", [{"prompt": f"Why {n}?", "completion": f"So {n}."} for n in range(40)])
    app = data_app(model, "pairs.jsonl", packing=False, validation_fraction=0.0)
    app.workbench.set("data.sources", (Source(path=str(here / "pairs.jsonl"), weight=weight),))
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, f"about {steps} an epoch")


async def test_few_steps_are_blamed_on_what_ends_the_run(model: str, here: Path) -> None:
    write_rows(here / "pairs.jsonl", [{"prompt": f"Why {n}?", "completion": f"So {n}."} for n in range(400)])
    app = data_app(model, "pairs.jsonl", packing=False)
    app.workbench.set("training.max_steps", 5)
    async with app.run_test(size=(120, 40)) as pilot:
        text = await wait_for_text(pilot, "! Only 5 steps", "On [5] Train, raise Max steps.")
        assert "raise Epochs" not in text


async def test_few_steps_of_one_file_of_several_are_fine(model: str, here: Path) -> None:
    for name, rows in (("few.jsonl", 8), ("many.jsonl", 400)):
        write_rows(here / name, [{"prompt": f"Why {n}?", "completion": f"So {n}."} for n in range(rows)])
    async with data_app(model, "few.jsonl", "many.jsonl").run_test(size=(120, 40)) as pilot:
        await whole(pilot)
        assert "too few to learn" not in await wait_for_text(pilot, "Mix of 2 files", "No problems found")


async def test_the_legend_stays_where_only_later_rows_are_unreadable(model: str, here: Path) -> None:
    rows = "".join(json.dumps({"prompt": "Why?", "completion": f"So {n}."}) + "\n" for n in range(30_000))
    (here / "pairs.jsonl.gz").write_bytes(gzip.compress(rows.encode(), 0)[:-1000])
    async with data_app(model, "pairs.jsonl.gz").run_test(size=(120, 40)) as pilot:
        await whole(pilot)
        await wait_for_text(pilot, "So 0.<|im_end|>↵", "✗ Damaged compressed", "control to learn", "─ row 1")


async def test_plain_text_is_not_called_answers_only(model: str, here: Path) -> None:
    (here / "book.txt").write_text("A long story.\n")
    async with data_app(model, "book.txt").run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "all tokens")


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
    async with app.run_test(size=(200, 60)) as pilot:
        text = await wait_for_text(pilot, "max length", "▸ now", "90%", "memory        time", "fits")
        assert "in all, about" in text
        (line,) = [line for line in text.splitlines() if "▸ now" in line]
        assert "64" in line
        assert "MiB" in line


async def test_the_cost_of_a_length_fits_one_line(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    app = data_app(model, "tickets.jsonl", max_length=64)
    trained_before(app.workbench.recipe)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "about 8 min")
        await pilot.press("v")
        text = await wait_for_text(pilot, "▸ now", "half")
        lines = [line for line in text.splitlines() if any(f" {name}   " in line for name in ("now", "half"))]
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
        text = await wait_for_text(pilot, "column 'messages'", "max length", "▸ It counts twice")
        assert "<|im_start|>" not in text
        await pilot.press("v")
        await wait_for_text(pilot, "<|im_start|>")
        assert "No answer to learn" not in text_of(pilot.app)
        await pilot.press("v")
        await wait_for_text(pilot, "<|im_start|>", "No answer to learn")


@pytest.mark.parametrize(("width", "end"), [(80, "calls-as-text"), (58, "tools-as-text …"), (45, "learn …")])
def test_notes_on_a_row_never_end_in_the_middle(width: int, end: str) -> None:
    piece = Piece("a", in_loss=True, special=False)
    shown = Shown(1, ((piece,),), (256,), (62,), notes=("tools-as-text", "calls-as-text"))
    words = row_title(("", 1), None, shown, Data(max_length=256), width).plain
    assert words.rstrip().endswith(end) and len(words) <= width


@pytest.mark.parametrize(("too_long", "in_loss"), [("cut-right", "256 of 256"), ("split", "1,000 of 1,000")])
def test_a_split_row_counts_all_its_tokens_in_the_loss(too_long: Any, in_loss: str) -> None:
    trained = (256, 256, 256, 232) if too_long == "split" else (256,)
    shown = Shown(1, tuple((Piece("x", True, False),) for _ in trained), (1000,), trained)
    words = row_title(("", 1), None, shown, Data(max_length=256, overflow=too_long), 80).plain
    assert f"{in_loss} tokens to learn" in words
