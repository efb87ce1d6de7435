"""Several processes: what `accelerate launch --cpu --num_processes N` asks for and does not do, and long waits.

On GPUs accelerate needs no help to start. Not a launcher: torch.distributed's is used.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from .console import bars_on_terminals
from .errors import short_errors

# What launchers tell a process of its part in a group.
LAUNCHERS = re.compile(
    r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|"
    r"(ACCELERATE|FSDP|TORCHELASTIC|PMI|PMIX|OMPI|MV2|MPI)_\w+"
)
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "WORLD_SIZE")


@contextmanager
def processes() -> Iterator[None]:
    """Make the processes that the user asked for, and have them leave in order; a script's whole work is inside.

    - Started by `accelerate launch --cpu --num_processes N`, with N over 1 and no MPI: accelerate runs one process
      and says nothing. This process is replaced by `torchrun` with N of them.
    - Started by `torchrun` without a GPU: accelerate takes every process for the only one, unless told of the CPU.
    - A process that ends while the other's connection to it is being closed can be aborted, and `torchrun` then calls
      finished work failed: the process group is taken down before that.

    Raises:
        RuntimeError: accelerate was asked for several processes, and its command line cannot be read.
    """
    _start_processes()
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(main: Callable[[], Any], go_on: str = "") -> None:
    """Run a command's `main` in the processes that the user asked for; `go_on` says how, after it was stopped."""
    bars_on_terminals()
    with short_errors(go_on), processes():
        main()


def _start_processes() -> None:
    if any(int(os.environ.get(name, 1)) > 1 for name in MPI_SIZES):
        if not torch.accelerator.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"
            PartialState(cpu=True)  # shared by all that come
        return
    # Set by `accelerate launch` for the processes to find each other, and only where there are to be several.
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ
    if asked and "WORLD_SIZE" not in os.environ:
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *_torchrun_options(), *_program()])


class PatientGroup:
    """All processes, which may wait here for each other for days; a collective elsewhere gives up after half an hour.

    Made by all processes at about the same time.
    """

    def __init__(self) -> None:
        self.group = None
        if PartialState().num_processes > 1:
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.group is not None:
            torch.distributed.barrier(group=self.group)

    @contextmanager
    def main_process_first(self, local: bool = False) -> Iterator[None]:
        """The main process (`local`: that of each machine) goes through the block first, even if it fails."""
        state = PartialState()
        first = state.is_local_main_process if local else state.is_main_process
        if not first:
            self.wait()
        try:
            yield
        finally:
            if first:
                self.wait()


def environment_of_programs() -> dict[str, str]:
    """The environment for a program that is not ours and is started by each of the processes.

    It does not know of the group, which it would think itself to be in, and of several GPUs it sees this process's.
    """
    environment = {name: value for name, value in os.environ.items() if not LAUNCHERS.fullmatch(name)}
    state = PartialState()
    if state.num_processes > 1 and state.device.type == "cuda":
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = seen.split(",")[state.device.index] if seen else str(state.device.index)
    return environment


@contextmanager
def alone() -> Iterator[None]:
    """Processes that are started in the block are of no group, though this one may be."""
    taken = {name: os.environ.pop(name) for name in tuple(os.environ) if LAUNCHERS.fullmatch(name)}
    try:
        yield
    finally:
        os.environ |= taken


@contextmanager
def all_threads() -> Iterator[None]:
    """One process works, for all of its machine: it has their threads, too, while they wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _program() -> list[str]:
    """This process's program and its arguments, as an interpreter takes them."""
    module = sys.modules["__main__"].__spec__
    return sys.argv if module is None else ["-m", module.name, *sys.argv[1:]]


def _torchrun_options() -> list[str]:
    """The options of `torchrun` that say what the command line of the `accelerate launch` above this process says."""
    command = psutil.Process(os.getppid()).cmdline()
    if "launch" not in command:
        raise RuntimeError(
            "accelerate launch was asked for several CPU processes and started one (it needs MPI for more). "
            f"Start them by torchrun --nproc_per_node N {sys.argv[0]} …"
        )
    args = launch_command_parser().parse_args(command[command.index("launch") + 1 :])
    config = None
    if args.config_file is not None or (os.path.isfile(default_config_file) and not args.cpu):
        config = load_config_from_file(args.config_file)

    def option(name: str) -> Any:
        """As accelerate has it: the command line wins over the configuration."""
        given = getattr(args, name)
        return getattr(config, name, None) if given is None else given

    if option("num_processes") is None:
        raise RuntimeError("several CPU processes, and nobody says how many: give --num_processes")
    machines = option("num_machines") or 1
    options = ["--nproc_per_node", str(option("num_processes") // machines)]
    if machines == 1:
        return ["--standalone", *options]
    options += ["--nnodes", str(machines), "--node_rank", str(option("machine_rank") or 0)]
    return [*options, "--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
