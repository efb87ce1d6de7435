"""Systems scored on a test set, and compared. What `training/translate.py` and `training/evaluate.py` do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, load_dataset

from .corpus import BUILDERS, SPLITS, CorpusArguments, load_split
from .decoding import DecodingArguments, Translator, load_translator, timed_translate
from .metrics import corpus_scores, paired_bootstrap
from .run_folder import write_json
from .tokenization import check_language_pair


@dataclass
class TranslateArguments:
    """What to translate, with which model, and where to write it."""

    model_name_or_path: str = field(metadata={"help": "The model, on the Hub or in a folder."})
    input_file: str = field(
        metadata={"help": "Plain text, a sentence a line; or jsonl, csv, tsv, parquet with source_column."}
    )
    output_file: str = field(metadata={"help": "The translations, a sentence a line, in the order of the input."})
    source_column: str = field(default="source", metadata={"help": "Text column of a file that is not plain text."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    chunk_size: int = field(
        default=20_000, metadata={"help": "Sentences that are sorted, translated and written at a time."}
    )


def translate_file(args: TranslateArguments, decoding: DecodingArguments) -> float:
    """Translate a file and return the sentences per second.

    What is done is on disk after every chunk, as `output_file` with `.partial` added; it gets its own name at the end.

    Raises:
        FileNotFoundError: no input, or no folder for the output.
        ValueError: no such column.
    """
    output = Path(args.output_file)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output_file: there is no folder {str(output.parent)!r}")
    sentences = read_sentences(args.input_file, args.source_column)
    model, tokenizer = load_translator(args.model_name_or_path, args.revision)
    partial = output.with_name(f"{output.name}.partial")
    is_main = PartialState().is_main_process
    if is_main:
        partial.write_text("", encoding="utf-8")
    seconds = 0.0
    for start in range(0, len(sentences), args.chunk_size):
        chunk = sentences[start : start + args.chunk_size]
        translations, speed = timed_translate(model, tokenizer, chunk, decoding)
        seconds += len(chunk) / speed
        if is_main:
            with partial.open("a", encoding="utf-8") as file:
                file.writelines(f"{' '.join(text.splitlines())}\n" for text in translations)
    if is_main:
        partial.replace(output)
    return len(sentences) / seconds


def read_sentences(file: str, column: str) -> list[str]:
    """The lines of a plain-text file, or a text column of a jsonl, csv, tsv or parquet file; at least one."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"input_file: there is no file {file!r}")
    suffix = Path(file).suffix
    if suffix not in BUILDERS:
        with open(file, encoding="utf-8", newline="\n") as lines:
            sentences = [line.rstrip("\r\n") for line in lines]
    else:
        options = {"delimiter": "\t"} if suffix == ".tsv" else {}
        dataset = load_dataset(BUILDERS[suffix], data_files=file, split="train", **options)
        if column not in dataset.column_names:
            raise ValueError(f"{file} has no column {column!r}; its columns: {', '.join(dataset.column_names)}")
        sentences = dataset[column][:]
    if not sentences:
        raise ValueError(f"{file} is empty")
    return sentences


@dataclass
class EvaluateArguments:
    """Which systems to score, and on what."""

    systems: list[str] = field(
        metadata={
            "help": "Models (on the Hub or in folders) or plain-text files with translations. With several, each is "
            "compared to the first by a paired bootstrap.",
            "nargs": "+",
        }
    )
    split: str = field(default="test", metadata={"help": "What to translate.", "choices": list(SPLITS)})
    bootstrap_samples: int = field(default=1000, metadata={"help": "Resamplings of the paired bootstrap."})
    output_file: str | None = field(default=None, metadata={"help": "Where to write the figures as JSON."})


def evaluate_systems(
    args: EvaluateArguments,
    corpus_args: CorpusArguments,
    decoding: DecodingArguments,
    loaded: Mapping[str, Translator] | None = None,
) -> list[dict[str, Any]]:
    """Score systems on a split; compare them to the first if there are several.

    Args:
        args: the systems and the split.
        corpus_args: the data.
        decoding: how models translate.
        loaded: those of the systems that are in memory already.

    Returns:
        One dict a system: `system`, `bleu`, `chrf`, `bleu_signature`, `chrf_signature`, for models
        `sentences_per_second`, `num_beams` and `parameters`; and `bootstrap`, the system's row of `paired_bootstrap`.

    Raises:
        ValueError, FileNotFoundError: data, model or file of translations does not fit.
    """
    dataset = load_split(corpus_args, args.split)
    references = dataset["target"][:]
    if len(set(args.systems)) < len(args.systems):
        raise ValueError(f"a system is named twice: {' '.join(args.systems)}")
    files = {system: read_sentences(system, "target") for system in args.systems if Path(system).is_file()}
    for file, lines in files.items():
        if len(lines) != len(references):
            raise ValueError(f"{file} has {len(lines)} lines, the {args.split} split {len(references)} references")
    translations, rows = {}, []
    for system in args.systems:
        row: dict[str, Any] = {"system": system}
        if system in files:
            translations[system] = files[system]
        else:
            translator = (loaded or {}).get(system) or load_translator(system)
            translations[system], figures = _run_system(translator, dataset, corpus_args, decoding)
            row |= figures
        row |= corpus_scores(translations[system], references, corpus_args.target_lang)
        rows.append(row)
    if len(rows) > 1:
        comparison = paired_bootstrap(translations, references, corpus_args.target_lang, args.bootstrap_samples)
        for row, bootstrap in zip(rows, comparison, strict=True):
            row["bootstrap"] = bootstrap
    if PartialState().is_main_process:
        print_scores(rows)
        if args.output_file is not None:
            write_json(rows, args.output_file)
    return rows


def _run_system(
    translator: Translator, dataset: Dataset, corpus_args: CorpusArguments, decoding: DecodingArguments
) -> tuple[list[str], dict[str, Any]]:
    model, tokenizer = translator
    check_language_pair(tokenizer, corpus_args.source_lang, corpus_args.target_lang)
    translations, speed = timed_translate(model, tokenizer, dataset["source"][:], decoding)
    return translations, {
        "num_beams": decoding.num_beams,
        "sentences_per_second": speed,
        "parameters": model.num_parameters(only_trainable=True),
    }


def print_scores(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line for each system, then the signatures."""
    for row in rows:
        line = f"{row['system']}: BLEU {row['bleu']:.2f}  chrF {row['chrf']:.2f}"
        if "parameters" in row:
            line += (
                f"  beam {row['num_beams']}  {row['sentences_per_second']:.1f} sentences/s  "
                f"{row['parameters']:,} parameters"
            )
        if (bootstrap := row.get("bootstrap")) and bootstrap["bleu_p"] is not None:
            line += f"  p {bootstrap['bleu_p']:.3f} (BLEU) {bootstrap['chrf_p']:.3f} (chrF) against the first"
        print(line)
    shown = rows[-1].get("bootstrap", rows[-1])
    print(f"{shown['bleu_signature']}\n{shown['chrf_signature']}", flush=True)
