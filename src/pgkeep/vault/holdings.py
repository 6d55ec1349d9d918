"""What the service knows of the vault's backups: read anew when it matters, small however large the manifests."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import msgspec

from pgkeep.domain import admission
from pgkeep.domain.catalog import SealedBackup
from pgkeep.domain.manifest import VERSION, Manifest
from pgkeep.errors import FormatError
from pgkeep.vault import store
from pgkeep.vault.layout import Layout

# Of any length, and of no use for deciding what is sealed or expires.
_LEFT_OUT = frozenset({"tables", "facts", "notes"})


class Holdings:
    """Every sealed backup, as it was read last and sealed since, without what its manifest says of tables."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.backups: list[SealedBackup] = []
        self.defects: tuple[str, ...] = ()
        self.read()

    def read(self) -> None:
        """Raises ``NotFoundError`` where there is no vault any more."""
        catalog = store.read_catalog(self._layout, decode)
        self.backups = list(catalog.backups)
        self.defects = catalog.defects

    def add(self, sealed: Sequence[SealedBackup]) -> None:
        nothing: dict[str, Any] = {"tables": (), "facts": None, "notes": ()}
        self.backups += [
            SealedBackup(msgspec.structs.replace(backup.manifest, **nothing), backup.directory) for backup in sealed
        ]

    def of_dump(self, identifier: str) -> list[SealedBackup]:
        """The names of the dump that the agent called so."""
        return [backup for backup in self.backups if admission.staged_id(backup) == identifier]


def decode(data: bytes) -> Manifest:
    """A manifest of the vault's own without its long parts, which are passed over unread: 60 MB stay 60 MB.

    Raises ``FormatError``.
    """
    try:
        found = msgspec.json.decode(data, type=_lean_manifest())
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"manifest is malformed: {error}") from error
    if found.version.split(".")[0] != VERSION.split(".")[0]:
        raise FormatError(f"manifest version {found.version!r} is not known here", "use a newer pgkeep")
    return Manifest(**msgspec.structs.asdict(found))


@functools.cache
def _lean_manifest() -> Any:
    """The same fields but for the long ones; the reader skips what is not declared."""
    fields = [field for field in msgspec.structs.fields(Manifest) if field.name not in _LEFT_OUT]
    return msgspec.defstruct("LeanManifest", [_declared(field) for field in fields], kw_only=True, frozen=True)


def _declared(field: Any) -> Any:
    return (field.name, field.type) if field.required else (field.name, field.type, field.default)
