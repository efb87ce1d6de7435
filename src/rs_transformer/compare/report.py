"""A comparison as files: Markdown, JSON, one HTML page, a plot, and the figures in the child's model card.

Not for what is measured (`comparison.py`).
"""

import base64
import shlex
from collections.abc import Iterable, Mapping
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from transformers.utils import CONFIG_NAME

from ..model_card import COMPARISON, METRICS, engine_title, renew_card
from ..pipeline_rs_marian import split_code
from ..training.run_folder import weights_digest
from ..utils.files import atomic_file, write_json, write_text
from ..utils.markdown import code, one_line, plain
from ..utils.plotting import check_matplotlib
from ..utils.tables import markdown_table
from .comparison import SIDES

REPORT = "report"
# What a card needs of a comparison, beside the models.
CARD_FIELDS = ("dataset", "split", "sentences", "references", "decoding", "timed_sentences", "rounds", "machine")
CARD_FIELDS += ("versions", "engines")
TITLES = {
    "size": "Size and loading",
    "speed": "Speed",
    "quality": "Quality",
    "likeness": "How alike the translations are",
}


def write_report(
    result: Mapping[str, Any],
    folder: str | Path,
    *,
    card: bool = True,
    benchmark: tuple[str, str] | None = None,
    repository: str | None = None,
    **said: Any,
) -> None:
    """Write `report.md`, `report.json`, `report.html` and `report.png`.

    Args:
        result: of `comparison.compare`.
        folder: where to; must exist.
        card: also write `comparison.json` and a new card into the child's folder, if it is one. A `README.md` that is
            no card of this package stays.
        benchmark: the dataset on the Hub and its task, as its `eval.yaml` has it, that the test sentences are; the
            child's folder then gets `.eval_results/comparison.yaml`, too.
        repository, said: for the card, as `build_card`.

    Raises:
        ValueError: matplotlib is not installed, or the child's folder has a file that a card cannot be made of.
    """
    check_matplotlib("compare")
    folder = Path(folder)
    write_json(result, folder / f"{REPORT}.json")
    picture = folder / f"{REPORT}.png"
    with atomic_file(picture) as staged:
        draw(result, staged)
    write_text(markdown(result, picture.name), folder / f"{REPORT}.md")
    if card and Path(result["child"]["model"], CONFIG_NAME).is_file():
        _write_into_card(result, Path(result["child"]["model"]), benchmark, repository, said)
    # The page last: where it is, all is.
    write_text(page(result, picture.read_bytes()), folder / f"{REPORT}.html")


def _write_into_card(
    result: Mapping[str, Any],
    child: Path,
    benchmark: tuple[str, str] | None,
    repository: str | None,
    said: Mapping[str, Any],
) -> None:
    record = {
        "parent": {**result["parent"], "model": "/".join(Path(result["parent"]["model"]).parts[-2:])},
        "child": {"parameters": result["child"]["parameters"], "weights_sha256": weights_digest(child)},
        **{name: result[name] for name in CARD_FIELDS},
        "benchmark": None if benchmark is None else dict(zip(("dataset_id", "task_id"), benchmark, strict=True)),
    }
    write_json(record, child / COMPARISON)
    renew_card(child, **said, **({} if repository is None else {"repository": repository}))


def summary(result: Mapping[str, Any]) -> list[str]:
    """In a sentence for each engine what the child is beside its parent."""
    parameters = result["child"]["parameters"] / result["parent"]["parameters"]
    lines = [f"The child has {parameters:.0%} of the parent's parameters."]
    for row in result["engines"]:
        parent, child, speedup = row["parent"], row["child"], row["speedup"]
        line = (
            f"In {engine_title(row)} it has {child['bytes'] / parent['bytes']:.0%} of the parent's file size and "
            f"{speedup['single']:.2f} times its speed one sentence at a time, {speedup['batched']:.2f} in batches"
        )
        if result["references"]:
            ours, theirs = (row["quality"][side] for side in ("child", "parent"))
            line += f"; its BLEU is {ours['bleu']:.2f}, the parent's {theirs['bleu']:.2f} (p {ours['bleu_p']:.3f})"
        lines.append(f"{line}; {row['same']:.0%} of the translations are the same.")
    return lines


def print_report(result: Mapping[str, Any]) -> None:
    """Print the tables and the summary."""
    for header, rows in tables(result).values():
        print(f"{markdown_table(header, rows)}\n")
    print(*summary(result), sep="\n", flush=True)


def tables(result: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Header and rows by the keys of `TITLES`: of each engine the parent's row, then the child's."""
    rows: dict[str, list[list[str]]] = {name: [] for name in TITLES}
    shortlists = any(row[side]["shortlist"] for row in result["engines"] for side in SIDES)
    for row in result["engines"]:
        title = engine_title(row)
        for side in SIDES:
            its = row[side]
            model = f"{side} with shortlist" if its["shortlist"] else side
            rows["size"].append([title, model, *_size_cells(its, shortlists)])
            speeds = [
                [f"{its[way]:.1f}", "1.00" if side == "parent" else f"{ratio:.2f}"]
                for way, ratio in row["speedup"].items()
            ]
            rows["speed"].append([title, model, *chain(*speeds)])
            if result["references"]:
                score = row["quality"][side]
                cells = [_score_cells(score, metric) for metric in METRICS]
                rows["quality"].append([title, model, *chain(*cells)])
        rows["likeness"].append([title, f"{row['same']:.1%}", f"{row['chrf_to_parent']:.2f}"])
    headers = {
        "size": ["engine", "model", "MB", *(["shortlist MB"] if shortlists else []), "load s", "peak MiB"],
        "speed": ["engine", "model", "single sentences/s", "speed-up", "batched sentences/s", "speed-up"],
        "quality": ["engine", "model", "BLEU", "p", "chrF", "p"],
        "likeness": ["engine", "the same", "chrF to the parent's"],
    }
    return {name: (headers[name], its) for name, its in rows.items() if its}


def _size_cells(its: Mapping[str, Any], shortlists: bool) -> list[str]:
    shortlist = f"{its['shortlist_bytes'] / 1e6:.1f}" if its["shortlist"] else "–"
    peak = "–" if its["peak_mib"] is None else f"{its['peak_mib']:.0f}"
    load = f"{its['load_seconds']:.2f}"
    return [f"{its['bytes'] / 1e6:.1f}", *([shortlist] if shortlists else []), load, peak]


def _score_cells(score: Mapping[str, Any], metric: str) -> list[str]:
    p = score[f"{metric}_p"]
    return [f"{score[metric]:.2f} ± {score[f'{metric}_ci']:.2f}", "–" if p is None else f"{p:.3f}"]


def notes(result: Mapping[str, Any]) -> list[str]:
    """How it was measured, a line each."""
    decoding, machine, timed = result["decoding"], result["machine"], result["timed_sentences"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    lines = [
        f"{result['sentences']:,} sentences of {result['dataset']}, beam {decoding['num_beams']}, at most "
        f"{decoding['max_new_tokens']} tokens, on {threads} of {machine['cpu']}.",
        f"Parent and child translate in turn, the first {timed['single']} sentences one at a time and the first "
        f"{timed['batched']} in batches of similar length; speeds are medians of {result['rounds']} rounds, speed-ups "
        "of their ratios.",
        "Load time and peak memory are those of a process that loads the model and translates all sentences in "
        "batches, without its imports and the tokenizer. MB is the file of the weights.",
    ]
    if result["references"]:
        lines.append("± is half of the 95% interval of a bootstrap over the sentences, p that of the paired one.")
    return [*lines, ", ".join(f"{name} {number}" for name, number in result["versions"].items())]


def signatures(result: Mapping[str, Any]) -> list[str]:
    """Those of the metrics."""
    row = result["engines"][0]
    own = [row["quality"]["child"][f"{metric}_signature"] for metric in METRICS] if "quality" in row else []
    return [*own, f"to the parent's translations {row['chrf_to_parent_signature']}"]


def markdown(result: Mapping[str, Any], picture: str) -> str:
    """The report as Markdown.

    Args:
        result: of `comparison.compare`.
        picture: the plot's file.
    """
    parent, child = result["parent"], result["child"]
    models = [[side, one_line(result[side]["model"]), f"{result[side]['parameters']:,}"] for side in SIDES]
    lines = [f"# {code(parent['model'])} and {code(child['model'])}", "", *_bullets(map(plain, summary(result))), ""]
    lines += [f"![Quality against speed and size]({picture})", ""]
    lines += [markdown_table(["", "model", "parameters stored"], models), ""]
    for name, table in tables(result).items():
        lines += [f"## {TITLES[name]}", "", markdown_table(*table), ""]
    lines += ["## How it was measured", "", *_bullets(map(plain, notes(result)))]
    lines += _bullets(map(code, [*signatures(result), shlex.join(result["command"])]))
    lines += ["", "## Where they differ most", "", plain(_about_examples(result)), ""]
    for example in result["examples"]:
        lines += [f"Sentence {example['sentence']}, chrF {example['chrf_to_parent']:.1f}:", ""]
        # An indented block: text is text there.
        lines += [f"    {name:9}  {one_line(example[name])}" for name in _parts(result)] + [""]
    return "\n".join(lines)


def _bullets(lines: Iterable[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def _parts(result: Mapping[str, Any]) -> list[str]:
    return ["source", *(["reference"] if result["references"] else []), *SIDES]


def _about_examples(result: Mapping[str, Any]) -> str:
    if not result["examples"]:
        return "All translations are the same."
    return (
        f"The {len(result['examples'])} sentences whose translations by {engine_title(result['engines'][0])} have the "
        "lowest chrF of the child's against the parent's."
    )


def page(result: Mapping[str, Any], picture: bytes) -> str:
    """The report as one HTML page that needs no network; text of models and corpus is escaped.

    Args:
        result: of `comparison.compare`.
        picture: the plot as PNG.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    return template.render(
        result=result,
        sides=SIDES,
        summary=summary(result),
        tables=[(TITLES[name], *table) for name, table in tables(result).items()],
        notes=notes(result),
        codes=[*signatures(result), shlex.join(result["command"])],
        languages=[split_code(language)[0] for language in result["languages"]],
        about_examples=_about_examples(result),
        parts=_parts(result),
        picture=base64.b64encode(picture).decode(),
    )


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Draw quality against speed and against size, an arrow from parent to child for each engine, as PNG.

    Quality is BLEU with its interval, or without references chrF against the parent's translations in the same engine.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    quality = "BLEU" if result["references"] else "chrF to the parent's translations"
    for axes, (what, value) in zip(panels, _PANELS.items(), strict=True):
        for number, row in enumerate(result["engines"]):
            places = [(value(row[side]), _quality(row, side)) for side in SIDES]
            colour = f"C{number}"
            for side, place in zip(SIDES, places, strict=True):
                axes.errorbar(*place, yerr=_interval(row, side), color=colour, alpha=0.4, capsize=2)
            axes.annotate("", places[1], places[0], arrowprops={"arrowstyle": "->", "color": colour, "alpha": 0.6})
            axes.plot(*places[0], "o", color=colour, markerfacecolor="white")
            axes.plot(*places[1], "o", color=colour, label=engine_title(row))
        axes.set(xlabel=what)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(quality)
    panels[0].legend(fontsize=8, title="○ parent → ● child", title_fontsize=8)
    figure.savefig(file, dpi=150, format="png")


_PANELS = {
    "sentences/s, one at a time": lambda its: its["single"],
    "MB of weights": lambda its: its["bytes"] / 1e6,
}


def _quality(row: Mapping[str, Any], side: str) -> float:
    if "quality" in row:
        return row["quality"][side]["bleu"]
    return 100.0 if side == "parent" else row["chrf_to_parent"]


def _interval(row: Mapping[str, Any], side: str) -> float | None:
    return row["quality"][side]["bleu_ci"] if "quality" in row else None
