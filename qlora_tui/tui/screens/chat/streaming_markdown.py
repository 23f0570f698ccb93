"""A model's answer as Markdown that grows piece by piece, painted no more often than a slow link can bear."""

from __future__ import annotations

import time

from markdown_it import MarkdownIt
from markdown_it.token import Token
from textual.widgets import Markdown

_PAINT_EVERY_S = 0.15


class StreamingMarkdown(Markdown):
    """Call :meth:`append_text` with each piece and :meth:`finish` at the end; pieces between are put
    together.
    """

    DEFAULT_CSS = """
    StreamingMarkdown {
        height: auto;
        margin: 0;
        padding: 0;
        background: $background;
    }
    StreamingMarkdown MarkdownBlock:last-child {
        margin-bottom: 0;
    }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__("", parser_factory=_parser, open_links=False, id=id)
        self._waiting = ""
        self._painted_at = 0.0

    async def append_text(self, piece: str) -> None:
        """Add a piece; it is seen with the next painting, a moment later at most while more come."""
        self._waiting += piece
        if time.monotonic() - self._painted_at >= _PAINT_EVERY_S:
            await self.finish()

    async def finish(self) -> None:
        """Paint what has not been painted."""
        if self._waiting:
            waiting, self._waiting = self._waiting, ""
            await self.append(waiting)
            self._painted_at = time.monotonic()


def _parser() -> MarkdownIt:
    """GitHub's Markdown, but a line end stays one: what a model writes in lines is meant in lines."""
    parser = MarkdownIt("gfm-like")
    parser.core.ruler.push("keep_line_ends", _keep_line_ends)
    return parser


def _keep_line_ends(state: object) -> None:
    tokens: list[Token] = getattr(state, "tokens", [])
    for token in tokens:
        for child in token.children or []:
            if child.type == "softbreak":
                child.type = "hardbreak"
