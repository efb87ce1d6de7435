"""What drawing needs of a machine: matplotlib, a file type that it knows, and fonts that have the glyphs."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

# Fonts that draw Japanese, Chinese and Korean, as systems name their files; any other that has the glyphs will do.
CJK_FONT_FILES = ("NotoSansCJK", "NotoSansJP", "ipaexg", "ipag", "Hiragino", "YuGoth", "meiryo", "msgothic", "TakaoP")


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


def font_families(texts: Sequence[str]) -> list[str]:
    """Names of fonts of this machine, for matplotlib's `font.family`, that together have the glyphs of some texts.

    matplotlib's own font comes first, then the fewest further ones that are found. Characters that no installed font
    has are named in a warning that says how to get one.
    """
    from matplotlib import font_manager, rcParams
    from matplotlib.ft2font import FT2Font

    families = [font_manager.FontProperties(family=rcParams["font.family"]).get_name()]
    own = FT2Font(font_manager.findfont(families[0])).get_charmap()
    missing = {character for text in texts for character in text if not character.isspace()}
    missing = {character for character in missing if ord(character) not in own}
    likely = {file: any(name in file for name in CJK_FONT_FILES) for file in font_manager.findSystemFonts()}
    for file in sorted(likely, key=lambda file: (not likely[file], "Regular" not in file, file)):
        if not missing:
            break
        try:
            glyphs = FT2Font(file).get_charmap()
        except RuntimeError:  # a bitmap or a damaged font
            continue
        found = {character for character in missing if ord(character) in glyphs}
        if found:
            font_manager.fontManager.addfont(file)  # one that came after matplotlib made its list
            families.append(font_manager.FontProperties(fname=file).get_name())
            missing -= found
    if missing:
        logger.warning_once(
            f"No installed font has {' '.join(sorted(missing)[:20])}: boxes are drawn instead. Install one, for "
            "example Noto Sans CJK (Debian and Ubuntu: apt-get install fonts-noto-cjk; elsewhere: notofonts.github.io)"
        )
    return families
