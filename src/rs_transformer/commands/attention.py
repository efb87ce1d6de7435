"""What each step of a recurrently stacked model attends to, beside another model: figures, pictures, and a page.

    rs-transformer attention runs/tanaka_collapsed runs/tanaka_vanilla6 \\
        --text "彼は水泳が得意だ。" --reference "he is good at swimming." --output_dir attention
    rs-transformer attention runs/tanaka_collapsed runs/tanaka_vanilla6 \\
        --dataset data/tanaka --output_dir attention

Open `attention.html` of the output folder in a browser.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from ..attention.collection import (
    KINDS,
    AttentionStatistics,
    SentenceAttention,
    attention_statistics,
    collect_attention,
    encode_sentences,
)
from ..attention.figures import TITLES, draw_entropy_map, draw_heads, draw_heads_mean, draw_steps, save_figure
from ..attention.page import write_page
from ..checkpoints import Translator, coded_sources, load_translator
from ..corpus import SPLITS, TRAINING_OPTIONS, OptionalCorpusArguments, load_split
from ..decoding import DecodingArguments
from ..tokenization import check_language_pair
from ..utils.files import write_json
from ..utils.plotting import check_matplotlib
from ..utils.processes import run
from ..utils.ranges import check_range
from ..utils.recipes import RecipeParser
from ..utils.tables import markdown_table

PAGE = "attention.html"


@dataclass
class AttentionArguments:
    """Which models to look into, and at which sentences."""

    models: list[str] = field(
        metadata={
            "help": "One or two models, on the Hub or in folders; may stand first, without --models.",
            "nargs": "+",
        }
    )
    text: list[str] | None = field(
        default=None, metadata={"help": "Sentences to look at, instead of a dataset's.", "nargs": "+"}
    )
    reference: list[str] | None = field(
        default=None,
        metadata={
            "help": "Translations of `text` that the decoder is forced to; without them its own are.",
            "nargs": "+",
        },
    )
    split: str = field(default="test", metadata={"help": "What to take of the dataset.", "choices": list(SPLITS)})
    max_sentences: int | None = field(default=None, metadata={"help": "Use the first so many pairs of the dataset."})
    own_translation: bool = field(
        default=False, metadata={"help": "Follow each model's own translation, not the dataset's references."}
    )
    pictured: int | None = field(
        default=None,
        metadata={
            "help": "Of how many sentences, the first, there are pictures; default: all of text, 3 of a dataset."
        },
    )
    output_dir: str = field(default="attention", metadata={"help": "Where to write; made if need be."})

    def __post_init__(self) -> None:
        if not 1 <= len(self.models) <= 2 or len(set(self.models)) < len(self.models):
            raise ValueError(f"attention is shown of one model or of two different ones, got {' '.join(self.models)}")
        if self.reference is not None and self.text is None:
            raise ValueError("reference belongs to text; of a dataset the references are in it")
        if self.reference is not None and self.own_translation:
            raise ValueError("the decoder follows the reference or its own translation: give one of the two options")
        check_range(self, "max_sentences", least=1)
        check_range(self, "pictured", least=0)
        if Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            raise ValueError(f"output_dir: {self.output_dir!r} is a file")


def report_attention(
    args: AttentionArguments, corpus_args: OptionalCorpusArguments, decoding: DecodingArguments
) -> dict[str, AttentionStatistics]:
    """Measure the attention of one or two models on the same sentences; write figures, pictures and the page.

    Languages that were not given are the first tokenizer's.

    `output_dir` gets `statistics.json` (`AttentionStatistics.to_dict` of each model, and what was asked),
    `entropy_map` and `steps` as PNG and SVG, `attention.html`, and for each pictured sentence and kind of attention
    `sentence1_cross_attentions` (mean of the heads) and `…_heads` as PNG and SVG.

    Returns:
        Name of the model -> its statistics.

    Raises:
        ValueError, FileNotFoundError: data or a model that does not fit, or one that gives no attention weights;
            before anything is measured.
    """
    check_matplotlib("attention")
    if (args.text is None) != corpus_args.has_split(args.split):
        raise ValueError(f"give text to look at, or a dataset ({args.split}_file or dataset_name), and not both")
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    translators = _load_models(args.models)
    _, tokenizer = next(iter(translators.values()))
    languages = {
        side: getattr(corpus_args, side) or getattr(tokenizer, side, None) for side in ("source_lang", "target_lang")
    }
    corpus_args = replace(corpus_args, **languages)
    if None not in languages.values():
        for _, tokenizer in translators.values():
            check_language_pair(tokenizer, **languages)
    sources, targets = _load_sentences(args, corpus_args)
    told = {}
    for name, (model, tokenizer) in translators.items():
        told[name], first_token = coded_sources(name, tokenizer, sources, **languages)
        if first_token is not None:
            model.generation_config.forced_bos_token_id = first_token
        encode_sentences(model, tokenizer, told[name], targets)
    pictured = args.pictured
    if pictured is None:
        pictured = len(sources) if args.text is not None else 3
    pictured = min(pictured, len(sources))
    first_targets = None if targets is None else targets[:pictured]
    # The pictures' few sentences come first: a model that gives no attentions is found out at once.
    sentences = {
        name: collect_attention(*translator, told[name][:pictured], first_targets, decoding) if pictured else []
        for name, translator in translators.items()
    }
    statistics = {}
    seconds = {}
    for name, translator in translators.items():
        start = time.perf_counter()
        statistics[name] = attention_statistics(*translator, told[name], targets, decoding)
        seconds[name] = time.perf_counter() - start
    if not PartialState().is_main_process:
        return statistics

    folder = Path(args.output_dir)
    record = {
        "arguments": asdict(args) | asdict(corpus_args) | asdict(decoding),
        "decoder": "own translation" if targets is None else "reference",
        "models": {name: its.to_dict() for name, its in statistics.items()},
    }
    write_json(record, folder / "statistics.json")
    print_statistics(statistics)
    for name, spent in seconds.items():
        plural = "" if len(sources) == 1 else "s"
        print(f"{name}: {len(sources)} sentence{plural} measured in {spent:.1f} s", flush=True)
    write_pictures(folder, sentences, statistics)
    if pictured:
        print(f"open {folder / PAGE} in a browser", flush=True)
    else:
        print(f"figures: {folder / 'entropy_map.png'}, {folder / 'steps.png'}", flush=True)
    return statistics


def write_pictures(
    folder: Path, sentences: Mapping[str, Sequence[SentenceAttention]], statistics: Mapping[str, AttentionStatistics]
) -> None:
    """Write the page and all figures into a folder; those of another run go, since they would be taken for this one's.

    Args:
        folder: must exist.
        sentences: name of the model -> its attention for the same sentences, maybe none.
        statistics: name of the model -> its figures.
    """
    for stale in [*folder.glob("sentence[0-9]*_attentions*"), *folder.glob(PAGE)]:
        stale.unlink()
    pairs = [dict(zip(sentences, pair, strict=True)) for pair in zip(*sentences.values(), strict=True)]
    if pairs:
        write_page(folder / PAGE, sentences, statistics, title=f"Attention: {' and '.join(statistics)}")
    save_figure(draw_entropy_map(statistics), folder / "entropy_map")
    save_figure(draw_steps(statistics), folder / "steps")
    for number, pair in enumerate(pairs, start=1):
        for kind in KINDS:
            save_figure(draw_heads_mean(pair, kind), folder / f"sentence{number}_{kind}")
            save_figure(draw_heads(pair, kind), folder / f"sentence{number}_{kind}_heads")


def _load_models(models: Sequence[str]) -> dict[str, Translator]:
    """Models in single precision and their tokenizers, by the last part of the name if that tells them apart."""
    short = [Path(name).name for name in models]
    names = short if len(set(short)) == len(short) else models
    return {name: load_translator(model, dtype=torch.float32) for name, model in zip(names, models, strict=True)}


def _load_sentences(
    args: AttentionArguments, corpus_args: OptionalCorpusArguments
) -> tuple[list[str], list[str] | None]:
    if args.text is not None:
        return args.text, args.reference
    if corpus_args.source_lang is None or corpus_args.target_lang is None:
        raise ValueError("the tokenizer names no languages: give source_lang and target_lang")
    dataset = load_split(corpus_args, args.split)
    if args.max_sentences is not None:
        dataset = dataset.select(range(min(args.max_sentences, len(dataset))))
    return dataset["source"][:], None if args.own_translation else dataset["target"][:]


def print_statistics(statistics: Mapping[str, AttentionStatistics]) -> None:
    """Print a Markdown table of every measure that is known, by step: mean and half the width of the 95% interval."""
    steps = max(len(next(iter(group.values())).mean) for its in statistics.values() for group in its.by_step.values())
    rows = []
    for group, measures in next(iter(statistics.values())).by_step.items():
        for measure in measures:
            if all(np.isnan(its.by_step[group][measure].mean).all() for its in statistics.values()):
                continue
            for name, its in statistics.items():
                estimate = its.by_step[group][measure]
                depth = len(its.by_step[group][next(iter(measures))].mean)
                cells = [""] * (depth - len(estimate.mean))  # what compares to the step before starts at the second
                for mean, low, high in zip(estimate.mean, estimate.low, estimate.high, strict=True):
                    interval = "" if math.isnan(low) else f" ± {(high - low) / 2:.3f}"
                    cells.append("–" if math.isnan(mean) else f"{mean:.3f}{interval}")
                cells += [""] * (steps - len(cells))
                rows.append([TITLES[group], measure.replace("_", " "), name, *cells])
    print(markdown_table(["", "measure", "model", *(f"step {step + 1}" for step in range(steps))], rows))


GROUPS = (AttentionArguments, OptionalCorpusArguments, DecodingArguments)


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser(
        GROUPS, positional="models", prose=("text", "reference"), unused=TRAINING_OPTIONS, description=__doc__
    )
    report_attention(*parser.parse_recipe(argv))


if __name__ == "__main__":
    run(main)
