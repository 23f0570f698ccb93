"""Keys inside sentences: ``[u]`` for a character, ``Enter`` or ``Ctrl+P`` for a named key."""

from __future__ import annotations

import re

from textual.content import Content

_KEYS = re.compile(r"\[[^\s\[\]]{1,3}\]|\b(?:Enter|Esc|Tab|Space|Backspace|F1|Ctrl\+[A-Z])(?![\w-])")


def highlight_keys(text: str, style: str = "") -> Content:
    """Return ``text`` in ``style`` with its keys in bold accent; ``[u]`` keeps its brackets."""
    content = Content.styled(text, style)
    for match in _KEYS.finditer(text):
        content = content.stylize("bold $accent", *match.span())
    return content
