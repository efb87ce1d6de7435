"""Text of somebody else's as text in Markdown: neither link, HTML, heading nor another column."""

import re
from typing import Any


def one_line(value: Any) -> str:
    """Without line ends and other characters that are not printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def plain(value: Any) -> str:
    """Text in a paragraph or a cell, its own characters of Markdown escaped."""
    return re.sub(r"([\\`*\[\]<>&|$~:@]|(?<=www)\.)", r"\\\1", one_line(value))


def code(value: Any) -> str:
    """A code span, between more backticks than there are in it."""
    text = one_line(value)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text or not text else f"`{text}`"
