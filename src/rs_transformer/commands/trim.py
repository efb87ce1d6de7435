"""Trim a Marian model, such as an OPUS-MT checkpoint, to the part of its vocabulary that a text needs.

    rs-transformer trim --model_name_or_path Helsinki-NLP/opus-mt-ja-en --output_dir runs/trimmed \\
        --vocabulary_files data/tanaka/train.jsonl --source_lang ja --target_lang en
    rs-transformer trim --model_name_or_path Helsinki-NLP/opus-mt-ja-en --output_dir runs/trimmed \\
        --vocabulary_source_files news.ja --vocabulary_target_files news.en --max_vocabulary 16000

The output folder holds model, tokenizer, generation config and `trim.json`, which says what is left. Text whose pieces
are all left is translated as before; in other text the missing pieces fall apart into smaller ones.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import disable_progress_bars
from tqdm.auto import tqdm
from transformers import MarianMTModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoints import commit_of, load_parent, model_digest
from ..corpus import CorpusArguments, OptionalCorpusArguments, load_pairs, read_sentences
from ..layer_transfer import count_parameters
from ..tokenization import check_language_pair
from ..training.run_folder import RECORDED_PACKAGES
from ..utils.files import check_output, staged_folder, write_json
from ..utils.processes import PatientGroup, run
from ..utils.ranges import check_range
from ..utils.recipes import RecipeParser
from ..utils.text_files import digest, form_of
from ..vocabulary import (
    CHARACTERS,
    TEXT_SIDES,
    TrimPlan,
    apply_trim,
    count_pieces,
    embedding_rows,
    plan_trim,
    removed_entries,
)

logger = logging.get_logger(__name__)

Texts = dict[str, list[str]]
RECORD = "trim.json"
TEXT_COLUMN = "text"


@dataclass
class TrimArguments:
    """What to trim, and where to write it."""

    model_name_or_path: str = field(metadata={"help": "A Marian or RSMarian model, on the Hub or in a folder."})
    output_dir: str = field(metadata={"help": "The folder to make. There must be nothing in it."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    allow_pickle: bool = field(
        default=False, metadata={"help": "Read pytorch_model.bin too, which can run code of whoever made it."}
    )


@dataclass
class VocabularyArguments:
    """The text that the vocabulary is trimmed to, and how far."""

    vocabulary_files: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parallel text whose pieces stay in the vocabulary; files as for train_file: jsonl, csv, tsv or "
            "parquet, or two plain-text files (source, target).",
            "nargs": "+",
        },
    )
    vocabulary_source_files: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text of the source language alone, beside those or in their place: plain text, a sentence a "
            f"line, or jsonl, csv, tsv or parquet with a column {TEXT_COLUMN!r}.",
            "nargs": "+",
        },
    )
    vocabulary_target_files: list[str] | None = field(
        default=None, metadata={"help": "Likewise of the target language.", "nargs": "+"}
    )
    vocabulary_coverage: float = field(
        default=1.0,
        metadata={
            "help": "Share of each side's tokens that the most frequent pieces stay for; 1: all pieces that occur."
        },
    )
    vocabulary_characters: str = field(
        default="all",
        metadata={
            "help": "Single characters that stay: all that the model knows, so that it can spell what it could, or "
            "those of the text.",
            "choices": list(CHARACTERS),
        },
    )
    max_vocabulary: int | None = field(
        default=None,
        metadata={
            "help": "Entries at most, of each vocabulary where there are two; those go that the text is "
            "spelled best without."
        },
    )

    def __post_init__(self) -> None:
        check_range(self, "vocabulary_coverage", above=0, most=1)
        check_range(self, "max_vocabulary", least=1)
        one_side = [side for side in TEXT_SIDES if self.side_files(side)]
        if not self.vocabulary_files and len(one_side) == 1:
            (missing,) = set(TEXT_SIDES) - set(one_side)
            raise ValueError(f"there is no {missing} text: give vocabulary_{missing}_files too, or vocabulary_files")
        changed = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
        if changed and not self.files:
            raise ValueError(f"{changed[0]} needs text to trim the vocabulary to: give vocabulary_files")

    def side_files(self, side: str) -> list[str]:
        return getattr(self, f"vocabulary_{side}_files") or []

    @property
    def files(self) -> list[str]:
        """All that were given; none: nothing is to be trimmed."""
        return [*(self.vocabulary_files or []), *(file for side in TEXT_SIDES for file in self.side_files(side))]

    def trim_options(self) -> dict[str, Any]:
        """What `plan_trim` takes."""
        return {
            "coverage": self.vocabulary_coverage,
            "characters": self.vocabulary_characters,
            "max_vocabulary": self.max_vocabulary,
        }


def trim_checkpoint(
    args: TrimArguments, vocabulary_args: VocabularyArguments, corpus_args: CorpusArguments
) -> dict[str, Any]:
    """Trim a checkpoint into a folder with model, tokenizer, generation config and `trim.json`.

    Every input is checked before anything is written, and the folder gets its name when it is complete.

    Returns:
        What is in `trim.json`.

    Raises:
        FileExistsError: there is something in the output folder.
        ValueError, OSError: the model or the text does not fit, or is not there, or nothing is left to remove; the
            message says which.
    """
    output = Path(args.output_dir)
    check_output(output)
    if not vocabulary_args.files:
        raise ValueError("there is no text to trim the vocabulary to: give vocabulary_files")
    texts = read_texts(vocabulary_args, corpus_args)
    parent, tokenizer = load_parent(args.model_name_or_path, args.revision, args.allow_pickle)
    check_language_pair(tokenizer, corpus_args.source_lang, corpus_args.target_lang)
    plan = plan_texts(parent, tokenizer, texts, vocabulary_args)
    before = embedding_rows(parent)
    if not any(removed_entries(parent, plan).values()):
        raise ValueError(
            f"nothing is left to remove: the vocabulary of {args.model_name_or_path} has {before['target']} entries, "
            "and the text needs all of them. Lower vocabulary_coverage or max_vocabulary, or give less text"
        )

    return write_trimmed(args, parent, tokenizer, plan, trim_record(parent, tokenizer, plan, vocabulary_args))


def write_trimmed(
    args: TrimArguments,
    parent: MarianMTModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: TrimPlan,
    trimming: dict[str, Any],
) -> dict[str, Any]:
    """Write what a plan leaves of a model into a new folder; called by all processes.

    Args:
        trimming: what is recorded of the plan.

    Returns:
        What is in `trim.json`.
    """
    output, group = Path(args.output_dir), PatientGroup()
    group.wait()  # no process may find what another has written already
    record: dict[str, Any] = {}
    if PartialState().is_main_process:
        trimmed, its_tokenizer = apply_trim(parent, tokenizer, plan)
        record = {
            "parent": args.model_name_or_path,
            "revision": args.revision,
            "commit": commit_of(args.model_name_or_path, args.revision),
            "parent_digest": model_digest(parent, tokenizer),
            **trimming,
            "parameters": {"parent": count_parameters(parent), "trimmed": count_parameters(trimmed)},
            "versions": {name: version(name) for name in RECORDED_PACKAGES},
        }
        with staged_folder(output) as staging:
            trimmed.save_pretrained(staging)
            its_tokenizer.save_pretrained(staging)
            write_json(record, staging / RECORD)
        sizes = {kind: counted["total"] for kind, counted in record["parameters"].items()}
        print(
            f"{args.output_dir}: {in_words(record)}; {sizes['trimmed']:,} of {sizes['parent']:,} parameters",
            flush=True,
        )
    group.wait()
    return record


def read_texts(args: VocabularyArguments, corpus_args: CorpusArguments) -> Texts:
    """The sentences of each side that the options name.

    Raises:
        FileNotFoundError, ValueError: a file is not there, or not what its name says, or nobody said which columns to
            read.
    """
    texts: Texts = {side: [] for side in TEXT_SIDES}
    if files := args.vocabulary_files:
        languages = (corpus_args.source_lang, corpus_args.target_lang)
        if None in languages and corpus_args.source_column is None and form_of(files[0]):
            raise ValueError(f"vocabulary_files: {files[0]} has columns: give source_lang and target_lang")
        pairs = load_pairs(files, corpus_args, "vocabulary", "vocabulary_files")
        for side in TEXT_SIDES:
            texts[side] += filter(None, pairs[side])
    for side in TEXT_SIDES:
        for file in args.side_files(side):
            texts[side] += read_sentences(file, TEXT_COLUMN, f"vocabulary_{side}_files")
    return texts


def plan_texts(
    model: MarianMTModel, tokenizer: PreTrainedTokenizerBase, texts: Texts, args: VocabularyArguments
) -> TrimPlan:
    """What `plan_trim` keeps of a model for these texts, with a bar for each side."""
    return plan_trim(model, tokenizer, *(_with_bar(texts[side], side) for side in TEXT_SIDES), **args.trim_options())


def _with_bar(texts: Iterable[str], side: str) -> Iterator[str]:
    disable = None if PartialState().is_main_process else True
    yield from tqdm(texts, desc=f"Counting pieces, {side}", unit=" sentences", disable=disable, leave=False)


def trim_record(
    parent: MarianMTModel, tokenizer: PreTrainedTokenizerBase, plan: TrimPlan, args: VocabularyArguments
) -> dict[str, Any]:
    """What is recorded of a trimming: the text, the options, and the sizes of each side (`trimmed_sizes`)."""
    return {
        "text": {name: value for name, value in asdict(args).items() if name.endswith("_files") and value},
        "text_digest": digest(args.files),
        **args.trim_options(),
        **trimmed_sizes(parent, tokenizer, plan),
    }


def trimmed_sizes(parent: MarianMTModel, tokenizer: PreTrainedTokenizerBase, plan: TrimPlan) -> dict[str, Any]:
    """Whether there are two vocabularies, and the sizes of each side before and after.

    `entries` are rows of the embeddings, `pieces` those of the SentencePiece model, `covered` is the share of the
    text's known tokens whose entries are left.
    """
    rows, pieces = embedding_rows(parent), count_pieces(tokenizer)
    sides = {
        side: {
            "entries": {"parent": rows[side], "trimmed": len(plan.ids[side])},
            "pieces": {"parent": pieces[side], "trimmed": plan.pieces[side]},
            "covered": plan.covered[side],
        }
        for side in TEXT_SIDES
    }
    return {"separate_vocabs": tokenizer.separate_vocabs, **sides}


def in_words(record: dict[str, Any]) -> str:
    """The sizes of a record for the screen."""
    source, target = (record[side]["entries"] for side in TEXT_SIDES)
    sides = [("vocabulary", source)]
    if record["separate_vocabs"]:
        sides = [("source vocabulary", source), ("target", target)]
    sizes = ", ".join(f"{what} {size['trimmed']:,} of {size['parent']:,} entries" for what, size in sides)
    covered = " and ".join(f"{record[side]['covered']:.2%} of the {side}" for side in TEXT_SIDES)
    return f"{sizes}, for {covered} tokens"


# Of a corpus, this reads all, and only text.
READ = ("source_lang", "target_lang", "source_column", "target_column")
UNUSED = tuple(option.name for option in fields(OptionalCorpusArguments) if option.name not in READ)


def main(argv: list[str] | None = None) -> None:
    disable_progress_bars()
    parser = RecipeParser(
        (TrimArguments, VocabularyArguments, OptionalCorpusArguments), unused=UNUSED, description=__doc__
    )
    trim_checkpoint(*parser.parse_recipe(argv))


if __name__ == "__main__":
    run(main)
