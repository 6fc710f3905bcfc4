"""Packages whose public names are imported when they are first used."""

import ast
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """(`__getattr__`, `__dir__`, `__all__`) of a package that imports nothing by itself (PEP 562).

    Its public names are those that its source imports as themselves, `from module import name as
    name`, under `if TYPE_CHECKING:`, where type checkers and editors read them too. So the package
    has to be installed with its sources, as pip does.

    Args:
      package: its `__name__`.
    """
    homes = {
        alias.name: node.module or ""
        for node in ast.walk(ast.parse(inspect.getsource(sys.modules[package])))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return __getattr__, lambda: sorted(homes), sorted(homes)
