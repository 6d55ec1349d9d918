"""Where everything lies under the root, and the directories' own protection."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pgkeep.adapters import clock, durable, fsflags, protection
from pgkeep.domain.mailbox import OUTCOMES_DIRECTORY
from pgkeep.domain.manifest import Protection
from pgkeep.domain.names import GLOBALS_DIRECTORY, Tier
from pgkeep.errors import FormatError, ProtectionError, RefusedError, StorageError
from pgkeep.vault import moved

FORMAT = 1
IDENTITY_NAME = "vault.json"
SEALED_DIRECTORIES = (*(tier.value for tier in Tier), GLOBALS_DIRECTORY)
RESERVE_BYTES = 1024 * 1024
_OPEN_MODE = 0o755
_CLOSED_MODE = 0o555


class Identity(msgspec.Struct, frozen=True):
    """Written once: a vault that lost it, or shows another, is not the one that was mounted before."""

    format: int
    id: str
    created_at: dt.datetime


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one vault."""

    root: Path

    @property
    def staging(self) -> Path:
        return self.root / "staging"

    @property
    def active(self) -> Path:
        return self.root / "active"

    @property
    def incoming(self) -> Path:
        return self.active / ".incoming"

    @property
    def reserve(self) -> Path:
        return self.incoming / ".pgkeep-reserve"

    @property
    def quarantine(self) -> Path:
        return self.active / ".quarantine"

    @property
    def outcomes(self) -> Path:
        return self.active / OUTCOMES_DIRECTORY

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def journal(self) -> Path:
        return self.state / "journal"

    @property
    def lock(self) -> Path:
        return self.state / "lock"

    @property
    def health(self) -> Path:
        return self.state / "health.json"

    @property
    def inbox(self) -> Path:
        return self.state / "inbox"

    @property
    def audit(self) -> Path:
        return self.logs / "backup_audit.jsonl"

    @property
    def extraction_audit(self) -> Path:
        """The extractor's log: the vault reads it, and writes nothing there."""
        return self.logs / "extraction_audit.jsonl"

    @property
    def exists(self) -> bool:
        return (self.active / IDENTITY_NAME).exists()


def prepare_root(layout: Layout) -> None:
    """Make what the lock and the agent need. Raises ``StorageError``."""
    with durable.explain(layout.root, "making pgkeep's directories"):
        for directory, mode in (
            (layout.root, 0o755),
            (layout.staging, 0o700),
            (layout.logs, 0o755),
            (layout.state, 0o700),
        ):
            directory.mkdir(mode=mode, parents=True, exist_ok=True)
        layout.journal.mkdir(mode=0o700, exist_ok=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Vault:
    """A vault that is ready to be written to, with the protection in force on its filesystem."""

    layout: Layout
    protection: Protection
    warning: str = ""

    def directory(self, name: str) -> Path:
        return self.layout.active / name

    @contextlib.contextmanager
    def unlocked(self, directory: Path) -> Iterator[int]:
        """A descriptor of a tier's directory in which names may be made and removed until the end of the block."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if self.protection == "chattr":
                with fsflags.lifted(descriptor):
                    yield descriptor
            else:
                os.fchmod(descriptor, _OPEN_MODE)
                try:
                    yield descriptor
                finally:
                    os.fchmod(descriptor, _CLOSED_MODE)
        finally:
            os.close(descriptor)

    def close_directories(self) -> None:
        """Give every directory and the identity file their protection, whatever they have now. Idempotent."""
        if self.protection == "chattr":
            fsflags.set_path_flag(self.layout.active / IDENTITY_NAME, fsflags.IMMUTABLE, True)
        for directory in (*map(self.directory, SEALED_DIRECTORIES), self.layout.active):
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if self.protection == "chattr":
                    fsflags.set_flag(descriptor, fsflags.IMMUTABLE, True)
                else:
                    os.fchmod(descriptor, _CLOSED_MODE)
            finally:
                os.close(descriptor)


def open_vault(layout: Layout, wanted: protection.Wanted) -> Vault:
    """Open the vault under ``layout``, or make it: its identity file is the first thing in it.

    Raises ``ProtectionError`` (the wanted protection can't be had, or less than the vault was made with),
    ``RefusedError`` (made by a newer pgkeep, or something else lives there), ``StorageError``.
    """
    prepare_root(layout)
    # Before anything else: an old place that was moved away from may have lost its identity already.
    moved.refuse(layout.state)
    fresh = not layout.exists
    if fresh:
        _make_directories(layout)
    else:
        read_identity(layout)
    chosen = protection.choose(protection.probe(layout.incoming), wanted, os.geteuid() == 0)
    if not fresh and chosen.protection != "chattr" and is_flagged(layout.active):
        raise ProtectionError(
            "the vault's directories carry the immutable flag, which this process may not set or lift",
            fsflags.CAPABILITY_HINT,
        )
    vault = Vault(layout, chosen.protection, chosen.warning)
    if fresh:
        identity = Identity(FORMAT, secrets.token_hex(16), clock.now())
        durable.write_atomically(layout.active, IDENTITY_NAME, msgspec.json.encode(identity) + b"\n", 0o444)
        vault.close_directories()
    return vault


def keep_reserve(layout: Layout) -> bool:
    """Hold a little room back: removing what has expired needs some, to write down what it does.

    False where there is no room to hold. Raises ``StorageError``.
    """
    if layout.reserve.exists() and layout.reserve.stat().st_size == RESERVE_BYTES:
        return True
    try:
        with durable.explain(layout.reserve, "holding room in reserve"):
            layout.reserve.write_bytes(b"\0" * RESERVE_BYTES)
    except StorageError as error:
        layout.reserve.unlink(missing_ok=True)
        if durable.is_full(error):
            return False
        raise
    return True


def give_up_reserve(layout: Layout) -> None:
    """Raises ``StorageError``."""
    with durable.explain(layout.reserve, "giving up the room in reserve"):
        layout.reserve.unlink(missing_ok=True)


def read_identity(layout: Layout) -> Identity:
    """Raises ``RefusedError`` for a vault that a newer pgkeep wrote, ``FormatError`` for a broken one."""
    try:
        identity = msgspec.json.decode((layout.active / IDENTITY_NAME).read_bytes(), type=Identity)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise FormatError(f"the vault's identity file is unreadable: {error}") from error
    if identity.format > FORMAT:
        raise RefusedError(f"the vault has format {identity.format}, known here is {FORMAT}", "use a newer pgkeep")
    return identity


def _make_directories(layout: Layout) -> None:
    strange = sorted(path.name for path in _content(layout.active) if not _is_of_a_beginning(path))
    if strange:
        hint = "give pgkeep an empty directory (PGKEEP_ROOT); was a volume swapped?"
        raise RefusedError(f"{layout.active} holds {strange[0]!r} but is no vault: its identity file is missing", hint)
    with durable.explain(layout.active, "making the vault's directories"):
        layout.active.mkdir(mode=_OPEN_MODE, exist_ok=True)
        for name in SEALED_DIRECTORIES:
            (layout.active / name).mkdir(mode=_OPEN_MODE, exist_ok=True)
        layout.incoming.mkdir(mode=0o700, exist_ok=True)
        layout.quarantine.mkdir(mode=0o700, exist_ok=True)
        layout.outcomes.mkdir(mode=_OPEN_MODE, exist_ok=True)
        for path in _content(layout.active):
            if durable.is_temporary(path.name):
                path.unlink()
        durable.fsync_directory(layout.active)


def _content(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _is_of_a_beginning(path: Path) -> bool:
    """What mkfs makes, and what a run leaves that was cut off before it wrote the identity file."""
    if path.name in (*SEALED_DIRECTORIES, ".quarantine", OUTCOMES_DIRECTORY, "lost+found"):
        return not _content(path)
    if path.name == ".incoming":
        return all(each.name.startswith(protection.CANARY_PREFIX) for each in _content(path))
    return durable.is_temporary(path.name)


def is_flagged(directory: Path) -> bool:
    """Whether it carries the immutable flag."""
    try:
        with fsflags.opened(directory) as descriptor:
            return fsflags.has_flag(descriptor, fsflags.IMMUTABLE)
    except fsflags.UnsupportedFlagsError:
        return False
