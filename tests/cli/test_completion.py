"""Completion of the command line: as the program answers a shell, and in a real bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import argcomplete  # noqa: F401  # loaded once, before the forks
import pytest

from qlora_tui import paths
from qlora_tui.cli import main
from qlora_tui.cli.completion import SHELLS
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import create_run
from tests.cli.conftest import Call

Complete = Callable[[str], set[str]]


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> Complete:
    """What may stand in place of the last word of a line."""

    def completed(line: str) -> set[str]:
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_POINT", str(len(line)))
        reading, writing = os.pipe()
        # In a fork, since argcomplete writes to descriptors 8 and 9 and ends the process.
        if not (child := os.fork()):
            os.dup2(writing, 8)
            os.dup2(2, 9)
            try:
                main([])
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading) as answers:
            words = answers.read().split("\n")
        assert os.waitpid(child, 0)[1] == 0
        return set(filter(None, map(str.strip, words)))

    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setenv("_ARGCOMPLETE_IFS", "\n")
    return completed


def test_commands_and_their_options_are_completed(complete: Complete) -> None:
    assert complete("qlora-tui at") == {"attach"}
    assert complete("qlora-tui runs ") == {"rename", "delete", "check"}
    assert complete("qlora-tui runs check --r") == {"--repair"}


def test_runs_are_completed(complete: Complete) -> None:
    run = create_run(Recipe(name="tickets"))
    assert complete("qlora-tui attach ") == {"last", run.id}
    assert complete(f"qlora-tui runs check {run.id[:5]}") == {run.id}


def test_presets_are_completed_with_the_users_own(complete: Complete) -> None:
    (paths.user_presets_dir() / "balcony.toml").write_text("[lora]\nrank = 8\n")
    assert complete("qlora-tui train --preset bal") == {"balanced", "balcony"}
    assert complete("qlora-tui presets show bal") == {"balanced", "balcony"}


def test_models_are_completed(complete: Complete, qwen: Path) -> None:
    (paths.config_dir() / "config.toml").write_text(f"model_folders = [{str(qwen.parent)!r}]\n")
    (qwen / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert complete("qlora-tui estimate --model Qwen") == {"Qwen2.5-7B"}


def test_settings_are_completed_with_their_values(complete: Complete) -> None:
    assert {"lora.rank=", "lora.alpha="} <= complete("qlora-tui train --set lora.")
    assert "quantization.method=nf4" in complete("qlora-tui train --set quantization.m")


def test_a_name_that_controls_the_terminal_is_left_out(complete: Complete) -> None:
    run = create_run(Recipe(name="tickets"))
    run.path.rename(run.path.with_name(f"{run.id}\x1b]52;c;\x07"))
    assert complete("qlora-tui attach ") == {"last"}


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script(shell: str, call: Call, tmp_path: Path) -> None:
    script = call("completion", shell).out
    assert "qlora-tui" in script
    if program := shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([program, "-n", str(tmp_path / "script")], check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_a_run(call: Call, tmp_path: Path) -> None:
    run = create_run(Recipe(name="tickets"))
    command = tmp_path / "qlora-tui"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qlora_tui "$@"\n')
    command.chmod(0o755)
    line = "qlora-tui attach ti"
    session = (
        f"{call('completion', 'bash').out}\n"
        f'COMP_LINE="{line}" COMP_POINT={len(line)} COMP_TYPE=9\n'
        f'_python_argcomplete "{command}" 2>/dev/null; echo "${{COMPREPLY[0]}}"'
    )
    done = subprocess.run(["bash", "-c", session], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == run.id
