"""How things look: sizes, times, tables, JSON, and progress on a terminal or in a log."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from pgkeep.domain.catalog import SealedBackup

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
LOG_INTERVAL_SECONDS = 10.0


def size(value_bytes: float) -> str:
    """``1.5 GB``: powers of 1000, as disks are sold and PostgreSQL's users read."""
    for unit in _UNITS:
        if abs(value_bytes) < 999.5 or unit == _UNITS[-1]:
            return (
                f"{value_bytes:.0f} {unit}" if unit == "B" or abs(value_bytes) >= 100 else f"{value_bytes:.1f} {unit}"
            )
        value_bytes /= 1000
    raise AssertionError("unreachable")


def moment(value: dt.datetime | None) -> str:
    return "for ever" if value is None else f"{value:%Y-%m-%d %H:%M:%S} UTC"


def backup_object(backup: SealedBackup, active: Path) -> dict[str, Any]:
    """A backup as ``--json`` shows it, its path below ``active``; ``docs/operations.md`` describes the fields."""
    manifest = backup.manifest
    return {
        "id": manifest.id,
        "tier": manifest.type.value,
        "kind": manifest.kind,
        "database": manifest.database,
        "timestamp": manifest.timestamp,
        "path": str(active.absolute() / backup.path_in_vault),
        "size_bytes": manifest.size_bytes,
        "raw_bytes": manifest.raw_bytes,
        "sha256": manifest.sha256,
        "protection": manifest.protection,
        "state": backup.state,
        "problems": list(backup.problems),
        "created_at": manifest.created_at,
        "sealed_at": manifest.sealed_at,
        "retain_until": manifest.retain_until,
        "tables": len(manifest.tables),
        "rows": manifest.rows,
        "dump_seconds": manifest.dump_seconds,
        "notes": list(manifest.notes),
    }


def sealed_as(backup: SealedBackup) -> str:
    """The sentence on a new backup: ``sealed app as daily/… (12 tables, 340 rows, 1.5 MB, protection: chattr)``."""
    manifest = backup.manifest
    what = f"{manifest.database} " if manifest.kind == "database" else ""
    counts = f"{len(manifest.tables)} tables, {manifest.rows} rows, {size(manifest.size_bytes)}"
    return f"sealed {what}as {backup.path_in_vault} ({counts}, protection: {manifest.protection})"


def print_json(document: Any) -> None:
    """One document, to stdout."""
    try:
        text = msgspec.json.format(msgspec.json.encode(document), indent=2).decode()
    except UnicodeEncodeError:
        # A file's name need not be UTF-8; its stray bytes come out as \udcNN, which every JSON reader survives.
        text = json.dumps(msgspec.to_builtins(document), indent=2)
    click.echo(text)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> None:
    """Aligned columns, no frame: good to read and to cut. ``right``: the columns to align to the right."""
    shown = [[printable(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(len(row[column]) for row in shown) for column in range(len(headings))]
    for row in shown:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


def printable(text: str) -> str:
    """A name from a database or a file may hold anything: nothing of it may steer the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class _Log:
    """Progress as plain lines on stderr."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._last = time.monotonic()

    def step(self, name: str) -> None:
        pass

    def advance(self, done_bytes: int, total_bytes: int | None) -> None:
        if not self._quiet and time.monotonic() - self._last >= LOG_INTERVAL_SECONDS:
            self._last = time.monotonic()
            self._say(f"{size(done_bytes)} of about {size(total_bytes)}" if total_bytes else size(done_bytes))

    def note(self, text: str) -> None:
        if not self._quiet:
            self._say(text)

    def warn(self, text: str) -> None:
        self._say(f"warning: {text}")

    def _say(self, text: str) -> None:
        click.echo(f"pgkeep: {printable(text)}", err=True)


class _Terminal(_Log):
    """Progress as a bar below the lines."""

    def __init__(self, bar: Bar, task: TaskID) -> None:
        super().__init__(quiet=False)
        self._bar = bar
        self._task = task

    def advance(self, done_bytes: int, total_bytes: int | None) -> None:
        self._bar.update(self._task, completed=done_bytes, total=max(total_bytes or 0, done_bytes))

    def note(self, text: str) -> None:
        self._bar.update(self._task, description=printable(text), completed=0, total=None)

    def _say(self, text: str) -> None:
        self._bar.console.print(f"pgkeep: {printable(text)}", markup=False, highlight=False)


@contextlib.contextmanager
def progress(*, quiet: bool = False) -> Iterator[_Log]:
    """A listener for long work: a bar on a terminal, lines in a log, warnings only when quiet."""
    if quiet or not sys.stderr.isatty():
        yield _Log(quiet)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Terminal(bar, bar.add_task("working", total=None))
