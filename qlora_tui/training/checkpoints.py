"""Checkpoints, written completely or not at all, verified before use, and pruned as the recipe says.

checkpoints/step-N/
  adapter_model.safetensors, adapter_config.json   loads with plain peft
  optimizer.pt, scheduler.pt, rng_state.pth, …     of :mod:`.trainer`, read without running pickled code
  state.json                                       :class:`CheckpointState`
  SHA256SUMS                                       a checksum of each of these files
  complete                                         every file and its size; written last

A folder is written under a hidden name, flushed to the disk, and then renamed. Importing this module does not
load torch.

A resume is exact for three reasons: :class:`.trainer.Trainer` restores adapter, optimizer, schedule and
random numbers; :class:`.loop.Loop` restores the :class:`CheckpointState`; and
:func:`~qlora_tui.data.step_plan.plan_steps` plans the same steps again.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from qlora_tui.catalog.local_models import ModelFiles
from qlora_tui.catalog.model_validation import weight_files
from qlora_tui.checksums import write_checksums
from qlora_tui.decoding import decode_json
from qlora_tui.errors import UserError, first_line
from qlora_tui.files import atomic_write, open_to_read, read_regular
from qlora_tui.formatting import pluralize
from qlora_tui.publishing import discard, draft_files, draft_path, held_draft, publish
from qlora_tui.recipe.fields import WITHOUT_EFFECT_ON_WEIGHTS, diff_recipes
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import parse, to_frozen_recipe
from qlora_tui.runs.damage import MARKER, checkpoint_damage
from qlora_tui.runs.directory import RunDir
from qlora_tui.training.distributed import DistributedContext

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_STATE = "state.json"
_HEADER = 1 << 20
_SAMPLE = _END = 1 << 12
_SAMPLES = 64
"""Number of samples of a weight file that are hashed to identify the file, in addition to its beginning and
end.
"""
_BATCH_SPLIT = frozenset(
    {"training.micro_batch_size", "training.gradient_accumulation", "training.auto_micro_batch"}
)
"""Settings that may be changed before a resume, provided that the effective batch size stays the same."""


class CheckpointState(Struct, frozen=True, kw_only=True):
    """The state that a resumed run needs in addition to the trainer's files."""

    step: int
    tokens: int
    """Number of tokens trained on so far, without padding."""
    data_hash: str
    padding_free: bool = msgspec.field(name="kept_apart")
    """Whether each micro-batch was one sequence of isolated samples, which determines a step's contents."""
    recipe: str
    """The recipe as TOML."""
    base_hash: str = ""
    """Identity of the base's weight files (:func:`weights_identity`); empty in checkpoints of version 1.0."""
    best_step: int | None = None
    best_score: float | None = msgspec.field(default=None, name="best_loss")
    loss_before_training: float | None = None
    initial_weights: str = ""
    """Digest of the trained weights before the first step; empty in checkpoints of earlier versions."""
    scores_since_best: tuple[float, ...] = msgspec.field(default=(), name="last_losses")
    """Scores of the evaluations since the best, for early stopping."""
    evaluation_due: bool = False
    """Whether a stop interrupted the evaluation at this step, which a resume then repeats."""
    ends_with_epoch: bool = False
    """Whether the user has asked the run to finish at the end of the epoch."""

    def trained_recipe(self) -> Recipe:
        """Return the recipe as it was trained up to this checkpoint.

        Raises UserError if the text is not a recipe.
        """
        return to_frozen_recipe(parse(self.recipe, "the checkpoint's recipe"), "the checkpoint's recipe")


_STATE_DECODER = msgspec.json.Decoder(CheckpointState)


class UnloadableCheckpoint(UserError):
    """Raised if torch or peft cannot load a checkpoint whose files are undamaged."""

    def __init__(self, folder: Path, error: Exception) -> None:
        reason = first_line(error)
        super().__init__(
            "The checkpoint could not be loaded",
            what=f"{folder.name} could not be loaded: {type(error).__name__}: {reason}.",
            fix=f"Move {folder} elsewhere; `qlora-tui resume` then continues from the previous checkpoint.",
        )


class Checkpoint(Struct, frozen=True):
    """A checkpoint that is complete and undamaged."""

    step: int
    folder: Path
    state: CheckpointState


def write(
    run: RunDir,
    state: CheckpointState,
    save_checkpoint_files: Callable[[Path], None],
    dist: DistributedContext,
) -> Path:
    """Write a checkpoint and flush it to disk.

    All processes return once the checkpoint is complete: if one of them failed in the next step, it would end
    the process that still writes.

    Args:
        save_checkpoint_files: writes the files of this process to the given folder.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: a process cannot write its part. All processes raise the error. An earlier checkpoint of the
            same step is then unchanged.
    """
    final = run.checkpoints_dir / f"step-{state.step}"
    files = draft_files(final)
    with ExitStack() as stack:

        def prepare() -> None:
            # Do not create parents: a run that was deleted meanwhile must not reappear.
            run.checkpoints_dir.mkdir(mode=0o700, exist_ok=True)
            if stack.enter_context(held_draft(draft_path(final))) is None:
                raise BlockingIOError(errno.EAGAIN, "Another process is writing it", str(final))

        def complete() -> None:
            atomic_write(files / _STATE, msgspec.json.encode(state))
            write_checksums(files)
            sizes = {file.name: file.stat().st_size for file in sorted(files.iterdir())}
            atomic_write(files / MARKER, msgspec.json.encode(sizes))
            # An earlier attempt may have left a checkpoint of this step.
            publish(files, final)

        _together(dist, prepare if dist.is_main_process else None)
        _together(dist, partial(save_checkpoint_files, files))
        _together(dist, complete if dist.is_main_process else None)
    return final


def _together(dist: DistributedContext, work: Callable[[], None] | None) -> None:
    """Call ``work``, if any, and wait for the other processes. If ``work`` raises OSError in a process, all
    processes raise OSError.
    """
    problem: OSError | None = None
    if work is not None:
        try:
            work()
        except OSError as error:
            problem = error
    report = None if problem is None else (problem.errno or errno.EIO, problem.strerror or str(problem))
    reports = dist.all_gather(report)
    if problem is not None:
        raise problem
    if failed := next(filter(None, reports), None):
        raise OSError(*failed)


def latest(run: RunDir, before: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest complete checkpoint.

    Args:
        before: consider only checkpoints of steps before this one.

    Returns:
        The checkpoint, or None if there is none, and a description of the damage of each newer one.
    """
    damage: list[str] = []
    for step, folder in reversed(run.checkpoints()):
        if before is not None and step >= before:
            continue
        problem = checkpoint_damage(folder)
        if problem is None:
            try:
                state = decode_json(read_regular(folder / _STATE), _STATE_DECODER)
                return Checkpoint(step, folder, state), damage
            except (OSError, msgspec.MsgspecError) as error:
                problem = f"{_STATE} cannot be read ({error})"
        damage.append(f"{folder.name}: {problem}")
    return None, damage


def require_same_processes(checkpoint: Checkpoint, processes: int) -> None:
    """Raise UserError if a different number of processes wrote the checkpoint.

    Each process has its own random numbers, so the resume would not be exact.
    """
    saved = len(list(checkpoint.folder.glob("rng_state*.pth")))
    if saved not in (0, processes):
        raise UserError(
            "The number of GPUs has changed",
            what=f"{checkpoint.folder.name} was trained on {pluralize(saved, 'GPU')}, and this attempt has "
            f"{processes}.",
            why="Each process draws its own random numbers for dropout, so a resume would not be exact.",
            fix=f"Resume it on {pluralize(saved, 'GPU')}, or train the checkpoint further in a new run: "
            f"`--init-from {checkpoint.folder}`.",
        )


def intact_folder(run: RunDir, step: int) -> Path | None:
    """Return the folder of the checkpoint at ``step``; None if it is missing or damaged."""
    folder = run.checkpoints_dir / f"step-{step}"
    return folder if checkpoint_damage(folder) is None else None


def prune(run: RunDir, keep: int, best_step: int | None) -> None:
    """Delete all but the newest ``keep`` checkpoints and the best one."""
    for step, folder in run.checkpoints()[:-keep]:
        if step != best_step:
            # A checkpoint that cannot be deleted takes disk space but does no other harm.
            with suppress(OSError):
                discard(folder)


def weights_identity(files: ModelFiles) -> str:
    """Return a hash that identifies a base's weights, from the size, header and samples of each weight file.

    Hashing samples is fast. Paths and names of the files are not part of the hash. Raises UserError if a file
    cannot be read.
    """
    names = (files.gguf_file,) if files.gguf_file is not None else weight_files(files.folder)
    hashed = hashlib.sha256()
    for name in names:
        try:
            with open_to_read(files.folder / name) as file:
                size = file.seek(0, os.SEEK_END)
                hashed.update(size.to_bytes(8, "little"))
                for place in (0, *(size * number // _SAMPLES for number in range(1, _SAMPLES)), size - _END):
                    file.seek(max(0, place))
                    hashed.update(file.read(_HEADER if not place else _SAMPLE))
        except OSError as error:
            raise UserError(
                "The weights cannot be read", what=f"{files.folder / name}: {error.strerror or error}."
            ) from error
    return hashed.hexdigest()


def require_same_base(state: CheckpointState, files: ModelFiles, base_hash: str) -> None:
    """Raise UserError if the base's weights have changed since the checkpoint."""
    if state.base_hash and state.base_hash != base_hash:
        raise UserError(
            "The base model has changed",
            what=f"The weights in {files.folder} differ from the run's weights at step {state.step}.",
            why="An adapter fits only the weights that it was trained on.",
            fix="Restore the model's files, or start a new run.",
        )


def require_unchanged(state: CheckpointState, recipe: Recipe, data_hash: str) -> None:
    """Raise UserError, naming the differences, if recipe or data have changed since the checkpoint.

    Allowed are changes that do not affect the trained weights, and another split of the same effective batch.
    """
    before = state.trained_recipe()
    changes = [c for c in diff_recipes(before, recipe) if c.path not in WITHOUT_EFFECT_ON_WEIGHTS]
    if before.effective_batch == recipe.effective_batch:
        changes = [c for c in changes if c.path not in _BATCH_SPLIT]
    if changes:
        raise UserError(
            "The recipe has changed",
            what=f"Since the checkpoint at step {state.step}: {'; '.join(map(str, changes))}.",
            why="Continuing would mix the old run and the new one.",
            fix="Undo the change in recipe.toml, or start a new run with it.",
        )
    if data_hash != state.data_hash:
        raise UserError(
            "The data has changed",
            what=f"The tokenized data has changed since step {state.step}: its hash is now {data_hash[:12]}, "
            f"and was {state.data_hash[:12]}.",
            why="A data file, the tokenizer or its chat template has changed.",
            fix="Restore the files, or start a new run.",
        )


BUFFER_BYTES = 1 << 20


def save_with_torch(value: object, path: Path) -> None:
    """Write a file that ``torch.load`` can read.

    The file is written through a Python file object. If a write fails, the OSError of this object is then the
    context of the error that torch raises.
    """
    import torch

    with _Unbuffered(path) as raw, io.BufferedWriter(raw, BUFFER_BYTES) as written:
        torch.save(value, written)


class _Unbuffered(io.RawIOBase):
    """A new file without a buffer, in which each write is one system call."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def writable(self) -> bool:
        return True

    def write(self, content: ReadableBuffer, /) -> int:
        return os.write(self._handle, content)

    def close(self) -> None:
        if not self.closed:
            os.close(self._handle)
        super().close()
