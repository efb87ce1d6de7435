"""Write a checkpoint for another engine, and verify it by translating on both sides.

    rs-transformer export runs/tanaka_rs6 --to ctranslate2 --quantization int8 --output_dir rs6-ct2 \\
        --test_file data/tanaka/test.jsonl --source_lang ja --target_lang en
    rs-transformer export runs/tanaka_rs6 --to transformers --output_dir rs6-marian --verify sentences.ja
    rs-transformer export runs/tanaka_rs6 --to ctranslate2 --output_dir rs6-ct2 --shortlist \\
        --train_file data/tanaka/train.jsonl --test_file data/tanaka/test.jsonl --source_lang ja --target_lang en

With a shortlist, which is made of training pairs, an engine looks only at target pieces that the source can become.
The folder is there only if the translations are PyTorch's; `export.json` in it says how many are.
"""

import importlib.util
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from ..attention.alignment import count_links
from ..checkpoints import (
    MODEL_TYPES,
    Translator,
    coded_sources,
    load_config,
    load_tokenizer,
    load_translator,
    load_with_tokenizer,
    model_digest,
)
from ..corpus import SPLITS, TRAINING_OPTIONS, OptionalCorpusArguments, load_split, read_sentences
from ..decoding import DecodingArguments, Engine, TransformersEngine, decode_all, encode_sources, source_limit
from ..export import TARGETS, install, is_installed, load_engine, version_of
from ..metrics import corpus_scores
from ..shortlist import Shortlist, ShortlistEngine, coverage, make_shortlist
from ..tokenization import check_language_pair, encode, entries_of
from ..utils.files import check_output, staged_folder, write_json
from ..utils.processes import run
from ..utils.ranges import check_range
from ..utils.recipes import RecipeParser

# Without a length penalty, since engines count lengths differently.
SEARCHES = ({"num_beams": 1, "length_penalty": 0.0}, {"num_beams": 4, "length_penalty": 0.0})
MIN_SAME_QUANTIZED = 0.5
MOST_UNKNOWN = 0.25  # share of a corpus's pieces from which on it is of another language: blanks are known to all


@dataclass
class ExportArguments:
    """Which checkpoint is written for which engine, and how it is verified."""

    model_name_or_path: str = field(
        metadata={"help": "An RSMarian or Marian model; may stand first, without its name."}
    )
    to: str = field(metadata={"help": "The engine.", "choices": list(TARGETS)})
    output_dir: str = field(metadata={"help": "Where to write; must not exist or be empty."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    quantization: str = field(default="float32", metadata={"help": "Of the stored weights; each engine has its own."})
    verify: list[str] | None = field(
        default=None,
        metadata={
            "help": "Source sentences, or a file of them, that both sides translate; or give a dataset.",
            "nargs": "+",
        },
    )
    verification: bool = field(default=True, metadata={"help": "Translate on both sides; a mismatch is an error."})
    min_same: float | None = field(
        default=None,
        metadata={"help": "Share of translations that must be PyTorch's; default: 1, and 0.5 where it is quantised."},
    )
    split: str = field(default="test", metadata={"help": "What to translate of a dataset.", "choices": list(SPLITS)})
    shortlist: bool = field(
        default=False,
        metadata={"help": "Write a lexical shortlist (ctranslate2, marian) that is made of the train split."},
    )
    shortlist_candidates: int = field(
        default=100, metadata={"help": "Target pieces of a source piece in the shortlist, at most."}
    )
    shortlist_frequent: int = field(
        default=100, metadata={"help": "The most frequent target pieces, which every sentence has, so many."}
    )
    shortlist_min_probability: float = field(
        default=0.0, metadata={"help": "Least probability of a target piece given the source piece."}
    )

    def __post_init__(self) -> None:
        check_range(self, "min_same", "shortlist_min_probability", least=0, most=1)
        check_range(self, "shortlist_candidates", "shortlist_frequent", least=0)


def export_checkpoint(
    args: ExportArguments, corpus_args: OptionalCorpusArguments, decoding: DecodingArguments
) -> dict[str, Any]:
    """Write a checkpoint for another engine; the folder gets its name once its translations are verified.

    Returns:
        What is also in `export.json` of the folder: `arguments`, `model_digest` (of what was exported), `megabytes`,
        `versions`, and `verification`: for each search `num_beams`, `sentences`, `same` (share of translations that
        are PyTorch's), `bleu_to_pytorch` (with PyTorch's translations as references), with references `bleu` and
        `pytorch_bleu`, and `bleu_signature`. With a shortlist both sides use it, and `without_shortlist` of each
        search has what `compare_without` returns; `shortlist` has `pairs` (of which it was made), and where it is
        verified what `coverage` returns.

    Raises:
        ValueError: a target, quantization or model that do not fit, nothing to verify with, or translations that
            differ from PyTorch's more than `min_same` allows.
        FileExistsError: `output_dir` is there already.
    """
    output = Path(args.output_dir)
    check_output(output)
    engine = load_engine(args.to)
    if args.verification and not is_installed(args.to):
        raise ValueError(f"to={args.to} needs: {install(args.to)}, to verify what it writes; or verification=false")
    if args.quantization not in engine.QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(engine.QUANTIZATIONS)}, got {args.quantization!r}")
    config = load_config(args.model_name_or_path, args.revision)
    if config.model_type not in MODEL_TYPES or (args.to == "transformers" and config.model_type != "rs_marian"):
        raise ValueError(
            f"{args.model_name_or_path} is a {config.model_type} model, which is not exported to {args.to}"
        )
    if args.shortlist and not hasattr(engine, "write_shortlist"):
        raise ValueError(f"there is no shortlist for to={args.to}, only for ctranslate2 and marian")
    sources, references = _verification_data(args, corpus_args)
    languages = (corpus_args.source_lang, corpus_args.target_lang)
    if corpus_args.target_lang is not None:
        tokenizer = load_tokenizer(args.model_name_or_path, args.revision)
        sources, _ = coded_sources(args.model_name_or_path, tokenizer, sources, *languages)
    shortlist = None
    if args.shortlist:
        shortlist, pairs = corpus_shortlist(args, corpus_args)
    with staged_folder(output) as folder:
        engine.convert(args.model_name_or_path, folder, args.quantization, args.revision)
        if shortlist is not None:
            engine.write_shortlist(shortlist, folder, load_tokenizer(args.model_name_or_path, args.revision))
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        packages = dict.fromkeys(("rs-transformer", "transformers", TARGETS[args.to]))
        found = [name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is not None]
        record: dict[str, Any] = {
            "arguments": asdict(args) | asdict(corpus_args) | asdict(decoding),
            "model_digest": model_digest(*load_with_tokenizer(args.model_name_or_path, args.revision)),
            "megabytes": size / 1e6,
            "versions": {name: version_of(name) for name in found},
            "verification": [],
        }
        if shortlist is not None:
            record["shortlist"] = {"pairs": pairs}
        if args.verification:
            translator = load_translator(args.model_name_or_path, args.revision)
            if shortlist is not None:
                record["shortlist"] |= _coverage(translator, shortlist, sources, references)
            record["verification"] = verify(
                args, engine, folder, sources, references, decoding, translator, shortlist, corpus_args.target_lang
            )
        write_json(record, folder / "export.json")
    print_export(record)
    return record


def _verification_data(
    args: ExportArguments, corpus_args: OptionalCorpusArguments
) -> tuple[list[str], list[str] | None]:
    """Sources, and references if there are any."""
    if not args.verification:
        return [], None
    given = corpus_args.files(args.split) is not None
    if (args.verify is None and not corpus_args.has_split(args.split)) or (args.verify is not None and given):
        raise ValueError(
            f"give source sentences to verify with (verify), or a dataset ({args.split}_file or dataset_name), not "
            "both; or verification=false"
        )
    if args.verify is None:
        if None in (corpus_args.source_lang, corpus_args.target_lang):
            raise ValueError("a dataset to verify with needs source_lang and target_lang")
        dataset = load_split(corpus_args, args.split)
        if not len(dataset):
            raise ValueError(f"the {args.split} split to verify with is empty")
        return dataset["source"][:], dataset["target"][:]
    if len(args.verify) == 1 and os.path.isfile(args.verify[0]):  # a sentence is too long a name for `Path`
        return read_sentences(args.verify[0], corpus_args.source_column or "source"), None
    return args.verify, None


def corpus_shortlist(args: ExportArguments, corpus_args: OptionalCorpusArguments) -> tuple[Shortlist, int]:
    """A shortlist from the train split, aligned by the model's own attention, and of how many pairs it is made.

    Pairs with a blank side, or one that is longer than the model takes, are left out.

    Raises:
        ValueError: there is no train split or no pair in it, or it is of other languages than the model's.
    """
    if not corpus_args.has_split("train") or None in (corpus_args.source_lang, corpus_args.target_lang):
        raise ValueError(
            "a shortlist is made of a corpus: give train_file or dataset_name, source_lang and target_lang"
        )
    pairs = load_split(corpus_args, "train")
    model, tokenizer = load_translator(args.model_name_or_path, args.revision)
    check_language_pair(tokenizer, corpus_args.source_lang, corpus_args.target_lang)
    texts = [pair for pair in zip(pairs["source"], pairs["target"], strict=True) if all(t and t.strip() for t in pair)]
    sources, targets = ([pair[side] for pair in texts] for side in (0, 1))
    languages = (corpus_args.source_lang, corpus_args.target_lang)
    sources, _ = coded_sources(args.model_name_or_path, tokenizer, sources, *languages)
    sides = [encode(tokenizer, sources), encode(tokenizer, targets, target=True)]
    limit = source_limit(model, tokenizer)
    kept = [pair for pair in zip(*sides, strict=True) if max(map(len, pair)) <= limit]
    if not kept:
        raise ValueError(f"the train split has no pair for a shortlist: all of its {len(pairs)} are blank or too long")
    source_ids, target_ids = zip(*kept, strict=True)
    for side, rows in (("source", source_ids), ("target", target_ids)):
        unknown = entries_of(tokenizer, side).get(tokenizer.unk_token)
        counts = Counter(chain.from_iterable(rows))
        share = counts[unknown] / (counts.total() - len(rows))  # of all but the ends
        if share > MOST_UNKNOWN:
            raise ValueError(
                f"{share:.0%} of the pieces of the train split's {side} are unknown to the model: are they of its "
                f"language, {getattr(tokenizer, f'{side}_lang', None)}?"
            )
    links = count_links(model, tokenizer, source_ids, target_ids)
    frequencies = Counter(chain.from_iterable(target_ids))
    shortlist = make_shortlist(
        tokenizer,
        links,
        frequencies,
        candidates=args.shortlist_candidates,
        frequent=args.shortlist_frequent,
        min_probability=args.shortlist_min_probability,
    )
    return shortlist, len(kept)


def _coverage(
    translator: Translator, shortlist: Shortlist, sources: Sequence[str], references: Sequence[str] | None
) -> dict[str, float]:
    model, tokenizer = translator
    target_ids = None if references is None else encode(tokenizer, references, target=True)
    return coverage(tokenizer, shortlist, encode_sources(model, tokenizer, sources), target_ids)


def verify(
    args: ExportArguments,
    engine: ModuleType,
    folder: Path,
    sources: Sequence[str],
    references: Sequence[str] | None,
    decoding: DecodingArguments,
    translator: Translator,
    shortlist: Shortlist | None = None,
    language: str | None = None,
) -> list[dict[str, Any]]:
    """Translate on both sides, greedily and with a beam, and compare; with a shortlist both sides use it.

    Args:
        language: of the translations, for sacreBLEU's tokeniser; default: the tokenizer's.

    Raises:
        ValueError: more translations differ than `min_same` allows; shows the first.
    """
    model, tokenizer = translator
    model.float()
    input_ids = encode_sources(model, tokenizer, sources)
    language = language or getattr(tokenizer, "target_lang", None)
    exact = args.quantization == engine.QUANTIZATIONS[0]
    min_same = args.min_same if args.min_same is not None else 1.0 if exact else MIN_SAME_QUANTIZED
    longest = min(decoding.max_new_tokens, model.config.max_position_embeddings - 1)
    rows = []
    for search in SEARCHES:
        its_decoding = replace(decoding, **search, max_new_tokens=longest)
        if shortlist is None:
            pytorch = TransformersEngine(model, tokenizer, its_decoding)
            engines = (pytorch, engine.load(folder, tokenizer, its_decoding))
        else:
            pytorch = ShortlistEngine(model, tokenizer, its_decoding, shortlist=shortlist)
            engines = (pytorch, engine.load(folder, tokenizer, its_decoding, use_shortlist=True))
        ours, theirs = (
            [texts[0] for texts in decode_all(each, input_ids, its_decoding.batch_tokens)] for each in engines
        )
        different = [index for index, pair in enumerate(zip(ours, theirs, strict=True)) if len(set(pair)) > 1]
        same = 1 - len(different) / len(ours)
        if same < min_same:
            first = different[0]
            raise ValueError(
                f"{len(different)} of {len(ours)} translations (beam {its_decoding.num_beams}) by {args.to} "
                f"{args.quantization} are not PyTorch's. The first: {sources[first]!r} gives {theirs[first]!r}, in "
                f"PyTorch {ours[first]!r}. --min_same {math.floor(same * 1000) / 1000} would accept them"
            )
        scores = corpus_scores(theirs, ours, language)
        row = {"num_beams": its_decoding.num_beams, "sentences": len(ours), "same": same}
        row |= {"bleu_to_pytorch": scores["bleu"], "bleu_signature": scores["bleu_signature"]}
        if references is not None:
            row["bleu"] = corpus_scores(theirs, references, language)["bleu"]
            row["pytorch_bleu"] = corpus_scores(ours, references, language)["bleu"]
        if shortlist is not None:
            whole = engine.load(folder, tokenizer, its_decoding)
            row["without_shortlist"] = compare_without(whole, engines[1], input_ids, references, language)
        rows.append(row)
    return rows


def compare_without(
    whole: Engine,
    restricted: Engine,
    input_ids: Sequence[list[int]],
    references: Sequence[str] | None,
    language: str | None = None,
) -> dict[str, float]:
    """Translations of an engine with and without a shortlist, each sentence by itself.

    In a batch the sentences share what each of them has, so that more translations stay the same.

    Returns:
        `same`, the share of translations that are so without it; with references `bleu` with and `whole_bleu` without.
    """
    with_it, without = ([texts[0] for texts in decode_all(each, input_ids, 1)] for each in (restricted, whole))
    found = {"same": sum(map(str.__eq__, with_it, without)) / len(without)}
    if references is not None:
        language = language or getattr(whole.tokenizer, "target_lang", None)
        found["bleu"], found["whole_bleu"] = (
            corpus_scores(texts, references, language)["bleu"] for texts in (with_it, without)
        )
    return found


def print_export(record: dict[str, Any]) -> None:
    """Print size and verification."""
    args = record["arguments"]
    print(f"{args['output_dir']}: {args['to']} {args['quantization']}, {record['megabytes']:.1f} MB")
    if "entries" in record.get("shortlist", {}):
        found = record["shortlist"]
        line = f"shortlist of {found['pairs']:,} pairs: {found['entries']:.0f} target pieces a sentence"
        if "coverage" in found:
            line += f", {found['coverage']:.1%} of the references' pieces among them"
        print(line)
    for row in record["verification"]:
        line = (
            f"beam {row['num_beams']}: {row['same']:.1%} of {row['sentences']} translations are PyTorch's, BLEU of "
            f"all to PyTorch's {row['bleu_to_pytorch']:.2f}"
        )
        if "bleu" in row:
            line += f"; to the references {row['bleu']:.2f}, PyTorch {row['pytorch_bleu']:.2f}"
        print(line)
        if "without_shortlist" in row:
            found = row["without_shortlist"]
            line = f"beam {row['num_beams']}: {found['same']:.1%} of the translations are the same without shortlist"
            if "bleu" in found:
                line += f"; BLEU {found['bleu']:.2f} with it, {found['whole_bleu']:.2f} without"
            print(line)
    if record["verification"]:
        print(record["verification"][0]["bleu_signature"], flush=True)


GROUPS = (ExportArguments, OptionalCorpusArguments, DecodingArguments)


SEARCH_OPTIONS = ("num_beams", "length_penalty")  # it is verified in searches of its own


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser(
        GROUPS,
        positional="model_name_or_path",
        prose=("verify",),
        unused=(*TRAINING_OPTIONS, *SEARCH_OPTIONS),
        description=__doc__,
    )
    export_checkpoint(*parser.parse_recipe(argv))


if __name__ == "__main__":
    run(main)
