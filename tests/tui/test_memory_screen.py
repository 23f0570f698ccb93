from __future__ import annotations

import json
import re
from functools import partial
from itertools import product
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from qlora_tui.catalog import described
from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.catalog.described import describe
from qlora_tui.errors import UserError
from qlora_tui.formatting import GIB, format_delta
from qlora_tui.memory import estimate, traces, trainer_execution
from qlora_tui.memory.estimate import PRECISIONS, with_precision
from qlora_tui.memory.quality import Difference, LayerError, Quality
from qlora_tui.memory.recording import StepTrace
from qlora_tui.memory.step import PHASES, Moment
from qlora_tui.recipe.fields import get_setting, replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import exact_memory
from qlora_tui.tui import app as app_module
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.memory import screen as memory
from qlora_tui.tui.screens.memory.screen import MemoryScreen
from qlora_tui.tui.screens.memory.step_panels import (
    item_lines,
    part_of,
    parts_of,
    precision_bars,
    stacked_bar,
)
from qlora_tui.tui.screens.memory.timeline import timeline_lines
from qlora_tui.tui.screens.memory.what_fits import Solution
from qlora_tui.tui.widgets.controls import HEADING
from qlora_tui.worker import JobStopped, Progress
from tests.memory.models import traced_peaks
from tests.support.counting import count_estimates
from tests.tui.screen_assertions import segments_of, text_of, wait_for_text, wait_until
from tests.tui.workstation import config_folder, config_of, open_on, settle


@pytest.fixture
def seven_billion(private_home: Path) -> str:
    return str(config_folder(private_home, "Qwen__Qwen2.5-7B"))


@pytest.mark.parametrize("width", [30, 37, 38, 40, 46, 90, 160])
def test_an_item_is_one_line_at_any_width(width: int) -> None:
    of_recipe = estimate(Recipe(), parse_architecture(config_of("Qwen__Qwen2.5-7B")))
    nested, flat = (item_lines(of_recipe, False, is_nested, width) for is_nested in (True, False))
    assert sorted(key for key, _ in nested) == sorted(key for key, _ in flat if key != f"{HEADING}items")
    for key, line in (*nested, *flat):
        assert line.cell_length <= width and ("%" in line.plain or key == f"{HEADING}items")


def _big(app: QloraApp) -> None:
    app.workbench.set("data.max_length", 8192)
    app.workbench.set("training.micro_batch_size", 4)


KEYS: tuple[tuple[str, str, object], ...] = (
    ("b b", "training.micro_batch_size", 4),
    ("b b B", "training.micro_batch_size", 2),
    ("B", "training.micro_batch_size", 1),
    ("s", "data.max_length", 2048),
    ("S", "data.max_length", 512),
    ("r", "lora.rank", 32),
    ("R R R R R R", "lora.rank", 1),
    ("t", "lora.target_modules", ("q_proj", "k_proj", "v_proj", "o_proj")),
    ("t t", "lora.target_modules", ("q_proj", "v_proj")),
    ("t t t", "lora.target_modules", ("all-linear",)),
    ("c", "training.gradient_checkpointing", "on"),
    ("c c", "training.gradient_checkpointing", "off"),
    ("n n m", "quantization.method", "none"),
    ("n m", "quantization.method", "int8"),
    ("r r u", "lora.rank", 32),
    ("r r u ctrl+r", "lora.rank", 64),
)


async def test_a_key_changes_a_setting_and_the_bars_and_costs_little(
    seven_billion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Slower questions are for another test.
    monkeypatch.setattr(memory, "SETTLED_S", 60.0)
    monkeypatch.setattr(app_module, "_PLAN_SETTLE_S", 60.0)
    app = open_on("memory", model=seven_billion)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "6.3 GiB")
        start = app.workbench.recipe
        for rank in (8, 32, 64, 128, 256):
            # Three estimates, of some 370 allocations and frees each.
            assert count_estimates(partial(app.edit, "lora.rank", rank)) < 6
            await pilot.pause()
        app.workbench.replace(start)
        for keys, path, value in KEYS:
            await pilot.press(*keys.split())
            assert get_setting(app.workbench.recipe, path) == value, keys
            estimates = app.workbench.comparison(app.memory_budget.device)
            assert isinstance(estimates, dict)
            await wait_for_text(pilot, f"{estimates['nf4'].total_bytes / 2**30:.1f} GiB")
            app.workbench.replace(start)
            app.recipe_edited()
            screen = app.screen
            assert isinstance(screen, MemoryScreen)
            while screen.precision != "nf4":
                await pilot.press("n")


@pytest.mark.parametrize(("limit_gib", "is_broken"), [(12, False), (48, True)])
def test_a_limit_far_above_is_beyond_a_break_of_the_axis(limit_gib: int, is_broken: bool) -> None:
    architecture, recipe = parse_architecture(config_of("Qwen__Qwen2.5-7B")), Recipe()
    compared = {
        precision: estimate(with_precision(recipe, precision), architecture) for precision in PRECISIONS
    }
    lines = precision_bars(compared, "nf4", "nf4", limit_gib << 30, 116, can_train=True)
    assert [("╱╱" in line.plain) for line in lines] == [is_broken] * 3
    largest = max(line.plain.count("░") for line in lines)
    assert largest > 30, "the largest fills most of its line, whatever the limit is"
    # A bar beyond the limit ends where the tracks of the others end, with its size relative to the limit, and
    # a small part is not rounded away.
    total = compared["fp16"].total_bytes
    limit = total * 2 // 3
    clipped, fits = (stacked_bar(compared[each], limit, total, 40).plain for each in ("fp16", "nf4"))
    assert clipped.endswith("▶150%") and len(clipped) == len(fits) == 40
    assert clipped.index("▶") == len(fits.rstrip()) - 1
    assert all(
        {glyph for glyph in "░▚█:" if glyph in stacked_bar(compared["fp16"], full, total, 12).plain}
        == set("░▚█:")
        for full in (total, 2 * total)
    )
    # The length of a part does not depend on the parts before it, so that it is the same at each rank.
    for width, rank in product(range(60, 80), (4, 64)):
        each = estimate(replace_setting(recipe, "lora.rank", rank), architecture)
        bar = stacked_bar(each, 12 << 30, each.total_bytes, width).plain
        sizes = {part.texture: round(size / (12 << 30) * width) for part, size in parts_of(each)}
        assert [bar.count(glyph) for glyph in "░▚█"] == [max(1, sizes[glyph]) for glyph in "░▚█"]


async def test_what_fits_is_found_again_once_the_structure_was_read(
    private_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "HuggingFaceTB__SmolLM2-135M"
    (private_home / "config.json").write_text(json.dumps(config_of(name) | {"model_type": "apertus"}))
    exact, is_read, are_outlines = describe(config_of(name)), Event(), list[bool]()

    def read(job: str, configs: list[Any], **_: Any) -> list[described.Description]:
        is_read.wait(20)
        return [described.Description(architecture=exact)]

    def solve(recipe: Recipe, architecture: Architecture, budget: object, *, fits: bool) -> Solution:
        are_outlines.append(architecture.is_outline)
        return Solution()

    monkeypatch.setattr(described, "run_job", read)
    monkeypatch.setattr(memory, "solve", solve)
    app = open_on("memory", model=str(private_home))
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(pilot, lambda: are_outlines == [True])
        is_read.set()
        await wait_until(pilot, lambda: are_outlines == [True, False])


async def test_targets_that_the_model_lacks_are_skipped(private_home: Path) -> None:
    app = open_on("memory", model=str(config_folder(private_home, "openai-community__gpt2")))
    async with app.run_test() as pilot:
        await wait_for_text(pilot, "NF4")
        await pilot.press("t")
        assert app.workbench.recipe.lora.target_modules == ("all-linear",)


async def test_the_cheapest_change_or_the_one_under_the_cursor_is_applied_and_undone(
    seven_billion: str,
) -> None:
    app = open_on("memory", model=seven_billion, gpu_gib=12)
    _big(app)
    before = app.workbench.recipe
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "does not fit", "▸ a Micro-batch 4 → 1", "same effective", "f choose")
        await pilot.press("a")
        assert app.workbench.recipe.training.micro_batch_size < 4
        assert app.workbench.recipe.effective_batch >= before.effective_batch
        await wait_for_text(pilot, "Micro-batch 4 → 1")
        architecture = app.workbench.architecture()
        assert not isinstance(architecture, Exception)
        estimated = estimate(app.workbench.recipe, architecture, device=app.memory_budget.device)
        assert estimated.band.high_bytes <= app.memory_budget.bytes
        await pilot.press("u")
        assert app.workbench.recipe == before
        app.clear_notifications()

        await wait_for_text(pilot, "▸ a Micro-batch 4 → 1", "f choose")
        await pilot.press("f", "j")
        await wait_for_text(pilot, "Sequence length 8,192")
        await pilot.press("f", "f", "enter")
        await wait_for_text(pilot, "Press [u] to undo")
        assert app.workbench.recipe.data.max_length < 8192
        assert app.workbench.recipe.training.micro_batch_size == 4
        assert app.screen.query_one("#items").has_focus
        await pilot.press("a")
        await pilot.pause()


async def test_a_model_larger_than_the_card_is_offered_streamed(seven_billion: str) -> None:
    app = open_on("memory", model=seven_billion, gpu_gib=6)
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "of 28 layers from", "doctor` measures how")
        await pilot.press("a")
        await wait_for_text(pilot, "10 of 28 layers are streamed")


async def test_the_exact_form_follows_the_instant_one(
    seven_billion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, asked = Event(), list[Recipe]()

    def trace(config: object, recipe: Recipe, *args: object, **options: object) -> StepTrace:
        asked.append(recipe)
        assert ready.wait(20)
        return traced_peaks(forward_bytes=2 << 30, backward_bytes=recipe.data.max_length * (15 << 20))

    monkeypatch.setattr(exact_memory, "trace_step", trace)
    app = open_on("memory", model=seven_billion, gpu_gib=16)
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "estimated, tracing…", "6.3 GiB")
        ready.set()
        await wait_for_text(pilot, " 17.2 GiB")
        await wait_for_text(pilot, "traced: 17.2 of 16.0 GiB, uncertain. Previous estimate: fits.")
        # What halving the length saves, and the change that fits, follow.
        await wait_for_text(pilot, "NF4 and its changes traced", "-7.5 GiB")
        asked.clear()
        await pilot.press("r")
        await wait_until(pilot, lambda: asked)
        await wait_for_text(pilot, "traced")
        assert asked[0].lora.rank == 32


@pytest.mark.slow
def test_a_traced_step_stands_in_for_the_formula(private_home: Path) -> None:
    describe(config_of("LiquidAI__LFM2-350M"))
    app = open_on("memory", model=str(config_folder(private_home, "LiquidAI__LFM2-350M")))
    workbench, device = app.workbench, app.memory_budget.device
    traced = traced_peaks(forward_bytes=2 << 30, backward_bytes=3 << 30)
    architecture = workbench.architecture()
    assert not isinstance(architecture, UserError)
    execution = trainer_execution(workbench.recipe, device, architecture)
    traces.remember(workbench.recipe, architecture, execution, traced)
    device = app.memory_budget.device
    estimates = workbench.comparison(device)
    assert isinstance(estimates, dict) and estimates["nf4"].traced and not estimates["fp16"].traced
    assert estimates["nf4"].bytes_of("activations") == 3 << 30
    workbench.set("lora.rank", 32)
    estimates = workbench.comparison(device)
    assert isinstance(estimates, dict) and not estimates["nf4"].exact


async def test_another_gpu_size_can_be_assumed_in_the_app(seven_billion: str) -> None:
    app = open_on("memory", model=seven_billion)
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "against 24.0 GiB")
        await pilot.press("f3")
        await wait_for_text(pilot, "Assume another GPU size")
        await pilot.press("ctrl+u", *"none", "enter")
        await wait_for_text(pilot, "Enter a number of GiB")
        await pilot.press("ctrl+u", *"6", "enter")
        await wait_for_text(pilot, "against 6.0 GiB", "Estimates are for a GPU with 6.0 GiB")
        await pilot.press("f3")
        await wait_for_text(pilot, "Assume another GPU size")
        await pilot.press("ctrl+u", "enter")
        await wait_for_text(pilot, "this machine's memory")


SAVINGS = {
    "S": r"s S +length +16,384 +[\d,]+ +",
    "R": r"r R +rank +16 +\d+ +",
    "t": r"t +targets +all(-linear)? ?→ ?q,k,v,o +",
    "c": r"c +recompute +on → off +",
}
"""Key of a setting, and what its line begins with."""


async def test_each_setting_shows_what_its_key_saves(seven_billion: str) -> None:
    app = open_on("memory", model=seven_billion)
    app.workbench.set("data.max_length", 16384)
    app.workbench.set("training.gradient_checkpointing", "on")
    start = app.workbench.recipe
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        text = text_of(app)
        assert "micro-batch    1" in text and "~ halving" in text
        before = app.workbench.estimate(app.memory_budget.device)
        for key, row in SAVINGS.items():
            shown = re.search(row + r"(?P<saved>[-+][\d.]+( MiB)?)( GiB)? *$", text, re.MULTILINE)
            assert shown is not None, key
            await pilot.press(key)
            after = app.workbench.estimate(app.memory_budget.device)
            assert before is not None and after is not None
            delta = format_delta(after.total_bytes - before.total_bytes).removesuffix(" GiB")
            assert shown["saved"] == delta, key
            app.workbench.replace(start)
            app.recipe_edited()


async def test_quality_is_measured_shown_and_stopped(
    seven_billion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = Event()
    layers = tuple(LayerError(number, 0.01 + number / 100, 1 << 20) for number in range(4))
    result = Quality("nf4", 3, 90, Difference(0.0132, 0.021), layers, (3,), Difference(0.004, 0.01))

    def measure(recipe: Recipe, *, on_progress: Any, should_stop: Any) -> Quality:
        on_progress(Progress(1, 4, "comparing layer by layer"))
        while not released.is_set():
            if should_stop():
                raise JobStopped
        return result

    monkeypatch.setattr(memory, "measure_in_child", measure)
    app = open_on("memory", model=seven_billion)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "NF4")
        await pilot.press("M")
        await wait_for_text(pilot, "quality: comparing layer by layer 25%")
        await pilot.resize_terminal(160, 40)
        await pilot.press("M")
        await wait_until(pilot, lambda: "quality:" not in text_of(app))
        released.set()
        await pilot.press("M")
        await wait_for_text(pilot, "Quantizing to 4 bits (nf4) changes 2.1%", "KL 0.013", "Keeping layer 3")
        before = app.workbench.comparison(app.memory_budget.device)
        await pilot.press("k")
        await wait_until(pilot, lambda: app.workbench.recipe.quantization.skip == ("3.all-linear",))
        after = app.workbench.comparison(app.memory_budget.device)
        assert isinstance(before, dict) and isinstance(after, dict)
        assert after["nf4"].total_bytes > before["nf4"].total_bytes + (100 << 20)


async def test_the_whole_row_under_the_cursor_is_reversed_in_16_colors(seven_billion: str) -> None:
    app = open_on("memory", model=seven_billion, theme="terminal-dark")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "░ Quantized weights ")
        (line,) = (
            line for line in segments_of(app) if "░ Quantized weights " in "".join(s.text for s in line)
        )
        reversed_text = "".join(each.text for each in line if each.style and each.style.reverse)
        assert re.search("░ Quantized weights .* ░+ ", reversed_text)


@pytest.mark.parametrize("is_even", [True, False])
def test_the_timeline_is_as_high_as_its_scale_says_and_loses_no_part(is_even: bool) -> None:
    gib = {"weights": 5.2, "adapter": 0.46, "context": 0.42, "activations": 0.35}
    items = {key: int(size * GIB) for key, size in gib.items()}
    moments = tuple(Moment(phase, phase, items) for phase in PHASES)
    for height in range(5, 60):
        *lines, foot = timeline_lines(moments, 12 * GIB, is_even, 120, height)
        labels = [
            (row, float(re.split("[┤┴]", line.plain)[0]))
            for row, line in enumerate([*lines, foot])
            if "┤" in line.plain or line is foot
        ]
        (top, most), (bottom, least) = labels[0], labels[-1]
        row_gib = (most - least) / (bottom - top)
        # The top cell is filled from below, and all cells under it are full.
        glyphs = [line.plain[-1] for line in lines if line.plain[-1] not in " ─"]
        rows = len(glyphs) - 1 + (" ▁▂▃▄▅▆▇".find(glyphs[0]) / 8 if glyphs[0] in "▁▂▃▄▅▆▇" else 1)
        error = (rows + 0.5) * row_gib - sum(gib.values())
        # Where only the weights can be seen, the total has blocks, which are exact.
        has_blocks = glyphs[-1] == "█"
        assert has_blocks == (is_even or row_gib / 2 > gib["adapter"])
        assert least == 0 and abs(error) < row_gib * (1 / 15 if has_blocks else 0.76)
        assert "peak" in lines[-len(glyphs) - 1].plain and 12 <= (len(lines) + 0.5) * row_gib < 16 + row_gib
        for part in map(part_of, gib) if row_gib < 0.3 else [part_of("weights")]:
            look = part.drawn(is_even=is_even, block="█")[1] if has_blocks == is_even else "dim"
            cells = [span for line in lines[-len(glyphs) :] for span in line.spans if span.style == look]
            assert cells or len(glyphs) == 1
        # Columns with the same parts are equal.
        assert all(len(set(line.plain.split("│")[-1].split("┤")[-1])) == 1 for line in lines[-len(glyphs) :])


def test_the_label_of_the_peak_has_the_sizes_of_its_parts() -> None:
    items = {"weights": 5 * GIB, "adapter": GIB // 2, "activations": GIB // 4}
    moments = tuple(Moment(phase, phase, items | {"logits": GIB * (phase == "loss")}) for phase in PHASES)
    for width, height in product((60, 90, 120), (8, 30)):
        graph = [line.plain for line in timeline_lines(moments, 12 * GIB, False, width, height)]
        sizes = "peak 6.8 GiB: base weights 5.0 GiB, loss 1.0 GiB, adapter 512 MiB, activations 256 MiB"
        (row,) = (number for number, line in enumerate(graph) if "▾" in line)
        assert any((sizes if width > 90 else "peak 6.8 GiB") in line for line in graph[row - 1 : row + 1])
