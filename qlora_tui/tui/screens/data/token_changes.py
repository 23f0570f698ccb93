"""Tokens of a row shaded by how a run changed their loss, with marks that say it without color."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content

FELL = 2.0
"""Nats by which the loss of a token falls that was learned."""
ROSE = 0.5
"""Nats by which the loss of a token rises that became less likely."""
_FALL_MARK, _RISE_MARK = "▾", "▴"
CHANGES_LEGEND = Content.assemble(
    ("Loss in nats: ", "dim"),
    (f"{_FALL_MARK}fell by {FELL:g} or more", "bold $success"),
    "  ",
    ("between", "underline"),
    "  ",
    (f"{_RISE_MARK}rose by {ROSE:g} or more", "bold reverse $error"),
)


def shaded_tokens(tokens: Sequence[tuple[str, tuple[float, float]]]) -> list[Content | tuple[str, str]]:
    """Each token's text in the style of its change: text, and loss before and after."""
    return [_shaded(text, after - before) for text, (before, after) in tokens]


def _shaded(text: str, change: float) -> Content:
    # The mark is between a space and the word, not before the space.
    word = text.lstrip(" ")
    space = text[: len(text) - len(word)]
    shown = word.replace("\n", "↵\n")
    if change <= -FELL:
        return Content.assemble(space, (_FALL_MARK, "$success"), (shown, "bold underline $success"))
    if change >= ROSE:
        return Content.assemble(space, (_RISE_MARK, "$error"), (shown, "bold reverse $error"))
    return Content.assemble(space, (shown, "underline"))
