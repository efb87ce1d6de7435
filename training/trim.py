"""Trim a Marian model, such as an OPUS-MT checkpoint, to the part of its vocabulary that a text needs.

    python training/trim.py --model_name_or_path Helsinki-NLP/opus-mt-ja-en --output_dir runs/trimmed \
        --vocabulary_files data/tanaka/train.jsonl --source_lang ja --target_lang en

More in `--help`; the work is done in `rs_transformer.commands.trim`.
"""

from rs_transformer.commands.trim import main
from rs_transformer.utils.processes import run

if __name__ == "__main__":
    run(main)
