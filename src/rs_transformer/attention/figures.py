"""Pictures of attention, with matplotlib: heat-maps of sentences, and what a corpus shows by step and head."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..utils.plotting import Lettering
from .collection import KINDS, STATES, AttentionStatistics, SentenceAttention

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D

TITLES = {
    "encoder_attentions": "encoder self-attention",
    "decoder_attentions": "decoder self-attention",
    "cross_attentions": "cross-attention",
    "encoder_hidden_states": "encoder hidden states",
    "decoder_hidden_states": "decoder hidden states",
}
STEPS_A_ROW = 6
CELL = 0.24  # inches a token
DPI = 150
# Deep models and long sentences make large figures, which get fewer dots an inch: matplotlib draws less than 2**16
# pixels a side, and every pixel takes memory.
LARGEST_SIDE = 60_000
LARGEST_PICTURE = 100_000_000


def draw_heads_mean(sentences: Mapping[str, SentenceAttention], kind: str) -> "Figure":
    """Heat-maps of one sentence, a panel for each step, the attention averaged over the heads, with the tokens.

    Args:
        sentences: name of the model -> its attention; models stand one below the other, on one colour scale.
        kind: one of `collection.KINDS`.
    """
    attentions = {name: getattr(sentence, kind).mean(1) for name, sentence in sentences.items()}
    rows = [-(-len(attention) // STEPS_A_ROW) for attention in attentions.values()]
    tokens = [sentence.tokens(kind) for sentence in sentences.values()]
    lettering = Lettering([*attentions, *(token for sides in tokens for side in sides for token in side)])
    height, width = (1.1 + CELL * max(4, *(len(side) for side in sides)) for sides in zip(*tokens, strict=True))
    columns = min(STEPS_A_ROW, max(map(len, attentions.values())))
    figure = _figure(width * columns + 0.8, (height + 0.7) * sum(rows) + 0.4)
    parts = np.atleast_1d(figure.subfigures(len(rows), 1, height_ratios=rows))
    for part, count, (name, attention) in zip(parts, rows, attentions.items(), strict=True):
        heads = getattr(sentences[name], kind).shape[1]
        part.suptitle(lettering(f"{name}: {TITLES[kind]}, mean of {heads} heads"), **lettering.font)
        panels = part.subplots(count, columns, squeeze=False)
        for step, axes in enumerate(panels.flat):
            if step >= len(attention):
                axes.set_axis_off()
                continue
            queries, keys = sentences[name].tokens(kind)
            image = _heat_map(axes, attention[step], queries if step % columns == 0 else [], keys, lettering)
            axes.set_title(f"step {step + 1}", fontsize=10)
        part.colorbar(image, ax=panels, label="attention", fraction=0.03, aspect=30)
    return figure


def draw_step(sentence: SentenceAttention, kind: str, step: int) -> "Figure":
    """One heat-map: the attention of one step for one sentence, averaged over the heads, with the tokens.

    Args:
        sentence: its attention.
        kind: one of `collection.KINDS`.
        step: 0 … depth-1.
    """
    attention = getattr(sentence, kind)[step].mean(0)
    queries, keys = sentence.tokens(kind)
    height, width = (1.4 + 1.5 * CELL * max(4, len(side)) for side in (queries, keys))
    figure = _figure(width + 1, height)
    axes = figure.subplots()
    image = _heat_map(axes, attention, queries, keys, Lettering([*queries, *keys]))
    axes.set_title(f"{TITLES[kind]}, step {step + 1}", fontsize=10)
    figure.colorbar(image, ax=axes, label="attention")
    return figure


def _heat_map(
    axes: "Axes", attention: np.ndarray, queries: Sequence[str], keys: Sequence[str], lettering: Lettering
) -> "AxesImage":
    """Draw weights `(queries, keys)` between 0 and 1, with the tokens; none at the rows if `queries` is empty."""
    image = axes.imshow(attention, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_xticks(range(len(keys)), list(map(lettering, keys)), rotation=90, fontsize=8, **lettering.font)
    axes.set_yticks(range(len(attention)), list(map(lettering, queries)), fontsize=8, **lettering.font)
    return image


def draw_heads(sentences: Mapping[str, SentenceAttention], kind: str) -> "Figure":
    """Small heat-maps of one sentence, a row for each step and a column for each head; models side by side.

    Args:
        sentences: name of the model -> its attention.
        kind: one of `collection.KINDS`.
    """
    from matplotlib import colormaps

    attentions = {name: getattr(sentence, kind) for name, sentence in sentences.items()}
    heads = [attention.shape[1] for attention in attentions.values()]
    steps = max(len(attention) for attention in attentions.values())
    figure = _figure(0.9 * sum(heads) + 2, 0.9 * steps + 1)
    panels = figure.subplots(1, len(heads), squeeze=False, width_ratios=heads)
    lettering = Lettering(sentences)
    for axes, (name, attention) in zip(panels.flat, attentions.items(), strict=True):
        colours = colormaps["Blues"].with_extremes(bad="0.6")
        # One picture, as thousands of axes would take minutes.
        image = axes.imshow(_tile(attention), vmin=0, vmax=1, cmap=colours, aspect="auto")
        axes.set_title(lettering(f"{name}: {TITLES[kind]}"), fontsize=10, **lettering.font)
        for set_ticks, size, count, label in (
            (axes.set_xticks, attention.shape[3], attention.shape[1], "head"),
            (axes.set_yticks, attention.shape[2], len(attention), "step"),
        ):
            middles = np.arange(count) * (size + 1) + (size - 1) / 2
            set_ticks(middles, [f"{label} {number + 1}" for number in range(count)], fontsize=8)
        axes.tick_params(length=0)
    figure.colorbar(image, ax=panels, label="attention", fraction=0.03, aspect=30)
    return figure


def _tile(attention: np.ndarray) -> np.ndarray:
    """All steps (down) and heads (across) as one matrix, NaN between them."""
    steps, heads, queries, keys = attention.shape
    padded = np.pad(attention, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    return padded.transpose(0, 2, 1, 3).reshape(steps * (queries + 1), heads * (keys + 1))[:-1, :-1]


def draw_entropy_map(statistics: Mapping[str, AttentionStatistics]) -> "Figure":
    """Normalised entropy of every step and head, a row for each kind of attention; models side by side, one scale.

    Args:
        statistics: name of the model -> its figures.
    """
    maps = {
        (kind, name): its.by_head[kind]["normalized_entropy"].mean
        for kind in KINDS
        for name, its in statistics.items()
    }
    columns = len(statistics)
    steps, heads = (max(values.shape[axis] for values in maps.values()) for axis in (0, 1))
    figure = _figure((0.55 * heads + 1) * columns + 1.2, 3 * (0.3 * steps + 1) + 0.6)
    panels = figure.subplots(len(KINDS), columns, squeeze=False)
    lettering = Lettering(statistics)
    for axes, ((kind, name), values) in zip(panels.flat, maps.items(), strict=True):
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(f"{lettering(name)}\n{TITLES[kind]}", fontsize=10, **lettering.font)
        axes.set(xlabel="head", ylabel="step")
        axes.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
        axes.set_yticks(range(len(values)), range(1, len(values) + 1))
        if values.size <= 256:
            for (step, head), value in np.ndenumerate(values):
                colour = "white" if value < 0.6 else "black"
                axes.text(head, step, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    counts = dict.fromkeys(its.sentences for its in statistics.values())
    sentences = f"{' and '.join(map(str, counts))} sentence{'' if list(counts) == [1] else 's'}"
    label = f"normalised entropy (0: one token, 1: uniform), mean of {sentences}"
    figure.colorbar(image, ax=panels, label=label, aspect=40)
    return figure


def draw_steps(statistics: Mapping[str, AttentionStatistics]) -> "Figure":
    """Curves by step with 95% intervals: entropy of each kind of attention, and how much each step still changes.

    There is no panel for what nobody knows, as CKA of fewer than four sentences.

    Args:
        statistics: name of the model -> its figures.
    """
    rows = []
    for measure, label, groups in (
        ("entropy", "entropy (bits)", KINDS),
        ("mean_head_cosine", "cosine to the step before", KINDS),
        ("relative_change", "relative change", STATES),
        ("cka", "CKA with the step before", STATES),
    ):
        known = [
            g for g in groups if any(np.isfinite(its.by_step[g][measure].mean).any() for its in statistics.values())
        ]
        if known:
            rows.append([(group, measure, label) for group in known])
    figure = _figure(12, 2.25 * len(rows))
    curves = [curve for row in rows for curve in row]
    panels = figure.subplot_mosaic(
        [[curves.index(curve) for curve in row for _ in range(6 // len(row))] for row in rows]
    )
    lettering = Lettering(statistics)
    for panel, (group, measure, label) in enumerate(curves):
        axes = panels[panel]
        lines = []
        for its in statistics.values():
            estimate = its.by_step[group][measure]
            first = 2 if measure == "mean_head_cosine" else 1
            steps = np.arange(first, first + len(estimate.mean))
            lines += axes.plot(steps, estimate.mean, marker="o", markersize=3)
            axes.fill_between(steps, estimate.low, estimate.high, color=lines[-1].get_color(), alpha=0.25, linewidth=0)
        axes.set_title(TITLES[group], fontsize=10)
        axes.set(xlabel="step", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        if not panel:
            _legend(axes, lines, list(statistics), lettering)
    return figure


def _legend(axes: "Axes", lines: Sequence["Line2D"], names: Sequence[str], lettering: Lettering) -> None:
    font = {"family": lettering.font["family"], "size": 8}
    for text in axes.legend(lines, list(map(lettering, names)), prop=font).get_texts():
        text.set_parse_math(False)


def save_figure(figure: "Figure", stem: Path) -> list[Path]:
    """Write a figure as PNG and SVG; glyphs are outlines in both, so that no reader needs the font."""
    files = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    width, height = figure.get_size_inches()
    dpi = min(DPI, LARGEST_SIDE / max(width, height), (LARGEST_PICTURE / (width * height)) ** 0.5)
    for file in files:
        figure.savefig(file, dpi=dpi)
        figure.set_layout_engine("none")  # the layout is found once
    return files


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
