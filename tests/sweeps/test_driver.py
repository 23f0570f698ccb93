"""What a sweep does next, from played runs."""

from __future__ import annotations

import math
import shutil
import sys
from typing import Any

import pytest

from qlora_tui.errors import UserError
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.presets import find_preset
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions as run_actions
from qlora_tui.runs import run_queue
from qlora_tui.runs.directory import RunDir, all_runs, create_run
from qlora_tui.runs.status import read_status
from qlora_tui.sweeps import actions, driver
from qlora_tui.sweeps.describe import verdict_sentence
from qlora_tui.sweeps.directory import SweepDir, SweepResumed, all_sweeps, create_sweep
from qlora_tui.sweeps.driver import advance
from qlora_tui.sweeps.space import Range, Space
from qlora_tui.sweeps.study import importances
from qlora_tui.sweeps.view import read_sweep
from tests.support.nvml_stub import install_nvml_stub
from tests.sweeps.conftest import best_at, play, play_all, rates, run_path, sheet


def test_halving_keeps_the_better_half_and_resumes_it(recipe: Recipe) -> None:
    sweep = actions.start(sheet(recipe, rounds=3))
    view = play_all(sweep, best_at(8e-4))
    assert view.state == "finished" and not sweep.active_path.exists()
    assert rates(view, "dropped") == [1e-4, 2e-4, 4e-4] and rates(view, "finished") == [8e-4]
    by_rate = {
        trial.values["training.learning_rate"]: trial for trial in view.trials if trial.role == "trial"
    }
    steps = {rate: [result.step for result in trial.results.values()] for rate, trial in by_rate.items()}
    assert steps == {1e-4: [10], 2e-4: [10], 4e-4: [10, 20], 8e-4: [10, 20, 40]}
    # The one that was kept is one run, and those that were not say so.
    assert len([run for run in all_runs() if run.sweep == sweep.id]) == len(view.trials)
    assert "round 1" in read_status(by_rate[1e-4].run).detail  # type: ignore[arg-type]  # it has one
    assert view.verdict.basis == "confirmed" and view.verdict.is_better
    run_actions.resume(dropped := by_rate[1e-4].run)  # type: ignore[arg-type]  # it has one
    assert dropped is not None and dropped.pause_at is None, "it trains to its end"
    assert (view.verdict.base_runs, view.verdict.found_runs) == (3, 2)
    assert {run.recipe().data.validation_seed for run in all_runs()} == {42}
    number, path = actions.adopt(sweep, "fast-rate")
    assert number == view.verdict.winner
    assert find_preset("fast-rate").recipe().training.learning_rate == 8e-4 and path.exists()


@pytest.mark.parametrize(("best", "noise", "basis"), [(2e-4, 0.001, "not_lower"), (4e-4, 0.2, "confirmed")])
def test_a_winner_within_the_noise_is_not_better(
    recipe: Recipe, best: float, noise: float, basis: str
) -> None:
    view = play_all(actions.start(sheet(recipe)), best_at(best, noise))
    assert view.verdict.basis == basis and not view.verdict.is_better


def test_a_kill_at_any_write_costs_nothing(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that decides dies before or after each of its writes; the next one makes no run twice."""
    for victim in ("create_run", "append", "enqueue", "requeue"):
        owner = {"create_run": driver, "append": SweepDir}.get(victim, run_queue)
        real = getattr(owner, victim)
        left = {"calls": 0}

        def killed(*args: object, real: object = real, left: dict[str, int] = left, **kw: object) -> object:
            left["calls"] += 1
            if left["calls"] % 3 == 1:
                raise KeyboardInterrupt
            result = real(*args, **kw)  # type: ignore[operator]  # a function
            if left["calls"] % 3 == 2:
                raise KeyboardInterrupt
            return result

        sweep = create_sweep(sheet(recipe, rounds=2), None)
        with monkeypatch.context() as within:
            within.setattr(owner, victim, killed)
            for _ in range(200):
                try:
                    advance(sweep)
                except KeyboardInterrupt:
                    continue
                waiting = run_queue.waiting()
                if not waiting:
                    break
                play(RunDir(run_path(waiting[0])), best_at(8e-4))
        view = read_sweep(sweep)
        assert view.state == "finished" and view.verdict.is_better, victim
        runs = [run for run in all_runs() if run.sweep == sweep.id]
        assert len(runs) == len(view.trials) == 9, victim


def test_failed_and_deleted_trials_are_results(recipe: Recipe) -> None:
    sweep = actions.start(sheet(recipe, seeds=1))
    for number, name in enumerate(run_queue.waiting()):
        run = RunDir(run_path(name))
        if number == 2:
            run_queue.remove(run)
            shutil.rmtree(run.path)
        else:
            play(run, best_at(4e-4), fails=number == 1)
    advance(sweep)
    view = read_sweep(sweep)
    assert view.state == "finished" and [t.outcome for t in view.trials] == [
        *("finished", "failed", "stopped", "finished", "finished")
    ]
    assert view.winner is not None and view.winner.values == {"training.learning_rate": 4e-4}


def test_a_trial_that_cannot_be_trained_fails_and_the_sweep_goes_on(recipe: Recipe) -> None:
    vary: Space = {"training.warmup_ratio": [0.1, 0.5], "training.lr_decay_share": [0.2, 0.6]}
    view = play_all(actions.start(sheet(recipe, vary=vary, seeds=1)), best_at(4e-4))
    assert view.state == "finished" and [trial.outcome for trial in view.trials].count("finished") == 4
    assert view.trials[-1].outcome == "failed" and view.trials[-1].failure == "Conflicting settings"
    for trial in view.base_trials:
        shutil.rmtree(trial.run.path)  # type: ignore[union-attr]  # it has one
    assert "were deleted" in verdict_sentence(read_sweep(view.sweep))


@pytest.mark.parametrize(("gpu", "gpus", "at_once"), [("", 1, 2), ("1", 1, 1), ("", 0, 1)])
def test_runs_at_once_follow_from_the_gpus_of_a_run(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, gpu: str, gpus: int, at_once: int
) -> None:
    install_nvml_stub(monkeypatch, "two_gpus")
    recipe = replace_setting(recipe, "training.gpus", gpus)
    sweep = create_sweep(sheet(recipe, method="tpe", trials=4, seeds=1), None, gpu)
    assert driver._parallel_runs(read_sweep(sweep)) == at_once


def test_a_trial_whose_loss_is_not_a_number_is_not_kept(recipe: Recipe) -> None:
    def loss(trained: Recipe, share: float) -> float:
        return math.nan if trained.training.learning_rate == 8e-4 else best_at(8e-4)(trained, share)

    view = play_all(actions.start(sheet(recipe, rounds=2, seeds=1)), loss)
    assert view.state == "finished" and rates(view, "finished") == [2e-4, 4e-4]


def test_a_base_that_fails_ends_the_sweep(recipe: Recipe) -> None:
    sweep = actions.start(sheet(recipe, method="random", trials=2))
    assert len(run_queue.waiting()) == 3
    play(RunDir(run_path(run_queue.waiting()[0])), best_at(1e-4), fails=True)
    advance(sweep)
    assert read_sweep(sweep).state == "failed" and run_queue.waiting() == []


def test_pause_stop_and_what_the_user_pauses(recipe: Recipe) -> None:
    sweep = actions.start(sheet(recipe, rounds=2))
    actions.pause(sweep)
    assert run_queue.waiting() == [] and read_sweep(sweep).state == "paused"
    advance(sweep)
    assert run_queue.waiting() == []
    actions.resume(sweep)
    assert len(run_queue.waiting()) == 5
    # A trial that its user paused is left alone, until the sweep is resumed.
    by_user = RunDir(run_path(run_queue.waiting()[-1]))
    run_queue.pause(by_user)
    view = play_all(sweep, best_at(8e-4))
    assert view.state == "waiting" and run_queue.waiting() == []
    # Resumed on its own, it still pauses where the others did.
    run_actions.resume(by_user)
    assert by_user.pause_at == 0.5
    run_queue.pause(by_user)
    actions.resume(sweep)
    assert run_queue.waiting() == [by_user.id]
    actions.stop(sweep)
    assert read_sweep(sweep).state == "stopped" and run_queue.waiting() == []
    with pytest.raises(UserError, match="Not possible in this state"):
        actions.pause(sweep)


def test_a_stopped_sweep_goes_on_with_added_time(recipe: Recipe) -> None:
    sweep = actions.start(sheet(recipe, seeds=1))
    by_user = RunDir(run_path(run_queue.waiting()[-1]))
    run_actions.stop(by_user)
    actions.stop(sweep)
    actions.add_time(sweep, 3600)
    assert len(run_queue.waiting()) == 4, "all but the one that its user stopped"
    view = play_all(sweep, best_at(4e-4))
    assert view.state == "finished" and view.verdict.winner is not None
    assert [trial.outcome for trial in view.trials].count("stopped") == 1


def test_a_trial_that_was_stopped_at_the_end_of_a_round_is_not_kept(recipe: Recipe) -> None:
    sweep = actions.start(sheet(recipe, rounds=2, seeds=1))
    for name in run_queue.waiting():
        play(run := RunDir(run_path(name)), best_at(8e-4))
        if run.recipe().training.learning_rate == 8e-4:
            run_actions.resume(run)
            run_actions.stop(run)
    advance(sweep)
    assert rates(play_all(sweep, best_at(8e-4)), "finished") == [2e-4, 4e-4]


def test_a_start_that_fails_leaves_nothing_in_the_queue(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full, or the user presses Ctrl+C, after some of its runs were queued."""
    real = create_run
    for error in (UserError("Disk full", what="It is full."), KeyboardInterrupt()):

        def create(*args: Any, error: BaseException = error, **options: Any) -> RunDir:
            if len(run_queue.waiting()) == 2:
                raise error
            return real(*args, **options)

        monkeypatch.setattr(driver, "create_run", create)
        with pytest.raises(type(error)):
            actions.start(sheet(recipe))
        sweep = all_sweeps()[0]
        assert run_queue.waiting() == [] and not sweep.active_path.exists()
        assert read_sweep(sweep).state == "stopped"


def test_a_deadline_decides_trials_and_rounds_and_ends_the_sweep(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run takes 100 s and 10 s to start, as the base measured it."""
    now = {"s": 1e9}
    monkeypatch.setattr("qlora_tui.sweeps.view.time.time", lambda: now["s"])
    sweep = actions.start(
        sheet(recipe, method="random", vary={"training.learning_rate": Range(low=1e-5, high=1e-3, log=True)}),
        deadline=1e9 + 1500,
    )
    assert len(run_queue.waiting()) == 1
    view = play_all(sweep, best_at(2e-4), most=1)
    plan = view.groups[0].planned
    # 1,500 s less four whole runs to confirm: n trials take n × 35 + n/2 × 35 + n/4 × 60 s, and a tenth more.
    assert [plan.full_s, plan.extra_s, plan.rounds] == pytest.approx([100, 10, 3])
    assert 10 <= plan.trials <= 16
    actions.pause(sweep)
    now["s"] += 1600
    with pytest.raises(UserError, match="add-time"):
        actions.resume(sweep)
    sweep.active_path.touch()
    sweep.append(SweepResumed())
    advance(sweep)
    view = read_sweep(sweep)
    assert view.state == "finished" and view.ended is not None and view.ended.why == "time"
    assert run_queue.waiting() == []
    actions.add_time(sweep, 2000)
    assert len(run_queue.waiting()) == plan.trials and read_sweep(sweep).state == "running"


def test_tpe_without_optuna_says_how_to_install_it(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="Optuna is not installed") as raised:
        actions.start(sheet(recipe, method="tpe", trials=4))
    assert "[sweep]" in raised.value.fix


def test_tpe_proposes_from_the_results_of_the_first_round(recipe: Recipe) -> None:
    optuna = pytest.importorskip("optuna")
    vary: Space = {"training.learning_rate": Range(low=1e-5, high=1e-1, log=True), "lora.rank": [8, 16]}
    sweep = actions.start(sheet(recipe, vary=vary, method="tpe", trials=24, rounds=2, seeds=1))
    view = play_all(sweep, best_at(3e-3))
    chosen = [trial.values["training.learning_rate"] for trial in view.of_group(1)]
    late = [abs(math.log(rate / 3e-3)) for rate in chosen[12:]]
    early = [abs(math.log(rate / 3e-3)) for rate in chosen[:10]]
    assert len(chosen) == 24 and sum(late) / len(late) < 0.7 * sum(early) / len(early)
    shares = importances(view)
    assert next(iter(shares)) == "training.learning_rate"
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(sweep.journal_path))
    )
    study = optuna.load_study(study_name=sweep.id, storage=storage)
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") == 12 and states.count("PRUNED") == 12
