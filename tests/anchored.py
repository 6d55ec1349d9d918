"""A vault's audit log and a directory that its head is taken to, for the tests of anchors."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest

from pgkeep.adapters import clock
from pgkeep.adapters.destinations.directory import DirectoryDestination
from pgkeep.domain import audit
from pgkeep.extractor import anchors
from pgkeep.extractor.anchors import Collected, Memory
from pgkeep.vault import audit_log
from pgkeep.vault.layout import Layout, Vault, open_vault, read_identity


class Listener:
    """A ``Progress`` that keeps what it hears."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.steps: list[str] = []

    def step(self, name: str) -> None:
        self.steps.append(name)

    def advance(self, done_bytes: int, total_bytes: int | None) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class Anchored:
    """``root`` gets a vault without flags; ``external`` is the destination."""

    def __init__(self, directory: Path, external: Path | None = None) -> None:
        self.root = directory / "root"
        self.external = external or directory / "external"
        self.external.mkdir(exist_ok=True)
        self.vault: Vault = open_vault(Layout(self.root), "none")
        self.log = self.vault.layout.audit
        self.vault_id = read_identity(self.vault.layout).id
        self.destination = DirectoryDestination(self.external, 0o444, self.vault.layout.active)
        self.memory = Memory()
        self.listener = Listener()

    def record(self, event: str = "sealed", count: int = 1, **details: Any) -> None:
        """As the vault does it."""
        for number in range(count):
            audit_log.record(self.vault, event, id=f"backup {number}", **details)

    def publish(self) -> Memory:
        """What a pass of the extractor does with the log."""
        with self.destination.opened() as place:
            self.memory = anchors.publish(place, self.log, self.vault_id, self.memory, self.listener)
        return self.memory

    def collect(self) -> Collected:
        with self.destination.opened(to_read=True) as place:
            return anchors.collect(place, self.vault_id, self.listener)

    def files(self) -> list[str]:
        """Everything under anchors/."""
        paths = (path for path in (self.external / "anchors").rglob("*") if not path.is_dir())
        return sorted(str(path.relative_to(self.external)) for path in paths)

    def sequences(self) -> list[int]:
        found = self.collect()
        assert (found.foreign, found.unreadable) == (0, ())
        return sorted(each.anchor.head.sequence for each in found.anchors)

    def lines(self) -> list[bytes]:
        return self.log.read_bytes().splitlines()

    def rewrite(self, lines: list[bytes]) -> None:
        """By somebody who may: the host's root. The inode stays."""
        self.log.write_bytes(b"".join(line + b"\n" for line in lines))


def chained_anew(lines: list[bytes]) -> list[bytes]:
    """The same records (or what became of them) with a chain that holds: what an attacker would write."""
    made: list[bytes] = []
    for line in lines:
        record = json.loads(line)
        own = {name: record.pop(name) for name in ("time", "event", "by")}
        details = {name: value for name, value in record.items() if name not in ("sequence", "previous")}
        made.append(audit.encode(audit.link(reversed(made)), own, details)[:-1])
    assert audit.examine(made).problems == ()
    return made


class Clock:
    """Runs on, ahead of the real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = dt.timedelta()
        real = clock.now
        monkeypatch.setattr(clock, "now", lambda: real() + self.ahead)
