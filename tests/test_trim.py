"""`training/trim.py` and the trimming of `training/collapse.py`, on a model laid out as OPUS-MT's are."""

import json

import pytest
import torch
from conftest import ROOT, script
from safetensors.torch import save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianMTModel, pipeline

from rs_transformer import expand
from rs_transformer.checkpoints import load_parent, model_digest
from rs_transformer.commands.trim import VocabularyArguments, read_texts
from rs_transformer.corpus import OptionalCorpusArguments
from rs_transformer.decoding import DecodingArguments, translate
from rs_transformer.tokenization import encode

EXCERPT = ROOT / "training/data/tanaka-excerpt"
LANGUAGES = ["--source_lang", "ja", "--target_lang", "en"]
GREEDY = DecodingArguments(num_beams=1, max_new_tokens=40)


@pytest.fixture(scope="module")
def opus(made_once):
    """A trained stock Marian with the files, types and configuration of an OPUS-MT checkpoint."""
    return made_once("opus", write_opus)


def write_opus(folder):
    trained = ROOT / "hub_cards" / "marian-ja-en"
    model = expand(AutoModelForSeq2SeqLM.from_pretrained(trained)).half()
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert "model.encoder.embed_positions.weight" in state  # in OPUS-MT's files they are
    for tied in ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"):
        del state[tied]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    pad = model.config.pad_token_id
    legacy = {"bad_words_ids": [[pad]], "num_beams": 4, "max_length": 64, "static_position_embeddings": True}
    legacy |= {"normalize_before": False, "add_final_layer_norm": False, "bos_token_id": 0, "torch_dtype": "float16"}
    config = model.config.to_dict() | {"architectures": ["MarianMTModel"]} | legacy
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def text(tmp_path):
    """Forty pairs, as jsonl."""
    lines = (EXCERPT / "test.jsonl").read_text().splitlines()[:40]
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(lines) + "\n")
    pairs = [json.loads(line)["translation"] for line in lines]
    return file, [pair["ja"] for pair in pairs], [pair["en"] for pair in pairs]


def listing(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_trimmed_folder_has_everything_and_says_what_is_left(opus, text, tmp_path, capsys):
    output = tmp_path / "trimmed"
    files = ["--vocabulary_files", text[0], *LANGUAGES]
    script("trim")("--model_name_or_path", opus, "--output_dir", output, *files)
    assert listing(output) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "source.spm",
        "target.spm",
        "tokenizer_config.json",
        "trim.json",
        "vocab.json",
    ]
    record = json.loads((output / "trim.json").read_text())
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    parent = load_parent(str(opus))
    assert type(model) is MarianMTModel
    assert model.dtype == torch.float16
    entries = model.config.vocab_size
    assert entries == model.config.decoder_vocab_size == len(tokenizer) < 0.5 * len(parent[1])
    for side in ("source", "target"):
        assert record[side]["entries"] == {"parent": len(parent[1]), "trimmed": entries}
        sizes = [getattr(its, f"spm_{side}").get_piece_size() for its in (parent[1], tokenizer)]
        assert list(record[side]["pieces"].values()) == sizes
        assert record[side]["covered"] == 1.0
    assert record["parent_digest"] == model_digest(*parent)
    assert record["text"] == {"vocabulary_files": [str(text[0])]}
    assert (
        f"vocabulary {entries:,} of {len(parent[1]):,} entries, for 100.00% of the source" in capsys.readouterr().out
    )
    # What the configuration said of padding, it says of the new one.
    search, pad = model.generation_config, tokenizer.pad_token_id
    assert search.bad_words_ids == [[pad]]
    assert (search.pad_token_id, search.decoder_start_token_id, search.num_beams) == (pad, pad, 4)
    assert (model.config.pad_token_id, model.config.decoder_start_token_id) == (pad, pad)
    assert encode(tokenizer, text[1]) != encode(parent[1], text[1])
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in encode(tokenizer, text[1])] == [
        parent[1].convert_ids_to_tokens(ids) for ids in encode(parent[1], text[1])
    ]
    assert pipeline("translation", model=str(output), dtype=torch.float32)(text[1][0])[0]["translation_text"]


def test_translations_of_the_text_are_the_parents_also_in_ctranslate2(opus, text, tmp_path):
    parent = load_parent(str(opus), dtype=torch.float32)
    before = translate(parent[0].eval(), parent[1], text[1], GREEDY, progress=False)
    (tmp_path / "source.txt").write_text("\n".join(text[1]) + "\n")
    (tmp_path / "target.txt").write_text("\n".join(before) + "\n")
    files = ["--vocabulary_files", tmp_path / "source.txt", tmp_path / "target.txt"]
    script("trim")("--model_name_or_path", opus, "--output_dir", tmp_path / "trimmed", *files)
    model, tokenizer = load_parent(str(tmp_path / "trimmed"), dtype=torch.float32)
    assert translate(model.eval(), tokenizer, text[1], GREEDY, progress=False) == before
    script("export")(
        tmp_path / "trimmed", "--to", "ctranslate2", "--output_dir", tmp_path / "ct2", "--verify", *text[1][:3]
    )
    vocabulary = json.loads((tmp_path / "ct2" / "shared_vocabulary.json").read_text())
    assert len(vocabulary) == len(tokenizer) - 1  # without padding


@pytest.mark.parametrize("options", [[], ["--vocabulary_characters", "text", "--vocabulary_coverage", 0.9]])
def test_collapse_trims_its_parent_first(opus, text, tmp_path, options):
    output = tmp_path / "rs"
    files = ["--vocabulary_files", text[0], *LANGUAGES, "--max_vocabulary", 2500, *options]
    script("collapse")("--model_name_or_path", opus, "--output_dir", output, *files)
    record = json.loads((output / "collapse.json").read_text())
    child, tokenizer = load_parent(str(output))
    assert child.config.vocab_size == len(tokenizer) == record["trimmed"]["source"]["entries"]["trimmed"] <= 2500
    assert record["trimmed"]["coverage"] == (0.9 if options else 1.0)
    parent = load_parent(str(opus))[0]
    size = parent.model.shared.weight[0].numel() * (parent.config.vocab_size - child.config.vocab_size)
    before, after = record["parameters"]["parent"], record["parameters"]["collapsed"]
    assert before["total"] - before["layers"] - size == after["total"] - after["layers"]
    script("trim")("--model_name_or_path", opus, "--output_dir", tmp_path / "trimmed", *files)
    alone = load_parent(str(tmp_path / "trimmed"))[0]
    assert torch.equal(alone.model.shared.weight, child.model.shared.weight)
    # Of a parent that was trimmed before, what that was made of is not forgotten.
    again = ["--model_name_or_path", tmp_path / "trimmed", "--output_dir", tmp_path / "again", *files]
    script("collapse")(*again)
    trimmed = json.loads((tmp_path / "again" / "collapse.json").read_text())["trimmed"]
    assert trimmed["parent"] == str(opus)
    assert trimmed["source"]["entries"]["parent"] == parent.config.vocab_size > alone.config.vocab_size


def test_calibration_takes_the_trimmed_parent_and_evaluation_the_whole_one(opus, text, tmp_path):
    options = ["--method", "calibrated", "--calibration_updates", 1, "--train_file", text[0], "--evaluate"]
    options += ["--test_file", text[0], "--num_beams", 1, "--max_new_tokens", 8, "--vocabulary_files", text[0]]
    script("collapse")("--model_name_or_path", opus, "--output_dir", tmp_path / "rs", *options, *LANGUAGES)
    record = json.loads((tmp_path / "rs" / "collapse.json").read_text())
    whole, child = record["evaluation"]
    assert whole["parameters"] == record["parameters"]["parent"]["total"] > 3 * child["parameters"]


def test_text_comes_from_files_of_both_sides_and_of_one(text, tmp_path):
    (tmp_path / "more.txt").write_text("猫\n犬\n")
    (tmp_path / "more.jsonl").write_text('{"text": "cat"}\n')
    both = {"vocabulary_files": [str(text[0])]}
    one = {"vocabulary_source_files": [str(tmp_path / "more.txt")]}
    other = {"vocabulary_target_files": [str(tmp_path / "more.jsonl")]}
    corpus = OptionalCorpusArguments("ja", "en")
    found = read_texts(VocabularyArguments(**both, **one, **other), corpus)
    assert found == {"source": [*text[1], "猫", "犬"], "target": [*text[2], "cat"]}
    found = read_texts(VocabularyArguments(**one, **other), OptionalCorpusArguments())
    assert found == {"source": ["猫", "犬"], "target": ["cat"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is no text to trim the vocabulary to: give vocabulary_files"),
        (["--max_vocabulary", 9], "max_vocabulary needs text to trim the vocabulary to: give vocabulary_files"),
        (["--vocabulary_source_files", "TEXT"], "there is no target text: give vocabulary_target_files too"),
        (["--vocabulary_files", "TEXT"], "has columns: give source_lang and target_lang"),
        (["--vocabulary_files", "nowhere.jsonl", *LANGUAGES], "vocabulary_files: there is no file 'nowhere.jsonl'"),
        (
            ["--vocabulary_source_files", "nowhere.txt", "--vocabulary_target_files", "nowhere.txt"],
            "vocabulary_source_files: there is no file 'nowhere.txt'",
        ),
        (["--vocabulary_files", "TEXT", *LANGUAGES, "--max_vocabulary", 9], r"max_vocabulary must be at least \d{4}"),
        (["--vocabulary_files", "TEXT", *LANGUAGES, "--max_vocabulary", 0], "max_vocabulary must be at least 1"),
        (["--vocabulary_files", "TEXT", *LANGUAGES, "--vocabulary_coverage", 0], "vocabulary_coverage must be more"),
        (["--vocabulary_files", "TEXT", "--source_lang", "en", "--target_lang", "ja"], "exchange source_lang and"),
        (["--vocabulary_files", "EMPTY", "EMPTY2"], "there is no pair in"),
        (["--vocabulary_files", "BLANK", "BLANK2"], "there is no source text to trim the vocabulary to"),
        (
            ["--vocabulary_files", "RUSSIAN", "RUSSIAN2"],
            "of the characters of the source text are unknown to the model",
        ),
    ],
    ids=lambda value: "-".join(map(str, value)).replace("--", "") if isinstance(value, list) else "",
)
def test_bad_input_is_named_before_anything_is_written(opus, text, tmp_path, options, message):
    for name, content in {"EMPTY": "", "BLANK": " \n\n", "RUSSIAN": "Совсем другой язык\n"}.items():
        for number in ("", "2"):
            (tmp_path / f"{name}{number}").write_text(content)
    folder = {name: tmp_path / name for name in listing(tmp_path)} | {"TEXT": text[0]}
    options = [folder.get(option, option) for option in options]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        script("trim")("--model_name_or_path", opus, "--output_dir", tmp_path / "trimmed", *options)
    assert "\n" not in str(error.value)
    assert not [name for name in listing(tmp_path) if "trimmed" in name]


def test_a_model_that_is_trimmed_already_has_nothing_to_remove(opus, text, tmp_path):
    files = ["--vocabulary_files", text[0], *LANGUAGES]
    script("trim")("--model_name_or_path", opus, "--output_dir", tmp_path / "once", *files)
    with pytest.raises(ValueError, match=r"nothing is left to remove: the vocabulary of .*once has \d+ entries, and"):
        script("trim")("--model_name_or_path", tmp_path / "once", "--output_dir", tmp_path / "twice", *files)
    assert not (tmp_path / "twice").exists()
    # A collapse goes on with the parent as it is.
    script("collapse")("--model_name_or_path", tmp_path / "once", "--output_dir", tmp_path / "rs", *files)
    once, again = (tmp_path / "once" / "trim.json", tmp_path / "rs" / "collapse.json")
    entries = [json.loads(file.read_text()) for file in (once, again)]
    assert entries[0]["source"]["entries"] == entries[1]["trimmed"]["source"]["entries"]


def test_existing_output_is_left_alone(opus, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    options = ["--output_dir", tmp_path, "--vocabulary_files", "a.txt", "b.txt"]
    with pytest.raises(FileExistsError, match="is there already and not empty"):
        script("trim")("--model_name_or_path", opus, *options)
    assert listing(tmp_path) == ["notes.txt"]
