"""``pgkeep doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pgkeep.cli import render
from pgkeep.cli.context import Context, common_options, pass_context
from pgkeep.errors import ConfigurationError

if TYPE_CHECKING:
    from pgkeep.watch.check import Check

FOUND_SOMETHING = 1


@click.command()
@common_options
@pass_context
def command(context: Context) -> None:
    """Look for what would keep a backup from being made, protected or restored, and say how to mend it.

    \b
    Examples:
      pgkeep doctor
      DB_HOST=db DB_USER=app DB_NAME=app_db pgkeep doctor
      pgkeep doctor --json | jq -r '.checks[] | select(.status == "fail") | .message'

    Each line is ok, warn or fail. Exits with 1 if anything fails; warnings leave it at 0. Nothing is changed: the
    protection is tried on a file that is gone afterwards.
    """
    checks = _examine(context)
    counts = {status: sum(check.status == status for check in checks) for status in ("ok", "warn", "fail")}
    if context.json:
        render.print_json({"ok": not counts["fail"], "counts": counts, "checks": checks})
    else:
        for check in checks:
            _print(check)
    click.echo(f"pgkeep: {counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures", err=True)
    if counts["fail"]:
        raise click.exceptions.Exit(FOUND_SOMETHING)


def _examine(context: Context) -> list[Check]:
    from pgkeep.watch import doctor

    try:
        services = context.services
    except ConfigurationError as error:
        return [doctor.configuration_fails(error), *doctor.machine_checks()]
    return doctor.examine(services.settings, services.target)


def _print(check: Check) -> None:
    first, *others = check.message.splitlines() or [""]
    click.echo(f"{check.status:4}  {check.name}: {render.printable(first)}")
    for line in others:
        click.echo(f"      {render.printable(line)}")
    if check.remedy:
        click.echo(f"      -> {render.printable(check.remedy)}")
