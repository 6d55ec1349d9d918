"""What one service alone needs, beside what :mod:`pgkeep.watch.storage` and others look at for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pgkeep.adapters import clock, durable
from pgkeep.adapters.destinations import Destination
from pgkeep.adapters.sidecars import read_sidecar
from pgkeep.domain import health
from pgkeep.domain.catalog import SealedBackup
from pgkeep.domain.health import Role
from pgkeep.errors import NotFoundError
from pgkeep.extractor import source
from pgkeep.extractor.state import decode_marker
from pgkeep.vault import audit_log, condition
from pgkeep.vault.layout import Layout, Vault, is_flagged, read_identity
from pgkeep.watch import storage
from pgkeep.watch.check import Check
from pgkeep.watch.server import Facts


def service(role: Role, path: Path) -> Iterator[Check]:
    """What the service itself said last. Its problems are its health check's to fail by, not the doctor's."""
    remedy = f"`docker compose logs backup-{role}` says more"
    try:
        record = health.decode(read_sidecar(path, health.SIZE_LIMIT_BYTES))
    except NotFoundError:
        yield Check("service", "warn", f"the {role} has not started yet", f"start it: `pgkeep {role}`")
        return
    ailments = health.ailments(record, clock.now())
    yield from (Check("service", "warn", text, remedy) for text in ailments)
    if not ailments:
        yield Check("service", "ok", f"the {role} is at work (pid {record.pid}), and says that all is well")


def directory(name: str, path: Path, mend: str) -> Iterator[Check]:
    """Is it there, and may this process make files in it?"""
    if not path.is_dir():
        yield Check(name, "fail", f"{path} is not a directory", mend)
    elif not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        facts = path.stat()
        text = f"{path} is not writable for user id {os.geteuid()}: it belongs to {facts.st_uid}:{facts.st_gid}"
        yield Check(name, "fail", text, mend)
    else:
        yield Check(name, "ok", f"{path} is there and writable")


def log_file(path: Path) -> Iterator[Check]:
    """The role's own file in ``logs/``, where only the vault may make new ones."""
    if os.access(path if path.exists() else path.parent, os.W_OK):
        yield Check("log", "ok", f"{path} is writable")
    else:
        text = f"{path} can't be written by user id {os.geteuid()}"
        yield Check("log", "fail", text, f"make it there and chown it to {os.geteuid()}; the images bring it along")


# ---------------------------------------------------------------- agent


def vault_seen(layout: Layout) -> Iterator[Check]:
    """Raises ``FormatError``, ``RefusedError`` for a vault that is not to be used."""
    if layout.exists:
        yield Check("vault", "ok", f"vault {read_identity(layout).id}")
    else:
        text = f"there is no vault in {layout.active} yet"
        yield Check("vault", "warn", text, "start backup-vault; do both mount the same volume?")


def staging_space(layout: Layout, facts: Facts) -> Iterator[Check]:
    """Room for the next dump. Raises ``StorageError``."""
    artifact_bytes = storage.expected_artifact_bytes(facts, ())
    data_bytes = sum(facts.data_bytes.values())
    place = storage.nearest(layout.staging)
    yield storage.weigh_space(str(place), durable.free_bytes(place), artifact_bytes, artifact_bytes + data_bytes)


# ---------------------------------------------------------------- vault


def staging_seen(layout: Layout) -> Iterator[Check]:
    """The vault reads it, and writes nothing there."""
    if not layout.staging.is_dir():
        yield Check("staging", "fail", f"{layout.staging} is not a directory", "mount the agent's volume there, `:ro`")
    elif not os.access(layout.staging, os.R_OK | os.X_OK):
        text = f"{layout.staging} can't be read by user id {os.geteuid()}"
        yield Check("staging", "fail", text, "the vault's user must be in the agent's group")
    elif os.access(layout.staging, os.W_OK):
        text = f"{layout.staging} is writable for user id {os.geteuid()}; the vault only reads there"
        yield Check("staging", "warn", text, "mount it `:ro` for backup-vault in the Compose file")
    else:
        yield Check("staging", "ok", f"{layout.staging} can be read, and not written")


def audit(layout: Layout) -> Iterator[Check]:
    """Can the log be made append-only, and does it hang together? Raises ``StorageError``, ``RefusedError``."""
    weak = audit_log.weakness(Vault(layout, "chattr")) if layout.exists and is_flagged(layout.active) else ""
    if weak:
        yield Check("audit log", "warn", weak, "keep logs/ on ext4, xfs or btrfs")
    found = audit_log.examine(layout.audit)
    if found.problems:
        first = found.problems[0]
        text = f"{layout.audit}, line {first.line}: {first.message} ({len(found.problems)} such)"
        yield Check("audit log", "fail", text, "somebody changed it: compare it with a copy of yours")
    elif not weak:
        yield Check("audit log", "ok", f"{found.records} records, an unbroken chain")


def reserve(layout: Layout, reserve_bytes: int, sealed: tuple[SealedBackup, ...]) -> Iterator[Check]:
    """Is there room for the next backup, and for what must be written to remove one? Raises ``StorageError``."""
    if not layout.exists:
        yield Check("space", "ok", f"{durable.free_bytes(storage.nearest(layout.active)) / 1e6:.0f} MB are free")
        return
    short = list(condition.short_of_space(layout, reserve_bytes, sealed))
    remedy = "enlarge the disk, or shorten the retention for what comes"
    yield from (Check("space", "fail", text, remedy) for text in short)
    if not short:
        free_bytes = durable.free_bytes(layout.incoming)
        yield Check("space", "ok", f"{free_bytes / 1e6:.0f} MB are free, {reserve_bytes / 1e6:.0f} MB are kept free")


# ---------------------------------------------------------------- extractor


def readable_backups(active: Path) -> Iterator[Check]:
    """Dumps are closed to others: the extractor's group opens them. Raises ``PgkeepError`` for the newest one."""
    found = sorted(source.list_backups(active), key=lambda path: path.rpartition("/")[2])
    if not found:
        yield Check("backups", "warn", f"there are none in {active} yet", "does the agent run? `pgkeep health agent`")
        return
    with source.opened(active, found[-1]):
        yield Check("backups", "ok", f"{len(found)} backups; {found[-1]} can be read")


def destination(name: str, layout: Layout, target: Destination) -> Iterator[Check]:
    """Is it there, ours to write to, and the copies' own? Raises ``PgkeepError``."""
    with target.opened() as place:
        marker = place.read_marker()
        yield from (Check(name, "warn", text, "see docs/operations.md") for text in place.warnings)
        if marker is None:
            yield Check(name, "ok", f"{target.label} can be written; no copy was made there yet")
            return
        known = decode_marker(marker)
        if layout.exists and known.vault != read_identity(layout).id:
            text = f"{target.label} keeps the copies of another vault ({known.vault})"
            yield Check(name, "fail", text, "mount the right one, or `pgkeep extractor adopt` it on purpose")
        else:
            yield Check(name, "ok", f"{target.label} can be written, and is destination {known.id}")
