"""Compare a model with the one that it was made from: size, speed, memory, quality, and where the translations differ.

    python training/compare.py Helsinki-NLP/opus-mt-ja-en runs/student --test_file test.ja test.en --output_dir report

More in `--help`; the work is done in `rs_transformer.commands.compare`.
"""

from rs_transformer.commands.compare import GO_ON, main
from rs_transformer.utils.processes import run

if __name__ == "__main__":
    run(main, GO_ON)
