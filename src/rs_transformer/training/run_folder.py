"""A run's folder: which checkpoints in it count, their average, the record that reproduces the run, and whether the
scores in it are those of the weights in it."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
import yaml
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..checkpoints import RUN_RECORD
from ..utils.files import read_mapping, write_json, write_text
from ..utils.masking import SECRET, masked, without_secrets

logger = logging.get_logger(__name__)

COMPLETE_MARKER = "checkpoint_complete.json"
RECIPE = "recipe.yaml"
LINEAGE = ("collapse.json", "trim.json")  # what a model says of its parents
RESULTS = "results.json"
RUN_LOG = "run.log"
# Arguments that may be others when a run goes on: they do not change what is learned.
CHANGEABLE = re.compile(
    r"stages|preprocessing_num_workers|(teacher_)?decoding_max_tokens|output_dir|resume_from_checkpoint|disable_tqdm|local_rank|use_cpu|report_to|run_name|project|"
    r"(logging|log|save|eval|dataloader(?!_drop_last)|hub|ddp|push_to|torch_compile|trackio|per_device_eval)_\w+"
)
RECORDED_PACKAGES = ("transformers", "torch", "accelerate", "datasets", "sentencepiece", "sacrebleu", "rs-transformer")


def mark_complete(checkpoint: Path) -> None:
    """Write the marker that makes a checkpoint count, after everything in it has reached the disk."""
    sizes = {}
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file() and file.name != COMPLETE_MARKER:
            sizes[str(file.relative_to(checkpoint))] = file.stat().st_size
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
    write_json(sizes, checkpoint / COMPLETE_MARKER)


def complete_checkpoints(run_dir: str | Path) -> list[Path]:
    """The checkpoints of a run whose files are all there and as long as they were written, oldest first.

    A JSON file that somebody has edited since is as good as before.
    """
    return [folder for _, folder in sorted(_checkpoints(run_dir).items()) if _is_complete(folder)]


def checkpoint_to_resume(run_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run, if there is one.

    Raises:
        ValueError: it has weights alone.
    """
    complete = complete_checkpoints(run_dir)
    return _with_its_state(complete[-1]) if complete else None


def named_checkpoint(name: str | Path, run_dir: str | Path) -> str:
    """A checkpoint that a user wants to go on from.

    Raises:
        ValueError: it is not a complete checkpoint, or has weights alone, or it is of another run and there is one in
            `run_dir` already.
    """
    checkpoint = Path(name)
    if checkpoint not in complete_checkpoints(checkpoint.parent):
        raise ValueError(f"resume_from_checkpoint: {name} is not a complete checkpoint")
    elsewhere = checkpoint.parent.resolve() != Path(run_dir).resolve()
    if elsewhere and (complete_checkpoints(run_dir) or read_mapping(Path(run_dir, RESULTS))):
        raise ValueError(f"{run_dir} holds a run already, and {name} is of another one: choose another output_dir")
    return _with_its_state(checkpoint)


def _with_its_state(checkpoint: Path) -> str:
    """A checkpoint's name; raises `ValueError` unless it has all that a training goes on with.

    The random state is what every kind of training saves, DeepSpeed and FSDP too, whose optimizers lie elsewhere.
    """
    if not any(checkpoint.glob("rng_state*.pth")):
        raise ValueError(
            f"{checkpoint} has weights alone (save_only_model), from which no run goes on: train from them by "
            f"--model_name_or_path {checkpoint}, into another output_dir"
        )
    return str(checkpoint)


def update_of(checkpoint: str | Path) -> int:
    """The update that a checkpoint was saved after."""
    return int(Path(checkpoint).name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


def set_later_aside(run_dir: str | Path, checkpoint: str | Path) -> None:
    """Rename a run's later checkpoints, mostly incomplete, so that a training that goes on from one meets none."""
    for update, folder in _checkpoints(run_dir).items():
        if update > update_of(checkpoint):
            _set_aside(folder)


def make_way(checkpoint: Path) -> None:
    """Before a checkpoint is saved: one that is there is written over, and anything else of its name moved aside."""
    if checkpoint.is_dir() and _is_complete(checkpoint):
        (checkpoint / COMPLETE_MARKER).unlink()
    elif checkpoint.exists():
        _set_aside(checkpoint)


def _set_aside(folder: Path) -> None:
    aside, number = folder.with_name(f"_{folder.name}-aside"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"_{folder.name}-aside-{number}")
    logger.warning(
        f"{folder} is incomplete, later than where the run goes on, or of another run: it is now {aside.name}. Remove "
        "that if you do not need it."
    )
    folder.rename(aside)


def remove_old_checkpoints(run_dir: str | Path, limit: int | None, best: str | None) -> None:
    """Delete a run's oldest complete checkpoints down to `limit`, but neither the newest nor the `best`.

    What else lies there under such a name, a copy or another Trainer's, is not the run's own and stays.
    """
    for rest in Path(run_dir).glob(f"_{PREFIX_CHECKPOINT_DIR}-*-removed"):  # the process was killed while deleting
        shutil.rmtree(rest, ignore_errors=True)
    if limit is None or limit < 1:
        return
    checkpoints = [folder for folder in complete_checkpoints(run_dir) if not folder.is_symlink()]
    kept = {folder.name for folder in checkpoints[-1:]} | ({Path(best).name} if best is not None else set())
    spare = [folder for folder in checkpoints if folder.name not in kept]
    for folder in spare[: max(0, len(checkpoints) - max(limit, len(kept)))]:
        removed = folder.with_name(f"_{folder.name}-removed")
        folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def _checkpoints(run_dir: str | Path) -> dict[int, Path]:
    """The folders that have a checkpoint's name, by update."""
    folders = Path(run_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    named = [folder for folder in folders if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name)]
    return {update_of(folder): folder for folder in named if folder.is_dir()}


def _is_complete(checkpoint: Path) -> bool:
    sizes = read_mapping(checkpoint / COMPLETE_MARKER)
    return bool(sizes) and all(_is_whole(checkpoint / name, size) for name, size in sizes.items())


def _is_whole(file: Path, size: int) -> bool:
    return file.is_file() and (file.stat().st_size == size or (file.suffix == ".json" and bool(read_mapping(file))))


def average_checkpoints(checkpoints: Sequence[str | Path]) -> dict[str, torch.Tensor]:
    """The mean of the weights of some checkpoints, as a state dict (Vaswani et al. 2017 and the paper do so).

    Floating-point tensors are averaged in float64 and keep their type; others come from the last checkpoint.

    Raises:
        ValueError: there are none, or their tensors differ in name or shape.
    """
    if not checkpoints:
        raise ValueError("there is no checkpoint to average")
    total: dict[str, torch.Tensor] = {}
    for checkpoint in checkpoints:
        state = load_weights(checkpoint)
        shapes = {name: tensor.shape for name, tensor in state.items()}
        if total and shapes != {name: tensor.shape for name, tensor in total.items()}:
            raise ValueError(f"{checkpoint} holds other tensors than {checkpoints[0]}; average one run's checkpoints")
        for name, tensor in state.items():
            total[name] = total[name] + tensor.double() if name in total else tensor.double()
    return {
        name: (total[name] / len(checkpoints)).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def load_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint folder, from one safetensors file or several."""
    names, index = [SAFE_WEIGHTS_NAME], Path(folder, SAFE_WEIGHTS_INDEX_NAME)
    if not Path(folder, SAFE_WEIGHTS_NAME).is_file() and index.is_file():  # which of two transformers takes, too
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    state: dict[str, torch.Tensor] = {}
    for name in names:
        state |= load_file(Path(folder, name))
    return state


def weights_digest(folder: str | Path) -> str:
    """SHA-256 of the names, types, shapes and values of a folder's weights, however they are spread over files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_weights(folder).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def data_digest(pairs: Dataset) -> str:
    """The first digits of the SHA-256 of training pairs, their columns `input_ids` and `labels`, in order."""
    digest = hashlib.sha256()
    for table in pairs.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=10_000):
        for column in table.columns:
            for values in (pc.list_value_length(column), pc.list_flatten(column)):
                digest.update(values.combine_chunks().to_numpy(zero_copy_only=False))
    return digest.hexdigest()[:16]


def is_finished(run_dir: str | Path) -> bool:
    """Whether a folder has the scores of the weights that are in it, and no training that goes on."""
    try:
        weights_digest(run_dir)
        check_scores(run_dir)
    except (ValueError, OSError, SafetensorError):
        return False
    return Path(run_dir, RESULTS).is_file()


def check_scores(run_dir: str | Path) -> None:
    """Raise `ValueError` if the scores in a folder are not those of its weights, or are to be others soon.

    Where nothing says whose they are, as in folders made by an earlier version, they are believed. Weights that cannot
    be read are for those to name who load them.
    """
    file = Path(run_dir, RESULTS)
    if not file.is_file():
        return
    mend = "go on with the run by --resume_from_checkpoint true"
    results = read_mapping(file)
    if not results:
        raise ValueError(f"{file} is empty or damaged: {mend}, or remove it")
    if read_mapping(Path(run_dir, RUN_RECORD)).get("finished") is False:
        raise ValueError(f"the training in {run_dir} has not finished, its {RESULTS} is of an earlier one: {mend}")
    scored = results.get("weights", {}).get("sha256")
    try:
        stored = weights_digest(run_dir)
    except (OSError, SafetensorError):
        return
    if scored is not None and scored != stored:
        raise ValueError(f"{file} has the scores of other weights than those in {run_dir}: {mend}, or remove it")


def keep_scores(folder: str | Path, split: str, scores: Mapping[str, Any]) -> None:
    """Put the scores of a split into the `results.json` of the weights that a folder has.

    Raises:
        ValueError: the folder's training has not finished.
    """
    file, digest = Path(folder, RESULTS), weights_digest(folder)
    if read_mapping(Path(folder, RUN_RECORD)).get("finished") is False:
        raise ValueError(f"the training in {folder} has not finished, and will keep its own scores")
    results = read_mapping(file)
    weights = results.get("weights", {})
    if weights.get("sha256", digest) != digest:  # what is there is of others
        results, weights = {}, {}
    write_json(results | {split: dict(scores), "weights": weights | {"sha256": digest}}, file)


def restate_weights(folder: str | Path, dtype: str) -> None:
    """Note in a copy's `results.json` that the scored weights are stored there in another type, with their digest."""
    file = Path(folder, RESULTS)
    results = read_mapping(file)
    if scored := results.get("weights"):
        stored = {"sha256": weights_digest(folder), "stored_as": dtype, "scored_sha256": scored["sha256"]}
        write_json(results | {"weights": scored | stored}, file)


def write_run_record(
    run_dir: str | Path,
    options: Mapping[str, Any],
    conditions: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
) -> None:
    """Write `recipe.yaml` (all options but those not set and secrets, to be run again) and `run.json`.

    `run.json` has the command and the versions, whether the run has `finished` (see `write_finished`) and, for each
    time that it went on, from which update, by which command, and what was otherwise from then on.

    Args:
        conditions: what else matters and is no option, such as the digest of the data.
        checkpoint: that the run goes on from; its own folder says how it began.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    command, secrets = without_secrets(sys.argv)
    secrets |= {value for name, value in options.items() if SECRET.fullmatch(name) and isinstance(value, str)}
    options, command = (masked(json.loads(json.dumps(part, default=str)), secrets) for part in (options, command))
    plain = {name: value for name, value in options.items() if value is not None and not SECRET.fullmatch(name)}
    versions = {"python": sys.version.split()[0]} | {name: version(name) for name in RECORDED_PACKAGES}
    start = {"command": command, "versions": versions}
    conditions = json.loads(json.dumps(conditions or {}, default=str))
    record: dict[str, Any] = {**start, "resumed": []}
    if checkpoint is not None:
        record = _resumed(Path(checkpoint), start, plain, conditions)
    head = "".join(f"# {line}\n" for line in resumed_lines(record))
    write_text(head + yaml.safe_dump(plain, allow_unicode=True, sort_keys=False), run_dir / RECIPE)
    write_json(record | {"conditions": conditions, "finished": False}, run_dir / RUN_RECORD)


def is_same_place(then: Any, now: Any, before: Path, after: Path) -> bool:
    """Whether two values of an option are the same, or name one file: otherwise, or moved with the folder it is in.

    Args:
        then, now: the values; of several files, lists.
        before, after: the folder.
    """
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return all(is_same_place(*pair, before, after) for pair in zip(then, now, strict=True))
    if then == now or not (isinstance(then, str) and isinstance(now, str)):
        return then == now
    if os.path.exists(then) or not os.path.exists(now):
        return os.path.realpath(then) == os.path.realpath(now)
    return Path(now) == after / os.path.relpath(then, before)


def write_finished(run_dir: str | Path) -> None:
    """Note in `run.json` that training and evaluation are over."""
    file = Path(run_dir, RUN_RECORD)
    write_json(read_mapping(file) | {"finished": True}, file)


def resumed_lines(record: Mapping[str, Any]) -> list[str]:
    """What `run.json` says of options and data that were changed when a run went on, in words.

    Raises:
        ValueError: the record does not hold what it should.
    """
    try:
        return [
            f"from update {part['update']:,} on {name} {json.dumps(now)}, before {json.dumps(before)}"
            for part in record.get("resumed", [])
            for name, (before, now) in part["changed"].items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{RUN_RECORD} does not hold what it should, under 'resumed': {error}") from error


def _resumed(
    checkpoint: Path, start: Mapping[str, Any], options: Mapping[str, Any], conditions: Mapping[str, Any]
) -> dict[str, Any]:
    """The record of a run that goes on, with what is otherwise from now on, which is warned of."""
    record = read_mapping(checkpoint.parent / RUN_RECORD)
    before, now = read_mapping(checkpoint.parent / RECIPE), {**options, **conditions}
    known = bool(before)
    before |= record.get("conditions", conditions)
    resumed = list(record.get("resumed", []))
    while resumed and resumed[-1]["update"] >= update_of(checkpoint):  # nothing is left of what was trained then
        before |= {name: value for name, (value, _) in resumed.pop()["changed"].items()}
    folders = [Path(each.get("output_dir", checkpoint.parent)).parent for each in (before, now)]
    changed = {
        name: [before.get(name), now.get(name)]
        for name in sorted(before.keys() | now.keys())
        if known and not CHANGEABLE.fullmatch(name) and not is_same_place(before.get(name), now.get(name), *folders)
    }
    resumed.append({"update": update_of(checkpoint), **start, "changed": changed})
    record = {**start, **record, "resumed": resumed}
    if changed:
        lines = "; ".join(resumed_lines({"resumed": resumed[-1:]}))
        logger.warning(f"The run goes on otherwise than it began: {lines}. {RUN_RECORD} says so, too.")
    return record
