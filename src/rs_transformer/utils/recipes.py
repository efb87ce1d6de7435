"""Recipes: argument dataclasses filled from a YAML file and the command line, the command line winning."""

import difflib
import sys
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from .errors import say


@dataclass
class ArgumentGroups:
    """A command's argument groups as one: each field is a dataclass of options."""

    @classmethod
    def types(cls) -> tuple[type, ...]:
        """The dataclasses, in order, for a `RecipeParser`."""
        hints = get_type_hints(cls)
        return tuple(hints[field.name] for field in fields(cls))

    def options(self) -> dict[str, Any]:
        """Every option of every group by its name; tokens masked."""
        options: dict[str, Any] = {}
        for field in fields(self):
            group = getattr(self, field.name)
            options |= group.to_dict() if isinstance(group, TrainingArguments) else asdict(group)
        return options


TYPED = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp")}


def load_options(file: str) -> Any:
    """What a YAML file holds, with the values of its options as the text that stands there, or None for null.

    The option's type decides what a text is, as on the command line: `no` is Norwegian, a schedule or false. What
    lies inside a mapping is what YAML takes it for.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    loader = yaml.SafeLoader(Path(file).read_bytes())
    document = loader.get_single_node()
    for option in document.value if isinstance(document, yaml.MappingNode) else []:
        for node in option:
            for scalar in node.value if isinstance(node, yaml.SequenceNode) else [node]:
                if scalar.tag in TYPED:
                    scalar.tag = "tag:yaml.org,2002:str"
    return {} if document is None else loader.construct_document(document)


class HelpFormatter(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """Examples as they are typed, and the default of each option."""


class HelpAll(Action):
    """Shows what `--help` leaves out, too."""

    def __init__(self, option_strings: Sequence[str], dest: str = SUPPRESS, **kwargs: Any):
        super().__init__(option_strings, dest=dest, default=SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser: "RecipeParser", *args: Any) -> None:
        for action, text in parser.inherited.items():
            action.help = text
        parser.print_help()
        parser.exit()


class RecipeParser(HfArgumentParser):
    """`HfArgumentParser` that also takes `--recipe FILE.yaml` (or the file as first argument).

    A recipe holds options by name. An unknown name, there or on the command line, is an error that suggests the
    nearest known ones. `--help` shows the options of each dataclass as a group, named as its docstring begins, without
    those that are inherited from transformers; `--help-all` shows these as well. An error is one line.

    Args:
        unused: options of the dataclasses that the command has no use for: not listed, and refused with another value
            than their default. Those inherited from transformers are taken, since recorded recipes have them.
        positional: the option that bare arguments at the beginning are for, if not None.
        prose: list options whose items have spaces in them, so that text in a recipe is one item.
    """

    def __init__(
        self,
        dataclass_types: Iterable[type],
        positional: str | None = None,
        prose: Sequence[str] = (),
        unused: Sequence[str] = (),
        **kwargs,
    ):
        self.inherited: dict[Action, str | None] = {}
        self.unused = set(unused)
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.positional = positional
        self.prose = prose
        self.add_argument("--recipe", default=None, metavar="FILE.yaml", help="Options from a YAML file; others win.")
        if self.inherited:
            self.add_argument("--help-all", action=HelpAll, help="Show the options of transformers' Trainer, too.")
        if "--debug" not in self._option_string_actions:  # where it is there, it also takes what transformers' takes
            self.add_argument("--debug", action="store_true", help="Show the traceback of an error.")

    def _add_dataclass_arguments(self, dtype: type) -> None:
        dtype._argument_group_name = dtype.__doc__.splitlines()[0].rstrip(".")  # where the base class looks for it
        before = set(map(id, self._actions))
        super()._add_dataclass_arguments(dtype)
        of = {name: cls for cls in reversed(dtype.__mro__) for name in vars(cls).get("__annotations__", {})}
        for action in self._actions:
            name = action.dest.removeprefix("no_")
            if id(action) in before:
                continue
            if name in self.unused:
                action.help = SUPPRESS
                action.required = False
            elif of.get(name, dtype).__module__.startswith("transformers."):
                self.inherited[action], action.help = action.help, SUPPRESS

    def parse_recipe(self, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Parse the command line (default: this process's) into one instance of each dataclass."""
        argv = list(sys.argv[1:] if argv is None else argv)
        if argv and argv[0].endswith((".yaml", ".yml")):
            argv.insert(0, "--recipe")
        elif argv and self.positional is not None and not argv[0].startswith("-"):
            argv.insert(0, f"--{self.positional}")
        for position, argument in enumerate(argv):
            if argument == "--recipe" and position + 1 < len(argv):
                self._set_recipe(argv[position + 1])
            elif argument.startswith("--recipe="):
                self._set_recipe(argument.removeprefix("--recipe="))
        *parsed, _, unknown = self.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        if unknown:
            self._refuse(unknown[0], "the command line")
        for group in parsed:
            for option in fields(group):
                own = option.name in self.unused and not isinstance(group, TrainingArguments)
                if own and getattr(group, option.name) != default_of(option):
                    self.error(f"there is no use for {option.name} here; leave it out")
        return tuple(parsed)

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: error: {message}")
        self.exit(2)

    def _set_recipe(self, file: str) -> None:
        if not Path(file).is_file():
            self.error(f"there is no recipe {file!r}")
        try:
            options = load_options(file)
        except yaml.YAMLError as error:
            self.error(f"{file} is not YAML: {error}")
        if not isinstance(options, dict):
            self.error(f"{file} must hold options as `name: value`")
        actions = {action.dest: action for action in self._actions}
        aliases = {alias.lstrip("-"): action.dest for action in actions.values() for alias in action.option_strings}
        options = {aliases.get(name, name): value for name, value in options.items()}
        for name, value in options.items():
            if name not in actions or name in ("help", "recipe"):
                self._refuse(name, file)
            action = actions[name]
            if action.nargs in ("+", "*") and value is not None:
                options[name] = value = self._list(action, value, file)
            if action.choices and value is not None and value not in map(str, action.choices):
                self.error(f"{file}: {name} must be one of {', '.join(map(str, action.choices))}, got {value!r}")
            action.required = False
        self.set_defaults(**options)

    def _list(self, action: Action, value: Any, file: str) -> list[Any]:
        """A list option's value, which may stand in the file as one item or as text with spaces between the items."""
        if isinstance(value, str) and action.dest not in self.prose:
            value = value.split()
        items = value if isinstance(value, list) else [value]
        try:
            return [action.type(item) for item in items]
        except (TypeError, ValueError):
            self.error(f"{file}: {action.dest} must be a list of {action.type.__name__}, got {value!r}")

    def _refuse(self, name: str, where: str) -> NoReturn:
        known = [action.dest for action in self._actions]
        near = difflib.get_close_matches(name.lstrip("-").split("=")[0], known)
        hint = f"; did you mean {' or '.join(near)}?" if near else " (--help and --help-all list them)"
        self.error(f"unknown option {name!r} in {where}{hint}")


def default_of(option: Field) -> Any:
    """What an option of a dataclass is where nobody sets it."""
    return option.default if option.default_factory is MISSING else option.default_factory()
