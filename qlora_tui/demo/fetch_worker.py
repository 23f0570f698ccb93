"""Download of the demo's model in a separate process: ``python -m qlora_tui.demo.fetch_worker``.

It prints one JSON object per line, as ``qlora_tui.catalog.download`` does: ``saying`` (``text``) for each
step, then ``done`` (``path``) or ``problem`` (``title``, ``what``, ``why``, ``fix``). The Model screen reads
them.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import msgspec

from qlora_tui.demo.demo_model import ensure_model
from qlora_tui.errors import UserError


def main() -> int:
    """Download and convert the model; return the exit code."""
    try:
        path = ensure_model(lambda text: _print_event("saying", text=text))
    except UserError as problem:
        _print_event("problem", title=problem.title, what=problem.what, why=problem.why, fix=problem.fix)
        return problem.exit_code
    except KeyboardInterrupt:
        return 130
    _print_event("done", path=str(path))
    return 0


def _print_event(event: str, **values: Any) -> None:
    # The reader may have exited; the model is still wanted.
    with suppress(BrokenPipeError):
        print(msgspec.json.encode({"event": event, **values}).decode(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
