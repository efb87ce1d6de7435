"""Model cards say what a run's files say, and the code in them runs."""

import json
import re
import shutil

import pytest
import torch
import yaml
from conftest import RECIPE, ROOT, script, task_options
from forked import fork
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from oracle import marian, rs_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianMTModel

from rs_transformer import expand
from rs_transformer.checkpoints import load_translator
from rs_transformer.model_card import _parameters, build_card, card_disagreements, write_card
from rs_transformer.training.arguments import TranslationTrainingArguments
from rs_transformer.training.model import config_from_tokenizer
from rs_transformer.training.run_folder import weights_digest
from rs_transformer.training.trainer import TranslationTrainer

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
    rows = re.sub(" +", " ", text)
    assert f"| parameters stored | {stored:,}, of these {layers:,} in layers |" in rows
    assert f"written out | {unrolled:,} |" in rows
    assert "1 encoder layer applied in 2 steps and 1 decoder layer applied in 2 steps" in text
    assert "| layer of each step | encoder 0 0, decoder 0 0 |" in rows


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_encoder_decoder_layers": True, "encoder_layers": 3, "decoder_layers": 2},
        {"step_adapter_rank": 2},
        {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 56},
    ],
    ids=["tied-sides", "adapters", "separate"],
)
def test_parameters_of_the_layers_written_out_are_those_of_the_expanded_model(fields):
    model = rs_model(**fields)
    unrolled = sum(p.numel() for name, p in expand(model).named_parameters() if "embed_positions" not in name)
    assert _parameters(model.config)["unrolled"] == unrolled


def test_what_a_folder_cannot_know_is_in_card_yaml(folder):
    card = build_card(folder, "org/rs-fw-bw")
    assert card.data.license == "cc-by-4.0"
    assert {result.dataset_name for result in card.data.eval_results} == {"reverse"}
    assert FACTS["data"] in card.text
    assert FACTS["limits"] in card.text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("card.yaml", "licence: mit\n", r"card\.yaml has an unknown key 'licence'; known: license, datasets"),
        (
            "card.yaml",
            "- license: mit\n",
            r"card\.yaml must hold a mapping, `name: value`, got \"\[{'license': 'mit'}\]\"",
        ),
        ("card.yaml", "cc-by-4.0", r"card\.yaml must hold a mapping, `name: value`, got 'cc-by-4\.0'"),
        ("card.yaml", "license: [mit\n", r"card\.yaml is no YAML: .*expected ',' or '\]'"),
        ("card.yaml", "license: no\n", r"card\.yaml: license must be text, got False \(in quotes"),
        ("card.yaml", "datasets: org/corpus\n", r"card\.yaml: datasets must be a list of texts, got 'org/corpus'"),
        ("results.json", '{"test": {"bleu": "<b>1"}}', r"results\.json: test must have a number 'bleu', got '<b>1'"),
        ("results.json", '{"tes', r"results\.json is no JSON: Unterminated string"),
        (
            "depth_sweep.json",
            '[{"bleu": 1}]',
            r"depth_sweep\.json: row 1 must have a number 'encoder_layers', got None",
        ),
        ("collapse.json", "[]", r"collapse\.json must hold a mapping"),
        ("comparison.json", '{"sentences": "<b>"}', r"comparison\.json must have a number 'sentences', got '<b>'"),
    ],
)
def test_a_file_that_does_not_hold_what_it_should_is_named_in_a_line(folder, file, content, message):
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        build_card(folder)
    assert "\n" not in str(caught.value)


def test_without_card_yaml_the_card_says_of_the_data_what_the_run_knows(folder):
    (folder / "card.yaml").write_text("")
    pairs = json.loads((folder / "results.json").read_text())["training"]["pairs"]
    assert f"{pairs:,} sentence pairs of `reverse/train.jsonl`. Where they come from" in build_card(folder).text
    (folder / "recipe.yaml").write_text("dataset_name: org/corpus\n")
    assert f"{pairs:,} sentence pairs of `org/corpus`." in build_card(folder).text
    for file in ("recipe.yaml", "results.json"):
        (folder / file).unlink()
    assert "Nothing is said about the training data." in build_card(folder).text


def card_that_says(text, trained, folder):
    """The card of the trained model when every text of its files that a card shows is this one."""
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"source_lang": text}))
    (folder / "collapse.json").write_text(json.dumps({"parent": text, "method": text}))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe |= dict.fromkeys(("model_name_or_path", "dataset_name", "targets", "word_weight", "seed"), text)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"teachers": [text]}))
    results = json.loads((folder / "results.json").read_text())
    for metric in ("bleu", "chrf"):
        results["validation"][f"{metric}_signature"] = text
    (folder / "results.json").write_text(json.dumps(results))
    score = {name: 1.0 for metric in ("bleu", "chrf") for name in (metric, f"{metric}_ci")}
    score |= dict.fromkeys(("bleu_signature", "chrf_signature"), text)
    figures = dict.fromkeys(("bytes", "load_seconds", "single", "batched"), 1.0)
    engine = dict.fromkeys(("engine", "quantization"), text) | {"same": 1.0, "chrf_to_parent": 1.0, "speedup": figures}
    engine |= {"parent": figures, "child": figures, "quality": {"parent": score, "child": score}}
    comparison = {"dataset": text, "split": text, "sentences": 1, "references": True, "engines": [engine]}
    comparison["timed_sentences"] = {"single": 1, "batched": 1}
    comparison |= {"parent": {"model": text, "parameters": 1}, "machine": {"cpu": text, "threads": 1}}
    comparison |= {"child": {"parameters": 1, "weights_sha256": weights_digest(folder)}, "decoding": {"num_beams": 1}}
    (folder / "comparison.json").write_text(json.dumps(comparison))
    write_card(folder)
    return ModelCard.load(folder / "README.md")


def structure(text):
    """What Markdown makes of a text: its blocks, and what is in each beside plain text, addresses included."""
    plain = ("text", "text_special", "softbreak")
    found = []
    for token in MarkdownIt("commonmark").enable("table").disable("text_join").parse(text):
        children = token.children or []
        addresses = [
            child.content for child in children if re.search(r"://|www\.", child.content) and child.type in plain
        ]
        found.append((token.type, [child.type for child in children if child.type not in plain], addresses))
    return found


def test_text_of_other_peoples_files_is_text_in_the_card(trained, tmp_path):
    """Neither link, picture, HTML, heading nor another row of a table, piece of code or key of the metadata."""
    evil = (
        "x`](https://evil.example)\n# Hacked\n---\n```\n<img src=x onerror=y> |![a](b) [c]: d www.evil.example $\\foo$"
    )
    card, honest = (card_that_says(text, trained, tmp_path / text.replace("/", "")) for text in (evil, "word"))
    assert structure(card.text) == structure(honest.text)
    assert card.data.to_dict().keys() == honest.data.to_dict().keys()
    assert (card.data.language, honest.data.language) == (["bw"], ["word", "bw"])
    for snippet in re.findall(r"```python\n(.+?)^```$", card.text, re.DOTALL | re.MULTILINE):
        compile(snippet, "snippet", "exec")


def test_every_snippet_of_a_card_runs(folder, monkeypatch):
    """With the folder in the place of the repository."""
    monkeypatch.chdir(folder.parent)
    text = build_card(folder, "org/rs-fw-bw").text.replace("org/rs-fw-bw", "rs-fw-bw").replace("…", "g h i j")
    (command,) = re.findall(r"```bash\n(python -m .+?)\n```", text, re.DOTALL)
    first, remote, ctranslate2 = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    fork(*command.split()[1:], cwd=folder.parent)
    for snippet, result in ((first, "[{'translation_text': 'j i h g'}]"), (ctranslate2, "j i h g")):
        lines = snippet.rstrip().rsplit("\n", 1)
        names = {}
        exec(f"{lines[0]}\nlast = {lines[1]}", names)
        assert str(names["last"]) == result
    without_package = f"import sys; sys.modules['rs_transformer'] = None\n{remote}print(translator('g h i j'))\n"
    done = fork("-c", without_package, cwd=folder.parent)
    assert done.stdout.endswith("[{'translation_text': 'j i h g'}]\n")


def test_depths_measured_by_the_sweep_are_in_the_card(folder, task):
    options = ["--source_lang", "fw", "--target_lang", "bw", "--validation_file", task["validation"], "--num_beams", 1]
    options += ["--split", "validation", "--decoder_depths", 1, "--rounds", 1]
    script("depth_sweep")("--model_name_or_path", folder, *options, "--output_file", folder / "depth_sweep.json")
    text = build_card(folder).text
    rows = json.loads((folder / "depth_sweep.json").read_text())
    assert [row["decoder_layers"] for row in rows] == [2, 1]
    for row in rows:
        assert f"| 2 | {row['decoder_layers']} | {row['bleu']:.2f} | {row['chrf']:.2f} |" in re.sub(" +", " ", text)
    assert "without training for them (validation set, beam 1;" in text
    # Models that were fine-tuned at a depth are others; an earlier version did not say of which split a sweep is.
    tuned = rows[1] | {"system": "tuned", "bleu": 12.34}
    former = [{name: value for name, value in row.items() if name != "split"} for row in (*rows, tuned)]
    (folder / "depth_sweep.json").write_text(json.dumps(former))
    assert build_card(folder).text == text.replace("validation set, beam", "test set, beam")
    (folder / "depth_sweep.json").write_text(json.dumps([rows[0], tuned]))
    assert "At other depths" not in build_card(folder).text
    (folder / "depth_sweep.json").write_text(json.dumps(rows))
    AutoModelForSeq2SeqLM.from_pretrained(folder, decoder_layers=1).save_pretrained(folder)
    assert "At other depths" in build_card(folder).text  # the same weights
    write_card(folder)
    rows[0]["weights_sha256"] = "of other weights"
    (folder / "depth_sweep.json").write_text(json.dumps(rows))
    assert "At other depths" not in build_card(folder).text
    shown = [f"| 2 | {row['decoder_layers']} | {row['bleu']:.2f} |" for row in rows]
    said = card_disagreements(folder)
    assert len(said) == 2
    assert all(f"README.md says '{row}" in line for row, line in zip(shown, said, strict=True))


def test_card_of_a_fine_tuned_collapse_names_parent_method_and_command(trained, task, tmp_path):
    expand(AutoModelForSeq2SeqLM.from_pretrained(trained)).save_pretrained(tmp_path / "vanilla")
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "vanilla")
    script("collapse")("--model_name_or_path", tmp_path / "vanilla", "--output_dir", tmp_path / "collapsed")
    assert f"a collapse of `{tmp_path}/vanilla`, method average, without" in build_card(tmp_path / "collapsed").text
    options = [*task_options(task), "--output_dir", tmp_path / "tuned", "--max_steps", 2, "--eval_strategy", "no"]
    script("train")(RECIPE, "--model_name_or_path", tmp_path / "collapsed", *options, "--save_strategy", "no")
    text = ModelCard.load(tmp_path / "tuned" / "README.md").text
    assert f"Fine-tuned from `{tmp_path}/collapsed`, which goes back to a collapse of `{tmp_path}/vanilla`" in text
    assert "python training/train.py recipe.yaml" in text


def test_card_names_what_was_trimmed(folder):
    sizes = {side: {"entries": {"parent": 50, "trimmed": 40}} for side in ("source", "target")}
    for separate, shown in ((False, "40"), (True, "40 + 40")):
        record = {"parent": "org/whole", "separate_vocabs": separate, **sizes}
        (folder / "trim.json").write_text(json.dumps(record))
        assert f"`org/whole`, with its vocabulary trimmed to {shown} entries" in build_card(folder).text


def test_card_of_a_student_names_its_teachers_and_the_command(folder):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe |= {"teachers": ["org/teacher", "runs/second"], "targets": "best", "word_weight": 0.5}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = build_card(folder).text
    assert (
        "Distilled from `org/teacher`, `runs/second`: targets best, weight of the teacher's distributions 0.5" in text
    )
    assert "python training/distill.py recipe.yaml" in text


def test_card_says_what_was_changed_when_the_training_went_on(folder):
    record = json.loads((folder / "run.json").read_text())
    part = {"update": 1200, "changed": {"seed": [3, 4], "training_data": ["aa", "b_b|"]}}
    (folder / "run.json").write_text(json.dumps(record | {"resumed": [part]}))
    said = 'from update 1,200 on seed 4, before 3; from update 1,200 on training_data "b_b\\|", before "aa"'
    assert said in build_card(folder).text
    (folder / "run.json").write_text(json.dumps(record | {"resumed": [7]}))
    with pytest.raises(ValueError, match=r"run\.json does not hold what it should"):
        build_card(folder)


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
    assert "trust_remote_code" not in card.text
    assert "Not measured yet." in card.text
    assert card.data.eval_results is None


def test_card_of_as_many_layers_as_steps_speaks_of_no_sharing(tokenizer, tmp_path):
    model = rs_model(**config_from_tokenizer(tokenizer), encoder_unique_layers=6, decoder_unique_layers=6)
    card = build_card(save(tmp_path / "model", model, tokenizer))
    assert "A Marian translation model, fw to bw, 6 encoder layers and 6 decoder layers" in card.text
    # It is Marian, and is loaded as that; but not if it has what Marian has not.
    assert "trust_remote_code" not in card.text
    stock = MarianMTModel.from_pretrained(tmp_path / "model")
    inputs = tokenizer(["a b c"], return_tensors="pt")
    torch.testing.assert_close(
        stock(**inputs, labels=inputs.input_ids).logits, model(**inputs, labels=inputs.input_ids).logits
    )
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"deepnorm": True}))
    assert "trust_remote_code=True" in build_card(tmp_path / "model").text


def test_disagreements_are_named(folder):
    write_card(folder)
    results = json.loads((folder / "results.json").read_text())
    bleu = round(results["test"]["bleu"], 2)
    results["test"]["bleu"] = 1.234
    (folder / "results.json").write_text(json.dumps(results))
    assert card_disagreements(folder) == [f"test bleu: {bleu} in README.md, 1.23 in results.json"]
    (folder / "results.json").unlink()
    assert len(card_disagreements(folder)) == 4


def make_trainer(model, tokenizer, folder):
    args = TranslationTrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
    return TranslationTrainer(model, args, processing_class=tokenizer)


def test_what_the_trainer_is_told_comes_into_the_card(folder):
    trainer = make_trainer(*load_translator(str(folder)), folder)
    trainer.create_model_card(
        None, "mit", tags="letters", dataset="toy", dataset_tags=["org/toy"], finetuned_from="org/a"
    )
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.datasets, data.base_model) == ("mit", ["org/toy"], "org/a")
    assert data.tags == ["translation", "marian", "recurrent-stacking", "letters"]
    assert {result.dataset_name for result in data.eval_results} == {"toy"}


def test_the_card_of_an_adapter_is_the_trainers(tokenizer, tmp_path):
    model = get_peft_model(rs_model(**config_from_tokenizer(tokenizer)), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = make_trainer(model, tokenizer, tmp_path)
    trainer.save_model()
    trainer.create_model_card(tags=["letters"])
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"


def test_scores_that_are_kept_are_in_the_card(tmp_path):
    folder = shutil.copytree(ROOT / "hub_cards" / "marian-ja-en", tmp_path / "model", symlinks=False)
    before = ModelCard.load(folder / "README.md")
    lines = (ROOT / "training/data/tatoeba-test/test.jsonl").read_text("utf-8").splitlines()[:6]
    (tmp_path / "few.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    command = ["--systems", folder, "--source_lang", "ja", "--target_lang", "en", "--num_beams", 1, "--keep", "true"]
    with pytest.raises(ValueError, match="keep is for models at their own depths"):
        script("evaluate")(*command, "--test_file", tmp_path / "few.jsonl", "--decoder_layers", 2)
    script("evaluate")(*command, "--test_file", tmp_path / "few.jsonl", "--output_file", tmp_path / "scores.json")
    (row,) = json.loads((tmp_path / "scores.json").read_text())
    results = json.loads((folder / "results.json").read_text())
    assert (results["test"]["bleu"], results["test"]["sentences"]) == (row["bleu"], 6)
    assert results["validation"]["sentences"] == 500  # those of the other split stay
    card = ModelCard.load(folder / "README.md")
    assert f"| test       |         6 |    1 | {row['bleu']:5.2f} |" in card.text
    assert card_disagreements(folder) == []
    assert card.data.license == before.data.license
    # What somebody has put into it is kept, and said.
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(
        text.replace("## Use", "## Notes\n\nNot for poems.\n4.1 of 5 in our eyes.\n\n## Use")
    )
    script("evaluate")(*command, "--test_file", tmp_path / "few.jsonl")
    assert (folder / "README.md").read_text() == text
    assert "Not for poems.\n4.1 of 5" in (folder / "README.before.md").read_text()
    (folder / "README.md").write_text(text.replace("## Use", "## Notes\n\n4.1 of 5 in our eyes.\n\n## Use"))
    script("evaluate")(*command, "--test_file", tmp_path / "few.jsonl")
    assert "4.1 of 5" in (folder / "README.before-2.md").read_text()
    # Of other weights nothing stays; nor does the card change, where it is somebody's own.
    (folder / "README.md").write_text("my notes")
    results["weights"]["sha256"] = "0"
    (folder / "results.json").write_text(json.dumps(results))
    script("evaluate")(*command, "--test_file", tmp_path / "few.jsonl")
    assert "validation" not in json.loads((folder / "results.json").read_text())
    assert (folder / "README.md").read_text() == "my notes"
