"""Options that must lie in a range."""

import math
import operator

BOUNDS = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "more than"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}


def check_range(options: object, *names: str, **bounds: float) -> None:
    """Raise `ValueError` unless these options are finite numbers in a range, or None where they need not be given.

    Args:
        bounds: some of `least` and `most`, which are allowed, `above` and `below`, which are not.
    """
    for name in names:
        value = getattr(options, name)
        if value is None:
            continue
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
        if not all(BOUNDS[bound][0](value, limit) for bound, limit in bounds.items()):
            allowed = " and ".join(f"{BOUNDS[bound][1]} {limit:g}" for bound, limit in bounds.items())
            raise ValueError(f"{name} must be {allowed}, got {value}")
