"""Recipes: what stands in a YAML file is what one would have typed."""

import pytest

from rs_transformer.corpus import CorpusArguments
from rs_transformer.training.arguments import TranslationTrainingArguments
from rs_transformer.training.model import ModelArguments
from rs_transformer.utils.recipes import RecipeParser

GROUPS = (ModelArguments, CorpusArguments, TranslationTrainingArguments)

RECIPE = """
source_lang: no
target_lang: true
train_file: [no, 007]
validation_file: on
max_source_length: 0100
learning_rate: 1e-3
lr_scheduler_kwargs: {num_cycles: 2, first: no}
eval_strategy: no
streaming: yes
deepnorm: No
max_tokens: null
resume_from_checkpoint: 2020-01-01
"""


def test_values_are_the_text_that_stands_there_until_an_option_makes_more_of_it(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    model, corpus, training = RecipeParser(GROUPS).parse_recipe(
        [str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path)]
    )
    assert (corpus.source_lang, corpus.target_lang, corpus.train_file) == ("no", "true", ["no", "007"])
    assert (corpus.validation_file, corpus.max_source_length, corpus.streaming) == (["on"], 100, True)
    assert (training.learning_rate, training.lr_scheduler_kwargs) == (1e-3, {"num_cycles": 2, "first": False})
    assert (training.eval_strategy.value, training.max_tokens) == ("no", None)
    assert (training.resume_from_checkpoint, model.deepnorm) == ("2020-01-01", False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_source_length: yes", "invalid int value: 'yes'"),
        ("no: 1", "unknown option 'no'"),
        ("- a", "must hold options as `name: value`"),
        ("a: [", "is not YAML"),
        (b"source_lang: \xff", "is not YAML"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(content, message, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit):
        RecipeParser(GROUPS).parse_recipe([str(file), "--source_lang", "a", "--target_lang", "b", "--output_dir", "c"])
    assert message in capsys.readouterr().err
