"""The trials of a sweep as an Optuna study: the next point by TPE, and the importance of each setting.

Optuna is optional: ``qlora-tui[sweep]``. The study is rebuilt from the sweep's records each time, so a kill
cannot leave it incomplete. ``optuna.journal`` is a copy for other tools, such as optuna-dashboard. Optuna
neither starts runs nor decides which ones continue.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tui.errors import UserError
from qlora_tui.installation import install_command
from qlora_tui.sweeps.space import Point, Range, Space, is_whole, value_text
from qlora_tui.sweeps.view import SweepView, Trial

if TYPE_CHECKING:
    import optuna

FEWEST_RESULTS = 10
"""Number of results below which TPE proposes random points; the default of Optuna's ``TPESampler``."""
_FEWEST_EXPLAINED = 4


def require_optuna() -> None:
    """Raise UserError, with the installation command, if Optuna is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "Optuna is not installed",
            what='The method "tpe" and the importances of settings need Optuna.',
            fix=f"Install it: `{install_command('qlora-tui[sweep]')}`. The methods random and grid work "
            "without it.",
            code="optuna-missing",
        ) from error
    # By default, Optuna reports each new study on stderr.
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def propose(view: SweepView, number: int) -> Point:
    """Return the values of the next trial, chosen by TPE from the results so far (arXiv 2304.11127).

    The values depend only on the results, the seed and ``number``. Raises UserError if Optuna is not
    installed.
    """
    require_optuna()
    import optuna

    sweep = view.sheet.sweep
    sampler = optuna.samplers.TPESampler(
        seed=sweep.seed + number, multivariate=True, constant_liar=True, n_startup_trials=FEWEST_RESULTS
    )
    study = optuna.create_study(sampler=sampler)
    study.add_trials(_frozen_trials(view))
    asked = study.ask(_distributions(sweep.vary))
    return {path: _value(sweep.vary, path, asked.params[path]) for path in sweep.vary}


def write_journal(view: SweepView) -> None:
    """Write the trials as an Optuna journal, replacing the previous one. Does nothing without Optuna."""
    with suppress(UserError):
        require_optuna()
        import optuna
        from optuna.storages.journal import JournalFileBackend

        draft = view.sweep.path / ".qlora-tui-journal.tmp"
        _remove(draft)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(draft)))
        study = optuna.create_study(storage=storage, study_name=view.sweep.id)
        study.add_trials(_frozen_trials(view))
        draft.replace(view.sweep.journal_path)


def _remove(file: Path) -> None:
    for path in (file, file.with_name(f"{file.name}.lock")):
        path.unlink(missing_ok=True)


def importances(view: SweepView) -> dict[str, float]:
    """Return the share (0 to 1) of the differences in loss that each setting explains, in descending order.

    Computed by PED-ANOVA (arXiv 2304.10255) from the losses of all trials that completed the first round.
    Empty if there are too few results or only one setting. Raises UserError if Optuna is not installed.
    """
    require_optuna()
    import optuna

    trials = [trial for trial in _with_results(view) if 1 in trial.results]
    if len(trials) < _FEWEST_EXPLAINED or len(view.sheet.sweep.vary) < 2:
        return {}
    study = optuna.create_study()
    study.add_trials([_frozen(view.sheet.sweep.vary, trial, trial.results[1].loss) for trial in trials])
    with suppress(ValueError, RuntimeError):
        return dict(optuna.importance.get_param_importances(study))
    return {}


def _with_results(view: SweepView) -> list[Trial]:
    return [trial for trial in view.trials if trial.role == "trial"]


def _frozen_trials(view: SweepView) -> list[optuna.trial.FrozenTrial]:
    space = view.sheet.sweep.vary
    return [
        _frozen(space, trial, None if trial.final is None else trial.final.loss)
        for trial in _with_results(view)
    ]


def _frozen(space: Space, trial: Trial, loss: float | None) -> optuna.trial.FrozenTrial:
    """Return a trial of the sweep as an Optuna trial with its results.

    Without a ``loss``, it counts as pruned if it has results, otherwise as running or failed.
    """
    from optuna.trial import TrialState, create_trial

    state = (
        TrialState.COMPLETE if loss is not None else TrialState.PRUNED if trial.results else TrialState.FAIL
    )
    if state is TrialState.FAIL and not trial.is_settled:
        state = TrialState.RUNNING
    params = {path: _label(values, trial.values[path]) for path, values in space.items()}
    return create_trial(
        state=state,
        value=loss,
        params=params,
        distributions=_distributions(space),
        intermediate_values={result.step: result.loss for result in trial.results.values()},
        user_attrs={"run": trial.run.id if trial.run else ""},
    )


def _distributions(space: Space) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    distributions: dict[str, Any] = {}
    for path, values in space.items():
        if not isinstance(values, Range):
            distributions[path] = CategoricalDistribution([_label(values, value) for value in values])
        elif is_whole(path):
            distributions[path] = IntDistribution(round(values.low), round(values.high), log=values.log)
        else:
            distributions[path] = FloatDistribution(values.low, values.high, log=values.log)
    return distributions


def _label(values: Any, value: Any) -> Any:
    """Convert a value to a type that Optuna supports: lists and tables become text."""
    return (
        value
        if isinstance(values, Range) or isinstance(value, bool | int | float | str)
        else value_text(value)
    )


def _value(space: Space, path: str, label: Any) -> Any:
    values = space[path]
    if not isinstance(values, Range):
        return next(value for value in values if _label(values, value) == label)
    return label if is_whole(path) else min(max(float(f"{label:.4g}"), values.low), values.high)
