"""Has tasks of lm-eval done by base and adapter of a run, in a child process."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from qlora_tui.errors import UserError
from qlora_tui.installation import install_command
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.harness.harness_evaluation import HarnessResult, read_results
from qlora_tui.runs.harness.harness_task import read_harness_tasks
from qlora_tui.runs.measuring import measure_in_child

WORKER = "qlora_tui.chat.harness_worker"


def run_harness_tasks(
    run: RunDir, path: Path, progress: Callable[[int, int], None], *, chat: bool
) -> list[HarnessResult]:
    """Let base and adapter do the tasks in ``path``.

    Args:
        run: it has ended with an adapter.
        path: a task file or a folder of them.
        progress: called with the requests of a task that are answered, and of how many.
        chat: whether prompts are turns of the chat template.

    Raises:
        UserError: a task is refused, lm-eval is missing or fails, or the run cannot be measured.
    """
    tasks = read_harness_tasks(path)
    if find_spec("lm_eval") is None:
        raise UserError(
            "lm-eval is not installed",
            what="Task files are run by EleutherAI's lm-evaluation-harness, which is an extra.",
            fix=f"Install it: `{install_command('qlora-tui[lm-eval]')}`.",
        )
    measure_in_child(WORKER, run, progress, (str(path.absolute()), *(["--chat"] if chat else [])))
    names = {task.name for task in tasks}
    results = [result for result in read_results(run) if result.task in names]
    if len(results) < len(names):
        raise UserError(
            "The tasks could not be measured",
            what=f"{run.harness_results_path} cannot be read.",
            fix="Check the disk that holds it, and try again.",
        )
    return results
