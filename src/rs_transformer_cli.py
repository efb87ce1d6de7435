"""`rs-transformer COMMAND …`: what `training/COMMAND.py` does, after `pip install`.

Beside the package, since importing that takes seconds and a list of commands should not.
"""

import ast
import difflib
import importlib.util
import runpy
import sys
from importlib.metadata import version
from pathlib import Path


def commands() -> dict[str, str]:
    """Each command's name, and what it does in a line."""
    folder = Path(importlib.util.find_spec("rs_transformer").origin).parent / "commands"
    files = sorted(file for file in folder.glob("*.py") if file.stem != "__init__")
    docs = {file.stem: ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) for file in files}
    return {name.replace("_", "-"): doc.splitlines()[0] for name, doc in docs.items()}


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first argument names; the exit status."""
    name, *options = (sys.argv[1:] if argv is None else argv) or ["--help"]
    known = commands()
    if name in ("-h", "--help"):
        print("usage: rs-transformer COMMAND [options]\n")
        print(*(f"  {command:12} {does}" for command, does in known.items()), sep="\n")
        print("\nrs-transformer COMMAND --help says more. In several processes: accelerate launch -m ", end="")
        print("rs_transformer.commands.COMMAND …")
        return 0
    if name == "--version":
        print(version("rs-transformer"))
        return 0
    if name not in known:
        near = difflib.get_close_matches(name, known)
        hint = f"did you mean {' or '.join(near)}?" if near else f"commands: {', '.join(known)}"
        print(f"rs-transformer: there is no command {name!r}; {hint}", file=sys.stderr)
        return 2
    if missing := [module for module in ("accelerate", "datasets") if importlib.util.find_spec(module) is None]:
        print(f'rs-transformer {name} needs {missing[0]}: pip install "rs-transformer[train]"', file=sys.stderr)
        return 2
    sys.argv = [sys.argv[0], *options]
    runpy.run_module(f"rs_transformer.commands.{name.replace('-', '_')}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
