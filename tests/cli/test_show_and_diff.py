"""``show`` and ``diff``: what they print is run, and compared with what is there."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import sys
from pathlib import Path

import pytest

from pgkeep.adapters import fsflags, process
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.cli.show import createdb_command, quoted, writes_restrict
from pgkeep.domain.manifest import DatabaseFacts
from tests import clusters
from tests.cli.pair import Two
from tests.clusters import NewDatabase
from tests.integration.keeper import fresh_name, keeping, shell

SOURCE = Path(__file__).parents[2] / "src"


# show


def test_show_says_everything_about_the_latest(two: Two) -> None:
    text = two.keeper.run("show").stdout
    for expected in (
        two.second["id"],
        two.second["sha256"],
        two.database.name,
        "manual",
        "5MB",
        "3 tables, 4002 rows, 1 large objects",
        two.database.cluster.installation.version,
        "sealed",
        str(two.keeper.file(two.second)),
        "UTF8",
    ):
        assert expected in text, expected
    tables = [line.split()[0] for line in text.splitlines() if line.startswith(("odd", "public."))]
    assert tables == ["odd", "public.small", "public.arriving"], "the largest comes first"


def test_show_in_json_has_the_lists_fields_the_manifest_and_the_commands(two: Two) -> None:
    shown = two.keeper.json("show", "latest:daily")
    listed = two.keeper.json("list", "--tier", "daily")[0]
    assert {key: shown[key] for key in listed} == listed
    assert shown["protection_in_force"] is True
    assert shown["ratio"] == pytest.approx(shown["size_bytes"] / shown["raw_bytes"])
    assert len(shown["manifest"]["tables"]) == shown["tables"] == 3
    assert shown["commands"]
    retained = dt.datetime.fromisoformat(shown["retain_until"]) - dt.datetime.fromisoformat(shown["sealed_at"])
    assert retained == dt.timedelta(days=9)


def test_the_table_list_is_cut_at_twenty_unless_all_are_wanted(
    cluster15: ScratchCluster, new_database: NewDatabase
) -> None:
    database = new_database(cluster15)
    database.execute(";".join(f"CREATE TABLE t{number} (a int)" for number in range(23)))
    with keeping(cluster15, database.name) as keeper:
        keeper.backup()
        short, long = keeper.run("show").stdout, keeper.run("show", "--all-tables").stdout
    assert (short.count("public.t"), long.count("public.t")) == (20, 23)
    assert "and 3 smaller ones" in short
    assert "smaller" not in long


def test_the_stock_commands_work_as_they_are_pasted(two: Two, scratch: Path) -> None:
    """Check, make a database, restore with gunzip and psql: into what the source held; then pgkeep's own."""
    commands = [each["command"] for each in two.keeper.json("show", "latest:manual")["commands"]]
    check, roles, make, load, restore = commands
    (scratch / "pgkeep").write_text(f'#!/bin/sh\nPYTHONPATH="{SOURCE}" exec "{sys.executable}" -m pgkeep "$@"\n')
    (scratch / "pgkeep").chmod(0o755)
    cluster = two.database.cluster
    paths = {"PATH": f"{scratch}:{cluster.installation.directory}:{os.environ['PATH']}"}
    servers = {"PGHOST": os.fspath(cluster.socket_directory), "PGUSER": "postgres", "HOME": os.fspath(scratch)}
    export = "export PATH PGHOST PGUSER HOME; "
    with fresh_name(cluster) as target:
        # The suggested name is the same for all: leave it to this test alone.
        for command in (roles, make, load):
            shell(f"{export}{command.replace(' restored', ' ' + target.name)}", **paths, **servers)
        assert target.value('SELECT count(*) FROM "odd schema".large') == 4000
        assert target.value("SELECT sum(a)::int FROM small") == 5
    assert shell(f"{export}{check}", **paths, **servers).stdout.endswith(b".sql.gz: OK\n")
    with fresh_name(cluster) as target:
        shell(f"{export}{restore.replace('=restored', '=' + target.name)}", **paths, **servers)
        assert target.value('SELECT count(*) FROM "odd schema".large') == 4000


def test_roles_have_their_own_stock_command(two: Two) -> None:
    shown = two.keeper.json("show", "latest:globals")
    check, load = (each["command"] for each in shown["commands"])
    assert check.startswith("cd ")
    assert load.endswith("| psql -X -d postgres")
    assert "ON_ERROR_STOP" not in load, "a role that is there already would stop it"
    assert "(roles and tablespaces)" in two.keeper.run("show", "latest:globals").stdout


def test_a_copy_elsewhere_is_described_by_its_manifest(two: Two, scratch: Path) -> None:
    original = two.keeper.file(two.first)
    for name in (original.name, f"{original.name}.manifest.json"):
        shutil.copyfile(original.with_name(name), scratch / name)
    shown = two.keeper.json("show", scratch / original.name)
    assert shown["protection_in_force"] is None
    assert shown["manifest"]["id"] == two.first["id"]
    assert f"pgkeep restore {scratch / original.name} " in shown["commands"][-1]["command"]
    (scratch / f"{original.name}.manifest.json").unlink()
    assert "copy it too" in two.keeper.fails(10, "show", scratch / original.name)


def test_a_path_into_the_vault_is_a_sealed_backup(two: Two) -> None:
    assert two.keeper.json("show", two.keeper.file(two.first))["protection_in_force"] is True


def test_lost_protection_is_shown_and_exits_with_seven(two: Two) -> None:
    clusters.need_root("clearing the immutable flag")
    file = two.keeper.file(two.first)
    fsflags.set_path_flag(file, fsflags.IMMUTABLE, False)
    try:
        answer = two.keeper.run("show", two.first["id"])
        assert answer.code == 7
        assert "NO LONGER in force" in answer.stdout
        assert "has lost its immutable flag" in answer.stderr
        doctor = two.keeper.run("doctor", "--json")
        assert doctor.code == 1
        assert any(each["name"] == "backups" and each["status"] == "fail" for each in doctor.json()["checks"])
    finally:
        fsflags.set_path_flag(file, fsflags.IMMUTABLE, True)
    assert two.keeper.run("show", two.first["id"]).code == 0


@pytest.mark.parametrize(
    ("version", "expected"),
    [("15.13", False), ("15.14", True), ("15.20", True), ("16.9", False), ("16.10", True), ("17.5", False),
     ("17.6", True), ("18.0", True), ("18beta1", True), ("14.18", False), ("14.19", True), ("12.22", False)],
)  # fmt: skip
def test_which_versions_write_restrict(version: str, expected: bool) -> None:
    assert writes_restrict(version) is expected


def test_the_installed_versions_do_as_the_table_says(any_cluster: ScratchCluster) -> None:
    installation = any_cluster.installation
    done = process.run([installation.tool("pg_dump"), "--schema-only", f"--dbname={any_cluster.conninfo()}"])
    assert (b"\n\\restrict " in done.stdout) is writes_restrict(installation.version)


def test_createdb_is_told_the_whole_locale() -> None:
    facts = DatabaseFacts(encoding="UTF8", collate="C", ctype="de_DE.UTF-8", locale_provider="icu", icu_locale="de-AT",
                          icu_rules="&V << w <<< W")  # fmt: skip
    assert createdb_command(facts, "16.1") == (
        "createdb --template=template0 --encoding=UTF8 --lc-collate=C --lc-ctype=de_DE.UTF-8 --locale-provider=icu"
        " --icu-locale=de-AT --icu-rules='&V << w <<< W' restored"
    )
    assert "provider" not in createdb_command(DatabaseFacts(encoding="UTF8", collate="C", ctype="C"), "14.1")


@pytest.mark.parametrize("name", ["plain", "it's", "two\nlines", "\x1b[31mred", "$(touch x)", "-n", "ü", "\udcff"])
def test_quoting_survives_the_shell_and_steers_no_terminal(name: str) -> None:
    assert quoted(name).isprintable()
    done = process.run(["bash", "-c", f"printf %s {quoted('/' + name)}"])
    assert done.stdout == os.fsencode("/" + name)


# diff


def test_diff_names_what_changed(two: Two) -> None:
    found = two.keeper.json("diff", "latest:daily", "latest:manual")
    assert [table["name"] for table in found["added"]] == ["arriving"]
    assert [table["name"] for table in found["gone"]] == ["leaving"]
    changed = {table["name"]: table for table in found["changed"]}
    assert changed["large"]["rows_delta"] == -1000
    assert changed["small"]["digest_only"] is True
    assert found["rows_delta"] == -1001
    text = two.keeper.run("diff", two.first["id"], "latest").stdout
    assert "1 added, 1 gone, 2 changed, 0 unchanged; rows -1001" in text
    assert text.splitlines()[1].split()[:2] == ["added", "public.arriving"]


def test_diff_the_other_way_round_says_so(two: Two) -> None:
    answer = two.keeper.run("diff", "latest:manual", "latest:daily")
    assert answer.code == 0
    assert "the first is the newer one" in answer.stderr
    assert "rows +1001" in answer.stdout


def test_diff_with_itself_finds_nothing(two: Two) -> None:
    assert two.keeper.json("diff", "latest", "latest")["tables_identical"] is True
    assert two.keeper.run("diff", "latest", "latest").stdout.startswith("the tables are identical\n")


def test_diff_needs_two_that_exist(two: Two) -> None:
    two.keeper.fails(2, "diff", "latest")
    two.keeper.fails(10, "diff", "latest", "19990101T000000Z-000000")
