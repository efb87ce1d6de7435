"""Which translation a student learns from: the teacher's best, the one closest to the reference, with or without it.

The second half of sequence-level knowledge distillation (Kim & Rush 2016); the first is `teacher_corpus.py`.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset
from sacrebleu.metrics import BLEU, CHRF
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..metrics import bleu_tokenizer
from ..pipeline_rs_marian import is_written_without_blanks
from ..tokenization import encode
from ..utils.files import atomic_file
from ..utils.map_shards import METADATA_KEY, check_settings, read_record
from ..utils.ranges import check_range

logger = logging.get_logger(__name__)

TARGETS = ("best", "closest", "reference")
SIMILARITIES = ("bleu", "chrf")
NGRAM_ORDER = 4
TOO_LONG = "too long or cut"
TARGETS_SCHEMA = pa.schema({"source": pa.string(), "target": pa.string(), "origin": pa.string()})


@dataclass
class TargetArguments:
    """What the student learns from, and which translations of the teacher are left out."""

    targets: str = field(
        default="best",
        metadata={
            "help": "The teacher's best translation, the one of teacher_n_best that is closest to the reference "
            "(sequence interpolation), or the reference (word-level distillation alone: nothing is decoded).",
            "choices": list(TARGETS),
        },
    )
    similarity: str = field(
        default="bleu",
        metadata={"help": "Of a translation to the reference, sentence by sentence.", "choices": list(SIMILARITIES)},
    )
    add_references: bool = field(
        default=False, metadata={"help": "Learn from the reference too: each pair twice, distilled and original."}
    )
    max_repetitions: int = field(
        default=3,
        metadata={
            "help": "Leave out a translation in which one to four words (characters, in Japanese and its like) stand "
            "more than so many times in a row, unless they do in the reference; 0 switches this off."
        },
    )
    max_reference_ratio: float = field(
        default=3.0,
        metadata={
            "help": "Leave out a translation so many times as long as the reference, or as short, in words; 0 "
            "switches this off."
        },
    )
    keep_copies: bool = field(
        default=False, metadata={"help": "Keep translations that are the source itself, where the reference is not."}
    )

    def __post_init__(self) -> None:
        check_range(self, "max_repetitions", "max_reference_ratio", least=0)
        if self.max_reference_ratio != 0 and self.max_reference_ratio < 1:
            raise ValueError(f"max_reference_ratio must be 0 or at least 1, got {self.max_reference_ratio}")


def words(text: str, target_lang: str | None) -> list[str]:
    """What repetition and length are counted in: words; in languages without blanks characters, and numbers as one."""
    if is_written_without_blanks(target_lang):
        return re.findall(r"\d+|\S", text)
    return text.split()


def longest_repetition(tokens: Sequence[str]) -> int:
    """How many times in a row some sequence of one to `NGRAM_ORDER` tokens stands; 1 where none is repeated."""
    longest = min(1, len(tokens))
    for order in range(1, NGRAM_ORDER + 1):
        run = 0  # tokens in a row that are equal to the one `order` places before
        for position in range(order, len(tokens)):
            run = run + 1 if tokens[position] == tokens[position - order] else 0
            longest = max(longest, run // order + 1)
    return longest


def reason_to_leave_out(
    source: str, reference: str | None, translation: str | None, args: TargetArguments, target_lang: str | None
) -> str:
    """Why a teacher's translation is no good as a target, or `""`."""
    if not (translation and translation.strip()):
        return "no translation"
    given = words(translation, target_lang)
    wanted = words(reference or "", target_lang)
    repeated = longest_repetition(given)
    if args.max_repetitions and repeated > max(args.max_repetitions, longest_repetition(wanted)):
        return "repetition"
    ratio = max(len(given), len(wanted)) / max(1, min(len(given), len(wanted)))
    if args.max_reference_ratio and wanted and ratio > args.max_reference_ratio:
        return "length"
    same = [" ".join(text.split()).casefold() for text in (source, translation, reference or "")]
    if not args.keep_copies and same[0] == same[1] != same[2]:
        return "copy of the source"
    return ""


def closest_to_reference(hypotheses: Sequence[str], reference: str, metric: BLEU | CHRF) -> str:
    """The hypothesis of the highest sentence score against the reference; of equals the one that comes first."""
    return max(hypotheses, key=lambda text: metric.sentence_score(text, [reference]).score)


def choose_targets(
    batch: Mapping[str, list],
    args: TargetArguments,
    target_lang: str | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    longest: int | None = None,
) -> dict[str, list]:
    """Rows of a teacher's corpus to training rows, for `Dataset.map(batched=True)`.

    Takes `source`, `target` (the reference) and `hypotheses`; returns `source`, `target`, `origin` (`distilled` or
    `reference`) and `left_out` (the reason, or `""`). `tokenizer` and `longest` are those of `write_targets`.
    """
    metric = {"bleu": BLEU(effective_order=True, tokenize=bleu_tokenizer(target_lang)), "chrf": CHRF()}[
        args.similarity
    ]
    rows: dict[str, list] = {"source": [], "target": [], "origin": [], "left_out": []}

    def add(source: str, target: str | None, origin: str, left_out: str) -> None:
        for name, value in zip(rows, (source, target, origin, left_out), strict=True):
            rows[name].append(value)

    for source, reference, hypotheses in zip(batch["source"], batch["target"], batch["hypotheses"], strict=True):
        chosen = next(iter(hypotheses), None)
        if args.targets == "closest" and reference and len(hypotheses) > 1:
            chosen = closest_to_reference(hypotheses, reference, metric)
        add(source, chosen, "distilled", reason_to_leave_out(source, reference, chosen, args, target_lang))
        if args.add_references:
            add(source, reference, "reference", "")
    if longest is not None:
        made = [
            row for row, origin in enumerate(rows["origin"]) if origin == "distilled" and not rows["left_out"][row]
        ]
        ids = encode(tokenizer, [rows["target"][row] for row in made], target=True)
        for row, each in zip(made, ids, strict=True):
            rows["left_out"][row] = TOO_LONG if len(each) > longest else ""
    return rows


def write_targets(
    corpus: str | Path,
    output: str | Path,
    args: TargetArguments,
    target_lang: str | None,
    num_proc: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    longest: int | None = None,
) -> dict[str, Any]:
    """Choose and filter the targets of a teacher's corpus into a parquet file; one that is there already is kept.

    Args:
        corpus: the file that `generate_corpus` wrote.
        output: the training pairs, with columns `source`, `target` and `origin`, in the corpus's order.
        args: the choice and the filters.
        target_lang: says whether lengths and repetitions are counted in words or characters.
        num_proc: processes.
        tokenizer: the teacher's, which counts for `longest`.
        longest: a translation of more tokens, the end of sentence included, is left out: it may have been cut.

    Returns:
        The record that the file's metadata hold: `settings`, `corpus` (digest of the corpus's record), `pairs`,
        `distilled`, `left_out` (reason: count).

    Raises:
        ValueError: the output was made from another corpus or with other settings; or nothing is left.
        FileNotFoundError: there is no such corpus.
    """
    corpus, output = Path(corpus), Path(output)
    if not corpus.is_file():
        raise FileNotFoundError(f"there is no teacher's corpus {str(corpus)!r}: the stage generate makes it")
    if output.exists():
        return check_targets(output, corpus, args, target_lang, longest)
    digest = corpus_digest(corpus)
    dataset = load_dataset("parquet", data_files=str(corpus), split="train")
    output.parent.mkdir(parents=True, exist_ok=True)
    for staged in output.parent.glob(f"{output.name}.*.tmp"):
        staged.unlink()  # left by a kill
    chosen = dataset.map(
        partial(choose_targets, args=args, target_lang=target_lang, tokenizer=tokenizer, longest=longest),
        batched=True,
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        desc="Choosing targets",
    )
    counts: Counter = Counter()
    origins: Counter = Counter()
    with atomic_file(output) as staged, pq.ParquetWriter(staged, TARGETS_SCHEMA) as writer:
        for table in chosen.with_format("arrow").iter(10_000):
            counts.update(table["left_out"].to_pylist())
            kept = table.filter(pc.equal(table["left_out"], "")).select(TARGETS_SCHEMA.names)
            origins.update(kept["origin"].to_pylist())
            writer.write_table(kept.cast(TARGETS_SCHEMA))
        del counts[""]
        shown = ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) or "none"
        if not origins["distilled"]:
            raise ValueError(f"no translation of the teacher is left of {len(dataset)}: {shown}. Loosen the filters")
        record = {
            "settings": _settings(args, target_lang, longest),
            "corpus": digest,
            "pairs": origins.total(),
            "distilled": origins["distilled"],
            "left_out": dict(sorted(counts.items())),
        }
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(record)})
    logger.info(f"Targets: {record['pairs']} pairs of {len(dataset)} sources; left out: {shown}")
    return record


def corpus_digest(corpus: str | Path) -> str:
    """SHA-256 of a corpus's record, which has the digests of its shards' sources."""
    return hashlib.sha256(json.dumps(read_record(corpus), sort_keys=True).encode()).hexdigest()


def _settings(args: TargetArguments, target_lang: str | None, longest: int | None) -> dict[str, Any]:
    bound = {} if longest is None else {"longest": longest}
    return {**asdict(args), "target_lang": target_lang, **bound}


def check_targets(
    file: str | Path,
    corpus: str | Path,
    args: TargetArguments,
    target_lang: str | None,
    longest: int | None = None,
) -> dict[str, Any]:
    """The record of a file of targets.

    Raises:
        ValueError: it was made with other settings, or from another corpus than the one that is there.
        FileNotFoundError: there is none.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"there are no targets {str(file)!r}: the stage filter makes them")
    record = read_record(file)
    check_settings(file, record["settings"], _settings(args, target_lang, longest))
    if Path(corpus).is_file() and record["corpus"] != corpus_digest(corpus):
        raise ValueError(f"{file} was made from another corpus: remove it, or choose another output_dir")
    return record


def load_targets(
    file: str | Path, corpus: str | Path, args: TargetArguments, target_lang: str | None, longest: int | None = None
) -> Dataset:
    """The training pairs that `write_targets` wrote, columns `source` and `target`; raises as `check_targets`."""
    check_targets(file, corpus, args, target_lang, longest)
    return load_dataset("parquet", data_files=str(file), split="train").select_columns(["source", "target"])
