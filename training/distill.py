"""Distil a teacher into a recurrently stacked student: its translations, its distributions, or both.

    accelerate launch training/distill.py training/recipes/tanaka_distilled.yaml
    accelerate launch training/distill.py generate training/recipes/tanaka_distilled.yaml --teacher_n_best 5
    accelerate launch training/distill.py filter train training/recipes/tanaka_distilled.yaml --word_weight 0 \\
        --word_top_k 0 --output_dir runs/tanaka_distilled_sequence

The stages, all of them unless some are named: generate (the teacher translates the training sources), filter (choose
what the student learns from), train, evaluate. The same command goes on where it was stopped; what is decoded and
trained already is not done again. The output folder is that of `training/train.py`, with `distillation.json` (where
the targets come from, what was left out) and `evaluation.json` (student against teacher).
"""

import sys

from rs_transformer.commands.distill import STAGES, DistillArguments, distill
from rs_transformer.corpus import CorpusArguments
from rs_transformer.decoding import DecodingArguments
from rs_transformer.distillation.losses import DistillationLossArguments
from rs_transformer.distillation.targets import TargetArguments
from rs_transformer.distillation.teachers import TeacherArguments
from rs_transformer.tokenization import TokenizerArguments
from rs_transformer.training.arguments import TranslationTrainingArguments
from rs_transformer.training.model import ModelArguments
from rs_transformer.utils.processes import processes
from rs_transformer.utils.recipes import RecipeParser

GROUPS = (
    DistillArguments,
    TeacherArguments,
    TargetArguments,
    DistillationLossArguments,
    ModelArguments,
    CorpusArguments,
    TokenizerArguments,
    DecodingArguments,
    TranslationTrainingArguments,
)


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    stages = []
    while argv and argv[0] in STAGES:
        stages.append(argv.pop(0))
    if stages:
        argv += ["--stages", *stages]
    distill(*RecipeParser(GROUPS, description=__doc__).parse_recipe(argv))


if __name__ == "__main__":
    with processes():
        main()
