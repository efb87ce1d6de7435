"""`training/compress.py`: from a parent to a folder that ships, goals, kills, and what is refused at the start."""

import json
import re
import shutil
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import ctranslate2  # noqa: F401  the engine of the exports
import pytest
import torch
from conftest import COMMIT, script, write_hub_cache
from datasets import Dataset
from killing import kill
from oracle import marian, rs_model
from reverse_task import reverse_pairs, write_jsonl
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from rs_transformer import expand
from rs_transformer.checkpoints import load_parent
from rs_transformer.commands.compress import Compression, found_plan, new_plan
from rs_transformer.compress.arguments import CompressOptions
from rs_transformer.compress.material import hold_out, load_material
from rs_transformer.compress.plan import Plan, Planner, make_plan
from rs_transformer.compress.sizes import largest_vocabulary, sizes_of, with_vocabulary
from rs_transformer.corpus import CorpusArguments, load_evaluation_splits, load_split, prepare_training_pairs
from rs_transformer.decoding import DecodingArguments, translate
from rs_transformer.distillation.resegmentation import Resegmentation
from rs_transformer.training.arguments import TranslationTrainingArguments
from rs_transformer.training.run_folder import weights_digest
from rs_transformer.utils.processes import PatientGroup
from rs_transformer.utils.recipes import RecipeParser
from rs_transformer.vocabulary import embedding_rows

compress = script("compress")
LENGTHS = ["--max_source_length", 16, "--max_target_length", 16, "--max_new_tokens", 16, "--num_beams", 1]
# The letters are the least vocabulary; some pieces of two go.
OPTIONS = ["--max_vocabulary", 25, "--word_weight", 0.5, "--decoder_layers", 1, "--updates", 12, "--max_tokens", 256]
OPTIONS += ["--calibration_updates", 4, "--bf16", "true"]
OPTIONS += ["--teacher_num_beams", 1, *LENGTHS]


@pytest.fixture(scope="module")
def parent(trained, made_once) -> Path:
    """A stock Marian of two layers a side that has learned the task."""

    def write(folder: Path) -> None:
        model, tokenizer = load_parent(str(trained))
        for part in (expand(model), tokenizer):
            part.save_pretrained(folder)

    return made_once("stock", write)


@pytest.fixture(scope="module")
def text(made_once) -> dict[str, Path]:
    """Few training pairs, some text of the source language, and a test set."""

    def write(folder: Path) -> None:
        pairs = reverse_pairs(360, seed=5)
        write_jsonl(folder / "train.jsonl", [*pairs[:300], ("", "a b")])  # a pair without a source is left out
        write_jsonl(folder / "test.jsonl", pairs[300:320])
        (folder / "mono.txt").write_text("".join(f"{source}\n" for source, _ in pairs[320:]))

    folder = made_once("compress_text", write)
    return {"train_file": folder / "train.jsonl", "test_file": folder / "test.jsonl", "mono": folder / "mono.txt"}


def command(parent, text, output, *more, options=OPTIONS) -> list[object]:
    """The options of a compression of pairs and monolingual text."""
    files = ["--train_file", text["train_file"], "--test_file", text["test_file"], "--monolingual_file", text["mono"]]
    return [parent, "--output_dir", output, *files, *options, *more]


@pytest.fixture(scope="module")
def compressed(parent, text, made_once) -> Path:
    return made_once("compressed", lambda folder: compress(*command(parent, text, folder / "out"))) / "out"


def test_a_parent_becomes_a_folder_that_ships(compressed, parent, text, capsys):
    plan = json.loads((compressed / "compress.json").read_text())
    assert plan["vocabulary"]["child"]["source"] <= 25 < plan["vocabulary"]["parent"]["source"]
    assert plan["training"]["updates"] == {"collapsed": 4, "distilled": 12}
    model = AutoModelForSeq2SeqLM.from_pretrained(compressed / "model")
    tokenizer = AutoTokenizer.from_pretrained(compressed / "model")
    assert (model.config.decoder_layers, model.config.decoder_unique_layers) == (1, 1)
    assert model.config.vocab_size == plan["vocabulary"]["child"]["source"]
    assert model.num_parameters(only_trainable=True) == plan["child"]["parameters"]
    assert translate(model, tokenizer, ["a b c"], DecodingArguments(num_beams=1, max_new_tokens=8))
    card = (compressed / "model" / "README.md").read_text()
    assert f"a collapse of `{parent}`, method calibrated, whose vocabulary was trimmed to 25 entries" in card
    assert "CTranslate2" in card
    report = json.loads((compressed / "report" / "report.json").read_text())
    assert [row["engine"] for row in report["engines"]] == ["ctranslate2"]
    assert report["references"]
    exported = json.loads((compressed / "export/ctranslate2/export.json").read_text())
    assert exported["arguments"]["quantization"] == "int8"
    assert exported["shortlist"]["pairs"] == 340  # the parent's translations among them
    file = compressed / "export/ctranslate2/model.bin"
    assert file.stat().st_size == pytest.approx(plan["child"]["int8"], rel=0.02)
    # Again: nothing is done.
    before = {each: each.stat().st_mtime_ns for each in compressed.rglob("*") if each.is_file()}
    compress(*command(parent, text, compressed))
    assert capsys.readouterr().out.count("done already") == 8
    assert before == {each: each.stat().st_mtime_ns for each in compressed.rglob("*") if each.is_file()}


def test_the_teacher_is_the_parent_with_a_smaller_vocabulary(compressed, parent):
    decoding = DecodingArguments(num_beams=1, max_new_tokens=16)
    both = [load_parent(str(folder)) for folder in (parent, compressed / "trimmed")]
    whole, trimmed = (tokenizer for _, tokenizer in both)
    sources = [source for source, _ in reverse_pairs(60, seed=9)]
    same = [source for source in sources if whole.tokenize(source) == trimmed.tokenize(source)]
    translations = [translate(*model, same, decoding) for model in both]
    kept = [pair for pair in zip(*translations, strict=True) if whole.tokenize(pair[0]) == trimmed.tokenize(pair[0])]
    assert len(kept) > 5
    assert all(ours == theirs for ours, theirs in kept)


def test_the_child_learns_from_the_whole_parent_in_the_parents_own_pieces(compressed, parent, text):
    parser = RecipeParser(CompressOptions.types(), positional="model_name_or_path")
    options = CompressOptions(*parser.parse_recipe([str(part) for part in command(parent, text, compressed)]))
    plan = Plan.from_json(json.loads((compressed / "compress.json").read_text()))
    corpus = Compression(options, plan, PatientGroup()).corpus()
    own = AutoTokenizer.from_pretrained(compressed / "trimmed")
    pairs = prepare_training_pairs(load_split(corpus, "train"), own, corpus)
    model, whole = load_parent(str(parent))
    kept = Dataset.from_parquet(str(compressed / "distributions/teacher_top_k.parquet"))
    assert len(kept) == len(pairs)
    resegmentation, shorter = Resegmentation(own, whole), 0
    for row in range(0, 60, 3):
        source = resegmentation.teacher_ids(pairs[row]["input_ids"], "source")
        target = resegmentation.teacher_ids(pairs[row]["labels"], "target")
        shorter += len(target) < len(pairs[row]["labels"])
        with torch.inference_mode():
            logits = model.eval()(input_ids=torch.tensor([source]), labels=torch.tensor([target])).logits
        log_probs = resegmentation.log_probs(logits[0].log_softmax(-1), pairs[row]["labels"], target)
        found = torch.tensor(kept[row]["teacher_log_probs"]).reshape(len(pairs[row]["labels"]), -1)
        wanted = log_probs.topk(found.shape[1]).values
        torch.testing.assert_close(found.exp(), wanted.exp(), atol=2e-3, rtol=0)
    assert shorter > 5


def test_killed_amid_a_checkpoint_and_started_again_it_is_the_same_model(compressed, parent, text, tmp_path):
    options = command(parent, text, tmp_path / "out", "--report", "false")
    kill("training/compress.py", *options, at="torch.save", call=10, moment="amid")
    compress(*options)
    assert weights_digest(tmp_path / "out/model") == weights_digest(compressed / "model")


def test_a_dry_run_shows_the_plan_and_writes_nothing(trained, text, tmp_path, capsys):
    compress(*command(trained, text, tmp_path / "out", "--dry_run"))  # a parent that is recurrently stacked itself
    printed = capsys.readouterr().out
    for expected in ("1 x 2 steps", "| distilled", "export/ctranslate2", "int8 MB"):
        assert expected in printed
    assert re.search(r"collapsed +\| +\| +0\.0 ", printed)  # which needs no calibration
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def plan_for(parent, text):
    """The plan for some options, made without writing anything."""
    parser = RecipeParser(CompressOptions.types(), positional="model_name_or_path")
    given = [parent, "--output_dir", "none", "--train_file", text["train_file"], "--bf16", "false", *LENGTHS]
    material = load_material(CompressOptions(*parser.parse_recipe([str(part) for part in given])))

    def plan(*options):
        options = parser.parse_recipe([str(part) for part in (*given, *options)])
        return make_plan(CompressOptions(*options), material, time.perf_counter())

    return plan


def test_a_size_chooses_the_vocabulary_or_the_stored_layers(plan_for):
    whole = plan_for()
    assert not whole.vocabulary["trim"]  # every piece is needed
    less = whole.child["int8"] - 200  # three entries of 72 bytes
    small = plan_for("--target_size", less / 1e6)
    assert small.vocabulary["child"]["source"] == whole.vocabulary["child"]["source"] - 3
    assert less - 72 < small.child["int8"] <= less
    large = plan_for("--target_size", 0.3, "--decoder_layers", 2)
    assert (large.child["encoder_unique_layers"], large.child["decoder_unique_layers"]) == (2, 2)
    assert large.child["int8"] <= 0.3e6


@pytest.mark.parametrize(
    ("stored", "depth", "chosen"),
    [({}, 3, (6, 3)), ({"encoder": 4}, 6, (4, 6)), ({"decoder": 2}, 3, (6, 2))],
    ids=["both", "decoder", "encoder"],
)
def test_a_size_chooses_the_stored_layers_of_a_side_that_nobody_has_chosen(stored, depth, chosen):
    """However the other one goes into its depth."""
    parent = marian(vocab_size=100, encoder_layers=6, decoder_layers=6)
    planner = object.__new__(Planner)
    planner.parent, planner.depths, planner.trim_options = parent, [depth], {}
    planner.stored = {"encoder": 1, "decoder": 1} | stored
    planner.kept = SimpleNamespace(ids=dict.fromkeys(embedding_rows(parent), range(100)))
    planner.material = SimpleNamespace(monolingual=[], train=[])
    shape = {f"{side}_unique_layers": stored.get(side) for side in planner.stored}
    shape |= dict.fromkeys(("max_vocabulary", "step_layer_norms", "step_biases"))
    planner.options = SimpleNamespace(shape=SimpleNamespace(**shape), goal=SimpleNamespace(target_size=50))
    planner._fit_size(50_000_000)
    assert tuple(planner.stored.values()) == chosen


@pytest.mark.parametrize(("bytes_left", "worth"), [(None, False), (0, False), (-1, True)])
def test_a_few_entries_are_worth_trimming_only_where_a_size_is_missed_with_them(bytes_left, worth):
    parent = marian(vocab_size=100)
    size = sizes_of(with_vocabulary(parent.config, 100, 100)).int8
    planner = object.__new__(Planner)
    planner.parent, planner.trim_options = parent, {"max_vocabulary": None}
    planner.kept = SimpleNamespace(ids=dict.fromkeys(embedding_rows(parent), range(97)))
    planner.config = lambda sizes: with_vocabulary(parent.config, *sizes.values())
    target = None if bytes_left is None else (size + bytes_left) / 1e6
    planner.options = SimpleNamespace(goal=SimpleNamespace(target_size=target))
    assert planner._worth_trimming() == worth


def test_of_two_vocabularies_the_smaller_one_leaves_its_room_to_the_other():
    config = marian(vocab_size=50, decoder_vocab_size=50, share_encoder_decoder_embeddings=False).config
    needed = {"source": 40, "target": 10}
    size = sizes_of(with_vocabulary(config, 30, 10)).int8
    assert largest_vocabulary(config, size, needed) == 30
    assert largest_vocabulary(config, size - 1, needed) == 29
    assert largest_vocabulary(config, 10, needed) == 0


def test_adapters_count_as_the_matrices_that_an_engine_gets():
    fields = {"vocab_size": 100, "encoder_layers": 6, "decoder_layers": 6}
    shared = {"encoder_unique_layers": 1, "decoder_unique_layers": 1}
    adapted = rs_model(**fields, **shared, step_adapter_rank=2, step_layer_norms=True, step_biases=True).config
    assert sizes_of(adapted).int8 == sizes_of(marian(**fields).config).int8
    assert sizes_of(adapted).parameters < sizes_of(marian(**fields).config).parameters


def test_what_is_held_out_has_a_text_on_each_side(tmp_path):
    file = tmp_path / "train.jsonl"
    write_jsonl(file, [(f"a {number}", "b") for number in range(28)] + [("a", None), ("", "b"), ("a", "c")])
    corpus, held_out = hold_out(CorpusArguments("fw", "bw", train_file=[str(file)]))
    assert (corpus.max_train_samples, held_out["target"][:]) == (28, ["c"])


def test_a_speed_chooses_the_depth_and_a_budget_the_updates(plan_for):
    plan = plan_for("--target_speedup", 0.01, "--budget_minutes", 20)
    assert plan.child["decoder_layers"] == 2
    assert plan.speedup.keys() == {2, 1}
    assert plan.training["updates"].keys() == {"collapsed", "distilled"}
    assert sum(plan.minutes.values()) <= 20
    two = plan_for("--budget_minutes", 20, "--max_bleu_loss", 1).training["updates"]
    assert two["distilled"] / two["shallow"] == pytest.approx(1.5, rel=0.01)
    # Fifty epochs at most, but no fewer updates than without a budget.
    assert plan.training["updates_an_epoch"] == 2
    assert plan_for("--budget_minutes", 900).training["updates"]["distilled"] == 200
    longer = plan_for("--budget_minutes", 900, "--max_tokens", 64).training
    assert longer["updates"]["distilled"] == 50 * longer["updates_an_epoch"] > 200


@pytest.mark.parametrize(("most", "depth"), [(200, 1), (0, 2)])
def test_validation_chooses_the_least_depth_within_the_loss(most, depth, compressed, parent, text, tmp_path, caplog):
    parser = RecipeParser(CompressOptions.types(), positional="model_name_or_path")
    given = [parent, "--output_dir", tmp_path, "--train_file", text["train_file"], *LENGTHS, "--max_bleu_loss", most]
    given += ["--validation_file", text["test_file"]]
    options = CompressOptions(*parser.parse_recipe([str(part) for part in given]))
    plan = Plan.from_json(json.loads((compressed / "compress.json").read_text()))
    plan.child |= {"decoder_layers": None, "decoder_depths": [2, 1]}
    (tmp_path / "distilled").symlink_to(compressed / "distilled")
    compression = Compression(options, plan, PatientGroup())
    compression.choose_depth()
    assert compression.depth == depth
    assert ("falls short by" in caplog.text) == (depth == 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decoder_layers", 3], r"decoder_layers must lie in 1\.\.2"),
        (["--target_speedup", 2, "--decoder_layers", 1], "leave decoder_layers out"),
        (["--engines", "tensorrt"], "there is no engine 'tensorrt'"),
        (["--quantization", "int3"], "quantization must be one of"),
        (["--budget_minutes", 60, "--updates", 9], "budget_minutes chooses the updates: leave updates out"),
        (["--budget_minutes", 0.001], r"with 200 updates it takes about \d"),
        (["--target_size", 0.01], r"cannot be reached: .* has \d+\.\d+ MB in int8"),
        (["--target_speedup", 1000], "with decoder depth 1 the child is"),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else "",
)
def test_what_cannot_be_is_said_before_anything_is_done(options, message, parent, text, tmp_path):
    with pytest.raises(ValueError, match=message):
        compress(parent, "--output_dir", tmp_path / "out", "--train_file", text["train_file"], *LENGTHS, *options)
    assert not list(tmp_path.iterdir())


def test_text_of_other_languages_is_refused(parent, text, tmp_path):
    pairs = reverse_pairs(100, seed=5)
    others = [(source, target) for (source, _), (_, target) in pairwise(pairs)]
    file = write_jsonl(tmp_path / "shifted.jsonl", others)
    with pytest.raises(ValueError, match="as probable after other sources as after their own"):
        compress(parent, "--output_dir", tmp_path / "out", "--train_file", file, *LENGTHS)
    (tmp_path / "mono.txt").write_text("これは別の言葉です。\n")
    with pytest.raises(ValueError, match=r"mono\.txt is not written as fw is"):
        compress(parent, "--output_dir", tmp_path / "out", "--monolingual_file", tmp_path / "mono.txt", *LENGTHS)


def test_a_parent_without_tokenizer_and_a_full_disk_are_said_at_once(parent, text, tmp_path, monkeypatch):
    bare = tmp_path / "bare"
    shutil.copytree(parent, bare, ignore=shutil.ignore_patterns("*.spm", "vocab.json"))
    with pytest.raises(ValueError, match="has no complete tokenizer"):
        compress(bare, "--output_dir", tmp_path / "out", "--train_file", text["train_file"], *LENGTHS)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"leave about .* GB free: make room"):
        compress(parent, "--output_dir", tmp_path / "out", "--train_file", text["train_file"], *LENGTHS)
    assert not (tmp_path / "out").exists()


def test_what_no_training_could_do_is_said_before_the_plan(parent, text, tmp_path, monkeypatch):
    monkeypatch.setattr(TranslationTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="one process with 2 GPUs"):
        compress(*command(parent, text, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_dataset_is_kept_and_scored_once(parent, text, tmp_path):
    dataset = tmp_path / "pairs"
    dataset.mkdir()
    for split in ("train", "test"):
        shutil.copyfile(text[f"{split}_file"], dataset / f"{split}.jsonl")
    parser = RecipeParser(CompressOptions.types(), positional="model_name_or_path")
    given = [parent, "--output_dir", tmp_path / "out", "--dataset_name", dataset, *OPTIONS]
    options = CompressOptions(*parser.parse_recipe([str(part) for part in given]))
    plan = new_plan(options, tmp_path / "out", time.perf_counter())
    (dataset / "train.jsonl").unlink()
    compression = Compression(options, plan, PatientGroup())
    trained_on = load_split(compression.corpus(), "train")
    assert [(pair["source"], pair["target"]) for pair in trained_on] == [
        *reverse_pairs(360, seed=5)[:300],
        ("", "a b"),
    ]
    assert load_evaluation_splits(compression.corpus()) == {}  # no stage scores itself
    assert load_evaluation_splits(compression.evaluated).keys() == {"test"}


def test_a_folder_goes_on_with_its_own_plan_alone(compressed, parent, text, tmp_path):
    with pytest.raises(ValueError, match="seed=1, now it is 2"):
        compress(*command(parent, text, compressed, "--seed", 2))
    other = {**text, "test_file": text["train_file"]}
    with pytest.raises(ValueError, match="test_file="):
        compress(*command(parent, other, compressed))
    plan = json.loads((compressed / "compress.json").read_text())
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "compress.json").write_text(json.dumps(plan | {"format": 1}))
    with pytest.raises(ValueError, match="begun by another version of rs-transformer"):
        compress(*command(parent, text, tmp_path / "earlier"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        compress(*command(parent, text, tmp_path))


def test_what_is_named_later_is_done_and_what_is_gone_is_done_again(compressed, parent, text, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(compressed, folder)
    (folder / "report" / "report.html").unlink()  # as where the disk was full then
    compress(*command(parent, text, folder, "--repo", "me/small", "--decoding_max_tokens", 512))
    assert 'from_pretrained("me/small")' in (folder / "model" / "README.md").read_text()
    assert (folder / "report" / "report.html").is_file()
    before = (folder / "report" / "report.html").stat().st_mtime_ns
    compress(*command(parent, text, folder))  # which names no repository
    assert 'from_pretrained("me/small")' in (folder / "model" / "README.md").read_text()
    assert (folder / "report" / "report.html").stat().st_mtime_ns == before
    parser = RecipeParser(CompressOptions.types(), positional="model_name_or_path")
    more = command(parent, text, folder, "--engines", "ctranslate2", "onnx")
    options = CompressOptions(*parser.parse_recipe([str(part) for part in more]))
    plan = Plan.from_json(json.loads((folder / "compress.json").read_text()))
    assert not Compression(options, plan, PatientGroup()).has_report()


def test_stages_take_the_parent_of_the_plan_whatever_its_repository_has_got_since(parent, text, tmp_path, monkeypatch):
    cache = write_hub_cache(parent, tmp_path / "hub", "org/parent")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    parser = RecipeParser(CompressOptions.types(), positional="model_name_or_path")
    given = command("org/parent", text, tmp_path / "out")
    options = CompressOptions(*parser.parse_recipe([str(part) for part in given]))
    plan = new_plan(options, tmp_path / "out", time.perf_counter())
    assert plan.parent["commit"] == COMMIT
    newer, root = "f" * 40, cache / "models--org--parent"
    shutil.copytree(root / "snapshots" / COMMIT, root / "snapshots" / newer, symlinks=True)
    (root / "refs" / "main").write_text(newer)
    found = found_plan(options, tmp_path / "out")
    assert Compression(options, found, PatientGroup()).parent == ("org/parent", COMMIT)


def test_a_folder_goes_on_with_the_engine_that_it_was_planned_with(compressed, parent, text, tmp_path, monkeypatch):
    without = tmp_path / "without"
    shutil.copytree(compressed, without, ignore=shutil.ignore_patterns("export", "report", "parent_ctranslate2"))
    plan = json.loads((without / "compress.json").read_text())
    assert plan["installed"] == ["ctranslate2"]
    (without / "compress.json").write_text(json.dumps(plan | {"installed": []}))
    compress(*command(parent, text, without, "--report", "false"))
    assert not (without / "export").exists()
    for module in ("commands.compress", "compress.plan"):
        monkeypatch.setattr(f"rs_transformer.{module}.is_installed", lambda _: False)
    with pytest.raises(ValueError, match="engines=ctranslate2 needs: pip install"):
        compress(*command(parent, text, compressed))
