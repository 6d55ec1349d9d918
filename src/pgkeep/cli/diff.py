"""``pgkeep diff``."""

from __future__ import annotations

import click

from pgkeep.cli import render
from pgkeep.cli.context import Context, common_options, pass_context
from pgkeep.cli.show import find
from pgkeep.domain.difference import Difference, TableDifference, compare

_HEADINGS = ("CHANGE", "TABLE", "ROWS BEFORE", "ROWS AFTER", "ROWS", "BYTES")


@click.command()
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@click.option("--database", metavar="NAME", help="Whose latest, where the vault holds several.")
@common_options
@pass_context
def command(context: Context, before: str, after: str, database: str | None) -> None:
    """Say what changed from backup A to backup B: tables added, gone and changed, with their rows and bytes.

    \b
    Examples:
      pgkeep diff 20260130T00 latest
      pgkeep diff latest:weekly latest:daily
      pgkeep diff /mnt/usb/2026-01-31_00-00-00.sql.gz latest --json | jq '.gone[].name'

    A and B are ids, beginnings of ids, latest, latest:TIER, file names or paths. Only the manifests are read: what
    is compared is each table's content, not the schema around it.
    """
    found = compare(find(context, before, database).manifest, find(context, after, database).manifest)
    if context.json:
        render.print_json(found)
    else:
        _print(found)
    for note in found.notes:
        click.echo(f"pgkeep: warning: {render.printable(note)}", err=True)


def _print(found: Difference) -> None:
    changes = (("added", found.added), ("gone", found.gone), ("changed", found.changed))
    rows = [_row(change, table) for change, tables in changes for table in tables]
    if rows:
        render.print_table(_HEADINGS, rows, frozenset({2, 3, 4, 5}))
    else:
        click.echo("the tables are identical")
    click.echo(
        f"{len(found.added)} added, {len(found.gone)} gone, {len(found.changed)} changed,"
        f" {found.unchanged_count} unchanged; rows {found.rows_delta:+}, data {_signed(found.raw_bytes_delta)},"
        f" large objects {found.large_objects_delta:+}, sealed file {_signed(found.size_bytes_delta)}"
    )


def _row(change: str, table: TableDifference) -> tuple[str, ...]:
    return (
        change,
        f"{table.schema}.{table.name}",
        str(table.rows_before),
        str(table.rows_after),
        "content" if table.digest_only else f"{table.rows_delta:+}",
        "only" if table.digest_only else _signed(table.raw_bytes_delta),
    )


def _signed(delta_bytes: int) -> str:
    return ("-" if delta_bytes < 0 else "+") + render.size(abs(delta_bytes))
