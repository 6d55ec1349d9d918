"""Is a sealed backup still what was sealed? Every defect is named; nothing is repaired."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from pgkeep.adapters import durable
from pgkeep.adapters.artifact_reader import LocalFile
from pgkeep.adapters.sidecars import read_sidecar
from pgkeep.domain import manifest as manifests
from pgkeep.domain import names
from pgkeep.domain.catalog import SealedBackup
from pgkeep.domain.manifest import Manifest
from pgkeep.errors import FormatError, NotFoundError, StorageError
from pgkeep.vault.inspect import Depth, Inspection, inspect

# A digest, two blanks and a file name.
_CHECKSUM_LIMIT_BYTES = 4096


class Finding(msgspec.Struct, frozen=True):
    """One defect: a word for machines, a sentence for people."""

    code: str
    message: str


class Report(msgspec.Struct, frozen=True):
    """The result for one file. ``checked`` says how deep the look went."""

    path: str
    ok: bool
    findings: tuple[Finding, ...]
    checked: Depth
    size_bytes: int
    sha256: str
    id: str | None = None


def verify_backup(active: Path, backup: SealedBackup, depth: Depth) -> Report:
    """Check a backup of the vault: its state and protection, its sidecars, and all of its content."""
    findings = [Finding(backup.state, problem) for problem in backup.problems]
    path = active / backup.path_in_vault
    try:
        report = verify_path(path, depth, follow_link=False)
    except (NotFoundError, StorageError) as error:
        unreadable = (*findings, Finding("unreadable", error.message))
        return Report(str(path), False, unreadable, depth, 0, "", backup.manifest.id)
    findings += report.findings
    return msgspec.structs.replace(report, ok=not findings, findings=tuple(findings), id=backup.manifest.id)


def verify_path(path: Path, depth: Depth, *, follow_link: bool = True) -> Report:
    """Check a file wherever it lies, with the sidecars beside it. Raises ``NotFoundError``, ``StorageError``."""
    with durable.explain(path, "reading the backup"), LocalFile.open(path, follow_link=follow_link) as file:
        # What the disk holds, not what memory remembers.
        durable.drop_cache(file.descriptor)
        inspection = inspect(file, depth)
    findings = [Finding("content", defect) for defect in inspection.defects]
    findings += _checksum(path, inspection)
    manifest_path = path.with_name(path.name + names.MANIFEST_SUFFIX)
    identifier = None
    try:
        manifest = manifests.decode(read_sidecar(manifest_path, manifests.SIZE_LIMIT_BYTES))
        identifier = manifest.id
        findings += _against_manifest(path, inspection, manifest)
    except NotFoundError as error:
        findings.append(Finding("manifest-missing", error.message))
    except (FormatError, StorageError) as error:
        findings.append(Finding("manifest", error.message))
    return Report(str(path), not findings, tuple(findings), depth, inspection.size_bytes, inspection.sha256, identifier)


def _checksum(path: Path, inspection: Inspection) -> Iterator[Finding]:
    sidecar = path.with_name(path.name + names.CHECKSUM_SUFFIX)
    try:
        text = read_sidecar(sidecar, _CHECKSUM_LIMIT_BYTES)
    except NotFoundError as error:
        yield Finding("checksum-missing", error.message)
        return
    except (FormatError, StorageError) as error:
        yield Finding("checksum", error.message)
        return
    if text != f"{inspection.sha256}  {path.name}\n".encode(errors="surrogateescape"):
        yield Finding("checksum", f"the digest differs from {sidecar.name}")


def _against_manifest(path: Path, inspection: Inspection, manifest: Manifest) -> Iterator[Finding]:
    found: dict[str, object] = {
        "filename": path.name,
        "size_bytes": inspection.size_bytes,
        "sha256": inspection.sha256,
    }
    if (contents := inspection.contents) is not None:
        found |= {
            "kind": contents.kind,
            "tables": contents.tables,
            "large_objects": contents.large_objects,
            "raw_bytes": contents.raw_bytes,
        }
    for name, value in found.items():
        if getattr(manifest, name) != value:
            yield Finding("manifest", f"the manifest's {name} differs from the file")
