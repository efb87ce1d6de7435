"""Tables in Markdown that are read on a terminal, too."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

NUMBER = re.compile(r"[-+]?[\d.,]*\d[\d.,]*( ± [\d.,]+)?[ %x]*|[–-]?")


def markdown_table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table whose columns stand below each other in its text, those of numbers to the right.

    Args:
        header: a name for each column, maybe empty.
        rows: as many cells each; they are text, whatever Markdown makes of it. `|` is escaped, and what would end the
            line is a space.

    Returns:
        Lines without a final line end.

    Raises:
        ValueError: a row of another length than the header.
    """
    lines = [[_cell(value) for value in row] for row in (header, *rows)]
    columns = list(zip(*lines, strict=True))
    numbers = [any(column[1:]) and all(map(NUMBER.fullmatch, column[1:])) for column in columns]
    widths = [max(3, *map(_width, column)) for column in columns]
    rules = ["-" * (width - 1) + (":" if number else "-") for width, number in zip(widths, numbers, strict=True)]
    padded = []
    for line in (lines[0], rules, *lines[1:]):
        cells = []
        for cell, width, number in zip(line, widths, numbers, strict=True):
            blanks = " " * (width - _width(cell))
            cells.append(blanks + cell if number else cell + blanks)
        padded.append(f"| {' | '.join(cells)} |")
    return "\n".join(padded)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _width(text: str) -> int:
    """Columns of a terminal: two for a wide character, none for one that combines with the one before."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))
