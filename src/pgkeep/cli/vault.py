"""``pgkeep vault``: the service that seals what the agent hands over, and expires what is over."""

from __future__ import annotations

import importlib
import os
import signal
from typing import TYPE_CHECKING

import click

from pgkeep.cli import render
from pgkeep.cli.context import Context, common_options

if TYPE_CHECKING:
    from pgkeep.cli.log import ServiceLog
    from pgkeep.config import Settings

# A command that holds the lock is waited for; a second service is not.
_WAIT_SECONDS = 60.0
_SUBCOMMANDS = {"move": "pgkeep.cli.vault_move"}


class _LazyGroup(click.Group):
    """Imports a subcommand's module only when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _SUBCOMMANDS:
            return None
        command: click.Command = importlib.import_module(_SUBCOMMANDS[cmd_name]).command
        return command


@click.group(cls=_LazyGroup, invoke_without_command=True)
@common_options
@click.pass_context
def command(click_context: click.Context) -> None:
    """Seal what the agent leaves in staging/, and remove what has expired. Runs until it is stopped.

    Started as root with PGKEEP_VAULT_USER set, it starts the inspector of dumps as nobody, then becomes that user and
    keeps nothing but the right to set the immutable flag (capability LINUX_IMMUTABLE). Beside it `pgkeep cleanup`
    works by asking it; `pgkeep health vault` says how it is.

    \b
    Examples:
      pgkeep vault
      PGKEEP_VAULT_USER=pgkeep-vault PGKEEP_LOG_FORMAT=json pgkeep vault
      pgkeep vault move /srv/new-disk/backups
    """
    if click_context.invoked_subcommand is None:
        _serve(click_context.ensure_object(Context))


def _serve(context: Context) -> None:
    # All of it before rights are given up: the interpreter may lie where the vault's own user can't read.
    from pgkeep import wiring  # noqa: F401
    from pgkeep.cli.log import ServiceLog
    from pgkeep.vault import service
    from pgkeep.vault.inspector import Inspector

    settings = context.loaded.settings
    log = ServiceLog("vault", settings.log.format)
    service.read_schedule_once(settings.schedule.expressions(), settings.schedule.timezone)
    render.printable("\0")
    try:
        with Inspector() as inspector:
            _leave_root(settings, log)
            with context.services.vault_service(inspector, log, _WAIT_SECONDS) as running:
                running.run()
    except SystemExit as ending:
        if ending.code != 128 + signal.SIGTERM:
            raise
        # Asked to stop, and stopped as it should: no failure for whoever started it.
        log.note("stopped")


def _leave_root(settings: Settings, log: ServiceLog) -> None:
    """Become the vault's user. Raises ``ProtectionError``, ``ConfigurationError``."""
    from pgkeep.adapters import privileges

    if os.geteuid() != 0:
        log.warn(f"started as uid {os.geteuid()}, not root: the process that looks into dumps has the same user")
    elif settings.vault.user is None:
        log.warn("running as root: set PGKEEP_VAULT_USER to a user of the vault's own")
    else:
        _require_capability(settings)
        privileges.become(settings.vault.user)
        log.note(f"became {settings.vault.user}, without any right of root's but that to set flags")


def _require_capability(settings: Settings) -> None:
    """Raises ``ProtectionError`` where it is missing and a weaker protection was not asked for."""
    from pgkeep.adapters import fsflags, privileges
    from pgkeep.errors import ProtectionError

    if settings.storage.protection in ("auto", "chattr") and not privileges.standing().may_set_flags:
        message = "the vault was started without the capability LINUX_IMMUTABLE: it could protect nothing"
        raise ProtectionError(message, f"{fsflags.CAPABILITY_HINT}; or accept PGKEEP_PROTECTION=mode")
