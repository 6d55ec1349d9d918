"""Remove what the retention plan lets go: the one place where sealed files are unlinked."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pgkeep.adapters import durable
from pgkeep.domain import names
from pgkeep.domain.catalog import SealedBackup
from pgkeep.domain.retention import Decision
from pgkeep.progress import Progress
from pgkeep.vault import audit_log, journal, seal
from pgkeep.vault.layout import Vault


def carry_out(vault: Vault, decisions: Sequence[Decision], progress: Progress) -> list[SealedBackup]:
    """Remove every backup whose decision says so; each is journaled and audited. Raises ``StorageError``."""
    removed = []
    for decision in decisions:
        if not decision.keep:
            _remove(vault, decision, progress)
            removed.append(decision.backup)
    return removed


def finish_removal(vault: Vault, entry: journal.Entry) -> None:
    """Remove whatever of the entry's names is left. Idempotent."""
    directory = vault.directory(entry.directory)
    with durable.explain(directory, "removing an expired backup"), vault.unlocked(directory) as descriptor:
        seal.remove_names(descriptor, entry)
    audit_log.record(vault, "expired", id=entry.id, path=f"{entry.directory}/{entry.filename}")
    journal.close(vault.layout.journal, entry)


def _remove(vault: Vault, decision: Decision, progress: Progress) -> None:
    entry = _intent(vault, decision.backup)
    audit_log.record(vault, "expiring", id=entry.id, path=decision.backup.path_in_vault, reason=decision.reason)
    journal.write(vault.layout.journal, entry)
    progress.step("expire.journal-written")
    finish_removal(vault, entry)
    progress.step("expire.removed")
    progress.note(f"{decision.backup.path_in_vault}: {decision.reason}")


def _intent(vault: Vault, backup: SealedBackup) -> journal.Entry:
    """The manifest comes last, so that it is removed first: what has no manifest is no backup any more."""
    directory = vault.directory(backup.directory)
    filename = backup.manifest.filename
    order = (filename, *(filename + suffix for suffix in names.SIDECAR_SUFFIXES))
    inodes = {name: os.lstat(directory / name).st_ino for name in order if os.path.lexists(directory / name)}
    return journal.Entry(
        id=backup.manifest.id, action="expire", directory=backup.directory, filename=filename, inodes=inodes
    )
