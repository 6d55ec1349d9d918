"""Giving a vault up on purpose: only when it is named, all of it, and nothing beside it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.errors import RefusedError, StorageError
from pgkeep.progress import Silent
from pgkeep.vault import audit_log, unseal
from pgkeep.vault.layout import read_identity
from tests import clusters
from tests.clusters import LoopFilesystem
from tests.faults.machine import TABLES, WITHOUT_CAPABILITY, Machine, all_flags, flags_of, is_flagged

AS_OWNER = ("setpriv", "--reuid=10002", "--regid=10002", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all")


@pytest.fixture(scope="module")
def database(cluster15: ScratchCluster) -> Iterator[clusters.Database]:
    clusters.need_root("immutable flags")
    with clusters.temporary_database(cluster15) as own:
        own.execute(TABLES)
        yield own


@pytest.fixture
def machine(scratch: Path, database: clusters.Database) -> Machine:
    made = Machine(scratch / "root", database)
    made.run("backup", "daily", "weekly").must()
    return made


def identifier(machine: Machine) -> str:
    return read_identity(machine.layout).id


def flagged(root: Path) -> list[Path]:
    return [path for path, flags in all_flags(root).items() if set(flags) & {"i", "a"}]


def uninstall(machine: Machine, *options: str, **fault: Any) -> Any:
    return machine.run("uninstall", "--confirm", identifier(machine), *options, **fault)


def test_without_the_id_it_only_says_what_it_would_do(machine: Machine) -> None:
    before = flagged(machine.root), machine.layout.audit.read_bytes()
    for options in ([], ["--delete"]):
        result = machine.run("uninstall", *options).must(2)
        command = f"uninstall --confirm {identifier(machine)}{' --delete' if options else ''}"
        assert command in result.stderr
        assert f"holds 2 backups. This would\n  lift every flag in {machine.layout.active}" in result.stdout
        assert ("  remove " in result.stdout) == bool(options)
    shown = machine.run("uninstall", "--json").must(2).json
    assert (shown["ok"], identifier(machine) in shown["hint"]) == (False, True)
    machine.run("uninstall", "--confirm", "0" * 32).must(2)
    machine.run("uninstall", "--confirm", "").must(2)
    assert (flagged(machine.root), machine.layout.audit.read_bytes()) == before
    machine.assert_at_rest()


def test_every_flag_goes_and_that_is_the_last_record(machine: Machine) -> None:
    machine.run("backup", "hourly").must()
    shown = uninstall(machine, "--json").must().json
    assert (shown["ok"], shown["backups"], shown["removed"]) == (True, 3, [])
    assert flagged(machine.root) == []
    last = machine.audit()[-1]
    assert (last["event"], last["id"]) == ("protection removed", identifier(machine))
    assert audit_log.examine(machine.layout.audit).problems == ()
    assert {each["state"] for each in json.loads(machine.run("list", "--json").stdout)} == {"unprotected"}
    shutil.rmtree(machine.root)


@pytest.mark.parametrize("protection", ["chattr", "mode"])
def test_its_owner_can_remove_it_then(scratch: Path, database: clusters.Database, protection: str) -> None:
    """Without any capability: directories are open to their owner again, whatever closed them."""
    machine = Machine(scratch / "root", database, PGKEEP_PROTECTION=protection)
    machine.run("backup").must()
    (machine.layout.quarantine / "closed").mkdir(mode=0o000)
    uninstall(machine).must()
    subprocess.run(["chown", "-R", "10002:10002", machine.root], check=True)
    scratch.chmod(0o777)
    subprocess.run([*AS_OWNER, "rm", "-r", machine.root], check=True, stdin=subprocess.DEVNULL)
    assert not machine.root.exists()


def test_and_all_is_deleted_but_the_logs(machine: Machine) -> None:
    (machine.layout.staging / "20260101T000000Z-abcdef.partial" / "raw").mkdir(parents=True)
    own = identifier(machine)
    shown = uninstall(machine, "--delete", "--json").must().json
    assert (shown["left"], len(shown["removed"])) == ([], 3)
    assert [path.name for path in machine.root.iterdir()] == ["logs"]
    assert machine.audit()[-1]["delete"] is True
    assert "there is no vault" in machine.run("uninstall", "--confirm", own).must(10).stderr
    # What is left stands in nobody's way.
    machine.backup()
    assert audit_log.examine(machine.layout.audit).problems == ()


def test_a_mount_point_is_emptied_and_stays(
    scratch: Path, database: clusters.Database, loop_filesystem: LoopFilesystem
) -> None:
    machine = Machine(scratch / "root", database)
    machine.layout.active.mkdir(parents=True)
    subprocess.run(["mount", "--bind", loop_filesystem("ext4", 16), machine.layout.active], check=True)
    try:
        machine.run("backup").must()
        shown = uninstall(machine, "--delete", "--json").must().json
        assert len(shown["left"]) == 1
        assert f"{machine.layout.active} stays" in shown["left"][0]
        assert [path.name for path in machine.layout.active.iterdir()] == ["lost+found"]
    finally:
        subprocess.run(["umount", machine.layout.active], check=True)


def test_staging_that_is_read_only_stays(machine: Machine) -> None:
    """As the vault's container mounts it."""
    (machine.layout.staging / "20260101T000000Z-abcdef.partial").mkdir()
    subprocess.run(["mount", "--bind", machine.layout.staging, machine.layout.staging], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", machine.layout.staging], check=True)
        shown = uninstall(machine, "--delete", "--json").must().json
        assert any("read-only" in text for text in shown["left"])
        assert sorted(path.name for path in machine.root.iterdir()) == ["logs", "staging"]
    finally:
        subprocess.run(["umount", machine.layout.staging], check=True)


@pytest.mark.parametrize("options", [[], ["--delete"]], ids=["keep", "delete"])
def test_killed_at_every_step_the_next_run_ends_it(
    scratch: Path, database: clusters.Database, options: list[str]
) -> None:
    """As soon as one flag is gone, the log says so."""
    first = Machine(scratch / "first", database)
    first.run("backup", "daily", "weekly").must()
    record = scratch / "steps"
    uninstall(first, *options, record=str(record)).must()
    seen = record.read_text().splitlines()
    steps = [(name, nth) for name in dict.fromkeys(seen) for nth in (1, 4) if seen.count(name) >= nth]
    assert ("unseal.directory-cleared", 4) in steps
    for number, (name, nth) in enumerate(steps):
        machine = Machine(scratch / str(number), database)
        machine.run("backup", "daily").must()
        before = len(flagged(machine.root))
        assert uninstall(machine, *options, action="kill", at=name, nth=nth).code == -9
        if len(flagged(machine.root)) < before:
            assert machine.audit()[-1]["event"] == "protection removed"
        uninstall(machine, *options).must()
        assert flagged(machine.root) == []
        assert audit_log.examine(machine.layout.audit).problems == ()
        if options:
            assert [path.name for path in machine.root.iterdir()] == ["logs"]


def test_without_the_capability_nothing_is_done(machine: Machine) -> None:
    before = flagged(machine.root), machine.layout.audit.read_bytes()
    result = machine.run("uninstall", "--confirm", identifier(machine), "--delete", under=WITHOUT_CAPABILITY).must(6)
    assert "cap_add" in result.stderr
    assert (flagged(machine.root), machine.layout.audit.read_bytes()) == before


def test_not_while_the_vault_runs(machine: Machine) -> None:
    with machine.layout.lock.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "is held by" in uninstall(machine, "--delete").must(9).stderr
    machine.assert_at_rest()


def test_on_a_full_disk(database: clusters.Database, loop_filesystem: LoopFilesystem) -> None:
    """The reserve makes room for the record."""
    machine = Machine(loop_filesystem("ext4", 16) / "root", database)
    machine.run("backup").must()
    with (machine.root / "ballast").open("wb") as file:
        for block in (1 << 20, 4096, 1):
            try:
                while os.write(file.fileno(), b"\1" * block):
                    pass
            except OSError:
                continue
    uninstall(machine, "--delete").must()
    assert sorted(path.name for path in machine.root.iterdir()) == ["ballast", "logs"]


# hostile content


@pytest.fixture
def outside(scratch: Path) -> Path:
    """What must not be touched: a sealed file, and a directory."""
    directory = scratch / "outside"
    (directory / "inner").mkdir(parents=True)
    (directory / "secret").write_text("mine")
    (directory / "inner" / "file").write_text("mine")
    subprocess.run(["chattr", "+i", directory / "secret", directory / "inner"], check=True)
    return directory


def assert_untouched(outside: Path) -> None:
    assert (outside / "secret").read_text() == (outside / "inner" / "file").read_text() == "mine"
    assert is_flagged(outside / "secret")
    assert "i" in flags_of(outside / "inner")


@pytest.mark.parametrize("options", [[], ["--delete"]], ids=["keep", "delete"])
def test_links_and_pipes_lead_nowhere(machine: Machine, outside: Path, options: list[str]) -> None:
    active = machine.layout.active
    subprocess.run(["chattr", "-i", active, active / "daily"], check=True)
    (active / "daily" / "link").symlink_to(outside / "secret")
    (active / "daily" / "directory").symlink_to(outside / "inner")
    (active / "yearly-link").symlink_to(outside)
    (machine.layout.staging / "20260101T000000Z-abcdef.ready").symlink_to(outside)
    (machine.layout.quarantine / "up").symlink_to("../../../outside")
    os.mkfifo(active / "daily" / "fifo")
    os.mknod(active / "null", 0o20666, os.makedev(1, 3))
    uninstall(machine, *options).must()
    assert flagged(machine.root) == []
    assert_untouched(outside)
    assert active.exists() == (not options)


@pytest.mark.parametrize("name", ["active", "state", "logs", "staging"])
def test_a_directory_of_the_root_that_is_a_link(machine: Machine, scratch: Path, name: str) -> None:
    own = identifier(machine)
    flags = flagged(machine.root)
    subprocess.run(["chattr", "-i", machine.layout.active], check=True)
    (machine.root / name).rename(scratch / "elsewhere")
    subprocess.run(["chattr", "+i", scratch / "elsewhere" if name == "active" else machine.layout.active], check=True)
    (machine.root / name).symlink_to(scratch / "elsewhere")
    result = machine.run("uninstall", "--confirm", own, "--delete").must(11)
    assert f"{machine.root / name} is a symbolic link" in result.stderr
    assert len(flagged(machine.root)) + len(flagged(scratch / "elsewhere")) >= len(flags)


def test_directories_nested_without_end(machine: Machine) -> None:
    """Deeper than Python recurses, and than descriptors last."""
    here = os.open(machine.layout.staging, os.O_RDONLY)
    for depth in range(3000):
        os.mkdir("d", dir_fd=here)
        if depth % 100 == 0:
            os.close(os.open(f"file{depth}", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    shown = uninstall(machine, "--delete", "--json").must().json
    assert shown["left"] == []
    assert [path.name for path in machine.root.iterdir()] == ["logs"]


def test_another_filesystem_within_is_not_entered(machine: Machine, loop_filesystem: LoopFilesystem) -> None:
    other = loop_filesystem("ext4", 8)
    (other / "file").write_text("mine")
    subprocess.run(["chattr", "+i", other / "file"], check=True)
    place = machine.layout.quarantine / "mounted"
    place.mkdir()
    subprocess.run(["mount", "--bind", other, place], check=True)
    try:
        assert "is another filesystem" in uninstall(machine, "--delete").must(11).stderr
        assert (other / "file").read_text() == "mine"
        assert is_flagged(other / "file")
    finally:
        subprocess.run(["umount", place], check=True)
        subprocess.run(["chattr", "-i", other / "file"], check=True)
    uninstall(machine, "--delete").must()


def test_removing_one_entry(scratch: Path) -> None:
    """Whatever it is, flags or not; and what is not there is fine."""
    clusters.need_root("immutable flags")
    (scratch / "tree" / "inner").mkdir(parents=True)
    (scratch / "tree" / "inner" / "file").write_text("x")
    (scratch / "tree" / "link").symlink_to("/etc")
    subprocess.run(["chattr", "+i", scratch / "tree" / "inner" / "file", scratch / "tree" / "inner"], check=True)
    directory = os.open(scratch, os.O_RDONLY)
    try:
        unseal.remove_entry(directory, "nothing")
        unseal.remove_entry(directory, "tree")
        (scratch / "link").symlink_to("/etc")
        with pytest.raises(OSError, match="symbolic link"):
            unseal.open_regular(directory, "link")
        os.mkfifo(scratch / "fifo")
        with pytest.raises(RefusedError, match="no regular file"):
            unseal.open_regular(directory, "fifo")
    finally:
        os.close(directory)
    assert sorted(path.name for path in scratch.iterdir()) == ["fifo", "link"]
    with pytest.raises(StorageError, match="it does not exist"):
        unseal.clear(scratch / "nowhere", Silent())
