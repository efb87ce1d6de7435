"""What each step of a recurrently stacked model attends to, beside another model: figures, pictures, and a page.

    accelerate launch training/attention.py runs/tanaka_collapsed runs/tanaka_vanilla6 \\
        --text "彼は水泳が得意だ。" --reference "he is good at swimming." --output_dir attention
    accelerate launch training/attention.py runs/tanaka_collapsed runs/tanaka_vanilla6 \\
        --dataset data/tanaka --output_dir attention

Open `attention.html` of the output folder in a browser.
"""

from rs_transformer.commands.attention import AttentionArguments, report_attention
from rs_transformer.corpus import OptionalCorpusArguments
from rs_transformer.decoding import DecodingArguments
from rs_transformer.utils.processes import processes
from rs_transformer.utils.recipes import RecipeParser

GROUPS = (AttentionArguments, OptionalCorpusArguments, DecodingArguments)


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser(GROUPS, positional="models", prose=("text", "reference"), description=__doc__)
    report_attention(*parser.parse_recipe(argv))


if __name__ == "__main__":
    with processes():
        main()
