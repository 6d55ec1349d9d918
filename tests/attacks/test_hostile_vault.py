"""A vault with hostile things in it, and hostile hand-overs."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pgkeep.domain import manifest as manifests
from pgkeep.domain import request as requests
from pgkeep.domain.catalog import SealedBackup
from pgkeep.domain.names import Tier
from pgkeep.domain.request import Request
from pgkeep.errors import FormatError, IntegrityError, PgkeepError, RefusedError, StorageError
from pgkeep.progress import Silent
from pgkeep.vault import receive, seal, store
from pgkeep.vault.layout import Layout, Vault, open_vault
from tests.attacks import forge
from tests.attacks.hostile import (
    HONEST,
    IDENTIFIER,
    RULES,
    assert_clean,
    bytes_at,
    directory_at,
    fifo_at,
    link_at,
    not_whole,
    pgkeep,
    sparse_at,
)


def make_vault(root: Path) -> Vault:
    """With modes alone, so that tests can play root in it."""
    return open_vault(Layout(root), "mode" if os.geteuid() else "none")


def stage(vault: Vault, data: bytes = HONEST, **fields: Any) -> str:
    """An honest hand-over, unless told otherwise."""
    directory = vault.layout.staging / f"{IDENTIFIER}.ready"
    directory.mkdir()
    (directory / requests.DUMP_NAME).write_bytes(data)
    known = {
        "id": IDENTIFIER, "kind": "database", "tiers": (Tier.DAILY,), "database": "app",
        "created_at": dt.datetime.now(dt.UTC), "system_identifier": "1", "server_version": "15.8",
        "dump_version": "15.8", "dump_seconds": 1.0,
    }  # fmt: skip
    (directory / requests.FILE_NAME).write_bytes(requests.encode(Request(**{**known, **fields})))
    return directory.name


def take(vault: Vault, staged: str, rules: seal.Rules) -> SealedBackup:
    """What the vault does with a hand-over for one tier."""
    request = receive.read_request(vault.layout, staged)
    (backup,) = seal.seal(vault, staged, request, request.tiers, rules, Silent())
    return backup


@pytest.fixture
def vault(scratch: Path) -> Vault:
    return make_vault(scratch / "root")


@pytest.fixture
def sealed(vault: Vault) -> SealedBackup:
    backup = take(vault, stage(vault), RULES)
    vault.directory("daily").chmod(0o755)
    return backup


def test_an_honest_hand_over_is_sealed_and_whole(vault: Vault, sealed: SealedBackup) -> None:
    done = pgkeep("verify", "--all", "--json", root=vault.layout.root)
    assert_clean(done, 0)
    assert json.loads(done.stdout)["ok"] is True


def _dump_replaced(make: Callable[[Path], Path]) -> Callable[[Path], None]:
    def attack(dump: Path) -> None:
        dump.unlink()
        make(dump)

    return attack


def _moved_and_linked(dump: Path) -> None:
    dump.rename(dump.parent.parent / "elsewhere")
    dump.symlink_to("../elsewhere")


def _sidecar_replaced(suffix: str, make: Callable[[Path], Path]) -> Callable[[Path], None]:
    return lambda dump: _dump_replaced(make)(dump.with_name(dump.name + suffix))


def _manifest_changed(**fields: Any) -> Callable[[Path], None]:
    def attack(dump: Path) -> None:
        path = dump.with_name(dump.name + ".manifest.json")
        document = {**json.loads(path.read_bytes()), **fields}
        path.unlink()
        path.write_text(json.dumps(document))

    return attack


def _manifest_text(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def attack(dump: Path) -> None:
        path = dump.with_name(dump.name + ".manifest.json")
        data = change(path.read_bytes())
        path.unlink()
        path.write_bytes(data)

    return attack


VAULT_ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "dump a FIFO": (_dump_replaced(fifo_at), "not a regular file"),
    "dump a directory": (_dump_replaced(directory_at), "not a regular file"),
    "dump an endless device": (_dump_replaced(link_at("/dev/zero")), "not a regular file"),
    "dump a link to the very same": (_moved_and_linked, "not a regular file"),
    "dump gone": (Path.unlink, "missing"),
    "dump cut": (_dump_replaced(bytes_at(HONEST[:-1])), "the manifest says"),
    "checksum a link": (_sidecar_replaced(".sha256", link_at("/dev/zero")), "not a regular file"),
    "checksum a FIFO": (_sidecar_replaced(".sha256", fifo_at), "not a regular file"),
    "manifest a FIFO": (_sidecar_replaced(".manifest.json", fifo_at), "not a regular file"),
    "manifest a link": (_sidecar_replaced(".manifest.json", link_at("/dev/zero")), "not a regular file"),
    "manifest a directory": (_sidecar_replaced(".manifest.json", directory_at), "not a regular file"),
    "manifest of 1 GB": (_sidecar_replaced(".manifest.json", sparse_at(10**9)), "is larger than"),
    "manifest of noise": (_sidecar_replaced(".manifest.json", bytes_at(b"\xff\xfe\0\0")), "malformed"),
    "manifest nested": (_sidecar_replaced(".manifest.json", bytes_at(b"[" * 10**6)), "malformed"),
    "file name upwards": (_manifest_changed(filename="../../etc/passwd"), "malformed"),
    "file name two dots": (_manifest_changed(filename=".."), "malformed"),
    "file name another's": (_manifest_changed(filename="2000-01-01_00-00-00.sql.gz"), "names another file"),
    "version of the future": (_manifest_changed(version="9.0"), "version '9.0' is not known"),
    "a key twice": (_manifest_text(lambda d: d.replace(b"{", b'{"id":"x",', 1)), "'id' twice"),
    "an escape sequence": (_manifest_changed(database="\x1b]0;owned\x07", size_bytes=1), "the manifest says 1"),
    "size huge": (_manifest_changed(size_bytes=2**63 - 1), "the manifest says"),
    "size beyond 64 bits": (_manifest_changed(size_bytes=2**64), "malformed"),
    "sealed before time": (_manifest_changed(sealed_at="0001-01-01T00:00:00+14:00", size_bytes=1), "says 1"),
    "kept after time": (_manifest_changed(retain_until="9999-12-31T23:59:59-14:00", size_bytes=1), "says 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", VAULT_ATTACKS)
def test_the_vault_names_what_was_done_to_it(name: str, vault: Vault, sealed: SealedBackup) -> None:
    attack, words = VAULT_ATTACKS[name]
    attack(vault.layout.active / sealed.path_in_vault)
    found = store.read_catalog(vault.layout)
    said = [*found.defects, *(problem for backup in found.backups for problem in backup.problems)]
    assert any(words in text for text in said), said
    for arguments in (("list",), ("verify", "--all")):
        done = pgkeep(*arguments, root=vault.layout.root)
        assert_clean(done, 7, words)
        assert "\x1b" not in done.stdout + done.stderr


def test_cleanup_plans_nothing_rash_with_a_manifest_from_before_time(vault: Vault, sealed: SealedBackup) -> None:
    _manifest_changed(sealed_at="0001-01-01T00:00:00+14:00", retain_until="9999-12-31T23:59:59-14:00")(
        vault.layout.active / sealed.path_in_vault
    )
    assert_clean(pgkeep("cleanup", "--dry-run", root=vault.layout.root), 0)


# ---------------------------------------------------------------- hostile hand-overs


def _ready(vault: Vault) -> Path:
    return vault.layout.staging / f"{IDENTIFIER}.ready"


def _replace(name: str, make: Callable[[Path], Path]) -> Callable[[Vault], None]:
    def attack(vault: Vault) -> None:
        path = _ready(vault) / name
        path.unlink()
        make(path)

    return attack


def _linked_directory(vault: Vault) -> None:
    _ready(vault).rename(vault.layout.root / "elsewhere")
    _ready(vault).symlink_to("../elsewhere")


def _request_text(change: Callable[[bytes], bytes]) -> Callable[[Vault], None]:
    def attack(vault: Vault) -> None:
        path = _ready(vault) / requests.FILE_NAME
        path.write_bytes(change(path.read_bytes()))

    return attack


OTHER = "20260131T235959Z-ffffff"
HAND_OVERS: dict[str, tuple[Callable[[Vault], None], type[PgkeepError], str]] = {
    "dump a link": (_replace("dump.sql.gz", link_at("/etc/passwd")), RefusedError, "symbolic link"),
    "dump a FIFO": (_replace("dump.sql.gz", fifo_at), RefusedError, "not a regular file"),
    "dump a directory": (_replace("dump.sql.gz", directory_at), RefusedError, "not a regular file"),
    "dump a device": (_replace("dump.sql.gz", link_at("/dev/zero")), RefusedError, "symbolic link"),
    "dump larger than the disk": (_replace("dump.sql.gz", sparse_at(2**43)), StorageError, "bytes free"),
    "dump cut": (_replace("dump.sql.gz", not_whole), IntegrityError, "not whole"),
    "request a link": (_replace("request.json", link_at("/etc/passwd")), RefusedError, "symbolic link"),
    "request a FIFO": (_replace("request.json", fifo_at), RefusedError, "not a regular file"),
    "request of 1 GB": (_replace("request.json", sparse_at(10**9)), FormatError, "larger than"),
    "request of noise": (_replace("request.json", bytes_at(b"\xff\0")), FormatError, "malformed"),
    "request nested": (_replace("request.json", bytes_at(b"[" * 10**6)), FormatError, "malformed"),
    "the directory a link": (_linked_directory, RefusedError, "symbolic link"),
    "another's id": (_request_text(lambda d: d.replace(b"1f2e3d", b"ffffff")), FormatError, "names another"),
    "an id upwards": (_request_text(lambda d: d.replace(IDENTIFIER.encode(), b"../../x")), FormatError, "malformed"),
    "another kind": (_request_text(lambda d: d.replace(b'"kind":"database"', b'"kind":"globals"')), IntegrityError,
                     "the request says globals"),
    "a zero byte in the name": (_request_text(lambda d: d.replace(b'"app"', b'"a\\u0000b"')), FormatError, "malformed"),
    "a field unknown": (_request_text(lambda d: d.replace(b"{", b'{"retain_until":"x",', 1)), FormatError, "malformed"),
    "a tier unknown": (_request_text(lambda d: d.replace(b'"daily"', b'"../x"')), FormatError, "malformed"),
    "a table without data": (_replace("dump.sql.gz", bytes_at(forge.build(forge.TABLES[:2], contents=forge.toc()))),
                             IntegrityError, "is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND_OVERS)
def test_a_hostile_hand_over_is_refused_without_a_trace(name: str, vault: Vault) -> None:
    staged = stage(vault)
    attack, expected, words = HAND_OVERS[name]
    attack(vault)
    with pytest.raises(expected, match=words):
        take(vault, staged, RULES)
    assert list(vault.directory("daily").iterdir()) == []
    assert list(vault.layout.incoming.iterdir()) == []
    assert list(vault.layout.journal.iterdir()) == []


def test_a_database_name_longer_than_a_file_name_is_refused(vault: Vault) -> None:
    staged = stage(vault, database="\N{GRINNING FACE}" * 60)
    with pytest.raises(FormatError, match="too long"):
        take(vault, staged, dataclasses.replace(RULES, named_by_database=True))
    assert list(vault.directory("daily").iterdir()) == []


@pytest.mark.parametrize("year", [1, 1970, 9999])
def test_an_impossible_moment_of_the_dump_is_not_believed(vault: Vault, year: int) -> None:
    zone = dt.timezone(dt.timedelta(hours=14 if year == 1 else -14))
    moment = dt.datetime(year, 12 if year > 1 else 1, 31 if year > 1 else 1, 23 if year > 1 else 0, tzinfo=zone)
    backup = take(vault, stage(vault, created_at=moment), RULES)
    assert backup.manifest.filename.startswith(f"{dt.datetime.now(dt.UTC):%Y-%m-%d}")
    assert_clean(pgkeep("list", "--json", root=vault.layout.root), 0)


def test_a_staged_dump_that_changes_later_does_not_change_what_was_sealed(vault: Vault) -> None:
    staged = stage(vault)
    with (vault.layout.staging / staged / requests.DUMP_NAME).open("r+b") as held:
        backup = take(vault, staged, RULES)
        held.write(b"\0" * 100)
        held.flush()
    assert (vault.layout.active / backup.path_in_vault).read_bytes() == HONEST
    assert len(manifests.encode(backup.manifest)) < 4096
