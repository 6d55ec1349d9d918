"""Reading back from a directory on a machine without a vault; and from one where somebody put things."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pgkeep
from pgkeep.adapters.destinations.directory import DirectoryDestination
from pgkeep.adapters.scratch_cluster import ScratchCluster
from tests import elsewhere
from tests.elsewhere import Source, bare_machine, copy_out, path_of
from tests.integration.keeper import Keeper, fresh_name, shell
from tests.outside import spoil

SOURCE = Path(pgkeep.__file__).parents[1]
HERE = "2026-01-31_00-00-00.sql.gz"


@pytest.fixture(scope="module")
def source(cluster15: ScratchCluster) -> Iterator[Source]:
    with elsewhere.source(cluster15) as made:
        yield made


@pytest.fixture
def copies(source: Source, scratch: Path) -> Path:
    """The destination, with both backups and the roles."""
    directory = scratch / "copies"
    directory.mkdir()
    copy_out(source, DirectoryDestination(directory, 0o444, scratch / "no-vault"))
    return directory


@pytest.fixture
def machine(source: Source, scratch: Path) -> Keeper:
    return bare_machine(source, scratch)


def test_list_shows_what_is_there(source: Source, machine: Keeper, copies: Path) -> None:
    listed = machine.json("list", "--from", copies)
    assert [each["id"] for each in listed] == [source.first["id"], source.second["id"]]
    assert [each["path"] for each in listed] == [str(copies / path_of(each)) for each in (source.first, source.second)]
    assert {each["state"] for each in listed} == {"whole"}
    assert {each["destination"] for each in listed} == {str(copies)}
    with_roles = machine.json("list", "--from", copies, "--globals")
    assert [each["kind"] for each in with_roles] == ["database", "globals", "database"]
    assert len(machine.json("list", "--from", copies, "--tier", "manual")) == 1
    table = machine.run("list", "--from", copies).stdout
    assert "PROTECTION" not in table, "the vault's protection does not reach there"
    assert not machine.root.exists()


def test_list_of_an_empty_destination(machine: Keeper, scratch: Path) -> None:
    (scratch / "empty").mkdir()
    assert machine.json("list", "--from", scratch / "empty") == []
    assert "no backups yet" in machine.run("list", "--from", scratch / "empty").stderr
    assert "no backup" in machine.fails(10, "fetch", "latest", "--from", scratch / "empty", "--to", scratch / "to")
    machine.fails(6, "list", "--from", scratch / "missing")


def test_verify_looks_at_the_end_and_deep_at_everything(source: Source, machine: Keeper, copies: Path) -> None:
    shallow = machine.json("verify", "--all", "--from", copies)
    assert (shallow["ok"], shallow["findings"], len(shallow["backups"])) == (True, [], 3)
    assert {each["checked"] for each in shallow["backups"]} == {"index"}
    deep = machine.json("verify", "--all", "--deep", "--from", copies)
    assert {each["checked"] for each in deep["backups"]} == {"content"}
    assert [each["sha256"] for each in deep["backups"]] == [each["sha256"] for each in shallow["backups"]]
    assert "not locked" in machine.run("verify", source.first["id"], "--from", copies).stderr
    assert list(machine.root.parent.glob("restore-*")) == []


def test_damage_in_the_middle_is_for_deep_to_find(source: Source, machine: Keeper, copies: Path) -> None:
    spoil(copies / path_of(source.first))
    assert machine.json("verify", source.first["id"], "--from", copies)["ok"] is True
    answer = machine.run("verify", "--all", "--deep", "--json", "--from", copies)
    assert answer.code == 7
    bad = [each for each in answer.json()["backups"] if not each["ok"]]
    assert [each["id"] for each in bad] == [source.first["id"]]
    assert {finding["code"] for finding in bad[0]["findings"]} == {"content", "checksum", "manifest"}
    assert "shop.large" in str(bad[0]["findings"])


def test_a_damaged_copy_is_neither_fetched_nor_restored(source: Source, machine: Keeper, copies: Path) -> None:
    spoil(copies / path_of(source.first))
    to = machine.root.parent / "fetched"
    assert "digest" in machine.fails(7, "fetch", source.first["id"], "--from", copies, "--to", to)
    assert list(to.iterdir()) == []
    with fresh_name(source.database.cluster) as target:
        arguments = ("restore", source.first["id"], "--from", copies, "--to", target.conninfo, "--create")
        assert "damaged" in machine.fails(7, *arguments)
        made = source.database.value(f"SELECT count(*) FROM pg_database WHERE datname = '{target.name}'")
        assert made == 0, "the database that was made for it is gone again"
        restored = machine.json(*arguments, "--table", "small")
    assert restored["rows"] == 2, "what is whole of it can be had"


def test_restore_of_everything(source: Source, machine: Keeper, copies: Path) -> None:
    with fresh_name(source.database.cluster) as target:
        answer = machine.json("restore", "latest", "--from", copies, "--to", target.conninfo, "--create", "--jobs", "2")
        assert target.value("SELECT count(*) FROM shop.large") == 20000
        assert target.value("SELECT array_agg(a ORDER BY a)::text FROM small") == "{1,2,3}"
        assert target.value("SELECT count(*) FROM pg_largeobject_metadata") == 1
    assert answer["fetched_bytes"] == source.second["size_bytes"]
    assert answer["path"] == str(copies / path_of(source.second))


def test_restore_of_one_table_reads_little(source: Source, machine: Keeper, copies: Path) -> None:
    with fresh_name(source.database.cluster) as target:
        arguments = ("restore", source.first["id"], "--from", copies, "--to", target.conninfo, "--create")
        answer = machine.json(*arguments, "--table", "shop.orders")
        assert target.value("SELECT count(*) FROM shop.orders") == 3000
    assert answer["fetched_bytes"] <= source.table_bytes("orders") + (1 << 20)
    assert answer["fetched_bytes"] < source.second["size_bytes"] / 2


def test_fetch_gives_what_the_vault_has(source: Source, machine: Keeper, copies: Path, scratch: Path) -> None:
    got = machine.json("fetch", "latest", "--from", copies, "--to", scratch / "to")
    original = Path(source.second["path"])
    for path in map(Path, got["files"]):
        assert path.read_bytes() == original.with_name(path.name).read_bytes()
    assert got["ok"] is True
    assert machine.json("verify", got["path"])["ok"] is True
    assert "never overwritten" in _second_fetch_over_another(machine, copies, scratch)


def _second_fetch_over_another(machine: Keeper, copies: Path, scratch: Path) -> str:
    for path in (scratch / "to").glob("*.sql.gz"):
        path.write_bytes(b"precious")
    return machine.fails(11, "fetch", "latest", "--from", copies, "--to", scratch / "to")


def test_the_commands_that_show_prints_work_as_they_are_pasted(
    source: Source, machine: Keeper, copies: Path, scratch: Path
) -> None:
    shown = machine.json("show", source.first["id"], "--from", copies)
    assert shown["path"] == str(copies / path_of(source.first))
    assert shown["protection_in_force"] is None
    purposes = [each["purpose"] for each in shown["commands"]]
    assert purposes[:4] == ["bring it here", "check the file", "bring the roles here",
                            "on a new server: roles and tablespaces first"]  # fmt: skip
    (scratch / "pgkeep").write_text(f'#!/bin/sh\nPYTHONPATH="{SOURCE}" exec "{sys.executable}" -m pgkeep "$@"\n')
    (scratch / "pgkeep").chmod(0o755)
    cluster = source.database.cluster
    environment = {
        "PATH": f"{scratch}:{cluster.installation.directory}:{os.environ['PATH']}",
        "PGHOST": os.fspath(cluster.socket_directory),
        "PGUSER": "postgres",
        "HOME": os.fspath(scratch),
        "PGKEEP_ROOT": os.fspath(machine.root),
    }
    work = scratch / "work"
    work.mkdir()
    *stock, restore = [each["command"] for each in shown["commands"]]
    with fresh_name(cluster) as target:
        for command in stock:
            line = command.replace(" restored", f" {target.name}")
            shell(f"cd {work}; export PATH PGHOST PGUSER HOME PGKEEP_ROOT; {line}", **environment)
        assert target.value("SELECT count(*) FROM small") == 2
    with fresh_name(cluster) as target:
        line = restore.replace("dbname=restored", f"dbname={target.name}")
        shell(f"cd {work}; export PATH PGHOST PGUSER HOME PGKEEP_ROOT; {line}", **environment)
        assert target.value("SELECT count(*) FROM small") == 2


# ---------------------------------------------------------------- what somebody put there


def test_hostile_manifests_are_named_and_nothing_is_written_elsewhere(
    source: Source, machine: Keeper, copies: Path, scratch: Path
) -> None:
    folder = copies / "daily" / HERE[:10]
    folder.mkdir()
    honest = json.loads((copies / f"{path_of(source.first)}.manifest.json").read_text())
    (folder / f"{HERE}.manifest.json").write_text(json.dumps(honest | {"filename": "../../../../tmp/owned.sql.gz"}))
    (folder / f"x{HERE}.manifest.json").write_text("{}")
    (folder / "\x1b[2Jx.sql.gz.manifest.json").write_text("{}")
    os.symlink("/etc/passwd", folder / "2026-01-31_00-00-01.sql.gz.manifest.json")
    os.mkfifo(folder / "2026-01-31_00-00-02.sql.gz.manifest.json")
    answer = machine.run("list", "--from", copies)
    assert answer.code == 7
    assert len(answer.stdout.splitlines()) == 3
    assert answer.stderr.count("warning: daily/2026-01-31/") == 3
    assert "\x1b" not in answer.stderr
    verified = machine.run("verify", "--all", "--json", "--from", copies)
    assert verified.code == 7
    assert [finding["code"] for finding in verified.json()["findings"]] == ["manifest"] * 3
    assert machine.json("fetch", "latest", "--from", copies, "--to", scratch / "to")["id"] == source.second["id"]


def test_a_missing_dump_is_said_by_list_and_verify(source: Source, machine: Keeper, copies: Path) -> None:
    (copies / path_of(source.first)).unlink()
    answer = machine.run("list", "--from", copies, "--json")
    assert answer.code == 7
    assert answer.json()[0]["state"] == "incomplete"
    assert "the dump is missing" in machine.fails(7, "verify", "--all", "--from", copies)
    assert "the dump is missing" in machine.fails(7, "verify", "--all", "--deep", "--from", copies)


def test_the_dump_of_another_backup_is_not_taken_for_this_one(source: Source, machine: Keeper, copies: Path) -> None:
    """Whole and consistent, but not what the manifest describes."""
    path = copies / path_of(source.first)
    path.unlink()
    shutil.copyfile(copies / path_of(source.second), path)
    answer = machine.fails(7, "restore", source.first["id"], "--from", copies, "--to", "host=/nowhere dbname=x")
    assert "manifest" in answer
    machine.fails(7, "fetch", source.first["id"], "--from", copies, "--to", copies.parent / "to")


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "latest", "--deep"],
        ["verify", "latest", "--quick", "--from", "/x"],
        ["verify", "latest", "--all", "--from", "/x"],
        ["fetch", "latest", "--from", "/x"],
        ["fetch", "latest", "--to", "/x"],
    ],
    ids=" ".join,
)
def test_what_makes_no_sense_exits_with_two(arguments: list[str], machine: Keeper) -> None:
    machine.fails(2, *arguments)
