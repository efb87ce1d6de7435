"""The configurations in `training/accelerate/`: all are read by accelerate, those for CPUs train with it."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from conftest import RECIPE, ROOT, losses, run, task_options

CONFIGS = ROOT / "training" / "accelerate"
OPTIONS = ["--max_steps", 12, "--logging_steps", 1, "--max_tokens", 256, "--dropout", 0, "--num_beams", 1]
OPTIONS += ["--eval_strategy", "no", "--save_strategy", "no", "--max_new_tokens", 8]


def command(config: str, *launch_options: object, task: dict[str, Path], folder: Path) -> list[str]:
    launcher = [Path(sys.executable).with_name("accelerate"), "launch", "--config_file", CONFIGS / config]
    train = ["training/train.py", RECIPE, *task_options(task), *OPTIONS, "--output_dir", folder]
    return [str(part) for part in (*launcher, *launch_options, *train)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def one_process(task, tmp_path_factory):
    """The losses of the same training in one process, whose batches have the budget of two."""
    folder = tmp_path_factory.mktemp("one")
    run(*command("cpu.yaml", "--num_processes", 1, task=task, folder=folder), "--max_tokens", 512)
    return losses(folder)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_each_configuration(file):
    config = load_config_from_file(str(file))
    expected = {"cpu": DistributedType.MULTI_CPU, "ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP}
    assert config.distributed_type == expected[file.stem.split("_")[0]]
    assert config.num_machines == (2 if file.stem.endswith("2_machines") else 1)


def test_two_processes_of_one_machine_train_as_one_process_does(task, one_process, tmp_path):
    run(*command("cpu.yaml", task=task, folder=tmp_path))
    assert losses(tmp_path) == pytest.approx(one_process, abs=1e-4)


def test_two_machines_train_as_one_process_does(task, one_process, tmp_path):
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    machines = [
        subprocess.Popen(
            command("cpu_2_machines.yaml", *address, "--machine_rank", rank, task=task, folder=tmp_path),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], printed
    assert losses(tmp_path) == pytest.approx(one_process, abs=1e-4)
    assert "bleu" in json.loads((tmp_path / "results.json").read_text())["test"]
