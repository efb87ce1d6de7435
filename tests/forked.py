"""Processes that start at once: forked from a server that has imported the libraries, which takes ten seconds.

The server has not imported this package, and has computed nothing. What is about starting itself, or about an
environment that a library reads when it is imported, takes `run` and `launch` of conftest.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "accelerate.commands.launch",
    "ctranslate2",
    "datasets",
    "matplotlib.figure",
    "sacrebleu",
    "transformers.models.auto",
    "transformers.models.marian.modeling_marian",
    "transformers.pipelines",
    "transformers.trainer_seq2seq",
)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(list(LIBRARIES))


def fork(
    script: str | Path,
    *options: object,
    processes: int = 1,
    check: bool = True,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    prepare: tuple | None = None,
) -> CompletedProcess:
    """Run a script in a process, or in several as `torchrun` does, and return what they printed.

    Args:
        script: a file, whose path in the project will do; or "-c" or "-m", and then code or a module.
        check: fail if it fails.
        environment: what the processes see besides this one's.
        prepare: a function of a module and its arguments, called before the script.
    """
    command = [str(part) for part in (script if script in ("-c", "-m") else ROOT / script, *options)]
    ranks = [{}]
    if processes > 1:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": processes}
        ranks = [shared | {"LOCAL_WORLD_SIZE": processes, "RANK": n, "LOCAL_RANK": n} for n in range(processes)]
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, name) for name in ("stdout", "stderr")]
        started = []
        for rank in ranks:
            seen = {name: str(value) for name, value in {**(environment or {}), **rank}.items()}
            started.append(SERVER.Process(target=_work, args=(command, seen, cwd, printed, prepare), daemon=True))
            started[-1].start()
        status = _join(started)
        done = CompletedProcess(command, status, *(file.read_text() for file in printed))
    if check and status:
        raise AssertionError(f"{command} exited with {status}:\n{done.stdout}\n{done.stderr}")
    return done


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _join(started: list[multiprocessing.Process]) -> int:
    """Wait for all processes; one that fails takes the others with it. Returns its exit status, or 0."""
    running, status = list(started), 0
    while running:
        ended = wait([process.sentinel for process in running])
        for process in [process for process in running if process.sentinel in ended]:
            process.join()
            running.remove(process)
            if process.exitcode and not status:
                status = process.exitcode
                for other in running:
                    other.terminate()
    return status


def _work(command: list[str], seen: dict[str, str], cwd: Path, printed: list[Path], prepare: tuple | None) -> None:
    for number, file in enumerate(printed, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(seen)
    os.chdir(cwd)
    # The test process, whose path this one has, may have loaded remote code from a cache of its own.
    sys.path[:] = [folder for folder in sys.path if not Path(folder, "transformers_modules").is_dir()]
    if prepare is not None:
        function, *arguments = prepare
        function(*arguments)
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(command[1], {"__name__": "__main__"})
    elif command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
