"""Numbers, sizes and times as text, in the same format on every screen and in tables of the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

GIB = 1 << 30
MIB = 1 << 20
_GGUF_ENDING = re.compile(r"(?:[.-](?:i?q\d\w*|b?f\d+))?(?:-[0-9a-f]{12}|\.gguf)$", re.IGNORECASE)
"""Suffix that a GGUF file or its conversion adds to the model's name: precision, hash or file extension."""
_NAME_PARTS = re.compile(r"[^\W_]+(?:\.\d[^\W_]*)*|.", re.DOTALL)
"""Words and numbers, such as ``Qwen2.5`` and ``14B``, and single characters between them."""
_MODEL_SIZE = re.compile(r"\d.*[BMKbmk]")
_CODE_NAME = re.compile(r"[a-z]\w*[._]\w")
_NAME = re.compile(r"\w+[A-Z0-9]")
"""A word with a capital letter or a digit after its first letter."""


def format_bytes(bytes_: int | None) -> str:
    """Format a size, given in bytes: ``9.1 GiB``, ``512 MiB``, ``14 KiB``; NA if unknown."""
    if bytes_ is None:
        return "NA"
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (1 << 10, "KiB")):
        if abs(bytes_) >= unit:
            amount = bytes_ / unit
            return f"{amount:.1f} {name}" if amount < 100 and name == "GiB" else f"{amount:.0f} {name}"
    return f"{bytes_} bytes"


def format_gib(bytes_: int | None) -> str:
    """Format a size, given in bytes, as GiB without the unit: ``18.2``; NA if unknown."""
    return "NA" if bytes_ is None else f"{bytes_ / GIB:.1f}"


def format_delta(bytes_: int) -> str:
    """Format a difference in bytes with its sign: ``+1.2 GiB``, ``-102 MiB``."""
    return f"{'-' if bytes_ < 0 else '+'}{format_bytes(abs(bytes_))}"


def format_sizes(first_bytes: int, word: str, second_bytes: int) -> str:
    """Format two sizes with a word between them: ``6.3 of 12.0 GiB``, ``443 MiB of 12.0 GiB``."""
    first, second = format_bytes(first_bytes), format_bytes(second_bytes)
    unit = second.rpartition(" ")[2]
    return f"{first.removesuffix(f' {unit}')} {word} {second}"


def pluralize(number: int, word: str) -> str:
    """Format a number with its noun: ``1 row``, ``4,812 rows``."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def format_count(number: int | None) -> str:
    """Format a count: in full below 10,000, otherwise rounded to two or three digits.

    Examples: ``7.62B``, ``135M``, ``14M``, ``107K``, ``4,812``; NA if unknown.
    """
    if number is None:
        return "NA"
    for unit, letter, least in ((10**9, "B", 10**9), (10**6, "M", 10**6), (1000, "K", 10_000)):
        # A value that would round up to 1000 of a unit is 1.00 of the next unit.
        if number >= least - least // 2000:
            amount = number / unit
            return f"{amount:.2f}{letter}" if amount < 9.995 else f"{amount:.0f}{letter}"
    return f"{number:,}"


def format_duration(seconds: float | None) -> str:
    """Format a duration, given in seconds: ``41 min``, ``3 h 12 min``, ``2 h``, ``25 s``; NA if unknown."""
    if seconds is None:
        return "NA"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h" if hours % 24 else f"{hours // 24} d"


def format_wait(seconds: float) -> str:
    """Format a time below ten seconds with one decimal: ``0.4 s``.

    Longer times are formatted by :func:`format_duration`.
    """
    return f"{seconds:.1f} s" if seconds < 10 else format_duration(seconds)


def format_progress(done: int, total: int) -> str:
    """Format the number of steps, rows or files that are done, and their total: ``20 of 1,081``."""
    return f"{done:,} of {total:,}"


def format_float(value: float | None, digits: int = 3) -> str:
    """Format a measured number with ``digits`` significant digits; NA if there is no value."""
    if value is None:
        return "NA"
    return "NaN" if value != value else f"{value:.{digits}g}"


def format_number(value: float) -> str:
    """Format a number in readable form, without rounding it: ``1,048,576``, ``0.0002``, ``2e-5``."""
    if float(value).is_integer() and abs(value) < 1e16:
        return f"{int(value):,}"
    short = f"{value:g}"
    return (short if float(short) == value else repr(value)).replace("e-0", "e-").replace("e+", "e")


def format_loss(loss: float | None) -> str:
    """Format a loss with three decimals: ``2.908``; ``NaN`` if it is not a number, NA if there is none."""
    if loss is None:
        return "NA"
    return f"{loss:.3f}" if math.isfinite(loss) else "NaN" if loss != loss else f"{loss:g}"


def format_loss_change(change: float) -> str:
    """Format the difference of two losses with its sign: ``-0.023``; ``0.000`` has none."""
    return _signed(change, 3)


def format_nats(nats: float | None) -> str:
    """Format a KL divergence or a margin with two significant digits: ``0.004``, ``1.3``, ``<0.0001``.

    Rounding can make a divergence slightly negative; it is then ``<0.0001`` too.
    """
    if nats is None:
        return "NA"
    return "<0.0001" if 0 < abs(nats) < 0.0001 else format_float(nats, 2)


def format_rate(rate: float | None) -> str:
    """Format a learning rate with three significant digits, as in recipes: ``0.0002``, ``5.73e-5``."""
    return "NA" if rate is None else format_number(float(f"{rate:.3g}"))


def with_exponent(number: str) -> str:
    """Write a number from :func:`format_number` with an exponent: ``0.00011`` as ``1.1e-4``. Other text stays
    as it is.
    """
    try:
        mantissa, _, exponent = f"{float(number.replace(',', '')):.2e}".partition("e")
    except ValueError:
        return number
    return f"{float(mantissa):g}e{int(exponent)}"


def format_speed(per_s: float | None) -> str:
    """Format tokens per second: ``1,240``, ``40``, ``8.3``."""
    if per_s is None:
        return "NA"
    return f"{per_s:,.0f}" if per_s >= 10 else f"{per_s:.1f}"


def format_kwh(kwh: float) -> str:
    """Format an energy in kWh: ``0.24 kWh``."""
    return f"{kwh:.2f} kWh"


def format_power(watts: float | None) -> str:
    """Format a power in watts, without the unit: ``320``; NA if unknown."""
    return "NA" if watts is None else f"{watts:.0f}"


def format_percent(part: float | None, decimals: int = 0) -> str:
    """Format a share between 0 and 1 in percent, by default without decimals: ``97%``, ``98.4%``."""
    return "NA" if part is None else f"{part * 100:.{decimals}f}%"


def format_reading(percent: int | None) -> str:
    """Format a device's reading in whole percent: ``97%``, or ``NA`` if the device does not report it."""
    return "NA" if percent is None else f"{percent}%"


def format_small_percent(part: float) -> str:
    """Format a share that is usually small, such as a share of parameters: ``3.6%``, ``0.05%``, ``12%``."""
    percent = part * 100
    return f"{percent:.0f}%" if percent >= 10 else f"{percent:.2g}%"


def format_points(change: float) -> str:
    """Format the difference of two shares in percentage points, with its sign: ``+12``; ``0`` has none."""
    return _signed(100 * change, 0)


def _signed(value: float, decimals: int) -> str:
    text = f"{value:+z.{decimals}f}"
    return text.removeprefix("+") if float(text) == 0 else text


def format_path(path: Path) -> str:
    """Format a path with ``~`` for the home folder."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def abbreviate_home(text: str) -> str:
    """Replace the home folder by ``~`` in every path in a text, like :func:`format_path`."""
    home = str(Path.home())
    return text if home == "/" else re.sub(rf"(?<![\w/.~-]){re.escape(home)}(?=/)", "~", text)


def short_model_name(model_id: str) -> str:
    """Return the last part of a model's id or path, without the suffix of a GGUF file or of a model that was
    converted from one.
    """
    return _GGUF_ENDING.sub("", model_id.rstrip("/").rpartition("/")[2])


def cut_range(name: str, length: int) -> tuple[int, int]:
    """Return the range of ``name`` that ``…`` replaces to shorten the name to ``length`` characters.

    The range covers the least distinctive part: first the owner of a model and the file extension, then
    letters within words, then whole numbers. The size of a model, such as ``14B``, is removed last.
    """
    weights: list[int] = []
    owner, ending = name.rfind("/"), name.rfind(".")
    whole = list[tuple[int, int]]()
    for part in _NAME_PARTS.finditer(name):
        start, stop = part.span()
        has_digit = any(map(str.isdigit, part[0]))
        if stop <= owner or (0 < ending < start and not has_digit):
            weights += [1] * (stop - start)
        elif has_digit:
            weights += [20 if _MODEL_SIZE.fullmatch(part[0]) else 6] * (stop - start)
            whole.append((start, stop))
        else:
            weights += [3] + [2] * (stop - start - 1)
    cells = len(name) - length + 1

    def loss(start: int) -> tuple[int, int]:
        stop = start + cells
        halved = sum(start < b and a < stop and not (start <= a and b <= stop) for a, b in whole)
        return sum(weights[start:stop]) + 100 * halved, -start

    start = min(range(length), key=loss)
    return start, start + cells


def shorten_name(name: str, length: int) -> str:
    """Return the name in at most ``length`` characters: ``Ministral-3-14B-I…2512``."""
    if len(name) <= length or length < 2:
        return name[:length]
    start, stop = cut_range(name, length)
    return f"{name[:start]}…{name[stop:]}"


def capitalize(text: str) -> str:
    """Return the text with a capital first letter, unless it begins with a name such as llama.cpp."""
    return text if _CODE_NAME.match(text) else f"{text[:1].upper()}{text[1:]}"


def uncapitalize(text: str) -> str:
    """Return the text with a lowercase first letter, unless it begins with a name such as GGUF or LoRA."""
    return text if _NAME.match(text) else f"{text[:1].lower()}{text[1:]}"


def join_words(words: Sequence[str], last: str = "and") -> str:
    """Join words as in a sentence: ``a``, ``a and b``, ``a, b and c``."""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def name_some(names: Sequence[str]) -> str:
    """Join the first six names and the number of others: ``a, b, c, d, e, f and 30 more``."""
    more = len(names) - 6
    return ", ".join(names[:6]) + (f" and {more} more" if more > 0 else "")


def truncate_middle(text: str, width: int) -> str:
    """Shorten text in the middle, because run names often begin alike and differ at the end."""
    if len(text) <= width:
        return text
    end = width // 2
    return f"{text[: max(0, width - end - 1)]}…{text[len(text) - end :]}" if width > 1 else text[:width]


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row of a table, with columns as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
