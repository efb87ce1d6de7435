"""`map_shards`: the same bytes however often it was stopped and on however many processes."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from forked import fork

from rs_transformer.utils import map_shards as module
from rs_transformer.utils.map_shards import map_shards, read_record

SCHEMA = pa.schema({"text": pa.string(), "twice": pa.string()})
ROWS = Dataset.from_dict({"text": [f"row {number}" for number in range(25)]})


class Killed(BaseException):
    pass


def twice(calls=None, stop_after=None):
    calls = [] if calls is None else calls

    def function(rows, advance):
        if len(calls) == stop_after:
            raise Killed
        calls.append(rows["text"][0])
        advance(len(rows["text"]))
        return {**rows, "twice": [text * 2 for text in rows["text"]]}

    return function


def shards(output, function=None, dataset=ROWS, settings=None, **options):
    settings = settings or {"beam": 5}
    return map_shards(dataset, function or twice(), output, schema=SCHEMA, settings=settings, shard_size=4, **options)


def test_rows_come_in_order_with_a_record(tmp_path):
    file = shards(tmp_path / "out.parquet", origin={"teacher": "t"})
    table = pq.read_table(file).to_pydict()
    assert table == {"text": ROWS["text"][:], "twice": [text * 2 for text in ROWS["text"]]}
    record = read_record(file)
    assert record["settings"] == {"beam": 5, "shard_size": 4, "rows": 25}
    assert record["origins"] == [{"teacher": "t"}]
    assert len(record["digests"]) == 7
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.parquet"]
    assert Dataset.from_parquet(str(file))["twice"][3] == "row 3row 3"


@pytest.mark.parametrize("stop_after", range(7))
def test_a_stopped_run_goes_on_to_the_same_bytes_and_redoes_nothing(tmp_path, stop_after):
    whole = shards(tmp_path / "whole.parquet").read_bytes()
    calls = []
    with pytest.raises(Killed):
        shards(tmp_path / "out.parquet", twice(calls, stop_after))
    assert not (tmp_path / "out.parquet").exists()
    (tmp_path / "out.parquet.shards" / "00000006.parquet.77.tmp").write_bytes(b"half a shard")
    (tmp_path / "out.parquet.77.tmp").write_bytes(b"half a merge")
    assert shards(tmp_path / "out.parquet", twice(calls)).read_bytes() == whole
    assert calls == [f"row {number}" for number in range(0, 25, 4)]
    shards(tmp_path / "out.parquet", twice(calls))  # finished: nothing is done
    assert len(calls) == 7
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.parquet", "whole.parquet"]


def test_a_kill_between_merge_and_cleaning_up_is_mended(tmp_path):
    file = shards(tmp_path / "out.parquet")
    left = tmp_path / "out.parquet.shards"
    left.mkdir()
    (left / "00000000.parquet").write_bytes(b"")
    shards(file, twice([], 0))
    assert not left.exists()


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_or_rows_are_refused(tmp_path, finished):
    output = tmp_path / "out.parquet"
    if finished:
        shards(output)
    else:
        with pytest.raises(Killed):
            shards(output, twice([], 3))
    with pytest.raises(ValueError, match="made with beam=5, now it is 4: go on with the former"):
        shards(output, settings={"beam": 4})
    with pytest.raises(ValueError, match="made with rows=25, now it is 24"):
        shards(output, dataset=ROWS.take(24))
    changed = Dataset.from_dict({"text": [*ROWS["text"][:9], "another", *ROWS["text"][10:]]})
    with pytest.raises(ValueError, match="from other data: rows 8 to 11 differ"):
        shards(output, dataset=changed)


def test_versions_of_every_part_are_recorded(tmp_path):
    with pytest.raises(Killed):
        shards(tmp_path / "out.parquet", twice([], 3), origin={"torch": "1"})
    file = shards(tmp_path / "out.parquet", origin={"torch": "2"})
    assert read_record(file)["origins"] == [{"torch": "1"}, {"torch": "2"}]
    with pytest.raises(Killed):
        shards(tmp_path / "other.parquet", twice([], 0), origin={"torch": "1"})
    file = shards(tmp_path / "other.parquet", origin={"torch": "2"})
    assert read_record(file)["origins"] == [{"torch": "2"}]  # the first start made nothing


def test_a_full_disk_keeps_finished_shards_and_names_the_file(tmp_path, monkeypatch):
    write_table, written = pq.write_table, []

    def full(table, file):
        write_table(table, file)
        written.append(file)
        if len(written) == 3:
            raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(module.pq, "write_table", full)
    calls = []
    with pytest.raises(OSError, match=r"00000002.parquet could not be written \(No space left on device\)"):
        shards(tmp_path / "out.parquet", twice(calls))
    left = sorted(entry.name for entry in (tmp_path / "out.parquet.shards").iterdir())
    assert left == ["00000000.parquet", "00000001.parquet", "lock", "settings.json"]
    monkeypatch.undo()
    shards(tmp_path / "out.parquet", twice(calls))
    assert len(calls) == 8  # the third shard twice


SHARED = """
import sys
from pathlib import Path
import pyarrow as pa
import torch
from accelerate import PartialState
from datasets import Dataset
from rs_transformer.utils.processes import processes
from rs_transformer.utils.map_shards import map_shards
with processes():
    folder, rank = Path(sys.argv[1]), PartialState().process_index
    def twice(rows, advance):
        with open(folder / f"done_by_{rank}", "a") as file:
            print(rows["text"][0], file=file)
        return {**rows, "twice": [text * 2 for text in rows["text"]]}
    dataset = Dataset.from_dict({"text": [f"row {number}" for number in range(25)]})
    schema = pa.schema({"text": pa.string(), "twice": pa.string()})
    map_shards(dataset, twice, folder / "out.parquet", schema=schema, settings={"beam": 5}, shard_size=4)
    assert torch.distributed.is_initialized()
assert not torch.distributed.is_initialized()  # a process that is still connected may be aborted when it ends
"""


def test_two_processes_share_the_shards_and_make_the_bytes_of_one(tmp_path):
    fork("-c", SHARED, tmp_path, processes=2)
    done = [(tmp_path / f"done_by_{rank}").read_text().split("\n")[:-1] for rank in (0, 1)]
    assert done == [[f"row {first}" for first in range(start, 25, 8)] for start in (0, 4)]
    assert (tmp_path / "out.parquet").read_bytes() == shards(tmp_path / "one.parquet").read_bytes()


def test_two_runs_do_not_make_one_file(tmp_path):
    def another(rows, advance):
        with pytest.raises(ValueError, match=r"another run is making .*out.parquet at this moment"):
            shards(tmp_path / "out.parquet")
        raise Killed

    with pytest.raises(Killed):
        shards(tmp_path / "out.parquet", another)


def test_a_damaged_shard_is_named(tmp_path):
    with pytest.raises(Killed):
        shards(tmp_path / "out.parquet", twice([], 3))
    shard = tmp_path / "out.parquet.shards" / "00000001.parquet"
    content = bytearray(shard.read_bytes())
    content[4:40] = b"x" * 36
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"the shard .*00000001.parquet is damaged"):
        shards(tmp_path / "out.parquet")


def test_a_file_of_another_origin_is_not_overwritten(tmp_path):
    pq.write_table(pa.table({"text": ["mine"]}), tmp_path / "mine.parquet")
    with pytest.raises(ValueError, match="was not written by this package"):
        shards(tmp_path / "mine.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "mine.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole parquet file"):
        shards(tmp_path / "cut.parquet")
