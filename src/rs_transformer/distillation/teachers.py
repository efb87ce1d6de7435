"""Teachers of a student: which models, told which languages, loaded and checked.

What they translate: `teacher_corpus.py`. What is learned from their distributions: `losses.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from transformers import (
    AutoModelForSeq2SeqLM,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..checkpoints import bar_padding, commit_of, load_config, load_translator, model_digest
from ..corpus import CorpusArguments
from ..decoding import DecodingArguments
from ..ensemble import EnsembleForSeq2SeqLM
from ..tokenization import check_language_pair, same_vocabulary, tell_languages
from ..utils.programs import check_program, split_command
from ..utils.ranges import check_range
from ..utils.recipes import default_of

logger = logging.get_logger(__name__)

ENGINES = ("transformers", "ctranslate2")
MODES = ("ensemble", "pool")
# What a program that translates is asked for, too.
OF_PROGRAMS = ("teacher_command", "shard_size", "skip_empty_sources")


@dataclass
class TeacherArguments:
    """The teachers, and how they translate the training sources."""

    teachers: list[str] = field(
        default_factory=list,
        metadata={"help": "One or several sequence-to-sequence models, on the Hub or in folders.", "nargs": "+"},
    )
    teacher_command: str | None = field(
        default=None,
        metadata={
            "help": "Instead of models a program, with its arguments, that reads sentences on standard input, one a "
            "line, and writes a translation for each on standard output. Cut into words as a shell does, without "
            "one; run once a shard."
        },
    )
    teacher_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the teachers."})
    teacher_mode: str = field(
        default="ensemble",
        metadata={
            "help": "Several teachers decode as one (the mean of their distributions; one vocabulary), or each by "
            "itself, their translations pooled.",
            "choices": list(MODES),
        },
    )
    engine: str = field(
        default="transformers", metadata={"help": "What the teachers decode with.", "choices": list(ENGINES)}
    )
    ctranslate2_models: list[str] | None = field(
        default=None,
        metadata={"help": "The teachers converted to CTranslate2, a folder each, for that engine.", "nargs": "+"},
    )
    teacher_num_beams: int = field(default=5, metadata={"help": "Beam size of the teachers."})
    teacher_n_best: int = field(
        default=1, metadata={"help": "Translations kept of each teacher, at most its beam size."}
    )
    teacher_length_penalty: float = field(
        default=1.0, metadata={"help": "Exponent of the length that the teachers' beam scores are divided by."}
    )
    teacher_max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Longest translation in tokens; default: max_target_length and one more, so that one that was cut "
            "is over max_target_length and not learned."
        },
    )
    teacher_decoding_max_tokens: int = field(
        default=4096, metadata={"help": "Source tokens of a decoding batch, padding and beams included."}
    )
    shard_size: int = field(default=2000, metadata={"help": "Sentences that are decoded and written at a time."})
    teacher_source_code: str | None = field(
        default=None, metadata={"help": "A multilingual teacher's own code of the source language (NLLB: jpn_Jpan)."}
    )
    teacher_target_code: str | None = field(
        default=None,
        metadata={"help": "A multilingual teacher's own code of the target language (NLLB: eng_Latn; OPUS-MT: eng)."},
    )
    skip_empty_sources: bool = field(
        default=False, metadata={"help": "Leave blank source sentences out instead of refusing them."}
    )

    def __post_init__(self) -> None:
        if not self.teachers and self.teacher_command is None:
            raise ValueError("there is no teacher: give models as teachers, or a program as teacher_command")
        if self.program:
            self._check_options_of_models()
        sizes = ("teacher_decoding_max_tokens", "teacher_max_new_tokens", "shard_size")
        check_range(self, "teacher_num_beams", "teacher_n_best", *sizes, least=1)
        check_range(self, "teacher_length_penalty")
        if self.teacher_n_best > self.teacher_num_beams:
            raise ValueError(
                f"teacher_n_best must be at most teacher_num_beams ({self.teacher_num_beams}), got "
                f"{self.teacher_n_best}"
            )
        if (self.engine == "ctranslate2") != bool(self.ctranslate2_models):
            raise ValueError("ctranslate2_models and engine=ctranslate2 go together; give both or neither")
        if self.ctranslate2_models and len(self.ctranslate2_models) != len(self.teachers):
            raise ValueError(
                f"there are {len(self.teachers)} teachers and {len(self.ctranslate2_models)} ctranslate2_models; name "
                "one for each teacher, in the same order"
            )
        if self.engine == "ctranslate2" and self.teacher_mode == "ensemble" and len(self.teachers) > 1:
            raise ValueError(
                "CTranslate2 decodes no ensembles: name one teacher, set engine=transformers, or have distill take "
                "the best of all (teacher_mode=pool)"
            )

    @property
    def program(self) -> list[str]:
        """The words of `teacher_command`; none where models teach.

        Raises:
            ValueError: as `split_command`.
        """
        return [] if self.teacher_command is None else split_command(self.teacher_command, "teacher_command")

    def _check_options_of_models(self) -> None:
        for option in fields(self):
            if option.name not in OF_PROGRAMS and getattr(self, option.name) != default_of(option):
                raise ValueError(
                    f"{option.name} is for models that teach, and teacher_command is a program, whose own arguments "
                    "say how it translates; it gives one translation of each sentence: leave one of the two out"
                )

    def decoding(self, corpus_args: CorpusArguments) -> DecodingArguments:
        return DecodingArguments(
            num_beams=self.teacher_num_beams,
            length_penalty=self.teacher_length_penalty,
            max_new_tokens=self.teacher_max_new_tokens or corpus_args.max_target_length + 1,
            decoding_max_tokens=self.teacher_decoding_max_tokens,
        )


@dataclass
class Teacher:
    """A loaded teacher.

    Attributes:
        name: what it was called.
        commit: on the Hub, if it comes from there.
        model: in evaluation mode on this process's device.
        tokenizer: set to the source language.
        prefix: what a source begins with (`>>eng<< ` for an OPUS-MT model with several target languages).
    """

    name: str
    commit: str | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prefix: str = ""

    @cached_property
    def digest(self) -> str:
        """Tells a teacher from another of the same name."""
        return model_digest(self.model, self.tokenizer)


def load_teachers(args: TeacherArguments, corpus_args: CorpusArguments) -> list[Teacher]:
    """Load the teachers, checked; none where a program teaches, which is looked for.

    Raises:
        ValueError: one that is no sequence-to-sequence model, translates the other way round, has a tokenizer of other
            ids, or for an ensemble another vocabulary than the first.
        OSError: there is no such checkpoint, or no such program.
    """
    if args.program:
        check_program(args.program, "teacher_command")
    teachers = []
    for name in args.teachers:
        config = load_config(name, args.teacher_revision)
        if type(config) not in AutoModelForSeq2SeqLM._model_mapping:
            raise ValueError(f"{name} is a {config.model_type} model, no sequence-to-sequence model: it cannot teach")
        model, tokenizer = load_translator(name, args.teacher_revision)
        check_language_pair(tokenizer, corpus_args.source_lang, corpus_args.target_lang)
        if isinstance(model, MarianMTModel):
            bar_padding(model)  # as in every student: its probability would be learned, and move the start embedding
        prefix = set_languages(name, model, tokenizer, args)
        teachers.append(Teacher(name, commit_of(name, args.teacher_revision), model, tokenizer, prefix))
    if args.teacher_mode == "ensemble":
        for teacher in teachers[1:]:
            if difference := same_vocabulary(teachers[0].tokenizer, teacher.tokenizer):
                raise ValueError(
                    f"{teacher.name} cannot be in an ensemble with {teachers[0].name}: {difference}. Set "
                    "teacher_mode=pool"
                )
    return teachers


def set_languages(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: TeacherArguments
) -> str:
    """Tell a multilingual teacher its languages; returns what each source has to begin with, mostly nothing.

    Raises:
        ValueError: a multilingual teacher without codes, with codes that it does not know, or codes for another.
    """
    codes = (args.teacher_source_code, args.teacher_target_code)
    options = ("teacher_source_code", "teacher_target_code")
    prefix, first_token = tell_languages(name, tokenizer, *codes, options)
    if first_token is not None:
        model.generation_config.forced_bos_token_id = first_token
    elif not prefix and not hasattr(tokenizer, "src_lang") and codes != (None, None):
        raise ValueError(f"{name} is not multilingual: leave teacher_source_code and teacher_target_code out")
    return prefix


def combined(teachers: Sequence[Teacher]) -> PreTrainedModel:
    """One model of all the teachers: the only one, or their ensemble."""
    models = [teacher.model for teacher in teachers]
    return models[0] if len(models) == 1 else EnsembleForSeq2SeqLM(models).eval()


def longest_uncut(teachers: Sequence[Teacher], args: TeacherArguments, corpus: CorpusArguments) -> dict[str, Any]:
    """What `write_targets` is told to know a translation by that was cut.

    Nothing where the teacher is a program, or where several count in different tokens.
    """
    if not teachers or any(same_vocabulary(teachers[0].tokenizer, other.tokenizer) for other in teachers[1:]):
        return {}
    # The last token of a translation that was cut is an end of sentence, too, where a model is made to end so.
    made = [args.decoding(corpus).generate_kwargs(teacher.model)["max_length"] - 1 for teacher in teachers]
    return {"tokenizer": teachers[0].tokenizer, "longest": min(made) - 1}
