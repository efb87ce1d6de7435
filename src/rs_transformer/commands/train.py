"""Train a translation model on a parallel corpus, from scratch or from a checkpoint.

    rs-transformer train training/recipes/demo.yaml
    rs-transformer train training/recipes/tanaka_rs6.yaml --output_dir runs/rs6
    accelerate launch --num_processes 2 -m rs_transformer.commands.train training/recipes/tanaka_rs6.yaml
    rs-transformer train --model_name_or_path runs/rs6 --train_file a.ja a.en \\
        --source_lang ja --target_lang en --output_dir runs/tuned --learning_rate 2e-4

The recipe is YAML; options on the command line win. Defaults are those of `RSMarianConfig` and
`Seq2SeqTrainingArguments`. The output folder holds the model, ready for the Hub, and `recipe.yaml`, `run.json`,
`results.json`, translations, TensorBoard logs, and `run.log`, with all that the libraries say.
"""

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import CONFIG_NAME, logging

from ..checkpoints import first_line, load_tokenizer
from ..configuration_rs_marian import RSMarianConfig
from ..corpus import (
    AnyDataset,
    CorpusArguments,
    load_evaluation_splits,
    load_split,
    prepare_training_pairs,
    warn_of_long_pairs,
    warn_of_overlap,
)
from ..decoding import DecodingArguments
from ..metrics import corpus_scores
from ..subword_sampling import SubwordSampler
from ..tokenization import TokenizerArguments, check_language_pair, tell_languages, train_tokenizer
from ..training.arguments import TranslationTrainingArguments
from ..training.depth_schedule import DepthSchedule
from ..training.model import ModelArguments, build_model, faster_attention
from ..training.progress import StartSummary
from ..training.run_folder import (
    LINEAGE,
    RESULTS,
    RUN_LOG,
    RUN_RECORD,
    checkpoint_to_resume,
    complete_checkpoints,
    data_digest,
    named_checkpoint,
    set_later_aside,
    weights_digest,
    write_finished,
    write_run_record,
)
from ..training.trainer import SCORES, TranslationTrainer
from ..utils.console import bars_on_terminals, log_to, set_up_logging
from ..utils.files import claimed, read_mapping, write_json, write_text
from ..utils.memory import keep_freed_memory
from ..utils.processes import PatientGroup, run
from ..utils.recipes import ArgumentGroups, RecipeParser

logger = logging.get_logger(__name__)

SAMPLES = 5
GO_ON = "the same command with --resume_from_checkpoint true goes on from the last checkpoint"
# Of the Trainer's options: what this package does in its own way, or not at all.
UNUSED = (
    "do_train",
    "do_eval",
    "do_predict",
    "predict_with_generate",
    "generation_max_length",
    "generation_num_beams",
    "generation_config",
    "sortish_sampler",
    "prediction_loss_only",
    "batch_eval_metrics",
    "include_for_metrics",
    "eval_accumulation_steps",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "label_names",
    "remove_unused_columns",
    "length_column_name",
)
# And the values that change nothing of those that would change something elsewhere.
WITHOUT_USE: dict[str, tuple[Any, ...]] = {
    "label_names": (None, ["labels"]),
    "remove_unused_columns": (True,),
    "generation_config": (None,),
    "sortish_sampler": (False,),
    "prediction_loss_only": (False,),
    "batch_eval_metrics": (False,),
    "include_for_metrics": (None, []),
    "length_column_name": ("length",),
}


@dataclass
class TrainOptions(ArgumentGroups):
    """What a training run is told."""

    model: ModelArguments
    corpus: CorpusArguments
    tokenizer: TokenizerArguments
    decoding: DecodingArguments
    training: TranslationTrainingArguments


def run_training(
    options: TrainOptions,
    *,
    train: Dataset | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    make_trainer: Callable[..., TranslationTrainer] = TranslationTrainer,
) -> dict[str, Any]:
    """Train, average, evaluate and save; every input is checked before the training starts.

    Args:
        options: what is recorded as the run's recipe, with whatever groups there are beside those of `TrainOptions`.
        train: training pairs, columns `source` and `target`; default: the train split of `options.corpus`, which is
            compared to the evaluation splits.
        tokenizer: default: the one that the options name, or a new one.
        make_trainer: `TranslationTrainer`, or what takes its arguments and makes one.

    Returns:
        The scores: `{"validation": {"bleu": …, …}, "test": {…}}`, as `results.json` in the output folder has them.

    Raises:
        ValueError, FileNotFoundError: an option or the data is wrong; the message says what and how to mend it.
    """
    args, corpus = options.training, options.corpus
    set_up_screen(args)
    if args.device.type == "cpu":
        keep_freed_memory()
    set_seed(args.seed)
    checkpoint = check_output_dir(args, options.model.model_name_or_path)
    check_streaming(corpus, args)
    given = train is not None
    train, evaluated = load_data(corpus, train)
    check_training_options(args, evaluated)
    if options.model.model_name_or_path is None:
        RSMarianConfig(**options.model.config_fields())  # an impossible model is said before a tokenizer is trained
    with claimed(args.output_dir, args.should_save):
        if args.should_save and checkpoint is not None:
            set_later_aside(args.output_dir, checkpoint)
        trainer = _prepare(options, train, evaluated, tokenizer, make_trainer, checkpoint)
        if not given:
            warn_of_overlap(train, evaluated)
        return train_and_evaluate(trainer, checkpoint, evaluated, options.decoding)


def _prepare(
    options: TrainOptions,
    train: AnyDataset,
    evaluated: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase | None,
    make_trainer: Callable[..., TranslationTrainer],
    checkpoint: str | None,
) -> TranslationTrainer:
    """Tokenizer, model, encoded pairs, the run's record, and the trainer of all."""
    args, corpus, group = options.training, options.corpus, PatientGroup()
    if tokenizer is None:
        tokenizer = load_or_train_tokenizer(options, train, group, checkpoint)
    model = build_model(options.model, tokenizer)
    if options.model.attn_implementation is None and (attention := faster_attention(args.device, args.bf16)):
        model.set_attn_implementation(attention)
    if hasattr(tokenizer, "src_lang"):  # a model of several languages
        name = options.model.model_name_or_path or options.tokenizer.tokenizer_name_or_path
        _, first_token = tell_languages(name, tokenizer, corpus.source_lang, corpus.target_lang)
        if first_token is not None:
            model.generation_config.forced_bos_token_id = first_token
    DepthSchedule.from_args(args, model.config)  # an impossible one is said before the corpus is prepared
    positions = getattr(model.config, "max_position_embeddings", None)
    set_search(model, options.decoding, positions)
    if args.should_save:
        log_to(Path(args.output_dir, RUN_LOG))  # a run that does not begin leaves nothing
    warn_of_long_pairs(evaluated, tokenizer, positions)
    sampling = SubwordSampler(tokenizer, args.subword_sampling) if args.subword_sampling else None
    with group.main_process_first(local=True):
        train = prepare_training_pairs(train, tokenizer, corpus, positions, sampling)
    if isinstance(train, IterableDataset):
        train = shuffled(train, args, corpus.shuffle_buffer_size)
    given = options.options()  # a trainer sets some of its arguments
    trainer = make_trainer(
        model,
        train_dataset=train,
        processing_class=tokenizer,
        args=args,
        eval_dataset=evaluated.get("validation"),
        decoding=replace(options.decoding, num_beams=args.eval_num_beams),
        target_lang=corpus.target_lang,
        max_length=positions or sys.maxsize,  # what is longer than the training pairs may be, counts as a whole
    )
    if args.should_save:
        conditions: dict[str, Any] = {"processes": args.world_size}
        if isinstance(train, Dataset):
            conditions |= {"training_pairs": len(train), "training_data": data_digest(train)}
        write_run_record(args.output_dir, given, conditions, checkpoint)
        if args.push_to_hub and Path(args.output_dir, RESULTS).is_file():
            # What is pushed meanwhile has not the scores that the run had when it ended before.
            Path(args.output_dir, RESULTS).rename(Path(args.output_dir, f"_{RESULTS}"))
            trainer.create_model_card()
        begun = options.model.model_name_or_path if checkpoint is None else str(Path(checkpoint).parent)
        if begun is None or not is_same_folder(begun, args.output_dir):
            keep_lineage(begun, args.output_dir)
    return trainer


def set_search(model: PreTrainedModel, decoding: DecodingArguments, positions: int | None) -> None:
    """Have the model translate by this search where nobody says otherwise.

    Raises:
        ValueError: the generation configuration that the model came with could not be saved so.
    """
    config, of_beams = model.generation_config, {"length_penalty": 1.0, "early_stopping": False}
    left = {name: value for name, value in of_beams.items() if getattr(config, name) not in (None, value)}
    config.update(max_length=positions, **(left if decoding.num_beams == 1 else {}), **decoding.search_kwargs())
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise ValueError(f"the model's generation_config.json cannot be saved again; mend it: {error}") from error


def shuffled(stream: IterableDataset, args: TranslationTrainingArguments, buffer_size: int) -> IterableDataset:
    """A stream in the order that the options ask for, which is another in each pass, but for `sequential`."""
    if args.train_sampling_strategy == "sequential":
        return stream
    return stream.shuffle(seed=args.seed if args.data_seed is None else args.data_seed, buffer_size=buffer_size)


def load_data(corpus: CorpusArguments, train: AnyDataset | None = None) -> tuple[AnyDataset, dict[str, Dataset]]:
    """The training pairs, if they are not there yet, and the evaluation splits that were given."""
    if train is None:
        train = load_split(corpus, "train", streaming=corpus.streaming)
    return train, load_evaluation_splits(corpus)


def train_and_evaluate(
    trainer: TranslationTrainer, checkpoint: str | None, evaluated: dict[str, Dataset], decoding: DecodingArguments
) -> dict[str, Any]:
    """Train, save, and score the final model; what `run_training` does once all is prepared."""
    args = trainer.args
    trainer.add_callback(StartSummary)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(_internal_call=True)  # which pushes nothing yet: the card comes with the scores
    trainer.save_state()
    trainer.save_metrics("train", outcome.metrics)
    results = final_evaluation(trainer, evaluated, decoding, trainer.target_lang)
    results["training"] = {"train_seconds": outcome.metrics["train_runtime"], "updates": outcome.global_step}
    if isinstance(trainer.train_dataset, Dataset):  # nobody knows how many pairs a stream has
        results["training"]["pairs"] = len(trainer.train_dataset)
    if args.should_save:
        results["weights"] = {"from": trainer.weights_from, "sha256": weights_digest(args.output_dir)}
        write_json(results, Path(args.output_dir, RESULTS))
        Path(args.output_dir, f"_{RESULTS}").unlink(missing_ok=True)  # those of before
        trainer.create_model_card()
        write_finished(args.output_dir)
        print_end(trainer, results)
    if args.push_to_hub:
        trainer.push_to_hub()
    return results


def print_end(trainer: TranslationTrainer, results: Mapping[str, Any]) -> None:
    """Print what came of a run: best step, scores with signatures, folder, and what to type next."""
    state, folder = trainer.state, trainer.args.output_dir
    best = ""
    if state.best_metric is not None and trainer.args.metric_for_best_model is not None:
        name = trainer.args.metric_for_best_model.removeprefix("eval_")
        best = f"; best validation {name} {state.best_metric:.2f} at update {state.best_global_step:,}"
    seconds = results["training"]["train_seconds"]
    print(f"{state.global_step:,} updates in {timedelta(seconds=round(seconds))}{best}")
    print(f"weights: {trainer.weights_from}")
    scored = {split: row for split, row in results.items() if "bleu" in row}
    for split, row in scored.items():
        beam = f"beam {row['num_beams']}, {row['sentences']:,} sentences"
        print(f"{split}: BLEU {row['bleu']:.2f}  chrF {row['chrf']:.2f}  ({beam})")
    for signature in {row[name]: None for row in scored.values() for name in ("bleu_signature", "chrf_signature")}:
        print(f"  {signature}")
    print(f"The model is in {folder}. Next, with files of yours:")
    print(f"  rs-transformer translate --model_name_or_path {folder} --input_file IN --output_file OUT", flush=True)


def set_up_screen(args: TranslationTrainingArguments) -> None:
    """Short lines of the main process of each machine on the screen; progress bars on terminals only."""
    set_up_logging(args.should_log)
    args.disable_tqdm = not bars_on_terminals() or args.disable_tqdm


def keep_lineage(parent: str | None, output_dir: str) -> None:
    """Copy what a collapsed or trimmed parent, or the run that goes on, says into a folder, for the model card.

    What lies there of a run that began otherwise, and left no checkpoint, goes.
    """
    for name in LINEAGE:
        kept = Path(output_dir, name)
        kept.unlink(missing_ok=True)
        if parent is not None and (record := Path(parent, name)).is_file():
            shutil.copyfile(record, kept)


def is_same_folder(model: str, folder: str) -> bool:
    """Whether a model, which may be one on the Hub, is what lies in a folder."""
    return Path(model).is_dir() and Path(model).resolve() == Path(folder).resolve()


def check_output_dir(args: TranslationTrainingArguments, parent: str | None = None) -> str | None:
    """The checkpoint to resume from, if asked to.

    Args:
        parent: the model that the training begins with, if it is not a new one.

    Raises:
        ValueError: there is a run in the output folder and nobody said that it is to go on, or the parent, which it
            would write over; or a named checkpoint is incomplete or of another run.
    """
    checkpoint = _asked_checkpoint(args)
    if checkpoint is None and parent is not None and is_same_folder(parent, args.output_dir):
        raise ValueError(
            f"output_dir: {args.output_dir} holds the model that the training begins with, and would be written over: "
            "choose another"
        )
    return checkpoint


def _asked_checkpoint(args: TranslationTrainingArguments) -> str | None:
    """What `resume_from_checkpoint` means; raises `ValueError` as `check_output_dir`."""
    resume = args.resume_from_checkpoint
    if resume is None or str(resume).lower() in ("false", "no"):
        if complete_checkpoints(args.output_dir):
            raise ValueError(
                f"{args.output_dir} holds a run already: go on with it by --resume_from_checkpoint true, or choose "
                "another output_dir"
            )
        check_unfinished(args.output_dir)
        return None
    if str(resume).lower() in ("true", "yes"):
        checkpoint = checkpoint_to_resume(args.output_dir)
        if checkpoint is None:
            check_unfinished(args.output_dir)
            logger.warning(f"{args.output_dir} holds no complete checkpoint: the run starts anew.")
        return checkpoint
    return named_checkpoint(resume, args.output_dir)


def check_unfinished(folder: str) -> None:
    """Raise `ValueError` if a folder without checkpoints holds a model, which a run would write over."""
    if Path(folder, CONFIG_NAME).is_file() and not Path(folder, RUN_RECORD).is_file():
        raise ValueError(f"output_dir: {folder} holds a model that no training has made: choose another")
    if read_mapping(Path(folder, RESULTS)):
        raise ValueError(
            f"{folder} holds a run that has finished, and no checkpoint to go on from: choose another output_dir, or "
            "begin from this model by model_name_or_path"
        )


def check_streaming(corpus_args: CorpusArguments, training_args: TranslationTrainingArguments) -> None:
    """Raise `ValueError` for options that a stream, whose length nobody knows, cannot serve."""
    if not corpus_args.streaming:
        return
    if training_args.max_steps <= 0:
        raise ValueError("streaming needs max_steps, since the number of pairs is not known")
    if (strategy := training_args.train_sampling_strategy) not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy: {strategy} needs the lengths of all pairs, which nobody knows of a stream: set "
            "random or sequential"
        )
    if training_args.max_tokens is not None:
        raise ValueError("streaming takes per_device_train_batch_size, not max_tokens")


def check_training_options(args: TranslationTrainingArguments, evaluated: Mapping[str, Dataset]) -> None:
    """Check what the Trainer itself would say only when all is prepared.

    Raises:
        ValueError: evaluation without data, an unknown metric, an optimizer, schedule or report that cannot be made.
    """
    if "validation" not in evaluated and str(args.eval_strategy.value) != "no":
        raise ValueError("eval_strategy needs validation data: give validation_file, or set eval_strategy: no")
    if "validation" not in evaluated and args.eval_on_start:
        raise ValueError("eval_on_start needs validation data: give validation_file, or leave it out")
    for name, unset in WITHOUT_USE.items():
        if getattr(args, name) not in unset:
            raise ValueError(f"there is no use for {name} here; leave it out")
    metric, known = args.metric_for_best_model, ("loss", *SCORES)
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise ValueError(f"metric_for_best_model must be one of {', '.join(known)}, got {metric!r}")
    steps = {"num_warmup_steps": args.get_warmup_steps(2), "num_training_steps": 2}
    options = {**steps, "scheduler_specific_kwargs": args.lr_scheduler_kwargs}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    makers: dict[str, Callable[[], Any]] = {
        "lr_scheduler_type and lr_scheduler_kwargs": lambda: get_scheduler(
            args.lr_scheduler_type, optimizer, **options
        ),
        "report_to": lambda: [each() for each in get_reporting_integration_callbacks(args.report_to)],
    }
    if args.optim_target_modules is None and "lomo" not in str(args.optim):  # else it needs the model
        makers["optim"] = lambda: TranslationTrainer.get_optimizer_cls_and_kwargs(args)
    if args.push_to_hub:
        validate_repo_id(args.hub_model_id or Path(args.output_dir).absolute().name)
        makers["push_to_hub"] = HfApi(token=args.hub_token).whoami
    for option, make in makers.items():
        try:
            make()
        except Exception as error:
            raise ValueError(f"{option}: {first_line(error)}") from error


def load_or_train_tokenizer(
    options: TrainOptions, train: AnyDataset, group: PatientGroup, checkpoint: str | None
) -> PreTrainedTokenizerBase:
    """The tokenizer that was named, else the parent's; else a new one, or the one of the run that goes on."""
    args, corpus = options.tokenizer, options.corpus
    name = args.tokenizer_name_or_path or options.model.model_name_or_path
    if name is not None:
        revision = "main" if args.tokenizer_name_or_path else options.model.revision
        tokenizer = load_tokenizer(name, revision)
        check_language_pair(tokenizer, corpus.source_lang, corpus.target_lang)
        return tokenizer
    if checkpoint is not None:  # of a run whose folder may be another
        return load_tokenizer(checkpoint)
    folder = Path(options.training.output_dir)
    with group.main_process_first():
        if PartialState().is_main_process:
            train_tokenizer(
                train["source"],
                train["target"],
                folder,
                source_lang=corpus.source_lang,
                target_lang=corpus.target_lang,
                vocab_size=args.vocab_size,
                vocabulary=args.vocabulary,
                character_coverage=args.character_coverage,
                model_type=args.spm_model_type,
                sample_size=args.tokenizer_sample_size,
                model_max_length=options.model.max_position_embeddings or 512,
            )
    return load_tokenizer(str(folder))


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
            write_text("".join(f"{' '.join(text.splitlines())}\n" for text in trainer.translations), file)
            print_samples(split, dataset, trainer.translations)
    return results


def print_samples(split: str, dataset: Dataset, translations: list[str]) -> None:
    """Print the first translations of a split beside source and reference."""
    if split != "test":
        return
    for row, translation in list(zip(dataset, translations, strict=True))[:SAMPLES]:
        print(f"\n[{split}] source       {row['source']}")
        print(f"{' ' * len(split)}   translation  {translation}")
        print(f"{' ' * len(split)}   reference    {row['target']}")
    print()


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser(TrainOptions.types(), unused=UNUSED, description=__doc__)
    run_training(TrainOptions(*parser.parse_recipe(argv)))


if __name__ == "__main__":
    run(main, GO_ON)
