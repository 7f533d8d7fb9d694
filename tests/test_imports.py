"""Imports run one way: no circle, also none that only type checkers see."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

import pytest
from conftest import HERE


def imported(path):
    """Yield the modules that a file of a package imports from this house."""
    module = path.relative_to(HERE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = module[: -node.level] if node.level else ()
            base = ".".join([*start, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
            yield base


def graph(package):
    """Return which modules of a package each of its modules imports."""
    files = [path for path in HERE.joinpath(package).rglob("*.py")]
    names = {".".join(f.relative_to(HERE).with_suffix("").parts): f for f in files}
    inits = {name.removesuffix(".__init__"): name for name in names}
    found = {}
    for name, path in names.items():
        wanted = {inits[target] for target in imported(path) if target in inits}
        # A module of a package may be imported while the package itself is.
        found[name] = {one for one in wanted - {name} if not one.endswith("__init__")}
    return found


@pytest.mark.parametrize("package", ["imbot", "simulator", "benchmark"])
def test_no_module_imports_itself_by_way_of_others(package):
    order = [*TopologicalSorter(graph(package)).static_order()]  # or CycleError
    assert len(order) > 5


def test_the_engine_imports_nothing_from_the_top():
    for path in HERE.joinpath("imbot").rglob("*.py"):
        tops = {name.partition(".")[0] for name in imported(path)}
        assert not tops & {"botserver", "providers", "usersig", "simulator", "tests"}
