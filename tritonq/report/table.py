"""Tables of text that fit a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

WIDTH = 120
_GAP = "  "
# No column is made narrower than this by others that want more room.
_NARROWEST = 9


def text_table(rows: Sequence[Sequence[str]], width: int = WIDTH) -> list[str]:
    """Return the lines of a table of at most ``width`` characters, with a line below its first row.

    Cells that are too long go on in the next line, broken at a space or after a dot if there is one.

    Args:
        rows: the cells, as many in each row; at least one row.
        width: the most characters in a line. No column is cut below 9 characters: lines of many columns are longer.
    """
    widths = _column_widths([max(map(len, column)) for column in zip(*rows, strict=True)], width)
    lines = [line for row in rows for line in _row_lines(row, widths)]
    first = len(_row_lines(rows[0], widths))
    return [*lines[:first], _GAP.join("─" * column for column in widths), *lines[first:]]


def _column_widths(wanted: list[int], width: int) -> list[int]:
    """Return the width of each column: what it wants, or less for the widest ones, so that all fit into ``width``.

    Columns are separated by two spaces. None is cut below ``_NARROWEST``, even if the table is wider then.
    """
    room = width - len(_GAP) * (len(wanted) - 1)
    most = max(wanted)
    while sum(min(column, most) for column in wanted) > room and most > _NARROWEST:
        most -= 1
    widths = [min(column, most) for column in wanted]
    # Columns that were cut share what rounding left.
    for index, column in enumerate(wanted):
        widths[index] += min(column - widths[index], max(0, room - sum(widths)))
    return widths


def _row_lines(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    cells = [_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
    height = max(map(len, cells))
    filled = [cell + [""] * (height - len(cell)) for cell in cells]
    return [
        _GAP.join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()
        for parts in zip(*filled, strict=True)
    ]


def _wrapped(cell: str, width: int) -> list[str]:
    lines = []
    for line in wrap(cell, width, break_long_words=False, break_on_hyphens=False) or [""]:
        while len(line) > width:
            dot = line.rfind(".", 0, width) + 1
            cut = dot if dot > width // 2 else width
            lines.append(line[:cut])
            line = line[cut:]
        lines.append(line)
    return lines
