"""Which linear modules the recipe's target patterns mean."""

from __future__ import annotations

import re

from qlora_tui.catalog.facts import Architecture, LinearModule
from qlora_tui.errors import WRONG_CALL, Problem
from qlora_tui.recipe.schema import ALL_LINEAR

_RANGED = re.compile(r"(\d+)(?:-(\d+))?\.(.+)")


def targeted(architecture: Architecture, patterns: tuple[str, ...]) -> frozenset[str]:
    """Full names of the modules that ``patterns`` target.

    A pattern is a kind (``q_proj``), ``all-linear``, or either within layers (``8-23.q_proj``). Vision towers
    are frozen whole: ``all-linear`` leaves them out.

    Raises:
        Problem: a pattern that matches nothing in this model.
    """
    names: set[str] = set()
    for pattern in patterns:
        found = [module.name for module in architecture.modules if _matches(pattern, module)]
        if not found:
            raise Problem(
                "Unknown target",
                what=f"lora.target_modules: {pattern!r} matches no linear module of this model.",
                fix=f"It has {', '.join(architecture.kinds())}; {ALL_LINEAR} means all of them.",
                exit_code=WRONG_CALL,
            )
        names.update(found)
    return frozenset(names)


def _matches(pattern: str, module: LinearModule) -> bool:
    if module.part == "vision":
        return False
    ranged = _RANGED.fullmatch(pattern)
    if ranged:
        first, last, pattern = int(ranged[1]), int(ranged[2] or ranged[1]), ranged[3]
        if module.layer is None or not first <= module.layer <= last:
            return False
    return pattern == ALL_LINEAR or pattern in (module.kind, module.name)
