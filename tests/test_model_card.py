"""Model cards say what a run's files say, and the code in them runs."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import RECIPE, launch, script, task_options
from huggingface_hub import ModelCard
from oracle import marian, rs_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from rs_transformer import expand
from rs_transformer.model_card import build_card, card_disagreements, write_card
from rs_transformer.training.model import config_from_tokenizer

FACTS = {
    "license": "cc-by-4.0",
    "dataset": "reverse",
    "data": "Letters, made for the tests.",
    "limits": "- It knows twelve letters.",
}


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the trained model's folder that says where its data came from."""
    copy = tmp_path / "rs-fw-bw"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    (copy / "card.yaml").write_text(yaml.safe_dump(FACTS))
    return copy


def save(folder, *parts):
    for part in parts:
        part.save_pretrained(folder)
    return folder


def test_training_leaves_a_card_with_the_figures_of_its_results(trained):
    card = ModelCard.load(trained / "README.md")
    results = json.loads((trained / "results.json").read_text())
    said = {(result.dataset_split, result.metric_type): result for result in card.data.eval_results}
    assert len(said) == 4
    for (split, metric), result in said.items():
        assert result.metric_value == round(results[split][metric], 2)
        assert result.dataset_name.endswith(f"/{split}.jsonl")
        assert not result.dataset_name.startswith("/")
        assert result.metric_args == {"signature": results[split][f"{metric}_signature"]}
        assert f"{results[split][metric]:.2f} |" in card.text
    assert card.data.language == ["fw", "bw"]
    assert card.data.pipeline_tag == "translation"
    assert "recurrent-stacking" in card.data.tags
    assert f"{results['training']['updates']:,} updates" in card.text
    assert card_disagreements(trained) == []


def test_card_has_the_models_parameters_depth_and_layers(trained):
    text = build_card(trained).text
    model = AutoModelForSeq2SeqLM.from_pretrained(trained)
    stored = model.num_parameters(only_trainable=True)
    layers = sum(p.numel() for stack in (model.model.encoder, model.model.decoder) for p in stack.layers.parameters())
    unrolled = sum(p.numel() for name, p in expand(model).named_parameters() if "embed_positions" not in name)
    assert f"| parameters stored | {stored:,}, of these {layers:,} in layers |" in text
    assert f"written out | {unrolled:,} |" in text
    assert "1 encoder layer applied in 2 steps and 1 decoder layer applied in 2 steps" in text
    assert "| layer of each step | encoder 0 0, decoder 0 0 |" in text


def test_what_a_folder_cannot_know_is_in_card_yaml(folder):
    card = build_card(folder, "org/rs-fw-bw")
    assert card.data.license == "cc-by-4.0"
    assert {result.dataset_name for result in card.data.eval_results} == {"reverse"}
    assert FACTS["data"] in card.text
    assert FACTS["limits"] in card.text
    (folder / "card.yaml").write_text("licence: mit\n")
    with pytest.raises(ValueError, match="has an unknown key 'licence'; known: license, datasets"):
        build_card(folder)


def test_every_snippet_of_a_card_runs(folder, monkeypatch):
    """With the folder in the place of the repository."""
    monkeypatch.chdir(folder.parent)
    text = build_card(folder, "org/rs-fw-bw").text.replace("org/rs-fw-bw", "rs-fw-bw").replace("…", "g h i j")
    (command,) = re.findall(r"```bash\n(python .+?)\n```", text, re.DOTALL)
    first, remote, ctranslate2 = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    subprocess.run([sys.executable, *command.split()[1:]], check=True)
    for snippet, result in ((first, "[{'translation_text': 'j i h g'}]"), (ctranslate2, "j i h g")):
        lines = snippet.rstrip().rsplit("\n", 1)
        names = {}
        exec(f"{lines[0]}\nlast = {lines[1]}", names)
        assert str(names["last"]) == result
    without_package = f"import sys; sys.modules['rs_transformer'] = None\n{remote}print(translator('g h i j'))\n"
    done = subprocess.run([sys.executable, "-c", without_package], check=True, capture_output=True, text=True)
    assert done.stdout.endswith("[{'translation_text': 'j i h g'}]\n")


def test_depths_measured_by_the_sweep_are_in_the_card(folder, task):
    options = ["--source_lang", "fw", "--target_lang", "bw", "--test_file", task["test"], "--num_beams", 1]
    more = ["--decoder_depths", 1, "--rounds", 1, "--output_file", folder / "depth_sweep.json"]
    script("depth_sweep")("--model_name_or_path", folder, *options, *more)
    text = build_card(folder).text
    rows = json.loads((folder / "depth_sweep.json").read_text())
    assert [row["decoder_layers"] for row in rows] == [2, 1]
    for row in rows:
        assert f"| 2 | {row['decoder_layers']} | {row['bleu']:.2f} | {row['chrf']:.2f} |" in text


def test_card_of_a_fine_tuned_collapse_names_parent_method_and_command(trained, task, tmp_path):
    expand(AutoModelForSeq2SeqLM.from_pretrained(trained)).save_pretrained(tmp_path / "vanilla")
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "vanilla")
    script("collapse")("--model_name_or_path", tmp_path / "vanilla", "--output_dir", tmp_path / "collapsed")
    assert f"a collapse of `{tmp_path}/vanilla`, method average, without" in build_card(tmp_path / "collapsed").text
    options = [*task_options(task), "--output_dir", tmp_path / "tuned", "--max_steps", 2, "--eval_strategy", "no"]
    launch("train.py", RECIPE, "--model_name_or_path", tmp_path / "collapsed", *options, "--save_strategy", "no")
    text = ModelCard.load(tmp_path / "tuned" / "README.md").text
    assert f"Fine-tuned from `{tmp_path}/collapsed`, which goes back to a collapse of `{tmp_path}/vanilla`" in text
    assert "accelerate launch training/train.py recipe.yaml" in text


def test_card_of_a_student_names_its_teachers_and_the_command(folder):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe |= {"teachers": ["org/teacher", "runs/second"], "targets": "best", "word_weight": 0.5}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = build_card(folder).text
    assert (
        "Distilled from `org/teacher`, `runs/second`: targets best, weight of the teacher's distributions 0.5" in text
    )
    assert "accelerate launch training/distill.py recipe.yaml" in text


def test_card_of_a_tokenizer_that_names_no_languages(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"source_lang": None, "target_lang": None}))
    card = build_card(folder)
    assert card.data.language is None
    assert "(RS) translation model: 1 encoder layer" in card.text


def test_card_names_the_languages_as_the_hub_does(folder):
    said = json.loads((folder / "tokenizer_config.json").read_text()) | {"source_lang": "jap", "target_lang": "zh_CN"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    assert build_card(folder).data.language == ["ja", "zh"]


def test_card_of_stock_marian_is_of_stock_marian(tokenizer, tmp_path):
    folder = save(tmp_path / "model", marian(**config_from_tokenizer(tokenizer)), tokenizer)
    card = build_card(folder)
    assert "recurrent" not in card.text.split("## Citation")[0]
    assert "Not measured yet." in card.text
    assert card.data.eval_results is None


def test_card_of_as_many_layers_as_steps_speaks_of_no_sharing(tokenizer, tmp_path):
    model = rs_model(**config_from_tokenizer(tokenizer), encoder_unique_layers=6, decoder_unique_layers=6)
    card = build_card(save(tmp_path / "model", model, tokenizer))
    assert "A Marian translation model, fw to bw, 6 encoder layers and 6 decoder layers" in card.text
    assert "trust_remote_code=True" in card.text


def test_disagreements_are_named(folder):
    write_card(folder)
    results = json.loads((folder / "results.json").read_text())
    bleu = round(results["test"]["bleu"], 2)
    results["test"]["bleu"] = 1.234
    (folder / "results.json").write_text(json.dumps(results))
    assert card_disagreements(folder) == [f"test bleu: {bleu} in README.md, 1.23 in results.json"]
    (folder / "results.json").unlink()
    assert len(card_disagreements(folder)) == 4
