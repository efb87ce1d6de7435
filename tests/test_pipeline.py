"""pipeline("translation") with the package imported: as transformers 4 had it, for RSMarian and stock Marian."""

import contextlib
import copy
import json
import logging
import shutil
import time

import pytest
import torch
from conftest import script
from datasets import Dataset
from oracle import unrolled_marian
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)
from transformers.pipelines.pt_utils import KeyDataset

from rs_transformer import TranslationPipeline
from rs_transformer.compare import comparison
from rs_transformer.decoding import DecodingArguments
from rs_transformer.pipeline_rs_marian import is_blank, split_into_sentences
from rs_transformer.tokenization import encode

SENTENCES = ["a b c", "d e f g", "h i", "j k l a b"]
BACKWARDS = ["c b a", "g f e d", "i h", "b a l k j"]


@pytest.fixture(scope="module")
def translator(trained):
    return pipeline("translation", model=str(trained))


@contextlib.contextmanager
def generate_calls(model, monkeypatch):
    """The arguments of each call of a model's `generate`."""
    calls, generate = [], model.generate
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", lambda **given: (calls.append(given), generate(**given))[1], raising=False)
        yield calls


def texts(records) -> list[str]:
    return [record["translation_text"] for record in records]


@pytest.fixture(scope="module")
def marian_folder(trained, tmp_path_factory):
    """The trained model as a plain Marian checkpoint, such as OPUS-MT's."""
    folder = tmp_path_factory.mktemp("marian")
    unrolled_marian(AutoModelForSeq2SeqLM.from_pretrained(trained)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    return folder


def test_a_string_gives_a_list_of_one(translator):
    assert isinstance(translator, TranslationPipeline)
    assert translator("a b c d") == [{"translation_text": "d c b a"}]


def test_depth_of_a_call_is_passed_on(translator):
    shallow = AutoModelForSeq2SeqLM.from_pretrained(translator.model.name_or_path, decoder_layers=1)
    expected = pipeline("translation", model=shallow, tokenizer=translator.tokenizer)(SENTENCES)
    assert translator(SENTENCES, decoder_depth=1) == expected != translator(SENTENCES)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_lists_generators_and_datasets_are_translated_in_order(translator, batch_size):
    assert texts(translator(SENTENCES, batch_size=batch_size)) == BACKWARDS
    generated = translator((sentence for sentence in SENTENCES), batch_size=batch_size)
    assert [record["translation_text"] for (record,) in generated] == BACKWARDS
    mapped = translator(map(str.strip, SENTENCES), batch_size=batch_size)
    assert [record["translation_text"] for (record,) in mapped] == BACKWARDS
    dataset = KeyDataset([{"text": sentence} for sentence in SENTENCES], "text")
    assert [record["translation_text"] for (record,) in translator(dataset, batch_size=batch_size)] == BACKWARDS


def test_plain_marian_checkpoints_are_served_too(marian_folder):
    translator = pipeline("translation", model=str(marian_folder))
    assert type(translator.model).__name__ == "MarianMTModel"
    assert texts(translator(SENTENCES)) == BACKWARDS


def test_tasks_that_name_the_languages_work_and_are_checked(trained, caplog):
    translator = pipeline("translation_fw_to_bw", model=str(trained))
    assert texts(translator("a b c")) == ["c b a"]
    with pytest.raises(ValueError, match="the model translates from fw to bw, not translation_bw_to_fw"):
        pipeline("translation_bw_to_fw", model=str(trained))
    with pytest.raises(KeyError, match="Unknown task translation_of"):
        pipeline("translation_of", model=str(trained))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("translation_ja_to_en", None),
        ("translation_jpn_to_eng", None),
        ("translation_ja-JP_to_en-US", None),
        ("translation_jpn_Jpan_to_eng_Latn", None),
        ("translation_de_to_en", "asked for is de to en"),
        ("translation_en-GB_to_jap", ValueError),
    ],
)
def test_a_task_may_name_the_languages_by_any_of_their_codes(translator, warnings, name, told):
    tokenizer = copy.copy(translator.tokenizer)
    tokenizer.source_lang, tokenizer.target_lang = "ja", "en"
    if told is ValueError:
        with pytest.raises(ValueError, match=f"the model translates from ja to en, not {name}"):
            pipeline(name, model=translator.model, tokenizer=tokenizer)
        return
    assert texts(pipeline(name, model=translator.model, tokenizer=tokenizer)("a b c")) == ["c b a"]
    assert [told in record.message for record in warnings.records] == ([True] if told else [])


def test_languages_of_a_call_are_checked_too(translator, warnings):
    assert texts(translator("a b c", src_lang="fw", tgt_lang="bw")) == ["c b a"]
    assert not warnings.records
    with pytest.raises(ValueError, match="the model translates from fw to bw, not from bw to fw"):
        translator("a b c", src_lang="bw", tgt_lang="fw")
    translator("a b c", tgt_lang="de")
    assert "The model translates from fw to bw; asked for is fw to de." in warnings.text


@pytest.mark.parametrize("task", ["translation", "translation_ja_to_en"])
def test_a_pipeline_without_a_model_is_told_to_name_one(task):
    with pytest.raises(ValueError, match=r"translation has no default model: give pipeline\(…\) a model="):
        pipeline(task)


def test_model_and_tokenizer_objects_are_taken(trained):
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert texts(pipeline("translation", model=model, tokenizer=tokenizer)("a b c")) == ["c b a"]


def test_generation_arguments_are_passed_on(translator, trained):
    (records,) = translator(["a b c d"], num_beams=3, num_return_sequences=3)
    assert len(records) == 3
    assert texts(records)[0] == "d c b a"
    assert texts(translator("a b c d", max_new_tokens=2, forced_eos_token_id=None)) == ["d c"]
    assert texts(translator("a b c d", generation_config=GenerationConfig(max_length=3, forced_eos_token_id=None)))
    at_start = pipeline("translation", model=str(trained), max_new_tokens=2, forced_eos_token_id=None)
    assert texts(at_start("a b c d")) == ["d c"]


def test_token_ids_can_be_returned(translator):
    (record,) = translator("a b c", return_tensors=True)
    ids = translator.tokenizer(text_target="c b a")["input_ids"]
    assert record["translation_token_ids"].tolist()[1:] == ids
    (both,) = translator("a b c", return_tensors=True, return_text=True)
    assert both["translation_text"] == "c b a"
    assert both["translation_token_ids"].tolist()[1:] == ids
    assert translator("a b c", return_text=True) == [{"translation_text": "c b a"}]
    with pytest.raises(ValueError, match="return_text=False leaves nothing to return"):
        translator("a b c", return_text=False)


def test_what_transformers_4_took_is_taken(translator):
    (record,) = translator("a b c", return_type=0)
    assert record["translation_token_ids"].tolist()[1:] == translator.tokenizer(text_target="c b a")["input_ids"]
    assert texts(translator("a b c", return_type=1, stop_sequence="b")) == ["c b"]
    assert texts(translator("a b c")) == ["c b a"]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 1.0}])
def test_scores_are_given_when_they_are_asked_for(translator, how, batch_size):
    asked = {**how, "batch_size": batch_size}
    scored = translator(["a b c", "", "d e f g"], output_scores=True, **asked)
    plain = translator(["a b c", "", "d e f g"], **asked)
    nested = [records if isinstance(records, list) else [records] for records in scored]
    assert [[{"translation_text": record["translation_text"]} for record in records] for records in nested] == [
        records if isinstance(records, list) else [records] for records in plain
    ]
    for records, text in zip(nested, ["c b a", "", "g f e d"], strict=True):
        best = records[0]
        tokens = len(translator.tokenizer(text_target=text)["input_ids"]) if text else 0
        assert len(best["token_logprobs"]) == tokens  # the end of the sentence has one
        assert best["score"] == pytest.approx(sum(best["token_logprobs"]) / max(1, tokens), abs=1e-4)
        assert all(record["score"] <= best["score"] for record in records)
    (ids,) = translator.tokenizer("a b c", return_tensors="pt")["input_ids"]
    labels = translator.tokenizer(text_target="c b a", return_tensors="pt")["input_ids"]
    logits = translator.model(input_ids=ids[None], labels=labels).logits.log_softmax(-1)
    expected = logits.gather(-1, labels[..., None]).flatten().tolist()
    assert nested[0][0]["token_logprobs"] == pytest.approx(expected, abs=1e-3)
    (record,) = translator("a b c; d e", split_sentences=lambda line: line.split("; "), return_dict_in_generate=True)
    assert record["translation_text"] == "c b a e d"
    assert len(record["token_logprobs"]) == 7


@pytest.mark.parametrize(
    ("checkpoint", "call", "tokens"),
    [
        ({"max_new_tokens": 20, "max_length": None}, {"max_length": 3}, 2),
        ({"max_new_tokens": 20, "max_length": None}, {"generation_config": GenerationConfig(max_length=3)}, 2),
        ({"max_length": 32}, {"max_new_tokens": 2}, 2),
        ({"max_length": 32}, {"generation_config": GenerationConfig(max_new_tokens=2)}, 2),
        ({"max_length": 3}, {"generation_config": GenerationConfig(num_beams=1)}, 2),
        ({"max_length": 3}, {}, 2),
        ({"max_length": 32}, {"max_new_tokens": 500}, 31),
    ],
)
def test_the_length_that_the_caller_sets_counts(trained, checkpoint, call, tokens):
    model = AutoModelForSeq2SeqLM.from_pretrained(trained)
    for name, value in {**checkpoint, "forced_eos_token_id": None, "eos_token_id": None}.items():
        setattr(model.generation_config, name, value)
    (record,) = pipeline("translation", model=model, tokenizer=str(trained))("a b c d", return_tensors=True, **call)
    assert len(record["translation_token_ids"]) == tokens + 1


def test_the_length_of_a_call_takes_the_place_of_the_pipelines(trained):
    at_start = pipeline("translation", model=str(trained), max_new_tokens=4, forced_eos_token_id=None)
    assert texts(at_start("a b c d e")) == ["e d c b"]
    assert texts(at_start("a b c d e", max_length=3)) == ["e d"]
    assert texts(at_start("a b c d e", generation_config=GenerationConfig(max_length=3, forced_eos_token_id=0)))


def test_the_generation_config_of_a_call_takes_the_place_of_the_pipelines_options(translator, monkeypatch):
    model, tokenizer = translator.model, translator.tokenizer
    tasks = {"translation": {"num_beams": 3, "no_repeat_ngram_size": 2}}
    monkeypatch.setattr(model.config, "task_specific_params", tasks, raising=False)
    made_with = {"num_beams": 4, "length_penalty": 0.5, "decoder_depth": 1}
    at_start = pipeline("translation", model=model, tokenizer=tokenizer, **made_with)
    config = GenerationConfig(num_beams=1, max_new_tokens=3)

    def searched(translator, **given):
        with generate_calls(model, monkeypatch) as calls:
            translator("a b c", **given)
        return calls[0]

    given = searched(at_start, generation_config=config)
    assert (given["generation_config"].num_beams, given["generation_config"].max_length) == (1, 4)
    assert given["generation_config"].no_repeat_ngram_size is None
    assert given.keys() & made_with.keys() == {"decoder_depth"}  # no configuration can say it
    given = searched(at_start, generation_config=config, num_beams=2)
    assert given["generation_config"].num_beams == 2
    assert "num_beams" not in given
    assert config.num_beams == 1  # the caller's own
    assert searched(at_start)["num_beams"] == 4
    assert searched(at_start)["no_repeat_ngram_size"] == 2
    configured = pipeline("translation", model=model, tokenizer=tokenizer, generation_config=config)
    assert searched(configured)["generation_config"].num_beams == 1
    assert searched(configured, num_beams=2)["generation_config"].num_beams == 2


def test_a_length_in_a_generation_config_is_not_said_to_be_there_twice(translator, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(translator.model.generation_config, "max_length", 32)
    assert texts(translator("a b c d", generation_config=GenerationConfig(max_new_tokens=2)))
    assert "seem to have been set" not in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 2, got 0"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"decoder_input_ids": torch.ones(1, 32, dtype=torch.long)}, "have 32 tokens, and the model takes 32"),
        ({"truncation": "bogus"}, "truncation must be True, False or one of longest_first"),
        ({"generation_config": {"num_beams": 2}}, "generation_config must be a GenerationConfig"),
        ({"split_sentences": lambda line: None}, "must give a list of sentences, got None"),
    ],
)
def test_what_a_call_cannot_mean_is_named(translator, given, message):
    with pytest.raises(ValueError, match=message):
        translator("a b c", **given)


def test_half_a_character_is_an_unknown_one(translator):
    half, unknown = (translator(text) for text in ("a b \ud83d c", "a b \ufffd c"))
    assert half == unknown
    assert texts(translator("a \ud83d\ude00")) == texts(translator("a \U0001f600"))


def test_a_model_that_says_nothing_of_length_is_not_stopped_at_20_tokens(translator):
    model = translator.model
    saved, model.generation_config = model.generation_config, GenerationConfig.from_model_config(model.config)
    try:
        model.generation_config.max_length = None
        model.generation_config.forced_eos_token_id = None
        output = translator("a b c", min_new_tokens=25, return_tensors=True)
        assert len(output[0]["translation_token_ids"]) > 25
    finally:
        model.generation_config = saved


# Several languages


@pytest.fixture(scope="module")
def m2m(tokenizer, tmp_path_factory):
    """A tiny M2M100 of random weights."""
    folder, letters = tmp_path_factory.mktemp("m2m"), list(tokenizer.get_vocab())
    (folder / "vocab.json").write_text(
        json.dumps({letter: i for i, letter in enumerate(dict.fromkeys(["<s>", "<pad>", *letters]))})
    )
    files = {"vocab_file": folder / "vocab.json", "spm_file": tokenizer.spm_files[0]}
    languages = M2M100Tokenizer(**files, src_lang="en", model_max_length=16)
    config = M2M100Config(
        vocab_size=len(letters) + 120,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        max_position_embeddings=16,
        pad_token_id=languages.pad_token_id,
        eos_token_id=languages.eos_token_id,
        decoder_start_token_id=languages.eos_token_id,
    )
    torch.manual_seed(0)
    model = M2M100ForConditionalGeneration(config).eval()
    model.generation_config.max_length = 4
    return {"model": model, "tokenizer": languages}


@pytest.mark.parametrize(
    ("task", "at_start", "call", "expected"),
    [
        ("translation_de_to_fr", {}, {}, "de fr"),
        ("translation_deu_Latn_to_fra_Latn", {}, {}, "de fr"),
        ("translation", {"src_lang": "DE", "tgt_lang": "fr-CA"}, {}, "de fr"),
        ("translation", {}, {"src_lang": "jpn", "tgt_lang": "zh_TW"}, "ja zh"),
        ("translation_de_to_fr", {}, {"tgt_lang": "ja"}, "de ja"),
        ("translation", {}, {"tgt_lang": "fr"}, "en fr"),
    ],
)
def test_models_of_several_languages_are_told_theirs(m2m, monkeypatch, task, at_start, call, expected):
    tokenizer, (source, target) = m2m["tokenizer"], expected.split()
    translator = pipeline(task, **m2m, **at_start)
    with generate_calls(m2m["model"], monkeypatch) as calls:
        translated = translator(["a b", "c d e"], batch_size=2, return_tensors=True, **call)
        too_long = translator("a " * 40, truncation=True, **call)
    for given in calls:
        assert set(given["input_ids"][:, 0].tolist()) == {tokenizer.get_lang_id(source)}
    assert calls[1]["input_ids"].shape == (1, 16)
    assert calls[1]["input_ids"][0, -1] == tokenizer.eos_token_id
    for record in translated:
        assert record["translation_token_ids"][1] == tokenizer.get_lang_id(target)
    assert "__" not in too_long[0]["translation_text"]
    assert tokenizer.src_lang == "en"  # as it was


def test_models_of_several_languages_say_what_they_miss(m2m):
    with pytest.raises(ValueError, match="translates between several languages: give src_lang and tgt_lang"):
        pipeline("translation", **m2m)("a b")
    with pytest.raises(ValueError, match="the model knows no language 'tlh', only af, am"):
        pipeline("translation_de_to_tlh", **m2m)("a b")
    of_its_own = {"forced_bos_token_id": m2m["tokenizer"].get_lang_id("fr")}
    assert pipeline("translation", **m2m)("a b", **of_its_own)


def test_the_prefix_of_a_task_stands_before_each_sentence(tokenizer, monkeypatch):
    prefixes = {
        "translation_en_to_de": {"prefix": "a b: ", "num_beams": 3, "max_length": 6},
        "translation_en_to_fr": {"prefix": "c d: "},
    }
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
    ids = {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id, "eos_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(**sizes, **ids, task_specific_params=prefixes)).eval()

    def sources(task, text, **given):
        with generate_calls(model, monkeypatch) as calls:
            pipeline(task, model=model, tokenizer=tokenizer)(text, **given)
        return [call["input_ids"][0].tolist() for call in calls], calls[0]

    read, given = sources("translation_eng_to_deu", "e f")
    assert read == [tokenizer("a b: e f")["input_ids"]]
    assert (given["num_beams"], given["max_new_tokens"]) == (3, 5)
    assert sources("translation_en_to_de", "e f", max_new_tokens=2)[1]["max_new_tokens"] == 2
    wanted = [tokenizer(text)["input_ids"] for text in ("c d: e", "c d: f")]
    sentences = {"split_sentences": lambda line: line.split("; ")}
    assert sources("translation", "e; f", src_lang="en", tgt_lang="fr", **sentences)[0] == wanted
    assert sources("translation", "c d: e; f", **sentences)[0] == wanted
    assert texts(pipeline("translation_en_to_fr", model=model, tokenizer=tokenizer)("\u200b")) == [""]


def test_a_prefix_that_is_a_special_token_stays_one(tokenizer, monkeypatch):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<2de>"]})
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
    ids = {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id, "eos_token_id": 0}
    tasks = {"translation_en_to_de": {"prefix": "<2de> "}}
    model = T5ForConditionalGeneration(T5Config(**sizes, **ids, task_specific_params=tasks)).eval()
    with generate_calls(model, monkeypatch) as calls:
        pipeline("translation_en_to_de", model=model, tokenizer=tokenizer)("a b", max_new_tokens=2)
    assert calls[0]["input_ids"][0].tolist() == tokenizer("<2de> a b")["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<2de>") in calls[0]["input_ids"][0]


def test_a_stock_model_that_the_pipeline_has_saved_is_loaded_again(trained, translator, tmp_path):
    stock = unrolled_marian(AutoModelForSeq2SeqLM.from_pretrained(trained))
    pipeline("translation", model=stock, tokenizer=translator.tokenizer).save_pretrained(tmp_path / "stock")
    again = pipeline("translation", model=str(tmp_path / "stock"))
    assert type(again) is TranslationPipeline
    assert texts(again(SENTENCES)) == BACKWARDS
    assert not list((tmp_path / "stock").glob("*.py"))


def test_an_assistant_is_taken_by_its_name(trained, monkeypatch):
    assisted = pipeline("translation", model=str(trained), assistant_model=str(trained), num_beams=1)
    with generate_calls(assisted.model, monkeypatch) as calls:
        assert texts(assisted("a b c")) == ["c b a"]
    assert calls[0]["assistant_model"].config.decoder_layers == assisted.model.config.decoder_layers


@pytest.fixture(scope="module")
def several_targets(trained, tmp_path_factory):
    """The trained model with codes of languages in its vocabulary, as OPUS-MT's of several targets have them."""
    folder = tmp_path_factory.mktemp("several")
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoint-*", "runs"), dirs_exist_ok=True)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    codes = dict(zip(sorted(vocabulary, key=vocabulary.get)[5:7], [">>deu<<", ">>jpn<<"], strict=True))
    (folder / "vocab.json").write_text(json.dumps({codes.get(piece, piece): i for piece, i in vocabulary.items()}))
    return pipeline("translation", model=str(folder), split_sentences=True)


def test_a_comparison_tells_a_model_of_several_targets_its_language(several_targets, tmp_path):
    for part in (several_targets.model, several_targets.tokenizer):
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has several target languages"):
        comparison._load(str(tmp_path), "main", ["a b"], (None, None), DecodingArguments(), 2)
    sources = ["a b", ">>jpn<< c d"]
    model = comparison._load(str(tmp_path), "main", sources, ("en", "de"), DecodingArguments(), 2)
    first = several_targets.tokenizer.convert_ids_to_tokens([ids[0] for ids in model.input_ids])
    assert (model.is_told, first) == (True, [">>deu<<", ">>jpn<<"])


def test_commands_tell_models_of_several_languages_theirs(several_targets, m2m, tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("a b\n>>deu<< c d\n")
    rows = [{"en": "a b", "ja": "b a", "fr": "b a"}, {"en": ">>deu<< c d", "ja": "d c", "fr": "d c"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"translation": row}) + "\n" for row in rows))
    for part in ("model", "tokenizer"):
        m2m[part].save_pretrained(tmp_path / "m2m")
        getattr(several_targets, part).save_pretrained(tmp_path / "marian")
    given: list[tuple[list[str], int | None]] = []

    def keep(model, tokenizer, sources, decoding, **more):
        given.append((list(sources), model.generation_config.forced_bos_token_id))
        return ["b a"] * len(sources), 1.0

    for command in ("translate", "evaluate"):
        monkeypatch.setattr(f"rs_transformer.commands.{command}.timed_translate", keep)
    short, files = (
        ["--max_new_tokens", 3],
        ["--input_file", tmp_path / "in.txt", "--output_file", tmp_path / "out.txt"],
    )
    data, languages = ["--test_file", tmp_path / "test.jsonl"], ["--source_lang", "en", "--target_lang", "ja"]
    for name, sources, token in [
        ("marian", [">>jpn<< a b", ">>deu<< c d"], None),
        ("m2m", ["a b", ">>deu<< c d"], m2m["tokenizer"].get_lang_id("ja")),
    ]:
        model = tmp_path / name
        script("evaluate")("--systems", model, *data, *languages, *short)
        script("translate")("--model_name_or_path", model, *files, *languages, *short, "--overwrite", "true")
        assert given == [(sources, token)] * 2
        given.clear()
        with pytest.raises(ValueError, match=r"give (source_lang and )?target_lang"):
            script("translate")("--model_name_or_path", model, *files, *short, "--overwrite", "true")
    with pytest.raises(ValueError, match=r"keep is for Marian models, and .*m2m is of the type 'm2m_100'"):
        script("evaluate")("--systems", tmp_path / "m2m", *data, *languages, *short, "--keep", "true")
    # What was trained here is given what it was given then.
    trained_here = shutil.copytree(tmp_path / "marian", tmp_path / "trained")
    (trained_here / "run.json").write_text("{}")
    script("evaluate")("--systems", trained_here, *data, *languages, *short)
    assert given == [(["a b", ">>deu<< c d"], None)]
    with pytest.raises(ValueError, match="several target languages: give target_lang, one of deu, jpn"):
        script("evaluate")(
            "--systems", tmp_path / "marian", *data, "--source_lang", "en", "--target_lang", "fr", *short
        )


def test_exports_and_pictures_of_models_of_several_languages_are_of_those_asked_for(
    several_targets, m2m, tmp_path, monkeypatch
):
    for part in ("model", "tokenizer"):
        m2m[part].save_pretrained(tmp_path / "m2m")
        getattr(several_targets, part).save_pretrained(tmp_path / "marian")
    given, languages = [], ["--source_lang", "en", "--target_lang", "ja"]

    def verify(args, engine, folder, sources, *more):
        given.append((sources, None))
        return []

    def look(model, tokenizer, sources, targets):
        given.append((sources, model.generation_config.forced_bos_token_id))
        raise InterruptedError

    monkeypatch.setattr("rs_transformer.commands.export.verify", verify)
    monkeypatch.setattr("rs_transformer.commands.attention.encode_sentences", look)
    verified = ["--output_dir", tmp_path / "ct2", "--verify", "a b", ">>deu<< c d"]
    script("export")(tmp_path / "marian", "--to", "ctranslate2", *verified, *languages)
    for name in ("marian", "m2m"):
        with pytest.raises(InterruptedError):
            script("attention")(tmp_path / name, "--text", "a b", *languages, "--output_dir", tmp_path / "seen")
    assert given == [
        ([">>jpn<< a b", ">>deu<< c d"], None),
        ([">>jpn<< a b"], None),
        (["a b"], m2m["tokenizer"].get_lang_id("ja")),
    ]


def test_every_sentence_has_the_code_of_its_target_language(several_targets, monkeypatch):
    def codes_of(text, **given):
        with generate_calls(several_targets.model, monkeypatch) as calls:
            several_targets(text, max_new_tokens=2, **given)
        ids = [call["input_ids"][0, 0].item() for call in calls]
        return several_targets.tokenizer.convert_ids_to_tokens(ids)

    assert codes_of(">>deu<< ab. cd! ef?") == [">>deu<<"] * 3
    assert codes_of(">>jpn<<ab。cd。\nef\r\n >>deu<<  ab！ef") == [*[">>jpn<<"] * 3, *[">>deu<<"] * 2]
    assert codes_of("ab. cd.", tgt_lang="de") == [">>deu<<"] * 2
    assert codes_of("ab. cd.", src_lang="en", tgt_lang="jap") == [">>jpn<<"] * 2
    assert codes_of(">>jpn<<ab", tgt_lang="de") == [">>jpn<<"]
    for blank in (" ", "\n", "\u3000\t"):
        for how in ({}, {"split_sentences": False}):
            assert codes_of(f"{blank}>>jpn<< ab", tgt_lang="de", **how)[-1] == ">>jpn<<"
    assert codes_of(">>x<< ab. >>y<<\n>>x<< cd", tgt_lang="de") == [">>deu<<"] * 3
    assert codes_of(">>x<< ab", tgt_lang="de", split_sentences=False) == [">>deu<<"]
    assert texts(several_targets(">>deu<< \u200b")) == [""]
    with pytest.raises(ValueError, match="the model has no code for the target language 'fr', only >>deu<<, >>jpn<<"):
        several_targets("ab", tgt_lang="fr")


def test_a_model_of_several_targets_that_is_not_told_its_target_is_warned_of_once(several_targets, warnings):
    logging.Logger.warning_once.cache_clear()
    for text in ("", ">>deu<< ab", " >>jpn<< ab"):
        several_targets(text, max_new_tokens=2)
    several_targets("ab", tgt_lang="de", max_new_tokens=2)
    assert not warnings.records
    for text in ("ab", ">>x<< ab"):
        several_targets(text, max_new_tokens=2)
    (record,) = warnings.records
    assert "and was not told which: give tgt_lang, or begin the text with one of >>deu<<" in record.getMessage()


@pytest.mark.parametrize(
    "text", ["a </s> b", "<pad> a", "a<unk>b", "</s>", ">>deu<< a </s>", " >>deu<< a", "a >>deu<< b", ">>x<< a"]
)
def test_no_special_token_of_a_text_is_live_but_the_code_it_begins_with(several_targets, monkeypatch, text):
    with generate_calls(several_targets.model, monkeypatch) as calls:
        several_targets(text, max_new_tokens=2, split_sentences=False)
    (ids,) = calls[0]["input_ids"].tolist()
    assert ids == encode(several_targets.tokenizer, [text])[0]
    assert several_targets.tokenizer.eos_token_id not in ids[:-1]
    assert calls[0]["attention_mask"].tolist() == [[1] * len(ids)]


@pytest.mark.parametrize("text", ["a </s> b", "<pad> b", "a __de__ b"])
def test_no_special_token_of_a_text_is_live_in_models_of_several_languages(m2m, monkeypatch, text):
    with generate_calls(m2m["model"], monkeypatch) as calls:
        pipeline("translation_en_to_fr", **m2m)(text)
    tokenizer, (ids,) = m2m["tokenizer"], calls[0]["input_ids"].tolist()
    assert {tokenizer.get_lang_id("en"), tokenizer.eos_token_id} == {ids[0], ids[-1]}
    live = {*tokenizer.all_special_ids, *tokenizer.lang_token_to_id.values()} - {tokenizer.unk_token_id}
    assert live.isdisjoint(ids[1:-1])


def test_translations_are_joined_as_the_target_language_is_written(several_targets, translator):
    def separators(translator, text, *target):
        return [separator for _, separator, _ in translator._split(text, True, *target)]

    text = "ab。cd。\nef？gh\r\n"
    assert separators(translator, text) == [" ", "\n", " ", "\r\n", ""]
    for code in ("ja", "jap", "zh_CN", "cmn_Hans", "yue"):
        assert separators(translator, text, code) == ["", "\n", "", "\r\n", ""]
    assert separators(several_targets, f">>jpn<< {text}") == ["", "\n", "", "\r\n", ""]
    assert separators(several_targets, f">>deu<< {text}", "ja") == [" ", "\n", " ", "\r\n", ""]


# Long input, odd input


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("rs_transformer"), "propagate", True)
    return caplog


def test_input_longer_than_the_model_takes_is_cut_with_a_warning_that_names_it(translator, warnings):
    translator("a b c")
    assert not warnings.records
    translator("l k " + "a b " * 30)
    assert "is cut to the 32 that the model takes" in warnings.text
    assert "'l k a b a b" in warnings.text
    assert "split_sentences=True" in warnings.text
    warnings.clear()
    translator("a b " * 30, split_sentences=True)
    assert "no end of a sentence was found in it, give a function as split_sentences" in warnings.text
    assert "split_sentences=True" not in warnings.text


@pytest.mark.parametrize("truncation", [True, "only_first", "longest_first"])
def test_input_may_be_cut_without_a_warning(translator, warnings, truncation):
    long = "l k " + "a b " * 30
    assert translator(long, truncation=truncation) == translator("l k " + "a b " * 14 + "a")
    assert not warnings.records
    assert texts(translator("a b c", truncation=truncation, max_length=40)) == ["c b a"]


@pytest.mark.parametrize("truncation", [False, "do_not_truncate"])
def test_input_that_is_not_to_be_cut_is_refused(translator, truncation):
    assert texts(translator("a b c", truncation=truncation)) == ["c b a"]
    with pytest.raises(ValueError, match=r"the input has \d+ tokens and the model takes 32"):
        translator("a b " * 30, truncation=truncation)


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r", "\u2028"])
def test_a_text_of_several_lines_is_not_taken_for_one_sentence_without_a_warning(translator, warnings, line_end):
    translator(f"a b{line_end}")
    assert not warnings.records
    assert texts(translator(f"a b{line_end}c d", split_sentences=True)) == [f"b a{line_end}d c"]
    assert not warnings.records
    translator(f"a b{line_end}c d")
    assert "A text of 2 lines is translated as one sentence" in warnings.text
    assert "split_sentences=True" in warnings.text


@pytest.mark.parametrize("batch_size", [1, 4])
def test_long_text_is_split_into_sentences_and_joined(translator, warnings, batch_size):
    def by_semicolon(line):
        return (part for part in line.split("; ") if part)

    text = "a b c; d e f g\n\nh i; j k l a b"
    (record,) = translator(text, split_sentences=by_semicolon, batch_size=batch_size)
    assert record["translation_text"] == "c b a g f e d\n\ni h b a l k j"
    pair = translator([text, "a b c"], split_sentences=by_semicolon, batch_size=batch_size)
    assert texts(pair) == ["c b a g f e d\n\ni h b a l k j", "c b a"]
    assert not warnings.records


# A stroke marks the end of each sentence but the last.
LINES = """
It rains. | Does it? | Yes!
Mr. Smith saw J. Doe, i.e. her. | Then he left.
Version 3.5 is out. | Get it.
He said "No." | She left.
"Really?" he asked. | “No!” | She left.
(It is so.) | [See this.] | And that.
No. | I don't. | No. 5 is here.
3.14 is pi. | It is.
e.g. this one. | And e.g. The Beatles.
U.S. troops left. | They went home.
He lives in the U.S. | They left. | The U.S. Army came at 5 p.m. | It was late.
Wait... what? | No… really. | Well... | So be it . . . or not.
See https://a.b/c?d=e.f!g and www.a.com/?x=1. | Then a!=b or a != b holds, node.js is, a@b.com too. | Yes.
1. First do this. | 2. Then that. | It was 1999. | See Fig. 3. | It shows.
i like cats. | you like dogs etc. and dr. who, e.g. this.
Apple Inc. is big. | What? | ¿Qué? | ¡Sí! | Fin.
« Bonjour. » | Il part. | Il dit : « Non ! » puis part.
„Hallo.“ | Danach, am 3. Oktober 1990, z.B. das. | »Ja.« | Er kam.
Это я. | Ты кто? | А. С. Пушкин жил.
Τι κάνεις; | Καλά. | Ναι;
Բարեւ։ | Ինչպե՞ս ես։ | Լավ: | Այո:
猫が好きです。|犬も好きですか？|はい！|本当!?|そうだ｡|OK!|次です。
「はい。」と言った。|「え？」|「帰ろう。」と帰った。
（以上。）|次に【終わり。】|３．１４です。|値は３．|次に進む．|１．はじめに
你好！|我是小明。|3.14是圆周率。|“是！”|“不是。”他说。|https://a.b/c?d=中文。
안녕하세요. | 저는 학생입니다! | 네?
यह एक है। | यह दो है।|यह तीन है॥ | चार?
এটা এক। | দুই কি? | হ্যাঁ!
هل هذا؟ | نعم. | لا! | رأى د. أحمد ذلك.
یہ ہے۔ | وہ ہے؟|ہاں!
ሰላም። | እንዴት ነህ፧ | ደህና፡፡ | አዎ።|ጥሩ።
မင်္ဂလာပါ။ | နေကောင်းလား၊ ဟုတ်ကဲ့။|ကောင်းပါတယ်။
សួស្តី។ | អ្នកសុខសប្បាយទេ? | បាទ៕
བཀྲ་ཤིས། | བདེ་ལེགས།
no stop
"""


@pytest.mark.parametrize("line", LINES.strip().split("\n"))
def test_sentences_end_where_a_reader_sees_them_end(line):
    sentences = [sentence.strip() for sentence in line.split("|")]
    assert split_into_sentences(line.replace("|", "").replace("  ", " ")) == sentences


def test_nothing_is_no_sentence():
    assert split_into_sentences("  ") == split_into_sentences("") == []


@pytest.mark.parametrize("part", ["A. ", "a.b ", "Hello you. ", "。", ". ", '."', "! 1. ", "a!日", "「", " "])
def test_the_time_of_splitting_grows_as_the_text_does(part):
    start = time.process_time()
    sentences = split_into_sentences(part * (180_000 // len(part)))
    assert time.process_time() - start < 5  # minutes, where it grows with the square
    assert "".join(sentences).replace(" ", "") == (part * (180_000 // len(part))).replace(" ", "")


@pytest.mark.parametrize("split", ["yes", lambda line: "a b"])
def test_what_cannot_split_is_refused(translator, split):
    with pytest.raises(ValueError, match="split_sentences must"):
        translator("a b", split_sentences=split)


def test_blank_text_gives_an_empty_translation(translator):
    assert texts(translator(["", " ", "\u200b", "a b"], batch_size=3)) == ["", "", "", "b a"]
    (record,) = translator("\ufeff", return_tensors=True)
    assert record["translation_token_ids"].tolist() == []
    assert texts(translator("a b\n\u200b\nc d", split_sentences=True)) == ["b a\n\nd c"]


INVISIBLE = [
    "",
    " \t\n",
    "\u3000\xa0",
    "\u200b",
    "\ufeff",
    "\u200d\u2060",
    "\xad",
    "\u3164",
    "\u2800",
    "\ufe0f",
    "\u202e",
    "\x00",
]


@pytest.mark.parametrize("text", INVISIBLE)
def test_text_without_a_visible_character_is_blank_by_its_tokens(translator, text):
    tokenizer = translator.tokenizer
    assert is_blank(tokenizer, tokenizer(text)["input_ids"], text)
    assert is_blank(tokenizer, tokenizer(f">>deu<< {text}")["input_ids"], f">>deu<< {text}")
    assert not is_blank(tokenizer, tokenizer(f"{text}한")["input_ids"], f"{text}한")  # unknown, but to be seen


@pytest.mark.parametrize("text", [">>a b!<<", ">>한<<", ">> a <<", ">>A<<"])
def test_a_quote_in_such_marks_is_no_code_and_not_blank(translator, text):
    assert not is_blank(translator.tokenizer, translator.tokenizer(text)["input_ids"], text)
    assert texts(translator(text))[0]


def test_blank_is_judged_by_tokens_alone_where_the_text_is_not_there(tokenizer):
    vocabulary = tokenizer.get_vocab()
    begin, end, unknown = vocabulary["▁"], tokenizer.eos_token_id, tokenizer.unk_token_id
    for blank in ([end], [begin, end, tokenizer.pad_token_id], torch.tensor([begin, end])):
        assert is_blank(tokenizer, blank)
    for shown in ([begin, unknown, end], [vocabulary["▁a"], end]):
        assert not is_blank(tokenizer, shown)


def test_nothing_gives_nothing(translator):
    for nothing in ([], (), KeyDataset([], "text"), (text for text in ())):
        assert list(translator(nothing)) == []


def test_a_tuple_and_a_column_of_a_dataset_are_lists(translator):
    column = Dataset.from_dict({"text": SENTENCES})["text"]
    assert texts(translator(column, batch_size=2)) == texts(translator(tuple(SENTENCES))) == BACKWARDS


def test_a_model_in_training_mode_is_warned_of(translator, warnings):
    model = copy.copy(translator.model)
    pipeline("translation", model=model, tokenizer=translator.tokenizer)
    assert not warnings.records
    model.training = True
    pipeline("translation", model=model, tokenizer=translator.tokenizer)
    (record,) = warnings.records
    assert "RSMarianForConditionalGeneration is in training mode and translates with dropout" in record.getMessage()


def test_what_is_not_text_is_refused_with_the_mend(translator):
    with pytest.raises(ValueError, match=r"translation takes a text or a list of them, got dict.*KeyDataset"):
        translator([{"text": "a b"}])


def test_a_model_that_cannot_translate_is_refused(trained):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=30)
    with pytest.raises(ValueError, match="translation needs a sequence-to-sequence model, got BertForMaskedLM"):
        TranslationPipeline(model=BertForMaskedLM(config), tokenizer=AutoTokenizer.from_pretrained(trained))


def test_saved_pipeline_loads_again(translator, tmp_path):
    translator.save_pretrained(tmp_path)
    assert texts(pipeline("translation", model=str(tmp_path))("a b c")) == ["c b a"]
    assert torch.equal(
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path).model.shared.weight, translator.model.model.shared.weight
    )
