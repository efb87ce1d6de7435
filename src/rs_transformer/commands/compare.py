"""Compare a model with the one that it was made from: size, speed, memory, quality, and where the translations differ.

    rs-transformer compare Helsinki-NLP/opus-mt-ja-en runs/student --test_file test.ja test.en --output_dir report
    rs-transformer compare runs/vanilla6 runs/student --engines ctranslate2:int8 transformers \\
        --child_exports student-ct2 --test_file test.ja test.en --num_beams 1 --output_dir report
    rs-transformer compare runs/vanilla6 runs/student --input_file sentences.ja --output_dir report

The parent stands first. Both translate in each engine, in turn, so that both see the same machine. Open `report.html`
of the output folder; the child's folder gets the figures, too, in its model card.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.utils import CONFIG_NAME

from ..checkpoints import load_tokenizer
from ..compare.comparison import compare
from ..compare.report import print_report, write_report
from ..corpus import SPLITS, TRAINING_OPTIONS, OptionalCorpusArguments, load_split, read_sentences
from ..decoding import DecodingArguments
from ..export import TARGETS
from ..model_card import CardFacts
from ..tokenization import check_language_pair
from ..utils.plotting import check_matplotlib
from ..utils.processes import run
from ..utils.ranges import check_range
from ..utils.recipes import RecipeParser

GO_ON = "the same command goes on from what is finished"


@dataclass
class CompareArguments:
    """Which two models to compare, in which engines, and how."""

    models: list[str] = field(
        metadata={
            "help": "Parent and child, on the Hub or in folders; may stand first, without --models.",
            "nargs": "+",
        }
    )
    output_dir: str = field(metadata={"help": "Where to write; the same command goes on from what is there."})
    engines: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Of {', '.join(TARGETS)} (the model itself in PyTorch), each alone or as NAME:QUANTIZATION; "
            "default: those of child_exports, or else all that are installed, int8 where they have it.",
            "nargs": "+",
        },
    )
    parent_exports: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders that export has written of the parent, used as they are.", "nargs": "+"},
    )
    child_exports: list[str] = field(
        default_factory=list, metadata={"help": "The same of the child; others are made.", "nargs": "+"}
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the parent."})
    split: str = field(default="test", metadata={"help": "What to translate.", "choices": list(SPLITS)})
    input_file: str | None = field(
        default=None,
        metadata={"help": "Sources without references, in the place of a dataset: plain text, or with source_column."},
    )
    threads: int = field(default=1, metadata={"help": "Threads of each engine; Marian's takes one."})
    timed_sentences: int = field(
        default=100, metadata={"help": "The first so many are timed, and in batches 4 times as many."}
    )
    rounds: int = field(default=5, metadata={"help": "Times that each model translates these, in turn."})
    examples: int = field(default=20, metadata={"help": "Translations to show, those that differ most."})
    bootstrap_samples: int = field(default=1000, metadata={"help": "Resamplings of the paired bootstrap."})
    card: bool = field(
        default=True, metadata={"help": "Write comparison.json and a new card into the child's folder, too."}
    )
    benchmark: list[str] | None = field(
        default=None,
        metadata={
            "help": "If the test data is a benchmark of the Hub: its dataset and the task in it, for .eval_results/.",
            "nargs": 2,
        },
    )

    def __post_init__(self) -> None:
        if len(self.models) != 2:
            raise ValueError(f"a comparison is of two models, parent and child, got {' '.join(self.models)}")
        if self.benchmark is not None and len(self.benchmark) != 2:
            raise ValueError(f"benchmark must be a dataset and its task, got {' '.join(self.benchmark)}")
        check_range(self, "threads", "timed_sentences", "rounds", "bootstrap_samples", least=1)
        check_range(self, "examples", least=0)
        if Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            raise ValueError(f"output_dir: {self.output_dir!r} is a file")


def compare_models(
    args: CompareArguments, corpus_args: OptionalCorpusArguments, decoding: DecodingArguments
) -> dict[str, Any]:
    """Compare two models on a split, or on sources alone, and write the report.

    Languages that were not given are those of the parent's tokenizer.

    Returns:
        The figures, as `compare.comparison.compare`.

    Raises:
        ValueError, OSError, RuntimeError: as `compare.comparison.compare`; or data that does not fit.
    """
    if PartialState().num_processes > 1:
        raise ValueError(
            "compare runs in one process: start it without accelerate launch; --threads gives it more CPU"
        )
    check_matplotlib("compare")
    if (args.input_file is None) != corpus_args.has_split(args.split):
        raise ValueError(f"give test sentences: a dataset ({args.split}_file or dataset_name) or input_file, not both")
    parent, child = args.models
    if args.card and Path(child, CONFIG_NAME).is_file():
        CardFacts.from_folder(Path(child))
        if not os.access(child, os.W_OK):
            raise ValueError(f"nothing can be written into {child}, where a card is to be: set card=false")
    if args.input_file is not None:
        sources, references = read_sentences(args.input_file, corpus_args.source_column or "source"), None
        dataset = "/".join(Path(args.input_file).parts[-2:])
    else:
        sources, references, dataset = _load_pairs(args, corpus_args)
    result = compare(
        parent,
        child,
        sources,
        references,
        args.output_dir,
        engines=args.engines,
        parent_exports=args.parent_exports,
        child_exports=args.child_exports,
        revision=args.revision,
        decoding=decoding,
        source_lang=corpus_args.source_lang,
        target_lang=corpus_args.target_lang,
        dataset=dataset,
        split=args.split,
        threads=args.threads,
        timed_sentences=args.timed_sentences,
        rounds=args.rounds,
        examples=args.examples,
        bootstrap_samples=args.bootstrap_samples,
    )
    write_report(
        result, args.output_dir, card=args.card, benchmark=None if args.benchmark is None else tuple(args.benchmark)
    )
    print_report(result)
    print(f"open {Path(args.output_dir, 'report.html')} in a browser", flush=True)
    return result


def _load_pairs(args: CompareArguments, corpus_args: OptionalCorpusArguments) -> tuple[list[str], list[str], str]:
    """Sources, references, and what the data is called."""
    tokenizer = load_tokenizer(args.models[0], args.revision)
    languages = {
        side: getattr(corpus_args, side) or getattr(tokenizer, side, None) for side in ("source_lang", "target_lang")
    }
    if None in languages.values():
        raise ValueError("the parent's tokenizer names no languages: give source_lang and target_lang")
    check_language_pair(tokenizer, **languages)
    corpus_args = replace(corpus_args, **languages)
    pairs = load_split(corpus_args, args.split)
    return pairs["source"][:], pairs["target"][:], corpus_args.split_name(args.split)


GROUPS = (CompareArguments, OptionalCorpusArguments, DecodingArguments)


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser(GROUPS, positional="models", unused=TRAINING_OPTIONS, description=__doc__)
    compare_models(*parser.parse_recipe(argv))


if __name__ == "__main__":
    run(main, GO_ON)
