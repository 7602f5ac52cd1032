"""Imports point downward: no module imports a layer above its own, and none imports itself in turn.

Imports inside functions count; those for type checkers alone do not.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"ift_kernels": "ift_kernels", "ift": "python_api/ift", "bench": "bench"}
# From the leaves up; a module is in the first layer whose prefix fits.
LAYERS = [
    "ift_kernels.common",
    "ift_kernels.backends",
    "ift_kernels.schedule",
    "ift_kernels.operators",
    "ift_kernels",
    "ift",
    "bench",
]


def modules():
    found = {}
    for package, folder in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(tree, known):
    """The modules among `known` that this one imports when it runs."""
    skipped = {
        id(inside)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inside in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                if inside in known:
                    yield inside
                elif node.module in known and not alias.name.startswith(("_cpu", "_cuda")):
                    yield node.module  # the compiled extensions are leaves


@pytest.fixture(scope="module")
def graph():
    known = modules()
    return {
        name: set(imports_of(ast.parse(path.read_text(encoding="utf-8")), known)) - {name}
        for name, path in known.items()
    }


def layer(name):
    return next(i for i, prefix in enumerate(LAYERS) if f"{name}.".startswith(f"{prefix}."))


def test_no_import_points_upward(graph):
    upward = [(a, b) for a, others in graph.items() for b in others if layer(b) > layer(a)]
    assert not upward


def test_no_circles(graph):
    left = {name: set(others) for name, others in graph.items()}
    while leaves := [name for name, others in left.items() if not others]:
        for name in leaves:
            del left[name]
        for others in left.values():
            others.difference_update(leaves)
    assert not left, f"a circle among {sorted(left)}"


def test_nothing_imports_examples_or_tests(graph):
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            outside = {"examples", "tests"} & {name.split(".")[0] for name in names}
            assert not outside or path.is_relative_to(ROOT / "bench"), path
