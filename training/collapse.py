"""Collapse a trained Marian model, such as an OPUS-MT checkpoint, into a recurrently stacked one of the same depth.

    python training/collapse.py --model_name_or_path Helsinki-NLP/opus-mt-ja-en --output_dir runs/collapsed

More in `--help`; the work is done in `rs_transformer.commands.collapse`.
"""

from rs_transformer.commands.collapse import main
from rs_transformer.utils.processes import run

if __name__ == "__main__":
    run(main)
