"""A sweep's folder, and the record of its decisions.

sweeps/<id>/
  sweep.toml     the recipe and the varied settings, frozen when the sweep was started
  trials.jsonl   the decisions, one record per line; append-only
  active         present while the sweep has work to do
  lock           locked by the process that decides the next step
  optuna.journal the trials as an Optuna study, written when the sweep ends, if Optuna is installed

The trials are ordinary runs; their results are read from the run folders. Records contain only what the run
folders lack, such as the chosen values, the trials that were kept, and the user's requests.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
from msgspec import Struct

from qlora_tui import paths
from qlora_tui.decoding import UnixTime, try_json
from qlora_tui.errors import UsageError, disk_problems
from qlora_tui.files import atomic_write, sync, sync_tree
from qlora_tui.publishing import new_draft
from qlora_tui.runs.event_log import JsonLinesTail, append_line
from qlora_tui.sweeps.sheet import Sheet

Role: TypeAlias = Literal["base", "trial", "confirmation"]
"""``base``: the unchanged recipe. ``confirmation``: the winner's settings with another seed."""


EndReason: TypeAlias = Literal["done", "time", "stopped", "base_failed", "all_failed"]


class Record(Struct, frozen=True, kw_only=True, tag_field="record", omit_defaults=True):
    """Base class of all records."""

    at: UnixTime = msgspec.field(default_factory=lambda: time.time())
    """Unix time, seconds."""


class Began(Record, tag="began", frozen=True, kw_only=True):
    """The sweep was started."""

    deadline: float | None = None
    """Unix time at which the sweep must end; None if it has no deadline."""
    gpu: str = ""
    """The GPUs that the user chose for the sweep; empty for any."""


class TrialChosen(Record, tag="trial", frozen=True, kw_only=True):
    """A trial and its values were chosen; its run is created next."""

    number: int
    """Number of the trial, from 0."""
    role: Role
    group: int = 0
    """Number of the group whose trials are compared in the same rounds; 0 for base and confirmations."""
    values: dict[str, Any] = {}
    seed: int


class RunMade(Record, tag="run", frozen=True, kw_only=True):
    """The run of a trial was created."""

    number: int
    """Number of the trial."""
    run: str
    """Id of the run."""


class RunRefused(Record, tag="refused", frozen=True, kw_only=True):
    """A trial cannot be trained, and has no run."""

    number: int
    why: str


class GroupPlanned(Record, tag="planned", frozen=True, kw_only=True):
    """A group of trials was planned, with a number of trials and of rounds of successive halving."""

    group: int
    trials: int
    rounds: int
    full_s: float | None = None
    """Measured training time of a whole run in seconds; None if no run of the base had finished."""
    extra_s: float = 0.0
    """Seconds that a run takes to start and to evaluate."""


class RoundEnded(Record, tag="round", frozen=True, kw_only=True):
    """A round of a group ended. Records the trials that continue, and those that do not."""

    group: int
    round: int
    """Number of the round, from 1."""
    kept: tuple[int, ...]
    dropped: tuple[int, ...]


class RunAgain(Record, tag="again", frozen=True, kw_only=True):
    """A trial's run, whose process was killed, was queued again to continue from its last checkpoint."""

    number: int


class SweepPaused(Record, tag="paused", frozen=True, kw_only=True):
    """The user paused the sweep."""


class SweepResumed(Record, tag="resumed", frozen=True, kw_only=True):
    """The user resumed the sweep, or gave it a new deadline."""

    deadline: float | None = None
    """The new deadline, Unix time; None if it is unchanged."""


class SweepEnded(Record, tag="ended", frozen=True, kw_only=True):
    """The sweep ended."""

    why: EndReason


AnyRecord: TypeAlias = (
    Began
    | TrialChosen
    | RunMade
    | RunRefused
    | GroupPlanned
    | RoundEnded
    | RunAgain
    | SweepPaused
    | SweepResumed
    | SweepEnded
)
_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyRecord] = msgspec.json.Decoder(AnyRecord)


@dataclass(frozen=True)
class SweepDir:
    """The folder of one sweep. Its path properties do not access the disk."""

    path: Path

    @property
    def id(self) -> str:
        """Name of the folder, such as ``rates-20261130-1330``."""
        return self.path.name

    @property
    def records_path(self) -> Path:
        return self.path / "trials.jsonl"

    @property
    def active_path(self) -> Path:
        return self.path / "active"

    @property
    def lock_path(self) -> Path:
        return self.path / "lock"

    @property
    def journal_path(self) -> Path:
        return self.path / "optuna.journal"

    def sheet(self) -> Sheet:
        """Read the recipe and the settings that the sweep was started with. Raises UserError."""
        return Sheet.load(self.path / "sweep.toml")

    def records(self) -> list[AnyRecord]:
        """Return all records. Incomplete lines and unknown records are skipped."""
        tail: JsonLinesTail[AnyRecord] = JsonLinesTail(
            self.records_path, lambda line: try_json(line, _decoder)
        )
        return list(tail.drain())

    def append(self, record: AnyRecord) -> None:
        """Append a record and sync it to disk. Raises OSError."""
        append_line(self.records_path, _encoder.encode(record) + b"\n")


def create_sweep(sheet: Sheet, deadline: float | None, gpu: str = "") -> SweepDir:
    """Create the folder of a sweep. It appears once it is complete and on disk. Raises UserError."""
    parent = paths.sweeps_dir()
    fix = "Free some space, or point XDG_STATE_HOME at another disk."
    with disk_problems("The sweep could not be created", fix=fix), new_draft(parent) as draft:
        atomic_write(draft / "sweep.toml", sheet.dump())
        SweepDir(draft).append(Began(deadline=deadline, gpu=gpu))
        SweepDir(draft).active_path.touch(mode=0o600)
        sync_tree(draft)
        while True:
            final = parent / _free_name(parent, sheet.name)
            try:
                draft.rename(final)
            except OSError:
                if not final.exists():
                    raise
                continue
            sync(parent)
            return SweepDir(final)


def _free_name(parent: Path, name: str) -> str:
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:40] or "sweep"
    base = f"{slug}-{time.strftime('%Y%m%d-%H%M')}"
    candidate, number = base, 1
    while (parent / candidate).exists():
        number += 1
        candidate = f"{base}-{number}"
    return candidate


def all_sweeps() -> list[SweepDir]:
    """Return every sweep, newest first."""
    folders = [path for path in paths.sweeps_dir().iterdir() if (path / "sweep.toml").is_file()]
    visible = [path for path in folders if not path.name.startswith(".")]
    return [
        SweepDir(p) for p in sorted(visible, key=lambda p: (p / "sweep.toml").stat().st_mtime, reverse=True)
    ]


def find_sweep(name: str) -> SweepDir:
    """Return the sweep with this id, or the only one whose id starts with ``name``; ``last`` is the newest.

    Raises UserError.
    """
    sweeps = all_sweeps()
    if name == "last" and sweeps:
        return sweeps[0]
    matches: Sequence[SweepDir] = [each for each in sweeps if each.id == name] or [
        each for each in sweeps if name and each.id.startswith(name)
    ]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(each.id for each in matches[:5])
        raise UsageError(
            "Which sweep?",
            what=f"The ids of {len(matches)} sweeps begin with '{name}': {names}.",
            fix="Type more of the id.",
        )
    raise UsageError(
        "No such sweep",
        what=f"There is no sweep '{name}' in {paths.sweeps_dir()}.",
        fix="`qlora-tui sweep list` lists all sweeps; `qlora-tui sweep start` starts one.",
    )
