"""Files and folders that are whole or not there."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


def write_text(text: str, file: str | Path) -> None:
    """Write a text file so that it is either the old one or the whole new one."""
    with atomic_file(Path(file)) as staged:
        staged.write_text(text, encoding="utf-8")


def write_json(data: Any, file: str | Path) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", file)


def check_output(output: Path) -> None:
    """Raise `FileExistsError` unless a folder can get this name at the end."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"output_dir: {output} is there already and not empty; choose another, or remove it")
    if output.is_mount():
        raise FileExistsError(f"output_dir: {output} is a mount point and cannot be replaced; name a folder in it")


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A folder to write into that becomes `output` at the end, and goes away if anything fails.

    A killed process leaves it behind as `.NAME.partial`; the next one starts anew.
    """
    staging = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        if output.exists():
            output.rmdir()
        staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
