"""``python -m tests.catalog.hub_question EXPRESSION``: evaluate it with the Hub's client, and print JSON.

A UserError is printed as a dict. Within it ``trial(function, *arguments)`` does the same for one call.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from qlora_tui.catalog import download, hub
from qlora_tui.errors import UserError


def trial(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except UserError as problem:
        return {"title": problem.title, "what": problem.what, "why": problem.why, "fix": problem.fix}


def main() -> None:
    names = {"trial": trial, "download": download, "hub": hub, "hub_files": download, "sys": sys}
    print(json.dumps(trial(lambda: eval(sys.argv[1], names)), default=str))


if __name__ == "__main__":
    main()
