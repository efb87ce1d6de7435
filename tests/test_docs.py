"""The documentation: every command is one that its script understands, every link leads somewhere, and the README's
commands run in their order, with a model of this repository in the place of the Hub's."""

import itertools
import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianMTModel

from rs_transformer import expand
from rs_transformer.utils.recipes import RecipeParser

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
PAGES += [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "hub_cards").glob("*/README.md"))]
# Commands are looked at as a shell expands them; what is no script of ours is left out.
SHELL = """
PATH=/nonexistent
command_not_found_handle() { :; }
accelerate() { printf '%s\\x1f' accelerate "$@"; printf '\\x1e'; }
python() { printf '%s\\x1f' python "$@"; printf '\\x1e'; }
rs-transformer() { python "training/${1//-/_}.py" "${@:2}"; }
"""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.+?)```", page.read_text(), re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The `accelerate launch …`, `python …` and `rs-transformer …` of a shell script, expanded."""
    done = subprocess.run(["/bin/bash", "-c", SHELL + text], capture_output=True, text=True, check=False)
    assert "syntax error" not in done.stderr, done.stderr
    found = [command.split("\x1f")[:-1] for command in done.stdout.split("\x1e")[:-1]]
    assert len(found) >= len(re.findall(r"^\s*(?:accelerate launch|python|rs-transformer) ", text, re.MULTILINE)), text
    return found


def script_and_options(command: list[str]) -> tuple[str, list[str]]:
    """The script that a command runs, and the options that it is given."""
    if command[0] == "accelerate":
        launched = launch_command_parser().parse_args(command[2:])
        assert launched.config_file is None or (ROOT / launched.config_file).is_file()
        return launched.training_script, launched.training_script_args
    return command[1], command[2:]


OWN_PAGES = [page for page in PAGES if page.parent in (ROOT, ROOT / "docs")]


@pytest.mark.parametrize("page", OWN_PAGES, ids=lambda page: page.name)
def test_no_snippet_asks_to_run_custom_code(page):
    """As `AutoTokenizer` does of a folder with remote code, where the package is not imported."""
    for block in blocks(page, "python"):
        assert "AutoTokenizer" not in block or re.search(r"^import rs_transformer\b|trust_remote_code", block, re.M)


@pytest.fixture
def workspace(tmp_path):
    """A folder to work in, as a clone is one."""
    for name in ("training", "hub_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


class Understood(Exception):
    pass


@pytest.fixture
def parse_only(monkeypatch, workspace):
    """Scripts stop once they have their options."""
    parse = RecipeParser.parse_recipe

    def stop(self, argv=None):
        parse(self, argv)
        raise Understood

    monkeypatch.setattr(RecipeParser, "parse_recipe", stop)
    monkeypatch.chdir(workspace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_understood_by_its_script(page, parse_only):
    for block in blocks(page, "bash"):
        for command in commands(block):
            script, options = script_and_options(command)
            if script == "-m":
                continue
            assert (ROOT / script).is_file(), command
            # A model's card names the recipe beside it.
            options = [str(page.with_name(option)) if option == "recipe.yaml" else option for option in options]
            if script.startswith("training/"):
                understand(script, options)


@pytest.mark.parametrize("recipe", sorted((ROOT / "training" / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_command_in_a_recipe_is_understood_by_its_script(recipe, parse_only):
    header = re.findall(r"^#   (.+)$", recipe.read_text(), re.MULTILINE)
    found = commands("\n".join(header))
    assert found
    for script, options in map(script_and_options, found):
        understand(script, options)


def understand(script: str, options: list[str]) -> None:
    for option, value in itertools.pairwise(options):
        if option in ("--output_file", "--plot_file"):  # of a run that is there by then
            Path(value).parent.mkdir(parents=True, exist_ok=True)
    with pytest.raises(Understood):
        runpy.run_path(script)["main"](options)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            linked = (page.parent / file) if file else page
            assert linked.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], target


FEW_UPDATES = ["--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no", "--average_checkpoints", "0"]
FEW_UPDATES += ["--load_best_model_at_end", "false", "--max_new_tokens", "8"]
LIMITS = {
    "training/train.py": FEW_UPDATES,
    "training/distill.py": FEW_UPDATES,
    "training/compress.py": ["--dry_run"],
    "training/collapse.py": ["--calibration_updates", "2"],
    "training/translate.py": ["--max_new_tokens", "8"],
    "training/evaluate.py": ["--max_new_tokens", "8"],
    "training/synthesize.py": ["--max_target_length", "64", "--max_repetitions", "0"],
    "training/attention.py": ["--max_new_tokens", "8", "--pictured", "1"],
    # An untrained student: CTranslate2 and PyTorch break its ties otherwise.
    "training/export.py": ["--max_new_tokens", "8", "--min_same", "0"],
}


def test_the_commands_of_the_readme_run_one_after_the_other(workspace, monkeypatch):
    """As they stand there, with a small corpus, few updates, and a teacher that needs no download."""
    monkeypatch.chdir(workspace)
    write_corpus(workspace)
    section = (ROOT / "README.md").read_text().split("\n## Train, collapse")[1].split("\n## ")[0]
    found = commands("\n".join(re.findall(r"```bash\n(.+?)```", section, re.DOTALL)))
    ran = []
    for script, options in map(script_and_options, found):
        options = [option.replace("Helsinki-NLP/opus-mt-ja-en", "hub_cards/marian-ja-en") for option in options]
        options = [option.replace("Helsinki-NLP/opus-mt-en-jap", "en_ja") for option in options]
        if "training/recipes/tanaka_rs6.yaml" in options:  # the corpus is too small for a tokenizer
            options += ["--tokenizer_name_or_path", "hub_cards/marian-ja-en"]
        runpy.run_path(script)["main"]([*options, *LIMITS.get(script, [])])
        ran.append(Path(script).stem)
    expected = "train translate evaluate compress collapse train synthesize distill export publish attention"
    assert ran == expected.split()
    assert (workspace / "student-ct2" / "model.bin").is_file()
    assert (workspace / "attention" / "attention.html").is_file()
    assert "org/rs-marian-ja-en" in (workspace / "runs" / "student" / "README.md").read_text()


def write_corpus(folder: Path) -> None:
    """The files that the documentation speaks of, with the first pairs of the excerpt."""
    data = ROOT / "training" / "data" / "tanaka-excerpt"
    for name, split, number in (("corpus", "train", 60), ("dev", "validation", 4), ("test", "test", 4)):
        lines = (data / f"{split}.jsonl").read_text().splitlines()[:number]
        for language in ("ja", "en"):
            texts = [json.loads(line)["translation"][language] for line in lines]
            (folder / f"{name}.{language}").write_text("".join(f"{text}\n" for text in texts))
    shutil.copyfile(folder / "dev.en", folder / "news.en")
    # A model of the other direction, of no use.
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "hub_cards" / "marian-ja-en")
    tokenizer.source_lang, tokenizer.target_lang = tokenizer.target_lang, tokenizer.source_lang
    for part in (AutoModelForSeq2SeqLM.from_pretrained(ROOT / "hub_cards" / "marian-ja-en"), tokenizer):
        part.save_pretrained(folder / "en_ja")


def test_the_first_example_of_the_readme_translates_as_it_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    (example,) = blocks(ROOT / "README.md", "python")
    said = re.search(r"^# (\[\{.+)$", example, re.MULTILINE).group(1)
    names = {}
    exec(example.replace("translator([", "result = translator(["), names)
    assert str(names["result"]) == said
    assert names["model"].config.decoder_layers == 2  # its own


def test_the_examples_of_layer_transfer_run(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    collapsing, loading, expanding = blocks(ROOT / "docs" / "layer_transfer.md", "python")
    names = {}
    expand(AutoModelForSeq2SeqLM.from_pretrained("hub_cards/marian-ja-en")).save_pretrained("parent")
    exec(collapsing.replace("Helsinki-NLP/opus-mt-ja-en", "parent"), names)
    assert names["student"].config.decoder_layer_map == [0, 0, 0, 1, 1, 1]
    exec(loading.replace("runs/tuned", "hub_cards/rs-marian-ja-en-tanaka"), names)
    exec(expanding, names)
    assert type(AutoModelForSeq2SeqLM.from_pretrained("runs/marian")) is MarianMTModel
