"""Kill commands at random moments, start them again, and hold what comes of it to a run that nobody killed.

    python benchmarks/kill_check.py --rounds 34 --seed 1
    python benchmarks/kill_check.py --rounds 11 --seed 1 --only "compress*"

The task is that of the tests, `tests/reverse_task.py`. In turn a process is killed (SIGKILL) while it trains, saves a
checkpoint, evaluates the final model, trains for the second time after a first kill, distils, translates, or is in one
of the stages of a compression: at a moment drawn evenly from the time that this takes when it is not disturbed. The
same command then goes on. Compared are weights, translations, scores, learning curve and records, but for times; and
what else lay in the folder, such as `checkpoint-best`, must be as before. Exits with 1 if anything differs. Linux; no
accelerator.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="kill_check_cache_")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
import yaml
from common import print_table
from reverse_task import write_task

from rs_transformer.training.run_folder import weights_digest

ROOT = Path(__file__).resolve().parents[1]
COMPRESS = "rs_transformer.commands.compress"
COMPRESS_STAGES = ("translate", "trim", "collapse", "distill", "choose_depth", "distill_shallow")
COMPRESS_STAGES += ("lay_out", "export", "report")
TRAINER = "rs_transformer.training.trainer:TranslationTrainer"
# What is killed: the command, and the function in whose time that happens.
STAGES = {
    "train": ("train", f"{TRAINER}._run_epoch"),
    "save": ("train", f"{TRAINER}._save_checkpoint"),
    "final evaluation": ("train", "rs_transformer.commands.train:final_evaluation"),
    "resume": ("train", f"{TRAINER}._run_epoch"),
    "distill": ("distill", "rs_transformer.commands.distill:distill"),
    "translate": ("translate", "rs_transformer.commands.translate:translate_file"),
    "compress: plan": ("compress", f"{COMPRESS}:new_plan"),
    **{f"compress: {stage}": ("compress", f"{COMPRESS}:Compression.{stage}") for stage in COMPRESS_STAGES},
}
FOREIGN = ("checkpoint-best/model.txt", "checkpoint-10-keep/model.txt", "checkpoint-3/model.txt", "notes.txt")
# What is another in each run.
TIMES = (
    "runtime",
    "seconds",
    "per_second",
    "speedup",
    "output_dir",
    "resume_from_checkpoint",
    "logging_dir",
    "rounds",
)
TRAIN = "--num_train_epochs 3 --max_train_samples 1200 --save_strategy steps --save_steps 17 --eval_strategy steps "
TRAIN += "--eval_steps 17 --logging_steps 10 --dropout 0.1 --average_checkpoints 2 --load_best_model_at_end true "
TRAIN += "--metric_for_best_model loss --save_total_limit 3 --encoder_unique_layers 2 --decoder_unique_layers 2"
DISTILL = "--source_lang fw --target_lang bw --max_train_samples 400 --teacher_num_beams 2 --teacher_n_best 2 "
DISTILL += "--shard_size 40 --word_weight 0.5 --word_top_k 4 --max_source_length 16 --max_target_length 16 "
DISTILL += "--d_model 64 --encoder_ffn_dim 128 --decoder_ffn_dim 128 --encoder_attention_heads 4 --num_beams 1 "
DISTILL += "--decoder_attention_heads 4 --encoder_layers 2 --decoder_layers 2 --dropout 0.1 --init_std 0.1 "
DISTILL += "--max_position_embeddings 32 --max_tokens 256 --learning_rate 2e-3 --max_steps 40 --eval_strategy no "
DISTILL += "--save_strategy steps --save_steps 11 --report_to none --seed 3 --logging_steps 7 --max_new_tokens 16"
COMPRESSION = (
    "--max_train_samples 400 --max_source_length 16 --max_target_length 16 --num_beams 1 --max_new_tokens 16 "
)
COMPRESSION += "--max_vocabulary 25 --max_bleu_loss 0.5 --updates 40 --calibration_updates 20 "
COMPRESSION += "--max_tokens 256 --word_weight 0.5 --bf16 false --teacher_num_beams 2 --min_same 0"


def commands(work: Path, task: dict[str, Path]) -> dict[str, list[str]]:
    """The options of each command, but for its output."""
    files = [part for split, file in task.items() for part in (f"--{split}_file", str(file))]
    teacher = str(work / "whole" / "train" / "out")
    sources = work / "sources.txt"
    rows = [json.loads(line)["translation"]["fw"] for line in task["train"].read_text().splitlines()[:600]]
    sources.write_text("".join(f"{row}\n" for row in rows))
    return {
        "train": [str(ROOT / "tests" / "reverse.yaml"), *files, *TRAIN.split()],
        "distill": ["--teachers", teacher, *files, *DISTILL.split()],
        "compress": [teacher, *files, "--monolingual_file", str(sources), *COMPRESSION.split()],
        "translate": ["--model_name_or_path", teacher, "--input_file", str(sources), "--chunk_size", "60"],
    }


def output_options(command: str, folder: Path, again: bool) -> list[str]:
    """Where a command writes, and how it goes on."""
    if command == "translate":
        return ["--output_file", str(folder / "out" / "translations.txt")]
    resume = ["--resume_from_checkpoint", "true"] if command == "train" and again else []
    return ["--output_dir", str(folder / "out"), *resume]


def work_through(
    command: str, options: Sequence[str], places: Iterable[str], connection: Connection, log: str
) -> None:
    """What the process does: the command, telling when one of some functions begins and ends."""
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    torch.set_num_threads(1)
    for at in places:
        tell(at, connection)
    importlib.import_module(f"rs_transformer.commands.{command}").main(list(options))


def tell(at: str, connection: Connection) -> None:
    """Have a function say when it begins and ends."""
    place, _, name = at.rpartition("." if "." in at.split(":")[1] else ":")
    owner = pkgutil.resolve_name(place)
    function = getattr(owner, name)

    def telling(*args: Any, **kwargs: Any) -> Any:
        connection.send((at, time.monotonic()))
        result = function(*args, **kwargs)
        connection.send((at, time.monotonic()))
        return result

    setattr(owner, name, telling)


def start(command: str, options: Sequence[str], places: Iterable[str], folder: Path) -> tuple[Any, Connection]:
    receiving, sending = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    log = str(folder / "log.txt")
    process = context.Process(target=work_through, args=(command, options, list(places), sending, log))
    process.start()
    sending.close()
    return process, receiving


def finish(command: str, options: Sequence[str], places: Iterable[str], folder: Path) -> dict[str, list[float]]:
    """Run a command to its end; for each function the seconds of its calls."""
    process, connection = start(command, options, places, folder)
    moments: dict[str, list[float]] = {}
    try:
        while True:
            at, moment = connection.recv()
            moments.setdefault(at, []).append(moment)
    except EOFError:
        process.join()
    if process.exitcode:
        raise RuntimeError(f"{command} failed: see {folder / 'log.txt'}")
    return {
        at: [end - begin for begin, end in zip(found[::2], found[1::2], strict=True)] for at, found in moments.items()
    }


def kill(
    command: str, options: Sequence[str], at: str, folder: Path, seconds: Sequence[float], draw: random.Random
) -> bool:
    """Run a command and kill it in a call of the function; False if it was faster than that."""
    call = draw.choices(range(len(seconds)), weights=seconds)[0]
    delay = draw.uniform(0, seconds[call])
    process, connection = start(command, options, [at], folder)
    try:
        for _ in range(2 * call + 1):
            connection.recv()
    except EOFError:
        process.join()
        return False
    process.join(delay)
    process.kill()
    process.join()
    return process.exitcode < 0


def plain(data: Any) -> Any:
    """Records without what differs from run to run: times, paths, commands."""
    if isinstance(data, dict):
        kept = {name: value for name, value in data.items() if not any(part in name for part in TIMES)}
        return {name: plain(value) for name, value in kept.items() if name not in ("command", "resumed", "system")}
    return [plain(item) for item in data] if isinstance(data, list) else data


def outcome(command: str, folder: Path) -> dict[str, Any]:
    """What is compared of a run, by name."""
    out = folder / "out"
    if command == "translate":
        return {"translations": (out / "translations.txt").read_text()}
    if command == "compress":
        plan = json.loads((out / "compress.json").read_text())
        exported = json.loads((out / "export/ctranslate2/export.json").read_text())
        report = json.loads((out / "report" / "report.json").read_text())
        return {
            "weights": weights_digest(out / "model"),
            "plan": [plan["vocabulary"], plan["child"], plan["training"]["updates"]],
            "depths": plain(json.loads((out / "depths.json").read_text())),
            "exported": exported["verification"],
            "quality": [row["quality"] for row in report["engines"]],
        }
    names = ["results.json", "run.json", "trainer_state.json", "train_results.json"]
    names += ["distillation.json", "evaluation.json"] if command == "distill" else []
    # A state has the path of its best checkpoint.
    found = {name: plain(json.loads((out / name).read_text().replace(str(folder), ""))) for name in names}
    found["recipe.yaml"] = plain(yaml.safe_load((out / "recipe.yaml").read_text()))
    found |= {file.name: file.read_text() for file in out.glob("*_translations.txt")}
    found["weights"] = weights_digest(out)
    found["checkpoints"] = {file.name: weights_digest(file) for file in out.glob("checkpoint-??")}
    found["changed"] = [
        part["changed"] for part in json.loads((out / "run.json").read_text())["resumed"] if part["changed"]
    ]
    return found


def lay_foreign(command: str, folder: Path) -> None:
    for name in foreign(command):
        file = folder / "out" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)


def foreign_kept(command: str, folder: Path) -> bool:
    names = foreign(command)
    files = [folder / "out" / name for name in names]
    return all(file.is_file() and file.read_text() == name for file, name in zip(files, names, strict=True))


def foreign(command: str) -> Sequence[str]:
    """What else lies in a command's folder; a compression begins in an empty one."""
    return () if command == "compress" else FOREIGN


def check(
    stage: str, folder: Path, options: list[str], seconds: Sequence[float], whole: dict, draw: random.Random
) -> list[str]:
    """One round: what differs in the end, by name."""
    command, at = STAGES[stage]
    folder.mkdir()
    lay_foreign(command, folder)
    times = 2 if stage == "resume" else 1
    for number in range(times):
        again = number > 0
        while not kill(command, [*options, *output_options(command, folder, again)], at, folder, seconds, draw):
            if not again:  # it was faster than the one that was timed: once more, from the start
                shutil.rmtree(folder)
                folder.mkdir()
                lay_foreign(command, folder)
    finish(command, [*options, *output_options(command, folder, again=True)], [], folder)
    found = outcome(command, folder)
    different = [name for name in whole.keys() | found.keys() if found.get(name) != whole.get(name)]
    return sorted(different) + ([] if foreign_kept(command, folder) else ["foreign files"])


def report(rounds: Iterable[tuple[str, list[str]]]) -> bool:
    """Print a row for each stage; whether all came back."""
    tried, same, differing = Counter(), Counter(), {}
    for stage, different in rounds:
        tried[stage] += 1
        same[stage] += not different
        differing.setdefault(stage, []).extend(different)
        print(f"{stage}: {'as if nothing had happened' if not different else ', '.join(different)}", flush=True)
    rows = [
        {
            "killed while": stage,
            "times": tried[stage],
            "same in the end": same[stage],
            "different": " ".join(differing[stage]),
        }
        for stage in tried
    ]
    print_table(rows)
    return same.total() == tried.total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="How many commands are killed.")
    parser.add_argument("--seed", type=int, default=1, help="Of the moments.")
    parser.add_argument("--only", default="*", help="Stages, * in them stands for anything.")
    parser.add_argument("--keep", action="store_true", help="Leave the folders.")
    args = parser.parse_args()
    stages = [stage for stage in STAGES if fnmatch(stage, args.only)]
    if not stages:
        parser.error(f"--only: no stage is called {args.only}; stages: {', '.join(STAGES)}")
    work = Path(tempfile.mkdtemp(prefix="kill_check_"))
    options = commands(work, write_task(work))
    whole: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {}
    for command in dict.fromkeys(["train", *(STAGES[stage][0] for stage in stages)]):  # others start from its model
        folder = work / "whole" / command
        (folder / "out").mkdir(parents=True)
        places = {at for of, at in STAGES.values() if of == command}
        found = finish(command, [*options[command], *output_options(command, folder, False)], places, folder)
        seconds |= {stage: found[at] for stage, (of, at) in STAGES.items() if of == command}
        whole[command] = outcome(command, folder)
    draw = random.Random(args.seed)
    rounds = []
    for number in range(args.rounds):
        stage = stages[number % len(stages)]
        command = STAGES[stage][0]
        folder = work / f"{number}"
        rounds.append((stage, check(stage, folder, options[command], seconds[stage], whole[command], draw)))
        if not args.keep:
            shutil.rmtree(folder)
    good = report(rounds)
    if args.keep:
        print(f"The folders are in {work}.")
    else:
        shutil.rmtree(work)
        shutil.rmtree(os.environ["HF_HOME"])
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
