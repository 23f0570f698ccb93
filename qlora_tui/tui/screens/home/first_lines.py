"""The lines that Home shows until there is a run: the steps to an adapter, models, presets, and example rows.

Import this module only after the first frame has been painted, since its own imports take a long time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from textual.content import Content

from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.recipe.presets import Preset
from qlora_tui.tui.commands import COMMANDS
from qlora_tui.tui.key_names import highlight_keys, key_hint, key_name
from qlora_tui.tui.render.columns import hanging
from qlora_tui.tui.screens.models.model_list import LOCAL, ListedModels, list_title

_LEAST_MODEL_CELLS = 40
"""Minimum width of a line in the list of models to choose from, in cells."""
_WAY = (
    ("go.models", "choose a base model that fits this machine", "from the Hub, a folder or a GGUF file"),
    ("go.data", "open your data; see what will be learned", "conversations, prompts and answers, or text"),
    ("go.memory", "see what fills the GPU, and what would fit", "one key applies the cheapest change"),
    ("go.lora", "optional: select what is trained, and its rank", "presets train all linear layers"),
    ("go.train", "launch; the run continues when you leave", "pause, stop or resume it at any step"),
    ("go.chat", "ask base and adapter, side by side", "then export the adapter, for example as GGUF"),
)
"""(id of the command that opens the screen, purpose of the screen, further detail) for each screen, in the
order in which a new user needs them.
"""


def way_lines(done: Mapping[str, str | Content], *, is_compact: bool) -> list[Content]:
    """Return lines for each screen on the way from a model to an answer: what has been done there or, if
    nothing has been done yet, what the screen is for. ``done``: what has been done, by the id of the command
    that opens the screen.
    """
    lines: list[Content] = []
    was_done = False
    for command, what, more in _WAY:
        is_done = command in done
        mark = Content.styled(f"{'✓' if is_done else ' '} ", "$success")
        head = mark + highlight_keys(key_name(command)) + f"  {COMMANDS[command].label:<8}"
        lines += [Content("")] if lines and not (is_compact or (was_done and is_done)) else []
        was_done = is_done
        lines.append(head + (done[command] if is_done else Content.styled(what, "dim" if is_compact else "")))
        if not is_compact and not is_done:
            lines.append(Content.styled(f"{'':{head.cell_length}}{more}", "dim"))
    return lines


def preset_lines(presets: Sequence[Preset], current: str, width: int, height: int) -> list[Content]:
    """Return up to ``height`` lines with the name and purpose of each readable preset.

    Args:
        presets: The presets.
        current: Name of the recipe's preset, which is marked.
        width: Width of a line, in cells, at which long purposes are wrapped.
        height: Maximum number of lines.
    """
    readable = [preset for preset in presets if preset.problem is None]
    cells = max((len(preset.name) for preset in readable), default=0)
    groups = []
    for preset in readable:
        is_current = preset.name == current
        head = Content.assemble(
            ("● " if is_current else "  ", "bold $primary"),
            (f"{preset.name:<{cells}}  ", "bold" if is_current else ""),
        )
        groups.append(hanging(head, Content.styled(preset.note, "dim"), width))
    return _spaced(groups, height)


def _spaced(groups: Sequence[Sequence[Content]], height: int) -> list[Content]:
    """Return up to ``height`` lines of groups, with an empty line between groups if they all fit. If not all
    groups fit even without, the last line has the number of the others.
    """
    lines = [
        line for number, group in enumerate(groups) for line in (*([Content("")] * bool(number)), *group)
    ]
    if len(lines) <= height:
        return lines
    shown = list(groups)
    while sum(map(len, shown)) + (len(shown) < len(groups)) > max(1, height):
        shown.pop()
    more = [Content.styled(f"  {len(groups) - len(shown)} more", "dim")] if len(shown) < len(groups) else []
    return [line for group in shown for line in group] + more


ROW_SHAPES = {
    "messages": '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}',
    "alpaca": '{"instruction": "…", "input": "…", "output": "…"}',
    "prompt-completion": '{"prompt": "…", "completion": "…"}',
    "text": '{"text": "…"}',
}
"""An example row of each of the most common formats, by the format's name."""


def shape_lines(width: int, height: int) -> list[Content]:
    """Return up to ``height`` lines with an example row of each of the most common formats, and the types of
    files that may contain such rows. ``width``: width of a line, in cells, at which long rows are wrapped.
    """
    cells = max(map(len, ROW_SHAPES)) + 2
    files = (
        "JSON, JSONL, CSV, Parquet or text, from files, folders or the Hub. The format is recognized "
        "from the columns."
    )
    groups = [
        hanging(Content(f"{name:<{cells}}"), Content.styled(row, "dim"), width)
        for name, row in ROW_SHAPES.items()
    ]
    return _spaced([*groups, Content.styled(files, "dim").wrap(width)], height)


def models_title(selected: str | None, has_focus: bool, budget: MemoryBudget) -> Content:
    """Return the title of the list of models, with the memory available for training. If the list has the
    focus, the title also says what Enter does with the selected model; otherwise, it says how to reach the
    list. ``selected``: id of the selected line.
    """
    verb = "select" if (selected or "").startswith(LOCAL) else "download"
    hint = key_hint("Enter", f"to {verb} it") if has_focus else key_hint("Tab", "to choose one")
    return Content("   ").join(list_title(hint, budget))


def model_lines(models: ListedModels, most: int, width: int) -> list[tuple[str, Content]]:
    """Return (id, line) for each model on this machine, and for at most ``most`` recommended models from the
    Hub.
    """
    return models.lines("", "", max(_LEAST_MODEL_CELLS, width), most)
