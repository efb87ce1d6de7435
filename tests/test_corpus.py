"""Corpora: every input form, checked columns, filters that count."""

import csv
import json
import logging
import math
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset

from rs_transformer.corpus import (
    CorpusArguments,
    PairFilter,
    load_evaluation_splits,
    load_split,
    prepare_training_pairs,
    warn_of_long_pairs,
    warn_of_overlap,
)

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


@pytest.fixture
def said(caplog, monkeypatch):
    """What the package logs."""
    monkeypatch.setattr(logging.getLogger("rs_transformer"), "propagate", True)
    caplog.set_level("INFO", logger="rs_transformer")
    return caplog


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "text", "folder"])
def test_a_file_edited_to_the_same_size_and_time_is_read_again(tmp_path, form):
    fields = write(tmp_path, "csv" if form == "folder" else form)
    if form == "folder":
        fields = {"dataset_name": str(tmp_path)}
    assert rows(load_split(arguments(**fields), "train")) == PAIRS
    for file in tmp_path.iterdir():
        times = file.stat().st_atime_ns, file.stat().st_mtime_ns
        file.write_text(file.read_text().replace("cats", "dogs").replace("猫", "犬"))
        os.utime(file, ns=times)
    assert rows(load_split(arguments(**fields), "train")) == [("犬が好きです。", "i like dogs."), *PAIRS[1:]]


@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_a_folder_of_tables_is_read_as_text(tmp_path, form):
    for split, line in (("train", "007,None"), ("test", "1e5,null")):
        (tmp_path / f"{split}.{form}").write_text(f"ja,en\n{line}\n".replace(",", "," if form == "csv" else "\t"))
    args = arguments(dataset_name=str(tmp_path))
    assert [rows(load_split(args, split)) for split in ("train", "test")] == [[("007", "None")], [("1e5", "null")]]
    with pytest.raises(ValueError, match="Unknown split"):
        load_split(args, "validation")
    # Whatever else is in the folder: tsv has no quoting.
    (tmp_path / f"train.{form}").write_text('ja\ten\n"x\ty\n' if form == "tsv" else "ja,en\nx,y\n")
    assert load_evaluation_splits(args).keys() == {"test"}
    # A card that has the reader's options is obeyed, and what `datasets` makes a number of is refused.
    (tmp_path / "train.csv").write_text("ja;en\n007;None\n")
    card = "configs: [{config_name: default, data_files: train.csv, sep: ;}]"
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.raises(ValueError, match="the train split: 'ja' must be text, the first is 7"):
        load_split(args, "train")


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_the_first_pairs_are_read_without_the_rest(tmp_path, streaming):
    file = tmp_path / "train.parquet"
    table = Dataset.from_dict({"ja": [f"文{n}" for n in range(5000)], "en": ["x"] * 5000}).data.table
    pq.write_table(table, file, row_group_size=2000, compression="none")
    content = file.read_bytes()
    start = pq.ParquetFile(file).metadata.row_group(1).column(0).dictionary_page_offset
    file.write_bytes(content[:start] + b"\xff" * 64 + content[start + 64 :])
    args = arguments(train_file=[str(file)], max_train_samples=3)
    assert rows(load_split(args, "train", streaming)) == [(f"文{n}", "x") for n in range(3)]
    with pytest.raises(ValueError, match=r"train\.parquet is damaged after row 2000"):
        list(load_split(arguments(train_file=[str(file)]), "train", streaming))


def test_the_first_pairs_are_those_of_all_files_together(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.tsv").write_text(f"en\tja\nx\t{name}1\ny\t{name}2\n")
    files = [str(tmp_path / f"{name}.tsv") for name in "ab"]
    for fields, split in (
        ({"train_file": files, "max_train_samples": 3}, "train"),
        ({"validation_file": files, "max_eval_samples": 3}, "validation"),
    ):
        assert rows(load_split(arguments(**fields), split)) == [("a1", "x"), ("a2", "y"), ("b1", "x")]
    assert load_split(arguments(train_file=files), "train", streaming=True).num_shards == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.ja": "一\n二\n", "a.en": "one\n"}, r"are not parallel: .*a\.en ends at line 1, the other goes on"),
        ({"a.docx": "x"}, r"takes \.jsonl, \.json, \.csv, \.tsv, \.parquet files of one type"),
        ({"a.csv": "ja,en\na,b\n", "a.tsv": "ja\ten\na\tb\n"}, "files of one type, or two plain-text files"),
        ({"a.txt": "一\n"}, "or two plain-text files"),
        ({"a.en": "one\n", "a.ja": "一\n"}, r"takes the source first, which is ja: exchange .*a\.en and .*a\.ja"),
        ({"a.en.txt": "one\n", "a.ja.txt": "one\n"}, "takes the source first"),
        ({"a.txt": "one\n", "b.txt": "一\n"}, "look exchanged: what should be ja is 'one', what should be en is '一'"),
        ({"a.jsonl": '{"ja": "one", "en": "一"}\n'}, "source and target of the train split look exchanged"),
        ({"a.csv": ""}, r"a\.csv is empty"),
        ({"a.csv": "ja,en\n"}, r"there is no pair in .*a\.csv"),
        ({"a.ja": "", "a.en": ""}, r"there is no pair in .*a\.ja .*a\.en"),
        ({"a.jsonl": '{"ja": "a", "en": true}\n'}, r"a\.jsonl, line 1: 'en' must be text, got true"),
        (
            {"a.jsonl": '{"text": "x"}\n'},
            "neither a `translation` column nor columns 'ja' and 'en'; its columns: text",
        ),
        ({"a.jsonl": '{"translation": {"de": "x", "en": "y"}}\n'}, "no language 'ja'; its languages: de, en"),
    ],
)
def test_data_that_does_not_fit_is_refused_with_what_there_is(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_split(arguments(train_file=[str(tmp_path / name) for name in files]), "train")


def test_a_file_that_is_given_twice_is_refused(tmp_path):
    (tmp_path / "a.ja").write_text("一\n")
    (tmp_path / "link").symlink_to(tmp_path / "a.ja")
    with pytest.raises(ValueError, match=r"train_file names '.*link' twice"):
        load_split(arguments(train_file=[str(tmp_path / "a.ja"), str(tmp_path / "link")]), "train")


@pytest.mark.parametrize(
    ("source_lang", "target_lang", "pair"),
    [
        ("ja", "zh", ("猫が好きです。", "我喜欢猫。")),
        ("jpn_Jpan", "eng_Latn", ("ＯＫ", "ok")),
        ("ja-Latn", "ja", ("neko", "猫")),
        ("ru", "uk", ("кошка", "кішка")),
        ("de", "en", ("Katze", "cat")),
        ("ja", "en", ("", "")),
        ("ja", "en", ("１２３", "123")),
    ],
)
def test_sides_that_are_in_order_are_taken(tmp_path, source_lang, target_lang, pair):
    (tmp_path / "a.jsonl").write_text(json.dumps({"source": pair[0], "target": pair[1]}) + "\n")
    args = CorpusArguments(source_lang, target_lang, train_file=[str(tmp_path / "a.jsonl")])
    assert rows(load_split(args, "train")) == [pair]


def test_texts_that_are_missing_blank_or_broken_are_said_before_the_work(tmp_path, said):
    file = tmp_path / "a.jsonl"

    def load(split, *pairs):
        file.write_text("".join(json.dumps({"ja": ja, "en": en}) + "\n" for ja, en in pairs))
        return rows(load_split(arguments(**{f"{split}_file": [str(file)]}), split))

    pairs = [("一", "one"), ("\u3000", "two"), ("三", "three\nfour")]
    for split in ("train", "test"):
        assert load(split, *pairs) == pairs
        assert f"The target of 1 {split} pairs has a line break in it, first in row 3." in said.text
    assert "The source of 1 test pairs is blank, first in row 2." in said.text
    assert load("train", ("一", None), ("二", "two")) == [("一", None), ("二", "two")]  # the filter counts these
    with pytest.raises(ValueError, match="the target of 2 test pairs is missing, first in row 1: leave the pairs out"):
        load("test", ("一", None), ("二", "two"), ("三", None))
    load("test", ("une", "cafe\u0301"), ("deux", "caf\u00e9"))
    assert "The target of 1 test pairs is not in Unicode's normal form C" in said.text
    load("test", ("a", "a"))
    assert "Source and target of the test split are the same text" in said.text


def test_evaluation_pairs_that_are_training_pairs_are_counted(said):
    def dataset(*pairs):
        return Dataset.from_list([{"source": source, "target": target} for source, target in pairs])

    train = dataset(("一", "one"), ("二", None), ("三", "three"), ("四", "4"))
    splits = {"validation": dataset(("五", "five")), "test": dataset(("三", "three"), ("三", "three"), ("四", "four"))}
    warn_of_overlap(train, splits)
    assert "1 of 2 different test pairs (50.0%) are training pairs, too, as '三'" in said.text
    assert "validation" not in said.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_train_samples", 0),
        ("max_eval_samples", -1),
        ("preprocessing_num_workers", 0),
        ("max_source_length", 0),
        ("max_length_ratio", 0.5),
        ("max_length_ratio", math.nan),
        ("max_length_ratio", math.inf),
    ],
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be (at least 1|a finite number), got {value}"):
        arguments(**{name: value})


def test_one_column_for_both_sides_is_refused():
    with pytest.raises(ValueError, match="source_column and target_column are both 'text'"):
        arguments(source_column="text", target_column="text")


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
def test_left_out_pairs_are_counted_in_the_log(tokenizer, tmp_path, said, streaming):
    pairs = [("a b", "b a"), ("a", ""), ("a " * 30, "a"), ("a b c d e f g h", "a")]
    pairs += [*[("c d", "d c")] * 5, ("", "a")]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"ja": ja, "en": en}) + "\n" for ja, en in pairs))
    args = arguments(train_file=[str(file)], max_source_length=20, max_length_ratio=3)
    kept = list(prepare_training_pairs(load_split(args, "train", streaming), tokenizer, args))
    assert [set(row) for row in kept] == [{"input_ids", "labels", "length"}] * 6
    assert [tokenizer.decode(row["labels"], skip_special_tokens=True) for row in kept] == ["b a", *["d c"] * 5]
    assert kept[0]["labels"][-1] == tokenizer.eos_token_id
    assert "6 of 10 kept" in said.text
    for reason in ("1 empty source", "1 empty target", "1 source over 20 tokens", "1 length ratio over 3"):
        assert reason in said.text


def test_of_a_dataset_that_streams_nothing_is_copied(tmp_path, monkeypatch):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("ja;en\n猫;cat\n犬;dog\n")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  sep: ;\n  data_files:\n  - {split: train, path: train.csv}\n"
        "  - {split: test, path: test.csv}\n---\n"
    )
    monkeypatch.setattr("datasets.builder.DatasetBuilder.download_and_prepare", None)
    args = arguments(dataset_name=str(tmp_path), streaming=True)
    assert rows(load_split(args, "train", streaming=True)) == [("猫", "cat"), ("犬", "dog")]
    found = load_evaluation_splits(args)
    assert {split: rows(pairs) for split, pairs in found.items()} == {"test": [("猫", "cat"), ("犬", "dog")]}


def test_a_prepared_stream_can_be_given_to_workers_that_are_not_forked(tokenizer):
    stream = Dataset.from_list([{"source": "a b", "target": "b a"}] * 3).to_iterable_dataset()
    prepared = prepare_training_pairs(stream, tokenizer, arguments())
    assert len(list(pickle.loads(pickle.dumps(prepared)))) == 3


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_pairs_are_no_longer_than_the_positions_and_none_left_says_why(tokenizer, streaming):
    pairs = Dataset.from_list([{"source": "a " * 30, "target": "a"}] * 2 + [{"source": None, "target": "a"}])
    dataset = pairs.to_iterable_dataset() if streaming else pairs
    args = arguments(max_length_ratio=50)
    assert len(list(prepare_training_pairs(dataset, tokenizer, args))) == 2
    message = "no training pair is left of 3: 2 source over 20 tokens, 1 empty source"
    with pytest.raises(ValueError, match=message):
        prepare_training_pairs(dataset, tokenizer, args, positions=20)


def test_evaluation_pairs_longer_than_the_positions_are_named(tokenizer, said):
    splits = {"test": Dataset.from_list([{"source": "a", "target": "b"}, {"source": "a", "target": "b " * 30}])}
    warn_of_long_pairs(splits, tokenizer, positions=20)
    assert "The target of 1 test pairs, first in row 2, is longer than the 20 tokens" in said.text
    assert "source" not in said.text


def test_of_fewer_pairs_than_are_asked_for_all_are_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(Dataset, "take", lambda self, number: self.select(range(number)))  # as datasets 4.0 has it
    given = write(tmp_path, "csv") | {"max_train_samples": 500}
    assert rows(load_split(arguments(**given), "train")) == PAIRS


def test_synthetic_files_may_be_of_several_types_and_columns(tmp_path):
    given = write(tmp_path, "text")
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"source": "鳥", "target": "a bird"}) + "\n")
    synthetic = [*write(tmp_path, "csv")["train_file"], str(more), *write(tmp_path, "text")["train_file"]]
    train = load_split(arguments(**given, synthetic_file=synthetic), "train")
    assert rows(train) == [*PAIRS, *PAIRS, *PAIRS, ("鳥", "a bird")]
    with pytest.raises(ValueError, match=r"synthetic_file names .* twice"):
        load_split(arguments(**given, synthetic_file=[str(more), str(more)]), "train")


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_large_strings_and_exchanged_columns_of_a_dataset_are_text_of_these_sides(tmp_path, streaming):
    sides = zip(("target", "source"), zip(*PAIRS, strict=True), strict=True)
    table = pa.table({name: pa.array(side, pa.large_string()) for name, side in sides})
    (tmp_path / "data").mkdir()
    Dataset(table).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    names = {"source_column": "target", "target_column": "source", "streaming": streaming}
    corpus = load_split(arguments(dataset_name=str(tmp_path / "data"), **names), "train")
    assert rows(corpus) == PAIRS
    if not streaming:
        warn_of_overlap(corpus, {"test": load_split(arguments(**write(tmp_path, "jsonl")), "train")})
