"""Every check, in the order in which a person mends things. A canary file comes and goes; nothing else is changed."""

from __future__ import annotations

from pgkeep.adapters import clock, postgres
from pgkeep.config import Settings
from pgkeep.errors import ConfigurationError, NotFoundError
from pgkeep.vault import store
from pgkeep.vault.layout import Layout
from pgkeep.watch import machine, server, storage
from pgkeep.watch.check import Check, failed, guarded


def machine_checks() -> list[Check]:
    """What needs no configuration."""
    return [
        *guarded("version", machine.version),
        *guarded("tools", machine.tools),
        *guarded("setpriv", machine.setpriv),
        *guarded("boundary", machine.boundary),
    ]


def configuration_fails(error: ConfigurationError) -> Check:
    return failed("configuration", error)


def examine(settings: Settings, target: postgres.Target) -> list[Check]:
    """All checks that the configuration makes possible. Raises nothing that pgkeep foresees: errors are findings."""
    layout = Layout(settings.root)
    now = clock.now()
    examination = server.Examination(target, _plan(settings))
    checks = [Check("configuration", "ok", "valid; `pgkeep config show` prints it"), *machine_checks()]
    checks += guarded("server", examination.run)
    checks += guarded("root", lambda: storage.root(layout))
    checks += guarded("vault", lambda: storage.vault(layout))
    checks += guarded("protection", lambda: storage.protection_in_force(layout, settings.storage.protection))
    checks += guarded("journal", lambda: storage.unfinished(layout))
    catalog, defects = _catalog(layout)
    sealed = catalog.backups if catalog else ()
    checks += defects or guarded("backups", lambda: storage.backups(catalog, now))
    if examination.facts is not None:
        facts, reserve_bytes = examination.facts, settings.storage.reserve_bytes
        checks += guarded("space", lambda: storage.space(layout, facts, sealed, reserve_bytes))
    else:
        text = "how much a backup needs is not known without the server"
        checks.append(Check("space", "warn", text, "let the server be reached"))
    checks.append(machine.clock(now, storage.sealed_at(catalog), settings.schedule.timezone))
    return checks


def _catalog(layout: Layout) -> tuple[store.Catalog | None, list[Check]]:
    """None where there is no vault; a finding where the vault can't be read."""
    found: list[store.Catalog] = []
    try:
        found.append(store.read_catalog(layout))
    except NotFoundError:
        return None, []
    except OSError as error:
        return None, [Check("backups", "fail", f"the vault can't be read: {error}", "run doctor as the vault's user")]
    return found[0], []


def _plan(settings: Settings) -> server.Plan:
    database = settings.database
    return server.Plan(
        names=database.names,
        everything=database.all_databases,
        globals=database.globals,
        connect_timeout_seconds=database.connect_timeout_seconds,
    )
