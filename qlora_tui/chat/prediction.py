"""Decisions on every row of a file, written into a copy of it: ``qlora-tui predict``, as a job.

Decisions are appended to a hidden file next to the output, in batches and in the order of the rows. After a
kill, complete lines of this file are kept, and the job continues with the next row. When all rows are
decided, the input is read once more and copied row by row, each with its decision, to another hidden file,
which then takes the place of the output. Memory use does not grow with the size of the file.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import Struct

from qlora_tui.chat.chat_types import ADAPTER
from qlora_tui.data.conversation import Conversation, RowRejectedError
from qlora_tui.data.formats import RowFormat, as_fields, parse_question, question_parts
from qlora_tui.data.read import first_rows, rows
from qlora_tui.data.row import Row
from qlora_tui.data.row_writers import WRITERS, write_rows
from qlora_tui.decoding import try_json
from qlora_tui.errors import EXIT_USAGE, UserError, disk_problems
from qlora_tui.files import open_append, sync
from qlora_tui.gpu.torch_env import configure_torch_env, faster_imports
from qlora_tui.locks import locked
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.task_metrics.decisions import Decider, read_decider
from qlora_tui.runs.task_metrics.task_evaluation import adapter_hash
from qlora_tui.worker import Report

if TYPE_CHECKING:
    from qlora_tui.chat.session import ChatSession

_BATCH_ROWS = 64
_SNIFFED_ROWS = 20
_ENDING_S = 10.0
"""Maximum seconds to wait until another process releases the output.

The process of a killed command may finish importing torch before it ends.
"""
PREFIX = "predicted_"
"""Prefix of the names of the added columns: label, probability, abstain, probabilities, problem."""


class Prediction(Struct, frozen=True, kw_only=True):
    """A request to decide every row of a file."""

    run: str
    """Folder of the run."""
    file: str
    out: str
    columns: dict[str, str] = {}
    """Column of each part of a row, if the file names it differently from the training data."""
    threshold: float | None = None
    """Probability below which a row is left to a person. None: every row is decided."""
    probabilities: bool = False
    """Whether to write the probability of every option."""
    replaces: bool = False
    """Whether an existing output, and an unfinished prediction with other settings, are replaced."""


class Predicted(Struct, frozen=True, kw_only=True):
    """Result of a prediction."""

    out: str
    rows: int
    decided: int
    abstained: int
    """Number of rows that are left to a person, because no option reaches the threshold."""
    undecided: int
    """Number of rows that are unreadable, rejected by the chat template, or longer than the context."""
    resumed: int
    """Rows that were decided by an earlier call."""


class _Header(Struct, frozen=True):
    """First line of the hidden file."""

    fingerprint: str
    """Hash of the model, settings and file that the decisions belong to."""


class _Line(Struct, frozen=True, omit_defaults=True):
    """The decision on one row."""

    label: str | None = None
    probability: float | None = None
    probabilities: dict[str, float] | None = None
    problem: str = ""


_HEADERS = msgspec.json.Decoder(_Header)
_LINES = msgspec.json.Decoder(_Line)


def check_prediction(request: Prediction) -> tuple[Decider, RowFormat]:
    """Check a request before a model is loaded. Return what the run decides, and how rows are read.

    Raises UserError if the run decides nothing, if the file lacks a column or already has predictions, or if
    the output must not be written.
    """
    run, file, out = RunDir(Path(request.run)), Path(request.file), Path(request.out)
    decider = read_decider(run.adapter_dir)
    if decider is None:
        raise UserError(
            "The run makes no decisions",
            what=f"No decisions have been measured for {run.id}.",
            why="Decisions are measured only if the answers in the run's data are labels or objects with "
            "enumerated fields, and the run has validation rows.",
            fix=f"Measure the decisions with `qlora-tui evaluate {run.id} --again`, or choose another run.",
            exit_code=EXIT_USAGE,
        )
    if out.suffix not in WRITERS:
        raise UserError(
            "Unknown output format",
            what=f"The extension of {out} is {out.suffix or 'missing'}.",
            fix=f"Use a name that ends in {', '.join(WRITERS)}.",
            exit_code=EXIT_USAGE,
        )
    seen = [row.value for row in first_rows(file, _SNIFFED_ROWS) if isinstance(row.value, dict)]
    if out.exists() and (out.samefile(file) or not request.replaces):
        raise UserError(
            "The output already exists",
            what=f"{out} already exists.",
            fix="Choose another name."
            if out.samefile(file)
            else "Choose another name, or replace it with --replace.",
            exit_code=EXIT_USAGE,
        )
    layout = msgspec.structs.replace(decider.layout, columns=decider.layout.columns | request.columns)
    columns = list(dict.fromkeys(column for value in seen for column in value))
    for part in question_parts(layout):
        if seen and layout.columns[part] not in columns:
            raise UserError(
                "No such column",
                what=f"{file} has no column {layout.columns[part]!r}, which contained the {part} in "
                "training.",
                why=f"The file's columns are {', '.join(columns)}.",
                fix=f"Specify the column that contains the {part}: --column {part}=COLUMN.",
                exit_code=EXIT_USAGE,
            )
    if taken := [column for column in columns if column.startswith(PREFIX)]:
        raise UserError(
            "The file already has predictions",
            what=f"{file} has the column {taken[0]!r}, which would be overwritten.",
            fix="Rename or remove that column.",
            exit_code=EXIT_USAGE,
        )
    return decider, layout


def predict(request: Prediction, report: Report) -> Predicted:
    """Predict a label for every row of a file, resuming where an interrupted call stopped.

    Raises:
        UserError: No decisions have been measured for the run, a file cannot be read or written, the output
            exists, or another process writes it.
    """
    decider, layout = check_prediction(request)
    file, out = Path(request.file), Path(request.out)
    log = out.with_name(f".{out.name}.decisions")
    with disk_problems("The predictions cannot be written", out), locked(log, patience_s=_ENDING_S) as held:
        if held is None:
            raise UserError(
                "The output is in use",
                what=f"Another process is writing {out}.",
                fix="Wait until that process has ended, or choose another name.",
            )
        fingerprint = _fingerprint(request, decider)
        resumed = _resume(log, fingerprint, replaces=request.replaces)
        _decide_rest(request, decider, layout, log, resumed, report)
        if _fingerprint(request, decider) != fingerprint:
            raise UserError(
                "The file has changed",
                what=f"{file} was changed during the prediction.",
                fix="Run the prediction again with --replace.",
            )
        draft = out.with_name(f".{out.name}.draft")
        write_rows(draft, out.suffix, lambda: _with_decisions(request, log))
        counts = Counter(_outcome(line, request.threshold) for line in _logged(log))
        sync(draft)
        draft.replace(out)
        sync(out.parent)
        log.unlink()
    return Predicted(
        out=str(out),
        rows=counts.total(),
        decided=counts["decided"],
        abstained=counts["abstained"],
        undecided=counts["undecided"],
        resumed=resumed,
    )


def _fingerprint(request: Prediction, decider: Decider) -> str:
    state = Path(request.file).stat()
    whole = {
        "file": (str(Path(request.file).absolute()), state.st_size, state.st_mtime_ns),
        "adapter": adapter_hash(RunDir(Path(request.run))),
        "decider": decider,
        "columns": request.columns,
        "probabilities": request.probabilities,
    }
    return hashlib.blake2b(msgspec.json.encode(whole), digest_size=16).hexdigest()


def _resume(log: Path, fingerprint: str, *, replaces: bool) -> int:
    """Prepare the log for appending, and return the number of rows that it already has decisions on.

    An incomplete last line is removed. If the decisions in the log belong to another request, they are
    deleted with ``replaces``; otherwise, UserError is raised.
    """
    with log.open("rb+") as file:
        first = file.readline()
        header = try_json(first, _HEADERS)
        if header is not None and header.fingerprint == fingerprint:
            count, end = 0, file.tell()
            for line in file:
                if not line.endswith(b"\n") or try_json(line, _LINES) is None:
                    break
                count, end = count + 1, end + len(line)
            file.truncate(end)
            return count
        # Without a decision in it there is nothing to lose.
        is_begun = bool(first) and (header is None or bool(file.readline()))
        if is_begun and not replaces:
            raise UserError(
                "Another prediction is unfinished",
                what=f"{log} contains predictions for other data, by another adapter, or with other options.",
                fix="Start over with --replace, or choose another name.",
                exit_code=EXIT_USAGE,
            )
        file.seek(0)
        file.truncate()
        file.write(msgspec.json.encode(_Header(fingerprint)) + b"\n")
    return 0


def _decide_rest(
    request: Prediction, decider: Decider, layout: RowFormat, log: Path, done: int, report: Report
) -> None:
    """Append the decision on each row after the first ``done`` rows."""
    file = Path(request.file)
    # Reading takes little time compared with deciding, and detects a damaged file before the model is loaded.
    total = sum(1 for _ in rows(file))
    rest = islice(rows(file), done, None)
    session: ChatSession | None = None
    with open_append(log) as lines:
        while batch := list(islice(rest, _BATCH_ROWS)):
            if session is None:
                session = _session(request)
            for line in _decided(session, decider, layout, batch, request):
                lines.write(msgspec.json.encode(line) + b"\n")
            lines.flush()
            done += len(batch)
            report(done, total)


def _session(request: Prediction) -> ChatSession:
    configure_torch_env()
    with faster_imports():
        from qlora_tui.chat.chat_sources import run_source
        from qlora_tui.chat.loading import load_session
        from qlora_tui.training.host import lower_priority

    session = load_session(run_source(RunDir(Path(request.run))), streams=True)
    if session.compute_device.kind == "cpu":
        lower_priority()
    return session


def _decided(
    session: ChatSession, decider: Decider, layout: RowFormat, batch: list[Row], request: Prediction
) -> Iterator[_Line]:
    from qlora_tui.chat.decide import decide

    asked: list[Conversation | str] = []
    for row in batch:
        try:
            asked.append(parse_question(row, layout, decider.decision.options[0]))
        except RowRejectedError as refused:
            asked.append(refused.reason)
    conversations = [each for each in asked if isinstance(each, Conversation)]
    decisions = iter(decide(session, decider, ADAPTER, conversations))
    for each in asked:
        decided = each if isinstance(each, str) else next(decisions)
        if isinstance(decided, str | UserError):
            yield _Line(problem=decided if isinstance(decided, str) else f"{decided.title}. {decided.what}")
            continue
        every = {option.option: option.probability for option in decided.options}
        yield _Line(
            label=decided.best.option,
            probability=decided.best.probability,
            probabilities=every if request.probabilities else None,
        )


def _logged(log: Path) -> Iterator[_Line]:
    with log.open("rb") as file:
        file.readline()
        for line in file:
            yield _LINES.decode(line)


def _outcome(line: _Line, threshold: float | None) -> Literal["decided", "abstained", "undecided"]:
    if line.label is None:
        return "undecided"
    return "abstained" if _abstains(line, threshold) else "decided"


def _abstains(line: _Line, threshold: float | None) -> bool:
    return threshold is not None and (line.probability or 0.0) < threshold


def _with_decisions(request: Prediction, log: Path) -> Iterator[dict[str, Any]]:
    """Yield every row of the file with its decision in additional columns."""
    for row, line in zip(rows(Path(request.file)), _logged(log), strict=True):
        added: dict[str, Any] = {"label": line.label, "probability": line.probability}
        if request.threshold is not None:
            added["abstain"] = _abstains(line, request.threshold)
        if request.probabilities:
            added["probabilities"] = line.probabilities
        if line.problem:
            added["problem"] = line.problem
        yield as_fields(row.value) | {f"{PREFIX}{name}": value for name, value in added.items()}
