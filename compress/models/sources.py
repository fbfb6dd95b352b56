"""The code behind a network of one's own: which files, and which installed packages, a change of which changes it.

Read, not run: what the module imports, what that imports, and so on. A module that is found by another name than one
written in the code (`import_module(name)`), and files that code reads, are not seen.
"""

from __future__ import annotations

import ast
import functools
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
)
from pathlib import Path

OURS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Sources:
    files: tuple[Path, ...] = ()
    """Of the user's own modules, in the order of their names."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the installed packages that they import."""


def sources(module: str, folder: Path) -> Sources:
    """What `package.module` is made of; `folder` is searched first, as it is where the module is imported."""
    finder = _Finder([str(folder), *sys.path])
    files: dict[str, Path] = {}
    installed: set[str] = set()
    waiting, seen = list(_with_parents(module)), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        spec = finder.find(name)
        if spec is None or spec.origin is None:
            continue  # no module, built in, or a folder without code of its own
        file = Path(spec.origin)
        match _owner(file):
            case "user":
                files[name] = file
                is_package = spec.submodule_search_locations is not None
                waiting += [part for found in _imports(file, name, is_package) for part in _with_parents(found)]
            case "installed":
                installed.add(name.partition(".")[0])
    return Sources(tuple(files[name] for name in sorted(files)), _versions(installed))


@dataclass
class _Finder:
    """Finds modules without importing them, or their packages."""

    path: list[str]
    known: dict[str, ModuleSpec | None] = field(default_factory=dict)

    def find(self, name: str) -> ModuleSpec | None:
        """Where a module lies; a folder without __init__.py has no origin."""
        if name not in self.known:
            package, _, last = name.rpartition(".")
            found = [spec for place in self._places(package) if (spec := _finder_of(place).find_spec(last))]
            # A folder alone is a module only where no file or package is one.
            self.known[name] = next((spec for spec in found if spec.loader), found[0] if found else None)
        return self.known[name]

    def _places(self, package: str) -> list[str]:
        """Where the modules of a package lie; of none, the path that begins all imports."""
        if not package:
            return self.path
        found = self.find(package)
        return list(found.submodule_search_locations or []) if found else []


def _finder_of(folder: str) -> FileFinder:
    return FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES), (SourceFileLoader, SOURCE_SUFFIXES))


def _with_parents(name: str) -> Iterator[str]:
    """a, a.b and a.b.c: importing the last runs them all."""
    parts = name.split(".")
    return (".".join(parts[: count + 1]) for count in range(len(parts)))


def _imports(file: Path, name: str, is_package: bool) -> Iterator[str]:
    """Absolute names of what a file imports anywhere in it; some are no modules but what modules hold."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):  # compiled
        return
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module, names, level):
                above = package.split(".")[: len(package.split(".")) - (level or 1) + 1] if level else []
                begin = ".".join(filter(None, [*above, module or ""]))
                yield begin
                yield from (f"{begin}.{alias.name}" for alias in names)
            case ast.Call(ast.Name("__import__") | ast.Attribute(attr="import_module"), [ast.Constant(str(given)), *_]):
                yield given if not given.startswith(".") else package + given


def _owner(file: Path) -> str:
    file = file.resolve()
    if file.is_relative_to(OURS):
        return "ours"
    if "site-packages" in file.parts or "dist-packages" in file.parts:
        return "installed"
    paths = sysconfig.get_paths()
    if any(file.is_relative_to(Path(paths[kind]).resolve()) for kind in ("stdlib", "platstdlib")):
        return "python"
    return "user"


def _versions(packages: set[str]) -> dict[str, str]:
    """By the names of their distributions, which may be others: PIL is pillow."""
    found: dict[str, str] = {}
    for package in sorted(packages):
        for distribution in _distributions().get(package, [package]):
            try:
                found[distribution] = metadata.version(distribution)
            except metadata.PackageNotFoundError:  # copied there by hand
                continue
    return found


@functools.cache
def _distributions() -> dict[str, list[str]]:
    return {name: sorted(set(those)) for name, those in metadata.packages_distributions().items()}
