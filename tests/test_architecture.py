"""The house as docs/architecture.md has it: imports run one way, and `utils` knows nothing of translation."""

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

import rs_transformer
from rs_transformer import __version__
from rs_transformer.configuration_rs_marian import REMOTE_CODE_FILES

PACKAGE = ROOT / "src" / "rs_transformer"
# From the ground up: a room imports from its own floor and from those before it.
FLOORS = (
    ("utils",),
    (
        "configuration_rs_marian",
        "versions_rs_marian",
        "generation_rs_marian",
        "corpus",
        "tokenization",
        "subword_sampling",
        "decoding",
        "metrics",
        "pipeline_rs_marian",
        "calibration",
    ),
    ("modeling_rs_marian",),
    ("layer_transfer", "checkpoints", "ensemble", "shortlist", "vocabulary"),
    ("attention", "export", "model_card", "training", "compare"),
    ("distillation",),
    ("compress",),
    ("commands",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# `evaluate.load` takes it as a file of its own; the package's front door has what is public.
APART = {"evaluate_metric": "metrics", "": "layer_transfer"}
SELF_CONTAINED = {Path(file).stem for file in REMOTE_CODE_FILES}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(file) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file) -> Iterator[str]:
    """The modules of this package that a file imports anywhere: at its top, in a function, for a type checker."""
    package = name_of(file).split(".") if file.name == "__init__.py" else name_of(file).split(".")[:-1]
    package = [part for part in package if part]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "rs_transformer"]
            yield from (name.partition(".")[2] for name in names)
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("rs_transformer")):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = (node.module or "").split(".") if node.module else []
            path = [*base, *(module if node.level else module[1:])]
            for alias in node.names:  # a name of the module, or a module of the package
                inner = [*path, alias.name]
                yield ".".join(inner if PACKAGE.joinpath(*inner).with_suffix(".py").is_file() else path)


GRAPH = {name_of(file): sorted(set(imports(file))) for file in MODULES}


def floor_of(module: str) -> int:
    room = module.split(".")[0]
    return FLOOR[APART.get(room, room)]


def test_every_module_lies_in_a_room_that_the_plan_has():
    rooms = {name.split(".")[0] for name in GRAPH}
    assert rooms == FLOOR.keys() | APART.keys()


@pytest.mark.parametrize("module", GRAPH)
def test_a_module_imports_from_its_own_floor_and_from_below(module):
    above = [name for name in GRAPH[module] if floor_of(name) > floor_of(module)]
    assert not above


def test_importing_the_package_needs_what_pip_installs_with_it_and_no_more():
    """Accelerate, datasets and the like are the extra `train`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = {Requirement(line).name for line in project["dependencies"]} | {"huggingface_hub"}
    reached, todo = set(), {""}
    while todo:
        module = todo.pop()
        reached.add(module)
        todo |= set(GRAPH[module]) - reached
    for module in reached:
        (file,) = (file for file in MODULES if name_of(file) == module)
        tree = ast.parse(file.read_text())
        names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
        names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
        packages = {name.split(".")[0] for name in names} - sys.stdlib_module_names
        assert packages <= installed, module


def test_the_citation_is_of_this_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_no_import_goes_in_a_circle():
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way, module])
        if module not in done:
            for name in GRAPH[module]:
                visit(name, (*way, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


def test_what_travels_to_the_hub_imports_nothing_else_of_ours():
    for module in SELF_CONTAINED:
        assert set(GRAPH[module]) <= SELF_CONTAINED


@pytest.mark.parametrize("file", sorted((PACKAGE / "utils").glob("*.py")), ids=lambda file: file.stem)
def test_utils_has_no_name_that_knows_translation(file):
    tree = ast.parse(file.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    known = [
        name
        for name in names
        if re.search(r"translat|token|marian|bleu|chrf|sentence|beam|decod|lang|teach", name, re.I)
    ]
    assert not known


def test_modules_are_found_under_their_former_names(monkeypatch):
    monkeypatch.delitem(sys.modules, "rs_transformer.trainer", raising=False)  # a run of the old layout imports it
    with pytest.warns(FutureWarning, match=r"rs_transformer\.trainer is now rs_transformer\.training\.trainer"):
        former = importlib.import_module("rs_transformer.trainer")
    assert former.TranslationTrainer is importlib.import_module("rs_transformer.training.trainer").TranslationTrainer
    assert former.TokenBatchSampler is importlib.import_module("rs_transformer.training.batches").TokenBatchSampler
    for modules in rs_transformer._MOVED.values():
        assert all((PACKAGE / f"{name.replace('.', '/')}.py").is_file() for name in modules)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("rs_transformer.nowhere")
