"""Distil a teacher into a recurrently stacked student: its translations, its distributions, or both.

    rs-transformer distill training/recipes/tanaka_distilled.yaml
    rs-transformer distill generate training/recipes/tanaka_distilled.yaml --teacher_n_best 5
    rs-transformer distill filter train training/recipes/tanaka_distilled.yaml --word_weight 0 \\
        --word_top_k 0 --output_dir runs/tanaka_distilled_sequence
    rs-transformer distill --teacher_command "marian-decoder -c teacher.yml" --train_file a.ja a.en \\
        --test_file b.ja b.en --source_lang ja --target_lang en --output_dir runs/student

The stages, all of them unless some are named: generate (the teacher translates the training sources), filter (choose
what the student learns from), train, evaluate. The same command goes on where it was stopped; what is decoded and
trained already is not done again. The output folder is that of `training/train.py`, with `distillation.json` (where
the targets come from, what was left out) and `evaluation.json` (student against teacher).
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset
from transformers import MarianTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoints import load_tokenizer
from ..configuration_rs_marian import RSMarianConfig
from ..corpus import CorpusArguments, warn_of_overlap
from ..decoding import DecodingArguments
from ..distillation.cache import cache_top_k
from ..distillation.losses import (
    DistillationLossArguments,
    check_checkpointing,
    check_depths,
    check_match,
    check_segmentation,
)
from ..distillation.resegmentation import is_part
from ..distillation.targets import TargetArguments, load_targets, write_targets
from ..distillation.teacher_corpus import check_corpus, check_sources, generate_corpus
from ..distillation.teachers import Teacher, TeacherArguments, combined, load_teachers, longest_uncut
from ..distillation.trainer import DistillationTrainer
from ..tokenization import TokenizerArguments, check_language_pair, same_vocabulary
from ..training.arguments import TranslationTrainingArguments
from ..training.depth_schedule import DepthSchedule
from ..training.model import ModelArguments, build_model
from ..training.run_folder import CHANGEABLE, RECIPE, RUN_LOG, complete_checkpoints, is_finished, is_same_place
from ..utils.console import log_to
from ..utils.files import claimed, read_mapping, write_json, write_text
from ..utils.map_shards import read_record
from ..utils.processes import PatientGroup, run
from ..utils.recipes import ArgumentGroups, RecipeParser
from .evaluate import EvaluateArguments, evaluate_systems
from .train import UNUSED, check_output_dir, check_training_options, load_data, run_training, set_up_screen

logger = logging.get_logger(__name__)

GO_ON = "the same command goes on where it was stopped"

STAGES = ("generate", "filter", "train", "evaluate")


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
    distributions_dir: str | None = field(
        default=None,
        metadata={
            "help": "The folder of the teacher's distributions (word_top_k), which several students that learn from "
            "the same pairs can share; default: `_distillation` in output_dir."
        },
    )
    new_tokenizer: bool = field(
        default=False,
        metadata={
            "help": "Train a tokenizer for a student made anew, instead of taking the first teacher's. A program has "
            "none to take."
        },
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
            own = self.teachers[0].tokenizer
            train_dataset = cache_top_k(
                train_dataset,
                teacher,
                processing_class,
                self.loss.word_top_k,
                self.cache_file,
                teacher_digest=" ".join(each.digest for each in self.teachers),
                teacher_tokenizer=own if same_vocabulary(processing_class, own) else None,
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


@dataclass
class DistillOptions(ArgumentGroups):
    """What a distillation is told."""

    distill: DistillArguments
    teacher: TeacherArguments
    targets: TargetArguments
    loss: DistillationLossArguments
    model: ModelArguments
    corpus: CorpusArguments
    tokenizer: TokenizerArguments
    decoding: DecodingArguments
    training: TranslationTrainingArguments

    @property
    def output(self) -> Path:
        """The student's folder."""
        return Path(self.training.output_dir)

    @property
    def work(self) -> Path:
        """Where the targets and the teacher's distributions are; the Trainer does not push what begins so."""
        return self.output / "_distillation"

    @property
    def corpus_file(self) -> Path:
        """The teacher's corpus."""
        return Path(self.distill.distilled_dir or self.work) / "corpus.parquet"

    @property
    def targets_file(self) -> Path:
        """What the student learns from."""
        return self.work / "targets.parquet"

    @property
    def distributions_file(self) -> Path:
        """The teacher's most probable tokens."""
        return Path(self.distill.distributions_dir or self.work) / "teacher_top_k.parquet"

    @property
    def translating(self) -> bool:
        """Whether the teachers translate anything."""
        return self.targets.targets != "reference"


def distill(options: DistillOptions) -> None:
    """Run the stages that were asked for; every input of all of them is checked before the first one starts.

    Raises:
        ValueError, OSError: an option, a model or the data is wrong or not there, or was changed since the run began.
    """
    set_up_screen(options.training)
    group = PatientGroup()
    stages = options.distill.stages
    check_combination(options)
    training = "train" in stages and not check_finished(options)
    train, splits = load_data(options.corpus)
    if "evaluate" in stages and "test" not in splits:
        raise ValueError("the stage evaluate needs test data: give test_file, or leave the stage out of stages")
    check_sources(train, options.teacher.skip_empty_sources)
    teachers = load_teachers(options.teacher, options.corpus)
    tokenizer = student_tokenizer(options, teachers)
    if training:
        check_training(options, splits, tokenizer, teachers)
    with claimed(options.output, options.training.should_save):
        if options.training.should_save:
            log_to(options.output / RUN_LOG)
        if training:
            warn_of_overlap(train, splits)
        if options.translating:
            translate_and_choose(options, train, teachers, group, training)
        if training:
            train_student(options, train, tokenizer, teachers)
            group.wait()  # the main process is the last to finish
        if "evaluate" in stages:
            compare_to_teachers(options, teachers, splits["test"], group)


def train_student(
    options: DistillOptions, train: Dataset, tokenizer: PreTrainedTokenizerBase | None, teachers: Sequence[Teacher]
) -> None:
    """The stage train: as `training/train.py`, on the targets and by the losses of the options."""
    if options.translating:
        language = options.corpus.target_lang
        longest = longest_uncut(teachers, options.teacher, options.corpus).get("longest")
        train = load_targets(options.targets_file, options.corpus_file, options.targets, language, longest)
    distillation = Distillation(options.loss, teachers, options.distributions_file, options.teacher.shard_size)
    run_training(options, train=train, tokenizer=tokenizer, make_trainer=distillation.make_trainer)


def check_training(
    options: DistillOptions,
    splits: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase | None,
    teachers: Sequence[Teacher],
) -> None:
    """Check what the stage train will need, before hours of decoding; a run that has begun goes on.

    Raises:
        ValueError: as `run_training` and `check_student`.
    """
    if options.training.resume_from_checkpoint is None and complete_checkpoints(options.output):
        options.training.resume_from_checkpoint = "true"
    check_output_dir(options.training, options.model.model_name_or_path)
    check_training_options(options.training, splits)
    student = check_student(options, tokenizer, teachers)
    check_depths(DepthSchedule.from_args(options.training, student), options.loss)
    check_checkpointing(options.training, options.loss)


def translate_and_choose(
    options: DistillOptions, train: Dataset, teachers: Sequence[Teacher], group: PatientGroup, training: bool
) -> None:
    """The stages generate and filter, those that were asked for; else the check of what they have left.

    Raises:
        ValueError, FileNotFoundError: what the stages refuse, or what is there was made otherwise.
    """
    stages, corpus_file, targets_file = options.distill.stages, options.corpus_file, options.targets_file
    if "generate" in stages:
        generate_corpus(train, teachers, options.teacher, options.corpus, corpus_file)
    elif "filter" in stages or (training and targets_file.is_file()):
        check_corpus(corpus_file, train, teachers, options.teacher, options.corpus)
    if "filter" not in stages:
        return
    with group.main_process_first():
        record = write_targets(
            corpus_file,
            targets_file,
            options.targets,
            options.corpus.target_lang,
            options.corpus.preprocessing_num_workers,
            **longest_uncut(teachers, options.teacher, options.corpus),
        )
    if PartialState().is_main_process:
        corpus = {name: value for name, value in read_record(corpus_file).items() if name != "digests"}
        write_json({"corpus": corpus, "targets": record}, options.output / "distillation.json")
        left_out = ", ".join(f"{count} {reason}" for reason, count in record["left_out"].items()) or "none"
        print(
            f"targets: {record['pairs']:,} pairs, {record['distilled']:,} distilled; left out: {left_out}", flush=True
        )


def compare_to_teachers(
    options: DistillOptions, teachers: Sequence[Teacher], test: Dataset, group: PatientGroup
) -> None:
    """The stage evaluate: student against teachers on the test set, into `evaluation.json`.

    Raises:
        FileNotFoundError: no student has been trained.
        ValueError: as `generate_corpus`, where the teacher is a program.
    """
    output = options.output
    if not is_finished(output):
        raise FileNotFoundError(f"there is no trained student in {str(output)!r}: the stage train makes it")
    device = PartialState().device
    loaded = {t.name: (t.model.to(device), t.tokenizer) for t in teachers}
    prefixes = {t.name: t.prefix for t in teachers}
    translated = [translate_test(options, test, group)] if options.teacher.program else []
    systems = [*loaded, *translated, str(output)]
    args = EvaluateArguments(systems=systems, output_file=str(output / "evaluation.json"))
    evaluate_systems(args, options.corpus, options.decoding, loaded, prefixes)


def translate_test(options: DistillOptions, test: Dataset, group: PatientGroup) -> str:
    """The file with a program's translations of the test set, a line each."""
    corpus = generate_corpus(test, [], options.teacher, options.corpus, options.work / "test.parquet")
    file = options.work / "teacher_translations.txt"
    with group.main_process_first():
        if PartialState().is_main_process:
            translations = [next(iter(texts), "") for texts in pq.read_table(corpus)["hypotheses"].to_pylist()]
            write_text("".join(f"{text}\n" for text in translations), file)
    return str(file)


def check_combination(options: DistillOptions) -> None:
    """Raise `ValueError` for options that are each possible and make no sense together."""
    teacher_args, target_args, loss_args = options.teacher, options.targets, options.loss
    several = len(teacher_args.teachers) > 1
    if teacher_args.program and (loss_args.active or target_args.targets != "best"):
        raise ValueError(
            "a program as teacher gives one translation of each sentence and nothing else: leave word_weight, "
            "hidden_weight and attention_weight out, and targets as best"
        )
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
    check_segmentation(loss_args, options.training)
    if options.corpus.streaming:
        raise ValueError("streaming does not go with distillation, whose shards need to know the number of pairs")


def check_finished(options: DistillOptions) -> bool:
    """Whether the student in a folder is trained already, by these options.

    An option that the run's recipe does not have was not set then, or not known to the transformers of then: it must
    have its default.

    Raises:
        ValueError: there is a run in the folder, finished or begun, of other options.
    """
    output = options.output
    finished = is_finished(output)
    if not finished and not complete_checkpoints(output):
        return False
    if not (found := read_mapping(output / RECIPE)):
        logger.warning(f"{output / RECIPE} is missing or damaged: nobody can say if the options are those of before.")
        return finished
    defaults = TranslationTrainingArguments(output_dir=str(output)).to_dict()
    wanted = json.loads(json.dumps(options.options(), default=str))
    moved = (Path(found.get("output_dir", output)).parent, output.parent)
    for name in sorted(wanted):
        then = found.get(name, defaults.get(name))
        if not CHANGEABLE.fullmatch(name) and not is_same_place(then, wanted[name], *moved):
            raise ValueError(
                f"{output} holds a run with {name}={then!r}, now it is {wanted[name]!r}: go on with the "
                "former, or choose another output_dir (distilled_dir keeps the teacher's corpus)"
            )
    if finished:
        logger.info(f"{output} holds the trained student already: the stage train is skipped.")
    return finished


def student_tokenizer(options: DistillOptions, teachers: Sequence[Teacher]) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was named, the checkpoint's, or the first teacher's; None for one to be trained.

    It is trained where the options say so, and for a new student of a program, on the targets that are learned.

    Raises:
        ValueError: it is of the opposite direction, or a new student's is no `MarianTokenizer`.
    """
    named, model_args = options.tokenizer.tokenizer_name_or_path, options.model
    name = named or model_args.model_name_or_path
    if name is not None:
        if options.distill.new_tokenizer:
            raise ValueError(
                f"new_tokenizer, but the student's tokenizer is to be that of {name}: give one of the two"
            )
        revision = "main" if named else model_args.revision
        tokenizer = load_tokenizer(name, revision)
        check_language_pair(tokenizer, options.corpus.source_lang, options.corpus.target_lang)
        return tokenizer
    if options.distill.new_tokenizer or not teachers:
        return None
    if not isinstance(teachers[0].tokenizer, MarianTokenizer):
        raise ValueError(
            f"the tokenizer of {teachers[0].name} is no MarianTokenizer, which a new student needs: set "
            "new_tokenizer, or give tokenizer_name_or_path"
        )
    return teachers[0].tokenizer


def check_student(
    options: DistillOptions, tokenizer: PreTrainedTokenizerBase | None, teachers: Sequence[Teacher]
) -> PretrainedConfig:
    """Build the student as the training will, hold it against the teachers, and return its configuration.

    Raises:
        ValueError: an impossible configuration; or, where more than translations is learned, another vocabulary,
            shapes that do not match, or pairs that are too long for a teacher.
    """
    loss_args = options.loss
    if tokenizer is None:
        config = RSMarianConfig(**options.model.config_fields())
        if loss_args.active:
            raise ValueError(
                "word_weight, hidden_weight and attention_weight need the teacher's tokenizer, not a new one"
            )
        return config
    student = build_model(options.model, tokenizer)
    if loss_args.active:
        longest = max(options.corpus.max_source_length, options.corpus.max_target_length)
        for teacher in teachers:
            check_teacher(teacher, student, tokenizer, longest, loss_args)
            check_match(student.config, teacher.model.config, loss_args)
        vocabulary = student.get_output_embeddings().weight.shape[0]
        if loss_args.word_top_k > vocabulary:
            raise ValueError(f"word_top_k must be at most the vocabulary ({vocabulary}), got {loss_args.word_top_k}")
    return student.config


def check_teacher(
    teacher: Teacher,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    loss: DistillationLossArguments,
) -> None:
    """Raise `ValueError` if more than a teacher's translations is to be learned, and its tokens are not the student's.

    A student may have a part of the teacher's vocabulary where it learns from distributions that are kept.

    Args:
        longest: pair that the student trains on, in tokens.
    """
    if teacher.prefix or hasattr(teacher.tokenizer, "src_lang"):
        raise ValueError(f"{teacher.name} is multilingual: learn from its translations alone")
    if difference := same_vocabulary(tokenizer, teacher.tokenizer):
        if loss.needs_teacher or not is_part(tokenizer, teacher.tokenizer):
            raise ValueError(
                f"student and teacher {teacher.name} must have one vocabulary for word_weight, hidden_weight and "
                f"attention_weight: {difference}. Give the student the teacher's tokenizer_name_or_path, or a part of "
                "it (trim) and word_top_k, or learn from translations alone"
            )
    else:
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


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    stages = []
    while argv and argv[0] in STAGES:
        stages.append(argv.pop(0))
    if stages:
        argv += ["--stages", *stages]
    unused = (*UNUSED, "shuffle_buffer_size")
    parser = RecipeParser(DistillOptions.types(), unused=unused, description=__doc__)
    distill(DistillOptions(*parser.parse_recipe(argv)))


if __name__ == "__main__":
    run(main, GO_ON)
