"""Write a checkpoint for another engine, and verify it by translating on both sides.

    python training/export.py runs/tanaka_rs6 --to ctranslate2 --quantization int8 --output_dir rs6-ct2 \\
        --test_file data/tanaka/test.jsonl --source_lang ja --target_lang en

More in `--help`; the work is done in `rs_transformer.commands.export`.
"""

from rs_transformer.commands.export import main
from rs_transformer.utils.processes import run

if __name__ == "__main__":
    run(main)
