"""The picture of a run to show to others: what is on it, what never is, and hostile text."""

from __future__ import annotations

import builtins
import getpass
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.errors import UserError
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.toml import dump
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import Evaluated, SampleGenerated
from qlora_tui.runs.task_metrics.task_evaluation import LossChange
from qlora_tui.runs.view import RunView
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.render.picture import broken, text_width
from qlora_tui.tui.render.run_card import card_svg, read_card, save_card
from qlora_tui.tui.screens.train.screen import show_run
from screenshots.recorded_runs import LONGER, NOT_A_NUMBER, recorded_run
from tests.support.step_events import an_environment
from tests.support.task_evaluations import a_row, put_evaluation
from tests.tui.fake_runs import BEGAN, TICKETS, FakeRun, write_fake_run
from tests.tui.screen_assertions import wait_for_text, wait_until

SVG = "{http://www.w3.org/2000/svg}"


def card(run: RunDir, *, with_answers: bool = True) -> ET.Element:
    view = RunView(run)
    view.refresh()
    return ET.fromstring(card_svg(view, read_card(view, with_answers=with_answers)))


def words_of(root: ET.Element) -> str:
    return " ".join(element.text or "" for element in root.iter(f"{SVG}text"))


def test_a_card_says_what_was_trained_and_what_came_of_it() -> None:
    root = card(recorded_run())
    assert (root.get("width"), root.get("height")) == ("1200", "630")
    shown = words_of(root)
    for said in (
        *("SmolLM2-135M-Instruct", "conversations.jsonl · 212 samples", "nf4 · r16 all-linear"),
        *("5.006", "2.781", "44% lower", "81 steps", "16 min", "29 tok/s", "1.4 GiB", "AMD EPYC"),
        *("What do you do on a rainy day?", "I'm a helpful AI", "Keeper's log: Black sky, no wind."),
    ):
        assert said in shown
    assert len(list(root.iter(f"{SVG}circle"))) == 9, "an evaluation is missing"


def test_a_card_names_no_folder_no_user_and_no_run() -> None:
    run = recorded_run()
    recipe = replace_setting(run.recipe(), "model.id", "/home/somebody/secret/SmolLM2-135M-Instruct")
    run.recipe_path.write_text(dump(recipe))
    content = ET.tostring(card(run), encoding="unicode")
    for private in (
        "/home",
        "somebody",
        "secret",
        "/models",
        run.id,
        str(Path.home()),
        f"/{getpass.getuser()}",
    ):
        assert private not in content
    assert "href" not in content and "font-face" not in content


def test_a_card_without_answers_has_nothing_of_the_data() -> None:
    shown = words_of(card(recorded_run(), with_answers=False))
    assert "rainy day" not in shown and "Keeper" not in shown and "2.78" in shown


def test_answers_to_validation_prompts_stand_in_for_sample_prompts() -> None:
    run = write_fake_run(FakeRun(state="finished", steps=60, total=60))
    rows = [a_row("red", "green", "red", prompt="Which color?")] * 8
    put_evaluation(run, rows, LossChange.of([2.0] * 8, [1.0] * 8, [1] * 8))
    shown = words_of(card(run))
    assert "“Which color?”" in shown and "before green after red" in shown


def test_a_loss_that_rose_is_not_shown_as_progress() -> None:
    run = recorded_run(LONGER)
    assert "37% lower" in words_of(card(run))
    with EventWriter(run.events_path) as log:
        log.append(Evaluated(at=BEGAN, step=0, loss=1.0))
    lines = run.events_path.read_text().splitlines(keepends=True)
    run.events_path.write_text(lines[-1] + "".join(line for line in lines[:-1] if '"compared"' not in line))
    assert "% higher" in words_of(card(run))


def test_a_run_that_was_never_measured_after_training_says_so() -> None:
    shown = words_of(card(recorded_run(NOT_A_NUMBER)))
    assert "not measured after training" in shown and "6 of 54 steps" in shown


HOSTILE = "</text><script>alert(1)</script>\x1b]52;c;aGk=\x07\u202eevil" + "W漢" * 200_000


def test_hostile_text_is_shown_as_text_and_stays_inside() -> None:
    run = write_fake_run(FakeRun(state="finished", steps=60, total=60))
    recipe = replace_setting(TICKETS, "model.id", f"models/{HOSTILE[:3000].replace('/', '')}")
    run.recipe_path.write_text(dump(recipe))
    with EventWriter(run.events_path) as log:
        log.append(SampleGenerated(at=BEGAN, step=0, prompt=HOSTILE[:60_000], answer=HOSTILE[:60_000]))
        log.append(SampleGenerated(at=BEGAN, step=60, prompt=HOSTILE[:60_000], answer=HOSTILE[:60_000]))
        log.append(an_environment(HOSTILE[:2000], at=BEGAN))
    root = card(run)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        *("svg", "rect", "line", "polyline", "polygon", "circle", "text")
    }
    content = ET.tostring(root, encoding="unicode")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", content) and len(content) < 100_000
    for line in root.iter(f"{SVG}text"):
        width = text_width(line.text or "", float(line.attrib["font-size"]))
        before = {"start": 0.0, "middle": 0.5, "end": 1.0}[line.attrib["text-anchor"]] * width
        assert 0 <= float(line.attrib["x"]) - before <= 1200 - width
        assert float(line.attrib["y"]) <= 620


@pytest.mark.parametrize("words", ["one two three four five", "W" * 50, "漢字" * 30, ""])
def test_a_broken_text_loses_nothing_but_its_end(words: str) -> None:
    whole = broken(words, 100, 20, 99)
    assert "".join(whole).replace(" ", "") == words.replace(" ", "")
    assert all(text_width(line, 20) <= 100 for line in whole)
    two = broken(words, 100, 20, 2)
    assert len(two) <= 2 and (two == whole) == (len(whole) <= 2)
    assert len(whole) <= 2 or two[-1].endswith("…")


def test_without_pillow_a_png_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_pillow(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "PIL":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(UserError, match="Pillow") as raised:
        save_card(recorded_run(), tmp_path / "card.png")
    assert "pillow" in raised.value.fix and not list(tmp_path.iterdir())


def test_a_png_has_two_pixels_for_each_unit(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    save_card(recorded_run(), tmp_path / "card.png")
    with image.open(tmp_path / "card.png") as picture:
        assert picture.size == (2400, 1260) and picture.getpixel((1, 1)) == (0x10, 0x15, 0x1C)


@pytest.mark.usefixtures("here")
async def test_i_saves_the_card_of_an_ended_run() -> None:
    run = recorded_run()
    app = QloraApp()
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await show_run(app, run)
        await wait_for_text(pilot, "[i] card")
        await pilot.press("i")
        await wait_for_text(pilot, "Save the run card", ".svg")
        await pilot.press("enter")
        await wait_until(pilot, Path(f"{run.id}.svg").exists)
