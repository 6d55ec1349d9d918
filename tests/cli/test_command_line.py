"""The command line itself: help, exit codes, what goes to stdout, and what never leaves the process."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import re
import shlex
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgkeep.adapters import process
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.cli.main import _VERBS
from tests.clusters import Database, NewDatabase
from tests.integration.keeper import Keeper, fresh_name, keeping, reach, stock_restore

COMMANDS = [["config", "show"] if verb == "config" else [verb] for verb in _VERBS]
# Every kind of character that a passfile, a shell or a connection string could trip over.
PASSWORD = "s3cr3t :\\'\"=%$ wörd"
ESCAPE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
# A terminal obeys these; the line's end would begin a line that pgkeep never wrote.
STEERING = "t\x1b[2J\x1b]0;title\x07\r\nok    forged\x9b"


@pytest.fixture
def keeper(cluster15: ScratchCluster, new_database: NewDatabase) -> Iterator[Keeper]:
    """A vault of one's own and an empty database; nothing in the vault yet."""
    with keeping(cluster15, new_database(cluster15).name) as own:
        yield own


# help


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_verb_explains_itself(command: list[str], scratch: Path) -> None:
    answer = Keeper(scratch, {}).run(*command, "--help")
    assert (answer.code, answer.stderr) == (0, "")
    assert "Examples:" in answer.stdout
    assert f"pgkeep {' '.join(command)}" in answer.stdout.split("Examples:")[1]
    assert "--json" in answer.stdout


def test_the_groups_help_lists_every_verb(scratch: Path) -> None:
    answer = Keeper(scratch, {}).run("--help")
    assert answer.code == 0
    assert [verb for verb in _VERBS if f"\n  {verb} " not in answer.stdout] == []


def test_help_needs_no_valid_configuration(scratch: Path) -> None:
    assert Keeper(scratch, {"DB_PORT": "x"}).run("backup", "--help").code == 0


# exit codes


@pytest.mark.parametrize(
    "arguments",
    [["conquer"], ["list", "--colour"], ["backup", "fortnightly"], ["diff", "latest"], ["restore", "latest"],
     ["verify"], ["verify", "latest", "--all"], ["backup", "--wait", "soon"]],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_command_line_exits_with_two(arguments: list[str], keeper: Keeper) -> None:
    assert keeper.fails(2, *arguments).startswith("pgkeep: ")
    assert not keeper.root.exists(), "nothing is made for a command that makes no sense"


@pytest.mark.parametrize(
    ("variables", "arguments", "code", "words"),
    [
        ({"DB_PORT": "70000"}, ["backup"], 3, "1 to 65535"),
        ({"PGKEEP_ROOOT": "/x"}, ["list"], 3, "did you mean PGKEEP_ROOT?"),
        ({"DB_NAME": "nowhere"}, ["backup"], 4, '"nowhere" does not exist'),
        ({"DB_USER": "nobody_here"}, ["backup"], 4, "nobody_here"),
        ({"DB_HOST": "/nonexistent"}, ["backup"], 4, "/nonexistent"),
        ({"PGKEEP_PG_BIN": "/nonexistent"}, ["backup"], 5, "PGKEEP_PG_BIN=/nonexistent"),
        ({"PGKEEP_ROOT": "/proc/nonexistent"}, ["backup"], 6, "/proc/nonexistent"),
        ({}, ["list"], 10, "there is no vault"),
        ({}, ["show"], 10, "there is no vault"),
        ({}, ["diff", "latest", "latest"], 10, "there is no vault"),
        ({}, ["cleanup"], 10, "there is no vault"),
        ({}, ["verify", "--all"], 10, "there is no vault"),
        ({}, ["verify", "/nonexistent/x.sql.gz"], 10, "/nonexistent/x.sql.gz"),
        ({}, ["restore", "latest", "--to", "dbname=x"], 10, "there is no vault"),
        ({}, ["doctor", "--config", "/nonexistent.toml"], 1, "1 failures"),
    ],
)
def test_each_kind_of_failure_has_its_exit_code_and_a_remedy(
    variables: dict[str, str], arguments: list[str], code: int, words: str, keeper: Keeper
) -> None:
    text = keeper.of(**variables).fails(code, *arguments)
    assert words in text
    if code != 1:
        assert text.rstrip().splitlines()[-1].startswith("        "), f"no remedy: {text}"


def test_a_file_that_is_no_backup_exits_with_seven(keeper: Keeper, scratch: Path) -> None:
    (scratch / "x.sql.gz").write_bytes(gzip.compress(b"SELECT 1;\n"))
    keeper.fails(7, "verify", scratch / "x.sql.gz")
    keeper.fails(7, "restore", scratch / "x.sql.gz", "--to", f"host={keeper.environment['DB_HOST']} dbname=x")


def test_a_target_that_is_not_empty_exits_with_eleven(keeper: Keeper, cluster15: ScratchCluster) -> None:
    Database(cluster15, keeper.environment["DB_NAME"]).execute("CREATE TABLE t (a int)")
    keeper.backup()
    target = cluster15.conninfo(keeper.environment["DB_NAME"])
    assert "not empty" in keeper.fails(11, "restore", "latest", "--to", target)


@pytest.mark.parametrize("position", ["before", "after"])
def test_an_error_is_one_json_object_on_stdout(position: str, keeper: Keeper) -> None:
    answer = keeper.run(*(["--json", "list"] if position == "before" else ["list", "--json"]))
    document = answer.json()
    assert (answer.code, document["ok"], document["exit_code"]) == (10, False, 10)
    assert "there is no vault" in document["error"]
    assert document["hint"]


def test_findings_are_one_json_object_too(keeper: Keeper) -> None:
    keeper.backup()
    sidecar = keeper.root / "copy.sql.gz"
    sidecar.write_bytes(b"not a backup")
    answer = keeper.run("verify", sidecar, "--json")
    assert answer.code == 7
    assert answer.json()["ok"] is False
    assert answer.json()["findings"]


# stdout


def test_stdout_holds_data_alone(keeper: Keeper, cluster15: ScratchCluster) -> None:
    sealed = keeper.run("backup", "daily")
    assert (sealed.code, sealed.stdout) == (0, "")
    assert "sealed" in sealed.stderr
    for arguments in (["list"], ["show"], ["diff", "latest", "latest"], ["verify", "latest"], ["verify", "--all"],
                      ["cleanup", "--dry-run"], ["doctor"], ["config", "show"], ["backup"]):  # fmt: skip
        answer = keeper.run(*arguments, "--json")
        assert answer.code == 0, answer.stderr
        answer.json()
    with fresh_name(cluster15) as target:
        answer = keeper.run("restore", "latest:daily", "--to", target.conninfo, "--create", "--json")
    assert answer.json()["ok"] is True


def test_a_reader_that_leaves_early_is_no_traceback(keeper: Keeper) -> None:
    keeper.backup()
    program = shlex.join(["env", *(f"{name}={value}" for name, value in keeper.environment.items()), sys.executable])
    # The reader has left before the first line is written.
    done = process.run(["bash", "-c", f"{program} -m pgkeep show --json | true; echo ${{PIPESTATUS[0]}}"])
    assert done.stderr == ""
    assert done.stdout in (b"0\n", b"1\n")


# what steers a terminal


def test_a_name_from_the_database_steers_no_terminal(keeper: Keeper, cluster15: ScratchCluster) -> None:
    database = Database(cluster15, keeper.environment["DB_NAME"])
    quoted = '"' + STEERING + '"'
    database.execute(f"CREATE TABLE {quoted} (a int); CREATE SCHEMA {quoted}")
    keeper.backup("daily")
    database.execute(f"DROP TABLE {quoted}; CREATE TABLE {quoted}.{quoted} (a int)")
    keeper.backup("manual")
    for arguments in (["list"], ["show"], ["diff", "latest:daily", "latest:manual"], ["verify", "--all"], ["doctor"],
                      ["cleanup", "--dry-run"], ["show", STEERING], ["verify", STEERING],
                      ["restore", STEERING, "--to", "dbname=x"],
                      ["restore", "latest:manual", "--to", database.conninfo]):  # fmt: skip
        answer = keeper.run(*arguments)
        assert "Traceback" not in answer.stderr, answer.stderr
        for text in (answer.stdout, answer.stderr):
            assert not ESCAPE.search(text), f"{arguments}: {text!r}"
            assert "\nok    forged" not in text, f"{arguments}: {text!r}"
    assert r"t\x1b[2J" in keeper.run("show").stdout


def test_the_servers_words_steer_no_terminal(keeper: Keeper) -> None:
    for variables in ({"DB_NAME": STEERING}, {"DB_USER": STEERING}, {"DB_HOST": f"/{STEERING}"}):
        for arguments in (["backup"], ["doctor"]):
            answer = keeper.of(**variables).run(*arguments)
            assert answer.code != 0
            assert not ESCAPE.search(answer.stdout + answer.stderr), repr(answer)


# secrets


@dataclasses.dataclass
class Watch:
    """What was seen in the command lines and environments of all other processes."""

    seen: set[bytes] = dataclasses.field(default_factory=set)
    _ended: threading.Event = dataclasses.field(default_factory=threading.Event)

    def look(self) -> None:
        while not self._ended.is_set():
            for running in Path("/proc").glob("[0-9]*"):
                for name in ("cmdline", "environ"):
                    # It may have ended, or be another user's.
                    with contextlib.suppress(OSError):
                        self.seen.add((running / name).read_bytes())

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self.look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def saw(self, text: str) -> bool:
        return any(text.encode() in each for each in self.seen)


@pytest.fixture(scope="module")
def locked() -> Iterator[ScratchCluster]:
    """A server whose role ``app`` has to say its password."""
    with ScratchCluster(15) as cluster:
        database = Database(cluster, "postgres")
        literal = PASSWORD.replace("'", "''")
        database.execute(f"SET standard_conforming_strings = on; CREATE ROLE app SUPERUSER LOGIN PASSWORD '{literal}'")
        rules = cluster.data_directory / "pg_hba.conf"
        rules.write_text("local all app scram-sha-256\nlocal all all trust\n")
        database.execute("SELECT pg_reload_conf()")
        database.execute("CREATE TABLE t AS SELECT g, md5(g::text) FROM generate_series(1, 300000) AS g")
        yield cluster


@pytest.fixture
def guarded(locked: ScratchCluster, scratch: Path) -> Keeper:
    (scratch / "password").write_text(PASSWORD + "\n")
    secret = {"DB_PASSWORD_FILE": os.fspath(scratch / "password"), "DB_USER": "app", "MARKER": "seen-by-the-watch"}
    return Keeper(scratch / "backups", {**reach(locked, "postgres"), **secret})


def test_a_wrong_password_exits_with_four_and_is_not_repeated(guarded: Keeper, scratch: Path) -> None:
    (scratch / "password").write_text("wr0ng-passw0rd\n")
    for arguments in (["backup"], ["backup", "--json"], ["backup", "--debug"]):
        answer = guarded.run(*arguments)
        assert answer.code == (1 if "--debug" in arguments else 4)
        assert "password authentication failed" in answer.stderr
        assert "wr0ng" not in answer.stdout + answer.stderr
    assert "DB_PASSWORD_FILE" in guarded.fails(4, "backup")


def test_the_password_shows_nowhere(guarded: Keeper, scratch: Path) -> None:
    """Not in the process list, in no environment, in no output, in nothing that was written."""
    said = []
    with Watch() as watch:
        for arguments in (["backup", "--json"], ["backup", "daily"], ["doctor"], ["config", "show"], ["list"]):
            answer = guarded.run(*arguments)
            assert answer.code == 0, answer.stderr
            said.append(answer.stdout + answer.stderr)
    assert watch.saw("pg_dump\0--format=directory"), "the watch was too slow to see pg_dump: it proves nothing"
    assert watch.saw("seen-by-the-watch"), "the watch sees no environments: it proves nothing"
    for part in (PASSWORD, "s3cr3t"):
        assert not watch.saw(part)
        assert not any(part in text for text in said)
    (scratch / "password").unlink()
    assert [path for path in scratch.rglob("*") if path.is_file() and b"s3cr3t" in whole(path)] == []


def whole(path: Path) -> bytes:
    """A file's bytes, and its text where it is compressed."""
    data = path.read_bytes()
    return data + gzip.decompress(data) if path.name.endswith(".gz") else data


def test_a_password_in_the_target_is_used_warned_about_and_not_repeated(
    guarded: Keeper, locked: ScratchCluster
) -> None:
    guarded.run("backup")
    with fresh_name(locked) as target:
        escaped = PASSWORD.replace("\\", "\\\\").replace("'", "\\'")
        to = f"host={locked.socket_directory} user=app password='{escaped}' dbname={target.name}"
        with Watch() as watch:
            answer = guarded.run("restore", "latest", "--to", to, "--create")
        assert answer.code == 0, answer.stderr
        assert target.value("SELECT count(*) FROM t") == 300_000
    assert "shows in the process list" in answer.stderr
    assert "s3cr3t" not in answer.stdout + answer.stderr
    restorers = [each for each in watch.seen if b"pg_restore\0" in each]
    assert restorers, "the watch was too slow to see pg_restore: it proves nothing"
    assert [each for each in restorers if b"s3cr3t" in each] == []


# large objects


def test_a_single_empty_large_object_is_backed_up(
    keeper: Keeper, cluster15: ScratchCluster, new_database: NewDatabase
) -> None:
    """A list of large objects without any text: its part still needs a member."""
    Database(cluster15, keeper.environment["DB_NAME"]).execute("SELECT lo_create(77)")
    file = keeper.backup()
    assert keeper.json("verify", "latest")["ok"] is True
    with fresh_name(cluster15) as target:
        keeper.restore("latest", target.conninfo, "--create")
        assert target.value("SELECT oid::int FROM pg_largeobject_metadata") == 77
    target = new_database(cluster15)
    stock_restore(file, target)
    assert target.value("SELECT oid::int FROM pg_largeobject_metadata") == 77


def test_the_programs_directory_is_taken_from_the_environment(keeper: Keeper, cluster15: ScratchCluster) -> None:
    named = keeper.of(PGKEEP_PG_BIN=os.fspath(cluster15.installation.directory))
    tools = [each["message"] for each in named.json("doctor")["checks"] if each["name"] == "tools"]
    assert "(configured)" in tools[0]
    assert f"PGKEEP_PG_BIN = {json.dumps(named.environment['PGKEEP_PG_BIN'])}" in named.run("config", "show").stdout
    assert named.json("config", "show")["PGKEEP_PG_BIN"] == named.environment["PGKEEP_PG_BIN"]
    assert keeper.json("config", "show")["PGKEEP_PG_BIN"] is None
