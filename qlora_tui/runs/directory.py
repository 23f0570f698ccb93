"""A run's directory: how it is created, its name, its files, and how to find it again.

runs/<id>/
  recipe.toml      frozen when the run was queued
  events.jsonl     what happened (:mod:`qlora_tui.runs.events`)
  telemetry.jsonl  GPU and host metrics, once a second
  status.json      the current state (:mod:`qlora_tui.runs.status`)
  heartbeat.json   the trainer's progress, once a second
  name             the run's name, if the user renamed it
  gpu              the GPUs that the user chose for this run, if any
  devices.json     the run's current or last devices (:mod:`qlora_tui.runs.devices`)
  sweep            the sweep that created the run, if any
  pause_at         the share of its steps after which the run pauses, if any
  now              present if the run ignores the training hours and does not yield to other programs
  trainer.log      the trainer's output
  trainer.lock     locked by the trainer while it runs
  untold           present until the runner has handled the run's end
  control/         requests to the trainer (:mod:`qlora_tui.runs.control`)
  slurm.json       the job that trains it on a cluster (:mod:`qlora_tui.runs.slurm`)
  job.sh           the submitted script
  slurm.log        the output of this job
  squeue.json      the last state of the job in Slurm
  checkpoints/     step-N/, to resume from
  adapter/         the result: adapter, tokenizer, chat template, recipe
"""

from __future__ import annotations

import errno
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_tui import paths
from qlora_tui.errors import UsageError, UserError, disk_problems
from qlora_tui.files import atomic_write, private_dir, read_regular, sync, sync_tree
from qlora_tui.formatting import short_model_name
from qlora_tui.publishing import new_draft
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import dump, load, to_frozen_recipe
from qlora_tui.runs.event_log import append_event, read_from
from qlora_tui.runs.events import Queued, decode

_FIRST_EVENT_BYTES = 1024
TRASH = ".deleted"
"""Folder of deleted runs that can be restored, inside the runs folder; see :mod:`qlora_tui.runs.actions`."""


class _Inside:
    """Descriptor that returns the path of the file or folder ``name`` in a run's folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: RunDir, owner: type[RunDir]) -> Path:
        return run.path / self._name


@dataclass(frozen=True)
class RunDir:
    """The folder of one run. Getting a path in it does not access the disk."""

    path: Path

    name_path = _Inside("name")
    gpu_path = _Inside("gpu")
    devices_path = _Inside("devices.json")
    now_path = _Inside("now")
    sweep_path = _Inside("sweep")
    pause_at_path = _Inside("pause_at")
    recipe_path = _Inside("recipe.toml")
    events_path = _Inside("events.jsonl")
    telemetry_path = _Inside("telemetry.jsonl")
    status_path = _Inside("status.json")
    heartbeat_path = _Inside("heartbeat.json")
    log_path = _Inside("trainer.log")
    unreported_path = _Inside("untold")
    trainer_lock_path = _Inside("trainer.lock")
    slurm_path = _Inside("slurm.json")
    squeue_path = _Inside("squeue.json")
    job_script_path = _Inside("job.sh")
    job_log_path = _Inside("slurm.log")
    control_dir = _Inside("control")
    checkpoints_dir = _Inside("checkpoints")
    replay_path = _Inside("replay.jsonl")
    """The base model's own answers, which the run replays in training. Exists only if its recipe uses
    replay.
    """
    starting_adapter_path = _Inside("starting_adapter.safetensors")
    """The adapter that the run started from; exists only if the run compares answers with it."""
    row_losses_path = _Inside("row_losses.json")
    """Loss of each training row before and after the run; exists only if it was computed."""
    task_evaluation_path = _Inside("task_evaluation.json")
    """Answers of base and adapter to validation prompts; exists only if they were measured."""
    adapter_dir = _Inside("adapter")

    @property
    def id(self) -> str:
        """Name of the directory, such as ``qwen2.5-7b-tickets-20261124-0212``."""
        return self.path.name

    @property
    def name(self) -> str:
        """Name shown in lists: the name that the user gave, or the id."""
        try:
            return read_regular(self.name_path).decode().strip() or self.id
        except (OSError, UnicodeDecodeError):
            return self.id

    @property
    def gpu(self) -> str:
        """GPUs that the user chose for this run, in the form of ``--gpu``; empty if none was chosen.

        Raises UserError if the choice cannot be read. No other GPU is used instead, because it may belong to
        another user.
        """
        try:
            return read_regular(self.gpu_path).decode().strip()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                "The run's GPU choice cannot be read",
                what=f"{self.gpu_path}: {getattr(error, 'strerror', None) or error}.",
                fix=f"Choose the GPU again: `qlora-tui --gpu GPU resume {self.id}`.",
            ) from error

    @property
    def sweep(self) -> str:
        """Id of the sweep that made the run; empty for any other run."""
        try:
            return read_regular(self.sweep_path).decode().partition(" ")[0].strip()
        except (OSError, UnicodeDecodeError):
            return ""

    def trial_of(self, sweep: str) -> int | None:
        """Return this run's trial number in ``sweep``; None if the run is not one of its trials."""
        try:
            name, _, number = read_regular(self.sweep_path).decode().strip().partition(" ")
            return int(number) if name == sweep else None
        except (OSError, ValueError):
            return None

    @property
    def pause_at(self) -> float | None:
        """Share of the run's steps after which it pauses, between 0 and 1; None if it trains to its end."""
        try:
            share = float(read_regular(self.pause_at_path, 64))
        except (OSError, ValueError):
            return None
        return share if 0 < share < 1 else None

    def set_pause_at(self, share: float | None) -> None:
        """Make the run validate, save and pause after this share of its steps. If None, the run trains to its
        end.

        Takes effect with the next attempt. Raises OSError.
        """
        if share is None:
            self.pause_at_path.unlink(missing_ok=True)
        else:
            atomic_write(self.pause_at_path, f"{share!r}\n", durable=True)

    @property
    def trains_now(self) -> bool:
        """Whether the user asked the run to train even outside the training hours and while other programs
        use the GPU.
        """
        return self.now_path.exists()

    @property
    def is_deleted(self) -> bool:
        """Whether the run's files were deleted. False if the folder of all runs is missing too: its disk
        may not be mounted.
        """
        try:
            return self.path.parent.is_dir() and not (self.recipe_path.exists() or self.events_path.exists())
        except OSError:
            return False

    def recipe(self) -> Recipe:
        """Read the recipe as frozen when the run was queued. Raises UserError."""
        if self.recipe_path.exists() and not self.recipe_path.is_file():
            raise self._recipe_damaged("is not a file")
        layer = load(self.recipe_path)
        if not layer:
            raise self._recipe_damaged("is empty")
        return to_frozen_recipe(layer, origin=str(self.recipe_path))

    def readable_recipe(self) -> Recipe | None:
        """Read the recipe; return None if that is impossible."""
        try:
            return self.recipe()
        except UserError:
            return None

    def _recipe_damaged(self, how: str) -> UserError:
        return UserError(
            "The recipe is damaged",
            what=f"{self.recipe_path} {how}.",
            why="The file is written once, when the run is queued; a power cut or an edit may have damaged "
            "it.",
            fix=f"`qlora-tui runs check {self.id} --repair` restores it from a checkpoint or the adapter.",
        )

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Return step and folder of every complete checkpoint, oldest first."""
        complete = []
        for folder in self.checkpoints_dir.glob("step-*"):
            step = folder.name.removeprefix("step-")
            if step.isdecimal() and (folder / "complete").exists():
                complete.append((int(step), folder))
        return sorted(complete)


def run_of(folder: Path) -> RunDir | None:
    """Return the run whose adapter or checkpoint is in ``folder``; None if the folder belongs to no run."""
    for parent in (folder.parent, folder.parent.parent):
        run = RunDir(parent)
        if folder in (run.adapter_dir, run.checkpoints_dir / folder.name) and run.recipe_path.is_file():
            return run
    return None


LAST = "last"
"""Alias of the newest run."""


def create_run(recipe: Recipe, gpu: str = "", *, sweep: str = "", pause_at: float | None = None) -> RunDir:
    """Create the directory of a run that will be queued.

    The directory appears under its name once it is complete and on disk.

    Args:
        recipe: Recipe of the run.
        gpu: The GPUs that the user chose, in the form of ``--gpu``; empty if none.
        sweep: Id of the sweep that creates the run, a space, and the number of the trial; empty if none.
        pause_at: See :meth:`RunDir.set_pause_at`.

    Raises:
        UserError: The disk is full or the directory cannot be written.
    """
    parent = paths.runs_dir()
    fix = "Free some space, or point XDG_STATE_HOME at another disk."
    with disk_problems("The run could not be created", fix=fix), new_draft(parent) as draft:
        for folder in ("control", "checkpoints"):
            private_dir(draft / folder)
        atomic_write(draft / "recipe.toml", dump(recipe))
        if gpu:
            atomic_write(draft / "gpu", f"{gpu}\n")
        if sweep:
            atomic_write(draft / "sweep", f"{sweep}\n")
        RunDir(draft).set_pause_at(pause_at)
        append_event(draft / "events.jsonl", Queued())
        return RunDir(_publish(draft, parent, recipe))


def _publish(draft: Path, parent: Path, recipe: Recipe) -> Path:
    """Move a complete draft to the first free name. If another process takes that name first, the next free
    name is used.
    """
    sync_tree(draft)
    while True:
        final = parent / _free_name(parent, recipe)
        try:
            draft.rename(final)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                continue
            raise
        sync(parent)
        return final


def queue_path() -> Path:
    """Return the path of the queue, which :mod:`qlora_tui.runs.run_queue` writes."""
    return paths.state_dir() / "queue.json"


def queue_lock_path() -> Path:
    """Return the path of the file that is locked while the queue and a run's status change together."""
    return paths.state_dir() / "queue.lock"


def waiting() -> list[str]:
    """Return the ids of the queued runs, the next one first; empty if the queue cannot be read."""
    try:
        # json instead of msgspec: bytes of an id that are not UTF-8 become lone surrogates.
        ids = json.loads(read_regular(queue_path()))
        return [name for name in ids if isinstance(name, str)] if isinstance(ids, list) else []
    except (OSError, ValueError, RecursionError):
        return []


def all_runs() -> list[RunDir]:
    """Return every run, newest first."""
    folders = [p for p in paths.runs_dir().iterdir() if p.is_dir() and not p.name.startswith(".")]
    return [RunDir(p) for p in sorted(folders, key=_created, reverse=True)]


def find_run(name: str) -> RunDir:
    """Return the run with this id or name, or the only run whose id or name begins with it.

    ``last`` is the newest run.
    """
    runs = all_runs()
    if name == LAST and runs:
        return runs[0]
    if not name.strip():
        raise UsageError(
            "Which run?",
            what="The run name is empty.",
            fix=f"`qlora-tui runs` lists the runs; `{LAST}` means the newest run.",
        )
    matches = match_runs(runs, name)
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UsageError(
            "Which run?",
            what=f"The ids or names of {len(matches)} runs begin with '{name}': "
            f"{', '.join(r.id for r in matches[:5])}.",
            fix="Type more of the name.",
        )
    if name == LAST:
        raise UsageError(
            "No run yet",
            what=f"{paths.runs_dir()} holds no run.",
            fix="`qlora-tui train` starts one.",
        )
    newest = f" The newest is {runs[0].id}." if runs else ""
    raise UsageError(
        "No such run",
        what=f"There is no run named '{name}' in {paths.runs_dir()}.{newest}",
        fix="`qlora-tui runs` lists all runs.",
    )


def match_runs(runs: Sequence[RunDir], name: str) -> list[RunDir]:
    """Return the runs with this id; if none, with this name; if none, those whose id or name begins with
    ``name``.
    """
    return (
        [run for run in runs if run.id == name]
        or [run for run in runs if run.name == name]
        or [run for run in runs if run.id.startswith(name) or run.name.startswith(name)]
    )


def _created(path: Path) -> tuple[float, str]:
    """Return (Unix time at which the run was first queued, name of its folder), for sorting. Repairs do not
    change this time. If it cannot be read, the time of the recipe file is used.
    """
    try:
        event = decode(read_from(path / "events.jsonl", 0, _FIRST_EVENT_BYTES).partition(b"\n")[0])
        return (path / "recipe.toml").stat().st_mtime if event is None else event.at, path.name
    except OSError:
        return 0.0, path.name


def _free_name(parent: Path, recipe: Recipe) -> str:
    model = short_model_name(recipe.model.id)
    words = recipe.name or "-".join([model, *(Path(s.path).stem for s in recipe.data.sources[:1])])
    slug = re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-.")[:48] or "run"
    base = f"{slug}-{time.strftime('%Y%m%d-%H%M')}"
    name, number = base, 1
    # A deleted run may be restored under its name, so its name is not free.
    places = (parent.iterdir(), parent.glob(f"{TRASH}/*"))
    taken = {path.name for place in places for path in place}
    while name in taken:
        number += 1
        name = f"{base}-{number}"
    return name
