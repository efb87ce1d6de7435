"""A parent model and a child made from it, side by side: size, speed, memory and quality in every engine, in one run.

Not for how it is shown (`report.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..decoding import DecodingArguments


def compare(
    parent: str,
    child: str,
    sources: Sequence[str],
    references: Sequence[str] | None,
    output_dir: str | Path,
    *,
    engines: Sequence[str] | None = None,
    parent_exports: Sequence[str | Path] = (),
    child_exports: Sequence[str | Path] = (),
    revision: str = "main",
    decoding: DecodingArguments | None = None,
    dataset: str = "test",
    threads: int = 1,
    timed_sentences: int = 100,
    rounds: int = 5,
    examples: int = 20,
    bootstrap_samples: int = 1000,
) -> dict[str, Any]:
    """Measure a parent and a child in the same engines, taking turns, each engine in a process of its own.

    What is finished is kept in `output_dir/work`, and the same call goes on from there: exports, translations, and the
    timings of an engine.

    Args:
        parent: a Marian or RSMarian model, on the Hub or in a folder.
        child: likewise; of the same languages, with a tokenizer of its own.
        sources: the test sentences.
        references: one for each source; None where there are none.
        output_dir: made if need be; it holds this comparison or nothing.
        engines: each `NAME` or `NAME:QUANTIZATION`, such as `ctranslate2:int8`, of `export.TARGETS`; `transformers` is
            the model itself in PyTorch. Without a quantization it is int8 where the engine has it. Default: those of
            `child_exports`, or without them all that are installed.
        parent_exports, child_exports: folders that the command `export` has written, which are taken as they are, with
            their shortlists. What is not among them is exported into `output_dir/work`, without one.
        revision: of the parent: branch, tag or commit.
        decoding: how to translate, for quality and speed alike.
        dataset: what the test data is called.
        threads: of each engine; Marian's takes one.
        timed_sentences: the first so many are timed.
        rounds: times that each model translates them, in turn; a speed is the median.
        examples: translations that are shown, those in which parent and child differ most.
        bootstrap_samples: resamplings of the paired bootstrap.

    Returns:
        What `report.write_report` shows and `report.json` holds.

    Raises:
        ValueError: models of different languages, no sentences, an engine that is not installed, an export of another
            kind, or an `output_dir` with another comparison in it.
        OSError: there is no such model.
        RuntimeError: the process of an engine ended, as where there is too little memory.
    """
    raise NotImplementedError
