"""Fuzz one parser with coverage guidance, where atheris is installed (``pip install atheris``).

    python -m tests.fuzz.coverage_guided PARSER [SECONDS]

The parsers, their samples and what counts as a failure are those of ``test_parsers``. An input that fails is
written to the working directory; add it to ``tests/fuzz/corpus/PARSER/``, where the tests repeat it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Fuzz until the time is over or an input fails."""
    import atheris

    with atheris.instrument_imports(include=["qlora_tui"]):
        from tests.fuzz import test_parsers

    if len(sys.argv) < 2 or sys.argv[1] not in test_parsers.PARSERS:
        sys.exit(f"Name one of {', '.join(test_parsers.PARSERS)}.")
    name, seconds = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "60"
    home = Path(tempfile.mkdtemp(prefix="qlora-tui-fuzz-"))
    for kind in ("CONFIG", "STATE", "CACHE"):
        os.environ[f"XDG_{kind}_HOME"] = str(home / kind.lower())
    samples, parse = test_parsers.PARSERS[name]
    (home / "corpus").mkdir()
    for number, sample in enumerate([*samples, *test_parsers.corpus(name)]):
        (home / "corpus" / str(number)).write_bytes(sample)

    def parse_bytes(content: bytes) -> None:
        with tempfile.TemporaryDirectory(dir=home) as folder:
            path = Path(folder) / "file"
            path.write_bytes(content)
            test_parsers.read_or_refused(parse, path)

    atheris.Setup([sys.argv[0], str(home / "corpus"), f"-max_total_time={seconds}"], parse_bytes)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
