from __future__ import annotations

import json
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from textual.content import Content
from textual.events import MouseScrollDown
from textual.widgets import Input

from qlora_tui.catalog import described
from qlora_tui.catalog.adapters import adapter_parameters
from qlora_tui.catalog.described import Description, describe
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Lora, Recipe
from qlora_tui.recipe.targets import match_modules
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.lora.adapter import SettingsList, setting_lines
from qlora_tui.tui.screens.lora.module_grid import ModuleGrid, ModuleTable, state, toggled
from qlora_tui.tui.screens.lora.screen import parse_targets
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until
from tests.tui.workstation import config_folder, config_of, open_on

SMALL = "HuggingFaceTB__SmolLM2-135M"
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def small(private_home: Path) -> str:
    return str(config_folder(private_home, SMALL))


@pytest.fixture
def table() -> ModuleTable:
    return ModuleTable(describe(config_of(SMALL)))


def targets(app: QloraApp) -> tuple[str, ...]:
    return app.workbench.recipe.lora.target_modules


async def test_space_toggles_a_kind_a_layer_and_a_module_but_not_the_last(small: str) -> None:
    app = open_on("lora", model=small)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await wait_for_text(pilot, "210 modules", "every kind", "all 30 layers")
        assert not has_scroll_bar(app)
        await pilot.press("space")
        await wait_for_text(pilot, "LoRA needs at least one module.")
        assert targets(app) == ("all-linear",)
        app.clear_notifications()
        await pilot.press("j", "space")
        assert targets(app) == KINDS[1:]
        await wait_for_text(pilot, "[-] every kind", "[ ] q_proj", "vs balanced")
        await pilot.press("space")
        assert targets(app) == ("all-linear",)
        await pilot.press("l", "space")
        assert targets(app) == ("1-29.q_proj", *KINDS[1:])
        await wait_until(pilot, lambda: "all 30 layers" not in text_of(app))
        await pilot.press("u", "g", "end", "space")
        assert targets(app) == ("0-28.all-linear",)
        await wait_for_text(pilot, "7 modules")
        # There is no room for the costs of other choices below the settings.
        await pilot.press("v")
        await wait_for_text(pilot, "What other choices would cost", "q, k, v, o", "256")
        assert "dropout" not in text_of(app)
        await pilot.press("v")
        await wait_for_text(pilot, "dropout")


async def test_modules_are_shown_when_their_model_was_described(
    private_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(SMALL) | {"model_type": "apertus"}
    folder = private_home / "apertus"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    is_read, exact = Event(), describe(config_of(SMALL))

    def read(job: str, configs: list[Any], **_: Any) -> list[Description]:
        is_read.wait(20)
        return [Description(architecture=exact)]

    monkeypatch.setattr(described, "run_job", read)
    app = open_on("lora", model=str(folder))
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "Reading the model's structure")
        is_read.set()
        await wait_for_text(pilot, "210 modules")


async def test_a_block_of_cells_is_toggled_and_can_be_left(small: str) -> None:
    app = open_on("lora", model=small)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "every kind")
        await pilot.press("j", "V", "l", "l", "j")
        await wait_for_text(pilot, "Block: 6 modules", "[V] toggle")
        await pilot.press("escape")
        assert targets(app) == ("all-linear",)
        await pilot.press("V", "h", "h", "V")
        table = ModuleTable(describe(config_of(SMALL)))
        left = {m.name for m in table.modules} - {m.name for m in match_modules(targets(app), table.modules)}
        assert left == {f"model.layers.{layer}.self_attn.k_proj" for layer in (0, 1, 2)}


async def test_patterns_preview_while_typed_and_apply_on_enter(small: str) -> None:
    app = open_on("lora", model=small)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "every kind")
        await pilot.press("i")
        app.screen.query_one(Input).value = ""
        await pilot.press(*"q,v")
        await wait_for_text(pilot, "60 modules. Enter: apply", "[ ] k_proj", "[x] v_proj")
        assert targets(app) == ("all-linear",)
        await pilot.press(*",8-23.z")
        await wait_for_text(pilot, "✗ lora.target_modules has")
        await pilot.press("enter")
        assert targets(app) == ("all-linear",)
        await pilot.press(*["backspace"] * 6, *"8-23.o", "enter")
        assert targets(app) == ("q_proj", "v_proj", "8-23.o_proj")
        await pilot.press("i", "x", "escape", "f")
        assert targets(app) == ("all-linear",)


async def test_marked_modules_get_their_own_rank_and_u_undoes_it(small: str) -> None:
    app = open_on("lora", model=small)
    async with app.run_test(size=(120, 40)) as pilot:
        before = await wait_for_text(pilot, "every kind", "4.88M of 135M parameters")
        assert "◆" not in before
        await pilot.press("j", "l", "V", "l", "l", "c")
        await wait_for_text(pilot, "Rank of 0-2.q_proj", "3 modules")
        await pilot.press(*"4096", "enter")
        await wait_for_text(pilot, "✗ The value must be a whole number from 1 to 1,024.")
        await pilot.press(*["backspace"] * 2, "enter")
        # 24 more on 3 modules, in 576 and out 576.
        await wait_for_text(pilot, "◆◆━◆━━━━", "4.97M of 135M", "rank_pattern: none → 0-2.q_proj = 40")
        assert app.workbench.recipe.lora.rank_pattern == {"0-2.q_proj": 40}
        await pilot.press("C", *"64", "enter")
        await wait_until(pilot, lambda: app.workbench.recipe.lora.alpha_pattern == {"2.q_proj": 64.0})
        await wait_for_text(pilot, "trainable, rank 40,")
        await pilot.press("c", "enter")
        await pilot.pause()
        assert app.workbench.recipe.lora.rank_pattern == {"0-1.q_proj": 40}
        await pilot.press("u", "u", "u")
        await wait_for_text(pilot, "4.88M of 135M")
        assert app.workbench.recipe.lora == Lora()


def has_scroll_bar(app: QloraApp) -> bool:
    shown = app.screen.query_one(ModuleGrid).render()
    assert isinstance(shown, Content)
    return any("$scrollbar" in str(span.style) for span in shown.spans)


async def test_kinds_out_of_view_have_a_scroll_bar(private_home: Path) -> None:
    app = open_on("lora", model=str(config_folder(private_home, "LiquidAI__LFM2-1.2B")))
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "every kind")
        assert has_scroll_bar(app)


async def test_keys_clicks_and_the_wheel_step_a_setting_and_the_totals_follow(small: str) -> None:
    app = open_on("lora", model=small)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "4.88M of 135M parameters (3.6%)", "LoRA settings as in preset balanced")
        await pilot.press("r")
        await wait_for_text(pilot, "9.77M of 135M", "37 MiB on disk", "rank: 16 → 32")
        await pilot.press("R", "a", "o", "s", "w")
        await wait_for_text(pilot, "alpha: 32 → 64", "rslora: off →", "DoRA        on*")
        lora = app.workbench.recipe.lora
        assert (lora.rank, lora.alpha, lora.dropout, lora.use_rslora, lora.use_dora) == (
            16,
            64,
            0.05,
            True,
            True,
        )
        await pilot.press("A", "O", "s", "w")
        lines = (await wait_for_text(pilot, "LoRA settings as in preset balanced", "a A alpha")).splitlines()

        alpha = 8, next(y for y, line in enumerate(lines) if "a A alpha" in line)
        settings = app.screen.query_one(SettingsList)

        def value() -> float:
            return app.workbench.recipe.lora.alpha

        await pilot.click(offset=alpha)
        assert (settings.current, value()) == ("lora.alpha", 32)
        await pilot.click(offset=alpha)
        assert value() == 64
        for line, then in ((alpha[1], 32), (alpha[1] - 1, 32), (alpha[1], 16)):  # another setting is above it
            app.post_message(MouseScrollDown(None, 8, line, 0, 0, 0, False, False, False, 8, line))
            await pilot.pause()
            assert (settings.current, value()) == ("lora.alpha", then)


@pytest.mark.parametrize("width", [60, 120])
def test_the_meaning_of_a_setting_stays_in_its_line(width: int) -> None:
    for _, line in setting_lines(Recipe(), Recipe(), "", width, with_meaning=True):
        assert all(part.cell_length <= width for part in line.split("\n"))


@pytest.mark.slow
async def test_a_very_large_window_has_bars_below_panels_that_end_in_the_same_row(small: str) -> None:
    app = open_on("home", model=small, gpu_gib=12)
    async with app.run_test(size=(200, 60)) as pilot:
        await pilot.press("4")
        await wait_for_text(pilot, "● rank 16", "rank 256", "adapter at the peak")
        ends = [app.screen.query_one(f"#{name}-panel").region.bottom for name in ("modules", "lora-settings")]
        assert ends[0] == ends[1]
        shown = text_of(app)
        assert shown.index("A higher rank can learn more") < shown.index("The QLoRA paper found")
        await pilot.resize_terminal(200, 46)
        await wait_for_text(pilot, " params     disk     needs")
        assert "adapter at the peak" not in text_of(app)


@pytest.mark.slow
def test_modules_of_a_vision_tower_are_left_out() -> None:
    table = ModuleTable(describe(config_of("google__gemma-3-4b-it")))
    assert table.modules
    assert all(module.part != "vision" for module in table.modules)


@pytest.mark.slow
def test_every_kind_of_model_makes_a_table() -> None:
    for name in ("openai-community__gpt2", "mistralai__Mixtral-8x7B-v0.1", "LiquidAI__LFM2-1.2B"):
        table = ModuleTable(describe(config_of(name)))
        assert {m.name for row in table.rows[1:] for m in row.modules} == {m.name for m in table.modules}


@pytest.mark.slow
def test_toggling_takes_all_unless_all_are_taken(table: ModuleTable) -> None:
    row = table.rows[1].modules
    one = frozenset({row[0].name})
    assert state(row, one) == "some"
    assert toggled(row, one) == frozenset(module.name for module in row)
    assert toggled(row, toggled(row, one)) == frozenset()


@pytest.mark.slow
def test_a_block_is_the_same_from_either_corner(table: ModuleTable) -> None:
    assert {m.name for m in table.within((3, 1), (5, 2))} == {m.name for m in table.within((1, 3), (2, 5))}
    assert len(table.within((1, 3), (2, 5))) == 12


@pytest.mark.slow
def test_trained_parameters_are_counted_per_module_and_dora_magnitudes(table: ModuleTable) -> None:
    query = table.rows[1].modules[:1]
    assert adapter_parameters(query, Lora(rank=8)) == 8 * (576 + 576)
    assert adapter_parameters(query, Lora(rank=8, use_dora=True)) == 8 * (576 + 576) + 576


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("q,k,v,o", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("all", ("all-linear",)),
        ("0-3,7.gate, down", ("0-3,7.gate_proj", "down_proj")),
        ("8-23.all", ("8-23.all-linear",)),
        ("q_proj,", ("q_proj",)),
    ],
)
def test_short_names_are_written_out(table: ModuleTable, text: str, patterns: tuple[str, ...]) -> None:
    assert parse_targets(text, table.modules) == patterns


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", " , ", "z", "99.q", "8-.q", "9-2.q", "q proj", "?"])
def test_patterns_that_mean_nothing_are_refused(table: ModuleTable, text: str) -> None:
    with pytest.raises(UserError):
        parse_targets(text, table.modules)


@pytest.mark.slow
def test_experts_are_rows_that_all_linear_leaves_alone() -> None:
    table = ModuleTable(describe(config_of("Qwen__Qwen3-30B-A3B")))
    assert [row.name for row in table.rows][-2:] == ["experts.gate_up_proj", "experts.down_proj"]
    chosen = table.chosen(("all-linear",))
    assert [state(row.modules, chosen) for row in table.rows] == ["all"] * 5 + ["none"] * 2
    down = table.rows[-1].modules[0]
    assert adapter_parameters([down], Lora(rank=4)) == 128 * 4 * (768 + 2048)
