"""The vault's answers to the agent: one small file for each entry in staging, until the agent has removed that."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
import time

from pgkeep.adapters import durable
from pgkeep.adapters.sidecars import read_sidecar
from pgkeep.domain import mailbox, names
from pgkeep.domain.mailbox import Outcome
from pgkeep.errors import FormatError, NotFoundError
from pgkeep.vault import staging
from pgkeep.vault.layout import Vault

LIMIT = 200
_MODE = 0o444
_DIRECTORY_MODE = 0o755
# A disk that was full for a moment need not cost another dump: so often the same one is tried before the agent hears.
QUICK_RETRIES_SECONDS = (2.0, 5.0, 15.0)
_FIRST_RETRY_SECONDS = 60.0
_LAST_RETRY_SECONDS = 3600.0


@dataclasses.dataclass(slots=True)
class _Retry:
    """When a dump that failed for reasons of the vault's own may be tried again, after so many tries."""

    tries: int
    due: float


class Outcomes:
    """Those that are published. Only identifiers and retries are held in memory, not many more than :data:`LIMIT`."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._directory = vault.layout.outcomes
        self._answered: set[str] = set()
        self._retries: dict[str, _Retry] = {}
        self._prepare()
        self._load()

    @property
    def is_full(self) -> bool:
        """The agent has to take some before anything new is answered."""
        return len(self._answered | self._retries.keys()) >= LIMIT

    def is_open(self, identifier: str) -> bool:
        """Is there no answer yet and room for one, or one that another try may mend?"""
        retry = self._retries.get(identifier)
        if retry is not None:
            return time.monotonic() >= retry.due
        return identifier not in self._answered and not self.is_full

    def publish(self, outcome: Outcome) -> None:
        """Replaces an earlier answer. A failure is told only after some tries. Raises ``StorageError``."""
        if outcome.state == "failed":
            tries = self._retries[outcome.id].tries + 1 if outcome.id in self._retries else 1
            self._retries[outcome.id] = _Retry(tries, time.monotonic() + _delay_seconds(tries))
            if tries <= len(QUICK_RETRIES_SECONDS):
                return
        durable.write_atomically(self._directory, mailbox.outcome_name(outcome.id), mailbox.encode(outcome), _MODE)
        self._answered.add(outcome.id)
        if outcome.state != "failed":
            self._retries.pop(outcome.id, None)

    def tidy(self) -> None:
        """Remove the answers to what the agent has taken away. Raises ``StorageError``."""
        known = self._answered | self._retries.keys()
        gone = [each for each in known if not staging.is_there(self._vault.layout.staging, each)]
        for identifier in gone:
            self._unlink(mailbox.outcome_name(identifier))
            self._answered.discard(identifier)
            self._retries.pop(identifier, None)

    def _prepare(self) -> None:
        """Vaults made before there were outcomes lack the directory; the one above it is sealed."""
        with durable.explain(self._directory, "making the directory for outcomes"):
            if not self._directory.is_dir():
                with self._vault.unlocked(self._vault.layout.active):
                    self._directory.mkdir(exist_ok=True)
            if stat.S_IMODE(self._directory.stat().st_mode) != _DIRECTORY_MODE:
                # Filesystems without modes refuse it; everybody may read there anyway.
                with contextlib.suppress(PermissionError):
                    self._directory.chmod(_DIRECTORY_MODE)

    def _load(self) -> None:
        with durable.explain(self._directory, "reading the outcomes"):
            present = os.listdir(self._directory)
        for name in present:
            identifier = name.removesuffix(".json")
            if names.is_identifier(identifier) and (outcome := self._read(name)) is not None:
                self._answered.add(identifier)
                if outcome.state == "failed":
                    tries = len(QUICK_RETRIES_SECONDS) + 1
                    self._retries[identifier] = _Retry(tries, time.monotonic() + _delay_seconds(tries))
            else:
                self._unlink(name)

    def _read(self, name: str) -> Outcome | None:
        """None for what a crash left: the entry is answered anew."""
        try:
            return mailbox.decode_outcome(read_sidecar(self._directory / name, mailbox.SIZE_LIMIT_BYTES))
        except (FormatError, NotFoundError):
            return None

    def _unlink(self, name: str) -> None:
        with durable.explain(self._directory / name, "removing an outcome"):
            (self._directory / name).unlink(missing_ok=True)


def _delay_seconds(tries: int) -> float:
    """How long to wait after so many: a little at first, then, with the failure told, up to an hour."""
    if tries <= len(QUICK_RETRIES_SECONDS):
        return QUICK_RETRIES_SECONDS[tries - 1]
    told = tries - len(QUICK_RETRIES_SECONDS)
    return min(_FIRST_RETRY_SECONDS * 2.0 ** min(told - 1, 16), _LAST_RETRY_SECONDS)
