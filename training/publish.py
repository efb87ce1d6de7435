"""Put a finished model's folder on the Hugging Face Hub, with its card.

    python training/publish.py runs/tanaka_rs6 --repo org/rs-marian-ja-en --card true --dry_run true
    python training/publish.py runs/tanaka_rs6 --repo org/rs-marian-ja-en
    python training/publish.py runs/tanaka_rs6 --repo org/rs-marian-ja-en --output_dir published --dtype float16

The first command writes the card and shows what would be uploaded, the second one uploads it, in one commit. The third
one lays the repository out in a folder, here with weights in half precision.
"""

from rs_transformer.commands.publish import PublishArguments, publish
from rs_transformer.utils.recipes import RecipeParser


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser((PublishArguments,), positional="folder", description=__doc__)
    publish(*parser.parse_recipe(argv))


if __name__ == "__main__":
    main()
