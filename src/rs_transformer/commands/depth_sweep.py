"""Quality against speed of one recurrently stacked checkpoint at many depths, before and after fine-tuning.

    rs-transformer depth-sweep --model_name_or_path runs/tanaka_rs6 --decoder_depths 6 5 4 3 2 1 \\
        --finetuned runs/decoder2 runs/decoder1 --source_lang ja --target_lang en \\
        --test_file data/tanaka/test.jsonl --num_beams 1 --output_file sweep.json --plot_file sweep.png

Prints BLEU, chrF and sentences per second of every encoder depth × decoder depth, all from one run.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import coded_sources, load_translator
from ..corpus import SPLITS, TRAINING_OPTIONS, CorpusArguments, load_split
from ..decoding import DecodingArguments, timed_translate, translate
from ..layer_transfer import check_rs_marian, depth_config, with_depth
from ..metrics import corpus_scores
from ..tokenization import check_language_pair
from ..training.run_folder import weights_digest
from ..utils.files import check_output_file, write_json
from ..utils.plotting import check_plot_file
from ..utils.processes import run
from ..utils.ranges import check_range
from ..utils.recipes import RecipeParser
from ..utils.tables import markdown_table

System = tuple[str, PreTrainedTokenizerBase, Callable[[], PreTrainedModel]]


@dataclass
class DepthSweepArguments:
    """Which checkpoint, at which depths, and what to compare it to."""

    model_name_or_path: str = field(metadata={"help": "An RSMarian, on the Hub or in a folder."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of it."})
    encoder_depths: list[int] = field(
        default_factory=list, metadata={"help": "Depths of the encoder; default: its own.", "nargs": "+"}
    )
    decoder_depths: list[int] = field(
        default_factory=list, metadata={"help": "Depths of the decoder; default: its own.", "nargs": "+"}
    )
    finetuned: list[str] = field(
        default_factory=list,
        metadata={"help": "Checkpoints fine-tuned at some depth, measured in the same run as they are.", "nargs": "+"},
    )
    split: str = field(default="test", metadata={"help": "What to translate.", "choices": list(SPLITS)})
    rounds: int = field(
        default=3, metadata={"help": "Times that each system translates the split, in turn; the speed is the median."}
    )
    output_file: str | None = field(default=None, metadata={"help": "Where to write the figures as JSON."})
    plot_file: str | None = field(
        default=None, metadata={"help": "Where to draw quality against speed (png, svg, pdf); needs matplotlib."}
    )

    def __post_init__(self) -> None:
        check_range(self, "rounds", least=1)
        if self.plot_file is not None:
            check_plot_file(self.plot_file)
        for name in ("output_file", "plot_file"):
            if (file := getattr(self, name)) is not None:
                check_output_file(file, what=name)


def sweep_depths(
    args: DepthSweepArguments, corpus_args: CorpusArguments, decoding: DecodingArguments
) -> list[dict[str, Any]]:
    """Measure quality and speed of a checkpoint at every encoder depth × decoder depth, and of others beside it.

    The systems take turns, round by round, so that all suffer alike from what else the machine does. The checkpoint
    at its own depth comes first, whether asked for or not: speed-ups are against it.

    Returns:
        One dict a system: `system`, `encoder_layers`, `decoder_layers`, `parameters`, `bleu`, `chrf` and their
        signatures, `sentences_per_second` (median of the rounds), `speedup` (median of the rounds' ratios to the
        first), `rounds` (sentences per second in each), `num_beams`, `split`.

    Raises:
        TypeError: the model is not recurrently stacked.
        ValueError, FileNotFoundError: a depth that is less than the unique layers, or data or a model that do not
            fit.
    """
    output = None
    if args.output_file is not None:
        output = check_output_file(args.output_file, corpus_args.all_files())
    dataset = load_split(corpus_args, args.split)
    base, tokenizer = load_translator(args.model_name_or_path, args.revision)
    check_language_pair(tokenizer, corpus_args.source_lang, corpus_args.target_lang)
    check_rs_marian(base)
    own = (base.config.encoder_layers, base.config.decoder_layers)
    depths = [(e, d) for e in args.encoder_depths or own[:1] for d in args.decoder_depths or own[1:]]
    # A copy for each depth would fill the memory; they are made when they are due.
    systems: list[System] = []
    for encoder, decoder in dict.fromkeys([own, *depths]):
        depth_config(base.config, encoder, decoder)  # an impossible depth is said before the first one is measured
        make = partial(with_depth, base, encoder_layers=encoder, decoder_layers=decoder)
        systems.append((args.model_name_or_path, tokenizer, make))
    for name in args.finetuned:
        model, its_tokenizer = load_translator(name)
        check_language_pair(its_tokenizer, corpus_args.source_lang, corpus_args.target_lang)
        systems.append((name, its_tokenizer, lambda model=model: model))

    languages = (corpus_args.source_lang, corpus_args.target_lang)
    sources = {name: coded_sources(name, each, dataset["source"], *languages)[0] for name, each, _ in systems}
    first = sources[args.model_name_or_path][:8]
    translate(base, tokenizer, first, decoding, progress=False)  # what is done once, is done
    rows = _measure(systems, sources, dataset["target"][:], corpus_args.target_lang, decoding, args.rounds)
    for row in rows:
        row["split"] = args.split
        row["sentences_per_second"] = statistics.median(row["rounds"])
        ratios = [speed / first for speed, first in zip(row["rounds"], rows[0]["rounds"], strict=True)]
        row["speedup"] = statistics.median(ratios)
    if PartialState().is_main_process:
        with suppress(OSError):  # of a folder; a card shows no figures of other weights
            rows[0]["weights_sha256"] = weights_digest(args.model_name_or_path)
        if output is not None:
            write_json(rows, output)
        print_sweep(rows)
        if args.plot_file is not None:
            plot_sweep(rows, args.plot_file)
    return rows


def _measure(
    systems: Sequence[System],
    sources: Mapping[str, list[str]],
    references: list[str],
    target_lang: str | None,
    decoding: DecodingArguments,
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for each system, with its sentences per second in each round.

    Args:
        sources: by the systems' names.
    """
    rows: list[dict[str, Any]] = []
    for number in range(rounds):
        for index, (name, tokenizer, make) in enumerate(systems):
            model = make()
            translations, speed = timed_translate(model, tokenizer, sources[name], decoding)
            if number == 0:
                rows.append(
                    {
                        "system": name,
                        "encoder_layers": model.config.encoder_layers,
                        "decoder_layers": model.config.decoder_layers,
                        "parameters": model.num_parameters(only_trainable=True),
                        **corpus_scores(translations, references, target_lang),
                        "num_beams": decoding.num_beams,
                        "rounds": [],
                    }
                )
            rows[index]["rounds"].append(speed)
    return rows


def print_sweep(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows of `sweep_depths` as a Markdown table, then the signatures."""
    columns = {
        "model": "{system}",
        "encoder depth": "{encoder_layers}",
        "decoder depth": "{decoder_layers}",
        "BLEU": "{bleu:.2f}",
        "chrF": "{chrf:.2f}",
        "sentences/s": "{sentences_per_second:.1f}",
        "speed-up": "{speedup:.2f}",
        "parameters": "{parameters:,}",
    }
    print(markdown_table(list(columns), [[cell.format_map(row) for cell in columns.values()] for row in rows]))
    first = rows[0]
    print(f"{first['split']} set, beam {first['num_beams']}, {len(first['rounds'])} rounds")
    print(f"{first['bleu_signature']}\n{first['chrf_signature']}", flush=True)


def plot_sweep(rows: Sequence[dict[str, Any]], file: str | Path) -> None:
    """Draw BLEU against sentences per second: a line for each encoder depth, fine-tuned models as marks.

    Args:
        rows: of `sweep_depths`.
        file: the picture; its suffix chooses the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    swept = [row for row in rows if row["system"] == rows[0]["system"]]
    others = [row for row in rows if row["system"] != rows[0]["system"]]
    for encoder in sorted({row["encoder_layers"] for row in swept}, reverse=True):
        line = sorted(
            (row for row in swept if row["encoder_layers"] == encoder), key=lambda row: row["decoder_layers"]
        )
        points = [[row[axis] for row in line] for axis in ("sentences_per_second", "bleu")]
        axes.plot(*points, marker="o", label=f"encoder depth {encoder}, no fine-tuning")
    if others:
        points = [[row[axis] for row in others] for axis in ("sentences_per_second", "bleu")]
        axes.scatter(*points, marker="*", s=120, color="black", zorder=3, label="fine-tuned at its depth")
    for row in rows:
        axes.annotate(
            f"{row['encoder_layers']}-{row['decoder_layers']}",
            (row["sentences_per_second"], row["bleu"]),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xlabel(f"sentences per second (beam {rows[0]['num_beams']})")
    axes.set_ylabel("BLEU")
    axes.set_title("Quality against speed; labels are encoder-decoder depth")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


GROUPS = (DepthSweepArguments, CorpusArguments, DecodingArguments)


def main(argv: list[str] | None = None) -> None:
    sweep_depths(*RecipeParser(GROUPS, unused=TRAINING_OPTIONS, description=__doc__).parse_recipe(argv))


if __name__ == "__main__":
    run(main)
