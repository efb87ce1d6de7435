"""Train a translation model on a parallel corpus, from scratch or from a checkpoint.

    python training/train.py training/recipes/demo.yaml

More in `--help`; the work is done in `rs_transformer.commands.train`.
"""

from rs_transformer.commands.train import GO_ON, main
from rs_transformer.utils.processes import run

if __name__ == "__main__":
    run(main, GO_ON)
