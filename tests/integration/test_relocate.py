"""A vault moves: to every kind of filesystem, past every crash, and never into two places at once."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.errors import RefusedError
from pgkeep.vault import audit_log, moved
from pgkeep.vault.layout import SEALED_DIRECTORIES, Layout
from tests import clusters
from tests.clusters import LoopFilesystem
from tests.faults.machine import TABLES, Machine, Result, all_flags, flags_of, is_flagged

AS_VAULT_USER = (
    *("setpriv", "--reuid=10002", "--regid=10002", "--clear-groups", "--bounding-set=-all,+linux_immutable"),
    *("--inh-caps=-all,+linux_immutable", "--ambient-caps=-all,+linux_immutable", "--no-new-privs"),
)


@pytest.fixture(scope="module")
def database(cluster15: ScratchCluster) -> Iterator[clusters.Database]:
    clusters.need_root("immutable flags")
    with clusters.temporary_database(cluster15) as own:
        own.execute(TABLES)
        yield own


@pytest.fixture
def machine(scratch: Path, database: clusters.Database) -> Machine:
    """A vault with one dump under two names, globals, and logs of others."""
    made = Machine(scratch / "first", database, BACKUP_GLOBALS="auto")
    made.run("backup", "daily", "weekly").must()
    (made.layout.logs / "cron.log").write_text("a line\n")
    return made


def move(machine: Machine, new_root: Path, *options: str, under: tuple[str, ...] = (), **fault: Any) -> Result:
    """``pgkeep vault move`` to its end."""
    return machine.run("vault", "move", str(new_root), *options, under=under, **fault)


def at(machine: Machine, root: Path) -> Machine:
    """The same database with the vault elsewhere."""
    return Machine(root, machine.database, **{**machine.environment, "PGKEEP_ROOT": str(root)})


Content = dict[str, tuple[str, frozenset[str]]]


def content(layout: Layout) -> Content:
    """Every sealed file's digest, and the names that are one file with it."""
    paths = [path for name in SEALED_DIRECTORIES for path in (layout.active / name).iterdir()]
    inodes: dict[int, set[str]] = {}
    for path in paths:
        inodes.setdefault(path.stat().st_ino, set()).add(str(path.relative_to(layout.active)))
    return {
        str(path.relative_to(layout.active)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            frozenset(inodes[path.stat().st_ino]),
        )
        for path in paths
    }


def assert_moved(machine: Machine, new: Machine, before: Content, *, chattr: bool = True) -> None:
    """All of it is there, under the same identity, and it goes on from there."""
    assert content(new.layout) == before
    new.assert_at_rest(chattr=chattr)
    new.assert_whole(protected=chattr)
    assert new.audit()[-1]["event"] == "vault moved"
    records = audit_log.examine(new.layout.audit)
    assert (records.problems, records.notes) == ((), ())
    new.backup("hourly")
    after = audit_log.examine(new.layout.audit)
    assert after.problems == ()
    assert after.records > records.records
    assert new.run("verify", "--all", "--json").must().json["ok"]


def assert_closed(layout: Layout) -> None:
    """The old place: sealed as ever, and said to be none any more."""
    flags = all_flags(layout.active)
    for path in flags:
        if path.parent.name in SEALED_DIRECTORIES or path.name in SEALED_DIRECTORIES:
            assert "i" in flags[path], path
    assert is_flagged(layout.active)
    with pytest.raises(RefusedError, match="was moved from here"):
        moved.refuse(layout.state)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_to_another_filesystem(
    machine: Machine, loop_filesystem: LoopFilesystem, kind: clusters.FilesystemKind
) -> None:
    before = content(machine.layout)
    assert max(len(names) for _, names in before.values()) == 2, "there is a dump under two names"
    identity = (machine.layout.active / "vault.json").read_bytes()
    facts = {name: (machine.layout.active / name).stat() for name in before}
    new = at(machine, loop_filesystem(kind, max(32, clusters.SMALLEST_MIB[kind])) / "deep" / "root")
    shown = move(machine, new.root, "--json").must().json
    assert (shown["ok"], shown["protection"], shown["to"]) == (True, "chattr", str(new.root))
    assert (new.layout.active / "vault.json").read_bytes() == identity
    assert (new.layout.logs / "cron.log").read_text() == "a line\n"
    for name, fact in facts.items():
        there = (new.layout.active / name).stat()
        assert (there.st_mode, there.st_uid, there.st_mtime_ns) == (fact.st_mode, fact.st_uid, fact.st_mtime_ns)
    # The new log goes on from the old one's last record, byte for byte.
    assert new.layout.audit.read_bytes().startswith(machine.layout.audit.read_bytes())
    assert machine.audit()[-1] | {"left_behind": []} == machine.audit()[-1]
    assert (machine.audit()[-1]["event"], machine.audit()[-1]["to"]) == ("vault moved", str(new.root))
    assert_moved(machine, new, before)
    assert_closed(machine.layout)
    assert content(machine.layout) == before


def test_the_old_place_takes_no_more_backups(machine: Machine, scratch: Path) -> None:
    move(machine, scratch / "second").must()
    for verb in (["backup"], ["cleanup"]):
        assert f"was moved from here to {scratch / 'second'}" in machine.run(*verb).must(11).stderr
    assert len(machine.run("list", "--json").must().json) == 2
    assert machine.run("verify", "latest:daily", "--json").must().json["ok"]
    refused = move(machine, scratch / "third").must(11)
    assert f"was moved to {scratch / 'second'}, not to" in refused.stderr
    assert not (scratch / "third").exists()
    # Asked again for the same it has nothing to do.
    move(machine, scratch / "second").must()
    assert at(machine, scratch / "second").audit()[-1]["event"] == "vault moved"


def test_and_the_old_place_goes(machine: Machine, scratch: Path) -> None:
    before = content(machine.layout)
    shown = move(machine, scratch / "second", "--remove-old", "--json").must().json
    assert (shown["removed"], shown["left"]) == (True, [])
    assert not machine.root.exists()
    new = at(machine, scratch / "second")
    assert [record["event"] for record in new.audit()[-2:]] == ["vault moved", "old place removed"]
    new.assert_at_rest()
    assert content(new.layout) == before
    new.backup()


def test_the_old_place_goes_later(machine: Machine, scratch: Path) -> None:
    (machine.layout.staging / "the agent's").touch()
    move(machine, scratch / "second").must()
    new = at(machine, scratch / "second")
    new.backup()
    shown = move(machine, scratch / "second", "--remove-old", "--json").must().json
    assert shown["removed"]
    assert [path.name for path in machine.root.iterdir()] == ["staging"], "the agent's, and nothing else"
    assert f"{machine.layout.staging} stays" in shown["left"][0]
    assert audit_log.examine(new.layout.audit).problems == ()
    new.assert_whole()


def test_to_a_filesystem_that_protects_less(machine: Machine, loop_filesystem: LoopFilesystem, scratch: Path) -> None:
    """And back from it: there, links and modes are lost; here they are made anew."""
    before = content(machine.layout)
    new = at(machine, loop_filesystem("exfat", 64) / "root")
    refused = move(machine, new.root).must(6)
    assert "protects by 'none', here it is 'chattr'" in refused.stderr
    assert "--allow-weaker" in refused.stderr
    machine.backup()
    machine.assert_at_rest()
    before = content(machine.layout)
    shown = move(machine, new.root, "--allow-weaker", "--json").must()
    assert shown.json["protection"] == "none"
    assert {path: digest for path, (digest, _) in content(new.layout).items()} == {
        path: digest for path, (digest, _) in before.items()
    }
    assert {each["state"] for each in json.loads(new.run("list", "--json").stdout)} == {"unprotected"}
    new.run("backup").must()
    back = at(machine, scratch / "back")
    assert move(new, back.root, "--json").must().json["protection"] == "chattr"
    back.assert_at_rest()
    back.assert_whole()
    assert stat.S_IMODE(back.layout.state.stat().st_mode) == 0o700
    assert audit_log.examine(back.layout.audit).problems == ()


# cut off


@contextlib.contextmanager
def noted(text: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(text)
        raise


def steps_of(machine: Machine, root: Path, record: Path, *options: str) -> list[str]:
    move(machine, root, *options, record=str(record)).must()
    seen = record.read_text().splitlines()
    numbered = [(name, seen[: place + 1].count(name)) for place, name in enumerate(seen)]
    begin = seen.index("move.begun")
    # Of what is repeated, the first and the third.
    return [f"{name}#{number}" for place, (name, number) in enumerate(numbered) if place >= begin and number in (1, 3)]


CODES = {"kill": -9, "term": 143, "full": 6}


@pytest.mark.parametrize("actions", [("kill",), ("term", "full")], ids="-".join)
def test_cut_off_at_every_step(machine: Machine, scratch: Path, actions: tuple[str, ...]) -> None:
    """From place to place; what a run was cut off at, the next one brings to its end, whatever has come meanwhile."""
    steps = steps_of(machine, scratch / "0", scratch / "steps")
    if actions != ("kill",):
        steps = [step for step in steps if step.endswith("#1")]
    handed_over, opened = steps.index("move.handed-over#1"), steps.index("move.opened#1")
    assert {"move.marked#1", "move.file-copied#1", "move.closing-recorded#1"} <= set(steps[:handed_over])
    here = at(machine, scratch / "0")
    for place, step in enumerate(steps):
        with noted(step):
            name, _, nth = step.partition("#")
            there = at(machine, scratch / str(place + 1))
            action = actions[place % len(actions)]
            assert move(here, there.root, action=action, at=name, nth=int(nth)).code == CODES[action]
            assert (moved.read(here.layout.state) is not None) == (place >= handed_over)
            assert there.layout.exists == (place >= opened)
            if place < handed_over:
                assert_still_here(here, there, may_be_added=place % 4 == 0)
            here = finished(here, there)
    here.assert_whole()
    here.backup()


def test_killed_after_any_call(machine: Machine, scratch: Path) -> None:
    """Between the steps that have names."""
    here = machine
    for number in range(20, 420, 57):
        with noted(f"after call {number}"):
            there = at(machine, scratch / str(number))
            assert move(here, there.root, action="kill", at="call", nth=number).code in (-9, 0)
            here = finished(here, there)
    here.assert_whole()


def finished(here: Machine, there: Machine) -> Machine:
    """The second run brings it to its end."""
    before = content(here.layout)
    move(here, there.root).must()
    there.assert_at_rest()
    assert content(there.layout) == before
    assert audit_log.examine(there.layout.audit).problems == ()
    assert there.audit()[-1]["event"] == "vault moved"
    assert_closed(here.layout)
    return there


def assert_still_here(here: Machine, there: Machine, *, may_be_added: bool) -> None:
    """The old vault is whole and takes backups; what was begun of the new one is none, and never becomes one."""
    here.assert_at_rest()
    assert audit_log.examine(here.layout.audit).problems == ()
    if any((there.layout.active / name).exists() for name in SEALED_DIRECTORIES):
        assert "identity file is missing" in there.run("backup").must(11).stderr
    if may_be_added:
        here.backup()
    assert here.audit()[-1]["event"] != "vault moved" or not may_be_added


def test_a_move_that_was_cut_off_late_is_taken_back_in_the_log(machine: Machine, scratch: Path) -> None:
    move(machine, scratch / "second", action="full", at="move.opening-recorded").must(6)
    last = machine.audit()[-2:]
    assert [record["event"] for record in last] == ["vault moved", "vault move undone"]
    machine.backup()
    assert audit_log.examine(machine.layout.audit).problems == ()


def test_killed_while_the_old_place_goes(machine: Machine, scratch: Path) -> None:
    steps = steps_of(machine, scratch / "0", scratch / "steps", "--remove-old")
    removing = steps[steps.index("move.removing#1") :]
    assert "unseal.emptied#1" in removing
    here = at(machine, scratch / "0")
    for number, step in enumerate(removing, 1):
        with noted(step):
            name, _, nth = step.partition("#")
            there = at(machine, scratch / str(number))
            before = content(here.layout)
            assert move(here, there.root, "--remove-old", action="kill", at=name, nth=int(nth)).code == -9
            assert content(there.layout) == before
            there.assert_at_rest()
            move(here, there.root, "--remove-old").must()
            assert not here.root.exists()
            here = there
    here.assert_whole()
    assert audit_log.examine(here.layout.audit).problems == ()


def test_what_came_and_went_between_two_tries(machine: Machine, scratch: Path) -> None:
    """A half-made copy is brought up to date: what has expired goes, what was damaged there is copied anew."""
    new = at(machine, scratch / "second")
    assert move(machine, new.root, action="kill", at="move.protected").code == -9
    (sealed,) = (new.layout.active / "daily").glob("*.sql.gz")
    subprocess.run(["chattr", "-i", sealed, sealed.parent, *sealed.parent.glob("*.json")], check=True)
    with sealed.open("r+b") as file:
        file.seek(100)
        file.write(b"damage")
    next(sealed.parent.glob("*.json")).unlink()
    (sealed.parent / "stale").mkdir()
    (sealed.parent / "stale" / "file").touch()
    (new.layout.active / "hourly.txt").symlink_to("/etc/passwd")
    machine.backup("monthly")
    before = content(machine.layout)
    move(machine, new.root).must()
    assert_moved(machine, new, before)


# what is in the way


def make_file(root: Path) -> None:
    (root / "active").mkdir(parents=True)
    (root / "active" / "holiday.jpg").touch()


def make_backup(root: Path) -> None:
    (root / "active" / "daily").mkdir(parents=True)
    (root / "active" / "daily" / "2026-01-01_00-00-00.sql.gz").touch()


def make_log(root: Path) -> None:
    (root / "logs").mkdir(parents=True)
    (root / "logs" / "backup_audit.jsonl").write_text("{}\n")


def make_state(root: Path) -> None:
    (root / "state").mkdir(parents=True)
    (root / "state" / "something").touch()


def make_vault(root: Path) -> None:
    (root / "active").mkdir(parents=True)
    identity = {"format": 1, "id": "f" * 32, "created_at": "2026-01-01T00:00:00Z"}
    (root / "active" / "vault.json").write_text(json.dumps(identity))


def make_half(root: Path) -> None:
    make_vault(root)
    (root / "active" / "vault.json").rename(root / "active" / ".pgkeep-move")


def make_link(root: Path) -> None:
    (root / "active").mkdir(parents=True)
    (root / "active" / "daily").symlink_to("/")


@pytest.mark.parametrize("make", [make_file, make_backup, make_log, make_state, make_vault, make_half, make_link])
def test_nothing_is_ever_mixed_with_what_is_there(
    machine: Machine, scratch: Path, make: Callable[[Path], None]
) -> None:
    new = scratch / "second"
    make(new)
    before = sorted(new.rglob("*"))
    assert str(new) in move(machine, new).must(11).stderr
    assert sorted(new.rglob("*")) == before
    assert moved.read(machine.layout.state) is None
    machine.assert_at_rest()


@pytest.mark.parametrize("place", [".", "active", "active/daily", "..", "link"])
def test_a_place_in_itself(machine: Machine, scratch: Path, place: str) -> None:
    (scratch / "link").symlink_to(machine.root)
    target = scratch / "link" if place == "link" else machine.root / place
    assert "are one place, or one lies in the other" in move(machine, target).must(11).stderr
    machine.assert_at_rest()


def test_what_images_and_mkfs_make_is_not_in_the_way(machine: Machine, loop_filesystem: LoopFilesystem) -> None:
    """A volume of its own for active/, with lost+found in it, and logs that are there and empty."""
    new = at(machine, loop_filesystem("ext4", 32) / "root")
    (new.root / "active" / "lost+found").mkdir(parents=True)
    new.layout.logs.mkdir()
    for name in ("backup_audit.jsonl", "cron.log", "extraction_audit.jsonl"):
        (new.layout.logs / name).touch()
    before = content(machine.layout)
    move(machine, new.root).must()
    assert content(new.layout) == before
    assert (new.layout.logs / "extraction_audit.jsonl").exists()
    (new.root / "active" / "lost+found").stat()
    new.run("backup").must()


def test_no_vault_is_made_by_moving_none(scratch: Path, machine: Machine) -> None:
    nowhere = at(machine, scratch / "nowhere")
    assert "there is no vault" in move(nowhere, scratch / "second").must(10).stderr
    assert not nowhere.root.exists()
    assert not (scratch / "second").exists()


def test_a_disk_that_is_too_small(machine: Machine, loop_filesystem: LoopFilesystem) -> None:
    """Seen before anything is copied; and the reserve is to be free there too."""
    new = at(machine, loop_filesystem("ext4", 2) / "root")
    machine.environment["PGKEEP_RESERVE"] = "100MiB"
    assert "bytes free; what is to come there needs" in move(machine, new.root).must(6).stderr
    assert list(new.layout.active.glob("*/*.gz")) == []
    machine.environment["PGKEEP_RESERVE"] = "0"
    move(machine, new.root).must()


def test_somebody_is_at_work(machine: Machine, scratch: Path) -> None:
    with machine.layout.lock.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "is held by" in move(machine, scratch / "second").must(9).stderr
    assert not (scratch / "second").exists()


# hostile and damaged


def test_hostile_content_leads_nowhere(machine: Machine, scratch: Path) -> None:
    """What was found in a tier is in quarantine: links stay links, and nothing outside is read, changed or removed."""
    outside = scratch / "outside"
    (outside / "directory").mkdir(parents=True)
    (outside / "secret").write_text("mine")
    (outside / "directory" / "file").write_text("mine")
    subprocess.run(["chattr", "+i", outside / "secret"], check=True)
    daily, quarantine = machine.layout.active / "daily", machine.layout.quarantine
    subprocess.run(["chattr", "-i", daily], check=True)
    (daily / "planted").symlink_to(outside / "directory")
    (daily / "planted.sql.gz").symlink_to(outside / "secret")
    (daily / "bad\udcff\nname").write_text("x")
    (quarantine / "tree" / "sub").mkdir(parents=True)
    (quarantine / "tree" / "sub" / "up").symlink_to("../../../../..")
    (quarantine / "tree" / "file").write_text("kept")
    os.mkfifo(quarantine / "fifo")
    os.mknod(quarantine / "null", 0o20666, os.makedev(1, 3))
    new = at(machine, scratch / "second")
    shown = move(machine, new.root, "--remove-old", "--json").must()
    assert sorted(text.rsplit(": ")[-1] for text in shown.json["left_behind"]) == ["a FIFO", "a device"]
    assert shown.json["removed"] is False
    assert "run this again" in shown.stderr
    there = new.layout.quarantine
    assert os.readlink(there / "tree" / "sub" / "up") == "../../../../.."
    assert (there / "tree" / "file").read_text() == "kept"
    links = {os.readlink(path) for path in there.iterdir() if path.is_symlink()}
    assert links == {str(outside / "directory"), str(outside / "secret")}
    assert not (there / "fifo").exists()
    assert move(machine, new.root, "--remove-old", "--json").must().json["removed"]
    assert not machine.root.exists()
    assert (outside / "secret").read_text() == (outside / "directory" / "file").read_text() == "mine"
    assert is_flagged(outside / "secret")
    new.assert_whole()
    assert audit_log.examine(new.layout.audit).problems == ()


def test_what_was_damaged_before_is_said(machine: Machine, scratch: Path) -> None:
    (sealed,) = (machine.layout.active / "daily").glob("*.sql.gz")
    subprocess.run(["chattr", "-i", sealed], check=True)
    with sealed.open("r+b") as file:
        file.seek(100)
        file.write(b"damage")
    result = move(machine, scratch / "second").must()
    assert f"daily/{sealed.name} was damaged before the move" in result.stderr
    assert "has lost its immutable flag" in result.stderr
    assert (scratch / "second" / "active" / "daily" / sealed.name).read_bytes() == sealed.read_bytes()


def test_by_the_vaults_own_user(machine: Machine, scratch: Path) -> None:
    """As in its container: no right but the one to set flags. What it may not give away is named with the remedy."""
    scratch.chmod(0o777)
    subprocess.run(["chattr", "-R", "-f", "-i", "-a", machine.root], check=False)
    subprocess.run(["chown", "-R", "10002:10002", machine.root], check=True)
    subprocess.run(["chown", "10001:10001", machine.layout.logs / "cron.log", machine.layout.staging], check=True)
    new = at(machine, scratch / "second")
    before = content(machine.layout)
    result = move(machine, new.root, "--json", under=AS_VAULT_USER).must()
    assert result.json["protection"] == "chattr"
    assert f"chown 10001:10001 {new.layout.staging} {new.layout.logs / 'cron.log'}" in result.stderr
    new.assert_at_rest()
    assert content(new.layout) == before
    for path in (new.layout.active, new.layout.active / "vault.json", *new.layout.active.glob("daily/*")):
        assert (path.stat().st_uid, path.stat().st_gid) == (10002, 10002)
    assert "a" in flags_of(new.layout.audit)
    assert move(machine, new.root, "--remove-old", "--json", under=AS_VAULT_USER).must().json["removed"]
    assert not machine.root.exists()
