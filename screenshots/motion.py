"""Several screenshots of one size as one SVG that shows them in turn, for the README.

A line of the screen that is the same in several frames is stored once. Where nothing should move
(``prefers-reduced-motion``), or where animations are not supported, one frame is shown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_ID = re.compile(r"terminal-\d+-")
_STYLE = re.compile(r"\.(r\d+) (\{[^}]*\})")
_CLASS = re.compile(r'class="(r\d+)"')
_ELEMENT = re.compile(r"<rect [^>]*/>|<text [^>]*>[^<\n]+</text>")
_Y = re.compile(r' y="([\d.]+)"')
_RECT = re.compile(
    r'<rect fill="([^"]*)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" [^>]*/>'
)
_CONTENT = '<g transform="translate(9'
_LINE_HEIGHT = 24.4
"""Of Rich's SVG: the background of a line begins 1.5 below its top, its text stands 20 below it."""


@dataclass(frozen=True)
class Frame:
    """One screenshot, as Textual exports it, and how long it is shown."""

    svg: str
    seconds: float


def animate(frames: Sequence[Frame], still: int) -> str:
    """All frames in turn, again and again; ``still`` is the index of the one shown where nothing moves."""
    styles: dict[str, str] = {}
    lines: dict[str, str] = {}
    shown = [_lines_of(_ID.sub("", frame.svg), styles, lines) for frame in frames]
    window = _STYLE.sub("", _ID.sub("", frames[0].svg)).partition(_CONTENT)[0]
    style, definitions = _rules(frames, styles, still), "".join(lines.values())
    window = window.replace("</style>", f"{style}\n    </style>").replace("</defs>", f"{definitions}</defs>")
    groups = [
        f'<g id="frame-{number}" class="frame">{"".join(names)}</g>' for number, names in enumerate(shown)
    ]
    content = f'{_CONTENT}, 41)" clip-path="url(#clip-terminal)"><g class="matrix">'
    return "\n".join([window + content, *groups, "</g></g>", "</svg>", ""])


def _lines_of(svg: str, styles: dict[str, str], lines: dict[str, str]) -> list[str]:
    """References to the frame's lines; ``styles`` and ``lines`` get those that are new, each once."""
    own = dict(_STYLE.findall(svg))

    def shared(match: re.Match[str]) -> str:
        name = styles.setdefault(own[match[1]], f"s{len(styles)}")
        return f'class="{name}"'

    elements: dict[int, list[str]] = {}
    for element in _ELEMENT.findall(svg.partition(_CONTENT)[2]):
        y = _Y.search(element)
        assert y is not None
        elements.setdefault(int(float(y[1]) / _LINE_HEIGHT), []).append(_CLASS.sub(shared, element))
    references = []
    for parts in elements.values():
        content = _merged("".join(parts))
        if content not in lines:
            lines[content] = f'<g id="line-{len(lines)}-of-all">{content}</g>'
        name = re.match(r'<g id="([^"]*)"', lines[content])
        assert name is not None
        references.append(f'<use href="#{name[1]}"/>')
    return references


def _merged(line: str) -> str:
    """The elements of a line, with neighboring backgrounds of one color as one."""
    runs: list[tuple[str, float, str, float, str]] = []
    for fill, x, y, width, height in _RECT.findall(line):
        left, right = float(x), float(x) + float(width)
        if runs and runs[-1][0] == fill and abs(runs[-1][3] - left) < 1:
            left = runs.pop()[1]
        runs.append((fill, left, y, right, height))
    backgrounds = [
        f'<rect fill="{fill}" x="{left:g}" y="{y}" width="{right - left:g}" height="{height}"/>'
        for fill, left, y, right, height in runs
    ]
    return "".join(backgrounds) + _RECT.sub("", line)


def _rules(frames: Sequence[Frame], styles: dict[str, str], still: int) -> str:
    """The style sheet: colors, and for each frame when it is visible."""
    total = sum(frame.seconds for frame in frames)
    rules = [f".{name} {style}" for style, name in styles.items()]
    rules += [
        "rect { shape-rendering: crispEdges }",
        ".frame { visibility: hidden }",
        f"#frame-{still} {{ visibility: visible }}",
    ]
    moving, begin = [], 0.0
    for number, frame in enumerate(frames):
        start, end = 100 * begin / total, 100 * (begin + frame.seconds) / total
        begin += frame.seconds
        hidden = "0% { visibility: hidden } " if number else ""
        rules.append(
            f"@keyframes show-{number} {{ {hidden}{start:.2f}% {{ visibility: visible }} "
            f"{end:.2f}% {{ visibility: {'visible' if number == len(frames) - 1 else 'hidden'} }} }}"
        )
        moving.append(f"#frame-{number} {{ animation: show-{number} {total:g}s step-end infinite }}")
    return "\n".join([*rules, "@media (prefers-reduced-motion: no-preference) {", *moving, "}"])
