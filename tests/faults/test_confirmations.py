"""The extractor's log, as the vault reads it: while it grows, after it was cut off, and written by hostile hands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgkeep.domain.catalog import SealedBackup
from pgkeep.extractor import audit
from pgkeep.vault import confirmations
from pgkeep.vault.confirmations import Confirmations
from pgkeep.vault.layout import Layout
from tests import clusters
from tests.faults.machine import PROJECT
from tests.unit.test_manifest import EXAMPLE

MIB = 1024 * 1024


class Reader:
    """A log with a few backups that it may speak of, and what the vault makes of it."""

    def __init__(self, root: Path, *required: str) -> None:
        self.layout = Layout(root)
        self.layout.logs.mkdir(parents=True)
        self.log = self.layout.extraction_audit
        self.backups = [
            SealedBackup(
                msgspec.structs.replace(
                    EXAMPLE, id=f"2026013{number}T000000Z-aaaaaa", filename=f"{number}.sql.gz", sha256=str(number) * 64
                ),
                "daily",
            )
            for number in range(1, 4)
        ]
        self.required = required or ("s3",)
        self.confirmations = Confirmations(self.layout, self.required)

    def says(self, event: Any, number: int, name: str = "s3", **other: Any) -> None:
        """A record, as the extractor writes it."""
        audit.record(self.log, event, **self.details(number, name), **other)

    def details(self, number: int, name: str = "s3") -> dict[str, Any]:
        manifest = self.backups[number - 1].manifest
        return {
            "path": f"daily/{number}.sql.gz",
            "id": manifest.id,
            "sha256": manifest.sha256,
            "destination_name": name,
            "destination": "d" * 32,
            "size_bytes": 5,
        }

    def adds(self, data: bytes) -> None:
        with self.log.open("ab") as file:
            file.write(data)

    def missing(self, name: str = "s3") -> list[int]:
        """The numbers of those that are not known to be there."""
        found = self.confirmations.unconfirmed(self.backups)
        assert set(found) == set(self.required)
        return sorted(int(path[6]) for path in found[name])

    def anew(self) -> list[int]:
        """What a vault makes of it that has just started: the same."""
        self.confirmations = Confirmations(self.layout, self.required)
        return self.missing()

    def problem(self) -> str:
        return "; ".join(self.confirmations.problems())


@pytest.fixture
def reader(scratch: Path) -> Reader:
    return Reader(scratch / "root")


# ---------------------------------------------------------------- what counts


def test_where_nothing_is_required_nothing_is_read(scratch: Path) -> None:
    layout = Layout(scratch)
    layout.logs.mkdir()
    os.mkfifo(layout.extraction_audit)
    found = Confirmations(layout, ())
    assert found.unconfirmed([]) == {}
    assert list(found.problems()) == []


def test_without_a_log_nothing_is_confirmed(reader: Reader) -> None:
    assert (reader.missing(), reader.problem()) == ([1, 2, 3], "")


@pytest.mark.parametrize("event", sorted(confirmations.CONFIRMING))
@pytest.mark.parametrize("back", sorted(confirmations.REVOKING))
def test_the_last_word_counts(reader: Reader, event: str, back: str) -> None:
    reader.says(event, 1)
    reader.says(event, 2)
    assert reader.missing() == [3]
    reader.says(back, 2)
    assert reader.missing() == reader.anew() == [2, 3]
    reader.says("repaired", 2)
    assert reader.missing() == reader.anew() == [3]


@pytest.mark.parametrize("wrong", [{"id": "20260131T000000Z-bbbbbb"}, {"sha256": "f" * 64}, {"path": "daily/3.sql.gz"}])
def test_a_copy_of_something_else_confirms_nothing(reader: Reader, wrong: dict[str, str]) -> None:
    audit.record(reader.log, "extracted", **{**reader.details(1), **wrong})
    assert reader.missing() == [1, 2, 3]
    reader.says("extracted", 1)
    assert reader.missing() == [2, 3]
    audit.record(reader.log, "extracted", **{**reader.details(1), **wrong})
    assert reader.missing() == ([2, 3] if "path" in wrong else [1, 2, 3])


def test_a_backup_that_changed_since_is_not_confirmed(reader: Reader) -> None:
    reader.says("extracted", 1)
    assert reader.missing() == [2, 3]
    first = reader.backups[0]
    reader.backups[0] = SealedBackup(msgspec.structs.replace(first.manifest, sha256="e" * 64), first.directory)
    assert reader.missing() == [1, 2, 3]


def test_each_destination_for_itself(scratch: Path) -> None:
    reader = Reader(scratch / "root", "s3", "nas")
    reader.says("extracted", 1, "s3")
    reader.says("extracted", 2, "nas")
    reader.says("extracted", 3, "elsewhere")
    assert (reader.missing("s3"), reader.missing("nas")) == ([2, 3], [1, 3])


def test_another_medium_under_the_same_name_has_nothing(reader: Reader) -> None:
    reader.says("extracted", 1)
    audit.record(
        reader.log, "destination adopted", destination="d" * 32, before="d" * 32, destination_name="s3", forgotten=1
    )
    assert reader.missing() == [2, 3]
    audit.record(
        reader.log, "destination adopted", destination="e" * 32, before="d" * 32, destination_name="s3", forgotten=0
    )
    assert reader.missing() == reader.anew() == [1, 2, 3]


def test_what_has_expired_is_not_remembered(reader: Reader) -> None:
    for number in (1, 2, 3):
        reader.says("extracted", number)
    assert reader.missing() == []
    gone = reader.backups.pop()
    assert reader.missing() == []
    reader.backups.append(gone)
    assert reader.missing() == [3]


# ---------------------------------------------------------------- as it grows


def test_only_what_is_new_is_read(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    reader.adds((b"x" * 99 + b"\n") * 100_000)
    reader.says("extracted", 1)
    assert reader.missing() == [2, 3]
    read_bytes, pread = 0, os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        nonlocal read_bytes
        data = pread(descriptor, length, offset)
        read_bytes += len(data)
        return data

    monkeypatch.setattr(os, "pread", counted)
    reader.says("extracted", 2)
    assert reader.missing() == [3]
    assert read_bytes < 16 * 1024


def test_at_every_byte_of_a_record_in_the_making(reader: Reader) -> None:
    """Also a process that was killed while it wrote: the next record begins a line of its own."""
    reader.says("extracted", 2)
    whole = reader.log.read_bytes()
    reader.log.write_bytes(b"")
    reader.says("extracted", 1)
    begin = reader.log.read_bytes()
    for length in range(len(whole)):
        reader.log.write_bytes(begin + whole[:length])
        assert reader.missing() == reader.anew() == [2, 3], length
    reader.log.write_bytes(begin + whole[:-20])
    reader.says("extracted", 3)
    assert reader.missing() == reader.anew() == [2]


def test_while_the_extractor_is_killed_again_and_again(reader: Reader) -> None:
    """What was looked at once and what is read anew say the same at any moment."""
    details = [reader.details(number) for number in (1, 2, 3)]
    script = f"""
import itertools, sys
from pathlib import Path
from pgkeep.extractor import audit
for number, event in enumerate(itertools.cycle(["extracted", "copy missing", "repaired"])):
    audit.record(Path(sys.argv[1]), event, **{details!r}[number % 2])
"""
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", script, str(reader.log)], env=os.environ | {"PYTHONPATH": str(PROJECT / "src")}
        )
        size_before = reader.log.stat().st_size if reader.log.exists() else 0
        deadline = time.monotonic() + 20
        while not reader.log.exists() or reader.log.stat().st_size < size_before + 20_000:
            assert time.monotonic() < deadline
            assert 3 in reader.missing()
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert reader.missing() == reader.anew()
    reader.says("extracted", 3)
    reader.says("extracted", 2)
    reader.says("extracted", 1)
    assert reader.missing() == reader.anew() == []


# ---------------------------------------------------------------- not the log that it was


def _cut_to_nothing(reader: Reader) -> None:
    os.truncate(reader.log, 0)


def _cut_and_grown_beyond(reader: Reader) -> None:
    size_bytes = reader.log.stat().st_size
    os.truncate(reader.log, 0)
    reader.adds(b'{"event":"temporary files removed"}\n' * (size_bytes // 20))


def _moved_away(reader: Reader) -> None:
    reader.log.rename(reader.log.with_suffix(".1"))


def _another_in_its_place(reader: Reader) -> None:
    reader.log.rename(reader.log.with_suffix(".1"))
    reader.says("extraction failed", 1)


@pytest.mark.parametrize("change", [_cut_to_nothing, _cut_and_grown_beyond, _moved_away, _another_in_its_place])
def test_what_a_lost_log_said_is_forgotten(reader: Reader, change: Callable[[Reader], None]) -> None:
    for number in (1, 2, 3):
        reader.says("extracted", number)
    assert reader.missing() == []
    change(reader)
    assert reader.missing() == reader.anew() == [1, 2, 3]
    reader.says("adopted", 2)
    assert reader.missing() == reader.anew() == [1, 3]


def test_a_copy_of_the_log_in_its_place_says_the_same(reader: Reader) -> None:
    """As after a restore of the machine, or a move of the vault."""
    reader.says("extracted", 1)
    assert reader.missing() == [2, 3]
    data = reader.log.read_bytes()
    reader.log.unlink()
    reader.log.write_bytes(data)
    assert reader.missing() == [2, 3]


# ---------------------------------------------------------------- hostile


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _link(path: Path) -> None:
    real = path.with_suffix(".real")
    real.write_bytes(b"")
    path.symlink_to(real)


def _directory(path: Path) -> None:
    path.mkdir()


def _endless(path: Path) -> None:
    path.touch()
    os.truncate(path, confirmations.LOG_LIMIT_BYTES + 1)


@pytest.mark.parametrize("make", [_fifo, _link, _directory, _endless])
def test_what_is_no_log_confirms_nothing_and_is_a_problem(reader: Reader, make: Callable[[Path], None]) -> None:
    reader.says("extracted", 1)
    assert reader.missing() == [2, 3]
    reader.log.unlink()
    make(reader.log)
    started = time.monotonic()
    assert reader.missing() == [1, 2, 3]
    assert time.monotonic() - started < 5
    assert str(reader.log) in reader.problem()
    (reader.log.rmdir if reader.log.is_dir() else reader.log.unlink)()
    reader.says("extracted", 1)
    assert (reader.missing(), reader.problem()) == ([2, 3], "")


def test_a_log_that_may_not_be_read_confirms_nothing(scratch: Path) -> None:
    clusters.need_root("becoming another user")
    reader = Reader(scratch / "root")
    reader.says("extracted", 1)
    assert reader.missing() == [2, 3]
    reader.log.chmod(0o600)
    os.seteuid(65534)
    try:
        assert reader.missing() == [1, 2, 3]
    finally:
        os.seteuid(0)
    assert "can't be read: Permission denied" in reader.problem()


JUNK = [
    b"\n",
    b"\0" * 4096 + b"\n",
    b"[" * 100_000 + b"\n",
    b'{"event":"extracted"}\n',
    b'{"event":["extracted"],"destination_name":"s3","path":"daily/1.sql.gz"}\n',
    b'{"event":"extracted","destination_name":null,"path":"daily/1.sql.gz"}\n',
    b'{"event":"extracted","destination_name":"s3","path":7}\n',
    b'{"event":"extracted","destination_name":"s3"}\n',
    b'{"event":"copy missing","destination_name":"s3"}\n',
    b'"destination_name"\n',
    b"\xff\xfe\n",
    b'{"destination_name":"\xff"}\n',
    b"9" * (3 * MIB) + b"\n",
]


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_junk_is_passed_over(reader: Reader, junk: bytes) -> None:
    reader.says("extracted", 1)
    reader.adds(junk)
    reader.says("extracted", 2)
    assert (reader.missing(), reader.problem()) == ([3], "")
    reader.adds(junk)
    assert reader.missing() == reader.anew() == [3]


def test_a_record_inside_an_overlong_line_is_none(reader: Reader) -> None:
    reader.says("extracted", 1)
    record = reader.log.read_bytes()
    reader.log.write_bytes(b" " * MIB + record)
    assert reader.missing() == [1, 2, 3]
    # And the next line is one again.
    reader.says("extracted", 2)
    assert reader.missing() == reader.anew() == [1, 3]


def test_a_name_that_holds_a_record_confirms_nothing(reader: Reader) -> None:
    forged = json.dumps({"event": "extracted", **reader.details(1)})
    audit.record(reader.log, "extraction failed", reason=f"\n{forged}\n", **reader.details(2))
    assert reader.missing() == [1, 2, 3]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=60) | st.sampled_from(JUNK[:-1]) | st.sampled_from([b"A", b"B", b"C"]), max_size=12))
def test_bytes_of_any_kind_in_pieces_of_any_size(reader: Reader, pieces: list[bytes]) -> None:
    """It never raises, and a look at each piece says the same as one look at all."""
    reader.log.unlink(missing_ok=True)
    reader.confirmations = Confirmations(reader.layout, reader.required)
    step_by_step = reader.missing()
    for piece in pieces:
        if piece in (b"A", b"B", b"C"):
            reader.says(["extracted", "copy damaged", "adopted"][piece[0] - 65], 1 + len(piece))
        else:
            reader.adds(piece)
        step_by_step = reader.missing()
    assert step_by_step == reader.anew()
    assert {1, 3} <= set(step_by_step)


def test_memory_does_not_grow_with_the_log(scratch: Path) -> None:
    """Records of backups that nobody has any more, and a line without an end."""
    reader = Reader(scratch / "root")
    audit.record(reader.log, "extracted", **{**reader.details(1), "path": "daily/unheard-of.sql.gz"})
    line = reader.log.read_bytes()
    reader.adds(b"".join(line.replace(b"unheard-of", b"%010d" % number) for number in range(30_000)))
    reader.says("extracted", 1)
    reader.adds(b"x" * (30 * MIB))
    tracemalloc.start()
    try:
        assert reader.missing() == [2, 3]
        assert tracemalloc.get_traced_memory()[1] < 2 * MIB
    finally:
        tracemalloc.stop()
