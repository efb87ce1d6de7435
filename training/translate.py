"""Translate a file with a model, a sentence a line.

    python training/translate.py --model_name_or_path runs/demo \\
        --input_file sentences.ja --output_file sentences.en --num_beams 5

More in `--help`; the work is done in `rs_transformer.commands.translate`.
"""

from rs_transformer.commands.translate import GO_ON, main
from rs_transformer.utils.processes import run

if __name__ == "__main__":
    run(main, GO_ON)
