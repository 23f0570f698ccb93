"""An issue in a recipe, and the exception that carries all of them at once."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.formatting import capitalize

_MAX_SHOWN = 20
"""Maximum number of issues shown: a file with more is probably not a recipe."""


class RecipeIssue(Struct, frozen=True):
    """One error in a recipe: its place, and what was probably meant."""

    origin: str
    """The file, or the argument: ``--set lora.rank=x``."""
    path: str
    """``lora.rank``; empty if the error is not in a single setting."""
    message: str
    """``lora.rank must be a whole number from 1 to 1,024, not "x"``."""
    hint: str = ""
    """What to do: ``did you mean lora.rank?``"""
    line: int | None = None
    """Line number, from 1; None if unknown."""

    @property
    def where(self) -> str:
        return self.origin if self.line is None else f"{self.origin}, line {self.line}"

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f"; {self.hint}" if self.hint else "")


class InvalidRecipeError(UserError):
    """A recipe, a preset or a ``--set`` that is invalid."""

    def __init__(self, issues: Sequence[RecipeIssue]):
        self.issues = tuple(issues)
        if len(issues) == 1:
            [only] = issues
            super().__init__(
                "Invalid recipe",
                what=f"{only.where}: {only.message}",
                fix=capitalize(only.hint),
                exit_code=EXIT_USAGE,
            )
            return
        lines = [str(mistake) for mistake in issues[:_MAX_SHOWN]]
        if len(issues) > _MAX_SHOWN:
            lines.append(f"and {len(issues) - _MAX_SHOWN} more")
        super().__init__(
            "Invalid recipe",
            what="\n  ".join([f"{len(issues)} mistakes", *lines]),
            exit_code=EXIT_USAGE,
        )
