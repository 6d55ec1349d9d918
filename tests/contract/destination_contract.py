"""What every destination must do, whatever it is made of.

A module for one kind has a fixture ``subject`` that gives a :class:`Subject`, fresh (empty) for every test, and runs
all of this against it by one line; what only that kind can do or suffer, it tests itself, with the same subject::

    class TestContract(DestinationContract):
        pass

``subject`` may be parametrised (servers, filesystems). What a kind can't do is held to that: the subject says so.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime as dt
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from pgkeep.adapters import durable
from pgkeep.adapters.destinations import Content, Destination, Place
from pgkeep.domain import names
from pgkeep.errors import FormatError, IntegrityError, NotFoundError, RefusedError
from pgkeep.progress import Silent
from tests.contract.filesystems import opened

MIB = 1 << 20
FOLDER = "daily/2026-11-23"
PATH = f"{FOLDER}/2026-11-23_00-00-00.sql.gz"
NAME = PATH.rpartition("/")[2]
ASIDE = f"{NAME}.damaged-1"


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """A destination, and hands that reach behind it: as another program, or an accident, would.

    ``put`` makes or replaces a file, ``get`` gives what stands under a path, ``names`` the files (not the folders)
    directly in a folder, temporary ones as well; none where the folder is missing. ``source``: a path of the test's
    own, for what is copied. ``before_it_appears``: the steps of ``store`` after which a kill must leave nothing there.
    ``replaced``: where what stood in the way of ``store(aside=)`` is found again: under the new name, or as the
    version before (``previous`` then gives its bytes by path); ``refused``: nothing is ever replaced.
    ``versions``: ``store`` returns one, and it is given with every later use. ``sweeps``: temporary files lie among the
    copies (under ``durable.TEMPORARY_PREFIX``). ``removes``: copies can be removed at all; ``locks``: ``store`` locks,
    for as long as ``retain_until`` says (None: for as long as is ever allowed). ``mode_of``: the mode of a file, where
    the kind has modes.
    """

    kind: str
    destination: Destination
    put: Callable[[str, bytes], None]
    get: Callable[[str], bytes]
    names: Callable[[str], set[str]]
    source: Path
    before_it_appears: tuple[str, ...]
    replaced: Literal["renamed", "version", "refused"] = "renamed"
    previous: Callable[[str], bytes] | None = None
    versions: bool = False
    sweeps: bool = True
    removes: bool = True
    locks: bool = False
    tells_free_bytes: bool = True
    mode_of: Callable[[str], int] | None = None

    def store(
        self,
        data: bytes,
        path: str = PATH,
        content: Content | None = None,
        aside: str | None = None,
        retain_until: dt.datetime | None = None,
    ) -> str:
        """Copy these bytes there (``content``: what is said of them), in a pass of its own. The version."""
        self.source.write_bytes(data)
        with self.destination.opened() as place, opened(self.source) as source:
            told = content or content_of(data)
            return place.store(path, source, told, Silent(), aside=aside, retain_until=retain_until)


def content_of(data: bytes) -> Content:
    return Content(len(data), hashlib.sha256(data).hexdigest())


class DestinationContract:
    """Inherited by a test class of each kind."""

    def test_a_copy_appears_whole_under_its_name(self, subject: Subject) -> None:
        data = os.urandom(3 * MIB + 17)
        version = subject.store(data)
        assert subject.get(PATH) == data
        assert bool(version) == subject.versions
        with subject.destination.opened() as place:
            assert place.sizes({PATH: version}) == {PATH: len(data)}
            assert place.content(PATH, Silent(), version) == content_of(data)
        assert subject.names(FOLDER) == {NAME}

    @pytest.mark.parametrize("size_bytes", [0, 1, MIB - 1, MIB, MIB + 1])
    def test_every_size_is_copied(self, subject: Subject, size_bytes: int) -> None:
        data = os.urandom(size_bytes)
        subject.store(data)
        assert subject.get(PATH) == data

    @pytest.mark.parametrize("found", [b"shorter", b"the same length!", b"longer than what was promised"])
    def test_a_source_that_is_not_what_it_should_be_leaves_nothing(self, subject: Subject, found: bytes) -> None:
        with pytest.raises(IntegrityError, match="not what its manifest says"):
            subject.store(found, content=content_of(b"what it should be"[:16]))
        assert subject.names(FOLDER) == set()

    def test_nothing_is_ever_overwritten(self, subject: Subject) -> None:
        subject.put(PATH, b"older")
        with pytest.raises(RefusedError, match="never overwritten"):
            subject.store(b"newer")
        assert subject.get(PATH) == b"older"
        assert subject.names(FOLDER) == {NAME}

    def test_what_is_replaced_is_kept(self, subject: Subject) -> None:
        subject.put(PATH, b"damaged")
        if subject.replaced == "refused":
            with pytest.raises(RefusedError):
                subject.store(b"whole", aside=ASIDE)
            assert subject.get(PATH) == b"damaged"
            return
        version = subject.store(b"whole", aside=ASIDE)
        assert subject.get(PATH) == b"whole"
        with subject.destination.opened() as place:
            assert place.content(PATH, Silent(), version) == content_of(b"whole")
        if subject.previous is not None:
            assert subject.previous(PATH) == b"damaged"
        else:
            assert subject.get(f"{FOLDER}/{ASIDE}") == b"damaged"

    def test_what_can_be_set_aside_may_not_be_there(self, subject: Subject) -> None:
        subject.store(b"whole", aside=ASIDE)
        assert subject.get(PATH) == b"whole"
        assert subject.names(FOLDER) == {NAME}

    def test_nothing_is_replaced_for_a_source_that_is_bad(self, subject: Subject) -> None:
        subject.put(PATH, b"damaged")
        with pytest.raises((IntegrityError, RefusedError)):
            subject.store(b"bad", content=content_of(b"whole"), aside=ASIDE)
        assert subject.names(FOLDER) == {NAME}
        assert subject.get(PATH) == b"damaged"

    def test_a_version_stays_whatever_is_written_over_it(self, subject: Subject) -> None:
        version = subject.store(b"ours")
        if not subject.versions:
            assert version == ""
            return
        subject.put(PATH, b"somebody else's")
        with subject.destination.opened() as place:
            assert place.sizes({PATH: version}) == {PATH: 4}
            assert place.content(PATH, Silent(), version) == content_of(b"ours")
            assert place.read(PATH, 100, version) == b"ours"
            with place.opened_file(PATH, version) as file:
                assert file.read(0, 100) == b"ours"

    def test_what_is_not_there_is_no_error(self, subject: Subject) -> None:
        with subject.destination.opened() as place:
            assert place.sizes({"weekly/2026-01-01/x": "", PATH: ""}) == {}
            assert place.sizes({}) == {}
            assert place.content("weekly/2026-01-01/x", Silent()) is None
            assert place.read_marker() is None
            assert list(place.files(["daily", "weekly"])) == []
            with pytest.raises(NotFoundError):
                place.read(PATH, 100)
            with pytest.raises(NotFoundError), place.opened_file(PATH):
                pass

    def test_small_files_are_read_to_a_limit(self, subject: Subject) -> None:
        subject.put(PATH, b"0123456789")
        with subject.destination.opened() as place:
            assert place.read(PATH, 10) == b"0123456789"
            with pytest.raises(FormatError, match="larger than 9 bytes"):
                place.read(PATH, 9)

    def test_large_files_are_read_in_parts(self, subject: Subject) -> None:
        """By several threads at once."""
        data = os.urandom(MIB + 17)
        version = subject.store(data)
        with subject.destination.opened(to_read=True) as place, place.opened_file(PATH, version) as file:
            assert file.size_bytes == len(data)
            parts = [(0, 10), (MIB, 17), (12345, 65536), (MIB, 1000), (len(data), 10), (7, 0)]
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                found = list(pool.map(lambda part: file.read(*part), parts * 3))
            for (offset, length), read in zip(parts * 3, found, strict=True):
                # Less than was asked for is allowed, nothing is not.
                assert data[offset : offset + length].startswith(read)
                assert bool(read) == bool(data[offset : offset + length])

    def test_the_marker_is_kept_and_replaced(self, subject: Subject) -> None:
        with subject.destination.opened() as place:
            place.write_marker(b"first")
            assert place.read_marker() == b"first"
            place.write_marker(b"second")
        with subject.destination.opened(to_read=True) as place:
            assert place.read_marker() == b"second"

    def test_damage_behind_its_back_is_seen(self, subject: Subject) -> None:
        data = os.urandom(MIB)
        subject.store(data)
        subject.put(PATH, data[:-1] + bytes([data[-1] ^ 1]))
        with subject.destination.opened() as place:
            assert place.sizes({PATH: ""}) == {PATH: MIB}
            assert place.content(PATH, Silent()) not in (None, content_of(data))

    def test_sizes_are_given_of_what_is_asked_for(self, subject: Subject) -> None:
        paths = {f"{FOLDER}/a": b"1", f"{FOLDER}/b": b"22", "daily/2026-11-24/c": b"333", "weekly/2026-11-22/d": b""}
        versions = {path: subject.store(data, path) for path, data in paths.items()}
        asked = {path: version for path, version in versions.items() if not path.endswith("b")}
        with subject.destination.opened() as place:
            found = place.sizes({**asked, f"{FOLDER}/missing": ""})
        assert found == {path: len(paths[path]) for path in asked}

    def test_files_are_listed_by_path(self, subject: Subject) -> None:
        days = [f"daily/2026-11-2{day}/2026-11-2{day}_00-00-00.sql.gz" for day in (2, 3)]
        wanted = [f"{path}{suffix}" for path in days for suffix in ("", names.MANIFEST_SUFFIX, ".sha256")]
        wanted.append(f"weekly/2026-11-22/2026-11-22_00-00-00.sql.gz{names.MANIFEST_SUFFIX}")
        others = ["monthly/2026-11-01/x.sql.gz", "anchors/2026-11-23/x.json", "x", "daily-not/x", "dail/y"]
        sizes = {path: number + 1 for number, path in enumerate([*reversed(wanted), *others])}
        for path, size_bytes in sizes.items():
            subject.put(path, b"x" * size_bytes)
        with subject.destination.opened(to_read=True) as place:
            found = list(place.files(["weekly", "daily", "hourly"]))
            assert [(each.path, each.size_bytes) for each in found] == [(path, sizes[path]) for path in wanted]
            for each in found:
                assert bool(each.version) == subject.versions
                assert place.read(each.path, 100, each.version) == b"x" * each.size_bytes

    def test_every_version_is_listed_the_oldest_first(self, subject: Subject) -> None:
        for data in (b"1", b"22", b"333"):
            subject.put(PATH, data)
        with subject.destination.opened(to_read=True) as place:
            found = [each for each in place.files(["daily"]) if each.path == PATH]
            assert [each.size_bytes for each in found] == ([1, 2, 3] if subject.versions else [3])
            assert len({each.version for each in found}) == len(found)

    def test_what_a_killed_run_left_is_swept_and_nothing_else(self, subject: Subject) -> None:
        left = [f"{folder}{durable.TEMPORARY_PREFIX}0123" for folder in ("", "daily/", f"{FOLDER}/")]
        kept = [PATH, f"{FOLDER}/notes.txt", "readme.txt", f"elsewhere/{durable.TEMPORARY_PREFIX}0123"]
        for path in (*left, *kept):
            subject.put(path, b"x")
        with subject.destination.opened() as place:
            assert durable.TEMPORARY_PREFIX not in "".join(each.path for each in place.files(["daily"]))
            assert sorted(place.sweep(["daily", "weekly"])) == (sorted(left) if subject.sweeps else [])
            assert place.sweep(["daily", "weekly"]) == []
        for path in kept:
            assert subject.get(path) == b"x"

    def test_a_copy_that_is_cut_off_leaves_nothing(self, subject: Subject) -> None:
        """At every step before it appears; the next try makes it."""
        data = os.urandom(MIB + 17)
        for wanted in subject.before_it_appears:
            reached = _interrupted_at(wanted, subject, data)
            assert reached == wanted
            with subject.destination.opened() as place:
                assert place.sizes({PATH: ""}) == {}
                place.sweep(["daily"])
            assert subject.names(FOLDER) == set()
        subject.store(data)
        assert subject.get(PATH) == data

    def test_what_is_over_is_removed(self, subject: Subject) -> None:
        """But not what is locked, whoever asks."""
        subject.put(f"{PATH}2", b"another")
        version = subject.store(b"ours")
        with subject.destination.opened() as place:
            if subject.locks or not subject.removes:
                with pytest.raises(RefusedError):
                    place.remove(PATH, version)
                assert subject.get(PATH) == b"ours"
                return
            place.remove(PATH, version)
            assert place.sizes({PATH: version}) == {}
            place.remove(PATH, version)
            place.remove("weekly/2026-01-01/x")
        assert subject.names(FOLDER) == {f"{NAME}2"}

    def test_locks_are_told_and_prolonged(self, subject: Subject) -> None:
        soon = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=5)
        later = soon + dt.timedelta(minutes=5)
        version = subject.store(b"ours", retain_until=soon)
        with subject.destination.opened() as place:
            place.prolong(PATH, later, version)
            lock = place.lock(PATH, version)
            place.prolong(PATH, soon, version)
            assert place.lock(PATH, version) == lock
        assert (lock is not None) == subject.locks
        if lock is not None:
            assert abs(lock.until - later) < dt.timedelta(seconds=2)

    def test_it_tells_what_room_there_is(self, subject: Subject) -> None:
        with subject.destination.opened(to_read=True) as place:
            free_bytes = place.free_bytes()
        assert (free_bytes is not None) == subject.tells_free_bytes
        if free_bytes is not None:
            assert free_bytes > 0

    def test_a_trial_leaves_nothing_among_the_copies(self, subject: Subject) -> None:
        subject.store(b"ours")
        probe = subject.destination.probe(Silent())
        assert probe.ok
        assert probe.findings
        assert (probe.lock != "none") == subject.locks
        assert subject.names(FOLDER) == {NAME}
        if not subject.locks:
            assert subject.names("") == set()
        with subject.destination.opened() as place:
            assert place.sweep(["daily"]) == []

    def test_copies_are_read_only_where_there_are_modes(self, subject: Subject) -> None:
        subject.store(b"data")
        assert subject.mode_of is None or subject.mode_of(PATH) == 0o444


class _Interrupted(Silent):
    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        self.reached = ""

    def step(self, name: str) -> None:
        self.reached = name
        if name == self.wanted:
            raise SystemExit(143)


def _interrupted_at(wanted: str, subject: Subject, data: bytes) -> str:
    """The last step that was reached."""
    subject.source.write_bytes(data)
    progress = _Interrupted(wanted)
    with subject.destination.opened() as place, opened(subject.source) as source:
        _try_to_store(place, source, data, progress)
    return progress.reached


def _try_to_store(place: Place, source: int, data: bytes, progress: Silent) -> None:
    with pytest.raises(SystemExit):
        place.store(PATH, source, content_of(data), progress)
