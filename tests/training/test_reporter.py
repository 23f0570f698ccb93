"""What the trainer says of a run that had begun before."""

from __future__ import annotations

from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.status import Status, read_status, write_status
from qlora_tui.training.reporter import Reporter


def test_a_runs_earlier_progress_is_reported_before_its_next_step() -> None:
    run = create_run(Recipe())
    write_status(run, Status(state="starting", at=1.0, step=7, total_steps=20, loss=1.5))
    reporter = Reporter(run)
    reporter.start()
    status = read_status(run)
    assert (status.state, status.step, status.total_steps, status.loss) == ("running", 7, 20, 1.5)
    reporter.resume_from(5)
    status = read_status(run)
    assert (status.step, status.total_steps, status.loss) == (5, 20, None)
    reporter.stop()
