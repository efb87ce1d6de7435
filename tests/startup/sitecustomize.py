"""Makes a deprecation that this project's code is warned of an error, in the tests and in every process they start.

Python's own filters go by the frame that a warning is attributed to, which for an argument of a model is one of the
wrappers around `forward`; some libraries log their deprecations and do not warn. Here the frame counts that made the
call, the wrappers left out. What a library does wrong by itself is its own affair.
"""

import logging
import sys
import warnings
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
OWN_FOLDERS = tuple(f"{ROOT / name}/" for name in ("src", "training", "hub_cards", "benchmarks"))
REMOTE_CODE = "_rs_marian.py"
LOGGING = ("/logging/__init__.py", "/transformers/utils/logging.py")
# They hand a call on to what it was meant for.
WRAPPERS = (
    "/transformers/utils/deprecation.py",
    "/transformers/utils/generic.py",
    "/transformers/utils/output_capturing.py",
    "/transformers/modeling_layers.py",
    "/torch/nn/modules/module.py",
    "/torch/utils/_contextlib.py",
)

DEPRECATIONS = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)

warn = warnings.warn


def is_called_by_us(warning: FrameType) -> bool:
    """Whether this project's code called the function that warns, be it through wrappers."""
    frame = warning.f_back
    while frame is not None and frame.f_code.co_filename.endswith(WRAPPERS):
        frame = frame.f_back
    file = frame.f_code.co_filename if frame is not None else ""
    return file.startswith(OWN_FOLDERS) or file.endswith(REMOTE_CODE)


def strict_warn(message, category=None, stacklevel=1, *args, **kwargs):
    kind = type(message) if isinstance(message, Warning) else category or UserWarning
    if issubclass(kind, DEPRECATIONS) and is_called_by_us(sys._getframe(1)):
        raise message if isinstance(message, Warning) else kind(message)
    warn(message, category, stacklevel + 1, *args, **kwargs)


class StrictHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        frame = sys._getframe(1)
        while frame.f_code.co_filename.endswith(LOGGING):
            frame = frame.f_back
        if "deprecated" in record.getMessage() and is_called_by_us(frame):
            raise FutureWarning(record.getMessage())


if warn.__name__ != strict_warn.__name__:  # a process of the tests that starts another runs this once more
    warnings.warn = strict_warn
    logging.getLogger("transformers").addHandler(StrictHandler(logging.WARNING))
