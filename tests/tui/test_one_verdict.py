"""Every screen shows one figure and one verdict for the memory of the recipe, before and after its trace."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from qlora_tui.errors import UserError
from qlora_tui.formatting import format_gib
from qlora_tui.memory import choose_step, traces, trainer_execution
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.recipe.schema import Source
from qlora_tui.runs import preflight
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.render.labels import needed_words
from tests.memory.models import traced_peaks
from tests.tui.sample_data import readable_model, tickets
from tests.tui.screen_assertions import text_of, wait_for_text
from tests.tui.workstation import open_on, settle

_FIT = r"(fits|tight|uncertain|does)(?: not fit)?: (?:needs |.*?needs at least |uses )(~?[\d.]+)"
PLACES = {
    "1": (r"● Qwen2\.5-7B .*?(~?[\d.]+) GiB ([!?✗ ])", r"● +1,024 +(~?[\d.]+) GiB ([!?✗ ])"),
    "2": ("memory .*?" + _FIT, r"● now +1,024 +\d+% +(~?[\d.]+) GiB +(tight|does|uncertain)?"),
    "3": (r"› NF4 .*?(~?[\d.]+) GiB (\w+)", "NF4 (fits|tight|does|uncertain)"),
    "4": (r"● *[\d.]+M .*?(~?[\d.]+) GiB ([!?✗ ])",),
    "p": (r"● balanced +(~?[\d.]+) GiB ([!?✗ ])", "memory now .*?" + _FIT),
}
"""Key of a screen, and where it shows the memory of the recipe as it is, on the assumed GPU."""
HERE = {
    "0": ("memory .*?" + _FIT,),
    "5": ("memory .*?" + _FIT,),
}
"""The same on this machine, which a run would use."""
_WORDS = {" ": "✓", "fits": "✓", "tight": "!", "uncertain": "?", "does": "✗"}


async def figures(
    pilot: Pilot[Any], places: Mapping[str, tuple[str, ...]]
) -> dict[str, list[tuple[str, ...]]]:
    """By screen: (figure, sign of the verdict) from each place, or the sign alone."""
    found = {}
    for key, patterns in places.items():
        await pilot.press(key)
        await settle(pilot)
        text = text_of(pilot.app)
        matches = [re.search(pattern, text) for pattern in patterns]
        words = [[_WORDS.get(each, each) for each in match.groups(" ")] if match else [] for match in matches]
        found[key] = [tuple(sorted(each, key=list(_WORDS.values()).count)) for each in words]
        if key == "p":
            await pilot.press("escape")
    return found


def trace(app: QloraApp, backward_bytes: int) -> None:
    """Let the recipe's step be traced, with this peak, on both devices."""
    recipe, architecture = app.workbench.recipe, app.workbench.architecture()
    assert not isinstance(architecture, UserError)
    for budget in (app.memory_budget, app.run_budget):
        execution = trainer_execution(recipe, budget.device, architecture)
        traces.remember(recipe, architecture, execution, traced_peaks(2 << 30, backward_bytes))


def figure_of_run(app: QloraApp, budget: MemoryBudget) -> str:
    """Return the memory that a run of the recipe will use, in GiB."""
    recipe, architecture = app.workbench.recipe, app.workbench.architecture()
    assert not isinstance(architecture, UserError)
    used = choose_step(recipe, architecture, budget.bytes, device=budget.device).estimate
    return f"{'' if used.traced else '~'}{format_gib(used.process_bytes)}"


@pytest.mark.slow
@pytest.mark.usefixtures("same_machine")
async def test_every_screen_has_one_verdict_on_the_recipe(
    private_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "trace_soon", lambda *args: None)
    model = Path(readable_model(private_home, "Qwen__Qwen2.5-7B"))
    app = open_on("home", model=str(model), gpu_gib=16, model_folders=(str(model.parent),))
    app.workbench.set("data.sources", (Source(path=str(tickets(private_home / "tickets.jsonl"))),))
    async with app.run_test(size=(160, 50)) as pilot:
        await wait_for_text(pilot, "Qwen2.5-7B", " of 32.0 GiB")
        for backward_gib, figure, sign in ((0, "~6.3", "✓"), (13, "15.2", "?"), (20, "22.2", "✗")):
            if backward_gib:
                trace(app, backward_gib << 30)
            # Without room for the least memory, a screen gives what a run uses.
            of_run = figure_of_run(app, app.memory_budget)
            for screen, shown in (await figures(pilot, PLACES)).items():
                for each in shown:
                    assert each in ((figure, sign), (of_run, sign), (sign,)), (screen, shown, text_of(app))
            of_run, verdict = figure_of_run(app, app.run_budget), app.workbench.verdict(app.run_budget)
            assert verdict is not None
            least = needed_words(verdict).removesuffix(" GiB")
            here = await figures(pilot, HERE)
            assert {each for shown in here.values() for each in shown} <= {(of_run, "✓"), (least, "✓")}, here
