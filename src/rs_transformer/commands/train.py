"""Train a translation model on a parallel corpus, from scratch or from a checkpoint.

    accelerate launch training/train.py training/recipes/demo.yaml
    accelerate launch --num_processes 2 training/train.py training/recipes/tanaka_rs6.yaml --output_dir runs/rs6
    accelerate launch training/train.py --model_name_or_path runs/rs6 --train_file a.ja a.en \\
        --source_lang ja --target_lang en --output_dir runs/tuned --learning_rate 2e-4

The recipe is YAML; options on the command line win. Defaults are those of `RSMarianConfig` and
`Seq2SeqTrainingArguments`. The output folder holds the model, ready for the Hub, and `recipe.yaml`, `run.json`,
`results.json`, translations and TensorBoard logs.
"""

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset, disable_progress_bars
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from ..checkpoints import load_tokenizer
from ..configuration_rs_marian import RSMarianConfig
from ..corpus import AnyDataset, CorpusArguments, load_split, prepare_training_pairs
from ..decoding import DecodingArguments
from ..metrics import corpus_scores
from ..tokenization import TokenizerArguments, check_language_pair, train_tokenizer
from ..training.arguments import TranslationTrainingArguments
from ..training.depth_schedule import DepthSchedule
from ..training.fsdp import load_whole_state
from ..training.model import ModelArguments, build_model
from ..training.run_folder import average_checkpoints, checkpoint_to_resume, complete_checkpoints, write_run_record
from ..training.trainer import TranslationTrainer
from ..utils.files import write_json
from ..utils.processes import PatientGroup, run
from ..utils.recipes import RecipeParser

logger = logging.get_logger(__name__)

SAMPLES = 10


def run_training(
    model_args: ModelArguments,
    corpus_args: CorpusArguments,
    tokenizer_args: TokenizerArguments,
    decoding_args: DecodingArguments,
    training_args: TranslationTrainingArguments,
    *,
    train: Dataset | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    make_trainer: Callable[..., TranslationTrainer] = TranslationTrainer,
    recorded: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, average, evaluate and save; every input is checked before the training starts.

    Args:
        train: training pairs, columns `source` and `target`; default: the train split of `corpus_args`.
        tokenizer: default: the one that the options name, or a new one.
        make_trainer: `TranslationTrainer`, or what takes its arguments and makes one.
        recorded: further options for the run's recipe.

    Returns:
        The scores: `{"validation": {"bleu": …, …}, "test": {…}}`, as `results.json` in the output folder has them.

    Raises:
        ValueError, FileNotFoundError: an option or the data is wrong; the message says what and how to mend it.
    """
    set_up_logging(training_args)
    set_seed(training_args.seed)
    checkpoint = check_output_dir(training_args)
    check_streaming(corpus_args, training_args)

    if train is None:
        train = load_split(corpus_args, "train", streaming=corpus_args.streaming)
        if corpus_args.max_train_samples is not None:
            train = train.take(corpus_args.max_train_samples)
    evaluated = load_evaluation_splits(corpus_args)
    check_validation(training_args, evaluated)
    if model_args.model_name_or_path is None:
        RSMarianConfig(**model_args.config_fields())  # an impossible model is said before a tokenizer is trained

    if tokenizer is None:
        tokenizer = load_or_train_tokenizer(
            tokenizer_args, model_args, corpus_args, train, training_args.output_dir, resuming=checkpoint is not None
        )
    model = build_model(model_args, tokenizer)
    DepthSchedule.from_args(training_args, model.config)  # an impossible one is said before the corpus is prepared
    positions = getattr(model.config, "max_position_embeddings", None)
    model.generation_config.update(max_length=positions, **decoding_args.search_kwargs())
    with PatientGroup().main_process_first(local=True):
        train = prepare_training_pairs(train, tokenizer, corpus_args)
    if isinstance(train, IterableDataset):
        train = train.shuffle(seed=training_args.seed, buffer_size=corpus_args.shuffle_buffer_size)
    if training_args.should_save:
        options = dict(recorded or {})
        for group in (model_args, corpus_args, tokenizer_args, decoding_args):
            options |= asdict(group)
        write_run_record(training_args.output_dir, options | training_args.to_dict())
        keep_lineage(model_args.model_name_or_path, training_args.output_dir)

    trainer = make_trainer(
        model,
        train_dataset=train,
        processing_class=tokenizer,
        args=training_args,
        eval_dataset=evaluated.get("validation"),
        decoding=replace(decoding_args, num_beams=training_args.eval_num_beams),
        target_lang=corpus_args.target_lang,
        max_length=max(corpus_args.max_source_length, corpus_args.max_target_length),
    )
    return train_and_evaluate(trainer, checkpoint, evaluated, decoding_args)


def train_and_evaluate(
    trainer: TranslationTrainer, checkpoint: str | None, evaluated: dict[str, Dataset], decoding: DecodingArguments
) -> dict[str, Any]:
    """Train, average, save, and score the final model; what `run_training` does once all is prepared."""
    args = trainer.args
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    if args.average_checkpoints:
        load_average(trainer, args.average_checkpoints)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", outcome.metrics)
    results = final_evaluation(trainer, evaluated, decoding, trainer.target_lang)
    results["training"] = {"train_seconds": outcome.metrics["train_runtime"], "updates": outcome.global_step}
    if args.should_save:
        write_json(results, Path(args.output_dir, "results.json"))
        trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub()
    return results


def set_up_logging(args: TranslationTrainingArguments) -> None:
    """Log once per node; draw progress bars on terminals only."""
    verbosity = logging.INFO if args.should_log else logging.ERROR
    logging.set_verbosity(verbosity)
    logging.enable_explicit_format()
    package = logging.get_logger("rs_transformer")
    package.setLevel(verbosity)
    package.handlers = logging.get_logger("transformers").handlers
    package.propagate = False
    if not sys.stderr.isatty():
        args.disable_tqdm = True
        logging.disable_progress_bar()
        disable_progress_bars()


def keep_lineage(parent: str | None, output_dir: str) -> None:
    """Copy what a collapsed parent says of itself into the run's folder, for the model card."""
    record = Path(parent or "", "collapse.json")
    if parent is not None and record.is_file():
        shutil.copyfile(record, Path(output_dir, record.name))


def check_output_dir(args: TranslationTrainingArguments) -> str | None:
    """The checkpoint to resume from, if asked to.

    Raises:
        ValueError: there is a run in the output folder and nobody said that it is to go on, or a named checkpoint is
            incomplete.
    """
    resume = args.resume_from_checkpoint
    if resume is None or str(resume).lower() in ("false", "no"):
        if complete_checkpoints(args.output_dir) or Path(args.output_dir, "results.json").exists():
            raise ValueError(
                f"{args.output_dir} holds a run already: go on with it by --resume_from_checkpoint true, or choose "
                "another output_dir"
            )
        return None
    if str(resume).lower() in ("true", "yes"):
        with args.main_process_first():
            checkpoint = checkpoint_to_resume(args.output_dir)
        if checkpoint is None:
            logger.warning(f"{args.output_dir} holds no complete checkpoint: the run starts anew.")
        return checkpoint
    if Path(resume) not in complete_checkpoints(Path(resume).parent):
        raise ValueError(f"resume_from_checkpoint: {resume} is not a complete checkpoint")
    return str(resume)


def check_streaming(corpus_args: CorpusArguments, training_args: TranslationTrainingArguments) -> None:
    """Raise `ValueError` for options that a stream, whose length nobody knows, cannot serve."""
    if not corpus_args.streaming:
        return
    if training_args.max_steps <= 0:
        raise ValueError("streaming needs max_steps, since the number of pairs is not known")
    if training_args.max_tokens is not None:
        raise ValueError("streaming takes per_device_train_batch_size, not max_tokens")


def check_validation(args: TranslationTrainingArguments, evaluated: Mapping[str, Dataset]) -> None:
    """Raise `ValueError` if there is to be evaluation while training and there is no data for it."""
    if "validation" not in evaluated and str(args.eval_strategy.value) != "no":
        raise ValueError("eval_strategy needs validation data: give validation_file, or set eval_strategy: no")


def load_evaluation_splits(args: CorpusArguments) -> dict[str, Dataset]:
    """The validation and test data that were given, in the corpus's order and unfiltered."""
    splits = {}
    for split in ("validation", "test"):
        if args.files(split) is None and args.dataset_name is None:
            continue
        try:
            dataset = load_split(args, split)
        except ValueError as error:
            if args.files(split) is not None or "Unknown split" not in str(error):
                raise
            continue
        if split == "validation" and args.max_eval_samples is not None:
            dataset = dataset.take(args.max_eval_samples)
        if not len(dataset):
            raise ValueError(f"the {split} split is empty")
        splits[split] = dataset
    return splits


def load_or_train_tokenizer(
    args: TokenizerArguments,
    model_args: ModelArguments,
    corpus_args: CorpusArguments,
    train: AnyDataset,
    output_dir: str,
    resuming: bool,
) -> PreTrainedTokenizerBase:
    """The tokenizer that was named, else the checkpoint's; else a new one, or when resuming the one of this run."""
    name = args.tokenizer_name_or_path or model_args.model_name_or_path
    if name is not None:
        revision = "main" if args.tokenizer_name_or_path else model_args.revision
        tokenizer = load_tokenizer(name, revision)
        check_language_pair(tokenizer, corpus_args.source_lang, corpus_args.target_lang)
        return tokenizer
    state = PartialState()
    folder = Path(output_dir)
    with state.main_process_first():
        if state.is_main_process and not resuming:
            train_tokenizer(
                train["source"],
                train["target"],
                folder,
                source_lang=corpus_args.source_lang,
                target_lang=corpus_args.target_lang,
                vocab_size=args.vocab_size,
                vocabulary=args.vocabulary,
                character_coverage=args.character_coverage,
                sample_size=args.tokenizer_sample_size,
                model_max_length=model_args.max_position_embeddings or 512,
            )
    return load_tokenizer(str(folder))


def load_average(trainer: TranslationTrainer, number: int) -> None:
    """Put the average of the last `number` checkpoints into the trainer's model."""
    checkpoints = complete_checkpoints(trainer.args.output_dir)[-number:]
    if len(checkpoints) < number:
        logger.warning(f"There are only {len(checkpoints)} checkpoints to average, not {number}.")
    logger.info(f"Averaging {', '.join(folder.name for folder in checkpoints)}")
    model = trainer.accelerator.unwrap_model(trainer.model)
    missing, unexpected = load_whole_state(model, average_checkpoints(checkpoints))
    expected = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    if unexpected or set(missing) - expected:
        raise ValueError(f"the checkpoints do not fit the model: {unexpected or sorted(set(missing) - expected)}")
    model.tie_weights()


def final_evaluation(
    trainer: TranslationTrainer, splits: dict[str, Dataset], decoding: DecodingArguments, target_lang: str
) -> dict[str, Any]:
    """Translate and score each split with the final model, save the translations, print some beside the references."""
    trainer.decoding = decoding
    results: dict[str, Any] = {}
    for split, dataset in splits.items():
        metrics = trainer.evaluate(dataset, metric_key_prefix=split)
        results[split] = corpus_scores(trainer.translations, dataset["target"][:], target_lang)
        results[split] |= {
            "loss": metrics[f"{split}_loss"],
            "sentences": len(dataset),
            "num_beams": decoding.num_beams,
        }
        if trainer.args.should_save:
            file = Path(trainer.args.output_dir, f"{split}_translations.txt")
            file.write_text("".join(f"{text}\n" for text in trainer.translations), encoding="utf-8")
            print_samples(split, dataset, trainer.translations)
            print(f"{split}: BLEU {results[split]['bleu']:.2f}  chrF {results[split]['chrf']:.2f}")
            print(f"  {results[split]['bleu_signature']}\n  {results[split]['chrf_signature']}", flush=True)
    return results


def print_samples(split: str, dataset: Dataset, translations: list[str]) -> None:
    """Print the first translations of a split beside source and reference."""
    for row, translation in list(zip(dataset, translations, strict=True))[:SAMPLES]:
        print(f"\n[{split}] source       {row['source']}")
        print(f"{' ' * len(split)}   translation  {translation}")
        print(f"{' ' * len(split)}   reference    {row['target']}")
    print()


GROUPS = (ModelArguments, CorpusArguments, TokenizerArguments, DecodingArguments, TranslationTrainingArguments)


def main(argv: list[str] | None = None) -> None:
    run_training(*RecipeParser(GROUPS, description=__doc__).parse_recipe(argv))


if __name__ == "__main__":
    run(main)
