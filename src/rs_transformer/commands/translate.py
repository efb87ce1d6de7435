"""Translate a file with a model, a sentence a line.

    rs-transformer translate --model_name_or_path runs/demo \\
        --input_file sentences.ja --output_file sentences.en --num_beams 5

Several processes share the sentences: `accelerate launch --num_processes 2 -m rs_transformer.commands.translate …`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState

from ..checkpoints import load_translator
from ..corpus import read_sentences
from ..decoding import DecodingArguments, timed_translate
from ..utils.processes import run
from ..utils.recipes import RecipeParser


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
    chunk_size: int = field(
        default=20_000, metadata={"help": "Sentences that are sorted, translated and written at a time."}
    )


def translate_file(args: TranslateArguments, decoding: DecodingArguments) -> float:
    """Translate a file and return the sentences per second.

    What is done is on disk after every chunk, as `output_file` with `.partial` added; it gets its own name at the end.

    Raises:
        FileNotFoundError: no input, or no folder for the output.
        ValueError: no such column.
    """
    output = Path(args.output_file)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output_file: there is no folder {str(output.parent)!r}")
    sentences = read_sentences(args.input_file, args.source_column)
    model, tokenizer = load_translator(args.model_name_or_path, args.revision)
    partial = output.with_name(f"{output.name}.partial")
    is_main = PartialState().is_main_process
    if is_main:
        partial.write_text("", encoding="utf-8")
    seconds = 0.0
    for start in range(0, len(sentences), args.chunk_size):
        chunk = sentences[start : start + args.chunk_size]
        translations, speed = timed_translate(model, tokenizer, chunk, decoding)
        seconds += len(chunk) / speed
        if is_main:
            with partial.open("a", encoding="utf-8") as file:
                file.writelines(f"{' '.join(text.splitlines())}\n" for text in translations)
    if is_main:
        partial.replace(output)
    return len(sentences) / seconds


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser((TranslateArguments, DecodingArguments), description=__doc__)
    args, decoding_args = parser.parse_recipe(argv)
    speed = translate_file(args, decoding_args)
    PartialState().print(f"{args.output_file}: {speed:.1f} sentences per second")


if __name__ == "__main__":
    run(main)
