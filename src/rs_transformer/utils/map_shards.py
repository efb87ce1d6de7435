"""A function over a dataset, shard by shard, into one parquet file: shared out over processes, resumable.

For work that takes hours and a model. What needs none is `Dataset.map`.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers.utils import logging

from .files import atomic_file, write_json
from .processes import PatientGroup

logger = logging.get_logger(__name__)

Rows = dict[str, list]
METADATA_KEY = b"rs_transformer"


def map_shards(
    dataset: Dataset,
    function: Callable[[Rows, Callable[[int], None]], Rows],
    output: str | Path,
    *,
    schema: pa.Schema,
    settings: Mapping[str, Any],
    origin: Mapping[str, Any] | None = None,
    shard_size: int = 2000,
    desc: str = "Working",
    unit: str = "rows",
) -> Path:
    """Write `function` of every row of a dataset to one parquet file, in the dataset's order.

    The dataset is cut into shards, which the processes of `accelerate launch` share. Each is written to
    `OUTPUT.shards` under a temporary name, synced and renamed, so a file that has a shard's name is whole. A later
    call does those that are not there, then merges all into `output` and removes the folder. What `function` gives for
    a shard must depend on its rows and `settings` alone: then so does every byte of the file.

    Args:
        dataset: the input; its rows are digested, and other rows are refused on a resume.
        function: takes the columns of a shard and a function to call with the number of rows done since the last
            call; returns the columns of `schema`, as many rows.
        output: the parquet file. Its schema metadata hold settings, origin and digests (`read_record`).
        schema: of the output.
        settings: JSON; everything but the rows that the result depends on. A resume with other settings is refused.
        origin: JSON, for the record: names and versions. It may change between resumes; each shard keeps its own, the
            output lists those that differ.
        shard_size: rows a shard; one of the settings.
        desc, unit: what the progress bar and the log say.

    Returns:
        `output`.

    Raises:
        ValueError: `output` or its shards were made with other settings or from other rows, the message says which;
            another run is making it; or `function` raised one, after whose shard and rows, counted from 0, it is.
        OSError: the disk is full, or cannot be written. Finished shards stay, the next call goes on from them.
    """
    output, state, group = Path(output), PartialState(), PatientGroup()
    settings = {**settings, "shard_size": shard_size, "rows": len(dataset)}
    shards = output.with_name(f"{output.name}.shards")
    todo: list[int] | None = None
    lock = FileLock(shards / "lock", timeout=0)
    try:
        if state.is_main_process:
            todo = _open(output, shards, lock, dataset, settings)
        todo = broadcast_object_list([todo])[0]
        if todo is None:
            return output
        progress = _Progress(len(dataset), todo, shard_size, desc, unit)
        for number in todo[state.process_index :: state.num_processes]:
            rows = _shard(dataset, number, shard_size)
            try:
                columns = function(rows, progress.advance)
            except ValueError as error:
                raise ValueError(f"shard {number} ({_span(number, shard_size, len(dataset))}): {error}") from error
            progress.log()
            _write(shards / _name(number), columns, schema, {"digest": _digest(rows), "origin": dict(origin or {})})
        progress.close()
        group.wait()
        with group.main_process_first():
            if state.is_main_process:
                _merge(output, shards, schema, settings, len(dataset))
    finally:
        lock.release()
    return output


def read_record(file: str | Path) -> dict[str, Any]:
    """What `map_shards` says of a file: `settings`, `origins` (a list) and `digests` (SHA-256 of each shard's input).

    Raises:
        ValueError: not a parquet file, or one that something else has written.
    """
    try:
        metadata = pq.read_metadata(file).metadata or {}
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is not a whole parquet file ({error}); remove it") from error
    if METADATA_KEY not in metadata:
        raise ValueError(f"{file} was not written by this package; remove it, or choose another place")
    return json.loads(metadata[METADATA_KEY])


def check_made_from(output: Path, dataset: Dataset, settings: Mapping[str, Any], shard_size: int) -> None:
    """Raise `ValueError` unless a file was made by `map_shards` from these rows with these settings."""
    record = read_record(output)
    check_settings(output, record["settings"], {**settings, "shard_size": shard_size, "rows": len(dataset)})
    for number, digest in enumerate(record["digests"]):
        _check_digest(output, number, digest, dataset, shard_size)


def _open(output: Path, shards: Path, lock: FileLock, dataset: Dataset, settings: dict[str, Any]) -> list[int] | None:
    """The numbers of the shards that are to be done; None if the output is there."""
    if output.exists():
        check_made_from(output, dataset, settings, settings["shard_size"])
        shutil.rmtree(shards, ignore_errors=True)  # left by a kill right after the merge
        logger.info(f"{output} is there already, with the same settings and from the same rows: it is kept.")
        return None
    shards.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"another run is making {output} at this moment: wait for it, or choose another output"
        ) from error
    for staged in [*shards.glob("*.tmp"), *output.parent.glob(f"{output.name}.*.tmp")]:
        staged.unlink()  # left by a kill
    numbers = range(-(-len(dataset) // settings["shard_size"]))
    settings_file = shards / "settings.json"
    if settings_file.exists():
        check_settings(shards, json.loads(settings_file.read_text(encoding="utf-8")), settings)
    else:
        write_json(settings, settings_file)
    todo = []
    for number in numbers:
        file = shards / _name(number)
        if file.exists():
            _check_digest(shards, number, read_record(file)["digest"], dataset, settings["shard_size"])
        else:
            todo.append(number)
    if len(todo) < len(numbers):
        logger.info(f"{shards}: {len(numbers) - len(todo)} of {len(numbers)} shards are done already.")
    return todo


def check_settings(where: str | Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise `ValueError`, naming the first difference, unless something was made with the settings of now."""
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{where} was made with {name}={found.get(name)!r}, now it is {wanted.get(name)!r}: go on with the "
                "former, choose another output, or remove it"
            )


def _check_digest(where: Path, number: int, found: str, dataset: Dataset, shard_size: int) -> None:
    if found != _digest(_shard(dataset, number, shard_size)):
        raise ValueError(
            f"{where} was made from other data: {_span(number, shard_size, len(dataset))} differ. "
            "Bring the former data back, choose another output, or remove it"
        )


def _span(number: int, shard_size: int, rows: int) -> str:
    return f"rows {number * shard_size} to {min((number + 1) * shard_size, rows) - 1}"


def _shard(dataset: Dataset, number: int, shard_size: int) -> Rows:
    return dataset[number * shard_size : (number + 1) * shard_size]


def _digest(rows: Rows) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _name(number: int) -> str:
    return f"{number:08d}.parquet"


def _write(file: Path, columns: Rows, schema: pa.Schema, record: Mapping[str, Any]) -> None:
    table = pa.Table.from_pydict(columns, schema=schema.with_metadata({METADATA_KEY: json.dumps(record)}))
    with atomic_file(file) as staged:
        pq.write_table(table, staged)


def _merge(output: Path, shards: Path, schema: pa.Schema, settings: dict[str, Any], rows: int) -> None:
    files = [shards / _name(number) for number in range(-(-rows // settings["shard_size"]))]
    records = [read_record(file) for file in files]
    origins: list[dict[str, Any]] = []
    for record in records:
        origins += [record["origin"]] * (record["origin"] not in origins)
    merged = {"settings": settings, "origins": origins, "digests": [record["digest"] for record in records]}
    schema = schema.with_metadata({METADATA_KEY: json.dumps(merged)})
    with atomic_file(output) as staged, pq.ParquetWriter(staged, schema) as writer:
        for file in files:
            writer.write_table(_read(file).replace_schema_metadata(schema.metadata))
    found = pq.read_metadata(output).num_rows
    if found != rows:
        raise RuntimeError(f"{output} has {found} rows, its input {rows}")
    shutil.rmtree(shards)


def _read(file: Path) -> pa.Table:
    try:
        return pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"the shard {file} is damaged ({error}); remove it and start again") from error


class _Progress:
    """A bar with speed and time left on terminals, a line a shard in the log elsewhere.

    The main process counts for all, since the others do as much in the same time.
    """

    def __init__(self, rows: int, todo: list[int], shard_size: int, desc: str, unit: str):
        state = PartialState()
        self.processes, self.desc, self.unit, self.rows = state.num_processes, desc, unit, rows
        left = sum(min(shard_size, rows - number * shard_size) for number in todo)
        self.done_before, self.done, self.started = rows - left, 0, time.perf_counter()
        disable = None if state.is_main_process else True
        if state.is_main_process:
            logger.info(f"{desc}: {len(todo)} shards of {shard_size} {unit} on {state.num_processes} processes")
        self.bar = tqdm(total=rows, initial=self.done_before, unit=f" {unit}", desc=desc, disable=disable, leave=False)

    def advance(self, rows: int) -> None:
        left = self.rows - self.done_before - self.done
        step = min(rows * self.processes, left)
        self.done += step
        self.bar.update(step)

    def log(self) -> None:
        if self.bar.disable and self.done:
            speed = self.done / (time.perf_counter() - self.started)
            total = self.done_before + self.done
            minutes = (self.rows - total) / speed / 60
            logger.info(
                f"{self.desc}: {total} of {self.rows} {self.unit}, {speed:.1f} {self.unit}/s, {minutes:.0f} min left"
            )

    def close(self) -> None:
        self.bar.close()
