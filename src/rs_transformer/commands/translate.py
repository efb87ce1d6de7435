"""Translate a file with a model, a sentence a line.

    rs-transformer translate --model_name_or_path runs/demo \\
        --input_file sentences.ja --output_file sentences.en --num_beams 5

Several processes share the sentences: `accelerate launch --num_processes 2 -m rs_transformer.commands.translate …`.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from ..checkpoints import coded_sources, load_config, load_translator, model_digest
from ..corpus import read_sentences
from ..decoding import DecodingArguments, DraftedDecodingArguments, timed_translate
from ..tokenization import check_language_pair
from ..utils.files import check_output_file, claimed, read_mapping, write_json
from ..utils.processes import run
from ..utils.ranges import check_range
from ..utils.recipes import RecipeParser

logger = logging.get_logger(__name__)

GO_ON = "the same command goes on after the last chunk"


@dataclass
class TranslateArguments:
    """What to translate, with which model, and where to write it."""

    model_name_or_path: str = field(metadata={"help": "The model, on the Hub or in a folder."})
    input_file: str = field(
        metadata={"help": "Plain text, a sentence a line; or jsonl, csv, tsv, parquet with source_column."}
    )
    output_file: str = field(metadata={"help": "The translations, a sentence a line, in the order of the input."})
    source_column: str = field(default="source", metadata={"help": "Text column of a file that is not plain text."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    encoder_layers: int | None = field(
        default=None, metadata={"help": "Depth of the encoder of an RSMarian; default: its own."}
    )
    decoder_layers: int | None = field(default=None, metadata={"help": "The same for the decoder."})
    source_lang: str | None = field(
        default=None, metadata={"help": "Language of the text, for a model of several languages."}
    )
    target_lang: str | None = field(default=None, metadata={"help": "Language to translate to, likewise."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an output_file that is there already."})
    chunk_size: int = field(
        default=20_000, metadata={"help": "Sentences that are sorted, translated and written at a time."}
    )

    def __post_init__(self) -> None:
        check_range(self, "chunk_size", "encoder_layers", "decoder_layers", least=1)


def translate_file(args: TranslateArguments, decoding: DecodingArguments) -> float:
    """Translate a file and return the sentences per second.

    What is done is on disk after every chunk, as `output_file` with `.partial` added, with a JSON file beside it that
    says of what; the same command goes on from there. The output gets its own name at the end.

    Raises:
        FileNotFoundError: no input, or no folder for the output.
        FileExistsError: the output is there already.
        ValueError: no such column, an output that is the input, another process that is writing it, or languages that
            the model does not translate between, or has to be told.
    """
    output = check_output_file(args.output_file, [args.input_file])
    for suffix in (".partial", ".partial.json"):  # of what is done meanwhile
        check_output_file(f"{output}{suffix}", [args.input_file])
    if output.exists() and not args.overwrite:
        raise FileExistsError(f"output_file: {args.output_file!r} is there already; overwrite=true replaces it")
    sentences = read_sentences(args.input_file, args.source_column)
    depths = {name: getattr(args, name) for name in ("encoder_layers", "decoder_layers")}
    given = {name: depth for name, depth in depths.items() if depth is not None}
    kind = load_config(args.model_name_or_path, args.revision).model_type
    if given and kind != "rs_marian":
        raise ValueError(
            f"{args.model_name_or_path} is a {kind} model, whose depth is fixed: leave {next(iter(given))} out"
        )
    model, tokenizer = load_translator(args.model_name_or_path, args.revision, **given)
    check_language_pair(tokenizer, args.source_lang, args.target_lang)
    languages = (args.source_lang, args.target_lang)
    asked = args.target_lang is not None
    name = args.model_name_or_path
    sentences, first_token = coded_sources(name, tokenizer, sentences, *languages, as_trained=not asked)
    settings = {"model": model_digest(model, tokenizer), "decoding": asdict(decoding)}
    if first_token is not None:
        model.generation_config.forced_bos_token_id = first_token
        settings["first_token"] = first_token
    settings["input"] = hashlib.sha256(json.dumps(sentences).encode()).hexdigest()
    state = PartialState()
    with claimed(output, state.is_main_process):
        partial = _Partial(output, settings)
        (done,) = broadcast_object_list([partial.done() if state.is_main_process else None])
        seconds = 0.0
        for start in range(done, len(sentences), args.chunk_size):
            chunk = sentences[start : start + args.chunk_size]
            translations, speed = timed_translate(model, tokenizer, chunk, decoding)
            seconds += len(chunk) / speed
            if state.is_main_process:
                partial.add(translations)
        if state.is_main_process:
            partial.finish()
    return (len(sentences) - done) / seconds if seconds else math.nan


class _Partial:
    """The translations so far, and what they are of."""

    def __init__(self, output: Path, settings: dict[str, Any]):
        self.output, self.settings = output, settings
        self.file = output.with_name(f"{output.name}.partial")
        self.record = output.with_name(f"{output.name}.partial.json")

    def done(self) -> int:
        """How many sentences are translated already; what is there of another translation is removed.

        Raises:
            FileExistsError: the file is somebody's, and of no translation.
        """
        if self.file.is_file() and self.file.stat().st_size and not self.record.is_file():
            raise FileExistsError(f"output_file: {self.file} would be written over; move it, or name another output")
        if self.file.is_file():
            found = read_mapping(self.record)
            whole = self.file.stat().st_size >= found.get("bytes", 0)
            if found.get("settings") == self.settings and whole:
                with open(self.file, "rb+") as file:
                    file.truncate(found["bytes"])  # a chunk that was cut short is done again
                self.sentences = found["sentences"]
                logger.warning(f"{self.output}: {self.sentences} sentences are translated already, the others follow")
                return self.sentences
            logger.warning(f"{self.file} is of another translation (model, input or options) and is begun anew")
        self.file.write_bytes(b"")
        self._note(0)
        return 0

    def add(self, translations: Sequence[str]) -> None:
        """Append a chunk, and note it once it is on disk."""
        with open(self.file, "a", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{' '.join(text.splitlines())}\n" for text in translations)
            file.flush()
            os.fsync(file.fileno())
        self._note(self.sentences + len(translations))

    def finish(self) -> None:
        self.file.replace(self.output)
        self.record.unlink()

    def _note(self, sentences: int) -> None:
        self.sentences = sentences
        write_json({"settings": self.settings, "sentences": sentences, "bytes": self.file.stat().st_size}, self.record)


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser((TranslateArguments, DraftedDecodingArguments), description=__doc__)
    args, decoding_args = parser.parse_recipe(argv)
    speed = translate_file(args, decoding_args)
    PartialState().print(f"{args.output_file}: {speed:.1f} sentences per second")


if __name__ == "__main__":
    run(main, GO_ON)
