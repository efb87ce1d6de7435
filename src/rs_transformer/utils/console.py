"""What a user sees of a command: short lines on the screen, one for an error; the rest in a log file."""

import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from traceback import extract_tb
from types import FrameType
from typing import Any

from transformers.utils import logging as transformers_logging

PACKAGE = __name__.split(".")[0]
LOG_ONLY = f"{PACKAGE}.log_only"
LIBRARIES = ("transformers", "datasets", "accelerate", "huggingface_hub", "py.warnings", LOG_ONLY)
# True of another way of training than that of this package, or of nothing; in the log as little as on the screen.
MISLEADING = re.compile(
    r"early stopping required metric_for_best_model|missing keys in the checkpoint model|"
    r"Instantaneous batch size|Total train batch size|'?pin_memory'? argument|"
    r"The following columns in the \w+ set don't have"
)
EXPECTED = (ValueError, OSError, ImportError)
EXPECTED_OF_OURS = (*EXPECTED, TypeError, RuntimeError)
DEBUG_OPTIONS = ("underflow_overflow", "tpu_metrics_debug")  # the values of transformers' own option `debug`


class Stopped(BaseException):
    """SIGTERM has come."""


def set_up_logging(main_process: bool) -> None:
    """This package's lines and the libraries' errors on the screen; the rest waits for `log_to`; on terminals bars.

    Args:
        main_process: the others show errors alone.
    """
    transformers_logging.get_logger(PACKAGE)  # its own handler is there from now on, and can go
    logging.captureWarnings(True)
    screen = _handler(logging.StreamHandler(), logging.INFO if main_process else logging.ERROR, _ScreenFormatter())
    errors = _handler(logging.StreamHandler(), logging.ERROR, _ScreenFormatter())
    # Of what is said before there is a log file nothing is lost, if one comes.
    log = _handler(MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False), logging.INFO)
    for name in (PACKAGE, *LIBRARIES):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if type(handler) in (logging.StreamHandler, logging.FileHandler, MemoryHandler):
                logger.removeHandler(handler)
                handler.close()
        logger.addHandler(screen if name == PACKAGE else errors)
        if main_process:
            logger.addHandler(log)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def log_to(file: Path) -> None:
    """Keep what this process logs in a file, from its start on; appended to what is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    to_file = _handler(logging.FileHandler(file, encoding="utf-8", delay=True), logging.INFO, formatter)
    for name in (PACKAGE, *LIBRARIES):
        logger = logging.getLogger(name)
        for handler in [each for each in logger.handlers if isinstance(each, MemoryHandler)]:
            handler.setTarget(to_file)
            handler.flush()
            logger.removeHandler(handler)
            logger.addHandler(to_file)


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


class _ScreenFormatter(logging.Formatter):
    """A line as it is; the level before it where that matters."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return level + record.getMessage()


def _handler(handler: Any, level: int, formatter: logging.Formatter | None = None) -> Any:
    handler.setLevel(level)
    handler.setFormatter(formatter)
    handler.addFilter(lambda record: not MISLEADING.search(record.getMessage()))
    return handler


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
