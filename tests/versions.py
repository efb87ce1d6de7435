"""The oldest and the newest release of each library that we build on, each in an environment of its own.

    python tests/versions.py [--only transformers-oldest torch-newest] [--folder .versions]

The oldest is the floor in pyproject.toml; the others are then as in constraints.txt or, where these do not go
together, as pip finds them. The newest is what pip finds; where that is the pin, the environment of the pins serves.
The README's first example is run last, by remote code, when this package has been taken out of the environment again.
Prints a Markdown table; the exit status is 1 if a test failed. Fetches packages by pip: some minutes and a GB for each
environment, more for builds of PyTorch with CUDA.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("transformers", "torch", "accelerate", "datasets", "huggingface_hub")
TEST_PACKAGES = ("pytest", "pytest-xdist", "peft", "ctranslate2")
SUITES = {
    "model": ["test_modeling.py", "test_transformers_versions.py", "test_configuration.py"],
    "pipeline": ["test_pipeline.py"],
    "remote code": ["test_remote_code.py"],
    "layer transfer": ["test_layer_transfer.py"],
    "training": [
        f"test_scripts.py::test_{name}"
        for name in (
            "train_learns_the_task_and_leaves_a_folder_that_says_how",
            "trained_folder_loads_with_the_auto_classes",
            "translate_writes_a_translation_for_each_line_in_order",
            "training_continues_from_a_checkpoint_of_another_depth",
        )
    ],
}
# The README's first example, from the model's own source.
EXAMPLE = f"""
from transformers import pipeline
translator = pipeline("translation", model="{ROOT}/hub_cards/rs-marian-ja-en", trust_remote_code=True)
records = translator(["彼は水泳が得意だ。", "猫が好きです。"], batch_size=8)
assert [record["translation_text"] for record in records] == ["He is good at swimming.", "I like cats."], records
"""


@dataclass
class Environment:
    """A virtual environment, and what came of the tests in it.

    Args:
        name: of its folder.
        requirement: the library under test; none in the environment of the pins.
    """

    name: str
    requirement: str | None = None
    passed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SUITES, 0))
    failed: dict[str, list[str]] = field(default_factory=lambda: {suite: [] for suite in SUITES})
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0

    def build(self, folder: Path, dependencies: list[str], pins: dict[str, str]) -> None:
        """Install the package, with the other libraries as pinned if they go together with the one under test.

        An environment that was made from the same is used again.
        """
        self.python = folder / self.name / "bin" / "python"
        library = re.split(r"[=<>]", self.requirement)[0] if self.requirement else None
        strict = {name: pin for name, pin in pins.items() if name != library}
        relaxed = {name: pin for name, pin in strict.items() if name == "torch"}
        pip = [self.python, "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[train]"]
        stamp, made_from = folder / f"{self.name}.json", json.dumps([self.requirement, dependencies, strict])
        if stamp.is_file() and stamp.read_text() == made_from:
            run([*pip, "--no-deps"])
        else:
            for constraints in (strict, relaxed):
                run([sys.executable, "-m", "venv", "--clear", self.python.parents[1]])
                file = folder / f"{self.name}.txt"
                file.write_text("".join(f"{name}=={version}\n" for name, version in constraints.items()))
                wanted = [*TEST_PACKAGES, *filter(None, [self.requirement])]
                done = run([*pip, "--constraint", file, *wanted], check=False)
                if not done.returncode:
                    break
            else:
                raise SystemExit(f"{self.name}: pip found nothing that goes together\n{done.stderr}")
            stamp.write_text(made_from)
        code = f"from importlib.metadata import version\nfor name in {LIBRARIES}: print(version(name))"
        self.versions = dict(zip(LIBRARIES, run([self.python, "-c", code]).stdout.split(), strict=True))

    def test(self, folder: Path) -> None:
        start = time.monotonic()
        report = folder / f"{self.name}.xml"
        report.unlink(missing_ok=True)
        tests = [f"tests/{test}" for suite in SUITES.values() for test in suite]
        options = ["-q", "--numprocesses", "2", "-p", "no:cacheprovider", f"--junitxml={report}"]
        done = run([self.python, "-m", "pytest", *options, *tests], check=False)
        (folder / f"{self.name}.log").write_text(done.stdout + done.stderr)
        if not report.is_file():
            raise SystemExit(f"{self.name}: no test ran\n{done.stdout}{done.stderr}")
        for case in ElementTree.parse(report).iter("testcase"):
            suite = next(s for s, tests in SUITES.items() if any(case_is_of(case, test) for test in tests))
            if len(case):  # a failure, an error or a skip inside
                self.failed[suite].append(f"{case.get('classname')}::{case.get('name')}")
            else:
                self.passed[suite] += 1
        self.run_example(folder)
        self.seconds = time.monotonic() - start

    def run_example(self, folder: Path) -> None:
        """The README's first example without the package."""
        run([self.python, "-m", "pip", "uninstall", "--quiet", "--yes", "rs-transformer"])
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / self.name / "modules")}
        done = run([self.python, "-c", EXAMPLE], check=False, env=environment, cwd=folder)
        if done.returncode:
            self.failed["remote code"].append(f"the README's example without the package: {done.stderr[-2000:]}")
        else:
            self.passed["remote code"] += 1

    def cells(self) -> list[str]:
        tests = [
            f"{len(self.failed[suite])} of {len(self.failed[suite]) + self.passed[suite]} failed"
            if self.failed[suite]
            else f"{self.passed[suite]} passed"
            for suite in SUITES
        ]
        return [*self.versions.values(), *tests, f"{self.seconds:.0f}"]


def case_is_of(case: ElementTree.Element, test: str) -> bool:
    file, _, name = test.partition("::")
    return case.get("classname") == f"tests.{file.removesuffix('.py')}" and case.get("name").startswith(name)


def run(command: list[object], check: bool = True, cwd: Path = ROOT, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command], check=check, cwd=cwd, capture_output=True, text=True, **kwargs
    )


def newest_release(library: str) -> str:
    """The newest release that pip would install."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", library]
    return re.search(r"Would install \S+?-(\d\S+)", run(command).stdout).group(1)


def rows(dependencies: list[str], pins: dict[str, str], only: Iterable[str]) -> dict[str, Environment]:
    """The environment of each row; rows share that of the pins."""
    floors = {r.name: min(s.version for s in r.specifier) for r in map(Requirement, dependencies)}
    pinned = Environment("pins")
    found = {}
    for library in LIBRARIES:
        for end in ("oldest", "newest"):
            name = f"{library}-{end}"
            if only and name not in only:
                continue
            version = floors[library] if end == "oldest" else newest_release(library)
            same = version.partition("+")[0] == pins[library]
            found[name] = pinned if same else Environment(name, f"{library}=={version}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="Rows to run, such as transformers-oldest.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".versions", help="Of the environments and logs.")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    table = rows(dependencies, pins, args.only)
    if unknown := set(args.only) - table.keys():
        parser.error(f"no rows called {', '.join(sorted(unknown))}; there are LIBRARY-oldest and LIBRARY-newest")
    for environment in {environment.name: environment for environment in table.values()}.values():
        print(f"{environment.name} …", file=sys.stderr, flush=True)
        environment.build(folder, dependencies, pins)
        environment.test(folder)
        print(" ".join(environment.cells()), file=sys.stderr, flush=True)
    header = ["environment", *LIBRARIES, *SUITES, "seconds"]
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for name, environment in table.items():
        shown = name if environment.requirement else f"{name} (the pins)"
        print("| " + " | ".join([shown, *environment.cells()]) + " |")
    failures = [test for environment in table.values() for tests in environment.failed.values() for test in tests]
    print(*failures, sep="\n", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
