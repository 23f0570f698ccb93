"""The title of the panel with the log: the names of its tabs, selected by a click or with keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from textual.content import Content

from qlora_tui.formatting import truncate_middle


def tabs_title(
    names: Sequence[str], front: str, notes: Mapping[str, str], *, filters: str, keys: str, width: int
) -> Content:
    """``log │ answers 12 │ health !2``. A click on a name runs ``screen.show_tab('<name>')``.

    Args:
        names: The tabs.
        front: The one that is shown.
        notes: What follows a name.
        filters: What hides lines now. It is shown even where it has to be shortened.
        keys: Hints for keys, where they are not in the border below; left out first.
        width: Cells that there are.
    """
    parts = []
    for name in names:
        text = f" {name}{' ' if notes.get(name) else ''}{notes.get(name, '')} "
        style = "reverse bold" if name == front else "not bold $text-muted"
        parts.append(Content.styled(text, style).stylize(f"@click=screen.show_tab('{name}')"))
    line = Content.styled("│", "not bold $text-muted").join(parts)
    room = width - line.cell_length - 2
    if filters:
        line += Content.styled(f"  {truncate_middle(filters, max(1, room))}", "bold $foreground")
    elif keys and len(keys) <= room:
        line += Content.styled(f"  {keys}", "not bold $text-muted")
    return line
