from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench.tiny_gguf import write_tiny_gguf
from qlora_tui.memory import MeasuredRun, estimate, record_run
from qlora_tui.memory.step_trace import StepTrace
from qlora_tui.memory.timeline import step_timeline
from qlora_tui.recipe.fields import get_setting
from qlora_tui.recipe.schema import Lora, Recipe
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.memory import screen as memory
from qlora_tui.tui.screens.memory.fit_panel import FitPanel
from qlora_tui.tui.screens.memory.items_panel import item_lines
from qlora_tui.tui.screens.memory.screen import MemoryScreen
from qlora_tui.tui.screens.memory.settings_table import settings_table
from qlora_tui.tui.screens.memory.solution import KeyEffect
from qlora_tui.tui.screens.memory.stacked_bar import parts_of, stacked_bar
from qlora_tui.tui.screens.memory.text import peak_time
from qlora_tui.tui.screens.memory.timeline_graph import timeline_lines
from qlora_tui.tui.widgets.controls import HEADING, ViList
from tests.support.counting import count_allocations
from tests.support.nvml_stub import install_nvml_stub
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until
from tests.tui.workstation import config_folder, open_on, open_with_gpu, settle

Snapshot = Callable[..., bool]


@pytest.fixture
def seven_billion(private_home: Path) -> str:
    return str(config_folder(private_home, "Qwen__Qwen2.5-7B"))


def _big(app: QloraApp) -> None:
    app.workbench.set("data.max_length", 8192)
    app.workbench.set("training.micro_batch_size", 4)


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
def test_looks_of_a_recipe_that_fits(
    snap_compare: Snapshot, seven_billion: str, size: tuple[int, int]
) -> None:
    assert snap_compare(open_on("memory", model=seven_billion), terminal_size=size, run_before=settle)


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)])
def test_looks_of_a_recipe_that_does_not_fit(
    snap_compare: Snapshot, seven_billion: str, size: tuple[int, int]
) -> None:
    app = open_on("memory", model=seven_billion, gpu_gib=12)
    _big(app)
    assert snap_compare(app, terminal_size=size, run_before=settle)


async def test_changes_are_wrapped_for_one_width(seven_billion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the width depends on the scrollbar, and the scrollbar on the lines."""
    widths = set()
    show = FitPanel.show

    def recorded(self: FitPanel, *args: Any, **keywords: Any) -> None:
        show(self, *args, **keywords)
        widths.add(self.choices.scrollable_content_region.width)

    monkeypatch.setattr(FitPanel, "show", recorded)
    app = open_on("memory", model=seven_billion, gpu_gib=12)
    _big(app)
    async with app.run_test(size=(200, 60)) as pilot:
        await wait_for_text(pilot, "9.6 GiB fits")
        await settle(pilot)
        assert len(widths - {0}) == 1


async def test_without_a_model_it_says_what_to_do() -> None:
    async with open_on("memory").run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "The recipe has no model.", "Press [1] to select one.")
        await pilot.press("b", "n", "a", "t")


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


async def test_a_key_changes_a_setting_and_the_bars(
    seven_billion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SETTLED_S", 60.0)  # the slower questions are another test's
    app = open_on("memory", model=seven_billion)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "6.3 GiB")
        start = app.workbench.recipe
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


async def test_targets_that_the_model_lacks_are_skipped(private_home: Path) -> None:
    app = open_on("memory", model=str(config_folder(private_home, "openai-community__gpt2")))
    async with app.run_test() as pilot:
        await wait_for_text(pilot, "NF4")
        await pilot.press("t")
        assert app.workbench.recipe.lora.target_modules == ("all-linear",)


async def test_the_selected_item_is_explained_and_stays_selected(seven_billion: str) -> None:
    app = open_on("memory", model=seven_billion)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "Quantized weights: 6.53 billion linear")
        await pilot.press("j", "j")
        await wait_for_text(pilot, "Output head: 152,064 × 3,584 × 2")
        await pilot.press("s", "s", "s", "s")
        await wait_for_text(pilot, "Output head: 152,064")
        assert app.screen.query_one(ViList).current == "head"


async def test_a_long_explanation_is_shown_in_a_small_window(seven_billion: str) -> None:
    async with open_on("memory", model=seven_billion).run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "Quantized weights:", "backward of the last layer; PyTorch 6.1")
        await pilot.press("j", "j", "j")
        await wait_for_text(pilot, "Quantization scales: One scale per 64", "module.")


async def test_on_a_large_screen_the_glossary_explains_the_item(seven_billion: str) -> None:
    async with open_on("memory", model=seven_billion).run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "NF4: 4-bit NormalFloat")
        await pilot.press("tab")
        shown = await wait_for_text(pilot, "× 1 byte.")
        assert "NormalFloat" not in shown
        await pilot.press("j", "j", "j")
        await wait_for_text(pilot, "Quantization scales:")


async def test_items_stand_under_groups_that_add_them_up(seven_billion: str) -> None:
    app = open_on("memory", model=seven_billion)
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "█ Base weights", "▚ Adapter", "░ Overhead")
        compared = app.workbench.comparison(app.memory_budget.device)
        assert isinstance(compared, dict)
        lines = item_lines(compared["nf4"], 70)
        groups = [index for index, (key, _) in enumerate(lines) if key.startswith(HEADING)]
        assert len(lines) == len(groups) + len(compared["nf4"].items)
        assert groups[0] == 0 and all(after - before > 1 for before, after in pairwise(groups))


async def test_the_breakdown_follows_the_selected_bar(seven_billion: str) -> None:
    async with open_on("memory", model=seven_billion).run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "▸ NF4", "◂ recipe")
        await pilot.press("tab", "tab")
        await wait_for_text(pilot, "▸ fp16", "Unquantized linear")
        await pilot.press("shift+tab")
        await wait_for_text(pilot, "▸ int8")


async def test_the_cheapest_change_is_applied_and_undone(seven_billion: str) -> None:
    app = open_on("memory", model=seven_billion, gpu_gib=12)
    _big(app)
    before = app.workbench.recipe
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "does not fit", "▸ a Micro-batch 4 → 1", "same effective")
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
        await pilot.press("a")
        await pilot.pause()


async def test_a_model_too_large_for_any_change_is_reported(private_home: Path) -> None:
    model = str(config_folder(private_home, "mistralai__Mixtral-8x7B-v0.1"))
    app = open_on("memory", model=model, gpu_gib=2)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await wait_for_text(pilot, "No change makes it fit", "none")
        await wait_until(pilot, lambda: "Make it fit" not in text_of(app))


async def test_samples_beyond_the_context_length_warn_even_without_fit(
    private_home: Path,
) -> None:
    model = str(config_folder(private_home, "TinyLlama__TinyLlama-1.1B-Chat-v1.0"))
    app = open_on("memory", model=model, gpu_gib=4)
    async with app.run_test(size=(80, 24)) as pilot:
        assert "model's context" not in await wait_for_text(pilot, "recompute")
        await pilot.press("s", "s")
        await wait_for_text(pilot, "! the model's context is 2,048", "(data.max_length)")
        await pilot.press("s", "s", "b", "b")
        await wait_for_text(pilot, "! the model's context is 2,048", "▸ a ")


async def test_a_model_larger_than_the_card_is_offered_streamed(seven_billion: str) -> None:
    app = open_on("memory", model=seven_billion, gpu_gib=6)
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "of 28 layers from", "doctor` measures how")
        await pilot.press("a")
        await wait_for_text(pilot, "10 of 28 layers are streamed")


async def test_what_fits_at_most_is_shown_for_each_setting(seven_billion: str) -> None:
    async with open_on("memory", model=seven_billion).run_test(size=(80, 24)) as pilot:
        shown = await wait_for_text(pilot, "max fit")
        await settle(pilot)
        assert "…" not in text_of(pilot.app).split("max fit")[1].split("targets")[0], shown


async def test_what_fits_is_shown_for_the_marked_precision(seven_billion: str) -> None:
    async with open_on("memory", model=seven_billion).run_test(size=(80, 24)) as pilot:
        lengths = []
        for precision in ("NF4", "int8", "fp16"):
            await wait_for_text(pilot, f"▸ {precision}")
            await settle(pilot)
            line = next(line for line in text_of(pilot.app).splitlines() if " length " in line)
            lengths.append(int(line.split()[-3].replace(",", "")))
            await pilot.press("tab")
        assert len(set(lengths)) == 3


@pytest.mark.usefixtures("same_machine")
async def test_a_peak_while_loading_is_named(seven_billion: str) -> None:
    async with open_with_gpu("memory", model=seven_billion).run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "Peak (NF4 and int8: while loading) against 32.0 GiB")
        await wait_for_text(pilot, "while loading; PyTorch")


async def test_the_gpu_and_what_is_free_of_it_are_named(
    seven_billion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    async with open_with_gpu("memory", model=seven_billion).run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "Peak of a training step against", "GiB: RTX 4090", "free now")


async def test_a_key_costs_little(seven_billion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SETTLED_S", 60.0)
    app = open_on("memory", model=seven_billion)
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "6.3 GiB")
        for rank in (8, 32, 64, 128, 256):
            # Three estimates, of some 370 allocations and frees each.
            assert count_allocations(partial(app.edit, "lora.rank", rank)) < 3_000
            await pilot.pause()


def test_a_bars_parts_add_up_and_its_end_is_marked(seven_billion: str) -> None:
    app = open_on("memory", model=seven_billion)
    compared = app.workbench.comparison(app.memory_budget.device)
    assert isinstance(compared, dict)
    for estimated in compared.values():
        assert sum(bytes_ for _, bytes_ in parts_of(estimated)) == estimated.total_bytes
        for width in (1, 10, 33, 120):
            assert stacked_bar(estimated, 24 << 30, width).cell_length == width
            assert stacked_bar(estimated, 4 << 30, width).plain.endswith("▶")


async def test_the_correction_by_past_runs_is_named_with_their_count(
    seven_billion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    for _ in range(3):
        record_run(
            MeasuredRun(
                at=0.0,
                machine="NVIDIA GeForce RTX 4090",
                predicted_allocated_bytes=9 << 30,
                predicted_reserved_bytes=10 << 30,
                predicted_process_bytes=10 << 30,
                measured_reserved_bytes=int(10.4 * 2**30),
                measured_process_bytes=int(10.8 * 2**30),
            )
        )
    async with open_with_gpu("memory", model=seven_billion).run_test(size=(80, 24)) as pilot:
        shown = await wait_for_text(pilot, "Peak against", "free now; corrected +", "% from 3 runs")
        assert "runs…" not in shown


async def test_a_family_without_a_formula_is_traced(private_home: Path) -> None:
    app = open_on("memory", model=str(config_folder(private_home, "LiquidAI__LFM2-350M")))
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(
            pilot, "Peak against 24.0 GiB (assumed; F3 changes it); tracing a step…", "layers have no formula"
        )
        # A key ends the trace, and there is no formula for the changed recipe either.
        await pilot.press("c")
        await wait_for_text(pilot, "tracing a step…")


async def test_an_unconverted_gguf_file_has_its_own_line(private_home: Path) -> None:
    file = write_tiny_gguf(private_home / "tiny.gguf")
    async with open_on("memory", model=str(file)).run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "Before the first run tiny.gguf")


def test_a_traced_step_stands_in_for_the_formula(private_home: Path) -> None:
    app = open_on("memory", model=str(config_folder(private_home, "LiquidAI__LFM2-350M")))
    workbench, device = app.workbench, app.memory_budget.device
    traced = StepTrace(
        parameter_bytes=1,
        adapter_bytes=1,
        forward_bytes=2 << 30,
        backward_bytes=3 << 30,
        gradient_bytes=1 << 20,
        kept_bytes=1,
    )
    workbench.use_trace(workbench.recipe, device, traced)
    estimates = workbench.comparison(device)
    assert isinstance(estimates, dict) and estimates["nf4"].exact and not estimates["fp16"].exact
    assert estimates["nf4"].peak_phase == "traced step"
    assert estimates["nf4"].bytes_of("activations") + estimates["nf4"].bytes_of("gradients") == 3 << 30
    workbench.set("lora.rank", 32)
    estimates = workbench.comparison(device)
    assert isinstance(estimates, dict) and not estimates["nf4"].exact


@pytest.mark.parametrize(("size", "width"), [((80, 24), 40), ((120, 40), 48), ((200, 60), 60)])
async def test_the_side_is_as_wide_as_the_window_allows(
    private_home: Path, size: tuple[int, int], width: int
) -> None:
    app = open_on("memory", model=str(config_folder(private_home, "Qwen__Qwen2.5-7B")))
    async with app.run_test(size=size) as pilot:
        await wait_for_text(pilot, "Peak")
        assert app.screen.query_one("#memory-side").size.width == width


async def test_what_the_run_needs_is_named_beside_what_it_uses(seven_billion: str) -> None:
    app = open_on("memory", model=seven_billion)
    async with app.run_test(size=(120, 40)) as pilot:
        shown = await wait_for_text(pilot, "The run needs", "not recomputed")
        needed = app.workbench.comparison(app.memory_budget.device)
        assert isinstance(needed, dict)
        assert f"The run needs {needed['nf4'].total_bytes / 2**30:.1f} GiB. With" in shown


async def test_the_selected_item_stays_in_view_where_the_list_shrinks(seven_billion: str) -> None:
    app = open_on("memory", model=seven_billion, gpu_gib=8.0)
    _big(app)
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "▸ a ")
        items = app.screen.query_one("#items", ViList)
        items.action_last()
        await pilot.resize_terminal(80, 24)
        await settle(pilot)
        assert items.highlighted is not None
        assert items.scroll_y <= items.highlighted < items.scroll_y + items.size.height
        await pilot.press("a")
        await settle(pilot)
        assert items.scroll_y <= items.highlighted < items.scroll_y + items.size.height


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


async def test_enter_applies_the_change_under_the_cursor(seven_billion: str) -> None:
    app = open_on("memory", model=seven_billion, gpu_gib=12)
    _big(app)
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "▸ a ", "f choose")
        await pilot.press("f", "j")
        await wait_for_text(pilot, "Sequence length 8,192")
        await pilot.press("f", "f", "enter")
        await wait_for_text(pilot, "Press [u] to undo")
        assert app.workbench.recipe.data.max_length < 8192
        assert app.workbench.recipe.training.micro_batch_size == 4
        assert app.screen.query_one("#items").has_focus


async def test_a_low_window_shows_step_or_items(seven_billion: str) -> None:
    app = open_on("memory", model=seven_billion)
    async with app.run_test(size=(80, 24)) as pilot:
        shown = await wait_for_text(pilot, "NF4 by item")
        assert "Loading and a training step" not in shown
        await pilot.press("v")
        shown = await wait_for_text(
            pilot,
            "Loading and a training step (GiB), fullest in backward of the last layer",
            "peak 6.3 GiB",
        )
        assert "NF4 by item" not in shown
        await pilot.press("tab")
        await wait_for_text(pilot, "peak 11.0 GiB")
        await pilot.press("v")
        await wait_for_text(pilot, "int8 by item")


async def test_a_large_window_shows_the_step_below_the_items(seven_billion: str) -> None:
    app = open_on("memory", model=seven_billion, gpu_gib=12)
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(
            pilot, "NF4 by item", "Loading and a training step", "limit 12.0 GiB", "peak 6.3 GiB"
        )
        await pilot.press("b", "b", "s", "s", "s")
        await wait_for_text(pilot, "NF4 does not fit", "limit 12.0 GiB")


@pytest.mark.parametrize("limit_gib", [1, 7, 24, 1000])
def test_every_column_of_the_graph_is_filled_from_below(seven_billion: str, limit_gib: int) -> None:
    app = open_on("memory", model=seven_billion)
    compared, architecture = app.workbench.comparison(app.memory_budget.device), app.workbench.architecture()
    assert isinstance(compared, dict) and not isinstance(architecture, Exception)
    moments = step_timeline(app.workbench.recipe, architecture, compared["nf4"])
    for width, height in ((10, 3), (78, 9), (190, 20)):
        lines = timeline_lines(moments, limit_gib << 30, width, height)
        assert len(lines) == height and {line.cell_length for line in lines} == {width}
        assert all(cell in "█▚▓▒░▁▂▃▄▅▆▇" for cell in lines[-2].plain[5:])
        for above, below in pairwise(line.plain for line in lines[:-1]):
            for high, low in zip(above[5:], below[5:], strict=True):
                assert low in "█▚▓▒░" or high not in "█▚▓▒░▁▂▃▄▅▆▇"


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ("loading", "while loading"),
        ("backward of layer 27", "backward of the last layer"),
        ("forward of layer 0", "forward of the first layer"),
        ("backward of layer 12", "backward of layer 12"),
        ("loss forward", "loss forward"),
    ],
)
def test_the_time_of_the_peak_is_in_words(seven_billion: str, phase: str, words: str) -> None:
    app = open_on("memory", model=seven_billion)
    estimated = app.workbench.estimate(app.memory_budget.device)
    assert estimated is not None
    assert peak_time(replace(estimated, peak_phase=phase), layers=28) == words


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("S", r"s S +length +16,384 +[\d,]+ +"),
        ("R", r"r R +rank +16 +\d+ +"),
        ("t", r"t +targets +all-linear ?→ ?q,k,v,o +"),
        ("c", r"c +recompute +on → off +"),
    ],
)
async def test_each_setting_shows_what_its_key_saves(seven_billion: str, key: str, row: str) -> None:
    app = open_on("memory", model=seven_billion)
    app.workbench.set("data.max_length", 16384)
    app.workbench.set("training.gradient_checkpointing", "on")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        shown = re.search(row + r"([-+][\d.]+)( GiB)? *$", text_of(app), re.MULTILINE)
        assert shown is not None and "micro-batch     1" in text_of(app)
        before = app.workbench.estimate(app.memory_budget.device)
        await pilot.press(key)
        after = app.workbench.estimate(app.memory_budget.device)
        assert before is not None and after is not None
        assert shown[1] == f"{(after.total_bytes - before.total_bytes) / 2**30:+.1f}"


@pytest.mark.parametrize("width", [38, 40, 46])
@pytest.mark.parametrize("bytes_", [0, -12 << 30])
@pytest.mark.parametrize(
    "names", ["q k v o gate up down", "q k v down", "all-linear", "layers.0.self_attn.q_proj"]
)
def test_each_setting_has_one_line_with_its_change(names: str, bytes_: int, width: int) -> None:
    lora = Lora(target_modules=tuple(names.split()))
    effect = {"lora.target_modules": KeyEffect(("all-linear",), bytes_)}
    lines = settings_table(Recipe(lora=lora), None, effect, None, width).plain.splitlines()
    assert {len(line) for line in lines} == {width}
    assert re.search(r" (-12\.0|same)( GiB| need)?$", lines[4]), lines[4]
