"""SentencePiece training to MarianTokenizer folders, and texts to ids."""

import copy
import json
import math

import pytest
import torch
from conftest import ROOT
from oracle import rs_model, unrolled_marian
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianTokenizer

from rs_transformer.configuration_rs_marian import RSMarianConfig
from rs_transformer.corpus import CorpusArguments, PairFilter, encode_pairs, load_split
from rs_transformer.decoding import DecodingArguments, translate
from rs_transformer.pipeline_rs_marian import find_language, is_written_without_blanks, same_language, split_code
from rs_transformer.tokenization import (
    TokenizerArguments,
    check_language_pair,
    count_tokens,
    encode,
    train_tokenizer,
)
from rs_transformer.training.model import ModelArguments, build_model, config_from_tokenizer

EXCERPT = CorpusArguments("ja", "en", train_file=[str(ROOT / "training/data/tanaka-excerpt/train.jsonl")])
PAIRS = load_split(EXCERPT, "train").take(2000)
SOURCES, TARGETS = PAIRS["source"][:], PAIRS["target"][:]
LANGUAGES = {"source_lang": "ja", "target_lang": "en"}


@pytest.mark.parametrize("vocabulary", ["merged", "joint", "separate"])
def test_both_sides_survive_encoding_and_decoding_after_loading(tmp_path, vocabulary):
    train_tokenizer(SOURCES, TARGETS, tmp_path, vocab_size=1300, vocabulary=vocabulary, **LANGUAGES)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, MarianTokenizer)
    assert (tokenizer.source_lang, tokenizer.target_lang) == ("ja", "en")
    ids = tokenizer(SOURCES[0])["input_ids"]
    labels = tokenizer(text_target=TARGETS[0])["input_ids"]
    assert tokenizer.unk_token_id not in ids + labels
    assert ids[-1] == labels[-1] == tokenizer.eos_token_id == 0
    assert tokenizer.decode(labels, skip_special_tokens=True) == TARGETS[0]
    # As OPUS-MT has it, and as converters to other engines expect: padding last, on both sides.
    assert tokenizer.pad_token_id == len(tokenizer.encoder) - 1
    if vocabulary == "separate":
        assert tokenizer.target_encoder["<pad>"] == tokenizer.pad_token_id == len(tokenizer.target_encoder) - 1
    model = build_model(ModelArguments(d_model=16, encoder_attention_heads=2, decoder_attention_heads=2), tokenizer)
    assert model.config.share_encoder_decoder_embeddings == (vocabulary != "separate")
    batch = tokenizer(SOURCES[:2], text_target=TARGETS[:2], return_tensors="pt", padding=True)
    assert model(**batch).logits.shape[-1] == len(tokenizer.encoder)


@pytest.fixture
def multilingual(tokenizer, tmp_path) -> MarianTokenizer:
    """The tokenizer of the reverse task with the code >>ba<< in its vocabulary, and a code and another token added."""
    tokenizer.save_pretrained(tmp_path)
    entries = tokenizer.encoder | {">>ba<<": tokenizer.pad_token_id, "<pad>": len(tokenizer.encoder)}
    (tmp_path / "vocab.json").write_text(json.dumps(entries))
    loaded = MarianTokenizer(*(str(tmp_path / name) for name in ("source.spm", "target.spm", "vocab.json")))
    loaded.add_tokens(["<t>", ">>ab<<"])
    return loaded


@pytest.mark.parametrize(
    ("text", "source", "target"),
    [
        ("a b", "▁a ▁b", "▁a ▁b"),
        ("a </s> b", "▁a ▁ <unk> ▁b", "▁a ▁ <unk> ▁b"),  # all characters are unknown, and come out in one piece
        ("</s>", "▁ <unk>", "▁ <unk>"),
        ("<pad>", "▁ <unk> a d <unk>", "▁ <unk> a d <unk>"),
        ("a<unk>b", "▁a <unk> k <unk> b", "▁a <unk> k <unk> b"),
        (">>ba<< a", ">>ba<< ▁a", "▁ <unk> b a <unk> ▁a"),
        (" \n>>ba<< a", ">>ba<< ▁a", "▁ <unk> b a <unk> ▁a"),
        ("a >>ba<< b", "▁a ▁ <unk> b a <unk> ▁b", "▁a ▁ <unk> b a <unk> ▁b"),
        (">>ab<< a >>ab<<", ">>ab<< ▁a ▁ <unk> a b <unk>", "▁ <unk> a b <unk> ▁a ▁ <unk> a b <unk>"),
        (">>ba<< a</s>", ">>ba<< ▁a <unk>", "▁ <unk> b a <unk> ▁a <unk>"),
        (">> a << b", "▁ <unk> ▁a ▁ <unk> ▁b", "▁ <unk> ▁a ▁ <unk> ▁b"),
        ("<t> a", "<t> ▁a", "<t> ▁a"),
        ("", "", ""),
    ],
)
def test_nothing_in_a_text_is_a_special_token_but_the_code_it_begins_with(multilingual, text, source, target):
    for side, expected in (("source", source), ("target", target)):
        # Among others: the order of the texts is kept.
        _, ids, _ = encode(multilingual, ["</s>", text, "c"], target=side == "target")
        assert multilingual.convert_ids_to_tokens(ids) == [*expected.split(), "</s>"]


def test_another_kind_of_model_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="model_type must be one of unigram, bpe, got 'word'"):
        train_tokenizer(SOURCES, TARGETS, tmp_path / "new", model_type="word", **LANGUAGES)
    assert not (tmp_path / "new").exists()


def test_encoded_pairs_hold_no_padding_and_end_once(tokenizer):
    texts = ["<pad> a <pad>", "a </s> b </s>", "a b"]
    pairs = encode_pairs({"source": texts, "target": texts}, tokenizer, PairFilter(50, 50, 9.0))
    for ids in pairs["input_ids"] + pairs["labels"]:
        assert tokenizer.pad_token_id not in ids
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1


def test_a_text_is_cut_and_still_ends(tokenizer):
    short, long = encode(tokenizer, ["a", "a b c d e f g"], target=True, max_length=4)
    assert tokenizer.convert_ids_to_tokens(long) == ["▁a", "▁b", "▁c", "</s>"]
    assert tokenizer.convert_ids_to_tokens(short) == ["▁a", "</s>"]
    with pytest.raises(ValueError, match="source 2 of 2 is missing"):
        encode(tokenizer, ["a", None])
    with pytest.raises(ValueError, match=r"source 2 of 3 is no text but nan \(float\)"):
        encode(tokenizer, ["a", float("nan"), "b"])


@pytest.mark.parametrize(
    ("arguments", "name", "value", "message"),
    [
        (TokenizerArguments, "vocab_size", 3, "at least 4"),
        (TokenizerArguments, "character_coverage", 0.9, "at least 0.98 and at most 1"),
        (TokenizerArguments, "character_coverage", math.nan, "a finite number"),
        (TokenizerArguments, "tokenizer_sample_size", 0, "at least 101"),
        (DecodingArguments, "num_beams", 0, "at least 1"),
        (DecodingArguments, "length_penalty", math.inf, "a finite number"),
        (ModelArguments, "encoder_ffn_dim", 0, "at least 1"),
        (ModelArguments, "d_model", -8, "at least 1"),
        (ModelArguments, "decoder_unique_layers", 0, "at least 1"),
        (ModelArguments, "max_position_embeddings", 0, "at least 1"),
        (ModelArguments, "attention_dropout", 1.0, "at least 0 and less than 1"),
        (ModelArguments, "dropout", math.nan, "a finite number"),
        (ModelArguments, "init_std", 0.0, "more than 0"),
        (ModelArguments, "activation_function", "swoosh", "one of .*swish"),
    ],
)
def test_options_out_of_range_are_refused(arguments, name, value, message):
    with pytest.raises(ValueError, match=rf"{name} must be {message}.*, got {value!r}"):
        arguments(**{name: value})


def test_training_twice_gives_the_same_tokenizer(tmp_path):
    for name in "ab":
        train_tokenizer(SOURCES, TARGETS, tmp_path / name, vocab_size=1300, **LANGUAGES)
    for file in ("source.spm", "target.spm", "vocab.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_corpus_too_small_is_refused_with_the_size_it_allows(tmp_path):
    with pytest.raises(
        ValueError, match=r"the ja side .* too small for vocab_size=9000: it allows at most \d+ pieces"
    ):
        train_tokenizer(SOURCES, TARGETS, tmp_path, vocab_size=9000, **LANGUAGES)


def test_a_size_below_the_alphabet_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size=10 is too small .* which has \d+ different characters"):
        train_tokenizer(SOURCES, TARGETS, tmp_path, vocab_size=10, **LANGUAGES)


def test_an_unknown_kind_of_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocabulary must be one of merged, joint, separate, got 'both'"):
        train_tokenizer(SOURCES, TARGETS, tmp_path, vocabulary="both", **LANGUAGES)


def test_quotes_before_a_source_are_text_and_codes_are_entries(tmp_path):
    sources = [f"{'>>Komm her!<<' if row % 2 else '>>bt<<'} {source}" for row, source in enumerate(SOURCES)]
    trained = train_tokenizer(sources, TARGETS, tmp_path, vocab_size=1300, **LANGUAGES)
    assert [entry for entry in trained.get_vocab() if entry.startswith(">>")] == [">>bt<<"]
    assert trained.unk_token_id not in encode(trained, [">>Komm her!<< 猫"])[0]
    with pytest.raises(TypeError, match="got a single one"):
        train_tokenizer("a b c", TARGETS, tmp_path, **LANGUAGES)
    with pytest.raises(TypeError, match="got a single one"):
        count_tokens(trained, "a b c")


def test_an_empty_corpus_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no SentencePiece model of the ja side"):
        train_tokenizer(["", " "], ["", ""], tmp_path, **LANGUAGES)


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("ja", ("ja", "", "")),
        ("JPN", ("ja", "", "")),
        ("jap", ("ja", "", "")),
        ("ja_XX", ("ja", "", "")),
        ("jpn_Jpan", ("ja", "jpan", "")),
        ("zh-Hant-HK", ("zh", "hant", "hk")),
        ("zh_CN", ("zh", "hans", "cn")),
        ("cmn_Hans", ("zh", "hans", "")),
        (">>sr_Latn<<", ("sr", "latn", "")),
        ("__ger__", ("de", "", "")),
        ("es-419", ("es", "", "419")),
        ("nob", ("no", "", "")),
        ("arb_Arab", ("ar", "arab", "")),
        ("ckb", ("ckb", "", "")),
        ("mul", ("mul", "", "")),
        (None, ("", "", "")),
    ],
)
def test_codes_of_all_standards_are_read(code, parts):
    assert split_code(code) == parts


def test_codes_are_compared_by_the_language_and_the_script_they_stand_for():
    assert same_language("ja", "jpn_Jpan") and same_language("pt_BR", "por")  # noqa: PT018
    assert not same_language("zh_TW", "zho_Hans") and not same_language("nn", "nb")  # noqa: PT018
    nllb = ["eng_Latn", "zho_Hans", "zho_Hant", "nob_Latn", "srp_Cyrl"]
    asked = {
        "zh": "zho_Hans",
        "zh-TW": "zho_Hant",
        "cmn_Hant": "zho_Hant",
        "no": "nob_Latn",
        "sr_Latn": None,
        "fr": None,
    }
    assert {code: find_language(code, nllb) for code in asked} == asked
    assert find_language("pt_PT", ["pt", "pt_BR", "pt_PT"]) == "pt_PT"
    for known in ([">>pob<<", ">>por<<"], [">>por<<", ">>pob<<"]):
        asked = ("por", "pt", "pt_PT", "pob", "pt_BR", ">>pob<<")
        assert [find_language(code, known).strip("<>") for code in asked] == ["por"] * 3 + ["pob"] * 3
    assert find_language("nob", [">>nor<<", ">>nob<<"]) == ">>nob<<"


def test_languages_without_blanks_are_known_by_each_of_their_codes():
    for code in ("ja", "JPN", "jap", "jpn_Jpan", "zh_CN", "zh-Hant-TW", "cmn", "yue", "tha", "th_TH", "lao", "my_MM"):
        assert is_written_without_blanks(code)
    assert not any(map(is_written_without_blanks, ("en", "ko", "vi", "jpn_Latn", "mul", "", None)))


@pytest.mark.parametrize(("source", "target"), [("en", "ja"), ("eng_Latn", "jpn_Jpan"), ("EN-us", "jap")])
def test_a_model_of_the_other_direction_is_refused_in_whichever_codes(tokenizer, source, target):
    tokenizer = copy.copy(tokenizer)
    tokenizer.source_lang, tokenizer.target_lang = "jpn", "eng"
    with pytest.raises(ValueError, match=f"the model translates from jpn to eng, not from {source} to {target}"):
        check_language_pair(tokenizer, source, target)
    check_language_pair(tokenizer, target, source)
    check_language_pair(tokenizer, None, None)


def test_a_foreign_tokenizer_is_refused_for_a_checkpoint(tmp_path, trained):
    tokenizer = train_tokenizer(SOURCES, TARGETS, tmp_path, vocab_size=1300, **LANGUAGES)
    with pytest.raises(ValueError, match="they do not belong together"):
        build_model(ModelArguments(model_name_or_path=str(trained)), tokenizer)


def test_a_checkpoint_in_half_precision_is_trained_in_single(tmp_path, trained):
    AutoModelForSeq2SeqLM.from_pretrained(trained, dtype=torch.float16).save_pretrained(tmp_path)
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path).dtype == torch.float16
    model = build_model(ModelArguments(model_name_or_path=str(tmp_path)), AutoTokenizer.from_pretrained(trained))
    assert model.dtype == model.config.dtype == torch.float32


def test_a_field_that_the_checkpoint_lacks_is_refused(tmp_path, tokenizer):
    unrolled_marian(rs_model()).save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), layer_sharing="cycle")
    with pytest.raises(ValueError, match="is a marian model, which has no layer_sharing"):
        build_model(arguments, tokenizer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_attention_heads": 2}, "has learned with encoder_attention_heads=4 and would be spoiled by"),
        ({"activation_function": "gelu"}, "would be spoiled by activation_function=gelu"),
        ({"decoder_unique_layers": 1}, r"decoder_unique_layers=1: leave it out, or at 2; training/collapse\.py"),
        ({"deepnorm": True}, "would be spoiled by deepnorm=True"),
        ({"step_embeddings": False}, "would be spoiled by step_embeddings=False"),
        (
            {"layer_sharing": "sequence", "encoder_layers": 8},
            "apply layers 0 1 0 1, and with layer_sharing=sequence 0 0 1 1: leave it out",
        ),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)
def test_options_that_would_make_another_function_of_a_checkpoint_are_refused(fields, message, tokenizer, tmp_path):
    own = {"encoder_layers": 4, "decoder_layers": 4, "encoder_unique_layers": 2, "decoder_unique_layers": 2}
    rs_model(**config_from_tokenizer(tokenizer), **own, step_embeddings=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        build_model(ModelArguments(model_name_or_path=str(tmp_path), **fields), tokenizer)
    stored = RSMarianConfig.from_pretrained(tmp_path)
    same = {name: getattr(stored, name) for name in fields}
    build_model(ModelArguments(model_name_or_path=str(tmp_path), **same), tokenizer)


def test_embeddings_that_no_token_has_are_not_said_in_training_either(tokenizer, tmp_path):
    fields = config_from_tokenizer(tokenizer)
    sizes = {name: fields[name] + 40 for name in ("vocab_size", "decoder_vocab_size")}
    rs_model(**fields | sizes).save_pretrained(tmp_path)
    model = build_model(ModelArguments(model_name_or_path=str(tmp_path)), tokenizer)
    torch.nn.init.normal_(model.lm_head.weight[-40:], std=5)  # which would win
    decoding = DecodingArguments(num_beams=1, max_new_tokens=8)
    assert translate(model.eval(), tokenizer, ["a b c"], decoding, progress=False)


def test_options_under_which_a_checkpoint_stays_the_same_function_are_taken(tokenizer, tmp_path):
    own = {"encoder_layers": 2, "decoder_layers": 2, "encoder_unique_layers": 2, "decoder_unique_layers": 2}
    rs_model(**config_from_tokenizer(tokenizer), **own, activation_function="swish").save_pretrained(tmp_path)
    deeper = {"encoder_layers": 4, "encoder_layer_sharing": "sequence", "activation_function": "silu"}
    model = build_model(ModelArguments(model_name_or_path=str(tmp_path), **deeper), tokenizer)
    assert model.config.encoder_layer_map == [0, 0, 1, 1]


def test_sides_that_share_their_layers_are_made_by_a_collapse_alone(trained, tokenizer):
    arguments = ModelArguments(model_name_or_path=str(trained), tie_encoder_decoder_layers=True)
    with pytest.raises(ValueError, match=r"are not the encoder's; training/collapse\.py with --tie_encoder_decoder"):
        build_model(arguments, tokenizer)
