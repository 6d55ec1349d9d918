"""Remove what the retention plan lets go: the one place where sealed files are unlinked."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pgkeep.adapters import durable
from pgkeep.domain import names
from pgkeep.domain.catalog import SealedBackup
from pgkeep.domain.retention import Decision
from pgkeep.errors import PgkeepError
from pgkeep.progress import Progress
from pgkeep.vault import audit_log, journal, settle
from pgkeep.vault.layout import Vault


def carry_out(vault: Vault, decisions: Sequence[Decision], progress: Progress) -> list[SealedBackup]:
    """Remove every backup whose decision says so; each is journaled and audited. Raises ``StorageError``."""
    removed = []
    for decision in decisions:
        if not decision.keep:
            with durable.explain(vault.layout.active / decision.backup.path_in_vault, "removing an expired backup"):
                _remove(vault, decision, progress)
            removed.append(decision.backup)
    return removed


def finish_removal(vault: Vault, entry: journal.Entry, progress: Progress) -> None:
    """Remove whatever of the entry's names is left. Idempotent."""
    for place in entry.places:
        directory = vault.directory(place.directory)
        with durable.explain(directory, "removing an expired backup"), vault.unlocked(directory) as descriptor:
            settle.remove_names(vault, descriptor, place)
        settle.protect_again(vault, place)
        progress.step("expire.unlinked")
        if not audit_log.holds(vault, "expired", entry.id):
            audit_log.record(vault, "expired", id=entry.id, path=f"{place.directory}/{place.filename}")
    progress.step("expire.audited")
    journal.close(vault.layout.journal, entry)


def _remove(vault: Vault, decision: Decision, progress: Progress) -> None:
    entry = _intent(vault, decision.backup)
    audit_log.record(vault, "expiring", id=entry.id, path=decision.backup.path_in_vault, reason=decision.reason)
    journal.write(vault.layout.journal, entry)
    try:
        progress.step("expire.journal-written")
        finish_removal(vault, entry, progress)
        progress.step("expire.removed")
    except BaseException:
        _settle(vault, entry, progress)
        raise
    progress.note(f"{decision.backup.path_in_vault}: {decision.reason}")


def _settle(vault: Vault, entry: journal.Entry, progress: Progress) -> None:
    """What is begun is carried through; what goes wrong in that must not hide why it came to it."""
    try:
        finish_removal(vault, entry, progress)
    except PgkeepError as error:
        progress.warn(f"the next run will finish the removal of {entry.id}: {error.message}")


def _intent(vault: Vault, backup: SealedBackup) -> journal.Entry:
    """The manifest comes last, so that it is removed first: what has no manifest is no backup any more."""
    directory = vault.directory(backup.directory)
    filename = backup.manifest.filename
    order = (filename, *(filename + suffix for suffix in names.SIDECAR_SUFFIXES))
    inodes = {name: os.lstat(directory / name).st_ino for name in order if os.path.lexists(directory / name)}
    place = journal.Place(directory=backup.directory, filename=filename, inodes=inodes)
    return journal.Entry(id=backup.manifest.id, action="expire", places=(place,))
