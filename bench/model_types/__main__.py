"""``python -m bench.model_types [TYPE…]``: walk every type, and write what came of it for the docs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path

import msgspec

from bench.model_types.outcome import Outcome, Walked
from bench.model_types.processes import all_types, walk_all


def main() -> int:
    """Walk, print a line for each type, and write the outcome."""
    parser = argparse.ArgumentParser(prog="python -m bench.model_types", description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="walk only these")
    parser.add_argument("--method", choices=["none", "nf4"], default="none")
    parser.add_argument(
        "--out", type=Path, help="file for the outcome, as JSON, in which each type is replaced"
    )
    arguments = parser.parse_args()
    any_wrong, every = False, all_types()
    for each in walk_all(arguments.types or every, arguments.method):
        any_wrong |= each.verdict == "wrong"
        how = "; ".join(filter(None, (each.how, each.attention, each.loss)))
        print(f"{each.verdict:8} {each.model_type:28} {how} {each.largest_difference:.1e}", flush=True)
        if arguments.out:
            _replace(each, arguments.out, every)
    return int(any_wrong)


def _replace(walked: Walked, file: Path, every: Collection[str]) -> None:
    """Replace one of ``every`` type in the outcome, so that a walk that is stopped keeps what it has seen."""
    known = msgspec.json.decode(file.read_bytes(), type=Outcome).types if file.is_file() else []
    by_type = {each.model_type: each for each in (*known, walked) if each.model_type in every}
    types = [by_type[name] for name in sorted(by_type)]
    outcome = Outcome(transformers=version("transformers"), types=types)
    file.write_bytes(msgspec.json.format(msgspec.json.encode(outcome)) + b"\n")


if __name__ == "__main__":
    sys.exit(main())
