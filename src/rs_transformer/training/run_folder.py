"""A run's folder: which checkpoints in it count, their average, and the record that reproduces the run."""

import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..utils.files import write_json

logger = logging.get_logger(__name__)

COMPLETE_MARKER = "checkpoint_complete.json"
# What an option or a variable is called that holds a secret, and what a token of the Hub looks like.
SECRET = re.compile(r"-{0,2}([\w-]+[_-])?(token|password|secret|api[_-]?key)", re.IGNORECASE)
HUB_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{30,}")
SHORTEST_SECRET = 8
MASK = "<secret>"
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
    """The checkpoints of a run whose files are all there and as long as they were written, oldest first."""
    checkpoints = []
    for folder in Path(run_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
        marker = folder / COMPLETE_MARKER
        if step and marker.is_file():
            sizes = json.loads(marker.read_text())
            if all((folder / name).is_file() and (folder / name).stat().st_size == sizes[name] for name in sizes):
                checkpoints.append((int(step.group(1)), folder))
    return [folder for _, folder in sorted(checkpoints)]


def checkpoint_to_resume(run_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run; later, incomplete ones are removed with a warning."""
    complete = complete_checkpoints(run_dir)
    for folder in Path(run_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if folder not in complete:
            logger.warning(f"{folder} is incomplete (the run was stopped while saving) and is removed.")
            shutil.rmtree(folder)
    return str(complete[-1]) if complete else None


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
    index = Path(folder, SAFE_WEIGHTS_INDEX_NAME)
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [SAFE_WEIGHTS_NAME]
    state: dict[str, torch.Tensor] = {}
    for name in names:
        state |= load_file(Path(folder, name))
    return state


def write_run_record(run_dir: str | Path, options: Mapping[str, Any]) -> None:
    """Write `recipe.yaml` (all options but those not set and secrets, to be run again) and `run.json` (versions)."""
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    command, secrets = without_secrets(sys.argv)
    secrets |= {value for name, value in options.items() if SECRET.fullmatch(name) and isinstance(value, str)}
    options, command = (masked(json.loads(json.dumps(part, default=str)), secrets) for part in (options, command))
    plain = {name: value for name, value in options.items() if value is not None and not SECRET.fullmatch(name)}
    staged = run_dir / "recipe.yaml.tmp"
    staged.write_text(yaml.safe_dump(plain, allow_unicode=True, sort_keys=False), encoding="utf-8")
    staged.replace(run_dir / "recipe.yaml")
    versions = {"python": sys.version.split()[0]} | {name: version(name) for name in RECORDED_PACKAGES}
    write_json({"command": command, "versions": versions}, run_dir / "run.json")


def without_secrets(arguments: Sequence[str]) -> tuple[list[str], set[str]]:
    """A command line in which `MASK` stands for the value of each option or variable that names a secret, such as
    `--hub_token X`, `--hub-token=X` or `HF_TOKEN=X`; and these values."""
    shown: list[str] = []
    secrets: set[str] = set()
    expected = False
    for argument in arguments:
        name, given, value = argument.partition("=")
        if expected and not argument.startswith("--"):
            secrets.add(argument)
            argument = MASK
        elif given and SECRET.fullmatch(name):
            secrets.add(value)
            argument = f"{name}={MASK}"
        expected = argument.startswith("-") and SECRET.fullmatch(argument) is not None
        shown.append(argument)
    return shown, secrets


def masked(value: Any, secrets: Collection[str]) -> Any:
    """Plain data with `MASK` in the place of secrets wherever they stand, in an address or inside of another option,
    and of whatever looks like a token of the Hub."""
    if isinstance(value, dict):
        return {name: masked(item, secrets) for name, item in value.items()}
    if isinstance(value, list):
        return [masked(item, secrets) for item in value]
    if isinstance(value, str):
        for secret in sorted(secrets, key=len, reverse=True):
            if len(secret) >= SHORTEST_SECRET:  # a shorter one is a part of many words
                value = value.replace(secret, MASK)
        return HUB_TOKEN.sub(MASK, value)
    return value
