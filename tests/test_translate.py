"""`translate`: whatever the lines of a file hold, each has its line in the output."""

import copy
import json

import pytest
from conftest import script
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from rs_transformer.attention.collection import collect_attention
from rs_transformer.commands.translate import TranslateArguments, translate_file
from rs_transformer.decoding import IDS_ALONE, DecodingArguments, translate
from rs_transformer.tokenization import encode

BLANK = ["", " ", "\t", "\u200b", "\ufeff"]
LINES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=8), st.sampled_from(BLANK)
)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    lines=st.lists(LINES, min_size=1, max_size=6), form=st.sampled_from(["txt", "jsonl"]), chunk_size=st.integers(1, 4)
)
@example(lines=["a\x0bb", "c\u2028d", "\x85", "</s>", "<pad> a", ""], form="txt", chunk_size=2)
@example(lines=["a\nb", "c\r\nd", "\u2028"], form="jsonl", chunk_size=2)
def test_as_many_lines_come_out_as_go_in(trained, tmp_path, lines, form, chunk_size):
    source, output = tmp_path / f"in.{form}", tmp_path / "out.txt"
    written = lines if form == "txt" else [json.dumps({"source": line}) for line in lines]
    source.write_bytes("".join(f"{line}\n" for line in written).encode())
    args = TranslateArguments(str(trained), str(source), str(output), chunk_size=chunk_size, overwrite=True)
    translate_file(args, DecodingArguments(num_beams=1, max_new_tokens=3))
    translated = output.read_bytes().decode().split("\n")
    assert len(translated) == len(lines) + 1
    for line, translation in zip(lines, translated, strict=False):
        if line in BLANK:
            assert translation == ""
        assert len(translation.splitlines()) <= 1


@pytest.fixture(scope="module")
def loaded(trained):
    return AutoModelForSeq2SeqLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)


def test_texts_may_come_from_any_iterable_but_not_be_one_text(loaded):
    model, tokenizer = loaded
    assert translate(model, tokenizer, (text for text in ("a b", "c d"))) == ["b a", "d c"]
    for read in (lambda text: translate(model, tokenizer, text), lambda text: encode(tokenizer, text)):
        with pytest.raises(TypeError, match="expected a list of texts, got a single one: put it into a list: 'a b'"):
            read("a b")
    with pytest.raises(TypeError, match="got a single one"):
        collect_attention(model, tokenizer, "a b")


def test_a_checkpoint_that_samples_is_searched_greedily(loaded, monkeypatch):
    model, tokenizer = loaded
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=True, temperature=9.0)
    monkeypatch.setattr(model, "generation_config", config)
    texts = ["a b", "c d", "e f g", "h i j k"] * 4
    greedy = DecodingArguments(num_beams=1)
    assert translate(model, tokenizer, texts, greedy) == [" ".join(text.split()[::-1]) for text in texts]


def test_what_lies_where_the_output_grows_is_not_lost(trained, tmp_path):
    news, grown = tmp_path / "news.partial", tmp_path / "other"
    news.write_text("a b\n")
    given = ["--model_name_or_path", trained, "--input_file", news, "--output_file"]
    with pytest.raises(ValueError, match=r"news.partial' would replace what it is made from"):
        script("translate")(*given, tmp_path / "news")
    (tmp_path / "other.partial").write_text("mine\n")
    with pytest.raises(FileExistsError, match=r"other.partial would be written over; move it"):
        script("translate")(*given, grown)
    assert (news.read_text(), (tmp_path / "other.partial").read_text()) == ("a b\n", "mine\n")


def test_a_checkpoint_that_asks_for_more_than_translations_is_translated(loaded, monkeypatch):
    model, tokenizer = loaded
    config = copy.deepcopy(model.generation_config)
    config.update(**dict.fromkeys(IDS_ALONE, True))
    monkeypatch.setattr(model, "generation_config", config)
    assert translate(model, tokenizer, ["a b", "c d"]) == ["b a", "d c"]
    (sentence,) = collect_attention(model, tokenizer, ["a b"])
    assert sentence.output_tokens[:2] == ["▁b", "▁a"]
