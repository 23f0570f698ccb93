"""Recipes as jobs of other schedulers: what their files say, and that the folder has all they need."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path

import pytest
import yaml

from qlora_tui import __version__
from qlora_tui.cli import main
from tests.support.polling import wait_for

INSTALL = f"pip install qlora-tui=={__version__}"
DOWNLOAD, TRAIN = "qlora-tui download acme/tiny-1B --revision main", "qlora-tui train recipe.toml --json"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    for name in ("a b.jsonl", "checked.jsonl"):
        (tmp_path / name).write_text("{}\n")
    file = tmp_path / "recipe.toml"
    file.write_text(
        f"""
        name = "Tickets (new)"
        model.id = "acme/tiny-1B"
        data.sources = [{{ path = "{tmp_path}/a b.jsonl" }}, {{ path = "acme/rows" }}]
        data.validation_path = "{tmp_path}/checked.jsonl"
        training.gpus = 2
        """
    )
    return file


def exported(recipe_file: Path, scheduler: str, *options: str) -> Path:
    out = recipe_file.parent / scheduler
    assert main(["export", "job", str(recipe_file), str(out), "--as", scheduler, *options]) == 0
    return out


def test_a_job_is_a_folder_with_recipe_and_data(recipe_file: Path) -> None:
    out = exported(recipe_file, "skypilot", "--accelerator", "A100-80GB")
    assert {path.name for path in (out / "data").iterdir()} == {"1-a b.jsonl", "3-checked.jsonl"}
    written = (out / "recipe.toml").read_text()
    assert 'path = "data/1-a b.jsonl"' in written and 'path = "acme/rows"' in written
    assert 'validation_path = "data/3-checked.jsonl"' in written
    job = yaml.safe_load((out / "job.yaml").read_text())
    assert job["name"] == "train-tickets-new" and job["workdir"] == "."
    assert job["resources"] == {"accelerators": "A100-80GB:2"} and job["setup"] == f"{INSTALL}\n"
    assert job["run"].splitlines() == ["export XDG_STATE_HOME=$PWD/state", DOWNLOAD, TRAIN]


def test_the_files_of_dstack_modal_and_slurm(recipe_file: Path) -> None:
    job = yaml.safe_load((exported(recipe_file, "dstack") / "job.dstack.yml").read_text())
    assert (job["type"], job["resources"]) == ("task", {"gpu": "L4:2"})
    assert job["commands"] == [INSTALL, DOWNLOAD, TRAIN] and job["volumes"] == ["qlora-tui:/runs"]
    text = (exported(recipe_file, "modal") / "job.py").read_text()
    ast.parse(text)
    assert f'.pip_install("qlora-tui=={__version__}")' in text and 'gpu="L4:2"' in text
    script = exported(recipe_file, "slurm") / "job.sh"
    subprocess.run(["bash", "-n", script], check=True)
    assert "#SBATCH --gres=gpu:2\n" in script.read_text() and "@@" not in script.read_text()


@pytest.mark.parametrize(("state", "is_requeued"), [("RUNNING", True), ("COMPLETING", False)])
def test_a_job_of_slurm_starts_again_after_its_limit_and_not_once_it_is_cancelled(
    recipe_file: Path, tmp_path: Path, state: str, is_requeued: bool
) -> None:
    folder, commands = exported(recipe_file, "slurm"), tmp_path / "commands"
    commands.mkdir()
    train = "echo $$ > part; mv part pid; exec sleep 60"
    for name, body in (
        ("qlora-tui", f'if [ "$1" = pause ]; then kill $(cat pid); else {train}; fi'),
        ("squeue", f"echo {state}"),
        ("scontrol", "touch requeued"),
    ):
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)
    environ = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", "job.sh"], cwd=folder, env=environ)
    wait_for((folder / "pid").exists)
    job.terminate()
    job.wait(60)
    assert (folder / "requeued").exists() == is_requeued


@pytest.mark.parametrize(
    ("options", "title"),
    [
        (["--accelerator", "L4\nrun: x"], "Unknown GPU name"),
        ([], "The job could not fetch the model"),
    ],
)
def test_what_a_rented_machine_could_not_do_is_refused(
    recipe_file: Path, capsys: pytest.CaptureFixture[str], options: list[str], title: str
) -> None:
    if not options:
        recipe_file.write_text(recipe_file.read_text().replace("acme/tiny-1B", str(recipe_file.parent)))
    out = recipe_file.parent / "out"
    assert main(["export", "job", str(recipe_file), str(out), "--as", "modal", *options]) != 0
    assert title in capsys.readouterr().err and not out.exists()


def test_a_name_in_a_recipe_is_no_command(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("acme/tiny-1B", "acme/$(reboot)"))
    assert "download 'acme/$(reboot)'" in (exported(recipe_file, "skypilot") / "job.yaml").read_text()
    assert json.dumps("acme/$(reboot)") in (exported(recipe_file, "modal") / "job.py").read_text()
