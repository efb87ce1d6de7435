"""Quality against speed of one recurrently stacked checkpoint at many depths, before and after fine-tuning.

    accelerate launch training/depth_sweep.py --model_name_or_path runs/tanaka_rs6 --decoder_depths 6 5 4 3 2 1 \\
        --finetuned runs/decoder2 runs/decoder1 --source_lang ja --target_lang en \\
        --test_file data/tanaka/test.jsonl --num_beams 1 --output_file sweep.json --plot_file sweep.png

Prints BLEU, chrF and sentences per second of every encoder depth × decoder depth, all from one run.
"""

from rs_transformer.commands.depth_sweep import DepthSweepArguments, sweep_depths
from rs_transformer.corpus import CorpusArguments
from rs_transformer.decoding import DecodingArguments
from rs_transformer.utils.processes import processes
from rs_transformer.utils.recipes import RecipeParser

GROUPS = (DepthSweepArguments, CorpusArguments, DecodingArguments)


def main(argv: list[str] | None = None) -> None:
    sweep_depths(*RecipeParser(GROUPS, description=__doc__).parse_recipe(argv))


if __name__ == "__main__":
    with processes():
        main()
