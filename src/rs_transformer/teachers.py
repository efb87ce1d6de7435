"""Teachers, and the corpus that they translate for a student: sequence-level knowledge distillation's first half.

Which of their translations the student learns from: `distilled_targets.py`. What it learns from their distributions:
`distillation.py`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .corpus import CorpusArguments
from .decoding import DecodingArguments, generate_texts, length_batches, load_translator, source_limit
from .ensemble import EnsembleForSeq2SeqLM
from .model_building import bar_padding, check_tokenizer, commit_of
from .run_folder import RECORDED_PACKAGES
from .sharding import Rows, check_output, map_shards
from .tokenization import check_language_pair, same_vocabulary

logger = logging.get_logger(__name__)

ENGINES = ("transformers", "ctranslate2")
MODES = ("ensemble", "pool")
CORPUS_SCHEMA = pa.schema(
    {"source": pa.string(), "target": pa.string(), "hypotheses": pa.list_(pa.string())}  # the best first
)


@dataclass
class TeacherArguments:
    """The teachers, and how they translate the training sources."""

    teachers: list[str] = field(
        metadata={"help": "One or several sequence-to-sequence models, on the Hub or in folders.", "nargs": "+"}
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
        for name in ("teacher_num_beams", "teacher_n_best", "teacher_decoding_max_tokens", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
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
            raise ValueError("CTranslate2 decodes no ensembles: set teacher_mode=pool, or engine=transformers")

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
        """SHA-256 of weights, configuration and vocabulary, which tells a teacher from another of the same name."""
        config = self.model.config.to_diff_dict()
        for name in ("_name_or_path", "transformers_version", "_attn_implementation", "dtype"):
            config.pop(name, None)
        sha = hashlib.sha256(json.dumps([config, self.tokenizer.get_vocab()], sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            sha.update(name.encode())
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return sha.hexdigest()


def load_teachers(args: TeacherArguments, corpus_args: CorpusArguments) -> list[Teacher]:
    """Load the teachers, checked.

    Raises:
        ValueError: one that is no sequence-to-sequence model, translates the other way round, has a tokenizer of other
            ids, or for an ensemble another vocabulary than the first.
        OSError: there is no such checkpoint.
    """
    teachers = []
    for name in args.teachers:
        try:
            config = AutoConfig.from_pretrained(name, revision=args.teacher_revision)
        except OSError as error:
            raise OSError(f"the teacher {name} cannot be loaded: {error}") from error
        if type(config) not in AutoModelForSeq2SeqLM._model_mapping:
            raise ValueError(f"{name} is a {config.model_type} model, no sequence-to-sequence model: it cannot teach")
        model, tokenizer = load_translator(name, args.teacher_revision)
        check_language_pair(tokenizer, corpus_args.source_lang, corpus_args.target_lang)
        if isinstance(model, MarianMTModel):
            check_tokenizer(model, tokenizer)
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

    OPUS-MT models with several target languages take `>>code<<` before the source. Models whose tokenizer has
    `src_lang` (M2M100, NLLB, mBART-50) take the target's code as the first token.

    Raises:
        ValueError: a multilingual teacher without codes, with codes that it does not know, or codes for another.
    """
    codes = (args.teacher_source_code, args.teacher_target_code)
    marian = list(getattr(tokenizer, "supported_language_codes", None) or [])
    if marian:
        wanted = f">>{codes[1]}<<"
        if wanted not in marian:
            known = ", ".join(code.strip("<>") for code in marian[:20])
            raise ValueError(f"{name} has several target languages: give teacher_target_code, one of {known} …")
        return f"{wanted} "
    if hasattr(tokenizer, "src_lang"):
        if None in codes:
            raise ValueError(f"{name} is multilingual: give teacher_source_code and teacher_target_code")
        ids = [_language_id(tokenizer, code) for code in codes]
        if None in ids:
            raise ValueError(f"{name} knows no language {codes[ids.index(None)]!r}")
        tokenizer.src_lang = codes[0]
        model.generation_config.forced_bos_token_id = ids[1]
        return ""
    if codes != (None, None):
        raise ValueError(f"{name} is not multilingual: leave teacher_source_code and teacher_target_code out")
    return ""


def _language_id(tokenizer: PreTrainedTokenizerBase, code: str) -> int | None:
    """The token that stands for a language, None for an unknown one."""
    if hasattr(tokenizer, "get_lang_id"):  # M2M100, whose tokens are not the codes themselves
        try:
            return tokenizer.get_lang_id(code)
        except KeyError:
            return None
    token = tokenizer.convert_tokens_to_ids(code)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}
    return token if token in special else None  # and no subword of that spelling


def combined(teachers: Sequence[Teacher]) -> PreTrainedModel:
    """One model of all the teachers: the only one, or their ensemble."""
    models = [teacher.model for teacher in teachers]
    return models[0] if len(models) == 1 else EnsembleForSeq2SeqLM(models).eval()


class Engine(Protocol):
    """Translates many sentences, given as token ids, into `n_best` hypotheses each, the best first."""

    def translate(self, encoded: Sequence[list[int]], advance: Callable[[int], None]) -> list[list[str]]: ...


@dataclass
class TransformersEngine:
    """Decoding in PyTorch, in batches by token budget over length-sorted input."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    decoding: DecodingArguments
    n_best: int = 1

    def translate(self, encoded: Sequence[list[int]], advance: Callable[[int], None]) -> list[list[str]]:
        results: list[list[str]] = [[]] * len(encoded)
        budget = max(1, self.decoding.decoding_max_tokens // self.decoding.num_beams)
        for batch in length_batches([len(ids) for ids in encoded], budget):
            texts = generate_texts(self.model, self.tokenizer, [encoded[i] for i in batch], self.decoding, self.n_best)
            for index, hypotheses in zip(batch, texts, strict=True):
                results[index] = hypotheses
            advance(len(batch))
        return results


class CTranslate2Engine:
    """Decoding by CTranslate2, from a folder that its converter has made; faster on a CPU.

    Raises:
        ImportError: CTranslate2 is not installed.
        ValueError: the folder holds a model of another vocabulary, or the teacher is not Marian.
    """

    def __init__(self, folder: str, teacher: Teacher, decoding: DecodingArguments, n_best: int = 1):
        try:
            import ctranslate2
        except ImportError as error:
            raise ImportError("engine=ctranslate2 needs the package: pip install ctranslate2") from error
        self.tokenizer, self.decoding, self.n_best = teacher.tokenizer, decoding, n_best
        positions = getattr(teacher.model.config, "max_position_embeddings", decoding.max_new_tokens)
        self.max_length = min(decoding.max_new_tokens, positions - 1)  # as `generate_kwargs` has it
        if not isinstance(teacher.model, MarianMTModel) or getattr(teacher.tokenizer, "separate_vocabs", False):
            raise ValueError(
                f"engine=ctranslate2 is for Marian models with one vocabulary, which {teacher.name} is not: set "
                "engine=transformers"
            )
        vocabulary = Path(folder, "shared_vocabulary.json")
        entries = teacher.tokenizer.get_vocab()
        # The converter leaves the padding token out: the engine starts without it.
        wanted = [entry for entry in sorted(entries, key=entries.get) if entry != teacher.tokenizer.pad_token]
        if not vocabulary.is_file() or json.loads(vocabulary.read_text("utf-8")) != wanted:
            raise ValueError(f"{folder} has another vocabulary than {teacher.name}: convert that teacher")
        device = PartialState().device
        place: dict[str, Any] = {"device": "cpu", "intra_threads": torch.get_num_threads()}
        if device.type == "cuda":
            place = {"device": "cuda", "device_index": device.index or 0}
        self.engine = ctranslate2.Translator(folder, **place)

    def translate(self, encoded: Sequence[list[int]], advance: Callable[[int], None]) -> list[list[str]]:
        results: list[list[str]] = [[]] * len(encoded)
        budget = max(1, self.decoding.decoding_max_tokens // self.decoding.num_beams)
        for batch in length_batches([len(ids) for ids in encoded], budget):
            outputs = self.engine.translate_batch(
                [self.tokenizer.convert_ids_to_tokens(encoded[i]) for i in batch],
                beam_size=self.decoding.num_beams,
                num_hypotheses=self.n_best,
                length_penalty=self.decoding.length_penalty,
                max_decoding_length=self.max_length,
                max_input_length=0,
            )
            for index, output in zip(batch, outputs, strict=True):
                ids = [self.tokenizer.convert_tokens_to_ids(tokens) for tokens in output.hypotheses]
                results[index] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            advance(len(batch))
        return results


def make_engines(
    teachers: Sequence[Teacher], args: TeacherArguments, decoding: DecodingArguments
) -> list[tuple[Engine, Teacher]]:
    """The engines that decode one after the other, each with the teacher whose tokenizer it takes."""
    if args.engine == "ctranslate2":
        pairs = zip(args.ctranslate2_models or [], teachers, strict=True)
        return [
            (CTranslate2Engine(folder, teacher, decoding, args.teacher_n_best), teacher) for folder, teacher in pairs
        ]
    groups = [[teacher] for teacher in teachers] if args.teacher_mode == "pool" else [list(teachers)]
    return [
        (TransformersEngine(combined(group), group[0].tokenizer, decoding, args.teacher_n_best), group[0])
        for group in groups
    ]


def generation_settings(
    teachers: Sequence[Teacher], args: TeacherArguments, corpus_args: CorpusArguments
) -> dict[str, Any]:
    """Everything but the sources that the teachers' translations depend on; JSON."""
    decoding = args.decoding(corpus_args)
    if args.engine == "ctranslate2":
        files = [Path(folder, "model.bin") for folder in args.ctranslate2_models or []]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file.parent} holds no CTranslate2 model; ct2-transformers-converter makes one")
        weights = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    else:
        weights = [teacher.digest for teacher in teachers]
    searches = [teacher.model.generation_config.to_diff_dict() for teacher in teachers]
    for search in searches:
        for name in ("transformers_version", *decoding.generate_kwargs(teachers[0].model)):
            search.pop(name, None)
    return {
        "teacher_weights": weights,
        "teacher_mode": args.teacher_mode if len(teachers) > 1 else "single",
        "teacher_codes": [args.teacher_source_code, args.teacher_target_code],
        "generation_configs": searches,
        "engine": args.engine,
        "num_beams": decoding.num_beams,
        "n_best": args.teacher_n_best,
        "length_penalty": decoding.length_penalty,
        "max_new_tokens": decoding.max_new_tokens,
        "decoding_max_tokens": decoding.decoding_max_tokens,
        "max_source_length": corpus_args.max_source_length,
        "source_lang": corpus_args.source_lang,
        "target_lang": corpus_args.target_lang,
    }


def check_corpus(
    corpus: str | Path,
    dataset: Dataset,
    teachers: Sequence[Teacher],
    args: TeacherArguments,
    corpus_args: CorpusArguments,
) -> None:
    """Raise unless a corpus was made from these rows by these teachers with these arguments.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it was made otherwise; the message names the first difference.
    """
    if not Path(corpus).is_file():
        raise FileNotFoundError(f"there is no teacher's corpus {str(corpus)!r}: the stage generate makes it")
    settings = generation_settings(teachers, args, corpus_args)
    check_output(Path(corpus), dataset.select_columns(["source", "target"]), settings, args.shard_size)


def generate_corpus(
    dataset: Dataset,
    teachers: Sequence[Teacher],
    args: TeacherArguments,
    corpus_args: CorpusArguments,
    output: str | Path,
) -> Path:
    """Have the teachers translate the sources of a corpus into a parquet file; resumable, see `map_shards`.

    Args:
        dataset: text columns `source` and `target`, from `load_split`.
        teachers: from `load_teachers`.
        args: mode, engine and search.
        corpus_args: sources over `max_source_length` tokens, or over what a teacher takes, get no translation: a
            student with these arguments would not train on them.
        output: the file, with the columns of `CORPUS_SCHEMA`; of several teachers in a pool the hypotheses stand in
            the order of the teachers, without repetitions. Its metadata record the teachers (name, commit, digest of
            the weights), the settings and the versions of the packages.

    Raises:
        ValueError: an empty corpus or source, or what `map_shards` refuses; before any decoding starts.
        OSError: the disk is full; finished shards stay.
    """
    check_sources(dataset, skip_empty=args.skip_empty_sources)
    settings = generation_settings(teachers, args, corpus_args)
    engines = make_engines(teachers, args, args.decoding(corpus_args))
    limits = [source_limit(teacher.model, teacher.tokenizer) for teacher in teachers]
    limit = min(corpus_args.max_source_length, *limits)
    if limit < corpus_args.max_source_length:
        logger.warning(f"The teachers take at most {limit} source tokens; longer sources get no translation.")
    packages = [*RECORDED_PACKAGES, *(["ctranslate2"] if args.engine == "ctranslate2" else [])]
    origin = {
        "teachers": [{"name": t.name, "revision": args.teacher_revision, "commit": t.commit} for t in teachers],
        "versions": {name: version(name) for name in packages},
    }

    def decode(rows: Rows, advance: Callable[[int], None]) -> Rows:
        hypotheses: list[list[str]] = [[] for _ in rows["source"]]
        encoded = [
            teacher.tokenizer([teacher.prefix + (source or "") for source in rows["source"]], verbose=False)[
                "input_ids"
            ]
            for _, teacher in engines
        ]
        wanted = [
            index
            for index, source in enumerate(rows["source"])
            if source and source.strip() and all(len(ids[index]) <= limit for ids in encoded)
        ]
        advance(len(hypotheses) - len(wanted))
        for number, (engine, _) in enumerate(engines):
            last = number == len(engines) - 1
            found = engine.translate([encoded[number][i] for i in wanted], advance if last else lambda rows: None)
            for index, texts in zip(wanted, found, strict=True):
                hypotheses[index] = list(dict.fromkeys(hypotheses[index] + texts))
        return {**rows, "hypotheses": hypotheses}

    return map_shards(
        dataset.select_columns(["source", "target"]),
        decode,
        output,
        schema=CORPUS_SCHEMA,
        settings=settings,
        origin=origin,
        shard_size=args.shard_size,
        desc="Teacher decoding",
        unit="sentences",
    )


def check_sources(dataset: Dataset, skip_empty: bool = False) -> None:
    """Raise `ValueError` for a corpus without rows, or a blank source unless those are to be left out."""
    if not len(dataset):
        raise ValueError("the train split is empty: there is nothing for the teacher to translate")
    blank, number = [], 0
    for batch in dataset.select_columns(["source"]).iter(10_000):
        for source in batch["source"]:
            if not (source and source.strip()):
                blank.append(number)
            number += 1
    if blank and not skip_empty:
        raise ValueError(
            f"the source of {len(blank)} training pairs is empty, first in row {blank[0]} (from 0): mend the corpus, "
            "or set skip_empty_sources to leave them out"
        )
    if blank:
        logger.warning(f"The source of {len(blank)} training pairs is empty; they get no translation.")
