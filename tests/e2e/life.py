"""A stack that is put through everything: each of its places a small disk, and its processes in our hands."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pgkeep.adapters import process
from pgkeep.vault import audit_log
from tests.e2e import stack as stacks
from tests.e2e.engine import Engine
from tests.e2e.stack import SERVICES, VAULT_UID, Stack, wait_until
from tests.faults.test_storage import filled

MIB = 1 << 20
# Due in one minute of the year: at once where there is no backup yet, and not again while the tests run.
TOGETHER = dict.fromkeys(("BACKUP_SCHEDULE", "BACKUP_SCHEDULE_DAILY", "BACKUP_SCHEDULE_WEEKLY"), "0 0 1 1 *")
# As they are where nobody sets them.
DEFAULT_INTERVALS = {"CHECK_INTERVAL": "300", "PGKEEP_HEALTH_INTERVAL": "60s"}
# Where there is no other network, asking for the name of a database that is gone takes ten seconds otherwise.
QUICK_NAMES = {"dns_opt": ["timeout:1", "attempts:1"]}
DISKS_MIB = {"staging": 96, "active": 256, "extracted": 16, "logs": 16, "state": 16, "external": 256}
TOTAL = 20_000_000
# Each payment is three statements of one transaction. 24 MB of text: a dump takes a while, and its file is small.
LEDGER = """
CREATE TABLE payers (id int PRIMARY KEY, amount bigint NOT NULL, text text NOT NULL);
CREATE TABLE payees (LIKE payers INCLUDING ALL);
CREATE TABLE transfers (id bigint GENERATED ALWAYS AS IDENTITY, at timestamptz NOT NULL, amount bigint NOT NULL);
CREATE TABLE trade_is_over ();
INSERT INTO payers SELECT n, 1000, repeat(md5(n::text) || md5(n::text || 'b') || md5(n::text || 'c'), 6)
  FROM generate_series(1, 20000) AS n;
INSERT INTO payees SELECT id, 0, text FROM payers;
CREATE PROCEDURE trade() LANGUAGE plpgsql AS $$ DECLARE payer int; payee int; paid bigint; BEGIN
  WHILE NOT EXISTS (SELECT FROM trade_is_over) LOOP
    payer := 1 + floor(random() * 20000);
    payee := 1 + floor(random() * 20000);
    paid := 1 + floor(random() * 9);
    UPDATE payers SET amount = amount - paid WHERE id = payer;
    UPDATE payees SET amount = amount + paid WHERE id = payee;
    INSERT INTO transfers (at, amount) VALUES (clock_timestamp(), paid);
    COMMIT;
  END LOOP; END $$;
"""
PAID, RECEIVED = "SELECT sum(amount) FROM payers", "SELECT sum(amount) FROM payees"
BOOKS = f"SELECT ({PAID}), ({RECEIVED}), sum(amount), count(*) FROM transfers"
_Found = TypeVar("_Found")


@dataclasses.dataclass(frozen=True, slots=True)
class Life:
    """``disks``: where each of :data:`DISKS_MIB` is mounted, seen from here; its files are in ``files/``."""

    stack: Stack
    disks: Mapping[str, Path]

    def files(self, place: str) -> Path:
        return self.disks[place] / "files"

    @property
    def audit(self) -> list[dict[str, Any]]:
        """Its records; what a full disk cut off is none."""
        lines = audit_log.lines_of(self.files("logs") / "backup_audit.jsonl")
        return [json.loads(line) for line in lines if line.endswith(b"}\n")]

    def back_up(self, *tiers: str) -> process.Completed:
        return self.stack.execute("backup-agent", "backup.py", *tiers, check=False)

    @contextlib.contextmanager
    def backing_up(self, *tiers: str) -> Iterator[process.Running]:
        """The same, under way."""
        engine = self.stack.engine
        command = [engine.client, "exec", self.stack.container("backup-agent"), "backup.py", *tiers]
        with process.start(command, environment=engine.environment, stdout=process.DEVNULL) as running:
            yield running

    def extract(self) -> process.Completed:
        return self.stack.execute("backup-extractor", "extractor.py", check=False)

    def ailments(self, service: str) -> list[str]:
        """What the service's health check finds."""
        done = self.stack.execute(service, "pgkeep", "health", service.removeprefix("backup-"), "--json", check=False)
        problems: list[str] = json.loads(done.stdout)["problems"]
        assert (done.return_code != 0) == bool(problems)
        return problems

    def is_well(self, service: str) -> bool:
        return self.ailments(service) == []

    def staged(self) -> list[str]:
        """Names in staging, without those of locks and what is remembered."""
        return [name for name in os.listdir(self.files("staging")) if not name.startswith(".agent")]

    def assert_nothing_half_done(self) -> None:
        """Nothing of a dump lies in staging; what the service writes its health to comes and goes."""

        def is_clean() -> bool:
            return all(name.endswith((".lock", ".failed")) for name in self.staged())

        wait_until(is_clean, "a clean staging area", 5.0, say=lambda: str(self.staged()))

    def told(self, since: int, event: str) -> list[dict[str, Any]]:
        return [record for record in self.audit[since:] if record["event"] == event]

    def failures(self, since: int) -> dict[str, str]:
        """What the agent said of failures, from that record on: of what, and the event."""
        return {record["of"]: record["event"] for record in self.audit[since:] if "of" in record}

    def names(self, tier: str) -> set[str]:
        return set(os.listdir(self.files("active") / tier))

    def assert_recovers(self, before: Mapping[str, str], tier: str = "hourly") -> None:
        """A run goes well, all that was sealed is as it was and whole, nothing half is left, the log hangs together."""
        sealed = self.names(tier)
        done = self.back_up(tier)
        assert done.return_code == 0, done.stderr
        assert len(self.names(tier) - sealed) == 3, self.names(tier) - sealed
        self.assert_well(before)

    def assert_well(self, before: Mapping[str, str]) -> None:
        self.stack.assert_untouched(before)
        done = self.stack.execute("backup-vault", "pgkeep", "verify", "--all", user=VAULT_UID, check=False)
        assert done.return_code == 0, done.stderr
        self.assert_nothing_half_done()
        assert not [name for name in self.staged() if name.endswith(".failed")]
        assert os.listdir(self.files("active") / ".quarantine") == []
        assert os.listdir(self.files("state") / "journal") == []
        assert audit_log.examine(self.files("logs") / "backup_audit.jsonl").problems == ()
        for service in SERVICES:
            is_well = functools.partial(self.is_well, service)
            wait_until(is_well, f"{service} to be well", 30.0, say=self.stack.trouble)

    def assert_all_is_outside(self) -> None:
        """Every file, as it is in the vault, and no other."""
        inside = {(path.parent.name, path.name): path for path in self.files("active").glob("[a-z]*/*")}
        copies = [path for path in self.files("external").glob("*/*/*") if path.parents[1].name != "anchors"]
        outside = {(path.parents[1].name, path.name): path for path in copies}
        assert outside.keys() == inside.keys()
        assert not [path for key, path in inside.items() if outside[key].read_bytes() != path.read_bytes()]


@contextlib.contextmanager
def begun(engine: Engine, context: Path, projects: Path) -> Iterator[Life]:
    """Everything on a small disk of its own; the first backups were made in the middle of trade, which is over."""
    with contextlib.ExitStack() as made:
        disks = {
            name: made.enter_context(_disk(engine, projects / "disks" / name, size)) for name, size in DISKS_MIB.items()
        }
        settings = {
            "COMPOSE_FILE": "docker-compose.yml:disks.yml",
            "PGKEEP_EXTERNAL": f"{disks['external']}/files",
            "PGKEEP_RESERVE": "4MiB",
            **TOGETHER,
            **DEFAULT_INTERVALS,
        }
        own = stacks.lay_out(engine, context, projects / "life", settings)
        bound = {
            f"backup_{name}": {"driver_opts": {"type": "none", "o": "bind", "device": f"{disk}/files"}}
            for name, disk in disks.items()
            if name != "external"
        }
        (own.directory / "disks.yml").write_text(
            json.dumps({"volumes": bound, "services": {"backup-agent": QUICK_NAMES}})
        )
        made.enter_context(stacks.removed_afterwards(own))
        found = Life(own, {name: _seen(engine, disk) for name, disk in disks.items()})
        os.chown(found.files("external"), stacks.EXTRACTOR_UID, stacks.EXTRACTOR_UID)
        _begin(found)
        yield found


def _begin(life: Life) -> None:
    own = life.stack
    own.start_application()
    own.psql(LEDGER)
    for _ in range(2):
        command = ("psql", "-X", "-q", "-U", "app", "-d", "app_db", "-c", "CALL trade()")
        own.engine.docker("exec", "--detach", own.container("db"), *command)
    wait_until(lambda: int(own.psql("SELECT count(*) FROM transfers")) > 100, "trade")
    own.compose("up", "-d", *SERVICES)
    wait_until(lambda: own.sealed("globals"), "the first backups", say=own.trouble)
    # Two statements see different states: what isn't one snapshot would show.
    paid, received = own.psql(f"{PAID}; SELECT pg_sleep(1); {RECEIVED}").split()
    assert int(paid) + int(received) != TOTAL
    own.psql("INSERT INTO trade_is_over DEFAULT VALUES")
    done = life.extract()
    assert done.return_code == 0, done.stderr


@contextlib.contextmanager
def _disk(engine: Engine, folder: Path, size_mib: int) -> Iterator[Path]:
    """A filesystem mounted where the daemon sees it, with ``files/`` in it."""
    mount, image = folder / "mount", folder / "image"
    mount.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(size_mib * MIB)
    engine.run(["mkfs.ext4", "-q", "-F", "-m", "0", image])
    _where_the_daemon_is(engine, "mount", "-o", "loop", image, mount)
    try:
        (_seen(engine, mount) / "files").mkdir()
        yield mount
    finally:
        # A test that failed may still hold a file open.
        _where_the_daemon_is(engine, "umount", "--lazy", mount)


def _where_the_daemon_is(engine: Engine, *command: str | Path) -> None:
    engine.run(command) if engine.first_process_id is None else engine.in_namespaces(*command)


def _seen(engine: Engine, path: Path) -> Path:
    """A path in the daemon's mounts, for us."""
    if engine.first_process_id is None:
        return path
    return Path(f"/proc/{engine.first_process_id}/root") / path.relative_to("/")


def main_process(stack: Stack, service: str, before: int = 0) -> int:
    """Our number of the container's first process; of the next one, where ``before`` was the last."""
    identifier = stack.inspect(service, "{{.Id}}")
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        for entry in Path("/proc").glob("[0-9]*"):
            # Gone meanwhile.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                number = int(entry.name)
                if number != before and identifier in (entry / "cgroup").read_text() and _is_first(entry):
                    return number
        time.sleep(0.005)
    return pytest.fail(f"{service} did not come back: {stack.trouble()}")


def _is_first(entry: Path) -> bool:
    status = dict(line.split(":\t", 1) for line in (entry / "status").read_text().splitlines() if ":\t" in line)
    # Not Docker's own that is yet to become it.
    return status["NSpid"].split()[-1] == "1" and status["Name"] == "pgkeep"


def kill(number: int) -> None:
    os.kill(number, signal.SIGKILL)


def hold_dump(life: Life) -> list[int]:
    """Stop pg_dump in the middle of its rows; its processes."""

    def begun() -> list[Path]:
        return [path for path in life.files("staging").glob("*.partial/raw/*.dat*") if path.stat().st_size]

    identifier = soon(begun, "rows")[0].parents[1].name.encode()
    found = [
        int(entry.name) for entry in Path("/proc").glob("[0-9]*") if identifier in (entry / "cmdline").read_bytes()
    ]
    for number in found:
        os.kill(number, signal.SIGSTOP)
    assert found
    return found


def soon(condition: Callable[[], _Found], what: str) -> _Found:
    """As ``wait_until``, looking without a pause: it is a moment that is waited for."""
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        # What is looked at comes and goes.
        with contextlib.suppress(FileNotFoundError):
            if found := condition():
                return found
        time.sleep(0.001)
    return pytest.fail(f"in vain for: {what}")


def cpu_seconds(number: int) -> float:
    """Of all its threads."""
    fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(number: int) -> float:
    (size,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{number}/status").read_text())
    return int(size) / 1024


def children(number: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{number}/task/{number}/children").read_text().split()]


@contextlib.contextmanager
def filled_disk(life: Life, place: str, leave_bytes: int) -> Iterator[None]:
    """So much is left for those who are not root; ext4 keeps something back even from root."""
    facts = os.statvfs(life.disks[place])
    hidden_bytes = (facts.f_bfree - facts.f_bavail) * facts.f_frsize
    with filled(life.disks[place], leave_bytes and leave_bytes + hidden_bytes):
        yield
