"""The structure of the package: the README's map is the tree, and imports form no cycle."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import ourvidz_serverless
from tests.files import ROOT

PACKAGE = ROOT / "ourvidz_serverless"
README = (ROOT / "README.md").read_text()


def name_of(path: Path) -> str:
    """The dotted name of a module's file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """The package's modules that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & MODULES.keys() - {name_of(path)}


def test_the_readmes_map_lists_what_lies_in_the_package() -> None:
    block = README[README.index("    ourvidz_serverless/\n") :].split("\n\n")[0]
    listed = re.findall(r"^ {6}(\S+?)/? ", block, re.MULTILINE)

    there = {path.name for path in PACKAGE.iterdir()} - {"__init__.py", "__pycache__"}
    assert sorted(listed) == sorted(there)


def test_the_readmes_map_lists_folders_that_exist() -> None:
    block = README[README.index("    handler.py") :].split("\n\n")[0]
    folders = re.findall(r"^ {4}(\S+)/ ", block, re.MULTILINE)

    assert folders
    assert [name for name in folders if not (ROOT / name).is_dir()] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    # A package's own name is left out: `from package import module` imports the module.
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    graph = {name: imported(path) - packages for name, path in MODULES.items()}

    assert list(TopologicalSorter(graph).static_order())


def test_importlib_is_used_once_for_the_table_of_families() -> None:
    users = [
        name
        for name, path in MODULES.items()
        if re.search(r"importlib\.import_module|__import__\(", path.read_text())
    ]

    assert users == [f"{ourvidz_serverless.__name__}.families"]
