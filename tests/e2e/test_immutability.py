"""What is sealed stays, whoever tries from inside the containers, as the service's user and as root; and `down -v`.

The same commands are tried on files that nothing protects: there every one of them works.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pgkeep.adapters import fsflags
from tests.e2e.conftest import NewStack
from tests.e2e.engine import Engine
from tests.e2e.stack import AGENT_UID, EXTRACTOR_UID, SEALED_NAME, SERVICES, VAULT_UID, Stack, wait_until

ACTIVE = "/backups/active"
AUDIT_LOG = "/backups/logs/backup_audit.jsonl"
NOBODY_UID = 65534
# In the vault its own user works in these; elsewhere they are as closed as the rest.
WORKING_DIRECTORIES = (".incoming", ".outcomes", ".quarantine")


def _python(statements: str) -> str:
    return f"python3 -c '{statements}'"


def _mount(call: str) -> str:
    """A system call of mount(2)'s kind: the programs refuse users by themselves and would prove nothing."""
    say = "sys.exit(os.strerror(ctypes.get_errno()) if failed else 0)"
    return _python(f"import ctypes, os, sys; failed = ctypes.CDLL(None, use_errno=True).{call}; {say}")


ON_FILES: Mapping[str, str] = {
    "write": "echo hack > {it}",
    "append": "echo hack >> {it}",
    "truncate": "truncate -s 0 {it}",
    "overwrite": "dd if=/dev/zero of={it} bs=1 count=1 conv=notrunc status=none",
    "map": _python('import mmap; file = open("{it}", "r+b"); mmap.mmap(file.fileno(), 0)[0] = 0'),
    "copy over": "cp /etc/hostname {it}",
    "copy in place of": "cp --remove-destination /etc/hostname {it}",
    "edit": "sed -i s/a/b/ {it}",
    "rm": "rm -f {it}",
    "mv": "mv {it} {it}.gone",
    "ln": "ln {it} {it}.link",
    "ln -sf": "ln -sf /etc/passwd {it}",
    "chmod": "chmod 0777 {it}",
    "chown": "chown $(id -u):$(id -g) {it}",
    "touch": "touch {it}",
    "touch -d": "touch -d 1990-01-01 {it}",
    "chattr -i": "chattr -i {it} && rm -f {it}",
    "mknod": "mknod {it}.null c 1 3",
    "mkfifo": "mkfifo {it}.pipe",
    "mount --bind": _mount('mount(b"/etc/hostname", b"{it}", None, 4096, None)'),
}
ON_DIRECTORIES: Mapping[str, str] = {
    "plant a file": "echo junk > {it}/2026-01-01_00-00-00.sql.gz",
    "plant a directory": "mkdir {it}/planted",
    "plant a link": "ln -s /etc {it}/planted",
    "plant a pipe": "mkfifo {it}/pipe",
    "mknod": "mknod {it}/null c 1 3",
    "mv": "mv {it} {it}.gone",
    "mv and replace": "mv {it} {it}.old && mkdir {it}",
    "rm -rf": "rm -rf {it}",
    "chmod": "chmod 0777 {it}",
    "chown": "chown $(id -u):$(id -g) {it}",
    "touch": "touch {it}",
    "chattr -i": "chattr -i {it} && rm -rf {it}",
    "mount tmpfs": _mount('mount(b"tmpfs", b"{it}", b"tmpfs", 0, None)'),
    "mount --bind": _mount('mount(b"/tmp", b"{it}", None, 4096, None)'),
}
# The volume's mount itself and what is above it; there is nothing like it to try them on that is not protected.
ON_MOUNTS: Mapping[str, str] = {
    "remount": _mount(f'mount(b"none", b"{ACTIVE}", None, 32, None)'),
    "umount": _mount(f'umount2(b"{ACTIVE}", 2)'),
    "move away": f"mv {ACTIVE} {ACTIVE}.gone",
    "move the parent": "mv /backups /backups.gone",
    "plant beside": "mkdir /backups/planted",
    "over the parent": _mount('mount(b"tmpfs", b"/backups", b"tmpfs", 0, None)'),
    "new root": "chroot / true",
}
NEEDS_CAPABILITY = {"chattr -i", "mknod", "mount --bind", "mount tmpfs"}
REFUSALS = ("Operation not permitted", "Permission denied", "Read-only file system", "PermissionError")
# One process for all commands: {name: command} in, {name: [code, what it said]} out.
TRY_ALL = """
import json, subprocess, sys
def tried(command):
    done = subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout + done.stderr
print(json.dumps({name: tried(command) for name, command in json.loads(sys.argv[1]).items()}))
"""

SUBJECTS = 4
# What the vault grants of one database beside what is due: in a day, a week, four weeks, a year, a day.
MOST = {"hourly": 24 + 12, "daily": 4, "weekly": 2, "monthly": 2, "yearly": 1, "manual": 10}
# Kinds of forged entries that may be sealed: dumps that are whole, under a name that they might have.
VALID = {*MOST, "every tier", "another database"}
# In the agent: keeps a dump that was handed over, then hands over that one, and every sort of junk, again and again.
FLOOD = r"""
import datetime as dt, json, os, pathlib, secrets, shutil, subprocess, sys, time
staging, loot = pathlib.Path("/backups/staging"), pathlib.Path("/backups/staging/loot")
forged = {}

def capture():
    running = subprocess.Popen(["/usr/local/bin/backup.py", "manual"], stderr=subprocess.DEVNULL)
    while not (loot / "request.json").exists():
        for path in staging.glob("*.ready"):
            if json.loads((path / "request.json").read_text())["kind"] == "database":
                shutil.copytree(path, loot)
        time.sleep(0.01)
    running.wait()

def entry(kind, dump=None, text=None, **changes):
    name = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%SZ-") + secrets.token_hex(3)
    made = staging / (name + ".made")
    made.mkdir(mode=0o750)
    request = {**json.loads((loot / "request.json").read_text()), "id": name, "tiers": ["daily"], **changes}
    (made / "request.json").write_text(json.dumps(request) if text is None else text)
    if dump is None:
        os.link(loot / "dump.sql.gz", made / "dump.sql.gz")
    else:
        dump(made / "dump.sql.gz")
    made.rename(staging / (name + ".ready"))
    forged[name] = kind

def sparse(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)

def forge(again=False):
    valid = (loot / "dump.sql.gz").read_bytes()
    for tier, count in {"manual": 10, "daily": 4, "weekly": 3, "monthly": 3, "yearly": 2, "hourly": 1 - again}.items():
        for _ in range(count):
            entry(tier, tiers=[tier], created_at=secrets.choice(["1999-01-01T00:00:00Z", "2999-01-01T00:00:00Z"]))
    entry("every tier", tiers=["daily", "weekly", "monthly", "yearly", "manual"])
    for number in range(0 if again else 4):
        entry("another database", database="stolen %d" % number)
    for tier in ("daily", "yearly"):
        entry("random bytes", lambda path: path.write_bytes(secrets.token_bytes(1 << 20)), tiers=[tier])
        entry("empty", lambda path: path.write_bytes(b""), tiers=[tier])
        entry("cut", lambda path: path.write_bytes(valid[:-1000]), tiers=[tier])
        entry("sparse", sparse, tiers=[tier])
        entry("pipe", os.mkfifo, tiers=[tier])
        entry("link", lambda path: path.symlink_to("/backups/active/vault.json"), tiers=[tier])
        entry("directory", os.mkdir, tiers=[tier])
        entry("nothing", lambda path: None, tiers=[tier])
    entry("no such tier", tiers=["../../etc"])
    entry("another's name", id="20260101T000000Z-000000")
    entry("no request", text="[" * 100000)
    entry("long request", text=" " * (5 << 20))
    for number in range(300):
        (staging / ("yearly%d.ready" % number)).mkdir(exist_ok=True)

{"capture": capture, "forge": forge, "again": lambda: forge(True)}[sys.argv[1]]()
print(json.dumps(forged))
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Position:
    """Where an attacker sits: in a service's container, as whom."""

    service: str
    user: int

    def __str__(self) -> str:
        return f"{self.service.removeprefix('backup-')}-{'root' if self.user == 0 else self.user}"

    def tries(self, stack: Stack, commands: Mapping[str, str]) -> dict[str, tuple[int, str]]:
        """By name: the code, and what was said."""
        driver = ("env", "LC_ALL=C", "python3", "-c", TRY_ALL, json.dumps(dict(commands)))
        return _results(stack.execute(self.service, *driver, user=self.user).stdout)


POSITIONS = (
    Position("backup-agent", AGENT_UID),
    Position("backup-agent", 0),
    Position("backup-extractor", EXTRACTOR_UID),
    Position("backup-extractor", 0),
    # The owner of all that is sealed, without the service's one capability.
    Position("backup-vault", VAULT_UID),
    Position("backup-vault", NOBODY_UID),
)


@pytest.fixture
def sealed(stack: Stack) -> Iterator[Stack]:
    """The stack, whose backups must be the same afterwards: content, owner, mode, names, times, flags."""
    digests, facts = stack.digests(), _facts(stack)
    log = stack.volume("backup-logs") / "backup_audit.jsonl"
    logged = log.read_bytes()
    assert len(digests) > 6
    assert all(fact["immutable"] for fact in facts.values())
    yield stack
    stack.assert_untouched(digests)
    # A backup that is being sealed just now has its directory open for a moment.
    wait_until(lambda: facts.items() <= _facts(stack).items(), f"everything as it was: {facts}", 10.0)
    assert log.read_bytes().startswith(logged)


@pytest.mark.parametrize("position", POSITIONS, ids=str)
class TestFromInside:
    def test_files(self, sealed: Stack, position: Position) -> None:
        dump = f"{ACTIVE}/daily/{sealed.sealed('daily')[-1]}"
        files = [dump, f"{dump}.sha256", f"{dump}.manifest.json", f"{ACTIVE}/vault.json"]
        if position.service != "backup-vault":
            files.append(AUDIT_LOG)
        commands = {f"{name} {it}": command.format(it=it) for it in files for name, command in ON_FILES.items()}
        _assert_refused(position.tries(sealed, commands))

    def test_directories(self, sealed: Stack, position: Position) -> None:
        working = () if position.service == "backup-vault" else WORKING_DIRECTORIES
        names = ("daily", "hourly", "yearly", "globals", *working)
        directories = [ACTIVE, *(f"{ACTIVE}/{name}" for name in names)]
        table = {
            f"{name} {it}": command.format(it=it) for it in directories for name, command in ON_DIRECTORIES.items()
        }
        # A mount point is busy before it is anything else.
        moves = {name: table.pop(name) for name in (f"mv {ACTIVE}", f"mv and replace {ACTIVE}")}
        _assert_refused(position.tries(sealed, table))
        _assert_refused(position.tries(sealed, moves), "Device or resource busy")

    def test_mounts(self, sealed: Stack, position: Position) -> None:
        _assert_refused(position.tries(sealed, ON_MOUNTS), "Device or resource busy")

    def test_the_commands_work_on_what_nothing_protects(self, stack: Stack, position: Position) -> None:
        """Control, in the same container; but for those that need a capability, which it has not."""
        tables = {"files": ON_FILES, "directories": ON_DIRECTORIES}
        commands = {
            f"{kind}: {name}": _on_decoy("/tmp", kind, command)
            for kind, table in tables.items()
            for name, command in table.items()
            if name not in NEEDS_CAPABILITY
        }
        _assert_done(position.tries(stack, commands))


def test_with_capabilities_the_rest_works_too(stack: Stack, engine: Engine) -> None:
    """Control: mount, mknod and ``chattr -i`` are refused for want of capabilities, not of the command."""
    tables = {"files": ON_FILES, "directories": ON_DIRECTORIES}
    commands = {
        f"{kind}: {name}": _on_decoy("/decoy", kind, command, flagged=name == "chattr -i")
        for kind, table in tables.items()
        for name, command in table.items()
        if name in NEEDS_CAPABILITY
    }
    image = stack.inspect("backup-agent", "{{.Config.Image}}")
    rights = ("--cap-add", "LINUX_IMMUTABLE", "--cap-add", "SYS_ADMIN", "--user", "0", "--network", "none")
    driver = ("env", "LC_ALL=C", "python3", "-c", TRY_ALL, json.dumps(commands))
    done = engine.docker("run", "--rm", *rights, "--volume", "/decoy", image, *driver)
    _assert_done(_results(done.stdout))


def test_root_in_the_agent_has_no_capability(stack: Stack) -> None:
    """Nor can it get one: the set that bounds it is empty."""
    for service in ("backup-agent", "backup-extractor"):
        status = stack.execute(service, "cat", "/proc/self/status", user=0).stdout.decode()
        sets = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Cap"))
        assert set(sets.values()) == {"0" * 16}, sets
        assert "NoNewPrivs:\t1" in status


def test_removing_volumes_loses_no_backup(new_stack: NewStack) -> None:
    """``down -v`` and ``docker volume rm -f`` fail on the backups, and a new start finds all of them."""
    own = new_stack("taken-down")
    own.start_application()
    own.start()
    before, folder = own.digests(), own.volume("backup-active")
    down = own.compose("down", "--volumes", "--timeout", "5", check=False)
    assert "operation not permitted" in down.stderr + down.stdout.decode()
    assert _digests_in(folder) == before
    removed = own.engine.docker("volume", "rm", "--force", f"{own.name}-backup-active", check=False)
    assert removed.return_code != 0
    assert "operation not permitted" in removed.stderr
    assert _digests_in(folder) == before
    own.start_application()
    own.compose("up", "-d", *SERVICES)
    wait_until(lambda: "is open, protection chattr" in own.logs("backup-vault"), "the vault", say=own.trouble)
    own.assert_untouched(before)
    own.said(f"docker exec {own.container('backup-agent')} /usr/local/bin/backup.py manual")
    own.assert_untouched(before)
    assert own.sealed("manual")


class TestCapturedAgent:
    """Code in the agent forges what it likes: it costs a bounded part of the disk and takes no backup's place."""

    def test_flood(self, new_stack: NewStack) -> None:
        own = self._started(new_stack)
        before, folder = own.digests(), own.volume("backup-active")
        self._flood(own, "capture")
        first = self._flood(own, "forge")
        _assert_kept(own, before)
        self._assert_within_quotas(own)
        self._assert_all_told(own, first)
        used = _used_bytes(folder)
        second = self._flood(own, "again")
        self._assert_all_told(own, second)
        assert _used_bytes(folder) - used < 256 * 1024, "what is full takes no more"
        _assert_kept(own, before)
        said = own.shell(f"docker exec {own.container('backup-agent')} /usr/local/bin/backup.py hourly")
        assert re.search(r"sealed app_db as hourly/", said.stderr), said.stderr
        _assert_kept(own, before)

    def _started(self, new_stack: NewStack) -> Stack:
        """Every tier is scheduled, so that each could be had; the databases that the vault takes are few."""
        files = "docker-compose.yml:few.yml"
        schedule = {"BACKUP_SCHEDULE_MONTHLY": "0 0 1 * *", "BACKUP_SCHEDULE_YEARLY": "0 0 1 1 *"}
        own = new_stack("flooded", {"COMPOSE_FILE": files, **schedule})
        setting = {"services": {"backup-vault": {"environment": {"PGKEEP_VAULT_SUBJECTS": str(SUBJECTS)}}}}
        (own.directory / "few.yml").write_text(json.dumps({"version": "3.7", **setting}))
        own.start_application()
        own.start()
        return own

    def _flood(self, own: Stack, task: str) -> dict[str, str]:
        """What was forged, by its identifier; every piece of it has been answered."""
        done = own.execute("backup-agent", "python3", "-c", FLOOD, task)
        forged: dict[str, str] = json.loads(done.stdout)
        wait_until(lambda: self._told(own).keys() >= forged.keys(), "an answer to everything", say=own.trouble)
        return forged

    def _told(self, own: Stack) -> dict[str, str]:
        """What is written of each dump that was handed over: its audit record, or the path that it was sealed at."""
        log = own.volume("backup-logs") / "backup_audit.jsonl"
        records = [json.loads(line) for line in log.read_text().splitlines()]
        told = {record["id"]: record["event"] for record in records if "id" in record}
        for manifest in _manifests(own):
            if told.get(manifest["id"]) == "sealed":
                told[manifest.get("staged_id") or manifest["id"]] = "sealed"
        return told

    def _assert_all_told(self, own: Stack, forged: Mapping[str, str]) -> None:
        told = self._told(own)
        wrong = {kind: told[each] for each, kind in forged.items() if kind not in VALID and told[each] == "sealed"}
        assert not wrong
        refused = [each for each, kind in forged.items() if kind in VALID and told[each] == "backup refused"]
        assert refused, "it was no flood"

    def _assert_within_quotas(self, own: Stack) -> None:
        found = collections.Counter(
            (manifest["database"], manifest["type"]) for manifest in _manifests(own) if manifest["kind"] == "database"
        )
        assert found["app_db", "manual"] == MOST["manual"], found
        # One more where a new day's is due in the middle of it.
        beyond = {key: count for key, count in found.items() if count > MOST[key[1]] + 1}
        assert not beyond
        # One of them is the roles.
        assert len({database for database, _ in found}) == SUBJECTS - 1


def _assert_kept(stack: Stack, before: Mapping[str, str]) -> None:
    """Nothing of it is gone or another. Where databases share a vault, new names have the database's in them."""
    assert before.items() <= stack.digests().items()


def _assert_refused(results: Mapping[str, tuple[int, str]], *also: str) -> None:
    """Each ended with an error, and that because the system forbade it: no typing mistake counts."""
    assert results
    allowed = {
        name: (code, said)
        for name, (code, said) in results.items()
        if code == 0 or not any(refusal in said for refusal in (*REFUSALS, *also))
    }
    assert not allowed


def _assert_done(results: Mapping[str, tuple[int, str]]) -> None:
    assert results
    failed = {name: result for name, result in results.items() if result[0] != 0}
    assert not failed


def _on_decoy(folder: str, kind: str, command: str, *, flagged: bool = False) -> str:
    """The command on a file or directory of the attacker's own, made for it."""
    it = "$decoy/daily/1.sql.gz" if kind == "files" else "$decoy/daily"
    made = f"decoy=$(mktemp -d {folder}/decoy-XXXXXX) && mkdir $decoy/daily && echo content > $decoy/daily/1.sql.gz"
    flag = f"chattr +i {it}" if flagged else "true"
    # What runs in another shell has to see the name, not the variable.
    quoted = command.replace("'", "'\"'\"'")
    inner = f"'{quoted}'".replace("{it}", f"'\"{it}\"'")
    return f'{made} && {flag} && sh -c {inner}; code=$?; [ {folder} = /decoy ] || rm -rf "$decoy"; exit $code'


def _results(printed: bytes) -> dict[str, tuple[int, str]]:
    return {name: (code, said) for name, (code, said) in json.loads(printed).items()}


def _facts(stack: Stack) -> dict[str, dict[str, Any]]:
    """By path below ``active/``: what an attacker might change of everything sealed, without the content."""
    folder = stack.volume("backup-active")
    found = {".": _fact(folder)}
    for path in (each for each in folder.rglob("*") if not each.relative_to(folder).parts[0].startswith(".")):
        if path.is_dir() or SEALED_NAME.fullmatch(f"./{path.relative_to(folder)}"):
            found[str(path.relative_to(folder))] = _fact(path)
    return found


def _fact(path: Path) -> dict[str, Any]:
    facts = path.lstat()
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        immutable = fsflags.has_flag(descriptor, fsflags.IMMUTABLE)
    finally:
        os.close(descriptor)
    always = {"inode": facts.st_ino, "mode": facts.st_mode, "owner": facts.st_uid, "immutable": immutable}
    if stat.S_ISDIR(facts.st_mode):
        return always
    return {**always, "links": facts.st_nlink, "size": facts.st_size, "time": facts.st_mtime_ns}


def _digests_in(folder: Path) -> dict[str, str]:
    """As ``Stack.digests()``, where no vault runs."""
    files = [
        path for path in folder.rglob("*") if path.is_file() and not path.relative_to(folder).parts[0].startswith(".")
    ]
    return {f"./{path.relative_to(folder)}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _manifests(stack: Stack) -> list[dict[str, Any]]:
    found = stack.volume("backup-active").glob("[a-z]*/*.manifest.json")
    return [json.loads(path.read_text()) for path in found]


def _used_bytes(folder: Path) -> int:
    """On the disk, every inode once."""
    inodes = {(facts := path.lstat()).st_ino: facts.st_blocks * 512 for path in folder.rglob("*")}
    return sum(inodes.values())
