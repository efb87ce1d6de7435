"""SentencePiece training to MarianTokenizer folders."""

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianTokenizer

from rs_transformer.corpus import CorpusArguments, load_split
from rs_transformer.tokenization import train_tokenizer
from rs_transformer.training.model import ModelArguments, build_model

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


def test_an_empty_corpus_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no SentencePiece model of the ja side"):
        train_tokenizer(["", " "], ["", ""], tmp_path, **LANGUAGES)


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
    from oracle import rs_model, unrolled_marian

    unrolled_marian(rs_model()).save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), layer_sharing="cycle")
    with pytest.raises(ValueError, match="is a marian model, which has no layer_sharing"):
        build_model(arguments, tokenizer)
