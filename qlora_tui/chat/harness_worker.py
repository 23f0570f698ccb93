"""The process in which base and adapter do tasks of lm-eval.

``python -m qlora_tui.chat.harness_worker RUN_DIR TASKS [--chat]`` reads the task files again, loads the run's
base with its final adapter once, and lets lm-eval ask both the same requests. Progress, and the error that
ends it, are lines of JSON on stdout (:mod:`qlora_tui.worker_messages`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from qlora_tui.data.read import rows
from qlora_tui.errors import UserError
from qlora_tui.gpu.library_imports import faster_imports
from qlora_tui.installation import install_command
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.harness.harness_evaluation import HarnessResult, compare_samples, store_results
from qlora_tui.runs.harness.harness_task import HarnessTask, read_harness_tasks
from qlora_tui.runs.harness.harness_templates import sandbox
from qlora_tui.runs.measuring_worker import no_adapter, run_measurement
from qlora_tui.worker_messages import send_progress

_FEWSHOT_SEED = 1234
"""lm-eval's own."""


def evaluate_harness(run: RunDir, path: Path, *, chat: bool) -> None:
    """Let base and adapter do the tasks in ``path``, and store the results.

    Args:
        run: it has ended with an adapter.
        path: a task file or a folder of them.
        chat: whether prompts are turns of the chat template.

    Raises:
        UserError: the run has no adapter, a task is refused, or lm-eval cannot run it.
        OSError: the results cannot be written.
    """
    tasks = read_harness_tasks(path)
    with faster_imports():
        from qlora_tui.chat.chat_sources import run_source
        from qlora_tui.chat.chat_types import ADAPTER, BASE
        from qlora_tui.chat.harness_model import SessionModel
        from qlora_tui.chat.session import load_session
        from qlora_tui.runs.task_metrics.task_evaluation import adapter_hash
        from qlora_tui.training.priority import lower_priority

    source = run_source(run)
    if ADAPTER not in source.adapters:
        raise no_adapter(run)
    render_in_sandbox()
    for task in tasks:
        build_task(task)  # before the model is loaded, which takes longer
    session = load_session(source, streams=True)
    if session.compute_device.kind == "cpu":
        lower_priority()
    session.ensure_loaded(ADAPTER)
    for task in tasks:
        started = time.monotonic()
        done = 0

        def answered(total: int) -> None:
            nonlocal done
            done += 1
            send_progress(done, total)

        samples = []
        for name in (BASE, ADAPTER):
            # Each side builds its own task: its requests hold the answers.
            built = build_task(task)
            with _failures_named(task):
                total = 2 * _count_requests(built)
            samples.append(ask(SessionModel(session, name, partial(answered, total)), task, built, chat=chat))
        metrics, answers = compare_samples(*samples)
        result = HarnessResult(
            task=task.name,
            adapter=adapter_hash(run),
            chat=chat,
            rows=len(answers),
            metrics=metrics,
            answers=answers,
            seconds=time.monotonic() - started,
        )
        store_results(run, [result])  # stays if a later task fails


def render_in_sandbox() -> None:
    """Let lm-eval render templates in jinja2's sandbox; it has no setting for that.

    Raises:
        UserError: this lm-eval renders them elsewhere.
    """
    from lm_eval import utils

    if not hasattr(utils, "env") or not callable(getattr(utils, "apply_template", None)):
        raise _unsupported("It renders templates in another way.")
    utils.env = sandbox()
    probe = "{{ ''.__class__ }}"
    try:
        utils.apply_template(probe, {})
    except Exception:
        return
    raise _unsupported("It renders templates without the sandbox.")


def build_task(task: HarnessTask) -> Any:
    """The task as lm-eval runs it, on the rows of its files."""
    from lm_eval.api.task import ConfigurableTask

    splits = {split: _read_rows(files) for split, files in task.data_files.items()}
    with _failures_named(task):
        built = ConfigurableTask(config={**task.config, "custom_dataset": lambda: splits})
    built.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return built


def ask(model: Any, task: HarnessTask, built: Any, *, chat: bool) -> list[dict[str, Any]]:
    """lm-eval's record of each row: its metrics, target and responses."""
    from lm_eval.evaluator import evaluate

    with _failures_named(task):
        results = evaluate(
            model,
            {"tasks": {task.name: built}, "groups": {}, "group_map": {}},
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    assert results is not None
    return list(results["samples"][task.name])


def _count_requests(built: Any) -> int:
    choices = built.config.doc_to_choice
    if choices is None:
        return len(built.eval_docs)
    return sum(len(built.doc_to_choice(doc)) for doc in built.eval_docs)


def _read_rows(files: Sequence[Path]) -> Any:
    """The rows of one split as a data set. Raises UserError."""
    from datasets import Dataset

    try:
        return Dataset.from_list([_value(file, row) for file in files for row in rows(file)])
    except (TypeError, ValueError) as error:  # pyarrow's are of both kinds
        raise UserError(
            "The task's data cannot be read",
            what=f"{', '.join(map(str, files))}: {error}.",
            why="All values of a column must be of one type.",
            fix="Write them alike: all as numbers, or all as text.",
        ) from error


def _value(file: Path, row: Any) -> dict[str, Any]:
    if row.error or not isinstance(row.value, dict):
        raise UserError(
            "The task's data cannot be read",
            what=f"{file}: {row.error or f'Row {row.number} is no table of columns.'}",
            fix="Correct the row.",
        )
    return dict(row.value)


@contextmanager
def _failures_named(task: HarnessTask) -> Iterator[None]:
    """Raise what lm-eval raises inside as a UserError that names the task's file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            "lm-eval cannot run the task",
            what=f"{task.path}: {type(error).__name__}: {error}",
            why="A column is missing, or the keys do not fit together.",
            fix="Check the task file against the rows of its data.",
        ) from error


def _unsupported(why: str) -> UserError:
    return UserError(
        "This lm-eval is not supported",
        what="Tasks are not run with the installed version.",
        why=why,
        fix=f"Install one that is: `{install_command('qlora-tui[lm-eval]')}`.",
    )


def main() -> int:
    """Do the tasks with one run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m qlora_tui.chat.harness_worker", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("tasks", type=Path, help="a task file or a folder of them")
    parser.add_argument("--chat", action="store_true", help="prompts are turns of the chat template")
    arguments = parser.parse_args()
    return run_measurement(
        arguments.run, partial(evaluate_harness, path=arguments.tasks, chat=arguments.chat)
    )


if __name__ == "__main__":
    sys.exit(main())
