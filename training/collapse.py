"""Collapse a trained Marian model, such as an OPUS-MT checkpoint, into a recurrently stacked one of the same depth.

    accelerate launch training/collapse.py --model_name_or_path Helsinki-NLP/opus-mt-ja-en --output_dir runs/collapsed
    accelerate launch training/collapse.py --model_name_or_path runs/tanaka_vanilla6 --output_dir runs/calibrated \\
        --method calibrated --source_lang ja --target_lang en --train_file data/tanaka/train.jsonl \\
        --evaluate --test_file data/tanaka/test.jsonl

The output folder holds model, tokenizer, generation config, remote code and `collapse.json`, which says where each
layer comes from. Fine-tune it by `training/train.py --model_name_or_path runs/collapsed`.
"""

from rs_transformer.commands.collapse import CollapseArguments, collapse_checkpoint
from rs_transformer.corpus import OptionalCorpusArguments
from rs_transformer.decoding import DecodingArguments
from rs_transformer.utils.processes import processes
from rs_transformer.utils.recipes import RecipeParser

GROUPS = (CollapseArguments, OptionalCorpusArguments, DecodingArguments)


def main(argv: list[str] | None = None) -> None:
    collapse_checkpoint(*RecipeParser(GROUPS, description=__doc__).parse_recipe(argv))


if __name__ == "__main__":
    with processes():
        main()
