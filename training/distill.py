"""Distil a teacher into a recurrently stacked student: its translations, its distributions, or both.

    python training/distill.py training/recipes/tanaka_distilled.yaml

More in `--help`; the work is done in `rs_transformer.commands.distill`.
"""

from rs_transformer.commands.distill import GO_ON, main
from rs_transformer.utils.processes import run

if __name__ == "__main__":
    run(main, GO_ON)
