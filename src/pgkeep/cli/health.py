"""``pgkeep health``: the health check of a service's container. It runs every half minute: nothing heavy here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from pgkeep.adapters import clock
from pgkeep.cli import render
from pgkeep.cli.context import Context, common_options, pass_context
from pgkeep.domain import health
from pgkeep.domain.health import Role
from pgkeep.errors import NotFoundError, PgkeepError

_FILES: dict[Role, str] = {
    "agent": "staging/.agent-health.json",
    "vault": "state/health.json",
    "extractor": "extracted/.health.json",
}


@click.command()
@click.argument("role", type=click.Choice(list(_FILES)))
@common_options
@pass_context
def command(context: Context, role: Role) -> None:
    """Say whether a service does its work: exit code 0, or 1 and why not.

    A service is unhealthy when backups fail or are overdue, when it can't do what it is there for, and when it has
    not said anything for a minute.

    \b
    Examples:
      pgkeep health agent
      pgkeep health vault --json | jq -r '.problems[]'
    """
    _leave_root(context, role)
    problems = _problems(context.loaded.settings.root / _FILES[role], role)
    if context.json:
        click.echo(json.dumps({"role": role, "healthy": not problems, "problems": problems}))
    else:
        for line in problems or ["healthy"]:
            click.echo(render.printable(line))
    if problems:
        raise click.exceptions.Exit(1)


def _leave_root(context: Context, role: Role) -> None:
    """In the vault's container root has not even the right to look into the vault's own directory."""
    user = context.loaded.settings.vault.user
    if role == "vault" and user is not None and os.geteuid() == 0:
        from pgkeep.adapters import privileges

        privileges.step_down(user)


def _problems(path: Path, role: Role) -> list[str]:
    from pgkeep.adapters.sidecars import read_sidecar

    try:
        record = health.decode(read_sidecar(path, health.SIZE_LIMIT_BYTES))
    except NotFoundError:
        return [f"the {role} has not started yet"]
    except PgkeepError as error:
        return [error.message]
    return list(health.ailments(record, clock.now()))
