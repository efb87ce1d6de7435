"""Distil a teacher into a recurrently stacked student: its translations, its distributions, or both.

    accelerate launch training/distill.py training/recipes/tanaka_distilled.yaml
    accelerate launch training/distill.py generate training/recipes/tanaka_distilled.yaml --teacher_n_best 5
    accelerate launch training/distill.py filter train training/recipes/tanaka_distilled.yaml --word_weight 0 \\
        --word_top_k 0 --output_dir runs/tanaka_distilled_sequence

The stages, all of them unless some are named: generate (the teacher translates the training sources), filter (choose
what the student learns from), train, evaluate. The same command goes on where it was stopped; what is decoded and
trained already is not done again. The output folder is that of `training/train.py`, with `distillation.json` (where
the targets come from, what was left out) and `evaluation.json` (student against teacher).
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from datasets import Dataset
from transformers import MarianTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoints import load_tokenizer
from ..configuration_rs_marian import RSMarianConfig
from ..corpus import CorpusArguments, load_split
from ..decoding import DecodingArguments
from ..distillation.cache import cache_top_k
from ..distillation.losses import DistillationLossArguments, check_depths, check_match
from ..distillation.targets import TargetArguments, load_targets, write_targets
from ..distillation.teacher_corpus import check_corpus, check_sources, generate_corpus
from ..distillation.teachers import Teacher, TeacherArguments, combined, load_teachers
from ..distillation.trainer import DistillationTrainer
from ..tokenization import TokenizerArguments, check_language_pair, same_vocabulary
from ..training.arguments import TranslationTrainingArguments
from ..training.depth_schedule import DepthSchedule
from ..training.model import ModelArguments, build_model
from ..training.run_folder import complete_checkpoints
from ..utils.files import write_json
from ..utils.map_shards import read_record
from ..utils.processes import PatientGroup, run
from ..utils.recipes import RecipeParser
from .evaluate import EvaluateArguments, evaluate_systems
from .train import check_output_dir, check_validation, load_evaluation_splits, run_training, set_up_logging

logger = logging.get_logger(__name__)

STAGES = ("generate", "filter", "train", "evaluate")
# Arguments that may be others when a run goes on: they do not change what is learned.
CHANGEABLE = re.compile(
    r"stages|preprocessing_num_workers|output_dir|resume_from_checkpoint|disable_tqdm|local_rank|report_to|run_name|project|"
    r"(logging|log|save|eval|dataloader|hub|ddp|push_to|torch_compile|trackio|per_device_eval)_\w+"
)


@dataclass
class DistillArguments:
    """Which stages to run, where the teacher's corpus is, and whose tokenizer the student has."""

    stages: list[str] = field(
        default_factory=lambda: list(STAGES),
        metadata={"help": f"Stages to run, of {', '.join(STAGES)}; always in this order.", "nargs": "+"},
    )
    distilled_dir: str | None = field(
        default=None,
        metadata={
            "help": "The folder of the teacher's corpus, which several students can share; default: `_distillation` "
            "in output_dir."
        },
    )
    new_tokenizer: bool = field(
        default=False,
        metadata={"help": "Train a tokenizer for a student made anew, instead of taking the first teacher's."},
    )

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage not in STAGES:
                raise ValueError(f"there is no stage {stage!r}; stages: {', '.join(STAGES)}")


@dataclass
class Distillation:
    """What `run_training` needs to train a student instead of a model on its own.

    Args:
        loss: what is learned besides translations.
        teachers: loaded.
        cache_file: where the teacher's most probable tokens are kept, if they are.
        shard_size: of that file's making.
    """

    loss: DistillationLossArguments
    teachers: Sequence[Teacher]
    cache_file: Path
    shard_size: int

    def make_trainer(
        self,
        model: PreTrainedModel,
        *,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        **kwargs: Any,
    ) -> DistillationTrainer:
        """The student's trainer; computes the cache before, where there is to be one."""
        teacher = combined(self.teachers) if self.loss.active else None
        if self.loss.word_top_k:
            train_dataset = cache_top_k(
                train_dataset,
                teacher,
                processing_class,
                self.loss.word_top_k,
                self.cache_file,
                teacher_digest=" ".join(each.digest for each in self.teachers),
                shard_size=self.shard_size,
            )
        if not self.loss.needs_teacher:
            for each in self.teachers:
                each.model.to("cpu")  # leave its memory to the student
        return DistillationTrainer(
            model,
            train_dataset=train_dataset,
            processing_class=processing_class,
            distillation=self.loss,
            teacher=teacher,
            **kwargs,
        )


def distill(
    args: DistillArguments,
    teacher_args: TeacherArguments,
    target_args: TargetArguments,
    loss_args: DistillationLossArguments,
    model_args: ModelArguments,
    corpus_args: CorpusArguments,
    tokenizer_args: TokenizerArguments,
    decoding_args: DecodingArguments,
    training_args: TranslationTrainingArguments,
) -> None:
    """Run the stages that were asked for; every input of all of them is checked before the first one starts.

    Raises:
        ValueError, OSError: an option, a model or the data is wrong or not there, or was changed since the run began.
    """
    set_up_logging(training_args)
    group = PatientGroup()
    output = Path(training_args.output_dir)
    work = output / "_distillation"  # the Trainer does not push what begins so
    corpus_file = Path(args.distilled_dir or work) / "corpus.parquet"
    targets_file = work / "targets.parquet"
    translating = target_args.targets != "reference"
    check_combination(teacher_args, target_args, loss_args, corpus_args)
    options: dict[str, Any] = {}
    for arguments in (
        args,
        teacher_args,
        target_args,
        loss_args,
        model_args,
        corpus_args,
        tokenizer_args,
        decoding_args,
    ):
        options |= asdict(arguments)
    training = "train" in args.stages and not check_finished(output, options, training_args)
    train = load_split(corpus_args, "train")
    if corpus_args.max_train_samples is not None:
        train = train.take(corpus_args.max_train_samples)
    splits = load_evaluation_splits(corpus_args)
    if "evaluate" in args.stages and "test" not in splits:
        raise ValueError("the stage evaluate needs test data: give test_file, or leave the stage out of stages")
    check_sources(train, teacher_args.skip_empty_sources)
    teachers = load_teachers(teacher_args, corpus_args)
    tokenizer = student_tokenizer(args, model_args, tokenizer_args, corpus_args, teachers)
    if training:
        if training_args.resume_from_checkpoint is None and complete_checkpoints(output):
            training_args.resume_from_checkpoint = "true"
        check_output_dir(training_args)
        check_validation(training_args, splits)
        student = check_student(model_args, tokenizer, teacher_args, loss_args, corpus_args, teachers)
        check_depths(DepthSchedule.from_args(training_args, student), loss_args)

    if "generate" in args.stages and translating:
        generate_corpus(train, teachers, teacher_args, corpus_args, corpus_file)
    elif translating and ("filter" in args.stages or (training and targets_file.is_file())):
        check_corpus(corpus_file, train, teachers, teacher_args, corpus_args)
    if "filter" in args.stages and translating:
        with group.main_process_first():
            record = write_targets(
                corpus_file, targets_file, target_args, corpus_args.target_lang, corpus_args.preprocessing_num_workers
            )
        if PartialState().is_main_process:
            corpus = {name: value for name, value in read_record(corpus_file).items() if name != "digests"}
            write_json({"corpus": corpus, "targets": record}, output / "distillation.json")
            print(f"targets: {record['pairs']} pairs, {record['distilled']} distilled, left out: {record['left_out']}")
    if training:
        if translating:
            train = load_targets(targets_file, corpus_file, target_args, corpus_args.target_lang)
        run_training(
            model_args,
            corpus_args,
            tokenizer_args,
            decoding_args,
            training_args,
            train=train,
            tokenizer=tokenizer,
            make_trainer=Distillation(
                loss_args, teachers, work / "teacher_top_k.parquet", teacher_args.shard_size
            ).make_trainer,
            recorded=options,
        )
        group.wait()  # the main process is the last to finish
    if "evaluate" in args.stages:
        if not (output / "results.json").is_file():
            raise FileNotFoundError(f"there is no trained student in {str(output)!r}: the stage train makes it")
        device = PartialState().device
        loaded = {t.name: (t.model.to(device), t.tokenizer) for t in teachers if not t.prefix}
        systems = EvaluateArguments(systems=[*loaded, str(output)], output_file=str(output / "evaluation.json"))
        evaluate_systems(systems, corpus_args, decoding_args, loaded)


def check_combination(
    teacher_args: TeacherArguments,
    target_args: TargetArguments,
    loss_args: DistillationLossArguments,
    corpus_args: CorpusArguments,
) -> None:
    """Raise `ValueError` for options that are each possible and make no sense together."""
    several = len(teacher_args.teachers) > 1
    pooled = several and teacher_args.teacher_mode == "pool"
    if target_args.targets == "reference" and not loss_args.active:
        raise ValueError("targets=reference distils nothing: set word_weight, hidden_weight or attention_weight")
    if target_args.targets == "closest" and teacher_args.teacher_n_best == 1 and not pooled:
        raise ValueError("targets=closest has nothing to choose from: set teacher_n_best to 2 or more")
    if target_args.targets == "best" and pooled:
        raise ValueError(
            "targets=best would take the first teacher's alone: set targets=closest, or teacher_mode=ensemble"
        )
    if loss_args.active and pooled:
        raise ValueError("word_weight, hidden_weight and attention_weight need one teacher, or teacher_mode=ensemble")
    if several and (loss_args.hidden_weight or loss_args.attention_weight):
        raise ValueError("hidden_weight and attention_weight need one teacher, not an ensemble")
    if corpus_args.streaming:
        raise ValueError("streaming does not go with distillation, whose shards need to know the number of pairs")


def check_finished(output: Path, options: dict[str, Any], training_args: TranslationTrainingArguments) -> bool:
    """Whether the student in a folder is trained already, by these options.

    Raises:
        ValueError: there is a run in the folder, finished or begun, of other options.
    """
    finished = (output / "results.json").is_file()
    if not finished and not complete_checkpoints(output):
        return False
    found = yaml.safe_load((output / "recipe.yaml").read_text(encoding="utf-8"))
    trained_with = {name: value for name, value in training_args.to_dict().items() if name in found}
    wanted = json.loads(json.dumps(options | trained_with, default=str))
    for name in sorted(wanted):
        if not CHANGEABLE.fullmatch(name) and found.get(name) != wanted[name]:
            raise ValueError(
                f"{output} holds a run with {name}={found.get(name)!r}, now it is {wanted[name]!r}: go on with the "
                "former, or choose another output_dir (distilled_dir keeps the teacher's corpus)"
            )
    if finished:
        logger.info(f"{output} holds the trained student already: the stage train is skipped.")
    return finished


def student_tokenizer(
    args: DistillArguments,
    model_args: ModelArguments,
    tokenizer_args: TokenizerArguments,
    corpus_args: CorpusArguments,
    teachers: Sequence[Teacher],
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was named, the checkpoint's, or the first teacher's; None for one to be trained.

    Raises:
        ValueError: it is of the opposite direction, or a new student's is no `MarianTokenizer`.
    """
    name = tokenizer_args.tokenizer_name_or_path or model_args.model_name_or_path
    if name is not None:
        if args.new_tokenizer:
            raise ValueError(
                f"new_tokenizer, but the student's tokenizer is to be that of {name}: give one of the two"
            )
        revision = "main" if tokenizer_args.tokenizer_name_or_path else model_args.revision
        tokenizer = load_tokenizer(name, revision)
        check_language_pair(tokenizer, corpus_args.source_lang, corpus_args.target_lang)
        return tokenizer
    if args.new_tokenizer:
        return None
    if not isinstance(teachers[0].tokenizer, MarianTokenizer):
        raise ValueError(
            f"the tokenizer of {teachers[0].name} is no MarianTokenizer, which a new student needs: set "
            "new_tokenizer, or give tokenizer_name_or_path"
        )
    return teachers[0].tokenizer


def check_student(
    model_args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher_args: TeacherArguments,
    loss_args: DistillationLossArguments,
    corpus_args: CorpusArguments,
    teachers: Sequence[Teacher],
) -> PretrainedConfig:
    """Build the student as the training will, hold it against the teachers, and return its configuration.

    Raises:
        ValueError: an impossible configuration; or, where more than translations is learned, another vocabulary,
            shapes that do not match, or pairs that are too long for a teacher.
    """
    if tokenizer is None:
        config = RSMarianConfig(**model_args.config_fields())
        if loss_args.active:
            raise ValueError(
                "word_weight, hidden_weight and attention_weight need the teacher's tokenizer, not a new one"
            )
        return config
    student = build_model(model_args, tokenizer)
    if not loss_args.active:
        return student.config
    longest = max(corpus_args.max_source_length, corpus_args.max_target_length)
    for teacher in teachers:
        if teacher.prefix or hasattr(teacher.tokenizer, "src_lang"):
            raise ValueError(f"{teacher.name} is multilingual: learn from its translations alone")
        if difference := same_vocabulary(tokenizer, teacher.tokenizer):
            raise ValueError(
                f"student and teacher {teacher.name} must have one vocabulary for word_weight, hidden_weight and "
                f"attention_weight: {difference}. Give the student the teacher's tokenizer_name_or_path, or learn "
                "from translations alone"
            )
        sizes = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher.model)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"student and teacher {teacher.name} have output vocabularies of {sizes[0]} and {sizes[1]}"
            )
        positions = getattr(teacher.model.config, "max_position_embeddings", longest)
        if positions < longest:
            raise ValueError(
                f"teacher {teacher.name} has {positions} positions: lower max_source_length and max_target_length "
                f"({longest}) to that"
            )
        check_match(student.config, teacher.model.config, loss_args)
    if loss_args.word_top_k > sizes[0]:
        raise ValueError(f"word_top_k must be at most the vocabulary ({sizes[0]}), got {loss_args.word_top_k}")
    return student.config


GROUPS = (
    DistillArguments,
    TeacherArguments,
    TargetArguments,
    DistillationLossArguments,
    ModelArguments,
    CorpusArguments,
    TokenizerArguments,
    DecodingArguments,
    TranslationTrainingArguments,
)


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    stages = []
    while argv and argv[0] in STAGES:
        stages.append(argv.pop(0))
    if stages:
        argv += ["--stages", *stages]
    distill(*RecipeParser(GROUPS, description=__doc__).parse_recipe(argv))


if __name__ == "__main__":
    run(main)
