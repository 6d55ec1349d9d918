"""Directories as destinations: what all kinds must do, and what only filesystems can suffer."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from pgkeep.adapters import durable
from pgkeep.adapters.destinations import NOT_A_FILE
from pgkeep.adapters.destinations.directory import DirectoryDestination
from pgkeep.errors import RefusedError, StorageError
from pgkeep.progress import Silent
from tests import clusters
from tests.contract import filesystems
from tests.contract.destination_contract import FOLDER, MIB, NAME, PATH, DestinationContract, Subject, content_of
from tests.contract.filesystems import as_ordinary_user, forbidding, opened, run_python

STEPS = ("store.created", "store.written", "store.flushed", "store.compared")
mount = filesystems.parametrized(filesystems.KINDS)


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
        entries = (path / folder).iterdir() if (path / folder).exists() else []
        return {entry.name for entry in entries if entry.is_file() and not entry.name.startswith(".fuse_hidden")}

    vault = elsewhere / "vault"
    vault.mkdir()
    return Subject(
        kind=kind,
        destination=DirectoryDestination(path, mode, vault),
        put=put,
        get=lambda name: (path / name).read_bytes(),
        names=names,
        source=elsewhere / "source",
        before_it_appears=STEPS,
        mode_of=(lambda name: mode_of(path / name)) if kind in filesystems.WITH_FLAGS else None,
    )


class TestContract(DestinationContract):
    pass


def test_a_place_without_modes_is_warned_of_once(subject: Subject) -> None:
    subject.source.write_bytes(b"data")
    with subject.destination.opened() as place, opened(subject.source) as source:
        for number in range(2):
            place.store(f"{PATH}{number}", source, content_of(b"data"), Silent())
        told = [warning for warning in place.warnings if "keeps no modes" in warning]
    assert len(told) == (0 if subject.kind in filesystems.WITH_FLAGS else 1)
    if subject.kind in filesystems.WITH_FLAGS:
        assert mode_of(Path(subject.destination.label) / FOLDER) == 0o755


def test_the_mode_is_a_choice(scratch: Path) -> None:
    (scratch / "outside").mkdir()
    subject = directory_subject("ext4", scratch / "outside", scratch, 0o400)
    subject.store(b"data")
    assert mode_of(scratch / "outside" / PATH) == 0o400


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


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
        paths = {f"{FOLDER}/{name}": "" for name in names}
        assert place.sizes(paths) == dict.fromkeys(paths, NOT_A_FILE)
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
        assert place.sizes({PATH: ""}) == {}
        assert list(place.files(["daily"])) == []
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
