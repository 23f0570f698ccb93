"""What a sweep varies, what is refused, and what it comes down to in words and numbers."""

from __future__ import annotations

import json
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.cli import main
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_loss
from qlora_tui.paths import sweeps_dir
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.sweeps import actions
from qlora_tui.sweeps.describe import plan_ahead, tie_sentence, verdict_sentence, what_settings_bought
from qlora_tui.sweeps.plan import Costs, Plan, judge, plan_group
from qlora_tui.sweeps.sheet import build_sheet
from qlora_tui.sweeps.space import Range, apply_point, grid_points, parse_vary, random_point
from tests.sweeps.conftest import RATES, best_at, play_all, sheet


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("training.learning_rate=1e-5..1e-3:log", Range(low=1e-5, high=1e-3, log=True)),
        ("lora.rank=8, 16", [8, 16]),
        ("lora.use_dora=true,false", [True, False]),
        ('lora.target_modules=[["q_proj"], ["all-linear"]]', [["q_proj"], ["all-linear"]]),
        ("lora.dropout={ low = 0.0, high = 0.1, points = 3 }", Range(low=0.0, high=0.1, points=3)),
    ],
)
def test_values_to_vary_are_parsed(argument: str, values: object) -> None:
    assert parse_vary(argument)[1] == values


def test_a_sheet_is_a_recipe_with_a_table(tmp_path: Path, recipe: Recipe) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(sheet(recipe, rounds=2, trials=3).dump())
    arguments: dict[str, Any] = {"preset": None, "sets": [], "model": None, "data": []}
    built = build_sheet(file=file, **arguments, settings={"trials": 4}, vary={"lora.rank": [8]})
    assert built.recipe == recipe and built.sweep.trials == 4 and built.sweep.rounds == 2
    assert list(built.sweep.vary) == ["training.learning_rate", "lora.rank"]
    file.write_text("[sweep]\ntrails = 3\n")
    with pytest.raises(UserError, match="Invalid sweep"):
        build_sheet(file=file, **arguments, settings={}, vary={})


@pytest.mark.parametrize(
    ("vary", "settings", "says"),
    [
        ({}, {}, "varies no setting"),
        ({"lora.rnk": [8]}, {}, "Did you mean lora.rank?"),
        ({"lora.rank": [8, 0]}, {}, "a whole number from 1 to 1,024"),
        ({"lora.rank": {"low": 1, "high": 5000}}, {}, "from 1 to 1,024"),
        ({"data.max_length": [512]}, {}, "what the validation loss measures"),
        ({"training.epochs": [1.0]}, {}, "the same number of tokens"),
        ({"training.log_every": [1]}, {}, "does not affect the trained weights"),
        ({"training.lr_scheduler": ["wsd", "cosine"]}, {"rounds": 2}, "cosine"),
        ({"training.warmup_ratio": [0.3]}, {"rounds": 3}, "longer than the first of 3 rounds"),
        ({"training.lr_decay_share": [0.6]}, {"rounds": 2}, "before the last round"),
        (RATES, {"method": "random"}, "neither a number of trials nor a deadline"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    recipe: Recipe, vary: dict[str, Any], settings: dict[str, Any], says: str
) -> None:
    space = {path: Range(**v) if isinstance(v, dict) else v for path, v in vary.items()}
    with pytest.raises(UserError) as raised:
        sheet(recipe, vary=space, **settings).check(has_time=False)
    assert says in str(raised.value)


def test_points_are_within_their_ranges_and_trials_see_as_many_rows(recipe: Recipe) -> None:
    space: Any = {
        "training.learning_rate": Range(low=1e-5, high=1e-3, log=True, points=3),
        "lora.rank": [8, 16],
    }
    rates = [point["training.learning_rate"] for point in grid_points(space)]
    assert rates == pytest.approx([1e-5, 1e-5, 1e-4, 1e-4, 1e-3, 1e-3]) and len(rates) == 6
    drawn = [random_point(space, 1, number) for number in range(50)]
    assert drawn == [random_point(space, 1, number) for number in range(50)]
    assert sum(point["training.learning_rate"] < 1e-4 for point in drawn) in range(15, 36)
    limited = replace_setting(recipe, "training.max_steps", 100)
    assert apply_point(limited, {"training.gradient_accumulation": 16}).training.max_steps == 50


def test_a_time_gives_trials_and_rounds() -> None:
    costs = Costs(full_s=100, extra_s=0)

    def plan(seconds: float, **changes: Any) -> Plan | None:
        usual: dict[str, Any] = {"trials": 0, "rounds": 0, "can_halve": True, "confirmations": 4}
        return plan_group(costs, seconds, **{**usual, **changes})

    # With a tenth to spare: the confirmation 440 s, and eight trials 2 × 110 + 110 + 110 s.
    assert plan(440 + 441) == Plan(8, 3) and plan(440 + 441, can_halve=False) == Plan(4, 1)
    assert plan(440 + 441, trials=5) == Plan(5, 3) and plan(500) is None


def test_a_difference_is_compared_with_the_noise() -> None:
    better = judge(3, 1.0, [1.0, 1.02], [1.1, 1.12, 1.08])
    assert better.is_better and better.noise == pytest.approx(0.0183, abs=1e-4)
    # By the table of t for three degrees of freedom.
    assert better.noise and better.margin == pytest.approx(2.353 * better.noise * (1 / 3 + 1 / 2) ** 0.5)
    assert not judge(3, 1.0, [1.08, 1.1], [1.1, 1.12, 1.08]).is_better
    assert judge(3, 1.0, [], [1.1, 1.12]).basis == "one_run"
    assert judge(3, 1.2, [], [1.1]).basis == "not_lower" and judge(3, 1.0, [], [1.1]).basis == "noise_unknown"


def test_trials_with_equal_losses_are_named(recipe: Recipe) -> None:
    view = play_all(actions.start(sheet(recipe, {"lora.rank": [8, 16]})), best_at(8e-4))
    assert view.winner is not None and view.winner.final is not None
    loss = format_loss(view.winner.final.loss)
    assert tie_sentence(view) == f"With seed 42, trials 1 and 2 tie at {loss}; trial 1 was created first."


def test_the_commands_show_and_adopt(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = actions.start(sheet(recipe, rounds=2))
    view = play_all(sweep, best_at(8e-4))
    assert main(["sweep", "show", "last", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["verdict"]["is_better"] and shown["winner"] == 4 and len(shown["trials"]) == 9
    assert main(["sweep", "show", sweep.id]) == main(["sweep"]) == 0
    text = capsys.readouterr().out
    assert (
        verdict_sentence(view).startswith("Better: the mean losses of trial 4 (2 runs)") and "winner" in text
    )
    assert verdict_sentence(view) in text and "not kept" in text and "Tie" not in text
    means = {one.value: one.mean for one in what_settings_bought(view)}
    assert min(means, key=lambda value: means[value]) == "0.0008"
    assert main(["sweep", "adopt", "last", "rates-8"]) == 0
    assert "Trial 4 is saved" in capsys.readouterr().out
    (broken := sweeps_dir() / "broken").mkdir()
    (broken / "sweep.toml").write_text("x = [")
    assert main(["sweep", "list", "--json"]) == 0
    states = [each["state"] for each in json.loads(capsys.readouterr().out)["sweeps"]]
    assert sorted(states) == ["finished", "unreadable"]
    shutil.rmtree(broken)
    assert main(["sweep", "pause", "last"]) == 2 and "is finished" in capsys.readouterr().err


def test_what_a_sweep_would_have_is_known_before_it_starts(recipe: Recipe) -> None:
    whole, until = sheet(recipe, rounds=2), time.time() + 10_000
    assert plan_ahead(whole, None, None) == Plan(4, 2)
    assert "unknown" in str(plan_ahead(whole, until, None))
    # The unchanged recipe, and the four runs that confirm the winner, take 5 x 1,100 s of the 10,000.
    assert plan_ahead(whole, until, Costs(1000.0, 0.0)) == Plan(4, 2)
    assert plan_ahead(whole, until, Costs(1500.0, 0.0)) == Plan(1, 2)
    assert "too short" in str(plan_ahead(whole, time.time() + 60, Costs(1000.0, 0.0)))


def test_times() -> None:
    assert actions.parse_duration("1h30m") == 5400 and actions.parse_duration("45s") == 45
    noon = time.mktime((2026, 6, 1, 12, 0, 0, 0, 0, -1))
    assert actions.parse_until("07:00", noon) - noon == 19 * 3600
    assert actions.parse_until("12:30", noon) - noon == 1800
    for wrong in ("25:00", "7", ""):
        with pytest.raises(UserError):
            actions.parse_until(wrong)


def test_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next 02:30 is the same night's second one."""
    with monkeypatch.context() as within:
        within.setenv("TZ", "Europe/Berlin")
        time.tzset()
        first = datetime(2026, 10, 25, 2, 45).timestamp()
        assert actions.parse_until("02:30", first) - first == 45 * 60
        assert actions.parse_until("02:50", first) - first == 5 * 60
        assert actions.parse_until("02:30", first + 3600) - first == 24.75 * 3600
        before = datetime(2026, 3, 29, 1, 30).timestamp()
        assert actions.parse_until("02:30", before) - before == 3600, "which that night does not have"
    time.tzset()
