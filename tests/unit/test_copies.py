"""What is believed of a destination's word: places, versions, damage; and which backup a reference means there."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import pytest

from pgkeep.domain import manifest as manifests
from pgkeep.domain import names
from pgkeep.domain.names import Tier
from pgkeep.errors import NotFoundError, StorageError, UsageError
from pgkeep.progress import Silent
from pgkeep.restore import copies
from pgkeep.restore.copies import Copies, find, folders_of, read_copies
from tests.attacks import forge
from tests.versioned import DUMP, MOMENT, InMemory, manifest_of, path_of, put_backup

HOUR = dt.timedelta(hours=1)
OTHER_DUMP = forge.build(forge.TABLES[:1], ())
MANIFEST = names.MANIFEST_SUFFIX


@pytest.fixture
def place() -> InMemory:
    return InMemory()


def read(place: InMemory) -> Copies:
    return read_copies(place.place, Silent())


def found_id(place: InMemory, reference: str, database: str | None = None) -> str:
    return find(place.place, reference, database, Silent())[0].backup.manifest.id


def test_copies_are_listed_by_when_they_were_sealed(place: InMemory) -> None:
    later = put_backup(place, moment=MOMENT + HOUR)
    first = put_backup(place)
    hourly = put_backup(place, moment=MOMENT + 2 * HOUR, type=Tier.HOURLY)
    found = read(place)
    assert [copy.backup.manifest for copy in found.found] == [first, later, hourly]
    assert found.found[2].path == "hourly/2026-03-02/2026-03-02_01-59-59.sql.gz"
    assert all(copy.backup.is_good for copy in found.found)
    assert found.defects == ()


# ---------------------------------------------------------------- what does not fit its place


@pytest.mark.parametrize(
    "path",
    [
        "daily/2026-03-01_23-59-59.sql.gz",
        "daily/2026-03-02/2026-03-01_23-59-59.sql.gz",
        "daily/2026-03-01/deeper/2026-03-01_23-59-59.sql.gz",
        "daily/../2026-03-01_23-59-59.sql.gz",
        "daily/2026-03-01/../../../etc/2026-03-01_23-59-59.sql.gz",
        "daily/2026-03-01/..%2F..%2Fx.sql.gz",
        "daily/2026-03-01/x.sql.gz",
        "daily/2026-03-01/2026-03-01_23-59-60.sql.gz",
        "daily/2026-03-01/2026-03-01_23-59-59..%2E%2Fx.sql.gz",
    ],
)
def test_a_manifest_that_lies_where_none_belongs_is_a_defect(place: InMemory, path: str) -> None:
    good = put_backup(place, moment=MOMENT + HOUR)
    place.put(path + MANIFEST, manifests.encode(manifest_of(DUMP)))
    found = read(place)
    assert [copy.backup.manifest for copy in found.found] == [good]
    assert [defect.partition(": ")[0] for defect in found.defects] == [path + MANIFEST]
    assert path + MANIFEST not in place.read_paths, "it is not even read"


def as_json(**changes: Any) -> bytes:
    return json.dumps(json.loads(manifests.encode(manifest_of(DUMP))) | changes).encode()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "malformed"),
        (b"[" * 100_000, "malformed"),
        (b'{"id": 1, "id": 2}', "twice"),
        (as_json(version="2.0"), "not known here"),
        (as_json(filename="../../../../root/.bashrc"), "malformed"),
        (as_json(filename="/etc/passwd"), "malformed"),
        (as_json(filename="2026-03-01_23-59-58.sql.gz"), "names another file"),
        (as_json(type="weekly"), "of another kind"),
        (as_json(kind="globals"), "of another kind"),
        (as_json(size_bytes=-1), "malformed"),
        (as_json(sha256="0" * 63), "malformed"),
    ],
)
def test_a_manifest_that_does_not_hold_is_a_defect(place: InMemory, data: bytes, words: str) -> None:
    path = path_of(manifest_of(DUMP)) + MANIFEST
    place.put(path, data)
    good = put_backup(place, moment=MOMENT + HOUR)
    found = read(place)
    assert [copy.backup.manifest for copy in found.found] == [good]
    assert len(found.defects) == 1
    assert found.defects[0].startswith(f"{path}: ")
    assert words in found.defects[0]


def test_an_oversized_manifest_is_not_read(place: InMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    put_backup(place)
    monkeypatch.setattr(manifests, "SIZE_LIMIT_BYTES", 100)
    found = read(place)
    assert found.found == ()
    assert "larger than 100 bytes" in found.defects[0]
    assert place.read_paths == []


def test_other_files_are_passed_over(place: InMemory) -> None:
    place.put("daily/2026-03-01/2026-03-01_23-59-59.sql.gz.manifest.json.damaged-1", b"x")
    place.put("daily/readme.txt", b"x")
    assert read(place) == Copies((), ())


def test_a_few_unreadable_manifests_are_defects_and_many_an_absent_destination(place: InMemory) -> None:
    wanted = [put_backup(place, moment=MOMENT + n * HOUR) for n in range(8)]
    place.broken = {path_of(manifest) + MANIFEST for manifest in wanted[:3]}
    found = read(place)
    assert len(found.found) == 5
    assert len(found.defects) == 3
    with pytest.raises(NotFoundError) as caught:
        find(place.place, wanted[0].id, None, Silent())
    assert "3 manifests there can't be read" in caught.value.hint
    place.broken = {path_of(manifest) + MANIFEST for manifest in wanted}
    with pytest.raises(StorageError, match="can't be read"):
        read(place)


# ---------------------------------------------------------------- what is missing


def test_missing_parts_are_named(place: InMemory) -> None:
    path = path_of(put_backup(place))
    dump = place.kept.pop(path)
    assert read(place).found[0].backup.problems == ("the dump is missing",)
    place.put(path, b"short")
    assert read(place).found[0].backup.problems == (f"the dump has 5 bytes, the manifest says {len(DUMP)}",)
    place.kept[path] = dump
    del place.kept[path + names.CHECKSUM_SUFFIX]
    copy = read(place).found[0]
    assert copy.backup.problems == ("the checksum file is missing or not a regular file",)
    assert copy.backup.state == "incomplete"


# ---------------------------------------------------------------- written over


def test_the_oldest_manifest_is_the_one_that_counts(place: InMemory) -> None:
    honest = put_backup(place)
    forged = manifest_of(OTHER_DUMP, sealed_at=MOMENT + 100 * HOUR)
    place.put(path_of(honest) + MANIFEST, manifests.encode(forged))
    first, second = read(place).found
    assert first.backup.manifest == honest
    assert first.backup.problems == ("the manifest was written 2 times; the oldest is taken",)
    assert first.dumps[0].version == "v0"
    assert (second.backup.manifest, second.backup.state) == (forged, "incomplete")
    for reference in ("latest", honest.id, honest.filename, f"daily/{honest.filename}", "20260301"):
        assert found_id(place, reference) == honest.id
    assert found_id(place, forged.id) == forged.id


def test_a_forged_one_under_the_same_id_is_never_taken(place: InMemory) -> None:
    honest = put_backup(place)
    place.put(path_of(honest) + MANIFEST, manifests.encode(manifest_of(OTHER_DUMP, id=honest.id)))
    (only,) = read(place).found
    assert only.backup.manifest == honest
    assert "written 2 times" in only.backup.problems[0]


def test_the_same_manifest_twice_is_no_problem(place: InMemory) -> None:
    """A lost answer and another try: the second version says the same."""
    manifest = put_backup(place)
    place.put(path_of(manifest) + MANIFEST, manifests.encode(manifest))
    assert read(place).found[0].backup.problems == ()


def test_garbage_before_and_after_hides_nothing(place: InMemory) -> None:
    path = path_of(manifest_of(DUMP)) + MANIFEST
    place.put(path, b"garbage")
    manifest = put_backup(place)
    place.put(path, b"\xff")
    (copy,) = read(place).found
    assert copy.backup.manifest == manifest
    assert copy.manifest.version == "v3"
    assert "2 of them say nothing" in copy.backup.problems[0]


def test_a_flood_of_versions_is_not_read_to_the_end(place: InMemory) -> None:
    manifest = put_backup(place)
    for number in range(100):
        place.put(
            path_of(manifest) + MANIFEST, manifests.encode(manifest_of(DUMP, id=f"20260301T235959Z-{number:06x}"))
        )
    (first,) = (copy for copy in read(place).found if copy.is_first)
    assert first.backup.manifest == manifest
    assert "written 101 times" in first.backup.problems[0]
    assert len(place.read_paths) == copies.VERSIONS_READ
    assert found_id(place, "latest") == manifest.id


def test_an_overwritten_dump_is_named_and_the_older_one_taken(place: InMemory) -> None:
    path = path_of(put_backup(place))
    place.put(path, b"short")
    same_size = place.put(path, bytes(len(DUMP)))
    (copy,) = read(place).found
    assert [dump.version for dump in copy.dumps] == ["v0", same_size]
    assert copy.backup.state == "sealed"
    assert "written 3 times; 1 have another size" in copy.backup.problems[0]


# ---------------------------------------------------------------- references


def test_the_latest_is_of_one_database(place: InMemory) -> None:
    app = put_backup(place)
    shop_name = names.dump_name(MOMENT + HOUR, "shop")
    shop = put_backup(place, moment=MOMENT + HOUR, database="shop", filename=shop_name)
    with pytest.raises(UsageError, match="2 databases"):
        find(place.place, "latest", None, Silent())
    assert found_id(place, "latest", "app") == app.id
    assert found_id(place, "latest", "shop") == shop.id


def test_the_same_id_in_two_places_must_be_told_apart(place: InMemory) -> None:
    daily = put_backup(place)
    put_backup(place, type=Tier.WEEKLY, id=daily.id)
    with pytest.raises(UsageError, match="fits 2 backups"):
        find(place.place, daily.id, None, Silent())
    assert found_id(place, f"daily/{daily.filename}") == daily.id


@pytest.mark.parametrize(
    ("reference", "folders"),
    [
        ("daily/2026-03-01_23-59-59.sql.gz", ["daily/2026-03-01"]),
        ("2026-03-01_23-59-59.sql.gz", [f"{tier}/2026-03-01" for tier in copies.FOLDERS]),
        ("latest:daily", ["daily"]),
        ("latest", None),
        ("2026", None),
        ("nonsense", None),
        ("20260231T000000Z-aaaaaa", None),
        ("../2026-03-01_23-59-59.sql.gz", None),
    ],
)
def test_a_reference_that_tells_the_day_is_looked_for_there(reference: str, folders: list[str] | None) -> None:
    assert folders_of(reference) == folders


@pytest.mark.parametrize("reference", ["20260301T235959Z-abcdef", "20260301", "20260301T2"])
def test_an_id_is_looked_for_around_its_day(reference: str) -> None:
    found = folders_of(reference)
    assert found is not None
    assert {folder.partition("/")[2] for folder in found} == {"2026-02-28", "2026-03-01", "2026-03-02"}
    assert len(found) == 3 * len(copies.FOLDERS)


def test_only_the_day_is_read_and_all_else_if_that_is_not_enough(place: InMemory) -> None:
    other = put_backup(place, moment=MOMENT - 240 * HOUR, id="20260301T000000Z-waited")
    wanted = put_backup(place)
    assert found_id(place, wanted.id) == wanted.id
    assert place.read_paths == [path_of(wanted) + MANIFEST]
    assert found_id(place, other.id) == other.id, "it was dumped long before it was sealed"
