"""The workflows of GitHub Actions: what a wrong one would only show after a push."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
Workflow = dict[Any, Any]


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.name)
def workflow(request: pytest.FixtureRequest) -> Workflow:
    content: Workflow = yaml.safe_load(request.param.read_text())
    return content


def steps_of(workflow: Workflow) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", ())]


def test_a_workflow_has_triggers_and_read_permission_only(workflow: Workflow) -> None:
    assert workflow[True], "YAML 1.1 reads the key `on` as true"
    assert workflow["permissions"] == {"contents": "read"}


def test_every_job_can_run_and_ends(workflow: Workflow) -> None:
    for name, job in workflow["jobs"].items():
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= set(workflow["jobs"]), name
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file(), name
        else:
            assert job["runs-on"] and job["timeout-minutes"] and job["steps"], name


def test_every_step_runs_a_command_or_a_pinned_action(workflow: Workflow) -> None:
    for step in steps_of(workflow):
        assert ("run" in step) != ("uses" in step), step
        assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@[\w/.]+", step["uses"]), step


def test_every_make_target_exists(workflow: Workflow) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {
        name for step in steps_of(workflow) for name in re.findall(r"\bmake ([\w-]+)", step.get("run", ""))
    }
    assert called <= targets
