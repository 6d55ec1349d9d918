"""Every check of a role, in the order in which a person mends things.

A canary file comes and goes where protection is tried; nothing else is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

from pgkeep.adapters import clock, postgres
from pgkeep.adapters.privileges import Standing
from pgkeep.agent import service as agent_service
from pgkeep.config import Settings
from pgkeep.errors import ConfigurationError, NotFoundError
from pgkeep.extractor import daemon
from pgkeep.extractor.extract import Extractor
from pgkeep.vault import store
from pgkeep.vault.layout import Layout
from pgkeep.watch import machine, rights, roles, server, storage
from pgkeep.watch.check import Check, failed, guarded

Role = Literal["all", "agent", "vault", "extractor"]

_AGENTS_REMEDY = "does the agent run? `docker compose logs backup-agent`"
_VALID = Check("configuration", "ok", "valid; `pgkeep config show` prints it")


def machine_checks(role: Role = "all") -> list[Check]:
    """What needs no configuration."""
    checks = guarded("version", machine.version)
    if role in ("all", "agent"):
        checks += [*guarded("tools", machine.tools), *guarded("setpriv", machine.setpriv)]
    if role == "all":
        checks += guarded("boundary", machine.boundary)
    return checks


def configuration_fails(error: ConfigurationError) -> Check:
    return failed("configuration", error)


def examine(settings: Settings, target: postgres.Target) -> list[Check]:
    """Agent and vault in one process. Raises nothing that pgkeep foresees: errors are findings. So do the others."""
    layout = Layout(settings.root)
    now = clock.now()
    examination = server.Examination(target, _plan(settings))
    checks = [_VALID, *machine_checks()]
    checks += guarded("server", examination.run)
    checks += guarded("root", lambda: storage.root(layout))
    checks += _vaults(layout, settings)
    catalog, defects = _catalog(layout)
    sealed = catalog.backups if catalog else ()
    checks += defects or guarded("backups", lambda: storage.backups(catalog, now))
    if examination.facts is not None:
        facts, reserve_bytes = examination.facts, settings.storage.reserve_bytes
        checks += guarded("space", lambda: storage.space(layout, facts, sealed, reserve_bytes))
    else:
        checks.append(_unknown_space())
    checks.append(machine.clock(now, storage.sealed_at(catalog), settings.schedule.timezone))
    return checks


def examine_agent(settings: Settings, target: postgres.Target) -> list[Check]:
    """What the agent's container must have, and what it must not be able to do."""
    layout = Layout(settings.root)
    examination = server.Examination(target, _plan(settings))
    checks = [_VALID, *machine_checks("agent")]
    checks += guarded("capabilities", lambda: rights.of_reader("agent", layout.active))
    checks += guarded("server", examination.run)
    mend = "mount the agent's volume there, owned by the agent's user (10001)"
    checks += guarded("staging", lambda: roles.directory("staging", layout.staging, mend))
    checks += guarded("vault", lambda: roles.vault_seen(layout))
    checks += guarded("log", lambda: roles.log_file(layout.logs / "cron.log"))
    facts = examination.facts
    checks += guarded("space", lambda: roles.staging_space(layout, facts)) if facts else [_unknown_space()]
    checks.append(machine.clock(clock.now(), None, settings.schedule.timezone))
    checks += guarded("service", lambda: roles.service("agent", layout.staging / agent_service.HEALTH_NAME))
    return checks


def examine_vault(settings: Settings, started: Standing) -> list[Check]:
    """``started``: what this process might before it became the vault's user. Neither programs nor a server matter."""
    layout = Layout(settings.root)
    now = clock.now()
    checks = [_VALID, *machine_checks("vault")]
    checks += guarded("capabilities", lambda: rights.of_vault(started, settings.storage.protection))
    checks += guarded("network", rights.network)
    checks += guarded("staging", lambda: roles.staging_seen(layout))
    mend = "mount the vault's volume there, owned by the vault's user (10002)"
    checks += guarded("state", lambda: roles.directory("state", layout.state, mend))
    checks += guarded("logs", lambda: roles.directory("logs", layout.logs, mend))
    checks += _vaults(layout, settings)
    checks += guarded("audit log", lambda: roles.audit(layout))
    catalog, defects = _catalog(layout)
    sealed = catalog.backups if catalog else ()
    checks += defects or guarded("backups", lambda: storage.backups(catalog, now, _AGENTS_REMEDY))
    checks += guarded("space", lambda: roles.reserve(layout, settings.storage.reserve_bytes, sealed))
    checks.append(machine.clock(now, storage.sealed_at(catalog), settings.schedule.timezone))
    checks += guarded("service", lambda: roles.service("vault", layout.health))
    return checks


def examine_extractor(settings: Settings, extractors: Sequence[Extractor]) -> list[Check]:
    """The destinations, what is copied there, and that nothing can be written the other way."""
    layout = Layout(settings.root)
    state = settings.root / "extracted"
    checks = [_VALID, *machine_checks("extractor")]
    checks += guarded("capabilities", lambda: rights.of_reader("extractor", layout.active))
    checks += guarded("vault", lambda: roles.vault_seen(layout))
    if layout.exists:
        checks += guarded("backups", lambda: roles.readable_backups(layout.active))
    for each in extractors:
        name = f"destination {each.settings.name}"
        checks += guarded(name, functools.partial(roles.destination, name, layout, each.destination))
    mend = "mount the extractor's volume there, owned by its user (10003)"
    checks += guarded("state", lambda: roles.directory("state", state, mend))
    checks += guarded("log", lambda: roles.log_file(layout.extraction_audit))
    checks.append(machine.clock(clock.now(), None, settings.schedule.timezone))
    checks += guarded("service", lambda: roles.service("extractor", state / daemon.HEALTH_NAME))
    return checks


def _vaults(layout: Layout, settings: Settings) -> list[Check]:
    """What whoever seals needs."""
    return [
        *guarded("vault", lambda: storage.vault(layout)),
        *guarded("protection", lambda: storage.protection_in_force(layout, settings.storage.protection)),
        *guarded("journal", lambda: storage.unfinished(layout)),
    ]


def _unknown_space() -> Check:
    return Check(
        "space", "warn", "how much a backup needs is not known without the server", "let the server be reached"
    )


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
