"""`training/collapse.py` from end to end, on the reverse task and on checkpoints as OPUS-MT publishes them."""

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import COMMIT, RECIPE, script, task_options, write_hub_cache
from forked import fork
from killing import kill
from oracle import marian
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from rs_transformer import RSMarianForConditionalGeneration, expand
from rs_transformer.commands import collapse as command
from rs_transformer.corpus import CorpusArguments, load_split
from rs_transformer.decoding import DecodingArguments, translate
from rs_transformer.tokenization import train_tokenizer

LANGUAGES = ["--source_lang", "fw", "--target_lang", "bw"]


@pytest.fixture(scope="module")
def parent(trained, made_once):
    """A stock Marian folder that knows the reverse task by two layers that do the same in different ways.

    The second layer's heads and hidden units are in another order, so that the mean of the layers knows little.
    """
    return made_once("parent", lambda folder: write_parent(folder, trained))


def write_parent(folder, trained):
    model = expand(AutoModelForSeq2SeqLM.from_pretrained(trained))
    heads = torch.arange(64).view(4, 16).flip(0).flatten()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"layers\.1\.\w+_attn\.[qkv]_proj", name):
                parameter.copy_(parameter[heads])
            elif re.search(r"layers\.1\.\w+_attn\.out_proj.weight", name):
                parameter.copy_(parameter[:, heads])
            elif re.search(r"layers\.1\.fc1", name):
                parameter.copy_(parameter.flip(0))
            elif re.search(r"layers\.1\.fc2.weight", name):
                parameter.copy_(parameter.flip(1))
    model.final_logits_bias.zero_()  # as in OPUS-MT's checkpoints
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # What OPUS-MT's configurations say of generation and of options that Marian no longer has.
    legacy = {"num_beams": 4, "bad_words_ids": [[config["pad_token_id"]]], "max_length": 32, "normalize_before": False}
    (folder / "config.json").write_text(json.dumps(config | legacy | {"add_final_layer_norm": False}))
    (folder / "generation_config.json").unlink()


@pytest.fixture
def damaged(parent, tmp_path):
    """A copy of the parent to spoil."""
    return shutil.copytree(parent, tmp_path / "damaged")


def listing(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_collapsed_folder_has_everything_and_says_where_it_comes_from(parent, tmp_path, capsys):
    output = tmp_path / "some" / "rs"
    script("collapse")("--model_name_or_path", parent, "--output_dir", output)
    assert "85,504 parameters" in capsys.readouterr().out
    assert listing(output.parent) == ["rs"]
    assert listing(output) == [
        "collapse.json",
        "config.json",
        "configuration_rs_marian.py",
        "generation_config.json",
        "generation_rs_marian.py",
        "model.safetensors",
        "modeling_rs_marian.py",
        "pipeline_rs_marian.py",
        "source.spm",
        "target.spm",
        "tokenizer_config.json",
        "versions_rs_marian.py",
        "vocab.json",
    ]
    record = json.loads((output / "collapse.json").read_text())
    assert (record["parent"], record["revision"], record["method"]) == (str(parent), "main", "average")
    assert record["encoder"] == {"layer_map": [0, 0], "parent_layers": [[0, 1]]}
    before, after = record["parameters"]["parent"], record["parameters"]["collapsed"]
    assert before["layers"] == 2 * after["layers"]
    assert before["total"] - before["layers"] == after["total"] - after["layers"]
    assert {"model.shared.weight", "final_logits_bias"} <= set(record["copied"])
    assert record["dropped"] == []
    model = AutoModelForSeq2SeqLM.from_pretrained(output)
    assert type(model) is RSMarianForConditionalGeneration
    assert (model.generation_config.num_beams, model.generation_config.max_length) == (4, 32)
    assert pipeline("translation", model=str(output))("a b c")[0]["translation_text"]


def test_hub_name_is_collapsed_from_the_cache_and_its_commit_recorded(parent, tmp_path):
    write_hub_cache(parent, Path(os.environ["HF_HOME"], "hub"), "Helsinki-NLP/opus-mt-fw-bw")
    options = ["--model_name_or_path", "Helsinki-NLP/opus-mt-fw-bw", "--output_dir", tmp_path / "rs"]
    fork("training/collapse.py", *options)
    record = json.loads((tmp_path / "rs" / "collapse.json").read_text())
    assert (record["parent"], record["commit"]) == ("Helsinki-NLP/opus-mt-fw-bw", COMMIT)
    assert "Helsinki-NLP" not in (tmp_path / "rs" / "config.json").read_text()


def test_every_tensor_of_the_parent_is_accounted_for_by_name(parent, tmp_path):
    script("collapse")("--model_name_or_path", parent, "--output_dir", tmp_path / "rs", "--method", 1)
    record = json.loads((tmp_path / "rs" / "collapse.json").read_text())
    assert record["decoder"]["parent_layers"] == [[1]]
    assert "model.decoder.layers.0.fc1.weight" in record["dropped"]
    assert record["made_from"]["model.decoder.layers.0.fc1.weight"] == ["model.decoder.layers.1.fc1.weight"]
    state = MarianMTModel.from_pretrained(parent).state_dict()
    used = {*record["copied"], *itertools.chain.from_iterable(record["made_from"].values())}
    assert used | set(record["dropped"]) == set(state)
    stored = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "rs").state_dict()["model.decoder.layers.0.fc1.weight"]
    assert torch.equal(stored, state["model.decoder.layers.1.fc1.weight"])


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluate_scores_parent_and_child_on_any_number_of_processes(parent, task, tmp_path, processes):
    options = ["--evaluate", "--test_file", task["test"], "--num_beams", 1, "--max_new_tokens", 16, *LANGUAGES]
    command = ["--model_name_or_path", parent, "--output_dir", tmp_path / "rs", *options]
    printed = fork("training/collapse.py", *command, processes=processes).stdout
    of_parent, of_child = json.loads((tmp_path / "rs" / "collapse.json").read_text())["evaluation"]
    assert of_parent["bleu"] > 80
    assert of_parent["bleu"] > of_child["bleu"] + 20
    assert of_child["parameters"] == 85504
    assert printed.count(f"{tmp_path / 'rs'}: BLEU") == 1


def test_calibrated_model_is_nearer_to_its_parent_and_fine_tunes(parent, task, tmp_path):
    data = [*task_options(task), *LANGUAGES, "--max_source_length", 16, "--max_target_length", 16]
    search = ["--evaluate", "--num_beams", 1, "--max_new_tokens", 16]
    bleu = {}
    for method in ("average", "calibrated"):
        options = ["--method", method, "--calibration_updates", 80, "--calibration_max_tokens", 512]
        output = ["--output_dir", tmp_path / method]
        script("collapse")("--model_name_or_path", parent, *output, *options, *data, *search)
        record = json.loads((tmp_path / method / "collapse.json").read_text())
        bleu[method] = record["evaluation"][1]["bleu"]
    assert record["calibration"]["updates"] == 80
    assert bleu["calibrated"] > bleu["average"] + 5
    recipe = tmp_path / "recipe.yaml"
    fields = ("d_model", "encoder_", "decoder_", "init_std", "max_position")
    recipe.write_text("".join(f"{line}\n" for line in RECIPE.read_text().splitlines() if not line.startswith(fields)))
    options = ["--model_name_or_path", tmp_path / "calibrated", "--num_train_epochs", 1, "--learning_rate", 5e-4]
    script("train")(recipe, *task_options(task), *options, "--output_dir", tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned" / "results.json").read_text())["test"]["bleu"] > bleu["calibrated"]


def test_adapters_of_the_parent_come_along_and_are_recorded(trained, tokenizer, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(trained, step_adapter_rank=2)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "parent")
    script("collapse")("--model_name_or_path", tmp_path / "parent", "--output_dir", tmp_path / "child")
    record = json.loads((tmp_path / "child" / "collapse.json").read_text())
    child = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "child")
    assert child.config.step_adapter_rank == 2
    adapters = {name.rpartition(".")[0] for name in child.state_dict() if name.endswith(".up")}
    assert record["adapters"].keys() == adapters
    assert record["parameters"]["parent"]["total"] == model.num_parameters(only_trainable=True)


def test_steps_that_keep_their_layer_norms_go_through_calibration_training_and_pipeline(parent, task, tmp_path):
    options = ["--step_layer_norms", "true", "--method", "calibrated", "--calibration_updates", 30, *LANGUAGES]
    options += ["--model_name_or_path", parent, "--output_dir", tmp_path / "rs", "--train_file", task["train"]]
    script("collapse")(*options)
    record = json.loads((tmp_path / "rs" / "collapse.json").read_text())
    assert record["step_layer_norms"] is True
    norm, theirs = (f"model.decoder.{owner}.1.final_layer_norm.weight" for owner in ("step_norms", "layers"))
    assert record["made_from"][norm] == [theirs]
    trained_norm = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "rs").get_parameter(norm)
    start = AutoModelForSeq2SeqLM.from_pretrained(parent).get_parameter(theirs)
    assert not torch.equal(trained_norm, start)  # calibrated too
    # Five LayerNorms of 64 weights and biases for each of two steps, where a shared layer has them once.
    before, after = (record["parameters"][name]["layers"] for name in ("parent", "collapsed"))
    assert after == before // 2 + 5 * 2 * 64
    options = [RECIPE, *task_options(task), "--max_steps", 3, "--model_name_or_path", tmp_path / "rs"]
    script("train")(*options, "--output_dir", tmp_path / "tuned")
    assert pipeline("translation", model=str(tmp_path / "tuned"))("a b c")[0]["translation_text"]
    with pytest.raises(ValueError, match=r"none to share; training/collapse.py with --step_layer_norms false"):
        script("train")(*options, "--step_layer_norms", "false", "--output_dir", tmp_path / "shared")
    with pytest.raises(
        ValueError, match=r"decoder_layers must be at most 2, got 3: each step has parameters of its own"
    ):
        script("train")(*options, "--decoder_layers", 3, "--output_dir", tmp_path / "deeper")


def test_training_does_not_give_a_checkpoint_new_layer_norms(trained, task, tmp_path):
    options = ["--model_name_or_path", trained, "--step_layer_norms", "true", "--output_dir", tmp_path]
    with pytest.raises(ValueError, match=r"training/collapse.py with --step_layer_norms true makes a model"):
        script("train")(RECIPE, *task_options(task), *options)


def test_layers_that_calibration_changes_are_not_called_copies(parent, task, tmp_path):
    options = ["--method", "calibrated", "--calibration_updates", 1, "--encoder_unique_layers", 2, *LANGUAGES]
    command = ["--model_name_or_path", parent, "--output_dir", tmp_path / "rs", "--train_file", task["train"]]
    script("collapse")(*command, *options)
    record = json.loads((tmp_path / "rs" / "collapse.json").read_text())
    state, stored = (
        AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict() for folder in (parent, tmp_path / "rs")
    )
    assert all(torch.equal(state[name], stored[name]) for name in record["copied"])
    assert record["made_from"]["model.encoder.layers.1.fc1.weight"] == ["model.encoder.layers.1.fc1.weight"]


def test_pickle_is_refused_unless_the_user_insists(damaged, tmp_path):
    model = MarianMTModel.from_pretrained(damaged)
    (damaged / "model.safetensors").unlink()
    torch.save(model.state_dict(), damaged / "pytorch_model.bin")
    options = ["--model_name_or_path", damaged, "--output_dir", tmp_path / "rs"]
    with pytest.raises(ValueError, match=r"has no safetensors weights at revision 'main'.* --allow_pickle true"):
        script("collapse")(*options)
    assert listing(tmp_path) == ["damaged"]
    script("collapse")(*options, "--allow_pickle")
    collapsed = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "rs")
    assert torch.equal(collapsed.model.shared.weight, model.model.shared.weight)
    shutil.rmtree(tmp_path / "rs")
    weights = damaged / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="are missing, truncated or damaged"):
        script("collapse")(*options, "--allow_pickle")
    assert listing(tmp_path) == ["damaged"]


def not_marian(folder):
    T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    ).save_pretrained(folder)


def other_width(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"encoder_ffn_dim": 64}))


def more_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"decoder_layers": 3}))


def fewer_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"decoder_layers": 1}))


def truncated(folder, name="model.safetensors"):
    file = folder / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def shard_missing(folder):
    MarianMTModel.from_pretrained(folder).save_pretrained(folder / "sharded", max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    for file in (folder / "sharded").iterdir():
        file.rename(folder / file.name)
    next(folder.glob("model-00002-of-*")).unlink()


def other_tokenizer(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {f"x{i}": len(vocabulary) + i for i in range(9)}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (not_marian, "is a t5 model; it must be Marian or RSMarian"),
        (other_width, r"do not fit its config.json: model.encoder.layers.\d.fc\d.\w+ is \("),
        (more_layers, "lack model.decoder.layers.2."),
        (fewer_layers, "has no use for some of its weights: model.decoder.layers.1."),
        (truncated, "are truncated or damaged"),
        (shard_missing, "missing, truncated or damaged .*model-00002-of-"),
        (lambda folder: truncated(folder, "source.spm"), r"has no complete tokenizer \(source.spm, target.spm"),
        (lambda folder: truncated(folder, "vocab.json"), r"has no complete tokenizer \(source.spm, target.spm"),
        (lambda folder: (folder / "target.spm").unlink(), r"has no complete tokenizer \(source.spm, target.spm"),
        (lambda folder: (folder / "source.spm").unlink(), r"has no complete tokenizer \(source.spm, target.spm"),
        (lambda folder: (folder / "vocab.json").unlink(), r"has no complete tokenizer \(source.spm, target.spm"),
        (other_tokenizer, "they do not belong together"),
    ],
    ids=[
        "not-marian",
        "other-width",
        "missing-layer",
        "surplus-layer",
        "truncated",
        "missing-shard",
        "truncated-source-spm",
        "truncated-vocab",
        "no-target-spm",
        "no-source-spm",
        "no-vocab",
        "other-tokenizer",
    ],
)
def test_unfit_parent_is_refused_before_anything_is_written(damaged, tmp_path, spoil, message):
    spoil(damaged)
    with pytest.raises(ValueError, match=message):
        script("collapse")("--model_name_or_path", damaged, "--output_dir", tmp_path / "rs")
    assert listing(tmp_path) == ["damaged"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "middle"], "method must be one of first, last, average, stepwise, calibrated or a number"),
        (["--method", "2"], "method as a number is a layer of the parent's encoder, 0..1, got 2"),
        (["--encoder_unique_layers", "3"], "encoder_unique_layers must lie in 1..encoder_layers (2), got 3"),
        (["--decoder_unique_layers", "0"], "decoder_unique_layers must lie in 1..decoder_layers (2), got 0"),
        (["--evaluate"], "give source_lang and target_lang"),
        (["--evaluate", *LANGUAGES], "no test data: give test_file or dataset_name"),
        (["--method", "calibrated", *LANGUAGES], "no train data: give train_file or dataset_name"),
        (["--calibration_updates", "0"], "calibration_updates must be at least 1, got 0"),
        (["--source_lang", "bw", "--target_lang", "fw", "--evaluate"], "exchange source_lang and target_lang"),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, list) else "",
)
def test_bad_options_are_refused_before_anything_is_written(parent, task, tmp_path, options, message):
    if "bw" in options[1:2]:
        options = [*options, "--test_file", task["test"]]
    with pytest.raises(ValueError, match=re.escape(message)):
        script("collapse")("--model_name_or_path", parent, "--output_dir", tmp_path / "rs", *options)
    assert listing(tmp_path) == []


def test_existing_output_is_left_alone(parent, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is there already and not empty"):
        script("collapse")("--model_name_or_path", parent, "--output_dir", tmp_path)
    assert listing(tmp_path) == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    script("collapse")("--model_name_or_path", parent, "--output_dir", tmp_path / "link")
    assert (tmp_path / "empty" / "collapse.json").is_file()
    assert (tmp_path / "link").is_symlink()


def test_a_parent_with_separate_vocabularies_keeps_both(tmp_path, task):
    sides = load_split(CorpusArguments("fw", "bw", train_file=[str(task["train"])]), "train")
    folder = tmp_path / "parent"
    options = {"source_lang": "fw", "target_lang": "bw", "vocab_size": 24, "vocabulary": "separate"}
    tokenizer = train_tokenizer(sides["source"][:], sides["target"][:], folder, **options)
    size = len(tokenizer.encoder)
    fields = {"vocab_size": size, "pad_token_id": size - 1, "decoder_start_token_id": size - 1}
    parent = marian(**fields, decoder_vocab_size=size, share_encoder_decoder_embeddings=False)
    parent.save_pretrained(folder)
    script("collapse")("--model_name_or_path", folder, "--output_dir", tmp_path / "rs")
    child = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "rs")
    assert torch.equal(child.model.encoder.embed_tokens.weight, parent.model.encoder.embed_tokens.weight)
    assert torch.equal(child.model.decoder.embed_tokens.weight, parent.model.decoder.embed_tokens.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "rs").target_encoder == tokenizer.target_encoder
    vocabulary = tokenizer.target_encoder | {f"x{number}": size + number for number in range(9)}
    (folder / "target_vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match="target entries, the model's decoder vocabulary"):
        script("collapse")("--model_name_or_path", folder, "--output_dir", tmp_path / "other")


def test_full_disk_leaves_nothing(parent, tmp_path, monkeypatch):
    def full(data, file):
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(command, "write_json", full)
    with pytest.raises(OSError, match="No space left on device"):
        script("collapse")("--model_name_or_path", parent, "--output_dir", tmp_path / "rs")
    assert listing(tmp_path) == []


def test_killed_run_leaves_no_output_folder_and_the_next_one_succeeds(parent, tmp_path):
    options = ["--model_name_or_path", parent, "--output_dir", tmp_path / "rs"]
    # The model is written and the record is not: it would have been the last file.
    kill("training/collapse.py", *options, at="rs_transformer.commands.collapse.write_json")
    assert listing(tmp_path) == [".rs.lock", ".rs.partial"]
    assert (tmp_path / ".rs.partial" / "model.safetensors").is_file()
    script("collapse")(*options)
    assert listing(tmp_path) == ["rs"]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "rs"), AutoTokenizer.from_pretrained(parent)
    assert translate(model, tokenizer, ["a b c"], DecodingArguments(max_new_tokens=9), progress=False)
