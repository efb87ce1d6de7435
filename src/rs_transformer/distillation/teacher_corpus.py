"""The corpus that teachers translate for a student: sequence-level knowledge distillation's first half.

The teachers themselves: `teachers.py`. Which of their translations the student learns from: `targets.py`.
"""

import hashlib
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import MarianMTModel
from transformers.utils import logging

from ..corpus import CorpusArguments
from ..decoding import DecodingArguments, Engine, TransformersEngine, decode_all, source_limit
from ..pipeline_rs_marian import BACK_TRANSLATED, is_blank, is_blank_text, source_codes
from ..tokenization import encode
from ..training.run_folder import RECORDED_PACKAGES
from ..utils.map_shards import Rows, check_made_from, map_shards
from ..utils.programs import map_lines
from .teachers import Teacher, TeacherArguments, combined

logger = logging.get_logger(__name__)

# The hypotheses of each source; calls its second argument with the number of sources that are done.
Translate = Callable[[Sequence[str | None], Callable[[int], None]], list[list[str]]]
CORPUS_SCHEMA = pa.schema(
    {"source": pa.string(), "target": pa.string(), "hypotheses": pa.list_(pa.string())}  # the best first
)


def ctranslate2_engine(folder: str, teacher: Teacher, decoding: DecodingArguments, n_best: int = 1) -> Engine:
    """Decoding by CTranslate2, from a folder that its converter has made; faster on a CPU.

    Raises:
        ImportError: CTranslate2 is not installed.
        ValueError: the folder holds a model of another vocabulary, or the teacher is not Marian.
    """
    if not isinstance(teacher.model, MarianMTModel):
        raise ValueError(
            f"engine=ctranslate2 is for Marian models, which {teacher.name} is not: set engine=transformers"
        )
    try:
        from ..export.ctranslate2 import CTranslate2Decoder
    except ImportError as error:
        raise ImportError('engine=ctranslate2 needs: pip install "rs-transformer[ctranslate2]"') from error
    positions = getattr(teacher.model.config, "max_position_embeddings", decoding.max_new_tokens)
    max_length = min(decoding.max_new_tokens, positions - 1)  # as `generate_kwargs` has it
    try:
        return CTranslate2Decoder(folder, teacher.tokenizer, decoding, max_length, n_best)
    except ValueError as error:
        raise ValueError(f"{teacher.name} does not decode with CTranslate2: {error}") from error


def make_engines(
    teachers: Sequence[Teacher], args: TeacherArguments, decoding: DecodingArguments
) -> list[tuple[Engine, Teacher]]:
    """The engines that decode one after the other, each with the teacher whose tokenizer it takes."""
    if args.engine == "ctranslate2":
        pairs = zip(args.ctranslate2_models or [], teachers, strict=True)
        return [
            (ctranslate2_engine(folder, teacher, decoding, args.teacher_n_best), teacher) for folder, teacher in pairs
        ]
    groups = [[teacher] for teacher in teachers] if args.teacher_mode == "pool" else [list(teachers)]
    return [
        (TransformersEngine(combined(group), group[0].tokenizer, decoding, args.teacher_n_best), group[0])
        for group in groups
    ]


def generation_settings(
    teachers: Sequence[Teacher], args: TeacherArguments, corpus_args: CorpusArguments
) -> dict[str, Any]:
    """Everything but the sources that the teachers' translations depend on; JSON.

    Of a program it is the command line: what it reads besides, nobody knows.
    """
    languages = {"source_lang": corpus_args.source_lang, "target_lang": corpus_args.target_lang}
    if args.program:
        return {"engine": "command", "teacher_command": shlex.join(args.program), **languages}
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
        **languages,
    }


def _corpus_settings(
    dataset: Dataset, teachers: Sequence[Teacher], args: TeacherArguments, corpus_args: CorpusArguments
) -> dict[str, Any]:
    """`generation_settings`, and that the tag of back-translated sources is kept from teachers, if there are any.

    Those of other corpora stay what they were before the tag was.
    """
    settings = generation_settings(teachers, args, corpus_args)
    if not all(map(_knows_tag, teachers)):
        for table in dataset.select_columns(["source"]).with_format("arrow").iter(10_000):
            if pc.any(pc.starts_with(table["source"], BACK_TRANSLATED)).as_py():
                return settings | {"back_translated_tag": "kept from the teacher"}
    return settings


def _knows_tag(teacher: Teacher) -> bool:
    """Whether a teacher has itself been trained with the tag, which is a code at the beginning of a source alone."""
    return BACK_TRANSLATED in source_codes(teacher.tokenizer) and not teacher.prefix


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
    settings = _corpus_settings(dataset, teachers, args, corpus_args)
    check_made_from(Path(corpus), dataset.select_columns(["source", "target"]), settings, args.shard_size)


def generate_corpus(
    dataset: Dataset,
    teachers: Sequence[Teacher],
    args: TeacherArguments,
    corpus_args: CorpusArguments,
    output: str | Path,
) -> Path:
    """Have the teachers, or a program, translate the sources of a corpus into a parquet file; see `map_shards`.

    Args:
        dataset: text columns `source` and `target`, from `load_split`; blank sources get no translation
            (`check_sources` refuses them). The tag of those that were translated back is shown to teachers alone that
            know it.
        teachers: from `load_teachers`; none where `args` have a program.
        args: mode, engine and search, or the program, which is run once a shard.
        corpus_args: sources over `max_source_length` tokens, or over what a teacher takes, get no translation: a
            student with these arguments would not train on them. A program, which has no tokens that we know, is
            given all sources.
        output: the file, with the columns of `CORPUS_SCHEMA`; of several teachers in a pool the hypotheses stand in
            the order of the teachers, without repetitions. Its metadata record the teachers (name, commit, digest of
            the weights; of a program the command line), the settings and the versions of the packages.

    Raises:
        ValueError: what `map_shards` or an engine refuses, before any decoding starts; a program that fails, or writes
            something else than one line for each source (`map_lines`), after the shard.
        OSError: the disk is full; finished shards stay.
    """
    settings = _corpus_settings(dataset, teachers, args, corpus_args)
    packages = [*RECORDED_PACKAGES, *(["ctranslate2"] if args.engine == "ctranslate2" else [])]
    named = [{"name": t.name, "revision": args.teacher_revision, "commit": t.commit} for t in teachers]
    origin = {
        "teachers": named or [{"command": settings["teacher_command"]}],
        "versions": {name: version(name) for name in packages},
    }
    translate = _by_program(args) if args.program else _by_models(teachers, args, corpus_args)

    def decode(rows: Rows, advance: Callable[[int], None]) -> Rows:
        return {**rows, "hypotheses": translate(rows["source"], advance)}

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


def _by_program(args: TeacherArguments) -> Translate:
    def translate(sources: Sequence[str | None], advance: Callable[[int], None]) -> list[list[str]]:
        wanted = [index for index, source in enumerate(sources) if not is_blank_text(source or "")]
        advance(len(sources) - len(wanted))
        lines = [_without_tag(sources[index]) for index in wanted]
        found = map_lines(args.program, lines, option="teacher_command", advance=advance)
        hypotheses = {index: [text] for index, text in zip(wanted, found, strict=True)}
        return [hypotheses.get(index, []) for index in range(len(sources))]

    return translate


def _without_tag(source: str) -> str:
    """A source without what tells the student, and nobody else, that it was translated back."""
    return source.removeprefix(f"{BACK_TRANSLATED} ")


def _shown(source: str, teacher: Teacher) -> str:
    """What a teacher is given of a source."""
    return teacher.prefix + (source if _knows_tag(teacher) else _without_tag(source))


def _by_models(teachers: Sequence[Teacher], args: TeacherArguments, corpus_args: CorpusArguments) -> Translate:
    decoding = args.decoding(corpus_args)
    engines = make_engines(teachers, args, decoding)
    limits = [source_limit(teacher.model, teacher.tokenizer) for teacher in teachers]
    limit = min(corpus_args.max_source_length, *limits)
    if limit < corpus_args.max_source_length:
        logger.warning(f"The teachers take at most {limit} source tokens; longer sources get no translation.")
    return partial(_hypotheses, engines, limit=limit, max_tokens=decoding.batch_tokens)


def _hypotheses(
    engines: Sequence[tuple[Engine, Teacher]],
    sources: Sequence[str | None],
    advance: Callable[[int], None],
    limit: int,
    max_tokens: int,
) -> list[list[str]]:
    """What the engines make of each source, without repetitions; nothing of a blank one or one over the limit."""
    encoded = [
        encode(teacher.tokenizer, [_shown(source or "", teacher) for source in sources]) for _, teacher in engines
    ]
    wanted = [
        index
        for index, source in enumerate(sources)
        if not is_blank(engines[0][1].tokenizer, encoded[0][index], source or "")
        and all(len(ids[index]) <= limit for ids in encoded)
    ]
    advance(len(sources) - len(wanted))
    hypotheses: list[list[str]] = [[] for _ in sources]
    for (engine, _), ids in zip(engines, encoded, strict=True):
        counted = {"advance": advance} if engine is engines[-1][0] else {}
        found = decode_all(engine, [ids[index] for index in wanted], max_tokens, **counted)
        for index, texts in zip(wanted, found, strict=True):
            hypotheses[index] = list(dict.fromkeys(hypotheses[index] + texts))
    return hypotheses


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
