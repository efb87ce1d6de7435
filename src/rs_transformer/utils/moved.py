"""Modules that have moved, found under their former names, with a warning that says the new one."""

import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class MovedModules(MetaPathFinder, Loader):
    """Finds modules of a package under their former names; an import of one imports those that it has become.

    Args:
        package: whose modules they are.
        moved: former name -> the modules of today, the first of which is the one to import.
    """

    def __init__(self, package: str, moved: Mapping[str, Sequence[str]]):
        self.moved = {f"{package}.{old}": [f"{package}.{new}" for new in modules] for old, modules in moved.items()}

    def install(self) -> None:
        """Let imports look here, after they have looked everywhere else."""
        sys.meta_path.append(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in self.moved else None

    def exec_module(self, module: ModuleType) -> None:
        modules = self.moved[module.__name__]
        warnings.warn(f"{module.__name__} is now {modules[0]}", FutureWarning, stacklevel=2)
        for name in reversed(modules):
            of_today = vars(importlib.import_module(name))
            vars(module).update({key: value for key, value in of_today.items() if not key.startswith("__")})
