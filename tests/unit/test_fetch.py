"""Bringing copies here: whole or not at all, the version that the manifest means, and no more than needed."""

from __future__ import annotations

import datetime as dt
import hashlib
import itertools
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pgkeep.adapters import durable
from pgkeep.adapters.artifact_reader import ArtifactReader
from pgkeep.adapters.destinations import Lock
from pgkeep.domain import names
from pgkeep.errors import BusyError, IntegrityError, PgkeepError, RefusedError, StorageError
from pgkeep.progress import Silent
from pgkeep.restore import check, download, fetch
from pgkeep.restore.copies import Copy, read_copies
from pgkeep.restore.fetch import Fetched
from tests.attacks import forge
from tests.versioned import DUMP, MOMENT, InMemory, manifest_of, path_of, put_backup

LATER = MOMENT + dt.timedelta(days=30)
# A dump of the same size, whole and consistent in itself: only the manifest tells that it is another.
FORGED = next(
    dump
    for name in itertools.product(b"abcdefgh", repeat=3)
    if len(
        dump := forge.build(
            (forge.Table(11, "public", "customers", (b"1\t%s\n2\tGrace\n" % bytes(name),)), *forge.TABLES[1:])
        )
    )
    == len(DUMP)
)


class Told(Silent):
    """Keeps the warnings; ``at`` stops the work at a step."""

    def __init__(self, at: str = "") -> None:
        self.warnings: list[str] = []
        self._at = at

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def step(self, name: str) -> None:
        if name == self._at:
            raise KeyboardInterrupt


@pytest.fixture
def place() -> InMemory:
    return InMemory()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (download, fetch):
        monkeypatch.setattr(module, "PIECE_BYTES", 100)


def only(place: InMemory) -> Copy:
    (copy,) = (copy for copy in read_copies(place.place, Silent()).found if copy.is_first)
    return copy


def fetched(place: InMemory, directory: Path, progress: Silent | None = None) -> Fetched:
    return fetch.fetch(place.place, only(place), directory, progress or Silent())


def in_directory(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_the_forged_dump_is_as_it_should_be() -> None:
    assert len(FORGED) == len(DUMP)
    assert FORGED != DUMP


def test_all_files_come_and_stock_tools_agree(place: InMemory, tmp_path: Path) -> None:
    manifest = put_backup(place)
    place.put(path_of(manifest) + names.SIGNATURE_SUFFIX, b"signature")
    got = fetched(place, tmp_path / "new" / "directory")
    assert got.path.read_bytes() == DUMP
    assert got.fetched_bytes == len(DUMP)
    assert [path.name for path in got.files] == [manifest.filename + suffix for suffix in ("", *names.SIDECAR_SUFFIXES)]
    assert {path.name for path in got.files} == in_directory(got.path.parent)
    assert got.path.stat().st_mode & 0o777 == 0o600
    subprocess.run(["sha256sum", "--quiet", "-c", f"{got.path.name}.sha256"], cwd=got.path.parent, check=True)
    again = fetched(place, got.path.parent)
    assert (again.path, again.fetched_bytes) == (got.path, 0)


@pytest.mark.parametrize("suffix", ["", names.CHECKSUM_SUFFIX, names.MANIFEST_SUFFIX])
@pytest.mark.parametrize("kind", ["other", "same size", "directory", "link", "fifo"])
def test_nothing_is_ever_overwritten(place: InMemory, tmp_path: Path, suffix: str, kind: str) -> None:
    manifest = put_backup(place)
    in_the_way = tmp_path / (manifest.filename + suffix)
    if kind == "directory":
        in_the_way.mkdir()
    elif kind == "fifo":
        os.mkfifo(in_the_way)
    elif kind == "link":
        in_the_way.symlink_to("elsewhere")
    else:
        size = len(place.kept[path_of(manifest) + suffix][0].data)
        in_the_way.write_bytes(b"x" * (size if kind == "same size" else 3))
    with pytest.raises(RefusedError, match="never overwritten"):
        fetched(place, tmp_path)
    assert in_directory(tmp_path) == {in_the_way.name}


@pytest.mark.parametrize("step", ["fetch.begun", "fetch.dump-published"])
def test_an_interrupted_fetch_is_taken_up(place: InMemory, tmp_path: Path, step: str) -> None:
    manifest = put_backup(place)
    with pytest.raises(KeyboardInterrupt):
        fetched(place, tmp_path, Told(step))
    assert not (tmp_path / (manifest.filename + names.MANIFEST_SUFFIX)).exists()
    fetched(place, tmp_path)
    assert len(in_directory(tmp_path)) == 3


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("held", "expected"), [(0, 0), (99, 0), (100, 100), (350, 300), (1 << 20, None)])
def test_what_came_before_is_not_fetched_again(
    place: InMemory, tmp_path: Path, held: int, expected: int | None
) -> None:
    manifest = put_backup(place)
    partial = tmp_path / f"{durable.TEMPORARY_PREFIX}{manifest.sha256[:32]}"
    partial.write_bytes((DUMP + bytes(1 << 20))[:held])
    kept = len(DUMP) - len(DUMP) % 100 if expected is None else expected
    got = fetched(place, tmp_path)
    assert got.path.read_bytes() == DUMP
    assert got.fetched_bytes == place.given_bytes == len(DUMP) - kept
    assert partial.name not in in_directory(tmp_path)


@pytest.mark.usefixtures("small_pieces")
def test_a_torn_beginning_is_fetched_anew(place: InMemory, tmp_path: Path) -> None:
    manifest = put_backup(place)
    (tmp_path / f"{durable.TEMPORARY_PREFIX}{manifest.sha256[:32]}").write_bytes(bytes(500))
    got = fetched(place, tmp_path)
    assert got.path.read_bytes() == DUMP
    assert got.fetched_bytes == len(DUMP) - 500 + len(DUMP)


@pytest.mark.parametrize("kind", ["directory", "link", "hard link", "fifo"])
def test_a_planted_beginning_is_not_used(place: InMemory, tmp_path: Path, kind: str) -> None:
    manifest = put_backup(place)
    (tmp_path / "theirs").write_bytes(b"theirs")
    planted = tmp_path / f"{durable.TEMPORARY_PREFIX}{manifest.sha256[:32]}"
    match kind:
        case "directory":
            planted.mkdir()
        case "link":
            planted.symlink_to("theirs")
        case "hard link":
            planted.hardlink_to(tmp_path / "theirs")
        case "fifo":
            os.mkfifo(planted)
    if kind == "directory":
        with pytest.raises(StorageError):
            fetched(place, tmp_path)
    else:
        assert fetched(place, tmp_path).path.read_bytes() == DUMP
    assert (tmp_path / "theirs").read_bytes() == b"theirs"


def test_two_at_once_do_not_mix(place: InMemory, tmp_path: Path) -> None:
    put_backup(place)

    class Meanwhile(Told):
        def step(self, name: str) -> None:
            if name == "fetch.begun":
                with pytest.raises(BusyError):
                    fetched(place, tmp_path)

    fetched(place, tmp_path, Meanwhile())
    assert len(in_directory(tmp_path)) == 3


def test_a_full_disk_is_known_beforehand(place: InMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_backup(place)
    monkeypatch.setattr(durable, "free_bytes", lambda _: 10)
    with pytest.raises(StorageError, match="10 bytes free"):
        fetched(place, tmp_path)
    assert place.given_bytes == 0


# ---------------------------------------------------------------- which version


@pytest.mark.parametrize("other", [FORGED, bytes(len(DUMP)), b"short"], ids=["forged", "zeros", "short"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_the_dump_that_the_manifest_means_is_found_among_its_versions(
    place: InMemory, tmp_path: Path, other: bytes, order: str
) -> None:
    path = path_of(manifest_of(DUMP))
    if order == "before":
        place.put(path, other)
    put_backup(place)
    if order == "after":
        place.put(path, other)
    assert fetched(place, tmp_path).path.read_bytes() == DUMP
    with fetch.opened(place.place, only(place), tmp_path, Silent()) as file:
        assert list(ArtifactReader(file).check_digests(1)) == []
        assert file.read(0, len(DUMP)) == DUMP


@pytest.mark.parametrize(
    ("dumps", "words"),
    [([], "it is missing"), ([b"short"], "its size is 5 bytes"), ([FORGED], "not what its manifest says")],
    ids=["none", "short", "forged"],
)
def test_without_its_dump_a_backup_is_not_taken_for_another(
    place: InMemory, tmp_path: Path, dumps: list[bytes], words: str
) -> None:
    path = path_of(put_backup(place))
    del place.kept[path]
    for dump in dumps:
        place.put(path, dump)
    with pytest.raises(IntegrityError, match=words):
        fetched(place, tmp_path / "to")
    assert in_directory(tmp_path / "to") == set(), "nothing half is left behind"
    with (
        pytest.raises(IntegrityError, match=words),
        fetch.opened(place.place, only(place), tmp_path, Silent()),
    ):
        pytest.fail("it must not open")


def test_one_bit_is_found_by_the_digest(place: InMemory, tmp_path: Path) -> None:
    path = path_of(put_backup(place))
    damaged = bytearray(DUMP)
    damaged[40] ^= 1
    place.kept[path] = []
    place.put(path, bytes(damaged))
    with pytest.raises(IntegrityError, match="digest"):
        fetched(place, tmp_path / "to")
    assert in_directory(tmp_path / "to") == set()


def test_a_wrong_checksum_file_is_replaced_and_said(place: InMemory, tmp_path: Path) -> None:
    path = path_of(put_backup(place)) + names.CHECKSUM_SUFFIX
    place.kept[path] = []
    place.put(path, b"0" * 64 + b"  other\n")
    told = Told()
    got = fetched(place, tmp_path, told)
    assert "written from the manifest" in told.warnings[0]
    subprocess.run(["sha256sum", "--quiet", "-c", f"{got.path.name}.sha256"], cwd=tmp_path, check=True)


def test_an_encrypted_backup_is_fetched_whole(place: InMemory, tmp_path: Path) -> None:
    encrypted = b"age-encryption.org/v1\n" + os.urandom(500_000)
    honest = manifest_of(DUMP, recipients=("age1x",))
    put_backup(place, recipients=("age1x",), size_bytes=len(encrypted), sha256=hashlib.sha256(encrypted).hexdigest())
    place.put(path_of(honest), bytes(len(encrypted)))
    place.put(path_of(honest), encrypted)
    with fetch.opened(place.place, only(place), tmp_path, Silent()) as file:
        assert os.pread(file.descriptor, len(encrypted), 0) == encrypted
    found, _ = check.check(place.place, only(place), tmp_path, MOMENT)
    assert [(each.code, each.message) for each in found if each.code == "content"] == [
        ("content", "version v3: it is not encrypted, as its manifest says")
    ]


# ---------------------------------------------------------------- checks from afar


def messages(place: InMemory, tmp_path: Path, now: dt.datetime = MOMENT) -> list[str]:
    found, _ = check.check(place.place, only(place), tmp_path, now)
    return [f"{each.code}: {each.message}" for each in found]


def test_a_whole_copy_has_no_defects_and_little_is_read(place: InMemory, tmp_path: Path) -> None:
    large = forge.build((forge.Table(11, "public", "t", tuple(os.urandom(500_000).hex().encode() for _ in range(4))),))
    put_backup(place, large)
    assert messages(place, tmp_path) == []
    assert 0 < place.given_bytes <= 256 * 1024 < len(large) / 4


@pytest.mark.parametrize("part", ["footer", "index"])
def test_a_damaged_end_is_found_from_afar(place: InMemory, tmp_path: Path, part: str) -> None:
    path = path_of(put_backup(place))
    damaged = bytearray(DUMP)
    damaged[-50 if part == "footer" else -400] ^= 1
    place.kept[path] = []
    place.put(path, bytes(damaged))
    assert [text.partition(": ")[0] for text in messages(place, tmp_path)] == ["content"]


def test_a_dump_of_the_same_size_written_over_it_is_named(place: InMemory, tmp_path: Path) -> None:
    version = place.put(path_of(put_backup(place)), FORGED)
    assert messages(place, tmp_path) == [f"content: version {version}: the manifest's tables differs from the file"]


def test_a_wrong_checksum_file_is_named(place: InMemory, tmp_path: Path) -> None:
    manifest = put_backup(place)
    place.kept[path_of(manifest) + names.CHECKSUM_SUFFIX] = []
    place.put(path_of(manifest) + names.CHECKSUM_SUFFIX, b"x")
    assert messages(place, tmp_path) == [f"checksum: the digest differs from {manifest.filename}.sha256"]


@pytest.mark.parametrize(
    ("locked", "words"),
    [
        ({}, None),
        ({"": LATER, names.MANIFEST_SUFFIX: LATER}, None),
        ({"": LATER}, "only a part"),
        ({"": LATER, names.MANIFEST_SUFFIX: MOMENT}, "its lock ended"),
    ],
)
def test_a_lock_is_told_and_what_is_wrong_with_it(
    place: InMemory, tmp_path: Path, locked: dict[str, Any], words: str | None
) -> None:
    manifest = put_backup(place, retain_until=LATER)
    place.locks = {path_of(manifest) + suffix: Lock("COMPLIANCE", until) for suffix, until in locked.items()}
    found, lock = check.check(place.place, only(place), tmp_path, MOMENT + dt.timedelta(hours=1))
    assert [each.code for each in found] == ([] if words is None else ["lock"])
    assert words is None or words in found[0].message
    assert (lock is None) == (not locked)
    assert check.check(place.place, only(place), tmp_path, LATER)[0] == found[:1] * (words == "only a part")


def test_deep_reading_takes_the_version_that_fits(place: InMemory, tmp_path: Path) -> None:
    path = path_of(manifest_of(DUMP))
    place.put(path, FORGED)
    put_backup(place)
    assert check.fetch_for_reading(place.place, only(place), tmp_path, Silent()).read_bytes() == DUMP
    assert len(in_directory(tmp_path)) == 3


def test_deep_reading_shows_what_is_there_where_none_fits(place: InMemory, tmp_path: Path) -> None:
    path = path_of(put_backup(place))
    place.kept[path] = []
    place.put(path, FORGED)
    assert check.fetch_for_reading(place.place, only(place), tmp_path, Silent()).read_bytes() == FORGED
    place.kept[path] = []
    with pytest.raises(PgkeepError, match="can't be had"):
        check.fetch_for_reading(place.place, only(place), tmp_path / "other", Silent())
