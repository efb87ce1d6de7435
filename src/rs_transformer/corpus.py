"""Parallel corpora in, cleaned and checked, as `datasets`: columns `source` and `target`, then token ids.

Not for tokenizer training (`tokenization.py`) nor for batching (`training/batches.py`).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SPLITS = ("train", "validation", "test")
AnyDataset = Dataset | IterableDataset
# Of `CorpusArguments`: what those have no use for that only translate.
TRAINING_OPTIONS = (
    "streaming",
    "shuffle_buffer_size",
    "max_train_samples",
    "max_eval_samples",
    "max_source_length",
    "max_target_length",
    "max_length_ratio",
    "preprocessing_num_workers",
)


@dataclass
class CorpusArguments:
    """Where the parallel text comes from, and which pairs are kept for training."""

    source_lang: str = field(metadata={"help": "Source language, as the corpus names it (for example ja)."})
    target_lang: str = field(metadata={"help": "Target language, as the corpus names it (for example en)."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A dataset on the Hub or in a folder. Or give files, below.", "aliases": ["--dataset"]},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Its configuration, where it has several."}
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "One jsonl, csv, tsv or parquet file, or two plain-text files (source, target), line by line.",
            "nargs": "+",
        },
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Likewise, for validation.", "nargs": "+"}
    )
    test_file: list[str] | None = field(default=None, metadata={"help": "Likewise, for the final test.", "nargs": "+"})
    source_column: str | None = field(
        default=None, metadata={"help": "Text column of the source, if there is no `translation` column."}
    )
    target_column: str | None = field(
        default=None, metadata={"help": "Text column of the target, if there is no `translation` column."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training corpus as a stream, without a copy on disk; needs max_steps."},
    )
    shuffle_buffer_size: int = field(default=10_000, metadata={"help": "Pairs held for shuffling when streaming."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training pairs."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many validation pairs."})
    max_source_length: int = field(
        default=256, metadata={"help": "Longest source in tokens; longer training pairs are left out."}
    )
    max_target_length: int = field(
        default=256, metadata={"help": "Longest target in tokens; longer training pairs are left out."}
    )
    max_length_ratio: float = field(
        default=9.0,
        metadata={"help": "Largest ratio of the sides' lengths in tokens (the default is Moses' clean-corpus-n)."},
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for tokenising."})

    def __post_init__(self) -> None:
        for name in ("max_source_length", "max_target_length", "shuffle_buffer_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_length_ratio < 1:
            raise ValueError(f"max_length_ratio must be at least 1, got {self.max_length_ratio}")
        if self.source_lang is not None and self.source_lang == self.target_lang:
            raise ValueError(f"source_lang and target_lang are both {self.source_lang!r}; name two languages")
        if (self.source_column is None) != (self.target_column is None):
            raise ValueError("source_column and target_column go together; give both or neither")

    def files(self, split: str) -> list[str] | None:
        return getattr(self, f"{split}_file")

    def has_split(self, split: str) -> bool:
        """Whether files or a dataset name were given for `split`; a named dataset may still lack the split."""
        return self.files(split) is not None or self.dataset_name is not None


@dataclass
class OptionalCorpusArguments(CorpusArguments):
    """Parallel text for what can do without: the languages need not be named where there is none."""

    source_lang: str | None = field(default=None, metadata={"help": "Source language, as the corpus names it."})
    target_lang: str | None = field(default=None, metadata={"help": "Target language, as the corpus names it."})


def load_split(args: CorpusArguments, split: str, streaming: bool = False) -> AnyDataset:
    """Load one split as a dataset with the text columns `source` and `target`, in the corpus's order.

    Args:
        args: where to look; `{split}_file` wins over `dataset_name`.
        split: `"train"`, `"validation"` or `"test"`.
        streaming: return an `IterableDataset` that reads as it goes.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: an unknown file type, a missing column or language, or sides of unequal length.
    """
    files = args.files(split)
    if files is not None:
        dataset = _load_files(files, split, streaming)
    elif args.dataset_name is not None:
        dataset = load_dataset(args.dataset_name, args.dataset_config_name, split=split, streaming=streaming)
    else:
        raise ValueError(f"no {split} data: give {split}_file or dataset_name")
    return select_text(dataset, args, where=f"the {split} split")


def _load_files(files: list[str], split: str, streaming: bool) -> AnyDataset:
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"{split}_file: there is no file {file!r}")
    suffixes = {Path(file).suffix for file in files}
    if len(files) == 2 and not suffixes & set(BUILDERS):
        check_same_length(*files)
        # Sizes and times are arguments so that `datasets` does not serve an edited file from its cache.
        stats = str([(Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in files])
        kwargs = {"source": files[0], "target": files[1], "stats": stats}
        if streaming:
            return IterableDataset.from_generator(_read_text_pair, gen_kwargs=kwargs)
        return Dataset.from_generator(_read_text_pair, gen_kwargs=kwargs)
    if len(suffixes) == 1 and suffixes <= set(BUILDERS):
        suffix = suffixes.pop()
        options = {"delimiter": "\t"} if suffix == ".tsv" else {}
        return load_dataset(BUILDERS[suffix], data_files=files, split="train", streaming=streaming, **options)
    raise ValueError(
        f"{split}_file takes {', '.join(BUILDERS)} files of one type, or two plain-text files (source, target); "
        f"got {' '.join(files)}"
    )


def _read_text_pair(source: str, target: str, stats: str) -> Iterator[dict[str, str]]:
    # newline="\n": a line ends there alone, not at the other characters that Unicode calls line ends.
    with (
        open(source, encoding="utf-8", newline="\n") as sources,
        open(target, encoding="utf-8", newline="\n") as lines,
    ):
        for source_line, target_line in zip(sources, lines, strict=True):
            yield {"source": source_line.rstrip("\r\n"), "target": target_line.rstrip("\r\n")}


def check_same_length(source: str, target: str) -> None:
    """Raise `ValueError` unless both plain-text files have the same number of lines."""
    with open(source, "rb") as sources, open(target, "rb") as targets:
        for number, pair in enumerate(zip_longest(sources, targets), start=1):
            if None in pair:
                shorter = source if pair[0] is None else target
                raise ValueError(
                    f"{source} and {target} are not parallel: {shorter} ends at line {number - 1}, the other goes on"
                )


def select_text(dataset: AnyDataset, args: CorpusArguments, where: str) -> AnyDataset:
    """Bring a dataset to the text columns `source` and `target`.

    Takes the columns that `source_column` and `target_column` name, else a `translation` column
    (`{"ja": …, "en": …}`), else columns named by the languages, else `source` and `target`.

    Raises:
        ValueError: names the missing column or language and those that there are.
    """
    columns = list(dataset.column_names or next(iter(dataset.take(1)), {}))
    languages = (args.source_lang, args.target_lang)
    if args.source_column is not None:
        names = (args.source_column, args.target_column)
        missing = [name for name in names if name not in columns]
        if missing:
            raise ValueError(f"{where} has no column {missing[0]!r}; its columns: {', '.join(columns)}")
    elif "translation" in columns:
        first = next(iter(dataset), None)
        missing = [lang for lang in languages if first is not None and lang not in first["translation"]]
        if missing:
            raise ValueError(
                f"{where} has no language {missing[0]!r}; its languages: {', '.join(first['translation'])}"
                " (source_lang and target_lang choose two)"
            )
        return dataset.map(_unpack_translation, fn_kwargs={"languages": languages}, remove_columns=columns)
    elif set(languages) <= set(columns):
        names = languages
    elif {"source", "target"} <= set(columns):
        names = ("source", "target")
    else:
        raise ValueError(
            f"{where} has neither a `translation` column nor columns {languages[0]!r} and {languages[1]!r}; its "
            f"columns: {', '.join(columns)}. Name the text columns with source_column and target_column"
        )
    others = [column for column in columns if column not in names]
    dataset = dataset.remove_columns(others)
    return dataset.rename_columns({o: n for o, n in zip(names, ("source", "target"), strict=True) if o != n})


def _unpack_translation(row: dict[str, Any], languages: tuple[str, str]) -> dict[str, str]:
    source, target = (row["translation"][language] for language in languages)
    return {"source": source, "target": target}


@dataclass
class PairFilter:
    """Says why a training pair is left out, if it is: emptiness, length, or the ratio of the lengths.

    Lengths are in tokens, the end of sentence included.
    """

    max_source_length: int
    max_target_length: int
    max_length_ratio: float

    def reason(self, source: str | None, target: str | None, source_length: int, target_length: int) -> str:
        """The reason for leaving the pair out, or `""` for a pair that is kept."""
        if not (source and source.strip()):
            return "empty source"
        if not (target and target.strip()):
            return "empty target"
        if source_length > self.max_source_length:
            return f"source over {self.max_source_length} tokens"
        if target_length > self.max_target_length:
            return f"target over {self.max_target_length} tokens"
        if max(source_length, target_length) > self.max_length_ratio * min(source_length, target_length):
            return f"length ratio over {self.max_length_ratio:g}"
        return ""


def encode_pairs(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, pair_filter: PairFilter) -> dict:
    """Tokenise a batch of text pairs and mark those to leave out, for `Dataset.map(batched=True)`."""
    sources, targets = ([text or "" for text in batch[side]] for side in ("source", "target"))
    input_ids = tokenizer(sources, verbose=False)["input_ids"]
    labels = tokenizer(text_target=targets, verbose=False)["input_ids"]
    reasons = [
        pair_filter.reason(source, target, len(source_ids), len(target_ids))
        for source, target, source_ids, target_ids in zip(sources, targets, input_ids, labels, strict=True)
    ]
    lengths = [max(len(source), len(target)) for source, target in zip(input_ids, labels, strict=True)]
    return {"input_ids": input_ids, "labels": labels, "length": lengths, "left_out": reasons}


def prepare_training_pairs(
    dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, args: CorpusArguments
) -> AnyDataset:
    """Tokenise and filter a training corpus.

    Args:
        dataset: text columns `source` and `target`, from `load_split`.
        tokenizer: encodes the target side by `text_target=`.
        args: the bounds of the filter.

    Returns:
        A dataset with `input_ids`, `labels` (token ids, both ending in end of sentence) and `length` (the longer
        side, in tokens). How many pairs were left out, and why, is logged; of a stream, as it goes.

    Raises:
        ValueError: nothing is left.
    """
    pair_filter = PairFilter(args.max_source_length, args.max_target_length, args.max_length_ratio)
    options = {
        "batched": True,
        "fn_kwargs": {"tokenizer": tokenizer, "pair_filter": pair_filter},
        "remove_columns": ["source", "target"],
    }
    if isinstance(dataset, IterableDataset):
        return _log_stream(dataset.map(encode_pairs, **options))
    encoded = dataset.map(encode_pairs, num_proc=args.preprocessing_num_workers, desc="Tokenising", **options)
    reasons = encoded["left_out"][:]
    log_left_out(Counter(filter(None, reasons)), len(encoded))
    kept = [index for index, reason in enumerate(reasons) if not reason]
    if not kept:
        raise ValueError(f"no training pair is left of {len(encoded)}; see the log for the reasons")
    return encoded.select(kept).remove_columns("left_out")


def _log_stream(encoded: IterableDataset) -> IterableDataset:
    """Leave out the marked rows of a stream and log their number so far: after 10 pairs, 100, 1,000 and so on."""
    counts: Counter = Counter()

    def keep(row: dict[str, Any]) -> bool:
        counts[row["left_out"]] += 1
        total = counts.total()
        if total >= 10 and total == 10 ** (len(str(total)) - 1):
            log_left_out(Counter({reason: count for reason, count in counts.items() if reason}), total)
        return not row["left_out"]

    return encoded.filter(keep).remove_columns("left_out")


def log_left_out(counts: Counter, total: int) -> None:
    """Log how many of `total` pairs were left out, and why."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) or "none"
    logger.info(f"Training pairs: {total - counts.total()} of {total} kept; left out: {reasons}")


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
