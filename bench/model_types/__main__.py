"""``python -m bench.model_types [TYPE…]``: test every model type, and write the outcome for the docs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path

import msgspec
from msgspec.structs import replace

from bench.model_types.outcome import Estimated, Outcome, Walked
from bench.model_types.processes import all_types, walk_all


def main() -> int:
    """Test the types, print a line for each, and write the outcome."""
    parser = argparse.ArgumentParser(prog="python -m bench.model_types", description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="walk only these")
    parser.add_argument("--method", choices=["none", "nf4"], default="none")
    parser.add_argument("--only", choices=["walk", "estimate"], help="do one of both")
    parser.add_argument(
        "--out", type=Path, help="file for the outcome, as JSON, in which each type is replaced"
    )
    arguments = parser.parse_args()
    any_wrong, every = False, all_types()
    known = _known(arguments.out, every)
    types = arguments.types or every
    if arguments.only == "estimate":
        types = [name for name in types if name not in known or known[name].verdict == "trained"]
    for each in walk_all(types, arguments.method, arguments.only):
        before = known.get(each.model_type)
        if before is not None and arguments.only == "estimate":
            each = replace(before, estimate=each.estimate or Estimated(untraced=each.reason))
        elif before is not None and arguments.only == "walk":
            each.estimate = before.estimate
        any_wrong |= each.is_wrong
        print(_line(each), flush=True)
        if arguments.out:
            known[each.model_type] = each
            _write(known, arguments.out)
    return int(any_wrong)


def _line(walked: Walked) -> str:
    how = "; ".join(filter(None, (walked.how, walked.attention, walked.loss)))
    estimate = walked.estimate or Estimated()
    memory = estimate.untraced or f"{estimate.ratio:.2f} ± {estimate.uncertainty:.2f}"
    verdict = "wrong" if walked.is_wrong else walked.verdict
    return f"{verdict:8} {walked.model_type:28} {how} {walked.largest_difference:.1e} memory {memory}"


def _known(file: Path | None, every: Collection[str]) -> dict[str, Walked]:
    """Return the results of an earlier call for the types in ``every``."""
    if file is None or not file.is_file():
        return {}
    outcome = msgspec.json.decode(file.read_bytes(), type=Outcome)
    return {each.model_type: each for each in outcome.types if each.model_type in every}


def _write(by_type: Mapping[str, Walked], file: Path) -> None:
    """Write the outcome after each type, so that an interrupted call keeps its results."""
    types = [by_type[name] for name in sorted(by_type)]
    outcome = Outcome(transformers=version("transformers"), types=types)
    file.write_bytes(msgspec.json.format(msgspec.json.encode(outcome)) + b"\n")


if __name__ == "__main__":
    sys.exit(main())
