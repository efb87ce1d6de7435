"""Make training pairs of monolingual text: a model translates it back, or a teacher forwards.

    python training/synthesize.py --monolingual_file news.en --source_lang ja --target_lang en \
        --teachers runs/en_ja --output_dir runs/back_translated

More in `--help`; the work is done in `rs_transformer.commands.synthesize`.
"""

from rs_transformer.commands.synthesize import GO_ON, main
from rs_transformer.utils.processes import run

if __name__ == "__main__":
    run(main, GO_ON)
