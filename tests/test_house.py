"""The house: what a room may import, how large a file may be, and that nothing private leaves its file."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
LARGEST = 450
"""Lines of a source file at most; Triton kernels, which call no functions of other files, apart."""
FULLEST = 14
"""Things in a room at most, where they are of different kinds."""
LISTS = {"regard.layers.mixers", "regard.models.backbones"}
"""Rooms that hold things of one kind, one file each."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


def is_package(module: str) -> bool:
    return modules()[module].name == "__init__.py"


def imported(module: str, node: ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """The modules of regard that a statement imports from, and the name it takes from each; the name is empty for a module."""
    base = module.split(".")
    if node.level:
        base = base[: len(base) - node.level + is_package(module)]
        source = ".".join(base + ([node.module] if node.module else []))
    else:
        source = node.module or ""
    for name in node.names:
        whole = f"{source}.{name.name}"
        if whole in modules():
            yield whole, ""
        elif source in modules():
            yield source, name.name


def statements(module: str, everywhere: bool) -> Iterator[ast.ImportFrom]:
    """The imports that run when a module is loaded; with ``everywhere`` also those in functions and for types alone."""

    def walk(node: ast.AST) -> Iterator[ast.ImportFrom]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom):
                yield child
            elif everywhere or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.If)):
                yield from walk(child)

    return walk(tree(module))


def imports(module: str, everywhere: bool = False) -> set[tuple[str, str]]:
    return {found for node in statements(module, everywhere) for found in imported(module, node)}


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_nothing_private_leaves_its_file() -> None:
    taken = [
        f"{module} takes {name} of {source}"
        for module in modules()
        for source, name in imports(module, everywhere=True)
        if name.startswith("_") and not name.startswith("__")
    ]
    assert taken == []


def test_nothing_private_is_reached_through_a_module() -> None:
    reached = []
    for module in modules():
        names = {
            alias.asname or alias.name
            for node in statements(module, everywhere=True)
            for alias in node.names
            if any(name == "" and source.endswith(f".{alias.name}") for source, name in imported(module, node))
        }
        for node in ast.walk(tree(module)):
            private = isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
            if private and isinstance(node.value, ast.Name) and node.value.id in names:
                reached.append(f"{module} reaches {node.value.id}.{node.attr}")
    assert reached == []


def test_no_circle_of_imports() -> None:
    """A module is loaded before those that import it: depth first, a module that is met again on its own way is a circle."""
    done: set[str] = set()
    circles: list[list[str]] = []

    def visit(module: str, way: list[str]) -> None:
        if module in way:
            circles.append(way[way.index(module) :])
        elif module not in done:
            for source, _ in sorted(imports(module)):
                if not module.startswith(f"{source}."):  # a package is on its way when its parts are loaded
                    visit(source, [*way, module])
            done.add(module)

    for module in sorted(modules()):
        visit(module, [])
    assert circles == []


def test_rooms_import_downwards() -> None:
    """The order of the contract in pyproject.toml, read without import-linter; rooms beside each other share a line."""
    config = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text())
    (contract,) = config["tool"]["importlinter"]["contracts"]
    floors = [[room.strip() for room in line.replace(":", "|").split("|")] for line in contract["layers"]]
    floor = {room: height for height, rooms in enumerate(floors) for room in rooms}
    ungoverned = {room_of(module) for module in modules()} - floor.keys() - {"regard"}
    assert ungoverned == set(), "each room has its floor"
    upwards = [
        f"{module} imports {source}"
        for module in modules()
        for source, _ in imports(module, everywhere=True)
        if module != "regard" and source != "regard" and floor[room_of(source)] < floor[room_of(module)]
    ]
    assert upwards == []


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_file_is_too_large(module: str) -> None:
    kernels = any(
        "triton.jit" in ast.unparse(d) for n in tree(module).body if isinstance(n, ast.FunctionDef) for d in n.decorator_list
    )
    lines = len(modules()[module].read_text().splitlines())
    assert kernels or lines <= LARGEST, f"{module} has {lines} lines"


def test_no_room_is_too_full() -> None:
    rooms = {
        module: sum(1 for other in modules() if other.startswith(f"{module}.") and other.count(".") == module.count(".") + 1)
        for module in modules()
        if is_package(module) and module not in LISTS | {"regard"}
    }
    assert {room: things for room, things in rooms.items() if things > FULLEST} == {}


def test_every_room_says_what_it_holds() -> None:
    silent = [module for module in modules() if is_package(module) and not ast.get_docstring(tree(module))]
    assert silent == []
