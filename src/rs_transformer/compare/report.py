"""A comparison as files: Markdown, JSON, one HTML page, a plot, and the figures in the child's model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_report(
    result: Mapping[str, Any], folder: str | Path, *, card: bool = True, benchmark: tuple[str, str] | None = None
) -> None:
    """Write `report.md`, `report.json`, `report.html` and `report.png`.

    Args:
        result: of `comparison.compare`.
        folder: where to; must exist.
        card: also write `comparison.json` and a new card into the child's folder, if it is one.
        benchmark: the dataset on the Hub and its task, as its `eval.yaml` has it, that the test sentences are; the
            child's folder then gets `.eval_results/comparison.yaml`, too.

    Raises:
        ValueError: matplotlib is not installed.
    """
    raise NotImplementedError
