"""Put a finished model's folder on the Hugging Face Hub, with its card.

    python training/publish.py runs/tanaka_rs6 --repo org/rs-marian-ja-en --card true --dry_run true

More in `--help`; the work is done in `rs_transformer.commands.publish`.
"""

from rs_transformer.commands.publish import main
from rs_transformer.utils.processes import run

if __name__ == "__main__":
    run(main)
