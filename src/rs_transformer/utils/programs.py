"""Other people's programs that make a line of each line, as `program < lines > results` in a shell."""

import logging
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from tempfile import TemporaryFile
from typing import BinaryIO

from .console import LOG_ONLY
from .masking import HUB_SECRET, SHORTEST_SECRET, without_secrets
from .processes import environment_of_programs

REMEMBERED = 65_536  # bytes of a program's standard error that are kept
SHOWN = 300  # characters of its last line in a message


def split_command(command: str, option: str) -> list[str]:
    """A command's program and its arguments, cut as a shell does it, which is not asked: no pipe, no variable.

    Args:
        command: the command line. It will be recorded, so a secret in it is refused.
        option: that has it, for messages.

    Raises:
        ValueError: it is blank, has a quotation mark without its partner, or what looks like a secret.
    """
    try:
        program = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"{option} {command!r} cannot be cut into words: {error}") from error
    if not program:
        raise ValueError(f"{option} is blank: name a program and its arguments")
    _, secrets = without_secrets(program)
    if HUB_SECRET.search(command) or any(len(secret) >= SHORTEST_SECRET for secret in secrets):
        raise ValueError(
            f"{option} has what looks like a password or token in it, and it is recorded: let the program read that "
            "from a file or the environment"
        )
    return program


def check_program(program: Sequence[str], option: str) -> None:
    """Raise `FileNotFoundError` unless there is such a program, and it may be run."""
    if shutil.which(program[0]) is None:
        if os.path.isfile(program[0]):
            raise FileNotFoundError(
                f"{option}: {program[0]} is no program that may be run: make it executable, or put its interpreter "
                f"before it (python {program[0]})"
            )
        raise FileNotFoundError(f"{option}: there is no program {program[0]!r}")


def map_lines(
    program: Sequence[str],
    lines: Sequence[str],
    *,
    option: str,
    advance: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Run a program once, with lines on its standard input, and return the line that it writes for each.

    A line ends at LF on both sides (CR LF, too, in what it writes). Other characters that some programs take for the
    end of a line are blanks in what it reads. The end of its standard error goes to the log. It is killed, and all
    that it has started, when this function is interrupted and when it writes more lines than it should.

    Args:
        program: from `split_command`.
        lines: text; without any the program is not run.
        option: that names the program, for messages.
        advance: called with 1 for each line that has come.

    Returns:
        As many lines, without their ends.

    Raises:
        ValueError: it failed, wrote more or fewer lines, or no UTF-8.
        OSError: it cannot be run.
    """
    if not lines:
        return []
    name = f"{option} {shlex.join(program)!r}"
    # Files, not pipes: there is no deadlock, however much the program reads before it writes, or leaves unread.
    with TemporaryFile() as given, TemporaryFile() as said:
        given.write("".join(f"{' '.join(line.splitlines())}\n" for line in lines).encode())
        given.seek(0)
        found, status = _run(program, given, said, len(lines), name, advance)
        messages = _end_of(said)
    if messages:
        logging.getLogger(LOG_ONLY).info(f"{name} wrote on standard error:\n{messages}")
    if len(found) > len(lines):
        raise ValueError(f"{name} wrote more than {len(lines)} lines for {len(lines)}: it must write one for each")
    if status:
        how = f"ended with status {status}" if status > 0 else f"was ended by signal {-status}"
        last = (messages.splitlines() or ["it wrote nothing on standard error"])[-1].strip()
        raise ValueError(f"{name} {how}: {last[:SHOWN]}")
    if len(found) < len(lines):
        raise ValueError(f"{name} wrote {len(found)} lines for {len(lines)}: it must write one for each")
    return [_text(line, number, name) for number, line in enumerate(found, start=1)]


def _run(
    program: Sequence[str], given: BinaryIO, said: BinaryIO, number: int, name: str, advance: Callable[[int], None]
) -> tuple[list[bytes], int]:
    """What a program writes, at most one line more than `number`, and its exit status."""
    found: list[bytes] = []
    try:
        # In a group of its own, which is killed as a whole: it may be a script that has started another program.
        process = subprocess.Popen(
            program,
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environment_of_programs(),
            process_group=0,
        )
    except OSError as error:
        raise OSError(
            error.errno,
            f"{name} cannot be run ({error.strerror}); a script has its interpreter before it, or after #!",
        ) from error
    with process:
        try:
            for line in process.stdout:
                found.append(line)
                if len(found) > number:
                    _kill(process)
                    break
                advance(1)
            process.wait()
        except BaseException:
            _kill(process)
            raise
    return found, process.returncode


def _kill(process: subprocess.Popen) -> None:
    with suppress(OSError):  # it has ended already
        os.killpg(process.pid, signal.SIGKILL)


def _end_of(said: BinaryIO) -> str:
    start = max(0, said.seek(0, os.SEEK_END) - REMEMBERED)
    said.seek(start)
    return str(said.read(), "utf-8", errors="replace").strip()


def _text(line: bytes, number: int, name: str) -> str:
    try:
        return str(line.removesuffix(b"\n").removesuffix(b"\r"), "utf-8")
    except UnicodeError as error:
        raise ValueError(f"{name} wrote what is not UTF-8, in line {number}: {line[:40]!r}") from error
