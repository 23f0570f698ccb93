"""The one exception a user may meet.

The same object becomes a modal in the app, lines on stderr, and a ``run_failed`` event.
"""

from __future__ import annotations

FAILED = 1
"""Exit code: the call was right and it failed."""
WRONG_CALL = 2
"""Exit code: the call itself was wrong (a bad argument, an invalid recipe)."""


class Problem(Exception):
    """Something the user can act on."""

    def __init__(self, title: str, *, what: str, why: str = "", fix: str = "", exit_code: int = FAILED):
        super().__init__(title)
        self.title = title
        """A few words: ``Out of GPU memory``."""
        self.what = what
        """One sentence: what happened, naming file, key or model."""
        self.why = why
        """One sentence: why, where it is known."""
        self.fix = fix
        """One sentence: what to do about it."""
        self.exit_code = exit_code

    def __str__(self) -> str:
        """All of it, as stderr shows it: what happened, why, what to do."""
        parts = [f"{self.title}: {self.what}", self.why, self.fix]
        return "\n  ".join(part for part in parts if part)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.title, self.what, self.why, self.fix, self.exit_code))


def _rebuild(title: str, what: str, why: str, fix: str, exit_code: int) -> Problem:
    return Problem(title, what=what, why=why, fix=fix, exit_code=exit_code)
