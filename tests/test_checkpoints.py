"""Checkpoints are loaded strictly or not at all, by every command alike."""

import json
import pickle
import shutil

import pytest
import torch
from conftest import script, task_options
from oracle import marian, rs_model, with_own_weights
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from rs_transformer.checkpoints import load_checkpoint, load_parent, load_translator
from rs_transformer.tokenization import train_tokenizer
from rs_transformer.training.model import ModelArguments, build_model, config_from_tokenizer

LANGUAGES = ["--source_lang", "fw", "--target_lang", "bw"]
LAYER = "model.decoder.layers.0.fc1.weight"
BIAS = "final_logits_bias"


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    """Folders of untrained models, by name."""
    folder = tmp_path_factory.mktemp("models")
    fields = {**config_from_tokenizer(tokenizer), "decoder_layers": 3, "encoder_layers": 2}
    steps = {"step_layer_norms": True, "step_embeddings": True, "step_biases": True, "step_adapter_rank": 2}
    made = {"rs": rs_model(**fields), "steps": rs_model(**fields, **steps)}
    made["marian"] = marian(**config_from_tokenizer(tokenizer))
    for name, model in made.items():
        for part in (model, tokenizer):
            part.save_pretrained(folder / name)
    return folder


@pytest.fixture
def damaged(models, tmp_path):
    """Copies a model and changes its tensors."""

    def damage(change, name="rs"):
        folder = shutil.copytree(models / name, tmp_path / name)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return damage


def lacking(tensors):
    for name in [name for name in tensors if ".decoder.layers.0.fc" in name or ".encoder.layers.0.fc" in name]:
        del tensors[name]


def value(name, number):
    def change(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[3] = number

    return change


@pytest.mark.parametrize("name", ["rs", "marian"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacking, r"lack model.decoder.layers.0.fc1.bias, model.decoder.layers.0.fc1.weight, .* and \d+ more"),
        (lambda tensors: tensors.pop(BIAS), "lack final_logits_bias"),
        (lambda tensors: tensors.pop("model.shared.weight"), "lack lm_head.weight, model.decoder.embed_tokens"),
        (lambda tensors: tensors.clear(), r"lack (final_logits_bias|lm_head.weight), "),
        (lambda tensors: tensors.update({"model.encoder.layers.8.fc1.bias": torch.zeros(64)}), "has no use for some"),
        (lambda tensors: tensors.update({LAYER: tensors[LAYER][:-1].clone()}), r"fc1.weight is \(63, 32\), by the"),
        (lambda tensors: tensors.update({BIAS: tensors[BIAS][:, 1:].clone()}), r"bias is \(1, 27\), by the config"),
        (value(LAYER, float("nan")), "must be finite, and model.decoder.layers.0.fc1.weight has NaN or inf"),
        (value("model.shared.weight", float("-inf")), r"must be finite, and .* has NaN or inf"),
        (value(BIAS, float("inf")), "must be finite, and final_logits_bias has NaN or inf"),
        (lambda tensors: tensors.update({LAYER: tensors[LAYER].to(torch.int8)}), "must be floating-point numbers"),
        (
            lambda tensors: tensors.update({"model.shared.weight": tensors["model.shared.weight"].to(torch.int64)}),
            "must be floating-point numbers, and model.shared.weight are not",
        ),
    ],
)
def test_what_is_wrong_with_the_weights_is_said_in_one_line(damaged, change, message, name, caplog):
    with pytest.raises(ValueError, match=message) as error:
        load_translator(str(damaged(change, name)))
    assert "\n" not in str(error.value)
    assert not [
        record for record in caplog.records if record.levelname == "WARNING"
    ]  # no table of transformers' before it


def test_a_tokenizer_is_saved_without_how_it_was_loaded(models, tmp_path):
    _, tokenizer = load_translator(str(models / "rs"))
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only"} & saved.keys()
    assert saved["source_lang"] == "fw"


def test_a_bias_may_bar_tokens_by_minus_infinity(damaged):
    model, _ = load_translator(str(damaged(value(BIAS, float("-inf")))))
    assert model.final_logits_bias[0, 3] == float("-inf")


def other_padding(folder):
    """A vocabulary of the same size, with padding in the middle."""
    entries = json.loads((folder / "vocab.json").read_text())
    names = {index: entry for entry, index in entries.items()}
    entries[names[5]], entries["<pad>"] = entries["<pad>"], 5
    (folder / "vocab.json").write_text(json.dumps(entries))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def added_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)


def cut(name):
    return lambda folder: (folder / name).write_text((folder / name).read_text()[:100])


def edit_config(**fields):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return edit


def only_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_padding, "the tokenizer's padding token is 5, the model's 27: they do not belong together"),
        (added_tokens, "the tokenizer has 29 entries, the model's vocabulary 28: they do not belong together"),
        (only_pickle, r"has no safetensors weights at revision 'main'"),
        (cut("config.json"), "cannot be used: .*config.json' is not a valid JSON file"),
        (cut("generation_config.json"), "cannot be used: .*generation_config.json' is not a valid JSON file"),
        (cut("vocab.json"), r"has no complete tokenizer \(source.spm, target.spm, vocab.json\): .*char"),
        (
            edit_config(d_model="wide"),
            "cannot be used: Validation error for field 'd_model': .* expected int, got str",
        ),
        (edit_config(decoder_unique_layers=4), r"cannot be used: decoder_unique_layers must lie in 1..decoder_layers"),
        (edit_config(model_type="other"), "cannot be used: The repository .* contains custom code"),
    ],
)
def test_what_is_wrong_with_the_other_files_is_said_in_one_line(models, tmp_path, change, message):
    folder = shutil.copytree(models / "rs", tmp_path / "rs")
    change(folder)
    with pytest.raises(ValueError, match=message) as error:
        load_translator(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./runs/none", "runs/a/b", "../none", "runs/none/", "two words"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match=f"there is no model folder '{name}'"):
        load_translator(name)


def test_a_name_that_may_be_of_the_hub_is_said_to_be_in_neither_place():
    message = r"there is no folder 'runs/none', and the Hub does not give it at revision 'main': We couldn't connect"
    with pytest.raises(OSError, match=message) as error:
        load_translator("runs/none")
    assert "\n" not in str(error.value)


def commands(models, output, task):
    """The options of every command that loads a model, and what it would write."""
    test = ["--test_file", task["test"], *LANGUAGES]
    training = [*task_options(task), *LANGUAGES, "--max_tokens", 512, "--max_steps", 1, "--output_dir", output]
    student = ["--d_model", 16, "--encoder_attention_heads", 2, "--decoder_attention_heads", 2, "--max_steps", 1]
    lines = output.with_suffix(".txt")
    lines.write_text("a b c\n")
    export = [models, "--output_dir", output, "--verify", "a b"]
    backwards = ["--source_lang", "bw", "--target_lang", "fw"]
    return {
        "translate": ["--model_name_or_path", models, "--input_file", lines, "--output_file", output],
        "evaluate": ["--systems", models, *test, "--output_file", output],
        "depth_sweep": ["--model_name_or_path", models, *test, "--output_file", output],
        "attention": [models, "--text", "a b c", "--output_dir", output],
        "collapse": ["--model_name_or_path", models, "--output_dir", output],
        "trim": [
            "--model_name_or_path",
            models,
            "--output_dir",
            output,
            "--vocabulary_files",
            task["test"],
            *LANGUAGES,
        ],
        "train": ["--model_name_or_path", models, *training],
        "distill": ["--teachers", models, *training, *student],
        "synthesize": ["--teachers", models, "--monolingual_file", lines, *backwards, "--output_dir", output],
        "publish": [models, "--repo", "org/name", "--output_dir", output],
        **{f"export-{engine}": [*export, "--to", engine] for engine in ("ctranslate2", "onnx", "marian")},
        "export-transformers": [*export, "--to", "transformers"],
    }


def test_every_command_refuses_a_checkpoint_that_lacks_tensors_before_it_writes(damaged, task, tmp_path):
    folder = damaged(lacking)
    output = tmp_path / "output"
    for command, options in commands(folder, output, task).items():
        with pytest.raises(ValueError, match=rf"the weights of {folder} lack model\.decoder"):
            script(command.split("-")[0])(*options)
        assert not output.is_file(), command
        assert not output.exists() or not list(output.iterdir()), command


def test_other_depths_and_options_load_what_is_stored(models):
    for name, options in {
        "rs": {"decoder_layers": 7},
        "steps": {"decoder_layers": 1, "encoder_layers": 1},
        "marian": {"decoder_layers": 2},
    }.items():
        model, _ = load_translator(str(models / name), **options)
        assert model.config.decoder_layers == options["decoder_layers"]
    # Embeddings of steps that nobody trained are zero, and change nothing.
    model, _ = load_translator(str(models / "rs"), step_embeddings=True)
    assert not model.model.decoder.step_embeddings[0].weight.any()
    for name in ("steps", "marian"):
        with pytest.raises(ValueError, match=r"lack model\.decoder"):
            load_translator(str(models / name), decoder_layers=9)


def test_embeddings_of_stored_steps_are_not_left_at_zero(damaged):
    with pytest.raises(ValueError, match=r"lack model\.decoder\.step_embeddings\.1\.weight"):
        load_translator(str(damaged(lambda tensors: tensors.pop("model.decoder.step_embeddings.1.weight"), "steps")))


def test_shards_and_pickles_that_were_asked_for_are_read(models, tmp_path):
    model, tokenizer = load_translator(str(models / "marian"))
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "shards"):
        tokenizer.save_pretrained(folder)
    for folder, options in ((tmp_path / "shards", {}), (tmp_path, {"allow_pickle": True})):
        loaded, _ = load_parent(str(folder), **options)
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_pickle_that_runs_code_does_not(models, tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    folder = shutil.copytree(models / "rs", tmp_path / "rs")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({BIAS: Code()}))
    for options, message in (
        ({}, "no safetensors weights"),
        ({"allow_pickle": True}, "missing, truncated or damaged"),
    ):
        with pytest.raises(ValueError, match=message):
            load_parent(str(folder), **options)
    assert not (tmp_path / "written").exists()


def test_an_output_projection_of_its_own_is_kept_by_stock_marian_too(models, tmp_path):
    model, tokenizer = load_translator(str(models / "marian"))
    own = with_own_weights(model)
    own.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_checkpoint(str(tmp_path))
    loaded.tie_weights()  # as after a resume
    assert torch.equal(loaded.lm_head.weight, own.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.shared.weight)


def test_entries_that_fill_up_to_a_multiple_are_never_translated_to(models, tmp_path):
    model, tokenizer = load_translator(str(models / "rs"))
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    model.final_logits_bias[:, 40] = 1e3  # would be the only thing that it says
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    loaded, _ = load_translator(str(tmp_path))
    inputs = tokenizer("a b c", return_tensors="pt")
    assert loaded.generate(**inputs, max_new_tokens=5).max() < len(tokenizer)


# Any sequence-to-sequence model


SIZES = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "encoder_layers": 1, "decoder_layers": 1}
SIZES |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}


def t5(special):
    sizes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, **special))


@pytest.mark.parametrize(
    "make",
    [
        t5,
        lambda special: BartForConditionalGeneration(BartConfig(**SIZES, **special, bos_token_id=0)),
        lambda special: M2M100ForConditionalGeneration(M2M100Config(**SIZES, **special, bos_token_id=0)),
    ],
    ids=["t5", "bart", "m2m100"],
)
def test_models_of_other_kinds_are_loaded_and_trained_on(tokenizer, task, tmp_path, make):
    special = {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
    for part in (make({"vocab_size": len(tokenizer), "eos_token_id": 0, **special}), tokenizer):
        part.save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    model, _ = load_translator(name)
    assert type(build_model(ModelArguments(model_name_or_path=name), tokenizer)) is type(model)
    options = [*task_options(task), *LANGUAGES, "--max_train_samples", 20, "--max_steps", 1, "--max_tokens", 512]
    options += ["--report_to", "none", "--save_strategy", "no", "--num_beams", 1, "--max_new_tokens", 4]
    script("train")("--model_name_or_path", name, *options, "--output_dir", tmp_path / "run")
    assert (tmp_path / "run" / "results.json").is_file()


def test_what_is_no_sequence_to_sequence_model_is_called_that(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertForMaskedLM(BertConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a bert model, no sequence-to-sequence model"):
        load_translator(str(tmp_path))


@pytest.mark.parametrize("vocabulary", ["joint", "separate"])
def test_a_new_model_has_an_embedding_for_each_token_that_was_added(tmp_path, vocabulary):
    names = {"source_lang": "aa", "target_lang": "zz", "vocab_size": 17 if vocabulary == "joint" else 11}
    sides = [["a b c d e f"] * 4, ["u v w x y z"] * 4]
    tokenizer = train_tokenizer(*sides, tmp_path, vocabulary=vocabulary, **names)
    tokenizer.add_tokens([">>eng<<", "<term>"])
    arguments = ModelArguments(d_model=8, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=8)
    model = build_model(arguments, tokenizer)
    data = tokenizer([">>eng<< a <term> b"], text_target=["<term> z"], return_tensors="pt")
    assert data["input_ids"].max() == model.get_input_embeddings().weight.shape[0] - 1
    assert data["labels"].max() == model.lm_head.weight.shape[0] - 1
    assert model(**data).loss.isfinite()
