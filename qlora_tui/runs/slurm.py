"""Slurm: targets with job options, job scripts, and the commands of a cluster.

A target is a file, ``targets/NAME.toml`` in the config folder, with the options of a cluster's jobs. Recipes
have no such options, so that they train anywhere. The folder of a run on a cluster has ``slurm.json`` (its
job), ``job.sh`` (the submitted script), ``slurm.log`` (the job's output) and ``squeue.json`` (the last state
of the job in Slurm). :mod:`qlora_tui.runs.slurm_runs` submits and watches such runs;
:mod:`qlora_tui.runs.slurm_job` runs inside the job.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec import Struct

from qlora_tui import paths
from qlora_tui.decoding import UnixTime, read_json
from qlora_tui.errors import UsageError, UserError
from qlora_tui.files import private_dir, read_regular
from qlora_tui.formatting import pluralize
from qlora_tui.process_end import how_ended
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.holds import time_words
from qlora_tui.runs.process import detached_environ
from qlora_tui.visible import visible
from qlora_tui.worker import module_argv

SIGNAL_S = 120
"""Seconds before the time limit at which a job is told to save and end."""
FRESH_S = 120.0
"""Seconds for which an answer from Slurm is trusted more than the files of a run that seems lost."""
_PROGRAM = "qlora_tui.runs.slurm_job"
_CALL_S = 30.0
"""Seconds after which a Slurm command is considered unresponsive."""
SUBMITTING_S = 2 * _CALL_S
"""Seconds after which a run without a job counts as not submitted: its submitter was killed."""
_CANCEL_S = 15.0
"""Seconds for which the request to cancel a job is repeated while the job is still waiting."""
_AGAIN_S = 0.5
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
_OWN_OPTIONS = {
    "signal",
    "requeue",
    "no-requeue",
    "open-mode",
    "output",
    "error",
    "array",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "wrap",
    "parsable",
    "test-only",
    "wait",
    "partition",
    "gres",
    "time",
    "account",
}
"""Options of sbatch that a target's ``extra`` must not have: other keys or this program set them."""
_OWN_SHORT_OPTIONS = re.compile(r"-[oeaNnWptA]")
_VARIABLES = re.compile(
    r"SBATCH_(SIGNAL|REQUEUE|NO_REQUEUE|OPEN_MODE|OUTPUT|ERROR|TIMELIMIT|EXPORT|ARRAY_INX|WAIT)$"
    r"|SQUEUE_|HF_TOKEN$|HUGGING_FACE_HUB_TOKEN$"
)
"""Variables to remove from a job's environment: they would override a script's options or change the
output of commands, or they hold tokens. The cluster's controller stores the environment in a file, and no
trainer needs a token."""


class Target(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the jobs on a cluster, each in the format that sbatch accepts."""

    partition: str = ""
    """Partition; empty for the cluster's default."""
    gres: str = ""
    """GPUs, such as ``gpu:a100:1``; empty for as many GPUs of any kind as the recipe uses."""
    time: str = ""
    """Time limit of a job, such as ``04:00:00``; empty to propose one from the measured speed."""
    account: str = ""
    extra: tuple[str, ...] = ()
    """Additional options, such as ``["--mem=64G", "--constraint=ampere"]``."""


class JobPlan(Struct, frozen=True):
    """The options of a job, and the source of its time limit."""

    name: str
    """Name of the target."""
    target: Target
    limit_s: int | None
    """The proposed limit in seconds; None if the target or the cluster sets it."""
    words: str
    """The limit and its source, in one sentence."""


class Submission(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The content of ``slurm.json``: the job that trains a run, or that trained it last."""

    target: str
    """Name of the target."""
    job: str = ""
    """Slurm's job id; empty while the job is being submitted."""
    limit_s: int | None = None
    """Proposed time limit of the job in seconds; None if the target or the cluster sets the limit."""


class SeenJob(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The content of ``squeue.json``: what Slurm last reported about a job.

    The file is rewritten only when the report changes.
    """

    at: UnixTime
    """Time at which this report was first seen."""
    states: tuple[str, ...] = ()
    """State and flags of ``squeue --json``, such as ``RUNNING``; empty if Slurm forgot the job."""
    reason: str = ""
    """Why the job waits, such as ``Resources``."""
    nodes: str = ""
    starts_at: UnixTime | None = None
    """Unix time at which Slurm expects to start a waiting job."""

    @property
    def waits(self) -> bool:
        """Whether the job waits to start, for the first time or again."""
        return "PENDING" in self.states

    @property
    def runs(self) -> bool:
        """Whether the job has started and not ended."""
        return not self.waits and not {"RUNNING", "SUSPENDED", "COMPLETING"}.isdisjoint(self.states)

    @property
    def is_over(self) -> bool:
        """Whether the job has ended and will not start again."""
        return not (self.waits or self.runs)

    def words(self, job: str) -> str:
        """Describe the state of the job with this id, in a sentence."""
        if self.waits:
            # The most important part comes first, because lists truncate the sentence.
            until = f" until about {time_words(self.starts_at)}" if self.starts_at else ""
            return f"Waiting in Slurm ({self.reason or 'no reason given'}){until} as job {job}."
        if self.runs:
            return f"On {self.nodes or 'a node'}, Slurm job {job}."
        if not self.states:
            return f"Slurm job {job} has ended."
        return f"Slurm job {job} has ended: {self.states[0].lower().replace('_', ' ')}."


_SUBMISSION = msgspec.json.Decoder(Submission)
_SEEN = msgspec.json.Decoder(SeenJob)


def submission_of(run: RunDir) -> Submission | None:
    """Return the job of a run on a cluster; None for any other run."""
    return read_json(run.slurm_path, _SUBMISSION)


def seen_job(run: RunDir) -> SeenJob | None:
    """Return the last known state of a run's job; None if Slurm was not asked yet."""
    return read_json(run.squeue_path, _SEEN)


def was_asked_lately() -> bool:
    """Return whether Slurm has answered any process within :data:`FRESH_S` seconds."""
    try:
        return abs(time.time() - asked_path().stat().st_mtime) < FRESH_S
    except OSError:
        return False


def asked_path() -> Path:
    """Return the path of a file whose mtime is the time of Slurm's last answer.

    The file is locked while Slurm is asked.
    """
    return paths.state_dir() / "squeue.asked"


def targets_dir() -> Path:
    """Return the folder of the targets."""
    return private_dir(paths.config_dir() / "targets")


def load_target(name: str) -> Target:
    """Read the target with this name. Raises UsageError if it does not exist or cannot be used."""
    path = targets_dir() / f"{name}.toml"
    example = 'partition = "gpu"\ngres = "gpu:1"\ntime = "04:00:00"'
    if not _NAME.fullmatch(name) or not path.is_file():
        known = ", ".join(sorted(each.stem for each in targets_dir().glob("*.toml")))
        raise UsageError(
            "No such target",
            what=f"There is no {path}.",
            why=f"The targets are {known}." if known else "A target defines what a cluster's jobs request.",
            fix=f"Create that file. Each line is optional:\n{example}",
        )
    try:
        target = msgspec.convert(tomllib.loads(read_regular(path).decode()), Target)
    except (OSError, ValueError, RecursionError, msgspec.ValidationError) as error:
        keys = ", ".join(Target.__struct_fields__)
        raise UsageError(
            "Cannot use the target", what=f"{path}: {error}.", fix=f"The possible keys are {keys}."
        ) from error
    problem = _problem_of(target)
    if problem:
        raise UsageError("Cannot use the target", what=f"{path}: {problem}", fix="Correct that line.")
    return target


def _problem_of(target: Target) -> str:
    """Return what is wrong with a target, in a sentence; empty if nothing is wrong."""
    texts = (target.partition, target.gres, target.account, *target.extra)
    if odd := next((text for text in texts if not text.isprintable()), ""):
        return f"{odd!r} contains a line break or a control character."
    if target.time and parse_limit(target.time) is None:
        return f"time is {target.time!r}; sbatch takes 90 (minutes), 4:00:00 or 1-12:00:00."
    for option in target.extra:
        name = option.partition("=")[0]
        if not option.startswith("-"):
            return f"extra has {option!r}, which is not an option such as --mem=64G."
        if name.removeprefix("--") in _OWN_OPTIONS or _OWN_SHORT_OPTIONS.match(option):
            return f"extra has {option}, which another key or this program sets."
    return ""


def parse_limit(text: str) -> int | None:
    """Parse a time limit in sbatch's format; return seconds, or None if it is invalid."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    first, second, third = (None if part is None else int(part) for part in match.group(2, 3, 4))
    assert first is not None
    if match["days"]:
        return int(match["days"]) * 86400 + first * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return first * 3600 + (second or 0) * 60 + third
    return first * 60 + (second or 0)


def format_limit(seconds: int) -> str:
    """Return a time limit in sbatch's format, such as ``1-02:30:00``."""
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:02}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"{days}-{clock}" if days else clock


def gpus_of(gres: str) -> int:
    """Return the number of GPUs in an option such as ``gpu:a100:2``; 1 if it has no number."""
    count = gres.rpartition(":")[2]
    return int(count) if count.isdecimal() else 1


def job_script(run: RunDir, target: Target, limit_s: int | None, gpus: int) -> str:
    """Return the script of a job that trains a run.

    Args:
        run: The run.
        target: Options of the job.
        limit_s: Time limit in seconds if the target has none; None for the cluster's default.
        gpus: Number of GPUs if the target has none.
    """
    # sbatch replaces %j by the job id, and so on.
    output = str(run.job_log_path).replace("%", "%%")
    options = [
        f"--job-name={run.id}",
        f"--output={output}",
        "--open-mode=append",
        # Only the script gets the signal. The script becomes the program below, which makes the trainer save.
        f"--signal=B:TERM@{SIGNAL_S}",
        "--requeue",
        "--nodes=1",
        "--ntasks=1",
        f"--gres={target.gres or f'gpu:{gpus}'}",
    ]
    if target.partition:
        options.append(f"--partition={target.partition}")
    if target.account:
        options.append(f"--account={target.account}")
    if limit := target.time or (format_limit(limit_s) if limit_s else ""):
        options.append(f"--time={limit}")
    lines = [f"#SBATCH {shlex.quote(option)}" for option in (*options, *target.extra)]
    program = shlex.join(module_argv(_PROGRAM, str(run.path)))
    # If the job is preempted before the program handles signals, the job must be requeued instead of ending.
    return "\n".join(["#!/bin/bash", *lines, "trap '' TERM", f"exec {program}", ""])


def submit(script: Path) -> str:
    """Submit the script of a job; return its id. Raises UserError."""
    printed = _call("sbatch", "--parsable", str(script))
    # With several clusters, the cluster's name follows. Some sites print more lines.
    match = re.search(r"^(\d+)(;.*)?$", printed, re.MULTILINE)
    if match is None:
        raise UserError(
            "The job ID is unknown",
            what=f"sbatch printed {printed.strip()!r}, which contains no job ID.",
            fix="Run `squeue --me` to see whether the job was submitted; if not, try again.",
        )
    return match[1]


def cancel(job: str) -> None:
    """Cancel a waiting job. Raises UserError.

    While the processes of a requeued job end, Slurm accepts the command and starts the job anyway, so
    cancelling is repeated.
    """
    deadline = time.monotonic() + _CANCEL_S
    while True:
        _call("scancel", job)
        try:
            seen = list_jobs().get(job)
        except UserError:
            return  # Slurm accepted the command and gives no further information.
        if seen is None or not seen.waits:
            return
        if time.monotonic() > deadline:
            raise UserError(
                "The job was not canceled",
                what=seen.words(job),
                fix="Try again once the job has left its node.",
            )
        time.sleep(_AGAIN_S)


def requeue(job: str) -> None:
    """Requeue the job that runs this process: Slurm ends it and starts it again later. Raises UserError."""
    _call("scontrol", "requeue", job)


def partition_limit(partition: str) -> int | None:
    """Return the time limit of a partition in seconds; None if it has no limit or the limit is unknown."""
    try:
        lines = _call(
            "sinfo", "--noheader", "--format=%P %l", *([f"--partition={partition}"] if partition else [])
        )
    except UserError:
        return None
    for name, limit in (line.split() for line in lines.splitlines() if len(line.split()) == 2):
        # The default partition is marked with a star.
        if partition or name.endswith("*"):
            return parse_limit(limit)
    return None


class _Number(Struct):
    number: int = 0


class _ListedJob(Struct):
    """A job in the output of ``squeue --json``."""

    job_id: int
    job_state: list[str] | str
    state_reason: str = ""
    nodes: str = ""
    start_time: _Number | int | None = None

    def seen(self) -> SeenJob:
        states = (self.job_state,) if isinstance(self.job_state, str) else tuple(self.job_state)
        start = self.start_time.number if isinstance(self.start_time, _Number) else self.start_time
        waits = "PENDING" in states
        return SeenJob(
            at=time.time(),
            states=states,
            reason=self.state_reason if waits else "",
            nodes="" if waits else self.nodes,
            starts_at=float(start) if waits and start else None,
        )


class _Listing(Struct):
    jobs: list[_ListedJob]


def list_jobs() -> dict[str, SeenJob]:
    """Return this user's jobs by id, including those that ended a few minutes ago. Raises UserError."""
    output = _call("squeue", "--json", "--me", "--states=all")
    try:
        jobs = msgspec.json.decode(output, type=_Listing).jobs
    except msgspec.MsgspecError as error:
        raise UserError(
            "The output of squeue cannot be read",
            what=f"This version of qlora-tui cannot read the output of `squeue --json`: {error}.",
            fix="`squeue --me` lists your jobs.",
        ) from error
    return {str(job.job_id): job.seen() for job in jobs}


def is_installed() -> bool:
    """Return whether Slurm's commands are installed on this machine."""
    return shutil.which("squeue") is not None


def require_installed() -> None:
    """Raise UserError if Slurm's commands are not installed on this machine."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "Slurm is not installed here",
            what="The command sbatch was not found.",
            why="Runs are submitted with Slurm's own commands.",
            fix="Use a login node of the cluster. To make this machine one: `sudo apt install slurm-client`, "
            "then copy slurm.conf and the authentication key (munge.key or slurm.key) from a login node.",
        )


def _call(command: str, *arguments: str) -> str:
    """Run a Slurm command and return its output. Raises UserError."""
    require_installed()
    environ = {name: value for name, value in detached_environ().items() if not _VARIABLES.match(name)}
    try:
        done = subprocess.run(
            [command, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=environ,
            cwd="/",
            timeout=_CALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        what = f"{command} did not answer within {pluralize(round(_CALL_S), 'second')}."
        raise UserError("Slurm does not answer", what=what, fix="Try again later.") from None
    except OSError as error:
        raise UserError("Slurm does not answer", what=f"{command}: {error.strerror}.") from error
    if done.returncode:
        raise UserError(
            f"{command} failed",
            what=_last_lines(done.stderr.splitlines()) or f"The command {how_ended(done.returncode)}.",
            fix=f"Correct the problem. The command was `{shlex.join([command, *arguments])}`.",
        )
    return done.stdout


def _last_lines(lines: Iterable[str]) -> str:
    """Return the last three lines that a command printed, joined into one line."""
    return " / ".join(visible(line.strip()) for line in list(lines)[-3:] if line.strip())
