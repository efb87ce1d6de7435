"""Corpora: every input form, checked columns, filters that count."""

import csv
import json
import logging

import pytest
from datasets import Dataset, IterableDataset

from rs_transformer.corpus import CorpusArguments, PairFilter, load_split, prepare_training_pairs

PAIRS = [("猫が好きです。", "i like cats."), ("犬。", "a dog."), ("雨\u2028だ。", "it rains.")]


def arguments(**fields) -> CorpusArguments:
    return CorpusArguments(**{"source_lang": "ja", "target_lang": "en", **fields})


def rows(dataset) -> list[tuple[str, str]]:
    return [(row["source"], row["target"]) for row in dataset]


def write(folder, form: str) -> dict:
    """PAIRS in one of the input forms; the arguments that name them."""
    translations = [{"translation": {"en": en, "ja": ja, "fr": "-"}} for ja, en in PAIRS]
    file = folder / f"train.{form.split('-')[0]}"
    if form == "jsonl":
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in translations))
    elif form == "parquet":
        Dataset.from_list(translations).to_parquet(file)
    elif form in ("csv", "tsv", "csv-columns"):
        names = ("quelle", "ziel") if form == "csv-columns" else ("ja", "en")
        with file.open("w", newline="") as opened:
            writer = csv.writer(opened, delimiter="\t" if form == "tsv" else ",")
            writer.writerows([("number", *names), *((i, *pair) for i, pair in enumerate(PAIRS))])
        if form == "csv-columns":
            return {"train_file": [str(file)], "source_column": "quelle", "target_column": "ziel"}
    elif form == "text":
        files = [folder / "train.ja", folder / "train.en"]
        for side, path in enumerate(files):
            path.write_text("".join(pair[side] + "\n" for pair in PAIRS))
        return {"train_file": [str(path) for path in files]}
    elif form == "folder":
        (folder / "data").mkdir()
        Dataset.from_list(translations).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
        return {"dataset_name": str(folder / "data")}
    return {"train_file": [str(file)]}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("form", ["jsonl", "parquet", "csv", "tsv", "csv-columns", "text", "folder"])
def test_every_input_form_gives_the_same_pairs_in_order(tmp_path, form, streaming):
    dataset = load_split(arguments(**write(tmp_path, form)), "train", streaming=streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert rows(dataset) == PAIRS


def test_an_edited_text_file_is_read_again(tmp_path):
    fields = write(tmp_path, "text")
    assert len(load_split(arguments(**fields), "train")) == 3
    for name, text in (("train.ja", "一\n"), ("train.en", "one\n")):
        (tmp_path / name).write_text(text)
    assert rows(load_split(arguments(**fields), "train")) == [("一", "one")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.ja": "一\n二\n", "a.en": "one\n"}, r"are not parallel: .*a\.en ends at line 1, the other goes on"),
        ({"a.docx": "x"}, r"takes \.jsonl, \.json, \.csv, \.tsv, \.parquet files of one type"),
        (
            {"a.jsonl": '{"text": "x"}\n'},
            "neither a `translation` column nor columns 'ja' and 'en'; its columns: text",
        ),
        ({"a.jsonl": '{"translation": {"de": "x", "en": "y"}}\n'}, "no language 'ja'; its languages: de, en"),
    ],
    ids=["unequal-lengths", "file-type", "no-column", "no-language"],
)
def test_data_that_does_not_fit_is_refused_with_what_there_is(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_split(arguments(train_file=[str(tmp_path / name) for name in files]), "train")


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (("a", "b", 5, 5), ""),
        (("", "b", 1, 5), "empty source"),
        (("a", "  ", 5, 1), "empty target"),
        (("a", None, 5, 1), "empty target"),
        (("a", "b", 11, 10), "source over 10 tokens"),
        (("a", "b", 10, 21), "target over 20 tokens"),
        (("a", "b", 2, 7), "length ratio over 3"),
        (("a", "b", 6, 2), ""),
    ],
)
def test_pairs_are_left_out_for_a_reason(pair, reason):
    assert PairFilter(10, 20, 3.0).reason(*pair) == reason


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_left_out_pairs_are_counted_in_the_log(tokenizer, tmp_path, caplog, monkeypatch, streaming):
    pairs = [("a b", "b a"), ("", "a"), ("a", ""), ("a " * 30, "a"), ("a b c d e f g h", "a")]
    pairs += [("c d", "d c")] * 5
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"ja": ja, "en": en}) + "\n" for ja, en in pairs))
    args = arguments(train_file=[str(file)], max_source_length=20, max_length_ratio=3)
    monkeypatch.setattr(logging.getLogger("rs_transformer"), "propagate", True)
    with caplog.at_level("INFO", logger="rs_transformer"):
        kept = list(prepare_training_pairs(load_split(args, "train", streaming), tokenizer, args))
    assert [set(row) for row in kept] == [{"input_ids", "labels", "length"}] * 6
    assert [tokenizer.decode(row["labels"], skip_special_tokens=True) for row in kept] == ["b a", *["d c"] * 5]
    assert kept[0]["labels"][-1] == tokenizer.eos_token_id
    assert "6 of 10 kept" in caplog.text
    for reason in ("1 empty source", "1 empty target", "1 source over 20 tokens", "1 length ratio over 3"):
        assert reason in caplog.text
