"""The scripts from end to end, as a user starts them, on the reverse task."""

import json
import logging
import random
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
import yaml
from conftest import RECIPE, ROOT, script, task_options
from forked import fork
from oracle import unrolled_marian
from reverse_task import reverse_pairs, write_jsonl
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from rs_transformer import RSMarianForConditionalGeneration, with_depth
from rs_transformer.checkpoints import load_translator
from rs_transformer.commands import translate as translate_command
from rs_transformer.commands.depth_sweep import DepthSweepArguments
from rs_transformer.commands.distill import DistillArguments
from rs_transformer.commands.train import keep_lineage
from rs_transformer.corpus import CorpusArguments, load_split
from rs_transformer.decoding import DecodingArguments, timed_translate, translate
from rs_transformer.distillation.losses import DistillationLossArguments
from rs_transformer.distillation.targets import TargetArguments
from rs_transformer.distillation.teachers import TeacherArguments
from rs_transformer.tokenization import TokenizerArguments
from rs_transformer.training.arguments import TranslationTrainingArguments
from rs_transformer.training.model import ModelArguments
from rs_transformer.utils.files import claimed
from rs_transformer.utils.recipes import RecipeParser

LANGUAGES = ["--source_lang", "fw", "--target_lang", "bw"]


@pytest.fixture(scope="module")
def test_pairs(task):
    rows = load_split(CorpusArguments("fw", "bw", test_file=[str(task["test"])]), "test")
    return rows["source"][:], rows["target"][:]


def exact(translations, references) -> float:
    return sum(t == r for t, r in zip(translations, references, strict=True)) / len(references)


def test_train_learns_the_task_and_leaves_a_folder_that_says_how(trained, test_pairs):
    translations = (trained / "test_translations.txt").read_text().splitlines()
    assert exact(translations, test_pairs[1]) > 0.9
    results = json.loads((trained / "results.json").read_text())
    assert results["test"]["bleu"] > 90
    assert "version:" in results["test"]["bleu_signature"]
    assert results["validation"]["sentences"] == 100
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text())
    assert (recipe["d_model"], recipe["average_checkpoints"], recipe["seed"]) == (64, 2, 3)
    assert "transformers" in json.loads((trained / "run.json").read_text())["versions"]
    assert list((trained / "runs").rglob("events.out.tfevents*"))
    printed = (trained / "printed.txt").read_text()
    assert "Training pairs: 4000 of 4000 kept" in printed
    assert "85,504 parameters stored, 169,216 if no step shared; encoder steps apply layers 0 0" in printed
    assert f"Updates: {results['training']['updates']} of at most 512 tokens" in printed
    assert "Averaging checkpoint-" in printed
    assert printed.count("[test] source") == 5


def test_the_screen_of_a_run_is_short_and_ends_with_scores_and_the_next_command(trained):
    lines = (trained / "stdout.txt").read_text().splitlines()
    updates = [line for line in lines if line.startswith("update ")]
    assert "  loss " in updates[0]
    assert any("validation: loss" in line and "  BLEU " in line for line in updates)
    assert len(lines) - len(updates) < 40
    last = lines[-7:]
    scores = json.loads((trained / "results.json").read_text())["test"]
    assert last[2].startswith(f"test: BLEU {scores['bleu']:.2f}  chrF {scores['chrf']:.2f}")
    assert last[3].strip() == scores["bleu_signature"]
    assert last[-1].strip().startswith(f"rs-transformer translate --model_name_or_path {trained}")
    log = (trained / "run.log").read_text()
    assert "Running training" in log
    printed = (trained / "printed.txt").read_text()
    for noise in ("Running training", "INFO", "config.json", "Instantaneous batch size", "early stopping required"):
        assert noise not in printed
    for misleading in ("Instantaneous batch size", "early stopping required", "missing keys"):
        assert misleading not in log


def test_trained_folder_loads_with_the_auto_classes(trained):
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert type(model) is RSMarianForConditionalGeneration
    assert model.config.decoder_layer_map == [0, 0]
    assert model.config.use_cache
    output = model.generate(**tokenizer("a b c d", return_tensors="pt"))
    assert tokenizer.decode(output[0], skip_special_tokens=True) == "d c b a"


def test_recorded_recipe_runs_again_to_the_same_scores(task, tmp_path):
    script("train")(RECIPE, *task_options(task), "--num_train_epochs", 1, "--output_dir", tmp_path / "first")
    script("train")(tmp_path / "first" / "recipe.yaml", "--output_dir", tmp_path / "second", "--report_to", "none")
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("first", "second"))
    for split in ("validation", "test"):
        assert second[split] == first[split]


@pytest.mark.parametrize("processes", [1, 2])
def test_translate_writes_a_translation_for_each_line_in_order(trained, test_pairs, tmp_path, processes):
    sources, references = test_pairs
    (tmp_path / "in.txt").write_text("".join(f"{source}\n" for source in sources))
    output = tmp_path / "out.txt"
    options = ["--input_file", tmp_path / "in.txt", "--output_file", output, "--chunk_size", 30, "--num_beams", 2]
    done = fork("training/translate.py", "--model_name_or_path", trained, *options, processes=processes)
    assert exact(output.read_text().splitlines(), references) > 0.9
    assert done.stdout.count("sentences per second") == 1
    assert not output.with_name("out.txt.partial").exists()


def test_evaluate_scores_models_and_files_and_compares_them(trained, task, test_pairs, tmp_path, capsys):
    generator = random.Random(0)
    worse = [" ".join(generator.sample(line.split(), len(line.split()))) for line in test_pairs[1]]
    (tmp_path / "worse.txt").write_text("".join(f"{line}\n" for line in worse))
    options = ["--test_file", task["test"], "--max_new_tokens", 16, "--num_beams", 1, *LANGUAGES]
    systems = ["--systems", trained, tmp_path / "worse.txt"]
    script("evaluate")(*systems, *options, "--output_file", tmp_path / "scores.json")
    model, file = json.loads((tmp_path / "scores.json").read_text())
    # The same figures as training reported: one way of decoding and of scoring.
    assert model["bleu"] == json.loads((trained / "results.json").read_text())["test"]["bleu"]
    assert model["parameters"] == 85504
    assert file["bleu"] < model["bleu"]
    assert file["bootstrap"]["bleu_p"] < 0.05
    assert model["bleu_signature"].startswith("nrefs:1|case:mixed")
    assert "sentences/s" in capsys.readouterr().out


def test_training_continues_from_a_checkpoint_of_another_depth(trained, task, tmp_path):
    options = [
        "--model_name_or_path",
        trained,
        "--decoder_layers",
        1,
        "--num_train_epochs",
        1,
        "--eval_strategy",
        "no",
    ]
    script("train")(RECIPE, *task_options(task), "--output_dir", tmp_path, *options)
    assert json.loads((tmp_path / "config.json").read_text())["decoder_layers"] == 1
    assert json.loads((tmp_path / "results.json").read_text())["test"]["bleu"] > 50


def test_output_that_does_not_end_stops_where_the_positions_do(trained):
    model, tokenizer = load_translator(str(trained))
    model.final_logits_bias[:, tokenizer.eos_token_id] = -1e4
    model.generation_config.forced_eos_token_id = None
    (translation,) = translate(model, tokenizer, ["a b c"], DecodingArguments(num_beams=2, max_new_tokens=500))
    assert len(tokenizer(text_target=translation)["input_ids"]) == model.config.max_position_embeddings


def test_fine_tuning_stock_marian_keeps_its_start_embedding_at_zero(trained, task, tmp_path):
    marian = unrolled_marian(AutoModelForSeq2SeqLM.from_pretrained(trained))
    marian.final_logits_bias.zero_()  # as in OPUS-MT's checkpoints
    marian.save_pretrained(tmp_path / "marian")
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "marian")
    recipe = tmp_path / "recipe.yaml"
    fields = ("d_model", "encoder_", "decoder_", "init_std", "max_position")
    recipe.write_text("".join(f"{line}\n" for line in RECIPE.read_text().splitlines() if not line.startswith(fields)))
    options = ["--model_name_or_path", tmp_path / "marian", "--output_dir", tmp_path / "run", "--num_train_epochs", 1]
    script("train")(recipe, *task_options(task), *options)
    tuned = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    assert type(tuned).__name__ == "MarianMTModel"
    assert not tuned.model.shared.weight[tuned.config.pad_token_id].any()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["test"]["bleu"] > 50


def test_a_sentence_longer_than_the_model_takes_is_cut_with_a_warning(trained, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("rs_transformer"), "propagate", True)
    translations = translate(*load_translator(str(trained)), ["l k " + "a b " * 40, "a b c"])
    assert translations[1] == "c b a"
    assert "A sentence of 83 tokens is cut to the 32 that the model takes: 'l k a b" in caplog.text


def test_a_new_run_in_a_folder_where_one_failed_trains_its_own_tokenizer(task, tmp_path):
    options = [RECIPE, *task_options(task), "--output_dir", tmp_path]
    with pytest.raises(ValueError, match="max_tokens=4"):
        script("train")(*options, "--max_tokens", 4)
    first = (tmp_path / "vocab.json").read_text()
    with pytest.raises(ValueError, match="max_tokens=4"):
        script("train")(*options, "--max_tokens", 4, "--vocab_size", 27)
    assert (tmp_path / "vocab.json").read_text() != first


@pytest.mark.parametrize("recipe", sorted((ROOT / "training" / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_hold_options_that_there_are(recipe):
    groups = (ModelArguments, CorpusArguments, TokenizerArguments, DecodingArguments, TranslationTrainingArguments)
    if "teachers:" in recipe.read_text():
        groups = (DistillArguments, TeacherArguments, TargetArguments, DistillationLossArguments, *groups)
    *_, training = RecipeParser(groups).parse_recipe([str(recipe)])
    assert training.output_dir == f"runs/{recipe.stem}"


def test_list_options_of_a_recipe_have_the_type_of_the_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: x\nencoder_depths: 6\ndecoder_depths: 6 3 1\nfinetuned: [a, b]\n")
    (args,) = RecipeParser([DepthSweepArguments]).parse_recipe([str(recipe)])
    assert (args.encoder_depths, args.decoder_depths, args.finetuned) == ([6], [6, 3, 1], ["a", "b"])


# What goes wrong


def test_unknown_options_are_refused_with_the_nearest_known_one(tmp_path, capsys):
    with pytest.raises(SystemExit):
        script("train")(RECIPE, "--output_dir", tmp_path, "--d_modle", 8)
    assert "unknown option '--d_modle' in the command line; did you mean d_model" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.read_text() + "\nlerning_rate: 1\n")
    with pytest.raises(SystemExit):
        script("train")(recipe, "--output_dir", tmp_path)
    assert f"unknown option 'lerning_rate' in {recipe}; did you mean learning_rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_file", "nowhere.jsonl"], "train_file: there is no file 'nowhere.jsonl'"),
        (["--target_lang", "xx"], "has no language 'xx'; its languages: fw, bw"),
        (["--source_lang", "bw", "--target_lang", "bw"], "source_lang and target_lang are both 'bw'"),
        (["--source_column", "a", "--target_column", "b"], "has no column 'a'; its columns: translation"),
        (["--decoder_layers", "0"], "decoder_layers must be at least 1, got 0"),
        (["--vocab_size", "900"], "too small for vocab_size=900: it allows at most"),
        (["--max_tokens", "4"], "max_tokens=4 is less than the longest training pair"),
        (["--streaming", "true"], "streaming needs max_steps"),
        (["--streaming", "true", "--max_steps", "9"], "streaming takes per_device_train_batch_size, not max_tokens"),
        (
            ["--streaming", "true", "--max_steps", "9", "--train_sampling_strategy", "group_by_length"],
            "train_sampling_strategy: group_by_length needs the lengths of all pairs",
        ),
        (["--average_checkpoints", "9"], "average_checkpoints=9 needs save_total_limit of at least 9"),
        (["--average_checkpoints", "2", "--save_strategy", "no"], "leaves nothing to average"),
        (["--early_stopping_patience", "2"], "early_stopping_patience needs load_best_model_at_end"),
        (["--max_source_length", "1"], "no training pair is left of 4000"),
        (["--num_beams", "0"], "num_beams must be at least 1, got 0"),
        (["--growing_depths", "1"], "growing_depths and growing_updates go together"),
        (["--elastic_decoder_layers", "3"], "decoder_layers (2), got 3"),
        (["--encoder_layer_sharing", "cycle", "--encoder_unique_layers", "3"], "encoder_layers (2), got 3"),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) else "",
)
def test_bad_input_is_named_before_the_training_starts(task, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        script("train")(RECIPE, *task_options(task), "--output_dir", tmp_path / "run", *options)
    assert not list((tmp_path).glob("run/checkpoint-*"))
    if "--decoder_layers" in options:
        assert not list((tmp_path).glob("run/*.spm"))


def test_a_finished_run_is_not_overwritten(trained, task):
    with pytest.raises(ValueError, match="holds a run already"):
        script("train")(RECIPE, *task_options(task), "--output_dir", trained)


@pytest.mark.parametrize("going_on", [[], ["--resume_from_checkpoint", "true"]], ids=["new", "resumed"])
def test_nor_is_one_without_checkpoints_that_it_could_go_on_from(task, tmp_path, going_on):
    (tmp_path / "results.json").write_text('{"test": {}}')
    with pytest.raises(ValueError, match="a run that has finished, and no checkpoint to go on from"):
        script("train")(RECIPE, *task_options(task), "--output_dir", tmp_path, *going_on)


def test_nor_is_a_model_that_something_else_has_made(task, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a model that no training has made"):
        script("train")(RECIPE, *task_options(task), "--output_dir", tmp_path)


def test_a_run_says_of_its_parents_what_these_say_and_not_what_lay_there(tmp_path):
    run, parent = tmp_path / "run", tmp_path / "parent"
    for folder, name in ((run, "collapse.json"), (run, "trim.json"), (parent, "trim.json")):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(folder.name))
    keep_lineage(str(parent), str(run))
    assert [(file.name, json.loads(file.read_text())) for file in run.iterdir()] == [("trim.json", "parent")]
    keep_lineage(None, str(run))
    assert not list(run.iterdir())


def test_a_run_that_goes_on_in_another_folder_says_of_its_parents_what_it_said(task, tmp_path):
    options = [RECIPE, *task_options(task), "--save_strategy", "steps", "--save_steps", 1, "--eval_strategy", "no"]
    options += ["--load_best_model_at_end", "false", "--average_checkpoints", 0]
    script("train")(*options, "--max_steps", 1, "--output_dir", tmp_path / "run")
    (tmp_path / "run" / "collapse.json").write_text("{}")
    going_on = ["--resume_from_checkpoint", tmp_path / "run" / "checkpoint-1", "--output_dir", tmp_path / "on"]
    script("train")(*options, "--max_steps", 2, *going_on)
    assert (tmp_path / "on" / "collapse.json").is_file()


def test_a_depth_is_asked_of_a_stacked_model_alone(trained, task, tmp_path):
    model, tokenizer = load_translator(str(trained))
    stock = tmp_path / "stock"
    for part in (unrolled_marian(model), tokenizer):
        part.save_pretrained(stock)
    options = ["--model_name_or_path", stock, "--input_file", task["test"], "--output_file", tmp_path / "out"]
    with pytest.raises(ValueError, match="is a marian model, whose depth is fixed: leave decoder_layers out"):
        script("translate")(*options, "--source_column", "translation.bw", "--decoder_layers", 1)
    with pytest.raises(ValueError, match="are of recurrently stacked models: no system is one"):
        script("evaluate")("--systems", stock, "--test_file", task["test"], *LANGUAGES, "--decoder_layers", 1)


def test_all_systems_are_looked_at_before_the_first_is_translated(trained, task, tmp_path, monkeypatch):
    monkeypatch.setattr("rs_transformer.commands.evaluate.timed_translate", None)
    options = ["--test_file", task["test"], *LANGUAGES]
    with pytest.raises(FileNotFoundError, match=r"there is no model folder '.*tpyo'"):
        script("evaluate")("--systems", trained, tmp_path / "tpyo", *options)


@pytest.mark.parametrize("going_on", [[], ["--resume_from_checkpoint", "true"]], ids=["new", "resumed"])
def test_a_model_is_not_trained_in_its_own_folder(task, tmp_path, going_on):
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "trim.json").write_text("{}")
    (tmp_path / "link").symlink_to("parent")
    folders = ["--model_name_or_path", tmp_path / "parent", "--output_dir", tmp_path / "link"]
    with pytest.raises(ValueError, match="link holds the model that the training begins with"):
        script("train")(RECIPE, *task_options(task), *folders, *going_on)
    assert [file.name for file in (tmp_path / "parent").iterdir()] == ["trim.json"]


def test_evaluate_and_train_refuse_a_model_of_the_opposite_direction(trained, task, tmp_path):
    turned = ["--source_lang", "bw", "--target_lang", "fw"]
    with pytest.raises(ValueError, match="the model translates from fw to bw, not from bw to fw"):
        script("evaluate")("--systems", trained, "--test_file", task["test"], *turned)
    options = ["--model_name_or_path", trained, "--output_dir", tmp_path, *turned]
    with pytest.raises(ValueError, match="the model translates from fw to bw, not from bw to fw"):
        script("train")(RECIPE, *task_options(task), *options)


def test_a_folder_without_a_model_is_called_that(task, tmp_path):
    with pytest.raises(ValueError, match=r"is a folder without config\.json: no training has finished there"):
        script("evaluate")("--systems", tmp_path, "--test_file", task["test"], *LANGUAGES)


def test_evaluate_refuses_a_file_of_another_length_before_it_decodes(task, tmp_path):
    (tmp_path / "short.txt").write_text("a b c\n")
    systems = ["--systems", "no-such-model", tmp_path / "short.txt"]
    with pytest.raises(ValueError, match=r"short.txt has 1 lines, the test split 100 references"):
        script("evaluate")(*systems, "--test_file", task["test"], *LANGUAGES)


@pytest.mark.parametrize("command", ["evaluate", "depth_sweep"])
@pytest.mark.parametrize("given", ["file", "folder"])
def test_figures_do_not_replace_the_corpus(task, tmp_path, command, given):
    corpus = tmp_path / "data" / "test.jsonl"
    corpus.parent.mkdir()
    shutil.copyfile(task["test"], corpus)
    data = ["--test_file", corpus] if given == "file" else ["--dataset_name", corpus.parent]
    model = ["--systems" if command == "evaluate" else "--model_name_or_path", "no-such-model"]
    with pytest.raises(ValueError, match="would replace what it is made from"):
        script(command)(*model, *data, *LANGUAGES, "--output_file", corpus)
    assert corpus.read_bytes() == task["test"].read_bytes()


def test_truncated_checkpoint_is_named(trained, tmp_path, task):
    folder = tmp_path / "model"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=re.escape(f"the weights of {folder} are truncated or damaged")):
        script("evaluate")("--systems", folder, "--test_file", task["test"], *LANGUAGES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input_file", "nowhere.txt", "--output_file", "out.txt"], "input_file: there is no file 'nowhere.txt'"),
        (
            ["--input_file", RECIPE, "--output_file", "no/folder/out.txt"],
            "output_file: there is no folder 'no/folder'",
        ),
    ],
    ids=["input", "output"],
)
def test_translate_checks_its_files_before_it_loads_the_model(options, message):
    with pytest.raises(FileNotFoundError, match=message):
        script("translate")("--model_name_or_path", "no-such-model", *options)


def test_translate_keeps_what_is_done_when_it_is_stopped(trained, test_pairs, tmp_path, monkeypatch):
    sources, references = test_pairs
    (tmp_path / "in.txt").write_text("".join(f"{source}\n" for source in sources))
    calls = []

    def full_disk(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise OSError("No space left on device")
        return timed_translate(*args, **kwargs)

    monkeypatch.setattr(translate_command, "timed_translate", full_disk)
    options = ["--input_file", tmp_path / "in.txt", "--output_file", tmp_path / "out.txt", "--chunk_size", 20]
    with pytest.raises(OSError, match="No space left"):
        script("translate")("--model_name_or_path", trained, *options)
    assert not (tmp_path / "out.txt").exists()
    assert exact((tmp_path / "out.txt.partial").read_text().splitlines(), references[:40]) > 0.9
    with open(tmp_path / "out.txt.partial", "a") as file:
        file.write("cut sh")  # what a kill within a chunk leaves
    done = []
    monkeypatch.setattr(
        translate_command, "timed_translate", lambda *args: done.extend(args[2]) or timed_translate(*args)
    )
    script("translate")("--model_name_or_path", trained, *options)
    assert done == sources[40:]
    assert exact((tmp_path / "out.txt").read_text().splitlines(), references) > 0.9
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.txt", "out.txt"]
    with pytest.raises(FileExistsError, match="is there already; overwrite=true replaces it"):
        script("translate")("--model_name_or_path", trained, *options)


def test_translate_refuses_to_replace_its_input_and_a_chunk_of_nothing(trained, tmp_path):
    (tmp_path / "in.txt").write_text("a b c\n")
    options = ["--model_name_or_path", trained, "--input_file", tmp_path / "in.txt"]
    with pytest.raises(ValueError, match="would replace what it is made from"):
        script("translate")(*options, "--output_file", tmp_path / "in.txt", "--overwrite", "true")
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got -1"):
        script("translate")(*options, "--output_file", tmp_path / "out.txt", "--chunk_size", -1)


def test_translate_keeps_blank_lines_blank_and_takes_a_depth(trained, tmp_path):
    lines = ["a b c", "", "  ", "\u200b", "\u3000", "d e f"]
    (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in lines))
    options = ["--model_name_or_path", trained, "--input_file", tmp_path / "in.txt", "--output_file"]
    script("translate")(*options, tmp_path / "own.txt")
    assert (tmp_path / "own.txt").read_text() == "c b a\n\n\n\n\nf e d\n"
    script("translate")(*options, tmp_path / "one.txt", "--decoder_layers", 1)
    shallow = with_depth(load_translator(str(trained))[0], decoder_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    expected = translate(shallow, tokenizer, lines, progress=False)
    assert (tmp_path / "one.txt").read_text().splitlines() == expected


def test_two_commands_do_not_write_one_output(tmp_path):
    output = tmp_path / "out"
    code = (
        "import sys; from rs_transformer.utils.files import claimed\n"
        "with claimed(sys.argv[1]): print(flush=True), input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", code, output], **pipes)
    try:
        assert other.stdout.readline() == b"\n"
        with pytest.raises(ValueError, match=f"another process is writing {output}"), claimed(output):
            pass
    finally:
        other.kill()
        other.wait()
    with claimed(output), claimed(output):  # a kill leaves nothing that holds
        pass
    assert not list(tmp_path.iterdir())


def test_a_run_of_the_layout_before_this_one_goes_on_and_its_checkpoint_loads(tmp_path):
    """Made by version 0.1's first layout, killed after update 6; update 12 had a test loss of 3.374 there."""
    with tarfile.open(ROOT / "tests" / "data" / "run_of_the_old_layout.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "run_of_the_old_layout"
    model, tokenizer = load_translator(str(folder / "checkpoint-6"))
    assert translate(model, tokenizer, ["a b c"], DecodingArguments(max_new_tokens=9), progress=False)
    pairs = reverse_pairs(4200, seed=0)  # those that it was trained on, as `write_task` deals them out
    files = {"train": write_jsonl(tmp_path / "train.jsonl", pairs[200:400])}
    files["test"] = write_jsonl(tmp_path / "test.jsonl", pairs[100:110])
    script("train")(
        folder / "recipe.yaml", *task_options(files), "--output_dir", folder, "--resume_from_checkpoint", "true"
    )
    results = json.loads((folder / "results.json").read_text())
    assert results["training"]["updates"] == 12
    assert results["test"]["loss"] == pytest.approx(3.3744, abs=1e-3)
