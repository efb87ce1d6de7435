"""Score models, or files of translations, on a test set: BLEU and chrF with signatures, and a paired bootstrap.

    accelerate launch training/evaluate.py --systems runs/demo --source_lang ja --target_lang en \\
        --test_file training/data/tanaka-excerpt/test.jsonl
    accelerate launch training/evaluate.py --systems runs/vanilla6 runs/rs6 --source_lang ja --target_lang en \\
        --test_file test.ja test.en --num_beams 5 --output_file scores.json
"""

from rs_transformer.commands.evaluate import EvaluateArguments, evaluate_systems
from rs_transformer.corpus import CorpusArguments
from rs_transformer.decoding import DecodingArguments
from rs_transformer.utils.processes import processes
from rs_transformer.utils.recipes import RecipeParser

GROUPS = (EvaluateArguments, CorpusArguments, DecodingArguments)


def main(argv: list[str] | None = None) -> None:
    evaluate_systems(*RecipeParser(GROUPS, description=__doc__).parse_recipe(argv))


if __name__ == "__main__":
    with processes():
        main()
