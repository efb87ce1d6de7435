"""A model in an engine, in a process of its own: its load time, its peak memory, its translations, its speed.

The process is on the CPU, forked from a server that has not loaded anything, and killed with this one.
"""

import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoints import bar_entries_without_token, load_checkpoint, load_tokenizer
from ..decoding import DecodingArguments, Engine, TransformersEngine, decode_all
from ..export import load_engine
from ..utils.errors import EXPECTED
from ..utils.measuring import memory

PRELOADED = [__name__, "datasets", "sacrebleu"]  # so that each process need not import the libraries anew
# How sentences are translated when they are timed, and how many more of them, since batches are done sooner.
WAYS = {"single": 1, "batched": 4}


@dataclass(frozen=True)
class Deployment:
    """What a process loads, and what it translates.

    Attributes:
        target: one of `export.TARGETS`.
        folder: that the engine loads; of `transformers` a checkpoint, the model itself in single precision.
        model: whose tokenizer it has, on the Hub or in a folder.
        revision: of the model.
        use_shortlist: that of the folder.
        decoding: how to translate.
        threads: of the engine.
        input_ids: the sources, from `encode_sources`.
        timed: for each of `WAYS` the sources that are timed.
    """

    target: str
    folder: str
    model: str
    revision: str
    use_shortlist: bool
    decoding: DecodingArguments
    threads: int
    input_ids: Sequence[list[int]]
    timed: Mapping[str, Sequence[list[int]]]

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Engine:
        """The engine, with the model's tokenizer."""
        if self.target == "transformers":
            own = {"dtype": torch.float32} if self.folder == self.model else {}
            model = load_checkpoint(self.folder, revision=self.revision, **own).eval()
            bar_entries_without_token(model, tokenizer)
            return TransformersEngine(model, tokenizer, self.decoding)
        options = {"use_shortlist": True} if self.use_shortlist else {}
        return load_engine(self.target).load(self.folder, tokenizer, self.decoding, **options)


class EngineProcess:
    """The process of a deployment, which has loaded it.

    Attributes:
        load_seconds: for the engine, without imports and tokenizer.

    Raises:
        RuntimeError: loading fails, or the process ends; likewise what its methods raise.
    """

    def __init__(self, deployment: Deployment):
        self.name = f"{deployment.target} with {deployment.folder}"
        context = _context()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, deployment), daemon=True)
        self.process.start()
        theirs.close()
        self.load_seconds: float = self._receive()

    def translate(self, advance: Callable[[int], None]) -> dict[str, Any]:
        """Translate all sources in batches.

        Args:
            advance: called with the number of sources that are done since the last call.

        Returns:
            `translations`, and `peak_mib`, by which the process's peak grew while it loaded and translated; None where
            the system does not say.
        """
        self.connection.send("all")
        return self._receive(advance)

    def time(self, way: str) -> None:
        """Translate the timed sources in one of `WAYS`."""
        self.connection.send(way)
        self._receive()

    def close(self) -> None:
        self.connection.close()
        self.process.join(timeout=5)  # at work it ends later, if it is not made to
        self.process.terminate()
        self.process.join()

    def _receive(self, advance: Callable[[int], None] = lambda items: None) -> Any:
        while True:
            try:
                kind, value = self.connection.recv()
            except (EOFError, ConnectionError):
                self.process.join()
                raise RuntimeError(
                    f"{self.name}: its process ended with status {self.process.exitcode}; is there too little memory?"
                ) from None
            if kind == "done":
                return value
            if kind == "failed":
                error = RuntimeError(f"{self.name}: {value[0]}")
                error.add_note(value[1])
                raise error
            advance(value)


def _context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _serve(connection: Connection, deployment: Deployment) -> None:
    """Load a deployment, then do what is asked for until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the process that has the terminal
    try:
        torch.set_num_threads(deployment.threads)
        PartialState(cpu=True)
        logging.disable_progress_bar()
        if deployment.target != "transformers":
            load_engine(deployment.target)
        tokenizer = load_tokenizer(deployment.model, deployment.revision)
        before = _memory("VmRSS")
        start = time.perf_counter()
        engine = deployment.load(tokenizer)
        connection.send(("done", time.perf_counter() - start))
        while True:
            order, found = connection.recv(), None
            if order == "all":
                found = {"translations": _translate_all(engine, deployment, connection)}
                found["peak_mib"] = None if before is None else _memory("VmHWM") - before
            else:
                # The least budget makes a batch of each.
                budget = 1 if order == "single" else deployment.decoding.batch_tokens
                decode_all(engine, deployment.timed[order], budget)
            connection.send(("done", found))
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        said = str(error) if isinstance(error, EXPECTED) else f"{type(error).__name__}: {error}"
        connection.send(("failed", (said, traceback.format_exc())))


def _translate_all(engine: Engine, deployment: Deployment, connection: Connection) -> list[str]:
    hypotheses = decode_all(
        engine,
        deployment.input_ids,
        deployment.decoding.batch_tokens,
        advance=lambda items: connection.send(("advance", items)),
    )
    return [texts[0] for texts in hypotheses]


def _memory(what: str) -> float | None:
    return memory(what) if sys.platform == "linux" else None
