"""What a user sees of a command: short lines on the screen; the rest in a log file."""

import logging
import re
import sys
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
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


def bars_on_terminals() -> bool:
    """Switch the libraries' progress bars off where standard error is no terminal; whether it is one."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
    return sys.stderr.isatty()


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
