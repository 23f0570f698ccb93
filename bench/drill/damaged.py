"""Rows of the drill: a damaged file of each kind, through every command that reads it."""

from __future__ import annotations

import os
import random
import shutil
from functools import lru_cache
from pathlib import Path

from bench.drill.damage import damaged
from bench.drill.program import Ended, Failure, call, write
from bench.drill.samples import CONFIG, DATA, PRESET


def data_file(luck: random.Random, materials: Path, home: Path) -> None:
    """A data file of a random format."""
    name = luck.choice(list(DATA))
    path = write(home / "data" / name, damaged(_sample(name), luck))
    call("data", "inspect", str(path)).check()
    call("data", "show", str(path), "--row", str(luck.choice((1, 2, 20)))).check()


def preset(luck: random.Random, materials: Path, home: Path) -> None:
    """A preset of the user's."""
    write(home / "config" / "qlora-tui" / "presets" / "drill.toml", damaged(PRESET, luck))
    call("presets").check(codes=(0,))
    call("presets", "show", "drill").check()
    call("estimate", "--preset", "drill", "--model", str(materials / "model")).check()


def settings(luck: random.Random, materials: Path, home: Path) -> None:
    """``config.toml``."""
    write(home / "config" / "qlora-tui" / "config.toml", damaged(CONFIG, luck))
    call("locate").check()
    call("models").check()
    call("runs").check()


def model_file(luck: random.Random, materials: Path, home: Path) -> None:
    """A file of a model's folder."""
    folder = home / "models" / "model"
    shutil.copytree(materials / "model", folder)
    path = luck.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    path.write_bytes(damaged(path.read_bytes(), luck))
    call("estimate", "--model", str(folder), "--gpu-gib", "24").check()
    rows = write(home / "rows.jsonl", _sample("rows.jsonl"))
    call("data", "show", str(rows), "--model", str(folder)).check()


def gguf(luck: random.Random, materials: Path, home: Path) -> None:
    """The header of a GGUF file."""
    content = (materials / "tiny.gguf").read_bytes()
    head = damaged(content[:12_000], luck)
    path = write(home / "models" / "tiny.gguf", head + content[12_000:])
    call("estimate", "--model", str(path), "--gpu-gib", "24").check()


def run_file(luck: random.Random, materials: Path, home: Path) -> None:
    """A file of a finished run. The other run is listed and shown all the same."""
    runs = home / "state" / "qlora-tui" / "runs"
    shutil.copytree(materials / "run", runs / "damaged", symlinks=True)
    shutil.copytree(materials / "run", runs / "whole", symlinks=True)
    files = sorted(path for path in (runs / "damaged").rglob("*") if path.is_file())
    path = luck.choice(files)
    change = luck.random()
    if change < 0.8:
        path.write_bytes(damaged(path.read_bytes(), luck))
    elif change < 0.9:
        path.unlink()
    else:
        path.unlink()
        path.mkdir()
    what = f"{path.relative_to(runs)}: "
    _needs(call("runs"), "whole", what)
    call("attach", "damaged").check()
    _needs(call("attach", "whole"), "finished", what)
    call("runs", "check").check()
    call("runs", "check", "--repair").check()
    _needs(call("runs"), "whole", what)


def command_line(luck: random.Random, materials: Path, home: Path) -> None:
    """Words of a call."""
    bad = damaged(luck.choice((b"lora.rank=8", b"training.max_steps=1e3", b"data.max_length=64")), luck)
    word = os.fsdecode(bad.replace(b"\0", b""))[:100_000]
    call("estimate", "--model", str(materials / "model"), "--set", word).check()
    call("attach", word).check()
    call("presets", "show", word).check()


def _needs(ended: Ended, text: str, what: str) -> None:
    """Raise Failure unless the call was right and its output has ``text``."""
    ended.check(codes=(0,))
    if text not in ended.output:
        raise Failure(f"{what}`{' '.join(ended.words)}` says no {text!r}: {ended.output[-200:]!r}")


@lru_cache
def _sample(name: str) -> bytes:
    return DATA[name]()
