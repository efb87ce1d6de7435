"""Text out of files as it stands there, every value a string: plain text, jsonl, csv, tsv, parquet, gzipped or not.

Not for what is made of it (`corpus`).
"""

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

FORMS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
ROWS = 1000  # of a parquet file, in memory at a time

# The way to a column: ("en",), or ("translation", "en") for what lies inside one.
Way = tuple[str, ...]


def form_of(file: str) -> str:
    """The ending that says what is in a file, one of `FORMS`, or `""` for plain text; of `a.csv.gz` it is `.csv`."""
    suffix = Path(file.lower().removesuffix(".gz")).suffix
    return suffix if suffix in FORMS else ""


def digest(files: Sequence[str]) -> str:
    """What the contents of files are known by."""
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()


def read_lines(file: str) -> Iterator[str]:
    """The lines of a text file without their ends, LF or CR LF; no other character ends one.

    Raises:
        ValueError: bytes that are not UTF-8, or a damaged gzip file; names file and line.
    """
    return (line.removesuffix("\n").removesuffix("\r") for line in _lines(file))


def columns_of(file: str) -> dict[str, Any]:
    """The names of a file's columns, as a jsonl file's first record has them: what a name has inside is a dict."""
    form = form_of(file)
    if form == ".parquet":
        with _open_parquet(file) as opened:
            fields = list(opened.schema_arrow)
        return {field.name: _inner_names(field.type) for field in fields}
    if form in (".csv", ".tsv"):
        return dict.fromkeys(next(_rows(file), (0, []))[1])
    return next((record for _, record in _objects(file)), {})


def read_columns(file: str, columns: Sequence[Way]) -> Iterator[tuple[str | None, ...]]:
    """The texts of some columns of a jsonl, json, csv, tsv or parquet file, record by record.

    A value is a string, or None where jsonl and parquet have null. Numbers of jsonl are as they are written there.
    A blank line of a csv or tsv file is a record whose fields are empty; of jsonl it is none.

    Raises:
        ValueError: names file and line: a missing column, other fields than the header has, what is no text, what is
            not of the file's form.
    """
    readers = {".parquet": _parquet_texts, ".csv": _table_texts, ".tsv": _table_texts}
    return readers.get(form_of(file), _object_texts)(file, columns)


def _inner_names(arrow: pa.DataType) -> dict[str, None] | None:
    return {field.name: None for field in arrow} if pa.types.is_struct(arrow) else None


def _lines(file: str) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends; without a byte order mark."""
    number = 0
    with open(file, "rb") as plain:
        packed = plain.peek(2)[:2] == b"\x1f\x8b"
        try:
            for number, line in enumerate(gzip.GzipFile(fileobj=plain) if packed else plain, start=1):
                yield str(line, "utf-8-sig" if number == 1 else "utf-8")
        except UnicodeError as error:
            raise ValueError(
                f"{file}, line {number}: byte {error.object[error.start]:#04x} is not UTF-8: convert the file, or "
                "unpack it if it is compressed (gzip alone is read)"
            ) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{file} is a gzip file that is damaged after line {number} ({error})") from error


def _table_texts(file: str, columns: Sequence[Way]) -> Iterator[tuple[str, ...]]:
    rows = _rows(file)
    _, header = next(rows, (0, []))
    for name in map(".".join, columns):
        if name not in header:
            raise ValueError(f"{file}: there is no {name!r}")
    positions = [header.index(".".join(way)) for way in columns]
    for number, row in rows:
        if row in ([], [""]):
            row = [""] * len(header)
        if len(row) != len(header):
            fields = f"{len(row)} field{'s' * (len(row) > 1)}"
            raise ValueError(f"{file}, line {number}: {fields}, the header has {len(header)}")
        yield tuple([row[position] for position in positions])


def _rows(file: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv file (RFC 4180) or tsv file (a tab ends a field, nothing is quoted), the header first.

    Each comes after the line that it begins in.
    """
    if form_of(file) == ".tsv":
        rows = ((number, line.split("\t")) for number, line in enumerate(read_lines(file), start=1))
    else:
        rows = _csv_rows(file)
    first = next(rows, None)
    if first is None:
        return
    twice = [name for name in first[1] if first[1].count(name) > 1]
    if twice:
        raise ValueError(f"{file} has two columns {twice[0]!r}")
    yield first
    yield from rows


def _csv_rows(file: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(_lines(file), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            end = reader.line_num
            place = f"line {start}" if start == end else f"lines {start} to {end}"
            raise ValueError(
                f"{file}, {place}: not CSV ({error}). A field with a quotation mark or a line break in it stands in "
                "quotation marks, and each inside is written twice; text without quoting is tsv"
            ) from error
        yield start, row


def _object_texts(file: str, columns: Sequence[Way]) -> Iterator[tuple[str | None, ...]]:
    for place, record in _objects(file):
        yield tuple([_text(record, way, f"{file}, {place}") for way in columns])


def _objects(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file with one a line, or with one list of them."""
    lines = ((number, line) for number, line in enumerate(read_lines(file), start=1) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        values = _json("\n".join([first[1], *(line for _, line in lines)]), file, first[0])
        found = ((f"record {number}", value) for number, value in enumerate(values, start=1))
    else:
        found = ((f"line {number}", _json(line, file, number)) for number, line in chain([first], lines))
    for place, value in found:
        if not isinstance(value, dict):
            raise ValueError(f"{file}, {place}: must be an object ({{…}}), got {json.dumps(value)[:80]}")
        yield place, value


def _json(text: str, file: str, number: int) -> Any:
    """What JSON says; numbers as they are written. `number` is the line that it begins in."""
    try:
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=_refuse_constant)
    except ValueError as error:
        line = number + getattr(error, "lineno", 1) - 1
        raise ValueError(f"{file}, line {line}: not JSON ({getattr(error, 'msg', error)})") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no value there")


def _text(record: Any, way: Way, where: str) -> str | None:
    value = record
    for name in way:
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"{where}: there is no {'.'.join(way)!r}")
        value = value[name]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {'.'.join(way)!r} must be text, got {json.dumps(value)[:80]}")
    if value is not None and not value.isascii():
        try:
            value.encode()
        except UnicodeError as error:
            raise ValueError(f"{where}: {'.'.join(way)!r} has half a surrogate pair, which is no character") from error
    return value


def _open_parquet(file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is not a parquet file, or damaged ({error})") from error


def _parquet_texts(file: str, columns: Sequence[Way]) -> Iterator[tuple[str | None, ...]]:
    row = 0
    with _open_parquet(file) as opened:
        for way in columns:
            _check_parquet_column(opened.schema_arrow, way, file)
        try:
            for batch in opened.iter_batches(ROWS, columns=[".".join(way) for way in columns]):
                yield from zip(*(_parquet_column(batch, way).to_pylist() for way in columns), strict=True)
                row += len(batch)
        except UnicodeError as error:
            raise ValueError(f"{file}, after row {row}: text that is not UTF-8") from error
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file} is damaged after row {row} ({error})") from error


def _check_parquet_column(schema: pa.Schema, way: Way, file: str) -> None:
    fields: Iterable[pa.Field] = schema
    for name in way:
        field = next((field for field in fields if field.name == name), None)
        if field is None:
            raise ValueError(f"{file}: there is no {'.'.join(way)!r}")
        fields = field.type if pa.types.is_struct(field.type) else ()
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(test(kind) for test in tests):
        raise ValueError(f"{file}: {'.'.join(way)!r} must be text, it is {field.type}")


def _parquet_column(batch: pa.RecordBatch, way: Way) -> pa.Array:
    column = batch.column(way[0])
    return pc.struct_field(column, list(way[1:])) if way[1:] else column
