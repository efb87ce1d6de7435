"""Text out of files: what was written is what is read, and what is no text is named with its file and line."""

import csv
import gzip
import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rs_transformer.corpus import read_sentences
from rs_transformer.utils.text_files import columns_of, read_columns

# Characters that readers like to take for line ends, missing values, numbers, quoting, or nothing at all.
ODD = ["\r", "\n", "\t", '"', '""', "'", ",", "\\", "\0", "\x0b", "\x1c", "\u0085", "\u2028", "\ufeff", "\u200b", " "]
ODD += ["None", "null", "NA", "nan", "N/A", "#N/A", "007", "1e5", "-0.0", "True", "2020-01-01", "</s>", "😀", "é", "é"]
TEXTS = st.text() | st.lists(st.sampled_from(ODD)).map("".join)
FUZZ = settings(max_examples=60, deadline=None, derandomize=True, database=None)
PLAIN = TEXTS.map(lambda text: text.replace("\n", "").rstrip("\r"))
UNTABBED = PLAIN.map(lambda text: text.replace("\t", ""))


def as_csv(rows) -> bytes:
    written = io.StringIO(newline="")
    csv.writer(written).writerows([("ja", "en"), *rows])
    return written.getvalue().encode()


def as_parquet(rows) -> bytes:
    written = io.BytesIO()
    columns = {name: pa.array([row[side] for row in rows], pa.string()) for side, name in enumerate(("ja", "en"))}
    pq.write_table(pa.table(columns), written)
    return written.getvalue()


FORMS = {
    "jsonl": (
        TEXTS,
        lambda rows: "".join(
            json.dumps({"ja": ja, "en": en}, ensure_ascii=len(ja) % 2 == 0) + "\n" for ja, en in rows
        ).encode(),
    ),
    "json": (TEXTS, lambda rows: json.dumps([{"ja": ja, "en": en} for ja, en in rows], indent=1).encode()),
    "csv": (TEXTS, as_csv),
    "tsv": (UNTABBED, lambda rows: "".join(f"{ja}\t{en}\n" for ja, en in [("ja", "en"), *rows]).encode()),
    "parquet": (TEXTS, as_parquet),
    "txt": (PLAIN, lambda rows: "".join(f"{ja}\n" for ja, _ in rows).encode()),
}
PACKED = [form for form in FORMS if form != "parquet"]


@pytest.mark.parametrize("form", [*FORMS, *(f"{form}.gz" for form in PACKED)])
def test_what_is_written_is_read_back_line_for_line(form, tmp_path):
    texts, write = FORMS[form.removesuffix(".gz")]
    file = tmp_path / f"texts.{form}"

    @FUZZ
    @given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
    def round_trip(rows):
        if form.startswith("txt"):  # a mark at the very beginning says how the file is encoded
            rows = [(rows[0][0].lstrip("\ufeff"), rows[0][1]), *rows[1:]]
        written = write(rows)
        file.write_bytes(gzip.compress(written, 1, mtime=0) if form.endswith(".gz") else written)
        assert read_sentences(str(file), "ja") == [ja for ja, _ in rows]
        if not form.startswith("txt"):
            assert list(read_columns(str(file), [("en",), ("ja",)])) == [(en, ja) for ja, en in rows]

    round_trip()


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", b"a\r\n\r\n \nb", ["a", "", " ", "b"]),
        ("a.txt", "\ufeff\n\u200b\n\u3000\n".encode(), ["", "\u200b", "\u3000"]),
        ("a.csv", b"source\na\n\nb\n", ["a", "", "b"]),
        ("a.csv", b'\xef\xbb\xbfid,source\r\n1,"a\r\n""b"""\r\n\r\n2,c', ['a\r\n"b"', "", "c"]),
        ("a.TSV", b'id\tsource\n1\t"a\n\n2\t"b"\n', ['"a', "", '"b"']),
        ("a.tsv", b"source\n\n7\n", ["", "7"]),
        ("a.jsonl", b'\xef\xbb\xbf{"source": 1e5}\n\n{"source": -0.50}\n{"source": "true"}', ["1e5", "-0.50", "true"]),
        ("a.json", b'[\n{"source": "2020-01-01"},\n{"source": "\\u2028"}]', ["2020-01-01", "\u2028"]),
        ("a.csv", gzip.compress(b"source\na\n", mtime=0), ["a"]),
    ],
)
def test_a_line_is_a_text_as_it_stands(name, content, texts, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read_sentences(str(tmp_path / name), "source") == texts


def test_columns_are_called_as_the_header_calls_them(tmp_path):
    (tmp_path / "a.csv").write_text("null,NA,007,\nNone,nan,1e5,x\n")
    assert list(columns_of(str(tmp_path / "a.csv"))) == ["null", "NA", "007", ""]
    assert list(read_columns(str(tmp_path / "a.csv"), [("007",), ("null",), ("",)])) == [("1e5", "None", "x")]


JSON = b'{"source": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"a\nb\n\xff\xfe\n", r"a\.txt, line 3: byte 0xff is not UTF-8: convert the file, or unpack it"),
        ("a.txt", "a\n".encode("utf-16"), r"a\.txt, line 1: byte 0xff is not UTF-8"),
        (
            "a.txt",
            gzip.compress(random.Random(0).randbytes(99).hex().encode())[:-20],
            r"a\.txt is a gzip file",
        ),
        ("a.csv", b"source,b\na,b\nc,caf\xe9\n", r"a\.csv, line 3: byte 0xe9"),
        ("a.csv", b'source,b\n"a,b\nc,d\n"e,f\n', r"a\.csv, lines 2 to 4: not CSV \(',' expected after '\"'\)"),
        ("a.csv", b'source,b\n\n"a,b\nc,d\n', r"a\.csv, lines 3 to 4: not CSV \(unexpected end of data\)"),
        ("a.csv", b"source,b\na\rb,c\n", r"a\.csv, line 2: not CSV"),
        ("a.csv", b"source,b\na,b,c\n", r"a\.csv, line 2: 3 fields, the header has 2"),
        ("a.tsv", b"source\tb\na\tb\nc\n", r"a\.tsv, line 3: 1 field, the header has 2"),
        ("a.tsv", b"source\tsource\na\tb\n", r"a\.tsv has two columns 'source'"),
        ("a.tsv", b"b\tc\na\tb\n", r"a\.tsv has no column 'source'; its columns: b, c"),
        ("a.csv", b"source\n", r"a\.csv is empty"),
        ("a.jsonl", b"", r"a\.jsonl is empty"),
        ("a.jsonl", JSON + b'\n{"source": \n', r"a\.jsonl, line 3: not JSON \(Expecting value\)"),
        ("a.jsonl", JSON + b'{"source": NaN}\n', r"a\.jsonl, line 2: not JSON \(NaN is no value there\)"),
        ("a.jsonl", JSON + b'{"source": true}\n', r"a\.jsonl, line 2: 'source' must be text, got true"),
        ("a.jsonl", JSON + b'{"source": ["a"]}\n', r"a\.jsonl, line 2: 'source' must be text, got \[\"a\"\]"),
        ("a.jsonl", JSON + b'{"b": "a"}\n', r"a\.jsonl, line 2: there is no 'source'"),
        ("a.jsonl", JSON + b'{"source": null}\n', r"a\.jsonl: 'source' is missing in record 2"),
        ("a.jsonl", b'{"source": "\\udc00"}\n', r"a\.jsonl, line 1: 'source' has half a surrogate pair"),
        ("a.jsonl", JSON + b'"a"\n', r"a\.jsonl, line 2: must be an object"),
        ("a.json", b'[{"source": "a"},\n{"source": b}]', r"a\.json, line 2: not JSON"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet is not a parquet file, or damaged"),
    ],
)
def test_what_is_no_text_is_named_with_its_place(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_sentences(str(tmp_path / name), "source")


def test_numbers_of_a_parquet_file_are_refused(tmp_path):
    pq.write_table(pa.table({"source": [1, 2], "b": pa.array(["x", "y"]).dictionary_encode()}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: 'source' must be text, it is int64"):
        read_sentences(str(tmp_path / "a.parquet"), "source")
    assert read_sentences(str(tmp_path / "a.parquet"), "b") == ["x", "y"]
