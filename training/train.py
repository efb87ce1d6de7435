"""Train a translation model on a parallel corpus, from scratch or from a checkpoint.

    accelerate launch training/train.py training/recipes/demo.yaml
    accelerate launch --num_processes 2 training/train.py training/recipes/tanaka_rs6.yaml --output_dir runs/rs6
    accelerate launch training/train.py --model_name_or_path runs/rs6 --train_file a.ja a.en \\
        --source_lang ja --target_lang en --output_dir runs/tuned --learning_rate 2e-4

The recipe is YAML; options on the command line win. Defaults are those of `RSMarianConfig` and
`Seq2SeqTrainingArguments`. The output folder holds the model, ready for the Hub, and `recipe.yaml`, `run.json`,
`results.json`, translations and TensorBoard logs.
"""

from rs_transformer.commands.train import run_training
from rs_transformer.corpus import CorpusArguments
from rs_transformer.decoding import DecodingArguments
from rs_transformer.tokenization import TokenizerArguments
from rs_transformer.training.arguments import TranslationTrainingArguments
from rs_transformer.training.model import ModelArguments
from rs_transformer.utils.processes import processes
from rs_transformer.utils.recipes import RecipeParser

GROUPS = (ModelArguments, CorpusArguments, TokenizerArguments, DecodingArguments, TranslationTrainingArguments)


def main(argv: list[str] | None = None) -> None:
    run_training(*RecipeParser(GROUPS, description=__doc__).parse_recipe(argv))


if __name__ == "__main__":
    with processes():
        main()
