"""One HTML file in which a reader looks around in the attention of one or two models. No network, no server."""

import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from .collection import KINDS, AttentionStatistics, SentenceAttention
from .figures import TITLES

SCALE = 100_000  # weights stand in the page as whole parts of this


def write_page(
    file: str | Path,
    sentences: Mapping[str, Sequence[SentenceAttention]],
    statistics: Mapping[str, AttentionStatistics],
    title: str = "Attention",
) -> None:
    """Write the page.

    In it one chooses sentence, kind of attention, step and head, sees the models side by side, and saves what is shown
    as JSON. Weights are rounded to 0.00001.

    Args:
        file: the page.
        sentences: name of the model -> its attention for the same sentences in the same order.
        statistics: name of the model -> its figures for a corpus.
        title: of the page.
    """
    data = {
        "kinds": {kind: TITLES[kind] for kind in KINDS},
        "scale": SCALE,
        "models": [
            {
                "name": name,
                "sentences": [_sentence(sentence) for sentence in its_sentences],
                "statistics": statistics[name].to_dict(),
            }
            for name, its_sentences in sentences.items()
        ],
    }
    # "<" inside a script element could end it.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    page = template.replace("{{title}}", html.escape(title)).replace("{{data}}", text)
    Path(file).write_text(page, encoding="utf-8")


def _sentence(sentence: SentenceAttention) -> dict[str, Any]:
    shown = {}
    for kind in KINDS:
        queries, keys = sentence.tokens(kind)
        weights = np.rint(getattr(sentence, kind) * SCALE).astype(int).tolist()
        shown[kind] = {"queries": queries, "keys": keys, "weights": weights}
    return shown
