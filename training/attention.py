"""What each step of a recurrently stacked model attends to, beside another model: figures, pictures, and a page.

    python training/attention.py runs/tanaka_collapsed runs/tanaka_vanilla6 \\
        --text "彼は水泳が得意だ。" --reference "he is good at swimming." --output_dir attention

More in `--help`; the work is done in `rs_transformer.commands.attention`.
"""

from rs_transformer.commands.attention import main
from rs_transformer.utils.processes import run

if __name__ == "__main__":
    run(main)
