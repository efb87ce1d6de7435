"""pipeline("translation") with the package imported: as transformers 4 had it, for RSMarian and stock Marian."""

import logging

import pytest
import torch
from oracle import unrolled_marian
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BertConfig, BertForMaskedLM, GenerationConfig, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from rs_transformer import TranslationPipeline
from rs_transformer.pipeline_rs_marian import is_blank, split_into_sentences

SENTENCES = ["a b c", "d e f g", "h i", "j k l a b"]
BACKWARDS = ["c b a", "g f e d", "i h", "b a l k j"]


@pytest.fixture(scope="module")
def translator(trained):
    return pipeline("translation", model=str(trained))


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


@pytest.mark.parametrize("batch_size", [1, 4])
def test_long_text_is_split_into_sentences_and_joined(translator, warnings, batch_size):
    def by_semicolon(line):
        return [part for part in line.split("; ") if part]

    text = "a b c; d e f g\n\nh i; j k l a b"
    (record,) = translator(text, split_sentences=by_semicolon, batch_size=batch_size)
    assert record["translation_text"] == "c b a g f e d\n\ni h b a l k j"
    pair = translator([text, "a b c"], split_sentences=by_semicolon, batch_size=batch_size)
    assert texts(pair) == ["c b a g f e d\n\ni h b a l k j", "c b a"]
    assert not warnings.records


@pytest.mark.parametrize(
    ("line", "sentences"),
    [
        ("It rains. Does it? Yes!", ["It rains.", "Does it?", "Yes!"]),
        ("Mr. Smith saw J. Doe, i.e. her. Then he left.", ["Mr. Smith saw J. Doe, i.e. her.", "Then he left."]),
        ("Version 3.5 is out. Get it.", ["Version 3.5 is out.", "Get it."]),
        ('He said "No." She left.', ['He said "No."', "She left."]),
        ("猫が好きです。犬も好きですか？はい！", ["猫が好きです。", "犬も好きですか？", "はい！"]),
        ("「はい。」と言った。帰った。", ["「はい。」と言った。", "帰った。"]),
        ("no stop", ["no stop"]),
        ("  ", []),
    ],
)
def test_sentences_end_where_a_reader_sees_them_end(line, sentences):
    assert split_into_sentences(line) == sentences


def test_blank_text_gives_an_empty_translation(translator):
    assert texts(translator(["", " ", "a b"], batch_size=2)) == ["", "", "b a"]


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


def test_blank_is_judged_by_tokens_alone_where_the_text_is_not_there(tokenizer):
    vocabulary = tokenizer.get_vocab()
    begin, end, unknown = vocabulary["▁"], tokenizer.eos_token_id, tokenizer.unk_token_id
    for blank in ([end], [begin, end, tokenizer.pad_token_id], torch.tensor([begin, end])):
        assert is_blank(tokenizer, blank)
    for shown in ([begin, unknown, end], [vocabulary["▁a"], end]):
        assert not is_blank(tokenizer, shown)


def test_what_is_not_text_is_refused_with_the_mend(translator):
    with pytest.raises(ValueError, match=r"translation takes text, got dict.*KeyDataset"):
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
