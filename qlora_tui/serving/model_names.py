"""The models of a server, and the adapter that each name stands for. Does not import torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_tui.catalog.adapters import CONFIG, WEIGHTS
from qlora_tui.chat.chat_sources import run_source
from qlora_tui.chat.chat_types import ADAPTER, BASE, ChatSource
from qlora_tui.errors import UsageError
from qlora_tui.formatting import name_some
from qlora_tui.recipe.schema import Recipe, Thinking
from qlora_tui.runs.directory import LAST, RunDir, all_runs


@dataclass(frozen=True)
class ServedModel:
    """One model that answers."""

    name: str
    """``base``, a run's id, ``id:120`` for the checkpoint at step 120, or a user's alias."""
    adapter_name: str
    """Name of its adapter in the chat source."""
    thinking: Thinking = "auto"
    """Thinking setting that was used in training."""


@dataclass(frozen=True)
class ServedModels:
    """The models of a server: one base and its adapters."""

    source: ChatSource
    listed: tuple[ServedModel, ...]
    """The base, then each run with its checkpoints, then the user's aliases."""
    aliases: Mapping[str, str]
    """Names that are accepted but not listed, each with the model name it stands for."""

    def find(self, name: str) -> ServedModel | None:
        """Return the model with this name or alias; None if there is none."""
        model = next((model for model in self.listed if model.name == name), None)
        return self.find(self.aliases[name]) if model is None and name in self.aliases else model


class RunsToServe:
    """The runs of a server: given ones, or all runs with the same base."""

    def __init__(self, named: Sequence[RunDir] = (), *, with_others: bool = False) -> None:
        """Select the runs to serve: the runs in ``named`` or, if there are none, all runs with the base of
        the newest adapter.

        ``with_others`` adds all other runs with the same base after the named ones. Raises UserError if there
        is no run, or if two named runs have different bases.
        """
        newest = next(filter(_has_adapter, all_runs()), None)
        if not named and newest is None:
            raise UsageError(
                "No run to serve",
                what="No run has saved an adapter or a checkpoint.",
                fix="Train an adapter with `qlora-tui train`, or specify a run to serve its base model.",
            )
        self.named = tuple(named)
        self.with_others = with_others or not named
        first, *rest = named or [newest]  # type: ignore[list-item]  # there is one
        self._recipe = first.recipe()
        for other in rest:
            if _base(recipe := other.recipe()) != _base(self._recipe):
                raise UsageError(
                    "Two base models",
                    what=f"{first.id} was trained on {_base_text(self._recipe)}, {other.id} on "
                    f"{_base_text(recipe)}.",
                    why="A server holds one base model in memory.",
                    fix=f"Leave {other.id} out, and serve it on another port: "
                    f"`qlora-tui serve {other.id} --port 8001`.",
                )

    def now(self) -> list[RunDir]:
        """Return the runs that exist now: the named ones first, then the others, newest first."""
        named = [run for run in self.named if run.recipe_path.is_file()]
        if not self.with_others:
            return named
        others = [run for run in all_runs() if run not in named and _has_adapter(run)]
        recipes = [(run, run.readable_recipe()) for run in others]
        base = _base(self._recipe)
        return [*named, *(run for run, recipe in recipes if recipe is not None and _base(recipe) == base)]

    @staticmethod
    def stamp() -> tuple[object, ...]:
        """Return a value that changes whenever a run, checkpoint, adapter or run name is added or removed."""
        return tuple(
            (
                run.id,
                *map(_modified_ns, (run.adapter_dir / WEIGHTS, run.checkpoints_dir, run.name_path)),
            )
            for run in all_runs()
        )


def served_models(runs: RunsToServe, aliases: Mapping[str, str] | None = None) -> ServedModels:
    """Return the models of runs that share a base, as currently on the disk.

    ``aliases`` are the user's. An alias is left out if it names no model or is the name of a model. Raises
    UserError if no run is left.
    """
    there = runs.now()
    if not there:
        raise UsageError(
            "The runs were deleted",
            what=f"{', '.join(run.id for run in runs.named) or 'Runs of this base'} cannot be found.",
            fix="Stop this server, and serve another run instead.",
        )
    recipe, base = there[0].recipe(), run_source(there[0])
    # The base uses the thinking setting of the first run, as in the chat.
    listed, adapters = [ServedModel(BASE, BASE, base.thinking)], {}
    newest = next((run for run in all_runs() if run in there and _has_adapter(run)), there[0])
    automatic = {recipe.model.id: BASE, LAST: newest.id}
    names: dict[str, str] = {}
    ids, named = {run.id for run in there}, Counter(run.name for run in there)
    for run in there:
        source = run_source(run)
        # A name that two runs share stands for neither.
        name = run.name if named[run.name] == 1 and run.name not in ids else ""
        if name:
            names[name] = run.id
        if ADAPTER not in source.adapters and source.adapters:
            automatic[run.id] = f"{run.id}:{_step(next(iter(source.adapters)))}"
        for adapter, folder in source.adapters.items():
            suffix = "" if adapter == ADAPTER else f":{_step(adapter)}"
            # Weights that were written again count as another adapter, which is loaded anew. Names contain no
            # dots, because peft makes attributes of modules from them.
            written_ns = _modified_ns(Path(folder) / WEIGHTS)
            adapter_name = f"{run.id}{suffix}_{written_ns}".replace(".", "_")
            adapters[adapter_name] = folder
            listed.append(ServedModel(f"{run.id}{suffix}", adapter_name, source.thinking))
            if name and suffix:
                names[f"{name}{suffix}"] = f"{run.id}{suffix}"
    models = ServedModels(ChatSource(recipe=recipe, adapters=adapters), tuple(listed), names | automatic)
    for alias, name in (aliases or {}).items():
        # An alias may name a run that was deleted after the start, or clash with the id of a later run.
        model = models.find(name)
        if model is not None and all(each.name != alias for each in listed):
            listed.append(replace(model, name=alias))
    return replace(models, listed=tuple(listed))


def check_aliases(models: ServedModels, aliases: Mapping[str, str]) -> None:
    """Raise UserError for an alias that names no model, or that is itself the name of a model.

    ``models`` are the models without aliases.
    """
    for alias, name in aliases.items():
        if models.find(alias) is not None:
            raise UsageError(
                "The alias is taken",
                what=f"{alias} is already the name of a model on this server.",
                fix="Choose another alias.",
            )
        if models.find(name) is None:
            raise UsageError(
                "No such model",
                what=f"The alias {alias} refers to {name}, which this server does not have.",
                fix=f"Use one of {name_some([each.name for each in models.listed])}.",
            )


def _step(checkpoint: str) -> str:
    return checkpoint.removeprefix("step-")


def _has_adapter(run: RunDir) -> bool:
    return (run.adapter_dir / CONFIG).is_file() or bool(run.checkpoints())


def _modified_ns(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def _base(recipe: Recipe) -> tuple[object, ...]:
    """Return the settings that two runs must share to be served from one base in memory."""
    model = recipe.model
    return model.id, model.revision, model.chat_template, recipe.quantization


def _base_text(recipe: Recipe) -> str:
    model, template = recipe.model, recipe.model.chat_template
    text = f"{model.id} ({recipe.quantization.method}, {recipe.quantization.compute_dtype})"
    return text if template == "auto" else f"{text} with the template {template}"
