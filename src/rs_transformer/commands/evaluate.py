"""Score models, or files of translations, on a test set: BLEU and chrF with signatures, and a paired bootstrap.

    rs-transformer evaluate --systems runs/demo --source_lang ja --target_lang en \\
        --test_file training/data/tanaka-excerpt-cased/test.jsonl
    rs-transformer evaluate --systems runs/vanilla6 runs/rs6 --source_lang ja --target_lang en \\
        --test_file test.ja test.en --num_beams 5 --output_file scores.json
    rs-transformer evaluate --systems runs/small/model --keep true --source_lang ja --target_lang en \\
        --test_file test.ja test.en
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers.utils import CONFIG_NAME

from ..checkpoints import Translator, coded_sources, load_config, load_tokenizer, load_translator
from ..corpus import SPLITS, TRAINING_OPTIONS, CorpusArguments, load_split, read_sentences
from ..decoding import DecodingArguments, DraftedDecodingArguments, timed_translate
from ..metrics import corpus_scores, paired_bootstrap
from ..model_card import renew_card
from ..tokenization import check_language_pair, with_code
from ..training.run_folder import keep_scores
from ..utils.files import check_output_file, write_json
from ..utils.processes import run
from ..utils.ranges import check_range
from ..utils.recipes import RecipeParser


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
    encoder_layers: int | None = field(
        default=None, metadata={"help": "Depth of the encoders of those models that are RSMarian; default: their own."}
    )
    decoder_layers: int | None = field(default=None, metadata={"help": "The same for the decoders."})
    output_file: str | None = field(default=None, metadata={"help": "Where to write the figures as JSON."})
    keep: bool = field(
        default=False,
        metadata={
            "help": "Keep the scores in the models' folders (results.json), and write the cards anew, which show them."
        },
    )

    def __post_init__(self) -> None:
        check_range(self, "bootstrap_samples", "encoder_layers", "decoder_layers", least=1)
        if self.keep:
            if self.depths():
                raise ValueError("keep is for models at their own depths: leave encoder_layers and decoder_layers out")
            for system in self.systems:
                if not Path(system, CONFIG_NAME).is_file():
                    raise ValueError(f"keep is for models in folders, and {system} is none")
        if self.output_file is not None:
            check_output_file(self.output_file, self.systems)

    def depths(self) -> dict[str, int]:
        """The depths that were asked for."""
        given = {name: getattr(self, name) for name in ("encoder_layers", "decoder_layers")}
        return {name: depth for name, depth in given.items() if depth is not None}


def evaluate_systems(
    args: EvaluateArguments,
    corpus_args: CorpusArguments,
    decoding: DecodingArguments,
    loaded: Mapping[str, Translator] | None = None,
    prefixes: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Score systems on a split; compare them to the first if there are several.

    Args:
        args: the systems and the split.
        corpus_args: the data.
        decoding: how models translate.
        loaded: those of the systems that are in memory already.
        prefixes: what each source begins with for a system (`>>eng<< `), where it has to.

    Returns:
        One dict a system: `system`, `bleu`, `chrf`, `bleu_signature`, `chrf_signature`, for models
        `sentences_per_second`, `num_beams` and `parameters`; and `bootstrap`, the system's row of `paired_bootstrap`.

    Raises:
        ValueError, FileNotFoundError: data, model or file of translations does not fit, or `output_file` is one of the
            corpus.
    """
    output = None
    if args.output_file is not None:
        output = check_output_file(args.output_file, corpus_args.all_files())
    dataset = load_split(corpus_args, args.split)
    references = dataset["target"][:]
    if len(set(args.systems)) < len(args.systems):
        raise ValueError(f"a system is named twice: {' '.join(args.systems)}")
    files = {system: read_sentences(system, "target") for system in args.systems if Path(system).is_file()}
    for file, lines in files.items():
        if len(lines) != len(references):
            raise ValueError(f"{file} has {len(lines)} lines, the {args.split} split {len(references)} references")
    stacked = []
    for system in args.systems:  # all of them before the first is translated
        if system not in files and system not in (loaded or {}):
            kind = load_config(system).model_type
            if kind == "rs_marian":
                stacked.append(system)
            elif args.keep and kind != "marian":
                raise ValueError(f"keep is for Marian models, and {system} is of the type {kind!r}")
            tokenizer = load_tokenizer(system)
            check_language_pair(tokenizer, corpus_args.source_lang, corpus_args.target_lang)
            coded_sources(system, tokenizer, dataset["source"], corpus_args.source_lang, corpus_args.target_lang)
    if args.depths() and not stacked:
        raise ValueError("encoder_layers and decoder_layers are of recurrently stacked models: no system is one")
    translations, rows = {}, []
    for system in args.systems:
        row: dict[str, Any] = {"system": system}
        if system in files:
            translations[system] = files[system]
        else:
            depths = args.depths() if system in stacked else {}
            translator = (loaded or {}).get(system) or load_translator(system, **depths)
            translations[system], figures = _run_system(
                system, translator, dataset, corpus_args, decoding, (prefixes or {}).get(system)
            )
            row |= figures
        row |= corpus_scores(translations[system], references, corpus_args.target_lang)
        rows.append(row)
    if len(rows) > 1:
        comparison = paired_bootstrap(translations, references, corpus_args.target_lang, args.bootstrap_samples)
        for row, bootstrap in zip(rows, comparison, strict=True):
            row["bootstrap"] = bootstrap
    if PartialState().is_main_process:
        print_scores(rows)
        if output is not None:
            write_json(rows, output)
        if args.keep:
            for row in rows:
                names = ("bleu", "bleu_signature", "chrf", "chrf_signature", "num_beams")
                kept = {"sentences": len(references), "dataset": corpus_args.split_name(args.split)}
                keep_scores(row["system"], args.split, {name: row[name] for name in names} | kept)
                renew_card(row["system"])
    return rows


def _run_system(
    system: str,
    translator: Translator,
    dataset: Dataset,
    corpus_args: CorpusArguments,
    decoding: DecodingArguments,
    prefix: str | None,
) -> tuple[list[str], dict[str, Any]]:
    """Translate a split; where `prefix` is not None, the model has been told its languages."""
    model, tokenizer = translator
    check_language_pair(tokenizer, corpus_args.source_lang, corpus_args.target_lang)
    if prefix is None:
        languages = (corpus_args.source_lang, corpus_args.target_lang)
        sources, first_token = coded_sources(system, tokenizer, dataset["source"], *languages)
        if first_token is not None:
            model.generation_config.forced_bos_token_id = first_token
    else:
        sources = with_code(tokenizer, prefix, dataset["source"])
    translations, speed = timed_translate(model, tokenizer, sources, decoding)
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


GROUPS = (EvaluateArguments, CorpusArguments, DraftedDecodingArguments)


def main(argv: list[str] | None = None) -> None:
    evaluate_systems(*RecipeParser(GROUPS, unused=TRAINING_OPTIONS, description=__doc__).parse_recipe(argv))


if __name__ == "__main__":
    run(main)
