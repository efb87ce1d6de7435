"""What drawing needs of a machine: matplotlib, a file type that it knows, and fonts that have the glyphs."""

import importlib.util
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

# Fonts that draw Japanese, Chinese and Korean, as systems name their files; any other that has the glyphs will do.
CJK_FONT_FILES = ("NotoSansCJK", "NotoSansJP", "ipaexg", "ipag", "Hiragino", "YuGoth", "meiryo", "msgothic", "TakaoP")
REPLACEMENT = "\ufffd"  # matplotlib's own font has it


def check_matplotlib(what: str) -> None:
    """Raise `ValueError` that says what to install if matplotlib is not there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f'{what} needs matplotlib: pip install "rs-transformer[plots]"')


def check_plot_file(file: str) -> None:
    """Raise `ValueError` if matplotlib is not there, or cannot draw such a file."""
    check_matplotlib("plot_file")
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if Path(file).suffix.removeprefix(".") not in formats:
        raise ValueError(f"plot_file: the suffix of {file!r} must be one of {', '.join(formats)}")


class Lettering:
    """How some texts are drawn: with which fonts of this machine, and what stands for a character that none has.

    Attributes:
        font: keyword arguments for what makes matplotlib's texts. No text is a formula, whatever dollars are in it.
        missing: characters that no installed font has. A warning, one in a process, names them and the mend.
    """

    def __init__(self, texts: Iterable[str]):
        from matplotlib import font_manager, rcParams

        own = font_manager.FontProperties(family=rcParams["font.family"])
        families = [own.get_name()]  # matplotlib's own font comes first, then the fewest further ones that are found
        missing = {character for text in texts for character in text if not character.isspace()}
        missing = {character for character in missing if ord(character) not in _glyphs(font_manager.findfont(own))}
        fonts = _system_fonts() if missing else iter(())
        while missing and (file := next(fonts, None)):
            found = {character for character in missing if ord(character) in _glyphs(file)}
            if found:
                font_manager.fontManager.addfont(file)  # one that came after matplotlib made its list
                families.append(font_manager.FontProperties(fname=file).get_name())
                missing -= found
        self.font = {"family": families, "parse_math": False}
        self.missing = frozenset(missing)
        if missing:
            _say_once(sorted(missing)[:20])

    def __call__(self, text: str) -> str:
        """The text as it is drawn, in one line."""
        return "".join(" " if c.isspace() else REPLACEMENT if c in self.missing else c for c in text)


said: list[str] = []  # the characters that were named


def _say_once(missing: list[str]) -> None:
    if not said:
        said.extend(missing)
        logger.warning(
            f"No installed font has {' '.join(missing)}: {REPLACEMENT} is drawn instead, also for others like these. "
            "Install one, for example Noto Sans CJK (Debian and Ubuntu: apt-get install fonts-noto-cjk; elsewhere: "
            "notofonts.github.io)"
        )


def _system_fonts() -> Iterator[str]:
    from matplotlib import font_manager

    files = font_manager.findSystemFonts()
    likely = {file: any(name in file for name in CJK_FONT_FILES) for file in files}
    return iter(sorted(files, key=lambda file: (not likely[file], "Regular" not in file, file)))


@cache
def _glyphs(file: str) -> frozenset[int]:
    """The characters that a font has."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(file).get_charmap())
    except RuntimeError:  # a bitmap or a damaged font
        return frozenset()
