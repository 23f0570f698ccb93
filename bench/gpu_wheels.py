"""A folder of wheels for a GPU machine without a package index.

    python -m bench.gpu_wheels FOLDER [--with trl unsloth liger tui test] [--python 3.12]

For a machine that already has torch for CUDA 13.0, transformers, peft and accelerate. Without --with,
includes only additional imports of trainer, chat and :mod:`bench.gpu_acceptance`. bitsandbytes keeps only its
libraries for CUDA 13.0 and for CPUs (4 of 43 MB), and Unsloth loses its web app (2 of 29 MB). On that
machine, run before each command:

    python3 -m pip install --no-index --no-deps --target scratch FOLDER/*.whl && export PYTHONPATH=scratch

``trl`` and ``unsloth`` exclude each other: Unsloth needs older versions of TRL and datasets, which are
included.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

BASE = ("bitsandbytes", "msgspec", "tomli-w", "platformdirs", "zstandard", "gguf")
_PICKLERS = ("dill<0.4.2", "multiprocess<0.70.20")
EXTRAS = {
    "trl": ("trl==1.16.0", "datasets>=5,<6", *_PICKLERS),
    "unsloth": ("unsloth", "unsloth_zoo", "cut-cross-entropy", "trl==1.15.0", "datasets>=4.6,<5", *_PICKLERS),
    "liger": ("liger-kernel",),
    "tui": ("textual>=8,<9", "mdit-py-plugins", "linkify-it-py", "uc-micro-py"),
    "test": ("pytest-asyncio",),
}
_GLIBCS = ("2_39", "2_35", "2_34", "2_31", "2_28", "2_27", "2_24", "2_17")
_PLATFORMS = (*(f"manylinux_{glibc}_x86_64" for glibc in _GLIBCS), "manylinux2014_x86_64")
_CUDA_LIBRARIES = frozenset(
    ("bitsandbytes/libbitsandbytes_cuda130.so", "bitsandbytes/libbitsandbytes_cpu.so")
)
_UNSLOTH_PROGRAMS = ("studio", "unsloth_cli")


def main() -> int:
    """Download and repack wheels, and print the size of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--with", dest="extras", nargs="*", choices=list(EXTRAS), default=[])
    parser.add_argument("--python", default="3.12")
    args = parser.parse_args()
    if {"trl", "unsloth"} <= set(args.extras):
        parser.error("trl and unsloth exclude each other")
    args.folder.mkdir(parents=True, exist_ok=True)
    for wheel in args.folder.glob("*.whl"):
        # Two versions of one package prevent the installation.
        wheel.unlink()
    wanted = [*BASE, *(package for extra in args.extras for package in EXTRAS[extra])]
    subprocess.run(download_command(args.folder, args.python, wanted), check=True)
    total = 0
    for wheel in sorted(args.folder.glob("*.whl")):
        repack(wheel)
        total += wheel.stat().st_size
        print(f"{wheel.stat().st_size / 2**20:7.2f} MiB  {' '.join(wheel.name.split('-')[:2])}")
    print(f"{total / 2**20:7.2f} MiB  in all")
    return 0


def download_command(folder: Path, python: str, wanted: list[str]) -> list[str]:
    """Return pip's command to download these packages as wheels for another Python on Linux x86-64."""
    options = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    return [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        *options,
        *platforms,
        "-d",
        str(folder),
        *wanted,
    ]


def repack(wheel: Path) -> None:
    """Write a wheel again without unnecessary files, with a matching RECORD.

    Raises SystemExit if bitsandbytes lacks a required library.
    """
    package = wheel.name.split("-")[0]
    if package not in ("bitsandbytes", "unsloth"):
        return
    draft, lines, names = wheel.with_suffix(".part"), [], set()
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(draft, "w") as target:
        record = next(name for name in source.namelist() if name.endswith(".dist-info/RECORD"))
        for entry in source.infolist():
            name = entry.filename
            if entry.is_dir() or name == record or is_left_out(package, name):
                continue
            content = source.read(name)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(content)}")
            names.add(name)
            target.writestr(entry, content, zipfile.ZIP_DEFLATED, 9)
        target.writestr(record, "\n".join([*lines, f"{record},,"]) + "\n", zipfile.ZIP_DEFLATED, 9)
    if package == "bitsandbytes" and not names >= _CUDA_LIBRARIES:
        draft.unlink()
        raise SystemExit(f"{wheel.name} lacks {', '.join(sorted(_CUDA_LIBRARIES - names))}.")
    draft.replace(wheel)


def is_left_out(package: str, name: str) -> bool:
    """Return whether a file of a wheel is not needed on the GPU machine."""
    if package == "bitsandbytes":
        return name.endswith(".so") and name not in _CUDA_LIBRARIES
    return name.split("/")[0] in _UNSLOTH_PROGRAMS


if __name__ == "__main__":
    sys.exit(main())
