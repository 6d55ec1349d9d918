"""What every destination must do, whatever it is made of: a further kind is one more parameter of ``subject``."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pgkeep.adapters import durable
from pgkeep.adapters.destinations import NOT_A_FILE, Content, Destination
from pgkeep.adapters.destinations.directory import DirectoryDestination
from pgkeep.errors import FormatError, IntegrityError, NotFoundError, RefusedError, StorageError
from pgkeep.progress import Silent
from tests import clusters
from tests.contract import filesystems
from tests.contract.filesystems import as_ordinary_user, forbidding, opened, run_python

MIB = 1 << 20
FOLDER = "daily/2026-11-23"
PATH = f"{FOLDER}/2026-11-23_00-00-00.sql.gz"
NAME = PATH.rpartition("/")[2]
mount = filesystems.parametrized(filesystems.KINDS)


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """A destination, and hands that reach behind it: as another program, or an accident, would."""

    kind: str
    destination: Destination
    put: Callable[[str, bytes], None]
    get: Callable[[str], bytes]
    names: Callable[[str], set[str]]
    source: Path

    def store(self, data: bytes, path: str = PATH, content: Content | None = None, aside: str | None = None) -> None:
        self.source.write_bytes(data)
        with self.destination.opened() as place, opened(self.source) as source:
            place.store(path, source, content or content_of(data), Silent(), aside)


@pytest.fixture
def subject(mount: tuple[str, Path], tmp_path: Path) -> Subject:
    path = mount[1] / tmp_path.name
    path.mkdir()
    return directory_subject(mount[0], path, tmp_path)


def directory_subject(kind: str, path: Path, elsewhere: Path, mode: int = 0o444) -> Subject:
    def put(name: str, data: bytes) -> None:
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.write_bytes(data)

    def names(folder: str) -> set[str]:
        # libfuse hides an unlinked file that is open, and removes it afterwards.
        return {name for name in os.listdir(path / folder) if not name.startswith(".fuse_hidden")}

    vault = elsewhere / "vault"
    vault.mkdir()
    get = lambda name: (path / name).read_bytes()  # noqa: E731
    return Subject(kind, DirectoryDestination(path, mode, vault), put, get, names, elsewhere / "source")


def content_of(data: bytes) -> Content:
    return Content(len(data), hashlib.sha256(data).hexdigest())


def test_a_copy_appears_whole_under_its_name(subject: Subject) -> None:
    data = os.urandom(3 * MIB + 17)
    subject.store(data)
    assert subject.get(PATH) == data
    with subject.destination.opened() as place:
        assert place.listing(FOLDER) == {NAME: len(data)}
        assert place.content(PATH, Silent()) == content_of(data)
    assert subject.names(FOLDER) == {NAME}


@pytest.mark.parametrize("size_bytes", [0, 1, MIB - 1, MIB, MIB + 1])
def test_every_size_is_copied(subject: Subject, size_bytes: int) -> None:
    data = os.urandom(size_bytes)
    subject.store(data)
    assert subject.get(PATH) == data


@pytest.mark.parametrize("found", [b"shorter", b"the same length!", b"longer than what was promised"])
def test_a_source_that_is_not_what_it_should_be_leaves_nothing(subject: Subject, found: bytes) -> None:
    with pytest.raises(IntegrityError, match="not what its manifest says"):
        subject.store(found, content=content_of(b"what it should be"[:16]))
    assert subject.names(FOLDER) == set()


def test_nothing_is_ever_overwritten(subject: Subject) -> None:
    subject.put(PATH, b"older")
    with pytest.raises(RefusedError, match="never overwritten"):
        subject.store(b"newer")
    assert subject.get(PATH) == b"older"
    assert subject.names(FOLDER) == {NAME}


def test_what_is_replaced_is_moved_aside_and_kept(subject: Subject) -> None:
    subject.put(PATH, b"damaged")
    subject.store(b"whole", aside=f"{NAME}.damaged-1")
    assert subject.get(PATH) == b"whole"
    assert subject.get(f"{PATH}.damaged-1") == b"damaged"
    subject.put(PATH, b"damaged again")
    with pytest.raises(StorageError, match="exists already"):
        subject.store(b"whole", aside=f"{NAME}.damaged-1")
    assert subject.get(f"{PATH}.damaged-1") == b"damaged"
    assert subject.get(PATH) == b"damaged again"


def test_nothing_is_moved_aside_for_a_source_that_is_bad(subject: Subject) -> None:
    subject.put(PATH, b"damaged")
    with pytest.raises(IntegrityError):
        subject.store(b"bad", content=content_of(b"whole"), aside=f"{NAME}.damaged-1")
    assert subject.names(FOLDER) == {NAME}


def test_what_is_not_there_is_no_error(subject: Subject) -> None:
    with subject.destination.opened() as place:
        assert place.listing("weekly/2026-01-01") == {}
        assert place.content("weekly/2026-01-01/x", Silent()) is None
        assert place.read_marker() is None
        with pytest.raises(NotFoundError):
            place.read(PATH, 100)


def test_small_files_are_read_to_a_limit(subject: Subject) -> None:
    subject.put(PATH, b"0123456789")
    with subject.destination.opened() as place:
        assert place.read(PATH, 10) == b"0123456789"
        with pytest.raises(FormatError, match="larger than 9 bytes"):
            place.read(PATH, 9)


def test_the_marker_is_kept_and_replaced(subject: Subject) -> None:
    with subject.destination.opened() as place:
        place.write_marker(b"first")
        assert place.read_marker() == b"first"
        place.write_marker(b"second")
    with subject.destination.opened() as place:
        assert place.read_marker() == b"second"


def test_damage_behind_its_back_is_seen(subject: Subject) -> None:
    data = os.urandom(MIB)
    subject.store(data)
    subject.put(PATH, data[:-1] + bytes([data[-1] ^ 1]))
    with subject.destination.opened() as place:
        assert place.listing(FOLDER) == {NAME: MIB}
        assert place.content(PATH, Silent()) not in (None, content_of(data))


def test_what_a_killed_run_left_is_swept_and_nothing_else(subject: Subject) -> None:
    left = [f"{folder}{durable.TEMPORARY_PREFIX}0123" for folder in ("", "daily/", f"{FOLDER}/")]
    kept = [PATH, f"{FOLDER}/notes.txt", "readme.txt", f"elsewhere/{durable.TEMPORARY_PREFIX}0123"]
    for path in (*left, *kept):
        subject.put(path, b"x")
    with subject.destination.opened() as place:
        assert durable.TEMPORARY_PREFIX not in "".join(place.listing(FOLDER))
        assert sorted(place.sweep(["daily", "weekly"])) == sorted(left)
        assert place.sweep(["daily", "weekly"]) == []
    for path in kept:
        assert subject.get(path) == b"x"


def test_a_copy_that_is_cut_off_leaves_nothing(subject: Subject) -> None:
    class Interrupted(Silent):
        def step(self, name: str) -> None:
            if name == "store.compared":
                raise SystemExit(143)

    subject.source.write_bytes(b"data")
    with subject.destination.opened() as place, opened(subject.source) as source, pytest.raises(SystemExit):
        place.store(PATH, source, content_of(b"data"), Interrupted())
    assert subject.names(FOLDER) == set()


# Directories


def test_copies_are_read_only_where_there_are_modes(subject: Subject) -> None:
    subject.source.write_bytes(b"data")
    with subject.destination.opened() as place, opened(subject.source) as source:
        for number in range(2):
            place.store(f"{PATH}{number}", source, content_of(b"data"), Silent())
        told = [warning for warning in place.warnings if "keeps no modes" in warning]
    assert len(told) == (0 if subject.kind in filesystems.WITH_FLAGS else 1)
    if subject.kind in filesystems.WITH_FLAGS:
        assert mode_of(subject, f"{PATH}0") == 0o444
        assert mode_of(subject, FOLDER) == 0o755


def test_the_mode_is_a_choice(scratch: Path) -> None:
    (scratch / "outside").mkdir()
    subject = directory_subject("ext4", scratch / "outside", scratch, 0o400)
    subject.store(b"data")
    assert mode_of(subject, PATH) == 0o400


def mode_of(subject: Subject, path: str) -> int:
    return stat.S_IMODE((Path(subject.destination.label) / path).stat().st_mode)


@pytest.fixture
def local(scratch: Path) -> Subject:
    (scratch / "outside").mkdir()
    return directory_subject("ext4", scratch / "outside", scratch)


def assert_refused(path: Path, vault: Path, *words: str) -> None:
    """The destination can't be opened; message and hint say all of that."""
    with pytest.raises((StorageError, RefusedError)) as caught, DirectoryDestination(path, 0o444, vault).opened():
        pass
    for word in (str(path), *words):
        assert word in f"{caught.value.message} {caught.value.hint}"


def test_a_destination_that_is_missing_or_a_file(scratch: Path) -> None:
    (scratch / "file").touch()
    assert_refused(scratch / "missing", scratch / "active", "does not exist", "mount")
    assert not (scratch / "missing").exists()
    assert_refused(scratch / "file", scratch / "active", "is not a directory")


def test_a_destination_of_somebody_else_s_names_the_chown(scratch: Path) -> None:
    (scratch / "outside").mkdir(0o755)
    for mode in (0o755, 0o700, 0o000):
        (scratch / "outside").chmod(mode)
        with as_ordinary_user():
            assert_refused(scratch / "outside", scratch / "active", "chown 65534:65534", "0:0", f"{mode:04o}")


def test_a_read_only_destination_says_so() -> None:
    with filesystems.mounted("ext4") as path:
        subprocess.run(["mount", "-o", "remount,ro", path], check=True)
        assert_refused(path, Path("/nonexistent"), "read-only", "mount it read-write")


@pytest.mark.parametrize("place", ["active", "active/daily", ".", "link"])
def test_the_vault_is_no_destination_for_its_own_copies(scratch: Path, place: str) -> None:
    (scratch / "active" / "daily").mkdir(parents=True)
    (scratch / "link").symlink_to("active")
    assert_refused(scratch / place, scratch / "active", "one place")


def test_the_vault_mounted_in_two_places_is_one(scratch: Path) -> None:
    clusters.need_root("mounting a directory elsewhere")
    (scratch / "active").mkdir()
    (scratch / "outside").mkdir()
    subprocess.run(["mount", "--bind", scratch / "active", scratch / "outside"], check=True)
    try:
        assert_refused(scratch / "outside", scratch / "active", "one place")
    finally:
        subprocess.run(["umount", scratch / "outside"], check=True)


def test_copies_on_the_vault_s_own_disk_are_warned_of(local: Subject) -> None:
    with local.destination.opened() as place:
        assert ["own filesystem" in warning for warning in place.warnings] == [True]
    with filesystems.mounted("tmpfs") as path, DirectoryDestination(path, 0o444, local.source.parent).opened() as place:
        assert place.warnings == ()


def test_copies_on_the_vault_s_own_disk_leave_it_room() -> None:
    """They are never deleted: without this they would fill the disk until no backup fits any more."""
    with filesystems.mounted("ext4") as path:
        for name in ("outside", "own"):
            (path / name).mkdir()
        subject = directory_subject("ext4", path / "outside", path / "own")
        facts = os.statvfs(path)
        with (path / "ballast").open("wb") as ballast:
            tenth_bytes = facts.f_blocks * facts.f_frsize // 10
            os.posix_fallocate(ballast.fileno(), 0, facts.f_bavail * facts.f_frsize - tenth_bytes - MIB)
        subject.store(b"fits")
        with pytest.raises(StorageError, match="left to the vault") as caught:
            subject.store(os.urandom(MIB), f"{PATH}2")
        assert durable.is_full(caught.value)
        assert subject.names(FOLDER) == {NAME}


def test_what_can_not_be_a_copy_is_none(local: Subject) -> None:
    outside = Path(local.destination.label)
    local.put("victim", b"precious")
    folder = outside / FOLDER
    folder.mkdir(parents=True)
    (folder / "link").symlink_to(outside / "victim")
    (folder / "directory").mkdir()
    os.mkfifo(folder / "fifo")
    names = ("link", "directory", "fifo")
    with local.destination.opened() as place:
        assert place.listing(FOLDER) == dict.fromkeys(names, NOT_A_FILE)
        assert [place.content(f"{FOLDER}/{name}", Silent()) for name in names] == [None] * 3
    for name in names:
        local.store(b"whole", f"{FOLDER}/{name}", aside=f"{name}.damaged-1")
        assert local.get(f"{FOLDER}/{name}") == b"whole"
    assert local.get("victim") == b"precious"
    assert (folder / "link.damaged-1").is_symlink()


def test_links_in_the_way_lead_nowhere(local: Subject) -> None:
    outside = Path(local.destination.label)
    (outside.parent / "elsewhere").mkdir()
    (outside / "daily").symlink_to(outside.parent / "elsewhere")
    with pytest.raises(StorageError):
        local.store(b"data")
    with local.destination.opened() as place:
        assert place.sweep(["daily"]) == []
        assert place.listing(FOLDER) == {}
    assert os.listdir(outside.parent / "elsewhere") == []


def test_a_full_destination_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    """Both ways: there is too little room from the start, or it goes while the copy is written."""
    with filesystems.mounted("tmpfs") as path:
        subject = directory_subject("tmpfs", path, tmp_path)
        with pytest.raises(StorageError, match="bytes free") as caught:
            subject.store(os.urandom(40 * MIB))
        assert durable.is_full(caught.value)
        assert "never deletes a copy" in caught.value.hint

        class Filling(Silent):
            def advance(self, done_bytes: int, total_bytes: int | None) -> None:
                if done_bytes == MIB:
                    with (path / "ballast").open("wb") as file:
                        left = os.statvfs(path)
                        os.posix_fallocate(file.fileno(), 0, left.f_bfree * left.f_frsize)

        data = os.urandom(8 * MIB)
        subject.source.write_bytes(data)
        with (
            subject.destination.opened() as place,
            opened(subject.source) as source,
            pytest.raises(StorageError) as caught,
        ):
            place.store(PATH, source, content_of(data), Filling())
        assert "the disk is full" in caught.value.message
        assert durable.is_full(caught.value)
        assert subject.names(FOLDER) == set()
        (path / "ballast").unlink()
        subject.store(data)
        assert subject.get(PATH) == data


def test_a_medium_that_lies_is_found_out(tmp_path: Path) -> None:
    """An ext4 whose device is written behind its back, as a failing disk would: what is read back differs."""
    with clusters.mounted_filesystem("tmpfs", 40) as below, filesystems.image_on(below, size_mib=32) as path:
        subject = directory_subject("ext4", path, tmp_path)
        data = b"PGKEEP--" * (MIB // 8)

        class Failing(Silent):
            def step(self, name: str) -> None:
                if name == "store.flushed":
                    _spoil(below / "image", b"PGKEEP--" * 512)

        subject.source.write_bytes(data)
        with (
            subject.destination.opened() as place,
            opened(subject.source) as source,
            pytest.raises(StorageError) as caught,
        ):
            place.store(PATH, source, content_of(data), Failing())
        assert "gave back other bytes" in caught.value.message
        assert subject.names(FOLDER) == set()


def _spoil(image: Path, block: bytes) -> None:
    """Overwrite the first of these blocks in the image, through the loop device's own file."""
    data = image.read_bytes()
    with image.open("r+b") as file:
        file.seek(data.index(block))
        file.write(b"spoiled!")


WITHOUT_UNNAMED_OR_LINKS = """
from pgkeep.adapters import durable
from pgkeep.adapters.destinations import Content
from pgkeep.adapters.destinations.directory import DirectoryDestination
from pgkeep.progress import Silent
import hashlib
base = Path(sys.argv[1])
(base / "source").write_bytes(b"data")
(base / "outside").mkdir()
durable.unnamed_file = lambda *arguments: (_ for _ in ()).throw(OSError(95, "Operation not supported"))
with DirectoryDestination(base / "outside", 0o444, base / "vault").opened() as place:
    source = os.open(base / "source", os.O_RDONLY)
    content = Content(4, hashlib.sha256(b"data").hexdigest())
    place.store("daily/x/copy", source, content, Silent())
    taken = errors_of(lambda: place.store("daily/x/copy", source, content, Silent()))
print(json.dumps([taken[0], sorted(os.listdir(base / "outside/daily/x"))]))
"""


def test_a_share_without_unnamed_files_hard_links_or_renameat2(scratch: Path) -> None:
    """As SMB is: temporary names, and a rename that looks first. Hard links end in EPERM, by a real filter."""
    linkless = forbidding("renameat2", 22) + WITHOUT_UNNAMED_OR_LINKS.replace(
        "import hashlib", 'import hashlib\nos.link = lambda *a, **k: (_ for _ in ()).throw(OSError(1, "not permitted"))'
    )
    assert run_python(linkless, scratch) == ["RefusedError", ["copy"]]
    assert (scratch / "outside/daily/x/copy").read_bytes() == b"data"


def test_a_copy_does_not_stay_in_memory(local: Subject) -> None:
    """A large copy must not push out what the machine needs in its cache: nothing of either file stays there."""
    local.store(os.urandom(8 * MIB))
    with opened(local.source) as source, local.destination.opened() as place:
        os.fsync(source)  # what is not on the disk yet can't be let go
        place.store(f"{PATH}2", source, content_of(local.source.read_bytes()), Silent())
    assert cached_bytes(local.source) == 0
    assert cached_bytes(Path(local.destination.label) / PATH) == 0


def cached_bytes(path: Path) -> int:
    shown = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "RES", path], capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    return int(shown.stdout)
