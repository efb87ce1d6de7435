"""Compress a pretrained Marian model, such as an OPUS-MT checkpoint, into a folder that one ships.

    python training/compress.py Helsinki-NLP/opus-mt-ja-en --output_dir runs/small --budget_minutes 90 \
        --train_file corpus.ja corpus.en --test_file test.ja test.en --source_lang ja --target_lang en

More in `--help`; the work is done in `rs_transformer.commands.compress`.
"""

from rs_transformer.commands.compress import GO_ON, main
from rs_transformer.utils.processes import run

if __name__ == "__main__":
    run(main, GO_ON)
