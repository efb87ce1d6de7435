"""Collapse a trained Marian model, such as an OPUS-MT checkpoint, into a recurrently stacked one of the same depth.

    rs-transformer collapse --model_name_or_path Helsinki-NLP/opus-mt-ja-en --output_dir runs/collapsed
    rs-transformer collapse --model_name_or_path runs/tanaka_vanilla6 --output_dir runs/calibrated \\
        --method calibrated --source_lang ja --target_lang en --train_file data/tanaka/train.jsonl \\
        --evaluate --test_file data/tanaka/test.jsonl

The output folder holds model, tokenizer, generation config, remote code and `collapse.json`, which says where each
layer comes from. Fine-tune it by `rs-transformer train --model_name_or_path runs/collapsed …`. With
`--vocabulary_files` the parent's vocabulary is trimmed first, as `rs-transformer trim` does.
"""

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, MarianMTModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..calibration import LEARNING_RATE, OUTPUT_WEIGHT, STACK_PARAMETER, UPDATES
from ..checkpoints import coded_sources, commit_of, load_parent
from ..configuration_rs_marian import LAYER_SHARINGS, SIDES
from ..corpus import CorpusArguments, OptionalCorpusArguments, load_split, prepare_training_pairs
from ..decoding import DecodingArguments
from ..layer_transfer import (
    METHODS,
    OWN_TO_STEPS,
    TransferPlan,
    collapse,
    collapsed_config,
    count_parameters,
    fold_adapters,
    plan_collapse,
)
from ..pipeline_rs_marian import target_codes
from ..tokenization import check_language_pair
from ..training.batches import TokenBatchSampler
from ..training.run_folder import RECORDED_PACKAGES, RUN_RECORD
from ..utils.files import check_output, read_mapping, staged_folder, write_json
from ..utils.memory import keep_freed_memory
from ..utils.processes import PatientGroup, run
from ..utils.ranges import check_range
from ..utils.recipes import RecipeParser
from ..vocabulary import TEXT_SIDES, apply_trim
from .evaluate import EvaluateArguments, evaluate_systems
from .trim import RECORD as TRIMMED
from .trim import Texts, VocabularyArguments, plan_texts, read_texts, trim_record

logger = logging.get_logger(__name__)

TIED = "tie_encoder_decoder_layers"


@dataclass
class CollapseArguments:
    """What to collapse, how, and where to write it."""

    model_name_or_path: str = field(
        metadata={"help": "The parent: a Marian or RSMarian model, on the Hub or in a folder."}
    )
    output_dir: str = field(metadata={"help": "The folder to make. There must be nothing in it."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the parent."})
    encoder_unique_layers: int = field(default=1, metadata={"help": "Stored encoder layers, 1 to the depth."})
    decoder_unique_layers: int = field(default=1, metadata={"help": "Stored decoder layers, 1 to the depth."})
    layer_sharing: str = field(
        default="cycle", metadata={"help": "How steps are mapped to layers.", "choices": list(LAYER_SHARINGS)}
    )
    encoder_layer_sharing: str | None = field(
        default=None, metadata={"help": "The same for the encoder alone.", "choices": list(LAYER_SHARINGS)}
    )
    decoder_layer_sharing: str | None = field(
        default=None, metadata={"help": "The same for the decoder alone.", "choices": list(LAYER_SHARINGS)}
    )
    step_layer_norms: bool | None = field(
        default=None,
        metadata={"help": "Keep the parent's LayerNorms for each step; share the rest. Default: as the parent."},
    )
    step_biases: bool | None = field(
        default=None, metadata={"help": "Keep the parent's biases for each step, too. Default: as the parent."}
    )
    step_adapter_rank: int | None = field(
        default=None,
        metadata={
            "help": "Add to each shared matrix, for each step, one of this rank: what comes closest to the parent's. "
            "Default: as the parent."
        },
    )
    tie_encoder_decoder_layers: bool | None = field(
        default=None,
        metadata={"help": "Give the decoder the encoder's self-attention and feed-forward. Default: as the parent."},
    )
    method: str = field(
        default="average",
        metadata={
            "help": f"What a unique layer starts from: {', '.join(METHODS)}, or the number of a parent layer, from 0. "
            "calibrated needs training data."
        },
    )
    allow_pickle: bool = field(
        default=False,
        metadata={"help": "Read pytorch_model.bin too, which can run code of whoever made it."},
    )
    evaluate: bool = field(
        default=False, metadata={"help": "Score the parent and the result on test data, before any fine-tuning."}
    )
    calibration_updates: int = field(default=UPDATES, metadata={"help": "Updates of the method calibrated."})
    calibration_learning_rate: float = field(default=LEARNING_RATE, metadata={"help": "Peak of its learning rate."})
    calibration_output_weight: float = field(
        default=OUTPUT_WEIGHT, metadata={"help": "Weight of the outputs beside the hidden states in its loss."}
    )
    calibration_max_tokens: int = field(default=1280, metadata={"help": "Token budget of its batches."})
    calibration_samples: int = field(
        default=50_000, metadata={"help": "Training pairs that its batches are made of, chosen by chance."}
    )
    seed: int = field(default=1, metadata={"help": "Of the choice and the order of the calibration's batches."})

    def __post_init__(self) -> None:
        if self.method not in METHODS and not self.method.isdecimal():
            raise ValueError(f"method must be one of {', '.join(METHODS)} or a number, got {self.method!r}")
        check_range(self, "calibration_updates", "calibration_max_tokens", "calibration_samples", least=1)
        check_range(self, "calibration_learning_rate", "calibration_output_weight", least=0)

    @property
    def method_or_layer(self) -> str | int:
        return int(self.method) if self.method.isdecimal() else self.method

    def sharing_options(self) -> dict[str, Any]:
        """What `collapse` takes of the layer maps and of what each step keeps."""
        sides = [f"{side}_{name}" for side in SIDES for name in ("unique_layers", "layer_sharing")]
        return {name: getattr(self, name) for name in (*sides, "layer_sharing", *OWN_TO_STEPS, TIED)}

    def calibration_options(self) -> dict[str, Any]:
        """What `calibrate` takes."""
        names = ("updates", "learning_rate", "output_weight")
        return {name: getattr(self, f"calibration_{name}") for name in names}


def collapse_checkpoint(
    args: CollapseArguments,
    corpus_args: CorpusArguments,
    decoding: DecodingArguments,
    vocabulary_args: VocabularyArguments,
) -> dict[str, Any]:
    """Collapse a checkpoint into a folder with model, tokenizer, generation config, remote code and `collapse.json`.

    Every input is checked before anything is written, and the folder gets its name when it is complete.

    Returns:
        What is in `collapse.json`; with `evaluate` its `evaluation` has the rows of `evaluate_systems`.

    Raises:
        FileExistsError: there is something in the output folder.
        ValueError, OSError: the parent or the data does not fit, or is not there; the message says which.
    """
    output = Path(args.output_dir)
    check_output(output)
    splits = load_needed_splits(args, corpus_args)
    texts = read_texts(vocabulary_args, corpus_args)
    whole = load_parent(args.model_name_or_path, args.revision, args.allow_pickle)
    if splits or vocabulary_args.files:
        check_language_pair(whole[1], corpus_args.source_lang, corpus_args.target_lang)
    parent, tokenizer, trimmed = trim_parent(args.model_name_or_path, *whole, texts, vocabulary_args)
    config = collapsed_config(parent.config, **args.sharing_options())
    plan = plan_collapse(fold_adapters(parent), config, args.method_or_layer)
    batches = None
    if args.method == "calibrated":
        positions = getattr(parent.config, "max_position_embeddings", None)
        batches = calibration_batches(splits["train"], tokenizer, corpus_args, args, positions)

    state, group = PartialState(), PatientGroup()
    group.wait()  # no process may find what another has written already
    parent = parent.to(state.device).eval()
    if state.device.type == "cpu":
        keep_freed_memory()
    record: dict[str, Any] = {}
    if state.is_main_process:
        child = collapse(
            parent,
            **args.sharing_options(),
            method=args.method_or_layer,
            **({} if batches is None else {"calibration": batches, **args.calibration_options()}),
        )
        record = collapse_record(args, whole[0], child, plan) | (trimmed or trimmed_before(args.model_name_or_path))
        with staged_folder(output) as staging:
            child.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            write_json(record, staging / "collapse.json")
        before, after = record["parameters"]["parent"], record["parameters"]["collapsed"]
        print(
            f"{args.output_dir}: {after['total']:,} parameters, {after['layers']:,} in layers; "
            f"its parent has {before['total']:,} and {before['layers']:,}",
            flush=True,
        )
    group.wait()  # the calibration is the main process's alone
    if args.evaluate:
        systems = EvaluateArguments(systems=[args.model_name_or_path, args.output_dir])
        loaded = {args.model_name_or_path: (whole[0].to(state.device).eval(), whole[1])}
        record["evaluation"] = evaluate_systems(systems, corpus_args, decoding, loaded)
        if state.is_main_process:
            write_json(record, output / "collapse.json")
    return record


def trim_parent(
    name: str, parent: MarianMTModel, tokenizer: PreTrainedTokenizerBase, texts: Texts, args: VocabularyArguments
) -> tuple[MarianMTModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """The parent as it is to be collapsed, trimmed if there is text for that, and what to record of it."""
    if not args.files:
        return parent, tokenizer, {}
    plan = plan_texts(parent, tokenizer, texts, args)
    record = trim_record(parent, tokenizer, plan, args)
    before = trimmed_before(name).get("trimmed")
    if before:  # of it what it was made of, and how large that was
        record |= {"parent": before["parent"], "text_before": before.get("text")}
        for side in TEXT_SIDES:
            for what in ("entries", "pieces"):
                record[side][what]["parent"] = before[side][what]["parent"]
    return *apply_trim(parent, tokenizer, plan), {"trimmed": record}


def trimmed_before(parent: str) -> dict[str, Any]:
    """What to record of a parent that `trim` has made, of which and to what, and whether it was trained since."""
    record = read_mapping(Path(parent, TRIMMED))
    if not record:
        return {}
    kept = {name: record[name] for name in record if name != "versions"}
    return {"trimmed": kept | {"trained": Path(parent, RUN_RECORD).is_file()}}


def load_needed_splits(args: CollapseArguments, corpus_args: CorpusArguments) -> dict[str, Dataset]:
    """The data that the options ask for: test to evaluate, train to calibrate; mostly none.

    Raises:
        ValueError, FileNotFoundError: it is not there, or nobody said which languages it is in.
    """
    wanted = {"test": args.evaluate, "train": args.method == "calibrated"}
    needed = [split for split in wanted if wanted[split]]
    if needed and None in (corpus_args.source_lang, corpus_args.target_lang):
        raise ValueError("evaluate and the method calibrated need data: give source_lang and target_lang")
    return {split: load_split(corpus_args, split) for split in needed}


def collapse_record(
    args: CollapseArguments, parent: MarianMTModel, child: MarianMTModel, plan: TransferPlan
) -> dict[str, Any]:
    """What `collapse.json` says: where the model comes from, tensor by tensor, and what it has become.

    `copied` tensors have the parent's name and value, those under `made_from` are (or start from, if calibrated) the
    mean of the parent's tensors beside them, `adapters` start from the difference of the parent's matrix and the
    shared one beside them, `dropped` are the parent's that nothing is made from. A parent with adapters is named as if
    they were folded into a layer for each step. With `trimmed` its embeddings were trimmed before.
    """
    calibrated = args.method == "calibrated"
    made_from = {
        name: sources
        for name, sources in plan.sources.items()
        if sources != [name] or (calibrated and STACK_PARAMETER.match(name))
    }
    calibration: dict[str, Any] = {}
    if calibrated:
        calibration = {**args.calibration_options(), "max_tokens": args.calibration_max_tokens, "seed": args.seed}
    return {
        "parent": args.model_name_or_path,
        "revision": args.revision,
        "commit": commit_of(args.model_name_or_path, args.revision),
        "method": args.method_or_layer,
        **({"calibration": calibration} if calibration else {}),
        **args.sharing_options(),
        **{
            side: {"layer_map": getattr(child.config, f"{side}_layer_map"), "parent_layers": plan.layers[side]}
            for side in plan.layers
        },
        "parameters": {"parent": count_parameters(parent), "collapsed": count_parameters(child)},
        "copied": [name for name in plan.sources if name not in made_from],
        "made_from": made_from,
        **({"adapters": plan.adapters} if plan.adapters else {}),
        "dropped": plan.dropped,
        "versions": {name: version(name) for name in RECORDED_PACKAGES},
    }


def calibration_batches(
    train: Any,
    tokenizer: PreTrainedTokenizerBase,
    corpus_args: CorpusArguments,
    args: CollapseArguments,
    positions: int | None = None,
) -> DataLoader:
    """Batches of `input_ids`, `attention_mask` and `labels` from training pairs chosen by chance.

    Longer pairs than the model has `positions` for are left out.
    """
    chosen = train.shuffle(seed=args.seed).select(range(min(len(train), args.calibration_samples)))
    if target_codes(tokenizer):  # as the parent is translated with
        languages = (corpus_args.source_lang, corpus_args.target_lang)
        texts = [text or "" for text in chosen["source"]]
        sources, _ = coded_sources(args.model_name_or_path, tokenizer, texts, *languages)
        chosen = Dataset.from_dict({"source": sources, "target": chosen["target"][:]})
    pairs = prepare_training_pairs(chosen, tokenizer, corpus_args, positions)
    sampler = TokenBatchSampler(pairs["length"][:], args.calibration_max_tokens, seed=args.seed)
    pairs = pairs.select_columns(["input_ids", "labels"])
    return DataLoader(pairs, batch_sampler=sampler, collate_fn=DataCollatorForSeq2Seq(tokenizer))


UNUSED = ("streaming", "shuffle_buffer_size", "max_eval_samples")
GROUPS = (CollapseArguments, OptionalCorpusArguments, DecodingArguments, VocabularyArguments)


def main(argv: list[str] | None = None) -> None:
    collapse_checkpoint(*RecipeParser(GROUPS, unused=UNUSED, description=__doc__).parse_recipe(argv))


if __name__ == "__main__":
    run(main)
