"""The shape of the source: what only one module may do, and how large things may grow.

The directions between the packages are import-linter's contracts (``pyproject.toml``, ``make lint``);
here is what those can't say.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "pgkeep"
MODULES = sorted(SOURCE.rglob("*.py"))

FILE_LIMIT_LINES = 500
FUNCTION_LIMIT_LINES = 50
VAGUE_NAMES = {"common", "helpers", "manager", "misc", "utils", "util"}
STARTER_MODULES = {"subprocess", "pty", "commands"}
STARTER_PREFIXES = ("exec", "posix_spawn", "spawn")
STARTERS = {"popen", "startfile", "system", "create_subprocess_exec", "create_subprocess_shell"}
# What the configuration may lean on, besides the standard library and msgspec.
CONFIGURATION = {"config", "settings.py", "config.py", "configuration_sources.py"}
CONFIGURATION_MAY_IMPORT = ("pgkeep.settings", "pgkeep.domain", "pgkeep.errors", "pgkeep.progress", "pgkeep.config")


def label(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def imports_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def starts_of_programs(tree: ast.AST) -> list[str]:
    """Every way to start a program that the source names, as ``line: what``."""
    found = [f"{line}: {name}" for line, name in imports_of(tree) if name.split(".")[0] in STARTER_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in {"os", "asyncio"}:
            if node.attr in STARTERS or node.attr.startswith(STARTER_PREFIXES):
                found.append(f"{node.lineno}: {node.value.id}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module in {"os", "asyncio"}:
            names = [alias.name for alias in node.names]
            wrong = [name for name in names if name in STARTERS or name.startswith(STARTER_PREFIXES)]
            found += [f"{node.lineno}: {node.module}.{name}" for name in wrong]
    return found


def overlong_functions(tree: ast.AST) -> list[str]:
    """Functions past the limit, as ``name: lines``; the docstring does not count."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) is not None else None
            documented_lines = (docstring.end_lineno or 0) - docstring.lineno + 1 if docstring else 0
            lines = (node.end_lineno or 0) - node.lineno + 1 - documented_lines
            if lines > FUNCTION_LIMIT_LINES:
                found.append(f"{node.name}: {lines}")
    return found


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def test_the_source_is_found() -> None:
    assert SOURCE / "errors.py" in MODULES
    assert SOURCE / "adapters" / "process.py" in MODULES


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_only_the_process_adapter_starts_programs(path: Path) -> None:
    if path == SOURCE / "adapters" / "process.py":
        assert starts_of_programs(parsed(path)), "the check no longer sees what it looks for"
    else:
        assert starts_of_programs(parsed(path)) == []


@pytest.mark.parametrize(
    "text",
    [
        "import subprocess",
        "def f():\n    from subprocess import run",
        "import os\nos.system('true')",
        "import os\nos.execv('/bin/true', [])",
        "from os import posix_spawn",
        "import asyncio\nasyncio.create_subprocess_exec('true')",
    ],
)
def test_each_way_to_start_a_program_is_seen(text: str) -> None:
    assert starts_of_programs(ast.parse(text))


def test_the_configuration_imports_nothing_but_the_domain() -> None:
    for path in [module for module in MODULES if module.relative_to(SOURCE).parts[0] in CONFIGURATION]:
        ours = [name for _, name in imports_of(parsed(path)) if name.split(".")[0] == "pgkeep"]
        assert [name for name in ours if not name.startswith(CONFIGURATION_MAY_IMPORT)] == [], label(path)


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_modules_are_small_and_named_for_what_they_do(path: Path) -> None:
    assert path.stem not in VAGUE_NAMES
    size_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert size_lines <= FILE_LIMIT_LINES
    assert overlong_functions(parsed(path)) == []


def test_an_overlong_function_is_seen() -> None:
    body = "\n".join(f"    x{number} = {number}" for number in range(FUNCTION_LIMIT_LINES))
    assert overlong_functions(ast.parse(f"def long():\n{body}")) == [f"long: {FUNCTION_LIMIT_LINES + 1}"]
    documented = body.replace("    x0 = 0", '    """Said."""')
    assert overlong_functions(ast.parse(f"def documented():\n{documented}")) == []
