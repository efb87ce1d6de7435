"""Shared by all tests: no network, one thread a process, and one model trained on the reverse task.

A process imports the libraries for ten seconds before it does anything. So tests call a command's `main` (`script`) or
`fork` it; they `run` and `launch` it where that is what they are about. What several files need is made once.
"""

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

# The startup module for subprocesses, the others before anything imports a library that reads them.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [f"{Path(__file__).parent}/startup", *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from filelock import FileLock
from forked import fork
from reverse_task import reverse_pairs, write_task
from transformers import AutoModelForSeq2SeqLM, MarianTokenizer, TrainingArguments, dynamic_module_utils

from rs_transformer.tokenization import train_tokenizer
from rs_transformer.training.model import config_from_tokenizer

runpy.run_path(f"{Path(__file__).parent}/startup/sitecustomize.py")
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
# From 5.23 on transformers calls it so, and warns of the old name.
NEW_NAME = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
CHECKPOINTING = "activation_checkpointing" if NEW_NAME else "gradient_checkpointing"
RECIPE = ROOT / "tests" / "reverse.yaml"


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Caches of this test run alone, for subprocesses too."""
    home = tmp_path_factory.mktemp("hf_home")
    os.environ["HF_HOME"] = str(home)
    os.environ["HF_DATASETS_CACHE"] = str(home / "datasets")
    os.environ["HF_MODULES_CACHE"] = str(home / "modules")
    dynamic_module_utils.HF_MODULES_CACHE = str(home / "modules")  # of this process, which has read the variable


def run(*command: object, check: bool = True, cwd: Path = ROOT, **kwargs) -> subprocess.CompletedProcess:
    """Run a command, from the project's folder, and return what it printed; fail with it if it fails."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, **kwargs)
    if check and done.returncode:
        raise AssertionError(f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def script(name: str) -> Callable[..., None]:
    """The `main` of a script of `training/`, to be called in this process."""
    spec = importlib.util.spec_from_file_location(f"training_{name}", ROOT / "training" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *options: module.main([str(option) for option in options])


def task_options(task: dict[str, Path]) -> list[object]:
    """The options that name a task's files."""
    return [part for split, file in task.items() for part in (f"--{split}_file", file)]


def losses(folder: Path) -> list[float]:
    """The training losses that a run has logged."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_hub_cache(folder: Path, cache: Path, repository: str) -> Path:
    """A Hub cache on disk that holds a folder's files as a repository, as a download leaves it."""
    root = cache / f"models--{repository.replace('/', '--')}"
    for name in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (root / name).mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = root / "blobs" / f"{number:040x}"
        shutil.copyfile(file, blob)
        (root / "snapshots" / COMMIT / file.name).symlink_to(blob)
    return cache


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """The folder of this name that a function fills: once, though every worker asks. Tests leave it as it is."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "made_once"

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, finished = root / name, root / f"{name}.finished"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not finished.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                finished.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def task(made_once) -> dict[str, Path]:
    """The files of the reverse task, by split."""
    folder = made_once("reverse", write_task)
    return {split: folder / f"{split}.jsonl" for split in ("train", "validation", "test")}


@pytest.fixture(scope="session")
def trained(task: dict[str, Path], made_once) -> Path:
    """The run folder of a model that `training/train.py` has taught the reverse task."""

    def train(folder: Path) -> None:
        options = ["--average_checkpoints", 2, "--report_to", "tensorboard"]
        done = fork("training/train.py", RECIPE, *task_options(task), "--output_dir", folder, *options)
        (folder / "printed.txt").write_text(done.stdout + done.stderr)
        (folder / "stdout.txt").write_text(done.stdout)

    return made_once("trained", train)


@pytest.fixture(scope="session")
def trained_apart(trained: Path, made_once) -> Path:
    """The trained model with a vocabulary for each side, the target's in another order: the same translations."""

    def set_apart(folder: Path) -> None:
        shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoint-*"), dirs_exist_ok=True)
        entries = json.loads((folder / "vocab.json").read_text())
        first, unknown, *pieces, last = sorted(entries, key=entries.get)
        names = [first, unknown, *reversed(pieces), last]
        (folder / "target_vocab.json").write_text(json.dumps({name: index for index, name in enumerate(names)}))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"separate_vocabs": True}))
        model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(trained), MarianTokenizer.from_pretrained(folder)
        apart = type(model)(type(model.config)(**model.config.to_dict() | config_from_tokenizer(tokenizer)))
        apart.load_state_dict(model.state_dict(), strict=False)
        embeddings, order = model.get_input_embeddings().weight, [entries[name] for name in names]
        with torch.no_grad():
            apart.get_encoder().embed_tokens.weight.copy_(embeddings)
            apart.get_decoder().embed_tokens.weight.copy_(embeddings[order])
            apart.final_logits_bias.copy_(model.final_logits_bias[:, order])
        for part in (apart, tokenizer):
            part.save_pretrained(folder)

    return made_once("trained_apart", set_apart)


def odd_tokenizer(folder: Path, vocabulary: str) -> MarianTokenizer:
    """A tokenizer with padding amid its vocabulary, to which tokens were added: one goes before a text, one within."""
    sides = [["a b c d e f"] * 4, ["u v w x y z"] * 4]
    languages = {"source_lang": "aa", "target_lang": "zz"}
    size = {"joint": 17, "separate": 11}[vocabulary]
    train_tokenizer(*sides, folder, vocab_size=size, vocabulary=vocabulary, **languages)
    for file in folder.glob("*vocab.json"):
        entries = json.loads(file.read_text())
        names = {index: entry for entry, index in entries.items()}
        entries[names[5]], entries["<pad>"] = entries["<pad>"], 5
        file.write_text(json.dumps(entries))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = MarianTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([">>eng<<", "<term>"])
    tokenizer.save_pretrained(folder)
    return MarianTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> MarianTokenizer:
    """A tokenizer of the reverse task's letters, one vocabulary."""
    sides = zip(*reverse_pairs(1000, seed=1), strict=True)
    languages = {"source_lang": "fw", "target_lang": "bw"}
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(*sides, folder, vocab_size=28, vocabulary="joint", model_max_length=32, **languages)
