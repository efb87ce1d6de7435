"""Train what a study's grid still lacks, score it, and write a small JSON file for each cell.

    nice python benchmarks/study/run.py benchmarks/study/tanaka.yaml --jobs 2 --deadline 150

A cell is a system and a seed. Finished ones are in `benchmarks/results/study`, JSON and translations, and are not done
again; a cell that was stopped goes on from its last checkpoint in the work folder. Cells are taken in the order of the
grid, one seed after the other, each as soon as what it is made from is there; each job has its share of the cores, or
the one GPU with the others. The corpora are expected in `data/`, each in a folder of its name.
"""

import argparse
import gzip
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from rs_transformer.checkpoints import load_translator
from rs_transformer.layer_transfer import count_parameters
from rs_transformer.metrics import corpus_scores
from rs_transformer.training.run_folder import complete_checkpoints, is_finished
from rs_transformer.utils.files import claimed, read_mapping, write_json
from rs_transformer.utils.text_files import read_columns

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "study"
PACKAGES = ("rs-transformer", "torch", "transformers", "sacrebleu")


@dataclass(frozen=True)
class Cell:
    """One system, trained with one seed."""

    system: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.system}-{self.seed}"


def read_grid(file: Path) -> dict[str, Any]:
    """A grid: its own keys, and those of its `base`, a file beside it."""
    grid = yaml.safe_load(file.read_text("utf-8"))
    return read_grid(file.parent / grid.pop("base")) | grid if "base" in grid else grid


class Study:
    """A grid, and where its corpora, models and results are.

    Raises:
        ValueError: a system is made from another that is not in the grid, or by no command.
    """

    def __init__(self, grid_file: Path, data: Path, work: Path, results: Path):
        self.grid = read_grid(grid_file)
        self.data, self.work = data.resolve(), work.resolve() / self.grid["name"]
        self.results = results / self.grid["name"]
        for system, steps in self.grid["systems"].items():
            if not steps:
                raise ValueError(f"{grid_file}: {system} is made by no command")
            for cell in self.needs(Cell(system, 0)):
                if cell.system == system:
                    raise ValueError(f"{grid_file}: {system} is made from itself")

    def cells(self, only: Sequence[str] = ("*",)) -> list[Cell]:
        """All cells in order, seeds outside; with all that the named ones are made from."""
        found: dict[Cell, None] = {}

        def add(cell: Cell) -> None:
            for each in () if self.is_given(cell) else self.needs(cell):
                add(each)
            found[cell] = None

        for seed in self.grid["seeds"]:
            for system in self.grid["systems"]:
                cell = Cell(system, seed)
                if any(fnmatch(cell.name, pattern) or fnmatch(system, pattern) for pattern in only):
                    add(cell)
        return list(found)

    def needs(self, cell: Cell) -> list[Cell]:
        """The cells that one is made from."""
        text = json.dumps(self.grid["systems"][cell.system])
        return [Cell(system, cell.seed) for system in self.grid["systems"] if re.search(rf"\{{{system}[}}/]", text)]

    def model(self, cell: Cell) -> Path:
        """The folder of a cell's model, which its last command makes, or where the grid says that it is already."""
        if self.is_given(cell):
            return ROOT / self.grid["given"][cell.name]
        last = list(self.grid["systems"][cell.system])[-1]
        return self._folder(cell, last) / ("model" if last.split()[0] == "compress" else "")

    def _folder(self, cell: Cell, step: str) -> Path:
        return self.work / cell.name / step.replace(" ", "_")

    def int8(self, cell: Cell) -> Path:
        """The folder of a cell's model for CTranslate2, in int8."""
        return self.work / cell.name / "int8"

    def convert(self, cell: Cell) -> None:
        """Make it, unless it is there."""
        if not (self.int8(cell) / "model.bin").is_file():
            from rs_transformer.export import ctranslate2

            self.int8(cell).parent.mkdir(parents=True, exist_ok=True)
            ctranslate2.convert(str(self.model(cell)), self.int8(cell), "int8")

    def is_given(self, cell: Cell) -> bool:
        return cell.name in self.grid.get("given", {})

    def record(self, cell: Cell) -> Path:
        return self.results / f"{cell.name}.json"

    def translations(self, cell: Cell, test: str) -> Path:
        return self.results / f"{cell.name}.{test}.txt.gz"

    def pairs(self, test: str) -> tuple[list[str], list[str]]:
        """Sources and references of a test set."""
        columns = [("translation", self.grid[side]) for side in ("source_lang", "target_lang")]
        settings = self.grid["tests"][test]
        file = self.data / settings["file"].format(**self._names())
        rows = list(read_columns(str(file), columns))
        references = [str(target).lower() if settings.get("lowercase") else str(target) for _, target in rows]
        return [str(source) for source, _ in rows], references

    def _names(self) -> dict[str, str]:
        """What a grid's options call by name: {corpus}, {source_lang}, {target_lang}."""
        return {name: self.grid[name] for name in ("corpus", "source_lang", "target_lang") if name in self.grid}

    def on_device(self, command: str) -> dict[str, Any]:
        """The options that a command has beside its own on a GPU, or where there is none."""
        return self.grid.get("gpu" if torch.cuda.is_available() else "cpu", {}).get(command, {})

    def commands(self, cell: Cell) -> Iterator[tuple[str, Path, list[str]]]:
        """Of each step the command, its folder, and its arguments."""
        steps = self.grid["systems"][cell.system]
        folders = {step: str(self._folder(cell, step)) for step in steps}
        for other in self.needs(cell):
            folders[other.system] = str(self.model(other))
            earlier = self.grid["systems"][other.system]
            folders |= {f"{other.system}/{step}": str(self._folder(other, step)) for step in earlier}
        names = self._names() | folders
        for step, options in steps.items():
            command = step.split()[0]
            options = {**self.grid["defaults"].get(command, {}), **self.on_device(command), **options}
            options |= {} if command == "synthesize" else {"seed": cell.seed}
            options["output_dir"] = folders[step]
            recipe = options.pop("recipe", None)
            arguments = [] if recipe is None else [str(ROOT / recipe)]
            for name, value in options.items():
                values = value if isinstance(value, list) else [value]
                arguments += [f"--{name}", *(str(each).format(data=self.data, **names) for each in values)]
            yield command, Path(folders[step]), arguments


class Runner:
    """Runs a study's cells, some at a time, until they are done or the deadline is over."""

    def __init__(self, study: Study, jobs: int, deadline: float):
        self.study, self.jobs, self.deadline = study, jobs, deadline
        self.stopped = threading.Event()
        self.children: set[subprocess.Popen] = set()
        self.loading = threading.Lock()  # transformers loads in one thread of a process at a time
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}

    def run(self, cells: Sequence[Cell]) -> None:
        """Train and score what is missing."""
        waiting = self.missing(cells)
        running: dict[Future, Cell] = {}
        failed: list[Cell] = []
        with ThreadPoolExecutor(self.jobs) as pool:
            timer = threading.Timer(max(0.0, self.deadline - time.monotonic()), self.stop)
            timer.daemon = True
            timer.start()
            try:
                while (waiting or running) and not self.stopped.is_set():
                    for cell in waiting[:]:
                        pending = {*waiting, *running.values(), *failed}
                        if len(running) < self.jobs and pending.isdisjoint(self.study.needs(cell)):
                            waiting.remove(cell)
                            running[pool.submit(self.make, cell)] = cell
                    if not running:
                        break
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        cell = running.pop(done)
                        if error := done.exception():
                            failed.append(cell)
                            if not self.stopped.is_set():
                                say(f"{cell.name}: {error}")
            finally:
                self.stop()
                timer.cancel()
        if waiting or failed or running:
            names = [cell.name for cell in (*running.values(), *failed, *waiting)]
            say(f"not done: {' '.join(names)}; the same command goes on")

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """What is not scored, and the models that it is made from, where these are not in the work folder.

        Args:
            cells: each after all that it is made from.
        """
        found: list[Cell] = []
        for cell in reversed(cells):
            is_used = any(cell in self.study.needs(user) for user in found if not self.study.is_given(user))
            is_there = self.study.is_given(cell) or is_finished(self.study.model(cell))
            if not self.study.record(cell).is_file() or (is_used and not is_there):
                found.insert(0, cell)
        return found

    def stop(self) -> None:
        """End all commands; each goes on another time."""
        self.stopped.set()
        for child in tuple(self.children):
            child.terminate()

    def make(self, cell: Cell) -> None:
        """Train a cell and write its record."""
        started = time.time()
        log = self.study.work / cell.name / "study.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        say(f"{cell.name}: begins, {log}")
        steps = list(self.study.commands(cell))
        commands = [[command, *arguments] for command, _, arguments in steps]
        made_by = log.with_name("commands.json")
        if not self.study.is_given(cell) and made_by.is_file() and json.loads(made_by.read_text()) != commands:
            raise RuntimeError(
                f"{log.parent} was begun by other commands: remove it, or bring the grid's options back"
            )
        write_json(commands, made_by)
        for command, folder, arguments in steps:
            if self.study.is_given(cell) or is_made(command, folder):
                continue
            if command == "train" and complete_checkpoints(folder):
                arguments += ["--resume_from_checkpoint", "true"]
            self._call(command, arguments, log)
        self.score(cell, commands, log)
        scores = json.loads(self.study.record(cell).read_text())["scores"]
        told = ", ".join(f"{test} {row['bleu']:.2f}" for test, row in scores.items())
        say(f"{cell.name}: {told} BLEU, {(time.time() - started) / 60:.0f} min")

    def score(self, cell: Cell, commands: Sequence[Sequence[str]], log: Path) -> None:
        """Translate the test sets, and write translations and record."""
        model, scores = self.study.model(cell), {}
        self.study.results.mkdir(parents=True, exist_ok=True)
        pairs = {test: self.study.pairs(test) for test in self.study.grid["tests"]}
        source, output = (self.study.work / cell.name / f"tests.{end}" for end in ("src", "txt"))
        source.write_text("".join(f"{line}\n" for sources, _ in pairs.values() for line in sources), encoding="utf-8")
        decoding = self.study.grid["decoding"]
        options = {"input_file": source, "output_file": output, "overwrite": "true"}
        options |= decoding | self.study.on_device("translate")
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        self._call("translate", ["--model_name_or_path", str(model), *arguments], log)
        translated = output.read_text("utf-8").split("\n")[:-1]
        if len(translated) != sum(len(references) for _, references in pairs.values()):
            raise RuntimeError(f"{source} has another number of lines than the tests have sentences")
        lines = iter(translated)
        for test, (_, references) in pairs.items():
            translations = list(islice(lines, len(references)))
            scores[test] = corpus_scores(translations, references, self.study.grid["target_lang"])
            scores[test] |= {"sentences": len(translations), **decoding}
            # Without a time in it, equal translations make equal files.
            packed = gzip.compress("".join(f"{line}\n" for line in translations).encode(), mtime=0)
            self.study.translations(cell, test).write_bytes(packed)
        with self.loading:
            loaded, _ = load_translator(str(model))
            int8_bytes = self._int8_bytes(cell)
        trained = read_mapping(model / "results.json")
        record = {
            "system": cell.system,
            "seed": cell.seed,
            "scores": scores,
            "parameters": count_parameters(loaded),
            "int8_bytes": int8_bytes,
            "training": trained.get("training"),
            "weights": trained.get("weights"),
            "commands": self._plain(commands),
            "given": self.study.grid.get("given", {}).get(cell.name),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "finished": datetime.now(UTC).isoformat(timespec="minutes"),
            "versions": {name: version(name) for name in PACKAGES},
        }
        write_json(record, self.study.record(cell))

    def _plain(self, commands: Sequence[Sequence[str]]) -> list[str]:
        """Commands without the folders of this machine."""
        places = {str(self.study.data): "data", str(self.study.work): "runs", f"{ROOT}/": ""}
        told = [" ".join(["rs-transformer", *command]) for command in commands]
        for place, name in places.items():
            told = [command.replace(place, name) for command in told]
        return told

    def _int8_bytes(self, cell: Cell) -> int | None:
        """The size of a model's file in CTranslate2's int8; None where that is not installed."""
        if importlib.util.find_spec("ctranslate2") is None:
            return None
        self.study.convert(cell)
        return (self.study.int8(cell) / "model.bin").stat().st_size

    def _call(self, command: str, arguments: Sequence[str], log: Path) -> None:
        if self.stopped.is_set():
            raise RuntimeError("stopped")
        with open(log, "a", encoding="utf-8") as output:
            output.write(f"{' '.join([command, *arguments])}\n")
            output.flush()
            program = [sys.executable, "-m", f"rs_transformer.commands.{command}", *arguments]
            with subprocess.Popen(program, stdout=output, stderr=output, env=self.environment, cwd=ROOT) as child:
                self.children.add(child)
                if self.stopped.is_set():  # in between
                    child.terminate()
                code = child.wait()
                self.children.discard(child)
        if code:
            raise RuntimeError(f"{command} ended with {code}, see {log}")


def is_made(command: str, folder: Path) -> bool:
    """Whether a command has done all in its folder."""
    if command in ("train", "distill"):
        return is_finished(folder)
    last = {"synthesize": "synthesis.json", "compress": "model"}.get(command, "")  # what it makes last
    return (folder / last).exists()


def say(line: str) -> None:
    print(f"{datetime.now():%H:%M} {line}", flush=True)


def parse(**options: tuple[Any, list[str] | None, str]) -> tuple[Study, argparse.Namespace]:
    """The study and the options of the command line.

    Args:
        options: a script's own ones: default, choices and help.
    """
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="Where the corpora are.")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "study", help="Where models are made.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    for name, (default, choices, text) in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, choices=choices, help=text)
    args = parser.parse_args()
    return Study(args.grid, args.data, args.work, args.results), args


def main() -> None:
    study, args = parse(
        only=("*", None, "Systems, or cells such as rs6-1, with commas; may have * in them."),
        jobs=(1, None, "Cells at a time (default 1)."),
        deadline=(1e6, None, "Stop after so many minutes."),
    )
    study.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))  # and its children with it
    deadline = time.monotonic() + 60 * args.deadline
    with claimed(study.work / "study", True):
        Runner(study, args.jobs, deadline).run(study.cells(args.only.split(",")))


if __name__ == "__main__":
    main()
