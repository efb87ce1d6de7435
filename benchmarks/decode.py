"""Translation by every engine that training/export.py writes for: stock Marian 6 and RS 1x6, with any decoder depth.

    python benchmarks/decode.py --output decode.json --plot decode.png
    python benchmarks/decode.py --engines ctranslate2:int8 --models "Marian 6" "Marian 6, decoder 2" --vocab_size 58101
    python benchmarks/decode.py --engines ctranslate2:int8 --d_model 512 --tokenizer_name_or_path runs/mine \\
        --shortlist marian/lex.s2t --input_file test.ja

Sentences per second, the 50th and 95th percentile of a call's latency, file size, load time and peak memory; greedily
and with a beam, single sentences and batches. Weights are random, which is fair for speed since lengths are fixed:
every source has as many tokens, and the end of sentence is barred, so that every translation is as long as it may be.
In one process the systems of a case take turns, 4 calls of a single sentence or one of 16; the first round is not
counted. A ratio is the median of the rounds' ratios to stock Marian in the same engine, without shortlist. Load time
and memory are those of a fresh process, the latter what its peak is above what it has after its imports, while it
loads and translates a batch of 16 greedily.

With `--shortlist`, as `export --to marian --shortlist` writes it, the models have the vocabulary of the tokenizer that
is named, the sources are sentences of `--input_file` that have the length, others in each call, and engines that take
a shortlist are there with it, too.

Marian's engine gives each thread a batch of its own, so that the single batch of a call has one thread.
"""

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import build, interleave, memory, parse_args, print_table
from transformers import AutoTokenizer, MarianTokenizer, PreTrainedTokenizerBase

from rs_transformer.checkpoints import load_translator
from rs_transformer.commands.export import load_engine
from rs_transformer.corpus import read_sentences
from rs_transformer.decoding import DecodingArguments, Engine, TransformersEngine
from rs_transformer.shortlist import Shortlist
from rs_transformer.tokenization import encode, train_tokenizer

VANILLA = "Marian 6"
# Each with its decoder's depth.
MODELS = {
    VANILLA: 6,
    "Marian 6, decoder 2": 2,
    "Marian 6, decoder 1": 1,
    "RS 1x6": 6,
    "RS 1x6, decoder 2": 2,
    "RS 1x6, decoder 1": 1,
}
DEFAULT_MODELS = (VANILLA, "RS 1x6", "RS 1x6, decoder 2")
WITH_SHORTLIST = "+shortlist"
ENGINES = ("pytorch", "ctranslate2", "ctranslate2:int8", "onnx", "onnx:int8", "marian")
CALLS = {1: 4, 16: 1}  # of a system in a round
WEIGHTS = (".safetensors", ".bin", ".onnx", ".npz")
CORPUS = Path(__file__).resolve().parents[1] / "training" / "data" / "tanaka-excerpt" / "train.jsonl"


def write_tokenizer(folder: Path, vocab_size: int) -> MarianTokenizer:
    """A tokenizer of the demo's corpus; entries that nothing is cut into fill its vocabulary up."""
    pairs = [json.loads(line)["translation"] for line in CORPUS.read_text("utf-8").splitlines()]
    sides = ([pair[language] for pair in pairs] for language in ("ja", "en"))
    train_tokenizer(*sides, folder, source_lang="ja", target_lang="en", vocab_size=2000)
    entries = list(json.loads((folder / "vocab.json").read_text("utf-8")))
    padding = entries.pop()
    entries += [f"filler{number}" for number in range(vocab_size - len(entries) - 1)] + [padding]
    vocabulary = folder / "filled.json"
    vocabulary.write_text(json.dumps({entry: index for index, entry in enumerate(entries)}))
    pieces = {f"{side}_spm": str(folder / f"{side}.spm") for side in ("source", "target")}
    return MarianTokenizer(vocab=str(vocabulary), **pieces, source_lang="ja", target_lang="en")


def write_models(
    names: Sequence[str], folder: Path, tokenizer: PreTrainedTokenizerBase, d_model: int, seed: int
) -> dict[str, Path]:
    """A checkpoint of each of some `MODELS`, which never ends a translation by itself."""
    folders = {}
    for name in names:
        model = build(name, d_model, seed, vocab_size=len(tokenizer), decoder_depth=MODELS[name])
        with torch.no_grad():
            model.final_logits_bias[:, [tokenizer.eos_token_id, tokenizer.pad_token_id]] = -1e4
        folders[name] = folder / f"{name} {d_model}".replace(" ", "_")
        for part in (model, tokenizer):
            part.save_pretrained(folders[name])
    return folders


def convert(engine: str, folder: Path, shortlist: Shortlist | None) -> Path:
    """The folder that an engine loads."""
    if engine == "pytorch":
        return folder
    target, _, quantization = engine.removesuffix(WITH_SHORTLIST).partition(":")
    output = folder.with_name(f"{folder.name}_{engine}")
    load_engine(target).convert(str(folder), output, quantization or "float32")
    if engine.endswith(WITH_SHORTLIST):
        load_engine(target).write_shortlist(shortlist, output, AutoTokenizer.from_pretrained(folder))
    return output


def load(engine: str, folder: Path, new_tokens: int, num_beams: int) -> Engine:
    """A decoder whose translations have `new_tokens` tokens."""
    target = engine.removesuffix(WITH_SHORTLIST).partition(":")[0]
    # Of the engines with searches of their own the last token that they may say is not the end.
    longest = new_tokens + (target in ("ctranslate2", "marian"))
    decoding = DecodingArguments(num_beams=num_beams, length_penalty=0.0, max_new_tokens=longest)
    if engine == "pytorch":
        return TransformersEngine(*load_translator(str(folder)), decoding)
    options = {"use_shortlist": True} if engine.endswith(WITH_SHORTLIST) else {}
    return load_engine(target).load(folder, AutoTokenizer.from_pretrained(folder), decoding, **options)


def translate_in_turn(engine: Engine, batches: Sequence[list[list[int]]]) -> Callable[[], object]:
    """A call that translates the next batch."""
    turn = cycle(batches)
    return lambda: engine.translate_batch(next(turn))


def sources(sentences: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids, the end of sentence last."""
    ids = np.random.default_rng(seed).integers(2, vocab_size - 1, (sentences, length - 1))
    return [[*row, 0] for row in ids.tolist()]


def batches_of(rows: list[list[int]], size: int) -> list[list[list[int]]]:
    """Whole batches of sentences of one length."""
    turn = iter(rows)
    found = list(iter(lambda: list(islice(turn, size)), []))
    whole = [batch for batch in found if len(batch) == size]
    if not whole:
        raise SystemExit(f"input_file has {len(rows)} sentences of the length, a batch has {size}")
    return whole


def footprint(engine: str, folder: Path, new_tokens: int, batch: Sequence[list[int]]) -> dict[str, float]:
    """Load time and peak memory of a fresh process, and the size of the model's files."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        load_seconds, mib = pool.submit(_load_and_translate, engine, folder, new_tokens, batch).result()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in WEIGHTS)
    return {"MB": round(size / 1e6, 1), "load s": round(load_seconds, 2), "peak MiB": round(mib)}


def _load_and_translate(engine: str, folder: Path, new_tokens: int, batch: Sequence[list[int]]) -> tuple[float, float]:
    torch.set_num_threads(1)
    if engine != "pytorch":
        load_engine(engine.removesuffix(WITH_SHORTLIST).partition(":")[0])
    before = memory("VmRSS")
    start = time.perf_counter()
    loaded = load(engine, folder, new_tokens, 1)
    seconds = time.perf_counter() - start
    loaded.translate_batch(batch)
    return seconds, memory("VmHWM") - before


def rows_of(seconds: dict[tuple[str, str], list[float]], batch: int) -> list[dict[str, Any]]:
    """A row for each engine and model, from the seconds of their calls, round by round."""
    rows = []
    medians = {name: np.median(np.reshape(times, (-1, CALLS[batch])), axis=1) for name, times in seconds.items()}
    for (engine, model), times in seconds.items():
        ratios = medians[engine.removesuffix(WITH_SHORTLIST), VANILLA] / medians[engine, model]
        milliseconds = 1000 * np.percentile(times, [50, 95])
        rows.append(
            {
                "engine": engine,
                "model": model,
                "sentences/s": round(float(batch / np.median(times)), 1),
                "ratio": round(statistics.median(ratios.tolist()), 2),
                "p50 ms": round(float(milliseconds[0]), 1),
                "p95 ms": round(float(milliseconds[1]), 1),
            }
        )
    return rows


def print_speed(rows: Sequence[dict[str, Any]]) -> None:
    for d_model, threads in dict.fromkeys((row["d_model"], row["threads"]) for row in rows):
        print(f"\nd_model {d_model}, {threads} thread(s): sentences/s (ratio to {VANILLA}); p50 / p95 ms of a call\n")
        table: dict[tuple[str, str], dict[str, Any]] = {}
        for row in rows:
            if (row["d_model"], row["threads"]) == (d_model, threads):
                name = (row["engine"], row["model"])
                cells = table.setdefault(name, dict(zip(("engine", "model"), name, strict=True)))
                cells[f"batch {row['batch']}, beam {row['beam']}"] = (
                    f"{row['sentences/s']} ({row['ratio']:.2f}); {row['p50 ms']} / {row['p95 ms']}"
                )
        print_table(list(table.values()))


def plot(rows: Sequence[dict[str, Any]], threads: int, file: str) -> None:
    """Greedy decoding with so many threads: a panel for each width and batch."""
    from matplotlib.figure import Figure

    d_models = list(dict.fromkeys(row["d_model"] for row in rows))
    batches = list(CALLS)
    figure = Figure(figsize=(11, 3.2 * len(d_models)), layout="constrained")
    grid = figure.subplots(len(d_models), len(batches), squeeze=False)
    for panels, d_model in zip(grid, d_models, strict=True):
        for axes, batch in zip(panels, batches, strict=True):
            case = {"d_model": d_model, "threads": threads, "batch": batch, "beam": 1}
            here = [row for row in rows if case.items() <= row.items()]
            engines = list(dict.fromkeys(row["engine"] for row in here))
            for number, model in enumerate(DEFAULT_MODELS):
                speeds = [row["sentences/s"] for row in here if row["model"] == model]
                axes.bar(np.arange(len(engines)) + 0.27 * (number - 1), speeds, 0.25, label=model)
            axes.set_xticks(range(len(engines)), engines, fontsize=8)
            axes.set(title=f"d_model {d_model}, batch {batch}, greedy, {threads} thread", ylabel="sentences/s")
            axes.grid(axis="y", alpha=0.3)
    grid[0][0].legend(fontsize=8)
    figure.savefig(file, dpi=150)


def main() -> None:
    args = parse_args(
        __doc__,
        rounds=5,
        threads=(int, [1, 2], "Threads of each engine."),
        engines=(str, list(ENGINES), f"Of {', '.join(ENGINES)}."),
        models=(str, list(DEFAULT_MODELS), f"Of {'; '.join(MODELS)}."),
        shortlist=(str, None, "A shortlist in Marian's form."),
        tokenizer_name_or_path=(str, None, "The tokenizer of the shortlist."),
        input_file=(str, None, "Sentences for the shortlist."),
        beams=(int, [1, 4], "Beams; 1 is greedy."),
        length=(int, 24, "Tokens of a source."),
        new_tokens=(int, 24, "Tokens of every translation."),
        vocab_size=(int, 7000, "Entries of the vocabulary."),
        plot=(str, None, "Where to draw sentences per second."),
    )
    rows: list[dict[str, Any]] = []
    footprints: list[dict[str, Any]] = []
    engines, shortlist = list(args.engines), None
    with tempfile.TemporaryDirectory() as temporary:
        if args.shortlist:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name_or_path)
            shortlist = Shortlist.load(args.shortlist, tokenizer)
            engines += [f"{name}{WITH_SHORTLIST}" for name in engines if name.startswith(("ctranslate2", "marian"))]
            ids = encode(tokenizer, list(dict.fromkeys(read_sentences(args.input_file, "source"))))
            batches = {batch: batches_of([row for row in ids if len(row) == args.length], batch) for batch in CALLS}
        else:
            tokenizer = write_tokenizer(Path(temporary, "tokenizer"), args.vocab_size)
            batches = {batch: [sources(batch, args.length, args.vocab_size, args.seed)] for batch in CALLS}
        for d_model in args.d_model:
            checkpoints = write_models(args.models, Path(temporary), tokenizer, d_model, args.seed)
            folders = {
                (engine, model): convert(engine, checkpoint, shortlist)
                for engine in engines
                for model, checkpoint in checkpoints.items()
            }
            for (engine, model), folder in folders.items():
                what = {"d_model": d_model, "engine": engine, "model": model}
                footprints.append(what | footprint(engine, folder, args.new_tokens, batches[16][0]))
            for threads in args.threads:
                torch.set_num_threads(threads)
                for batch, beam in product(CALLS, args.beams):
                    steps = {
                        name: translate_in_turn(load(name[0], folder, args.new_tokens, beam), batches[batch])
                        for name, folder in folders.items()
                    }
                    case = {"d_model": d_model, "threads": threads, "batch": batch, "beam": beam}
                    seconds = interleave(steps, args.rounds, warm_up=1, calls=CALLS[batch])
                    rows += [case | row for row in rows_of(seconds, batch)]
                    if args.output:  # what is measured is kept, whatever comes
                        result = {"options": vars(args), "speed": rows, "footprint": footprints}
                        Path(args.output).write_text(json.dumps(result, indent=1), encoding="utf-8")
    print_speed(rows)
    print()
    print_table(footprints)
    if args.plot:
        plot(rows, args.threads[0], args.plot)


if __name__ == "__main__":
    main()
