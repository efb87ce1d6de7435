"""Translate a file with a model, a sentence a line.

    accelerate launch training/translate.py --model_name_or_path runs/demo \\
        --input_file sentences.ja --output_file sentences.en --num_beams 5

Several processes share the sentences: `accelerate launch --num_processes 2 …`.
"""

from accelerate import PartialState

from rs_transformer.commands.translate import TranslateArguments, translate_file
from rs_transformer.decoding import DecodingArguments
from rs_transformer.utils.processes import processes
from rs_transformer.utils.recipes import RecipeParser


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser((TranslateArguments, DecodingArguments), description=__doc__)
    args, decoding_args = parser.parse_recipe(argv)
    speed = translate_file(args, decoding_args)
    PartialState().print(f"{args.output_file}: {speed:.1f} sentences per second")


if __name__ == "__main__":
    with processes():
        main()
