"""Make training pairs of monolingual text: a model translates it back, or a teacher forwards.

    rs-transformer synthesize --monolingual_file news.en --source_lang ja --target_lang en \\
        --teachers runs/en_ja --output_dir runs/back_translated
    rs-transformer train training/recipes/tanaka_rs6.yaml --synthetic_file runs/back_translated/pairs.parquet
    rs-transformer synthesize --monolingual_file news.ja --side source --source_lang ja --target_lang en \\
        --teacher_command "marian-decoder -c teacher.yml" --output_dir runs/translated

The languages are those of the model that is to learn. Text of its target language (`--side target`) is translated back
by a model of the other direction (Sennrich et al. 2016), and each source begins with `>>bt<<`, so that the model tells
it from what people have written (Caswell et al. 2019). Text of its source language (`--side source`) is translated by
a teacher; such pairs may be all that a training has (`--train_file`). The output folder holds `pairs.parquet`, and
`synthesis.json`, with models, settings and what was left out. The same command goes on where it was stopped; several
processes share the text.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset, disable_progress_bars
from transformers.utils import logging

from ..corpus import CorpusArguments, read_sentences
from ..distillation.targets import TargetArguments, write_targets
from ..distillation.teacher_corpus import generate_corpus
from ..distillation.teachers import TeacherArguments, load_teachers, longest_uncut
from ..pipeline_rs_marian import BACK_TRANSLATED
from ..training.run_folder import RUN_LOG
from ..utils.console import log_to, set_up_logging
from ..utils.files import atomic_file, claimed, write_json
from ..utils.map_shards import read_record
from ..utils.processes import PatientGroup, run
from ..utils.ranges import check_range
from ..utils.recipes import RecipeParser

logger = logging.get_logger(__name__)

GO_ON = "the same command goes on where it was stopped"

SIDES = ("target", "source")
PAIRS, RECORD = "pairs.parquet", "synthesis.json"


@dataclass
class SynthesisArguments:
    """Which text to translate, and where the pairs go."""

    monolingual_file: str = field(
        metadata={"help": "Plain text, a sentence a line; or jsonl, csv, tsv, parquet with text_column."}
    )
    output_dir: str = field(metadata={"help": "The folder for the pairs."})
    source_lang: str = field(metadata={"help": "Source language of the model that is to learn (for example ja)."})
    target_lang: str = field(metadata={"help": "Its target language."})
    side: str = field(
        default="target",
        metadata={
            "help": "The text is of the target language, to be translated back, or of the source language.",
            "choices": list(SIDES),
        },
    )
    text_column: str = field(
        default="text", metadata={"help": "Text column of a file that is not plain text (text, translation.en)."}
    )
    lowercase: bool = field(default=False, metadata={"help": "Lower-case the text, for models that know no other."})
    tag: bool = field(
        default=True, metadata={"help": f"Begin sources that were translated back with {BACK_TRANSLATED}."}
    )
    max_source_length: int = field(
        default=256, metadata={"help": "Longest text in tokens of the translating model; longer ones are left out."}
    )
    max_target_length: int = field(
        default=256, metadata={"help": "Longest translation in its tokens, likewise; those that were cut, too."}
    )

    def __post_init__(self) -> None:
        check_range(self, "max_source_length", "max_target_length", least=1)
        if self.source_lang == self.target_lang:
            raise ValueError(f"source_lang and target_lang are both {self.source_lang!r}; name two languages")

    def translated(self) -> CorpusArguments:
        """The corpus that the teachers translate: its source is the text."""
        languages = (self.source_lang, self.target_lang)
        source, target = languages if self.side == "source" else languages[::-1]
        return CorpusArguments(
            source_lang=source,
            target_lang=target,
            max_source_length=self.max_source_length,
            max_target_length=self.max_target_length,
        )


def synthesize(args: SynthesisArguments, teacher_args: TeacherArguments, filters: TargetArguments) -> dict[str, Any]:
    """Translate monolingual text into training pairs; returns the record that `synthesis.json` holds.

    Each sentence is taken once, blank ones not at all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an option, a model or the text is wrong, or the folder holds pairs that were made otherwise.
        OSError: the disk is full; what is translated stays.
    """
    lengths = ("max_source_length", "max_target_length")
    if teacher_args.program and any(getattr(args, name) != getattr(SynthesisArguments, name) for name in lengths):
        raise ValueError(
            "max_source_length and max_target_length count the tokens of a model, and teacher_command is a program: "
            "leave them out; the training has its own"
        )
    if teacher_args.teacher_mode == "pool" and len(teacher_args.teachers) > 1:
        raise ValueError(
            "teacher_mode=pool has several translations of a sentence, and one is kept: name one teacher, or set "
            "teacher_mode=ensemble"
        )
    folder, group, corpus = Path(args.output_dir), PatientGroup(), args.translated()
    texts = read_sentences(args.monolingual_file, args.text_column, "monolingual_file")
    if args.lowercase:
        texts = [text.lower() for text in texts]
    texts = [text for text in dict.fromkeys(texts) if text.strip()]
    if not texts:
        raise ValueError(f"{args.monolingual_file} has no sentence in it")
    teachers = load_teachers(teacher_args, corpus)
    # There is no reference, which the filters leave out of their rules.
    dataset = Dataset.from_dict({"source": texts, "target": [""] * len(texts)})
    folder.mkdir(parents=True, exist_ok=True)
    translated, targets = folder / "translated.parquet", folder / "targets.parquet"
    with claimed(folder / PAIRS, PartialState().is_main_process):
        if PartialState().is_main_process:
            log_to(folder / RUN_LOG)
        generate_corpus(dataset, teachers, teacher_args, corpus, translated)
        with group.main_process_first():
            bound = longest_uncut(teachers, teacher_args, corpus)
            if bound:
                bound["longest"] = min(bound["longest"], corpus.max_target_length)
            record = write_targets(translated, targets, filters, corpus.target_lang, **bound)
        record = {
            "pairs": record["pairs"],
            "sentences": len(texts),
            "left_out": record["left_out"],
            "side": args.side,
            "tag": BACK_TRANSLATED if args.tag and args.side == "target" else None,
            "corpus": {name: value for name, value in read_record(translated).items() if name != "digests"},
        }
        if PartialState().is_main_process:
            write_pairs(targets, folder / PAIRS, args.side, record["tag"])
            write_json(record, folder / RECORD)
    left_out = ", ".join(f"{count} {reason}" for reason, count in record["left_out"].items()) or "none"
    PartialState().print(f"{folder / PAIRS}: {record['pairs']:,} of {len(texts):,} sentences; left out: {left_out}")
    return record


def write_pairs(targets: Path, output: Path, side: str, tag: str | None) -> None:
    """Bring texts and their translations to the sides that they have in the training."""
    text, translation = (pq.read_table(targets)[name] for name in ("source", "target"))
    source, target = (text, translation) if side == "source" else (translation, text)
    if tag:
        source = pc.binary_join_element_wise(tag, source, " ")
    with atomic_file(output) as staged:
        pq.write_table(pa.table({"source": source, "target": target}), staged)


def main(argv: list[str] | None = None) -> None:
    set_up_logging(PartialState().is_local_main_process)
    disable_progress_bars()
    # What needs a reference to choose by.
    unused = ("targets", "similarity", "add_references", "max_reference_ratio", "teacher_n_best", "skip_empty_sources")
    parser = RecipeParser((SynthesisArguments, TeacherArguments, TargetArguments), unused=unused, description=__doc__)
    synthesize(*parser.parse_recipe(argv))


if __name__ == "__main__":
    run(main, GO_ON)
