"""``python -m bench.model_types [TYPE…]``: walk every type, and write what came of it for the docs."""

from __future__ import annotations

import argparse
import sys
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
        "--out", type=Path, help="file for the outcome, as JSON, in which the types named are replaced"
    )
    arguments = parser.parse_args()
    walked = []
    for each in walk_all(arguments.types or all_types(), arguments.method):
        walked.append(each)
        how = "; ".join(filter(None, (each.reason, each.attention, each.loss, ", ".join(each.replaced))))
        print(f"{each.verdict:8} {each.model_type:28} {how} {each.largest_difference:.1e}", flush=True)
    if arguments.out:
        earlier: list[Walked] = []
        if arguments.types and arguments.out.is_file():
            earlier = msgspec.json.decode(arguments.out.read_bytes(), type=Outcome).types
        by_type = {each.model_type: each for each in (*earlier, *walked)}
        outcome = Outcome(transformers=version("transformers"), types=[by_type[n] for n in sorted(by_type)])
        arguments.out.write_bytes(msgspec.json.format(msgspec.json.encode(outcome)) + b"\n")
    return int(any(each.verdict == "wrong" for each in walked))


if __name__ == "__main__":
    sys.exit(main())
