"""How a command ends that cannot go on: one line for an expected error, for Ctrl-C and for SIGTERM."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from types import FrameType

from .console import LOG_ONLY, PACKAGE

EXPECTED = (ValueError, OSError, ImportError)
EXPECTED_OF_OURS = (*EXPECTED, TypeError, RuntimeError)
DEBUG_OPTIONS = ("underflow_overflow", "tpu_metrics_debug")  # the values of transformers' own option `debug`


class Stopped(BaseException):
    """SIGTERM has come."""


@contextmanager
def short_errors(go_on: str = "") -> Iterator[None]:
    """An expected error becomes one line and exit status 2; Ctrl-C and SIGTERM become one line, too.

    Expected are the `ValueError`, `OSError` and `ImportError` of anyone and what this package raises; others keep
    their traceback, and with `--debug` on the command line all do. Of several processes on a machine the first one
    speaks.

    Args:
        go_on: what a user does to go on after a stop.
    """
    debug = _takes_debug(sys.argv)
    program = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except (KeyboardInterrupt, Stopped) as stop:
        if debug:
            raise
        name, number = (
            ("Ctrl-C", signal.SIGINT) if isinstance(stop, KeyboardInterrupt) else ("SIGTERM", signal.SIGTERM)
        )
        say(f"{program}: stopped by {name}{f'; {go_on}' if go_on else ''}")
        sys.exit(128 + number)
    except EXPECTED_OF_OURS as error:
        ours = f"/{PACKAGE}/" in extract_tb(error.__traceback__)[-1].filename.replace(os.sep, "/")
        if debug or not (ours or isinstance(error, EXPECTED)):
            raise
        logging.getLogger(LOG_ONLY).info("the command ends with an error", exc_info=error)
        say(f"{program}: error: {' '.join(str(error).split())}{'' if ours else ' (--debug shows where)'}")
        sys.exit(2)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def _takes_debug(argv: list[str]) -> bool:
    """Whether `--debug` is on a command line without a value of transformers' option of that name; it is taken out."""
    for position, argument in enumerate(argv):
        if argument == "--debug" and not (set(argv[position + 1 : position + 2]) & set(DEBUG_OPTIONS)):
            del argv[position]
            return True
    return False


def say(line: str) -> None:
    """Print the one line that a command ends with on standard error; on a machine the first process alone does."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # a folder of this process, in one of those that were started with it
        spoken = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[1] / "spoken"
        try:
            spoken.touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError as error:
            warnings.warn(f"{spoken}: {error}", stacklevel=2)
    print(line, file=sys.stderr, flush=True)
