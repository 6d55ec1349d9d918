"""Copies whose time at a destination is over by the policy of that destination: which they are."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping

from pgkeep.domain import manifest as manifests
from pgkeep.domain import retention
from pgkeep.domain.catalog import SealedBackup
from pgkeep.extractor.plan import Origin, Record


@dataclasses.dataclass(frozen=True, slots=True)
class Due:
    """A copy that is to go (its path below ``active/``), and why."""

    path: str
    reason: str


def due(records: Mapping[str, Record], policy: retention.Policy, now: dt.datetime) -> list[Due]:
    """The oldest first. By the same rules as in the vault, but that only this policy says when the time is over.

    Copies of whose origin nothing is known stay.
    """
    known = [
        _as_backup(path, record, record.origin, policy) for path, record in records.items() if record.origin is not None
    ]
    decisions = retention.plan(known, policy, now)
    return [Due(each.backup.path_in_vault, each.reason) for each in decisions if not each.keep]


def _as_backup(path: str, record: Record, origin: Origin, policy: retention.Policy) -> SealedBackup:
    """The copy as the rules of retention see it; what they don't look at is empty."""
    directory, _, filename = path.partition("/")
    manifest = manifests.Manifest(
        version=manifests.VERSION,
        id=record.id,
        kind=origin.kind,
        filename=filename,
        timestamp="",
        type=origin.type,
        database=origin.database,
        size_bytes=record.files[""].size_bytes,
        sha256=record.files[""].sha256,
        created_at=origin.created_at,
        sealed_at=origin.sealed_at,
        retain_until=retention.retain_until(policy, origin.type, origin.sealed_at),
        immutable=False,
        protection="none",
        system_identifier=origin.system_identifier,
        server_version="",
        dump_version="",
        pgkeep_version="",
        findings=("doubted",) if origin.is_doubted else (),
    )
    return SealedBackup(manifest, directory, "incomplete" if record.problem else "sealed")
