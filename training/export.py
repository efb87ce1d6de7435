"""Write a checkpoint for another engine, and verify it by translating on both sides.

    python training/export.py runs/tanaka_rs6 --to ctranslate2 --quantization int8 --output_dir rs6-ct2 \\
        --test_file data/tanaka/test.jsonl --source_lang ja --target_lang en
    python training/export.py runs/tanaka_rs6 --to transformers --output_dir rs6-marian --verify sentences.ja

The folder is there only if the translations are PyTorch's; `export.json` in it says how many are.
"""

from rs_transformer.commands.export import ExportArguments, export_checkpoint
from rs_transformer.corpus import OptionalCorpusArguments
from rs_transformer.decoding import DecodingArguments
from rs_transformer.utils.recipes import RecipeParser

GROUPS = (ExportArguments, OptionalCorpusArguments, DecodingArguments)


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser(GROUPS, positional="model_name_or_path", prose=("verify",), description=__doc__)
    export_checkpoint(*parser.parse_recipe(argv))


if __name__ == "__main__":
    main()
