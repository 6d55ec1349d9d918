"""A staging directory in hostile hands: it can't stop the vault, trick it, or make it read or write elsewhere."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgkeep.agent import run
from pgkeep.domain import mailbox
from pgkeep.domain.mailbox import Outcome
from pgkeep.domain.names import Tier
from pgkeep.domain.request import DUMP_NAME, FILE_NAME, encode
from pgkeep.progress import Silent
from pgkeep.vault import audit_log, intake, outcomes, staging
from tests import clusters
from tests.vault_daemon import Daemon, artifact, daemon, request

FLOOD = 100_000
SPARSE_BYTES = 1 << 40


@pytest.fixture(scope="module")
def vault() -> Iterator[Daemon]:
    """One that lives through all of this module."""
    clusters.need_root("becoming another user")
    with daemon(PGKEEP_DUMP_LIMIT="64MiB") as own:
        own.start()
        own.until(lambda: "is open" in own.said())
        yield own
        assert own.is_alive(), own.said()
        own.assert_whole()
        assert own.stop()[0] == 0


def numbered(number: int) -> str:
    """Older than every honest identifier: taken first."""
    return f"20000101T000000Z-{number:06x}"


# ---------------------------------------------------------------- one hostile entry


def _file(entry: Path, _: str) -> None:
    entry.write_bytes(b"no directory")


def _empty(entry: Path, _: str) -> None:
    entry.mkdir()


def _link_to_directory(entry: Path, identifier: str) -> None:
    elsewhere = entry.with_name("elsewhere")
    if not elsewhere.exists():
        elsewhere.mkdir()
    (elsewhere / DUMP_NAME).write_bytes(artifact())
    (elsewhere / FILE_NAME).write_bytes(encode(request(identifier, Tier.HOURLY)))
    entry.symlink_to(elsewhere)


def _fifo(entry: Path, _: str) -> None:
    os.mkfifo(entry)


def _device(entry: Path, _: str) -> None:
    os.mknod(entry, 0o666 | 0o060000, os.makedev(7, 0))


def _with(**parts: Callable[[Path], object]) -> Callable[[Path, str], None]:
    """A directory with a whole dump, but for the parts that are given."""

    def make(entry: Path, identifier: str) -> None:
        partial = entry.with_suffix(".partial")
        partial.mkdir()
        (partial / DUMP_NAME).write_bytes(artifact())
        (partial / FILE_NAME).write_bytes(encode(request(identifier, Tier.HOURLY)))
        for name, write in parts.items():
            path = partial / {"dump": DUMP_NAME, "request": FILE_NAME}[name]
            path.unlink()
            write(path)
        partial.rename(entry)

    return make


def _socket(path: Path) -> None:
    # The path of a socket is limited to 108 bytes.
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            listening.bind(path.name)
        finally:
            os.chdir(here)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(SPARSE_BYTES)


def _request(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, str], None]:
    """A directory whose request was changed as JSON."""

    def make(entry: Path, identifier: str) -> None:
        _with()(entry, identifier)
        path = entry / FILE_NAME
        document = json.loads(path.read_bytes())
        changed = change(document)
        path.write_bytes(changed if isinstance(changed, bytes) else json.dumps(changed or document).encode())

    return make


FORGED: dict[str, Callable[[Path, str], None]] = {
    "a file": _file,
    "a link to a directory": _link_to_directory,
    "a link to nothing": lambda entry, _: entry.symlink_to("nowhere"),
    "a FIFO": _fifo,
    "a device": _device,
}

HOSTILE: dict[str, tuple[Callable[[Path, str], None], str]] = {
    "an empty directory": (_empty, "does not exist"),
    "a dump that is a link": (_with(dump=lambda path: path.symlink_to("/etc/shadow")), "not opened"),
    "a dump that is a FIFO": (_with(dump=os.mkfifo), "not a regular file"),
    "a dump that is a device": (
        _with(dump=lambda path: os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))),
        "not a regular file",
    ),
    "a dump that is a directory": (_with(dump=Path.mkdir), "not a regular file"),
    "a dump that is a socket": (_with(dump=_socket), "not opened"),
    "a dump of a tebibyte of nothing": (_with(dump=_sparse), "that are allowed"),
    "an empty dump": (_with(dump=Path.touch), "not whole"),
    "half a dump": (_with(dump=lambda path: path.write_bytes(artifact()[:1500])), "not whole"),
    "a request that is a link": (_with(request=lambda path: path.symlink_to("/etc/passwd")), "not opened"),
    "a request that is a FIFO": (_with(request=os.mkfifo), "not a regular file"),
    "a request that is no JSON": (_request(lambda _: b"\xff\x00"), "malformed"),
    "a request without end": (_with(request=_sparse), "larger than"),
    "a request of deep lists": (_request(lambda _: b"[" * 1_000_000), "malformed"),
    "a request for another": (_request(lambda d: {**d, "id": numbered(0xFFFFFF)}), "names another backup"),
    "a tier that leads out": (_request(lambda d: {**d, "tiers": ["../../etc"]}), "malformed"),
    "a moment out of time": (_request(lambda d: {**d, "created_at": "0000-01-01T00:00:00Z"}), "malformed"),
    "globals that are a database": (_request(lambda d: {**d, "kind": "globals"}), "the request says globals"),
    "a name with a zero byte": (_request(lambda d: {**d, "database": "a\0b"}), "malformed"),
}


@pytest.fixture(scope="module")
def hostile_outcomes(vault: Daemon) -> dict[str, Outcome]:
    """All of them at once, and an honest dump behind them."""
    identifiers = {name: numbered(number) for number, name in enumerate(HOSTILE)}
    for name, identifier in identifiers.items():
        HOSTILE[name][0](vault.entry(identifier), identifier)
    honest = vault.stage(Tier.HOURLY, system_identifier="1")
    found = {name: vault.outcome(identifier) for name, identifier in identifiers.items()}
    assert vault.outcome(honest).state == "sealed"
    _clear(vault)
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_entry_is_refused_and_the_honest_one_behind_it_is_sealed(
    vault: Daemon, hostile_outcomes: dict[str, Outcome], name: str
) -> None:
    outcome = hostile_outcomes[name]
    assert outcome.state == "refused", outcome
    assert HOSTILE[name][1] in outcome.message
    assert vault.names_of(outcome.id) == []
    assert [each["event"] for each in vault.audit() if each.get("id") == outcome.id] == ["backup refused"]


ODD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a name that leads out": lambda d: {**d, "database": "../../../etc/passwd"},
    "a name that steers a terminal": lambda d: {**d, "database": "\x1b[2J\r\nsealed"},
    "no name": lambda d: {**d, "database": ""},
    "the first moment": lambda d: {**d, "created_at": "0001-01-01T00:00:00+14:00"},
    "the last moment": lambda d: {**d, "created_at": "9999-12-31T23:59:59-14:00"},
    "a dump of ages": lambda d: {**d, "dump_seconds": 1.7e308},
}


def _odd(name: str, document: dict[str, Any]) -> Any:
    return ODD[name]({**document, "system_identifier": name})


def test_odd_but_lawful_requests_are_sealed_where_they_belong(vault: Daemon) -> None:
    identifiers = {name: numbered(0x1000 + number) for number, name in enumerate(ODD)}
    for name, identifier in identifiers.items():
        # A server each: a tier is due once.
        change = functools.partial(_odd, name)
        _request(change)(vault.entry(identifier), identifier)
    for name, identifier in identifiers.items():
        outcome = vault.outcome(identifier)
        assert outcome.state == "sealed", (name, outcome)
        (sealed,) = outcome.names
        assert sealed.path.startswith("hourly/")
        assert sealed.path.count("/") == 1
        assert (vault.layout.active / sealed.path).is_file()
    assert "\x1b" not in vault.said()
    # As root: the tests' interpreter may lie where the vault's user can't read.
    listed = vault.run("list", environment={"PGKEEP_VAULT_USER": ""})
    assert listed.returncode == 0, listed.stderr
    assert "\x1b" not in listed.stdout
    _clear(vault)


def test_a_name_that_is_too_long_for_a_files_is_refused(vault: Daemon) -> None:
    """Where several databases share the vault, files are named by them."""
    identifier = vault.stage(Tier.HOURLY, database="é" * 400, system_identifier="long", is_one_of_several=True)
    outcome = vault.outcome(identifier)
    assert (outcome.state, "too long" in outcome.message) == ("refused", True)
    _clear(vault)


def test_reports_and_wishes_are_read_as_strictly(vault: Daemon) -> None:
    entries = []
    for number, (suffix, name, data) in enumerate(
        (
            (mailbox.FAILED_SUFFIX, mailbox.FAILURE_NAME, b"{}"),
            (mailbox.FAILED_SUFFIX, mailbox.FAILURE_NAME, b" " * (mailbox.SIZE_LIMIT_BYTES + 1)),
            (mailbox.FAILED_SUFFIX, "other", b""),
            (mailbox.ASKED_SUFFIX, mailbox.ASK_NAME, b'{"id":"x","command":"rm","asked_at":"2026-01-01T00:00:00Z"}'),
        )
    ):
        entry = vault.entry(numbered(0x2000 + number), suffix)
        entry.mkdir()
        (entry / name).write_bytes(data)
        entries.append(entry)
    for entry in entries:
        assert vault.outcome(entry.name.partition(".")[0]).state == "refused"
    _clear(vault)


# ---------------------------------------------------------------- time


def test_a_dump_that_is_written_to_meanwhile_is_what_was_checked_or_nothing(vault: Daemon) -> None:
    """The vault looks at its own copy only: whatever is changed after is not in it."""
    ended = threading.Event()
    identifiers = [vault.stage(Tier.HOURLY, system_identifier="3") for _ in range(6)]
    paths = [vault.entry(identifier) / DUMP_NAME for identifier in identifiers]

    def disturb() -> None:
        whole, torn = artifact(), artifact()[:700] + b"\0" * 50 + artifact()[750:]
        while not ended.is_set():
            for path in paths:
                with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
                    file.write(torn)
                    file.seek(0)
                    file.write(whole)
                    file.truncate(1000)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        found = [vault.outcome(identifier) for identifier in identifiers]
    finally:
        ended.set()
        thread.join()
    assert {outcome.state for outcome in found} <= {"sealed", "refused"}
    vault.assert_whole()
    _clear(vault)


def test_entries_that_come_and_go(vault: Daemon) -> None:
    """They vanish between being seen and being opened, and while they are read."""
    ended = threading.Event()

    def disturb() -> None:
        number = 0x3000
        while not ended.is_set():
            number += 1
            entry = vault.entry(numbered(number))
            _with()(entry, numbered(number))
            time.sleep(0.001 * (number % 20))
            shutil.rmtree(entry)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        time.sleep(2.5)
        honest = vault.stage(Tier.DAILY, system_identifier="4")
        assert vault.outcome(honest).state == "sealed"
    finally:
        ended.set()
        thread.join()
    _clear(vault)


# ---------------------------------------------------------------- floods


def test_a_flood_of_names_costs_little_and_hides_no_dump(vault: Daemon) -> None:
    odd = [
        b"\xff\xfe.ready",
        b"..ready",
        b"new\nline.ready",
        b"20000101T000000Z-00000\xd9\xa1.ready",
        b" .ready",
        b".ready",
    ]
    here = os.fsencode(vault.layout.staging)
    names = [*odd, *(b"%06d.ready" % number for number in range(FLOOD))]
    try:
        for name in names:
            os.close(os.open(os.path.join(here, name), os.O_CREAT | os.O_WRONLY, 0o600))
        honest = vault.stage(Tier.HOURLY, system_identifier="5")
        assert vault.outcome(honest).state == "sealed"
        vault.until(lambda: "names crowd" in vault.problems(), 90)
        before = _processor_seconds(vault.pid)
        time.sleep(2)
        # A tenth of a processor, and some for the coarse clock.
        assert _processor_seconds(vault.pid) - before < 0.35
        assert _resident_bytes(vault.pid) < 50_000_000
    finally:
        for name in names:
            os.unlink(os.path.join(here, name))
    _clear(vault)


def test_a_flood_of_entries_is_answered_only_so_far_and_written_down_only_so_often() -> None:
    clusters.need_root("becoming another user")
    with daemon() as own:
        junk = [own.entry(numbered(number)) for number in range(300)]
        for entry in junk:
            entry.mkdir()
        honest = own.stage()
        own.start()
        own.until(lambda: len(own.outcomes()) >= outcomes.LIMIT)
        own.until(lambda: "takes none of the vault's answers" in own.problems())
        time.sleep(1.5)
        assert len(own.outcomes()) < outcomes.LIMIT + 64
        assert len([each for each in own.audit() if each["event"] == "backup refused"]) <= intake.RECORDS_AN_HOUR
        # An honest agent takes them away, before its next run at the latest.
        for entry in junk:
            entry.rmdir()
        assert own.outcome(honest).state == "sealed"
        own.until(lambda: own.outcomes() == [honest])


def test_forged_entries_keep_no_honest_one_waiting_and_are_recorded_once() -> None:
    """Nobody takes away what is no directory: were they answered, two hundred would end the backups."""
    clusters.need_root("becoming another user")
    with daemon() as own:
        kinds = list(FORGED.values())
        junk = [own.entry(numbered(number)) for number in range(3 * outcomes.LIMIT)]
        for number, entry in enumerate(junk):
            kinds[number % len(kinds)](entry, entry.stem)
        honest = own.stage()
        own.start()
        assert own.outcome(honest).state == "sealed"
        # Answered as directories once, and then exchanged: an answer is kept for entries alone.
        swapped = [own.entry(numbered(0x5000 + number)) for number in range(20)]
        for entry in swapped:
            entry.mkdir()
        own.until(lambda: {entry.stem for entry in swapped} <= set(own.outcomes()))
        for entry in swapped:
            entry.rmdir()
            entry.symlink_to("/etc")
        own.until(lambda: own.outcomes() == [honest])
        own.until(lambda: "are no directories: is the agent itself?" in own.problems())
        records = [each for each in own.audit() if each["event"] == "entries forged"]
        assert [record["count"] for record in records] == [len(junk)]
        assert {each.get("id") for each in own.audit()}.isdisjoint({entry.stem for entry in junk})
        assert own.said().count("left alone") == 1
        own.assert_whole()


@pytest.mark.parametrize("name", FORGED)
def test_an_honest_agent_clears_forged_entries_away(name: str, tmp_path: Path) -> None:
    active = tmp_path / "active"
    own, partial = tmp_path / "staging" / f"{numbered(2)}.ready", tmp_path / "staging" / f"{numbered(3)}.other"
    own.mkdir(parents=True)
    partial.touch()
    FORGED[name](tmp_path / "staging" / f"{numbered(1)}.ready", numbered(1))
    said = Said()
    run.clear_up(tmp_path / "staging", active, said)
    assert {path.name for path in (tmp_path / "staging").iterdir()} - {"elsewhere"} == {own.name, partial.name}
    assert len(said.warnings) == 1
    assert "no directories" in said.warnings[0]


class Said(Silent):
    """What was warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_dumps_of_every_tier_that_nobody_asked_for_are_bounded_and_evict_nothing() -> None:
    clusters.need_root("becoming another user")
    with daemon(PGKEEP_VAULT_SUBJECTS="2") as own:
        honest = own.stage(Tier.DAILY)
        own.start()
        own.outcome(honest)
        own.take_away(honest)
        flood = [own.stage(*Tier, id=numbered(number), database=f"d{number % 5}") for number in range(60)]
        own.until(lambda: len(own.outcomes()) == len(flood))
        states = [own.outcome(identifier).state for identifier in flood]
        assert states.count("refused") > 30
        assert own.names_of(honest) == [Tier.DAILY]
        assert len({backup.manifest.database for backup in own.backups()}) == 2
        assert sum(backup.manifest.type in (Tier.MONTHLY, Tier.YEARLY) for backup in own.backups()) == 0
        own.until(lambda: "of the agent's dumps refused in 24 hours" in own.problems())


def test_scanning_takes_the_oldest_in_constant_memory(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{numbered(number)}.ready").mkdir()
    (tmp_path / f"{numbered(5)}.failed").mkdir()
    (tmp_path / f"{numbered(1)}.asked").touch()
    found = staging.scan(tmp_path, 8, lambda identifier: identifier != numbered(2))
    assert [entry.id for entry in found.entries] == [numbered(number) for number in (0, 1, 3, 4, 5, 5, 6, 7)]
    assert found.names == 302
    assert (found.forged, found.example) == (1, f"{numbered(1)}.asked")


def test_what_is_left_out_of_the_audit_log_is_counted_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[dict[str, Any]] = []
    monkeypatch.setattr(audit_log, "record", lambda _, event, **more: records.append({"event": event, **more}))
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    throttle = intake.Throttle(None)  # type: ignore[arg-type]
    for _ in range(intake.RECORDS_AN_HOUR + 50):
        throttle.record("backup refused")
    assert len(records) == intake.RECORDS_AN_HOUR
    throttle.tidy()
    now[0] += 3601
    throttle.tidy()
    assert records[-1] == {"event": "reports left out", "count": 50}
    throttle.record("backup refused")
    assert records[-1] == {"event": "backup refused"}


def _clear(vault: Daemon) -> None:
    """As an honest agent would, all at once."""
    for path in list(vault.layout.staging.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    vault.until(lambda: vault.outcomes() == [])


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_bytes(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024
