"""Write a checkpoint for another engine, and verify it by translating on both sides.

    rs-transformer export runs/tanaka_rs6 --to ctranslate2 --quantization int8 --output_dir rs6-ct2 \\
        --test_file data/tanaka/test.jsonl --source_lang ja --target_lang en
    rs-transformer export runs/tanaka_rs6 --to transformers --output_dir rs6-marian --verify sentences.ja

The folder is there only if the translations are PyTorch's; `export.json` in it says how many are.
"""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from ..checkpoints import MODEL_TYPES, load_config, load_translator
from ..corpus import SPLITS, TRAINING_OPTIONS, OptionalCorpusArguments, load_split, read_sentences
from ..decoding import DecodingArguments, TransformersEngine, decode_all, encode_sources
from ..metrics import corpus_scores
from ..utils.files import check_output, staged_folder, write_json
from ..utils.processes import run
from ..utils.ranges import check_range
from ..utils.recipes import RecipeParser

# Each engine, and the package that it comes in.
TARGETS = {
    "ctranslate2": "ctranslate2",
    "onnx": "onnxruntime",
    "marian": "pymarian",
    "transformers": "transformers",
}
# Without a length penalty, since engines count lengths differently.
SEARCHES = ({"num_beams": 1, "length_penalty": 0.0}, {"num_beams": 4, "length_penalty": 0.0})
MIN_SAME_QUANTIZED = 0.5


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

    def __post_init__(self) -> None:
        check_range(self, "min_same", least=0, most=1)


def export_checkpoint(
    args: ExportArguments, corpus_args: OptionalCorpusArguments, decoding: DecodingArguments
) -> dict[str, Any]:
    """Write a checkpoint for another engine; the folder gets its name once its translations are verified.

    Returns:
        What is also in `export.json` of the folder: `arguments`, `megabytes`, `versions`, and `verification`: for each
        search `num_beams`, `sentences`, `same` (share of translations that are PyTorch's), `bleu_to_pytorch` (with
        PyTorch's translations as references), with references `bleu` and `pytorch_bleu`, and `bleu_signature`.

    Raises:
        ValueError: a target, quantization or model that do not fit, nothing to verify with, or translations that
            differ from PyTorch's more than `min_same` allows.
        FileExistsError: `output_dir` is there already.
    """
    output = Path(args.output_dir)
    check_output(output)
    engine = load_engine(args.to, decodes=args.verification)
    if args.quantization not in engine.QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(engine.QUANTIZATIONS)}, got {args.quantization!r}")
    config = load_config(args.model_name_or_path, args.revision)
    if config.model_type not in MODEL_TYPES or (args.to == "transformers" and config.model_type != "rs_marian"):
        raise ValueError(
            f"{args.model_name_or_path} is a {config.model_type} model, which is not exported to {args.to}"
        )
    sources, references = _verification_data(args, corpus_args)
    with staged_folder(output) as folder:
        engine.convert(args.model_name_or_path, folder, args.quantization, args.revision)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        packages = dict.fromkeys(("rs-transformer", "transformers", TARGETS[args.to]))
        found = [name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is not None]
        record: dict[str, Any] = {
            "arguments": asdict(args) | asdict(corpus_args) | asdict(decoding),
            "megabytes": size / 1e6,
            "versions": {name: version(name) for name in found},
            "verification": [],
        }
        if args.verification:
            record["verification"] = verify(args, engine, folder, sources, references, decoding)
        write_json(record, folder / "export.json")
    print_export(record)
    return record


def load_engine(target: str, decodes: bool = True) -> ModuleType:
    """The module of an engine, or a `ValueError` that says what to install for it.

    Args:
        target: one of `TARGETS`.
        decodes: the engine itself must be there, not only what writes for it.
    """
    needs = f'to={target} needs: pip install "rs-transformer[{target}]"'
    try:
        module = importlib.import_module(f"rs_transformer.export.{target}")
    except ImportError as error:
        raise ValueError(f"{needs} ({error})") from error
    if decodes and importlib.util.find_spec(TARGETS[target]) is None:
        raise ValueError(f"{needs}, to verify what it writes; or verification=false")
    return module


def _verification_data(
    args: ExportArguments, corpus_args: OptionalCorpusArguments
) -> tuple[list[str], list[str] | None]:
    """Sources, and references if there are any."""
    if not args.verification:
        return [], None
    if (args.verify is None) != corpus_args.has_split(args.split):
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
    if len(args.verify) == 1 and Path(args.verify[0]).is_file():
        return read_sentences(args.verify[0], corpus_args.source_column or "source"), None
    return args.verify, None


def verify(
    args: ExportArguments,
    engine: ModuleType,
    folder: Path,
    sources: Sequence[str],
    references: Sequence[str] | None,
    decoding: DecodingArguments,
) -> list[dict[str, Any]]:
    """Translate on both sides, greedily and with a beam, and compare.

    Raises:
        ValueError: more translations differ than `min_same` allows; shows the first.
    """
    model, tokenizer = load_translator(args.model_name_or_path, args.revision)
    model.float()
    input_ids = encode_sources(model, tokenizer, sources)
    exact = args.quantization == engine.QUANTIZATIONS[0]
    min_same = args.min_same if args.min_same is not None else 1.0 if exact else MIN_SAME_QUANTIZED
    longest = min(decoding.max_new_tokens, model.config.max_position_embeddings - 1)
    rows = []
    for search in SEARCHES:
        its_decoding = replace(decoding, **search, max_new_tokens=longest)
        engines = (TransformersEngine(model, tokenizer, its_decoding), engine.load(folder, tokenizer, its_decoding))
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
        language = getattr(tokenizer, "target_lang", None)
        scores = corpus_scores(theirs, ours, language)
        row = {"num_beams": its_decoding.num_beams, "sentences": len(ours), "same": same}
        row |= {"bleu_to_pytorch": scores["bleu"], "bleu_signature": scores["bleu_signature"]}
        if references is not None:
            row["bleu"] = corpus_scores(theirs, references, language)["bleu"]
            row["pytorch_bleu"] = corpus_scores(ours, references, language)["bleu"]
        rows.append(row)
    return rows


def print_export(record: dict[str, Any]) -> None:
    """Print size and verification."""
    args = record["arguments"]
    print(f"{args['output_dir']}: {args['to']} {args['quantization']}, {record['megabytes']:.1f} MB")
    for row in record["verification"]:
        line = (
            f"beam {row['num_beams']}: {row['same']:.1%} of {row['sentences']} translations are PyTorch's, BLEU of "
            f"all to PyTorch's {row['bleu_to_pytorch']:.2f}"
        )
        if "bleu" in row:
            line += f"; to the references {row['bleu']:.2f}, PyTorch {row['pytorch_bleu']:.2f}"
        print(line)
    if record["verification"]:
        print(record["verification"][0]["bleu_signature"], flush=True)


GROUPS = (ExportArguments, OptionalCorpusArguments, DecodingArguments)


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser(
        GROUPS, positional="model_name_or_path", prose=("verify",), unused=TRAINING_OPTIONS, description=__doc__
    )
    export_checkpoint(*parser.parse_recipe(argv))


if __name__ == "__main__":
    run(main)
