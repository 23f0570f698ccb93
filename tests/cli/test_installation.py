"""``cache``: listing and deleting what can be made again.

Completion of the command line: as the program answers a shell, and in real shells.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import argcomplete  # noqa: F401  # loaded once, before the forks
import pytest

from bench.terminal import Terminal
from qlora_tui import paths
from qlora_tui.cli import main
from qlora_tui.cli.installation import SHELLS
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import create_run
from qlora_tui.training.gguf_conversion import folder_of
from tests.cli.conftest import Call
from tests.tui.terminal_emulator import see


@pytest.fixture
def cached(tmp_path: Path) -> dict[str, Path]:
    """A quantized base, a converted file, and tokenized data."""
    gguf = tmp_path / "tiny.gguf"
    gguf.touch()
    places = {
        "quantized": paths.cache_dir() / "quantized" / "tiny-nf4-0123456789abcdef",
        "models": paths.cache_dir() / "models" / folder_of(gguf).name,
        "tokenized": paths.cache_dir() / "tokenized" / ("abcd" * 8),
    }
    for size, place in enumerate(places.values(), 1):
        place.mkdir(parents=True)
        (place / "file").write_bytes(b"x" * 1024 * size)
    (places["quantized"].parent / ".lock").touch()
    (places["quantized"].parent / "mine").mkdir()
    return places


def test_the_list_shows_kind_name_size_and_how_to_delete(call: Call, cached: dict[str, Path]) -> None:
    shown = call("cache")
    assert shown.code == 0
    assert "tiny-nf4-0123" in shown.out and "1 KiB" in shown.out and "6 KiB in total" in shown.out
    assert (
        "cache --clear models" in shown.out
        and "qlora-tui cache --clear quantized" in shown.out
        and ".lock" not in shown.out
    )


def test_clear_deletes_one_kind_only(call: Call, cached: dict[str, Path]) -> None:
    shown = call("cache", "--clear", "quantized")
    assert "Deleted 1 KiB of quantized" in shown.out
    assert not cached["quantized"].exists() and cached["tokenized"].exists()
    assert (cached["quantized"].parent / "mine").exists()


Complete = Callable[[str], set[str]]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> Complete:
    """Return the completions of the last word of a line."""

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
    assert complete("qlora-tui runs ") == {"rename", "delete", "trash", "restore", "check", "save", "card"}
    assert complete("qlora-tui runs check --r") == {"--repair"}


def test_runs_are_completed(complete: Complete) -> None:
    run = create_run(Recipe(name="tickets"))
    assert complete("qlora-tui attach ") == {"last", run.id}
    assert complete(f"qlora-tui runs check {run.id[:5]}") == {run.id}


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


@pytest.fixture
def names(tmp_path: Path, qwen: Path) -> dict[str, str]:
    """What a shell should complete each line to, with a run, a preset and a model on this machine."""
    (paths.config_dir() / "config.toml").write_text(f"model_folders = [{str(qwen.parent)!r}]\n")
    (qwen / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (paths.user_presets_dir() / "balcony.toml").write_text("[lora]\nrank = 8\n")
    return {
        "qlora-tui attach ti": create_run(Recipe(name="tickets")).id,
        "qlora-tui train --preset balc": "balcony",
        "qlora-tui estimate --model Qw": "Qwen2.5-7B",
    }


@pytest.fixture
def shell_env(tmp_path: Path) -> dict[str, str]:
    """An environment with ``qlora-tui`` in PATH, and no settings of the user's shells."""
    command = tmp_path / "bin" / "qlora-tui"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qlora_tui "$@"\n')
    command.chmod(0o755)
    home = {"HOME": str(tmp_path), "ZDOTDIR": str(tmp_path), "HISTFILE": "", "PS1": "$ "}
    return home | {"PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


STARTS = {"bash": ("bash", "--norc", "-i"), "zsh": ("zsh", "-f", "-i"), "fish": ("fish", "--no-config", "-c")}


def needs(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_tab_completes_names_in_a_real_shell(
    shell: str, call: Call, tmp_path: Path, names: dict[str, str], shell_env: dict[str, str]
) -> None:
    needs(shell)
    (tmp_path / "script").write_text(call("completion", shell).out)
    prepare = {"bash": "", "zsh": "autoload -U compinit; compinit -D -u; "}[shell]
    with Terminal(STARTS[shell], columns=160, env=shell_env) as terminal:
        terminal.press(f"{prepare}. {tmp_path / 'script'}; echo rea''dy\r")
        see(terminal, "ready", size=(160, 24))
        for line, name in names.items():
            since = len(terminal.painted)
            terminal.press(f"{line}\t")
            see(terminal, name, since=since, size=(160, 24))
            terminal.press("\x15")


@pytest.mark.slow
def test_fish_completes_names(
    call: Call, tmp_path: Path, names: dict[str, str], shell_env: dict[str, str]
) -> None:
    needs("fish")
    (tmp_path / "script").write_text(call("completion", "fish").out)
    for line, name in names.items():
        command = f"source {tmp_path / 'script'}; complete -C '{line}'"
        done = subprocess.run(
            [*STARTS["fish"], command],
            env=os.environ | shell_env,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [name], done.stderr
