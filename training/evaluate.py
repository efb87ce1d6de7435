"""Score models, or files of translations, on a test set: BLEU and chrF with signatures, and a paired bootstrap.

    python training/evaluate.py --systems runs/demo --source_lang ja --target_lang en \\
        --test_file training/data/tanaka-excerpt-cased/test.jsonl

More in `--help`; the work is done in `rs_transformer.commands.evaluate`.
"""

from rs_transformer.commands.evaluate import main
from rs_transformer.utils.processes import run

if __name__ == "__main__":
    run(main)
