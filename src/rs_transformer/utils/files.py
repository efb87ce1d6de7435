"""Files and folders that are whole or not there."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError

# What safetensors and torch say, in errors of their own kinds, when a file of weights cannot be written.
UNWRITTEN = ("while serializing", "enforce fail at inline_container", "PytorchStreamWriter")
_CLAIMED: set[Path] = set()


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A temporary name to write to; the file gets its own name once its content has reached the disk."""
    staged = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        yield staged
        with open(staged, "rb") as opened:
            os.fsync(opened.fileno())
        staged.replace(file)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"{file} could not be written ({error.strerror or error}). What was finished is kept: mend the disk, "
            "start again",
        ) from error
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


@contextmanager
def writing_weights(folder: str | Path) -> Iterator[None]:
    """Make an `OSError` that names the folder of what safetensors and torch raise when a file cannot be written."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if not any(said in str(error) for said in UNWRITTEN):
            raise
        said = str(error).partition("\n")[0]  # without torch's trace
        raise OSError(
            f"{folder} could not be written: the disk is full, or takes no file so large ({said}). Make room"
        ) from error


def write_text(text: str, file: str | Path) -> None:
    """Write a text file so that it is either the old one or the whole new one."""
    with atomic_file(Path(file)) as staged:
        staged.write_text(text, encoding="utf-8")


def write_json(data: Any, file: str | Path) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", file)


def read_mapping(file: str | Path) -> dict[str, Any]:
    """What a JSON or YAML file says; nothing if it is not there, empty, cut short or no mapping."""
    if not Path(file).is_file():  # a pipe would be waited for
        return {}
    try:
        text = Path(file).read_text("utf-8")
        content = json.loads(text) if Path(file).suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def claimed(output: str | Path, main_process: bool = True) -> Iterator[None]:
    """Keep other processes of this machine from an output, a file or a folder, until the block ends.

    A lock of the operating system on `.NAME.lock` beside it, or in a folder where nothing can be written beside it, so
    that a killed process leaves nothing that holds; a process that has the output already keeps it.

    Args:
        output: need not be there, its folder is made.
        main_process: the others of one run claim nothing.

    Raises:
        ValueError: another process is writing it.
        OSError: nothing can be written there.
    """
    output = Path(output).resolve()
    if not main_process or output in _CLAIMED:
        yield
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = os.access(output.parent, os.W_OK) or not output.is_dir()  # not so a volume that a container mounts
    lock = FileLock((output.parent if beside else output) / f".{output.name}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"another process is writing {output}: wait for it, or choose another output") from error
    _CLAIMED.add(output)
    try:
        yield
    finally:
        _CLAIMED.discard(output)
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held, so that nobody else can hold it
        lock.release()


def check_output_file(file: str | Path, inputs: Iterable[str | Path] = (), what: str = "output_file") -> Path:
    """Raise unless a file can be written at the end of a long work; returns it, or what it is a link to.

    Args:
        inputs: files that it must not replace.
        what: the option that names it.

    Raises:
        ValueError: it is a folder or a device, or one of the inputs.
        OSError: there is no folder for it, or nothing can be written there.
    """
    file = Path(file)
    if not file.resolve().parent.is_dir():
        raise FileNotFoundError(f"{what}: there is no folder {str(file.parent)!r}")
    if file.is_dir():
        raise ValueError(f"{what}: {str(file)!r} is a folder; name a file")
    if file.exists() and not file.is_file():
        raise ValueError(f"{what}: {str(file)!r} is a device or a pipe, which would be replaced; name a file")
    for given in map(Path, inputs):
        if given.exists() and given.resolve() == file.resolve():
            raise ValueError(f"{what}: {str(file)!r} would replace what it is made from; choose another")
    if not os.access(file.resolve().parent, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        raise PermissionError(f"{what}: {str(file)!r} cannot be written")
    return file.resolve()


def check_output(output: Path) -> None:
    """Raise `FileExistsError` unless a folder can get this name, or a link's target its own, at the end."""
    target = output.resolve()
    if target == Path.cwd():
        raise FileExistsError(f"output_dir: {output} is where this runs, and would be replaced; name another folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"output_dir: {output} is there already and not empty; choose another, or remove it")
    if target.is_mount():
        raise FileExistsError(f"output_dir: {output} is a mount point and cannot be replaced; name a folder in it")


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A folder to write into that becomes `output` at the end, and goes away if anything fails.

    A link is followed, not replaced. A killed process leaves it behind as `.NAME.partial`; the next one starts anew.
    Two at once are refused (`claimed`).
    """
    output = output.resolve()
    staging = output.with_name(f".{output.name}.partial")
    with claimed(output):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            with writing_weights(output):
                yield staging
            if output.exists():
                output.rmdir()
            staging.rename(output)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
