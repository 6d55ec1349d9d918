"""Where a dump comes from: several databases, roles, poolers, standbys, logins of every kind, objects of every kind."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from pgkeep.adapters import process
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.demo import awkward
from tests import clusters
from tests.clusters import MAJORS, Clusters, Database
from tests.integration import keeper
from tests.integration.keeper import Keeper

FAILED = 4
# Not 127.0.0.1: nothing else listens there.
ADDRESS = "127.77.13.5"
HOSTILE_PASSWORD = " :a\\ss \"w'ö日:rd\\ "
START_SECONDS = 30.0

ODD_OBJECTS = """
CREATE SCHEMA odd; SET search_path = odd;
CREATE TYPE base; -- in and out are int4's
CREATE FUNCTION base_in(cstring) RETURNS base LANGUAGE internal IMMUTABLE STRICT AS 'int4in';
CREATE FUNCTION base_out(base) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'int4out';
CREATE TYPE base (INPUT = base_in, OUTPUT = base_out, LIKE = integer, CATEGORY = 'N');
CREATE TYPE never_defined;
CREATE TYPE pair AS (a integer, b text);
CREATE TYPE mood AS ENUM ('a', 'b''c');
CREATE TYPE spans AS RANGE (SUBTYPE = text, MULTIRANGE_TYPE_NAME = many_spans);
CREATE DOMAIN even AS integer DEFAULT 2 CONSTRAINT is_even CHECK (VALUE % 2 = 0);
CREATE CAST (base AS integer) WITHOUT FUNCTION AS ASSIGNMENT;
CREATE FUNCTION to_pair(text) RETURNS pair LANGUAGE sql IMMUTABLE AS 'SELECT ROW(1, $1)::odd.pair';
CREATE CAST (text AS pair) WITH FUNCTION to_pair(text);
CREATE COLLATION french (provider = libc, locale = 'C');
CREATE CONVERSION latin FOR 'LATIN1' TO 'UTF8' FROM iso8859_1_to_utf8;
CREATE FUNCTION speech_call() RETURNS language_handler LANGUAGE c AS '$libdir/plpgsql', 'plpgsql_call_handler';
CREATE FUNCTION speech_inline(internal) RETURNS void LANGUAGE c AS '$libdir/plpgsql', 'plpgsql_inline_handler';
CREATE FUNCTION speech_check(oid) RETURNS void LANGUAGE c AS '$libdir/plpgsql', 'plpgsql_validator';
CREATE TRUSTED LANGUAGE speech HANDLER speech_call INLINE speech_inline VALIDATOR speech_check;
CREATE FUNCTION speak() RETURNS integer LANGUAGE speech AS 'BEGIN RETURN 1; END';
CREATE TRANSFORM FOR mood LANGUAGE sql (FROM SQL WITH FUNCTION prsd_lextype(internal));
CREATE PROCEDURE proceed(INOUT x integer) LANGUAGE plpgsql AS 'BEGIN COMMIT; END';
CREATE AGGREGATE middle(float8 ORDER BY anyelement) (SFUNC = ordered_set_transition, STYPE = internal,
    FINALFUNC = percentile_disc_final, FINALFUNC_EXTRA);
CREATE AGGREGATE plus(integer) (SFUNC = int4pl, STYPE = integer, PARALLEL = SAFE, COMBINEFUNC = int4pl);
CREATE FUNCTION base_less(base, base) RETURNS boolean LANGUAGE internal IMMUTABLE STRICT AS 'int4lt';
CREATE FUNCTION base_same(base, base) RETURNS boolean LANGUAGE internal IMMUTABLE STRICT AS 'int4eq';
CREATE FUNCTION base_compare(base, base) RETURNS integer LANGUAGE internal IMMUTABLE STRICT AS 'btint4cmp';
CREATE OPERATOR <<| (LEFTARG = base, RIGHTARG = base, FUNCTION = base_less);
CREATE OPERATOR === (LEFTARG = base, RIGHTARG = base, FUNCTION = base_same, COMMUTATOR = ===, HASHES);
CREATE OPERATOR FAMILY loose USING btree;
CREATE OPERATOR CLASS base_order FOR TYPE base USING btree FAMILY loose AS
    OPERATOR 1 <<|, OPERATOR 3 ===, FUNCTION 1 base_compare(base, base);
CREATE OPERATOR FAMILY empty_family USING hash;
CREATE ACCESS METHOD other_heap TYPE TABLE HANDLER heap_tableam_handler;
CREATE ACCESS METHOD other_tree TYPE INDEX HANDLER gisthandler;
CREATE FOREIGN DATA WRAPPER nowhere OPTIONS (note 'it''s nothing');
CREATE SERVER far TYPE 'x' VERSION '1' FOREIGN DATA WRAPPER nowhere OPTIONS (host 'a b', "odd name" 'v');
CREATE USER MAPPING FOR CURRENT_USER SERVER far OPTIONS (password 'secret''');
CREATE USER MAPPING FOR PUBLIC SERVER far;
CREATE FOREIGN TABLE abroad (x integer OPTIONS (name 'y') NOT NULL, CHECK (x > 0)) SERVER far OPTIONS (t 'u');
CREATE TEXT SEARCH PARSER words
    (START = prsd_start, GETTOKEN = prsd_nexttoken, END = prsd_end, LEXTYPES = prsd_lextype);
CREATE TEXT SEARCH TEMPLATE plain (LEXIZE = dsimple_lexize, INIT = dsimple_init);
CREATE TEXT SEARCH DICTIONARY stops (TEMPLATE = plain, ACCEPT = 'false');
CREATE TEXT SEARCH CONFIGURATION search (PARSER = words);
ALTER TEXT SEARCH CONFIGURATION search ADD MAPPING FOR word, asciiword WITH stops, simple;
CREATE TABLE typed OF pair (PRIMARY KEY (a));
CREATE TABLE kept (id serial PRIMARY KEY, b base, m mood, e even, p pair, s spans, w text COLLATE french)
    USING other_heap;
INSERT INTO kept (b, m, e, p, s, w) VALUES
    ('7', 'a', 4, ROW(1, 'x'), '[a,b)', 'é'), (NULL, 'b''c', 2, NULL, 'empty', '');
ALTER TABLE kept ADD CHECK (id < 1000) NOT VALID;
CREATE INDEX by_order ON kept (b base_order DESC NULLS LAST) WHERE id > 0;
CREATE STATISTICS together (mcv) ON m, e, (id % 3) FROM kept;
CREATE TABLE partitioned (k integer, v text) PARTITION BY LIST (k);
CREATE TABLE partition_one PARTITION OF partitioned FOR VALUES IN (1, NULL);
INSERT INTO partitioned VALUES (1, 'one'), (NULL, 'none');
CREATE FUNCTION fires() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER after_all AFTER UPDATE ON kept REFERENCING OLD TABLE AS o NEW TABLE AS n FOR EACH STATEMENT
    EXECUTE FUNCTION fires();
CREATE CONSTRAINT TRIGGER later AFTER INSERT ON kept DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    EXECUTE FUNCTION fires();
ALTER TABLE kept DISABLE TRIGGER later;
CREATE RULE quiet AS ON DELETE TO kept DO INSTEAD NOTHING;
CREATE POLICY seen ON kept AS RESTRICTIVE FOR SELECT USING (id > 0);
ALTER TABLE kept ENABLE ROW LEVEL SECURITY;
CREATE VIEW shown WITH (security_invoker) AS SELECT id, plus(id) OVER () FROM kept;
CREATE MATERIALIZED VIEW stored AS SELECT id FROM kept;
CREATE SEQUENCE alone AS smallint; SELECT nextval('alone');
CREATE FUNCTION on_ddl() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';
CREATE EVENT TRIGGER watching ON sql_drop WHEN TAG IN ('DROP TABLE') EXECUTE FUNCTION on_ddl();
CREATE PUBLICATION feed FOR TABLE kept (id, m) WHERE (id > 1), TABLE partitioned WITH (publish = 'insert');
CREATE PUBLICATION of_schema FOR TABLES IN SCHEMA odd;
CREATE SUBSCRIPTION no_feed CONNECTION 'dbname=nowhere' PUBLICATION p
    WITH (connect = false, slot_name = NONE, enabled = false);
ALTER DEFAULT PRIVILEGES IN SCHEMA odd GRANT SELECT ON TABLES TO PUBLIC;
ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;
GRANT USAGE ON LANGUAGE speech TO pg_monitor; GRANT USAGE ON FOREIGN DATA WRAPPER nowhere TO pg_monitor;
GRANT USAGE ON FOREIGN SERVER far TO pg_monitor WITH GRANT OPTION; GRANT USAGE ON TYPE mood TO pg_monitor;
REVOKE USAGE ON DOMAIN even FROM PUBLIC; GRANT SELECT (id), UPDATE (m) ON kept TO pg_monitor;
COMMENT ON OPERATOR === (base, base) IS 'same'; COMMENT ON CAST (base AS integer) IS 'a cast';
COMMENT ON TRANSFORM FOR mood LANGUAGE sql IS 'half'; COMMENT ON ACCESS METHOD other_heap IS '-- Name: x';
COMMENT ON EVENT TRIGGER watching IS 'e'; COMMENT ON PUBLICATION feed IS 'p'; COMMENT ON SUBSCRIPTION no_feed IS 's';
COMMENT ON CONSTRAINT is_even ON DOMAIN even IS 'c'; COMMENT ON TRIGGER later ON kept IS 't';
COMMENT ON RULE quiet ON kept IS 'r'; COMMENT ON OPERATOR CLASS base_order USING btree IS 'o';
COMMENT ON POLICY seen ON kept IS 'p'; COMMENT ON STATISTICS together IS 's';
SELECT lo_from_bytea(4242, '\\x00ff');
COMMENT ON LARGE OBJECT 4242 IS 'large'; GRANT SELECT ON LARGE OBJECT 4242 TO pg_monitor;
"""
KINDS = """
ACCESS METHOD|ACL|AGGREGATE|CAST|CHECK CONSTRAINT|COLLATION|COMMENT|CONSTRAINT|CONVERSION|DEFAULT|DEFAULT ACL|DOMAIN
EVENT TRIGGER|FOREIGN DATA WRAPPER|FOREIGN TABLE|FUNCTION|INDEX|MATERIALIZED VIEW|MATERIALIZED VIEW DATA
OPERATOR|OPERATOR CLASS|OPERATOR FAMILY|POLICY|PROCEDURAL LANGUAGE|PROCEDURE|PUBLICATION|PUBLICATION TABLE
PUBLICATION TABLES IN SCHEMA|ROW SECURITY|RULE|SCHEMA|SEQUENCE|SEQUENCE OWNED BY|SEQUENCE SET|SERVER|SHELL TYPE
STATISTICS
SUBSCRIPTION|TABLE|TABLE ATTACH|TABLE DATA|TEXT SEARCH CONFIGURATION|TEXT SEARCH DICTIONARY|TEXT SEARCH PARSER
TEXT SEARCH TEMPLATE|TRANSFORM|TRIGGER|TYPE|USER MAPPING|VIEW|BLOBS
"""


@pytest.mark.parametrize("major", MAJORS)
def test_objects_of_every_kind(session_clusters: Clusters, major: int, tmp_path: Path) -> None:
    cluster = session_clusters.get(major)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(clusters.temporary_database(cluster))
        source.execute(ODD_OBJECTS)
        stack.callback(_drop_subscription, source)
        kept = stack.enter_context(keeper.keeping(cluster, source.name))
        file = kept.backup(BACKUP_VERIFY="yes")
        listing = keeper.shell('"$restore" --list "$directory"', restore=cluster.installation.tool("pg_restore"),
                               directory=keeper.rebuilt(file, tmp_path / "archive")).stdout.decode()  # fmt: skip
        for kind in KINDS.replace("\n", "|").strip("|").split("|"):
            assert f" {kind} " in listing, kind
        with clusters.temporary_database(cluster) as copy:
            keeper.stock_copy(source, copy)
            reference = awkward.fingerprint(copy.conninfo, cluster.installation)
            _drop_subscription(copy)
        for face in ("pgkeep", "stock"):
            with clusters.temporary_database(cluster) as target:
                if face == "pgkeep":
                    kept.restore(file, target.conninfo)
                else:
                    keeper.stock_restore(file, target)
                found = awkward.fingerprint(target.conninfo, cluster.installation)
                _drop_subscription(target)
                assert awkward.differences(reference, found) == [], face


def _drop_subscription(database: Database) -> None:
    """A database that has one can't be dropped."""
    database.execute("DROP SUBSCRIPTION IF EXISTS no_feed")


@pytest.fixture(scope="module")
def guarded() -> Iterator[ScratchCluster]:
    """A server with logins by password, TLS, and an address: ``login`` must show its password everywhere."""
    with ScratchCluster(15, settings={"listen_addresses": ADDRESS}) as cluster:
        _make_certificate(cluster)
        hba = cluster.data_directory / "pg_hba.conf"
        hba.write_text("local all login scram-sha-256\nhost all all all scram-sha-256\n" + hba.read_text())
        with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET ssl = on")
            connection.execute(
                sql.SQL("CREATE ROLE login LOGIN SUPERUSER PASSWORD {}").format(sql.Literal(HOSTILE_PASSWORD))
            )
            connection.execute("CREATE DATABASE app")
        Database(cluster, "app").execute("CREATE TABLE t AS SELECT n FROM generate_series(1, 100) AS n")
        cluster.stop()
        cluster.start()
        yield cluster


def _make_certificate(cluster: ScratchCluster) -> None:
    keeper.shell(
        'openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj "/CN=$address" -addext "subjectAltName=IP:$address"'
        ' -keyout "$data/server.key" -out "$data/server.crt" 2>/dev/null; chmod 0600 "$data/server.key"',
        address=ADDRESS,
        data=cluster.data_directory,
    )
    if cluster.identity is not None:
        for name in ("server.key", "server.crt"):
            os.chown(cluster.data_directory / name, cluster.identity.uid, cluster.identity.gid)


def _secret(directory: Path, name: str, text: str) -> str:
    path = directory / name
    path.write_text(text)
    path.chmod(0o600)
    return os.fspath(path)


def _login(cluster: ScratchCluster, **variables: str) -> dict[str, str]:
    return {"DB_HOST": os.fspath(cluster.socket_directory), "DB_USER": "login", "DB_NAME": "app", **variables}


def _works(scratch: Path, variables: dict[str, str]) -> None:
    kept = Keeper(scratch / "backups", variables)
    backups = kept.json("backup")["backups"]
    assert [(each["kind"], each["rows"]) for each in backups] == [("database", 100), ("globals", 0)]


def test_a_hostile_password_from_a_file(guarded: ScratchCluster, scratch: Path) -> None:
    """Colons, backslashes, quotes, blanks at both ends, beyond ASCII; and with it into a restore."""
    password = _secret(scratch, "password", HOSTILE_PASSWORD + "\n")
    _works(scratch, _login(guarded, DB_PASSWORD_FILE=password))
    kept = Keeper(scratch / "backups", _login(guarded, DB_PASSWORD_FILE=password))
    target = f"host={guarded.socket_directory} user=login dbname=again"
    answer = kept.restore("latest", target, "--create", "--password-file", password)
    assert answer["rows"] == 100
    Database(guarded, "postgres").execute("DROP DATABASE again")


def test_a_wrong_password_is_named_and_not_shown(guarded: ScratchCluster, scratch: Path) -> None:
    password = _secret(scratch, "password", "not it, 4711")
    said = Keeper(scratch / "backups", _login(guarded, DB_PASSWORD_FILE=password)).fails(FAILED, "backup")
    assert "password authentication failed" in said
    assert "DB_PASSWORD_FILE" in said
    assert "4711" not in said


def test_a_passfile(guarded: ScratchCluster, scratch: Path) -> None:
    line = HOSTILE_PASSWORD.replace("\\", "\\\\").replace(":", "\\:")
    passfile = _secret(scratch, "passfile", f"*:*:app:login:{line}\n")
    for number, variable in enumerate(("PGPASSFILE", "DB_PASSFILE")):
        _works(scratch / str(number), _login(guarded, **{variable: passfile}))


def test_a_service(guarded: ScratchCluster, scratch: Path) -> None:
    """All of it from libpq's service file: the address, the database, the role; and its password elsewhere."""
    text = f"[backups]\nhost={ADDRESS}\nport=5432\nuser=login\ndbname=app\nsslmode=require\n"
    password = _secret(scratch, "password", HOSTILE_PASSWORD)
    common = {"PGSERVICEFILE": _secret(scratch, "services", text), "DB_PASSWORD_FILE": password}
    for number, variable in enumerate(("PGSERVICE", "DB_SERVICE")):
        _works(scratch / str(number), {**common, variable: "backups"})


def test_tls_as_it_was_asked_for(guarded: ScratchCluster, scratch: Path) -> None:
    password = _secret(scratch, "password", HOSTILE_PASSWORD)
    root = os.fspath(guarded.data_directory / "server.crt")
    variables = _login(guarded, DB_HOST=ADDRESS, DB_PORT="5432", DB_PASSWORD_FILE=password)
    _works(scratch, {**variables, "DB_SSLMODE": "verify-full", "DB_SSLROOTCERT": root})
    wrong = _secret(scratch, "wrong.crt", "")
    for trusted in (wrong, os.fspath(scratch / "absent.crt")):
        kept = Keeper(scratch / "backups", {**variables, "DB_SSLMODE": "verify-full", "DB_SSLROOTCERT": trusted})
        assert "certificate" in kept.fails(FAILED, "backup")


def test_tls_from_a_server_without_it(cluster15: ScratchCluster, scratch: Path) -> None:
    plain = {**keeper.reach(cluster15, "postgres"), "DB_HOST": "127.77.13.6", "DB_SSLMODE": "require"}
    said = Keeper(scratch / "backups", plain).fails(FAILED, "backup")
    assert "is the server up" in said


def test_several_databases_and_all_of_them(guarded: ScratchCluster, scratch: Path) -> None:
    postgres = Database(guarded, "postgres")
    postgres.execute("CREATE DATABASE closed")
    postgres.execute("ALTER DATABASE closed ALLOW_CONNECTIONS false")
    postgres.execute("CREATE DATABASE mould IS_TEMPLATE true")
    with contextlib.ExitStack() as stack:
        stack.callback(postgres.execute, "DROP DATABASE closed")
        stack.callback(postgres.execute, "DROP DATABASE mould")
        stack.callback(postgres.execute, "ALTER DATABASE mould IS_TEMPLATE false")
        kept = Keeper(scratch / "backups", keeper.reach(guarded))
        some = kept.of(DB_NAMES="app,postgres").json("backup")
        assert [each["database"] for each in some["backups"]] == ["app", "postgres", ""]
        every = kept.of(DB_ALL_DATABASES="yes").json("backup")
        assert [each["database"] for each in every["backups"]] == ["app", "postgres", ""]
        paths = [kept.file(each) for each in every["backups"]]
        assert [path.parent.name for path in paths] == ["manual", "manual", "globals"]
        assert all(path.is_file() for path in paths)
        said = kept.run("show", "latest")
        assert said.code == 2, "two databases: which one is meant?"


def test_one_failing_database_does_not_keep_the_others(guarded: ScratchCluster, scratch: Path) -> None:
    kept = Keeper(scratch / "backups", {**keeper.reach(guarded), "DB_NAMES": "absent_too,app,absent"})
    said = kept.fails(FAILED, "backup")
    assert 'database "absent_too" does not exist' in said
    assert 'database "absent" does not exist' in said
    found = kept.json("list")
    assert sorted(each["database"] for each in found) in (["app"], ["", "app"])
    assert all(each["state"] == "sealed" for each in found)
    assert list((kept.root / "staging").iterdir()) == []
    answer = kept.run("backup", "--json")
    assert answer.code == FAILED
    assert answer.json()["ok"] is False


def test_roles_go_into_a_fresh_cluster(guarded: ScratchCluster, scratch: Path) -> None:
    """With their passwords; and then the database with its owners."""
    postgres = Database(guarded, "postgres")
    postgres.execute('CREATE ROLE "Group ""x"""')
    postgres.execute('CREATE ROLE member LOGIN PASSWORD \'pw\' IN ROLE "Group ""x""" VALID UNTIL \'2040-01-01\'')
    postgres.execute("ALTER ROLE member SET work_mem TO '8MB'")
    Database(guarded, "app").execute("CREATE TABLE owned AS SELECT 1 AS x; ALTER TABLE owned OWNER TO member")
    kept = Keeper(scratch / "backups", {**keeper.reach(guarded), "DB_NAME": "app"})
    backups = {each["kind"]: kept.file(each) for each in kept.json("backup")["backups"]}
    query = "SELECT rolpassword || rolcanlogin || rolvaliduntil FROM pg_authid WHERE rolname = 'member'"
    owner = "SELECT relowner::regrole::text FROM pg_class WHERE relname = 'owned'"
    with ScratchCluster(16) as fresh:
        said = keeper.shell('gunzip -c "$file" | "$psql" -X -q -d "$target"', file=backups["globals"],
                            psql=fresh.installation.tool("psql"), target=fresh.conninfo())  # fmt: skip
        assert said.stderr.count("ERROR") == 1
        assert 'role "postgres" already exists' in said.stderr
        there = Database(fresh, "postgres")
        assert there.value(query) == postgres.value(query)
        assert there.value("SELECT pg_has_role('member', 'Group \"x\"', 'MEMBER')") is True
        assert "is a backup of roles" in kept.fails(7, "restore", backups["globals"], "--to", fresh.conninfo())
        kept.restore(backups["database"], fresh.conninfo("app"), "--create")
        assert Database(fresh, "app").value(owner) == "member"
    Database(guarded, "app").execute("DROP TABLE owned")
    postgres.execute('DROP ROLE member; DROP ROLE "Group ""x"""')


@pytest.fixture
def limited(guarded: ScratchCluster) -> Iterator[dict[str, str]]:
    """As whom a managed server's customer backs up: no superuser, and nothing is open but the own database."""
    postgres = Database(guarded, "postgres")
    postgres.execute("CREATE ROLE limited LOGIN; REVOKE CONNECT ON DATABASE postgres, template1 FROM PUBLIC")
    yield {**keeper.reach(guarded, "app"), "DB_USER": "limited"}
    Database(guarded, "app").execute("DROP TABLE IF EXISTS private; REVOKE ALL ON t FROM limited")
    postgres.execute("DROP ROLE limited; GRANT CONNECT ON DATABASE postgres, template1 TO PUBLIC")


def test_a_role_that_reads_no_passwords(limited: dict[str, str], guarded: ScratchCluster, scratch: Path) -> None:
    Database(guarded, "app").execute("GRANT SELECT ON t TO limited")
    kept = Keeper(scratch / "backups", limited)
    database, roles = kept.json("backup")["backups"]
    assert database["rows"] == 100
    assert any("without their passwords" in note for note in roles["notes"])
    text = keeper.shell('gunzip -c "$file"', file=kept.file(roles)).stdout.decode()
    assert "CREATE ROLE login;" in text
    assert "SCRAM-SHA-256" not in text


def test_a_role_without_rights_fails_with_a_hint(limited: dict[str, str], scratch: Path) -> None:
    said = Keeper(scratch / "backups", {**limited, "BACKUP_GLOBALS": "off"}).fails(FAILED, "backup")
    assert "permission denied for table t" in said
    assert "pg_read_all_data" in said.partition("permission denied")[2]
    assert list((scratch / "backups" / "active" / "manual").iterdir()) == []


def test_policies_that_hide_rows_fail_the_dump(limited: dict[str, str], guarded: ScratchCluster, scratch: Path) -> None:
    """A dump of what one may see would be a dump with holes."""
    Database(guarded, "app").execute(
        "CREATE TABLE private AS SELECT 1 AS x; ALTER TABLE private ENABLE ROW LEVEL SECURITY;"
        "GRANT pg_read_all_data TO limited"
    )
    said = Keeper(scratch / "backups", {**limited, "BACKUP_GLOBALS": "off"}).fails(FAILED, "backup")
    assert "row-level security" in said
    assert "BYPASSRLS" in said


@contextlib.contextmanager
def _pgbouncer(cluster: ScratchCluster, mode: str) -> Iterator[dict[str, str]]:
    """A pooler before ``cluster``, on a socket of its own."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        clusters.skip("needs pgbouncer", could_run_here=False)
    directory = cluster.directory / f"pooler-{mode}"
    directory.mkdir()
    (directory / "users").write_text('"postgres" ""\n')
    (directory / "pgbouncer.ini").write_text(
        f"[databases]\n* = host={cluster.socket_directory} port=5432\n[pgbouncer]\nlisten_addr =\nlisten_port = 6432\n"
        f"unix_socket_dir = {directory}\nauth_type = trust\nauth_file = {directory}/users\npool_mode = {mode}\n"
        "ignore_startup_parameters = extra_float_digits\n"
    )
    if cluster.identity is not None:
        os.chown(directory, cluster.identity.uid, cluster.identity.gid)
    variables = {**keeper.reach(cluster), "DB_HOST": os.fspath(directory), "DB_PORT": "6432", "BACKUP_GLOBALS": "off"}
    with process.start(
        [program, directory / "pgbouncer.ini"], stdout=process.DEVNULL, identity=cluster.identity, directory=directory
    ) as running:
        keeper.shell('for _ in $(seq 100); do [ ! -S "$socket" ] || exit 0; sleep 0.1; done; exit 1',
                     socket=directory / ".s.PGSQL.6432")  # fmt: skip
        assert running.poll() is None, running.messages()
        yield variables
    shutil.rmtree(directory)


def test_a_pooler_in_transaction_mode_is_refused_by_name(guarded: ScratchCluster, scratch: Path) -> None:
    with _pgbouncer(guarded, "transaction") as variables:
        said = Keeper(scratch / "backups", {**variables, "DB_NAME": "app"}).fails(FAILED, "backup")
    assert "PgBouncer" in said
    assert "transaction mode" in said
    assert "session mode" in said


def test_a_pooler_in_session_mode_works(guarded: ScratchCluster, scratch: Path) -> None:
    with _pgbouncer(guarded, "session") as variables:
        kept = Keeper(scratch / "backups", {**variables, "DB_NAME": "app"})
        assert kept.json("backup")["rows"] == 100
        Database(guarded, "postgres").execute("CREATE DATABASE through")
        target = f"host={variables['DB_HOST']} port=6432 user=postgres dbname=through"
        assert kept.restore("latest", target)["rows"] == 100
    Database(guarded, "postgres").execute("DROP DATABASE through")


def test_a_standby_can_be_dumped_and_the_backup_says_so(scratch: Path) -> None:
    settings = {"wal_level": "replica", "max_wal_senders": "5", "hot_standby": "on"}
    with ScratchCluster(15, settings=settings) as primary:
        Database(primary, "postgres").execute(
            "CREATE TABLE t AS SELECT n FROM generate_series(1, 500) AS n; CREATE UNLOGGED TABLE u AS SELECT 1 AS x"
        )
        with _standby(primary) as variables:
            kept = Keeper(scratch / "backups", {**variables, "DB_NAME": "postgres", "BACKUP_JOBS": "2"})
            backup = kept.json("backup")
            assert any("standby" in note for note in backup["notes"])
            assert backup["rows"] == 500
            with keeper.fresh_name(primary) as target:
                kept.restore("latest", target.conninfo, "--create", "--database", "postgres")
                assert target.value("SELECT count(*) FROM u") == 0
                assert target.value("SELECT relpersistence::text FROM pg_class WHERE relname = 'u'") == "u"


@contextlib.contextmanager
def _standby(primary: ScratchCluster) -> Iterator[dict[str, str]]:
    """A hot standby of ``primary``, in its directory."""
    data = primary.directory / "standby"
    copied = process.run(
        [primary.installation.tool("pg_basebackup"), "-D", data, "-R", "-X", "stream", "--checkpoint=fast",
         "--no-sync", f"--dbname={primary.conninfo()}"],
        identity=primary.identity, directory=primary.directory,
    )  # fmt: skip
    assert copied.return_code == 0, copied.stderr
    socket = primary.directory / "s"
    socket.mkdir()
    if primary.identity is not None:
        os.chown(socket, primary.identity.uid, primary.identity.gid)
    given = {"unix_socket_directories": os.fspath(socket), "listen_addresses": "", "fsync": "off",
             "dynamic_shared_memory_type": "mmap"}  # fmt: skip
    options = [word for name, value in given.items() for word in ("-c", f"{name}={value}")]
    with process.start(
        [primary.installation.tool("postgres"), "-D", data, *options],
        stdout=process.DEVNULL, identity=primary.identity, directory=primary.directory,
    ) as running:  # fmt: skip
        ready = primary.installation.tool("pg_isready")
        keeper.shell('for _ in $(seq 300); do ! "$ready" -q -h "$socket" || exit 0; sleep 0.1; done; exit 1',
                     ready=ready, socket=socket)  # fmt: skip
        assert running.poll() is None, running.messages()
        yield {**keeper.reach(primary), "DB_HOST": os.fspath(socket)}
