"""From a teacher and a corpus to a distilled student: what `training/distill.py` does, stage by stage.

generate (`teachers.py`), filter (`distilled_targets.py`), train (`distillation.py`, `training_run.py`), evaluate
(`evaluation.py`). Each stage finds what is done already and goes on from there.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .corpus import CorpusArguments, load_split
from .decoding import DecodingArguments
from .distillation import DistillationLossArguments, DistillationTrainer, cache_top_k, check_match
from .distilled_targets import TargetArguments, load_targets, write_targets
from .evaluation import EvaluateArguments, evaluate_systems
from .model_building import ModelArguments, build_model
from .run_folder import write_json
from .sharding import read_record
from .teachers import Teacher, TeacherArguments, check_sources, combined, generate_corpus, load_teachers
from .tokenization import TokenizerArguments, check_language_pair, same_vocabulary
from .trainer import TranslationTrainingArguments
from .training_run import load_evaluation_splits, run_training, set_up_logging

logger = logging.get_logger(__name__)

STAGES = ("generate", "filter", "train", "evaluate")
# What may differ between the start of a run and its going on.
NOT_OF_THE_RUN = {"stages", "resume_from_checkpoint", "disable_tqdm", "local_rank"}


@dataclass
class DistillArguments:
    """Which stages to run, and where the teacher's corpus is."""

    stages: list[str] = field(
        default_factory=lambda: list(STAGES), metadata={"help": "Stages to run, in this order.", "nargs": "+"}
    )
    distilled_dir: str | None = field(
        default=None,
        metadata={
            "help": "The folder of the teacher's corpus, which several students can share; default: `distilled` in "
            "output_dir."
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
        teachers: loaded; may be empty if `loss` is not active.
        cache_file: where the teacher's most probable tokens are kept, if they are.
        shard_size: of that file's making.
        options: for the run's record.
    """

    loss: DistillationLossArguments
    teachers: Sequence[Teacher]
    cache_file: Path
    shard_size: int
    options: dict[str, Any]

    def make_trainer(
        self, model: PreTrainedModel, train_dataset: Dataset, tokenizer: PreTrainedTokenizerBase, **kwargs: Any
    ) -> DistillationTrainer:
        """The student's trainer; computes the cache before, where there is to be one."""
        teacher = combined(self.teachers) if self.loss.active else None
        if self.loss.word_top_k:
            train_dataset = cache_top_k(
                train_dataset,
                teacher,
                tokenizer,
                self.loss.word_top_k,
                self.cache_file,
                teacher_digest=" ".join(teacher.digest() for teacher in self.teachers),
                shard_size=self.shard_size,
            )
        return DistillationTrainer(
            model,
            train_dataset=train_dataset,
            processing_class=tokenizer,
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
    output = Path(training_args.output_dir)
    corpus_file = Path(args.distilled_dir or output / "distilled") / "corpus.parquet"
    targets_file = output / "targets.parquet"
    from_translations = target_args.targets != "reference"
    if not from_translations and not loss_args.active:
        raise ValueError("targets=reference distils nothing: set word_weight, hidden_weight or attention_weight")

    if model_args.model_name_or_path is None and tokenizer_args.tokenizer_name_or_path is None:
        tokenizer_args = replace(tokenizer_args, tokenizer_name_or_path=teacher_args.teachers[0])
    options: dict[str, Any] = {}
    for group in (args, teacher_args, target_args, loss_args, model_args, corpus_args, tokenizer_args, decoding_args):
        options |= asdict(group)
    trained = "train" in args.stages and check_finished(output, options | training_args.to_dict())
    train = load_split(corpus_args, "train")
    if corpus_args.max_train_samples is not None:
        train = train.take(corpus_args.max_train_samples)
    splits = load_evaluation_splits(corpus_args)
    if "evaluate" in args.stages and "test" not in splits:
        raise ValueError("the stage evaluate needs test data: give test_file, or leave the stage out of stages")
    check_sources(train, teacher_args.skip_empty_sources)
    teachers = load_teachers(teacher_args, corpus_args)
    if "train" in args.stages and not trained:
        check_student(model_args, tokenizer_args, teacher_args, loss_args, corpus_args, teachers)

    if "generate" in args.stages and from_translations:
        generate_corpus(train, teachers, teacher_args, corpus_args, corpus_file)
    if "filter" in args.stages and from_translations:
        with PartialState().main_process_first():
            record = write_targets(
                corpus_file, targets_file, target_args, corpus_args.target_lang, corpus_args.preprocessing_num_workers
            )
        if PartialState().is_main_process:
            write_json({"corpus": read_record(corpus_file), "targets": record}, output / "distillation.json")
            print(f"targets: {record['pairs']} pairs, {record['distilled']} distilled, left out: {record['left_out']}")
    if "train" in args.stages and not trained:
        if from_translations:
            train = load_targets(targets_file, target_args, corpus_args.target_lang)
        if training_args.resume_from_checkpoint is None:
            training_args.resume_from_checkpoint = "true"
        run_training(
            model_args,
            corpus_args,
            tokenizer_args,
            decoding_args,
            training_args,
            train=train,
            distillation=Distillation(
                loss_args, teachers, output / "teacher_top_k.parquet", teacher_args.shard_size, options
            ),
        )
    if "evaluate" in args.stages:
        if not (output / "results.json").is_file():
            raise FileNotFoundError(f"there is no trained student in {str(output)!r}: the stage train makes it")
        loaded = {teacher.name: (teacher.model, teacher.tokenizer) for teacher in teachers}
        systems = EvaluateArguments(
            systems=[*teacher_args.teachers, str(output)], output_file=str(output / "evaluation.json")
        )
        evaluate_systems(systems, corpus_args, decoding_args, loaded)


def check_finished(output: Path, options: dict[str, Any]) -> bool:
    """Whether the student in a folder is trained already, by these options.

    Raises:
        ValueError: there is a run in the folder, finished or not, of other options.
    """
    recipe = output / "recipe.yaml"
    if not recipe.is_file():
        return False
    found = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    plain = json.loads(json.dumps(options, default=str))
    for name in sorted({*found, *plain} - NOT_OF_THE_RUN):
        if not name.endswith("_token") and found.get(name) != plain.get(name):
            raise ValueError(
                f"{output} holds a run with {name}={found.get(name)!r}, now it is {plain.get(name)!r}: go on with the "
                "former, or choose another output_dir"
            )
    if not (output / "results.json").is_file():
        return False
    logger.info(f"{output} holds the trained student already: the stage train is skipped.")
    return True


def check_student(
    model_args: ModelArguments,
    tokenizer_args: TokenizerArguments,
    teacher_args: TeacherArguments,
    loss_args: DistillationLossArguments,
    corpus_args: CorpusArguments,
    teachers: Sequence[Teacher],
) -> None:
    """Build the student as the training will, and hold it against the teachers.

    Raises:
        ValueError: an impossible configuration; or, where more than translations is learned, another vocabulary or
            shapes that do not match.
    """
    name = tokenizer_args.tokenizer_name_or_path or model_args.model_name_or_path
    revision = "main" if tokenizer_args.tokenizer_name_or_path else model_args.revision
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    check_language_pair(tokenizer, corpus_args.source_lang, corpus_args.target_lang)
    student = build_model(model_args, tokenizer)
    if not loss_args.active:
        return
    if teacher_args.teacher_mode == "pool" and len(teachers) > 1:
        raise ValueError("word_weight, hidden_weight and attention_weight need one teacher, or teacher_mode=ensemble")
    if len(teachers) > 1 and (loss_args.hidden_weight or loss_args.attention_weight):
        raise ValueError("hidden_weight and attention_weight need one teacher, not an ensemble")
    for teacher in teachers:
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
        check_match(student.config, teacher.model.config, loss_args)
    if loss_args.word_top_k > sizes[0]:
        raise ValueError(f"word_top_k must be at most the vocabulary ({sizes[0]}), got {loss_args.word_top_k}")
