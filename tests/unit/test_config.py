"""The configuration: where values come from, what they may be, and that secrets stay secret."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from click.testing import CliRunner

from pgkeep import config
from pgkeep.cli.config import command
from pgkeep.config import Effective, Loaded, Retention, Schedule, Secret, Settings, describe, effective, load
from pgkeep.domain.names import Tier
from pgkeep.errors import ConfigurationError

SECRET = "hunter2-hunter2"
DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"
ROWS = (*config.SETTINGS, *config.destinations.known_rows())
RULES = {row.key: row.rule for row in config.SETTINGS}


@pytest.fixture(autouse=True)
def _no_default_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "DEFAULT_FILE", Path("/nonexistent/pgkeep.toml"))


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        file = tmp_path / "pgkeep.toml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def refused(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> list[str]:
    """The lines of the error, one a problem; the secret is nowhere in it, its causes included."""
    with pytest.raises(ConfigurationError) as caught:
        load(file, environment or {}, overrides or {})
    whole = "".join(traceback.format_exception(caught.value)) + caught.value.hint
    assert SECRET not in whole
    assert caught.value.__cause__ is None
    return caught.value.message.splitlines()[1:]


def only(lines: list[str]) -> str:
    assert len(lines) == 1, lines
    return lines[0].strip()


# Defaults and the table


def test_defaults_are_the_designs() -> None:
    loaded = load(None, {}, {})
    assert loaded.settings == Settings()
    assert set(loaded.origins.values()) == {"default"}
    assert loaded.settings.root == Path("/backups")
    kept = {tier.value: loaded.settings.retention.days(tier) for tier in Tier}
    assert kept == {"hourly": 2, "daily": 7, "weekly": 28, "monthly": 365, "yearly": None, "manual": 30}
    assert loaded.settings.storage.reserve_bytes == 256 * 1024 * 1024


def test_every_field_has_one_row_and_a_default_that_its_rule_allows() -> None:
    fields = [
        f"{outer.name}.{inner.name}" if msgspec.inspect.is_struct_type(outer.type) else outer.name
        for outer in msgspec.structs.fields(Settings)
        for inner in (msgspec.structs.fields(outer.type) if msgspec.inspect.is_struct_type(outer.type) else (outer,))
    ]
    elsewhere = {"extractor.destinations", "extractor.s3_defaults", "extractor.rsync_defaults"}
    assert sorted({*RULES, *elsewhere}) == sorted(fields)
    for row in effective(load(None, {}, {})):
        if row.literal is not None and row.key in RULES:
            wanted = None if row.value is None else row.value
            got = RULES[row.key].parse(tomllib.loads(f"v = {row.literal}")["v"])
            assert (str(got) if isinstance(got, Path) else got) == wanted, row.key


def test_no_variable_belongs_to_two_settings() -> None:
    variables = [variable for row in ROWS for variable in row.all_variables()]
    assert len(set(variables)) == len(variables)


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        load(None, {}, {}).settings.root = Path("/other")  # type: ignore[misc]


# Precedence and origins


def test_option_wins_over_variable_over_file_over_default(toml: Callable[[str], Path]) -> None:
    file = toml('root = "/file"\n[database]\nhost = "file-host"\nport = 1111\nuser = "file-user"')
    environment = {"PGKEEP_ROOT": "/variable", "DB_HOST": "variable-host"}
    loaded = load(file, environment, {"root": Path("/option"), "dump.lock_timeout_seconds": 5, "database.user": None})
    assert loaded.settings.root == Path("/option")
    assert (loaded.settings.database.host, loaded.settings.database.port) == ("variable-host", 1111)
    wanted = {
        "root": "option --root",
        "database.host": "environment DB_HOST",
        "database.port": f"file {file}",
        "database.user": f"file {file}",
        "dump.lock_timeout_seconds": "option --lock-timeout-seconds",
        "dump.retries": "default",
    }
    assert {key: loaded.origins[key] for key in wanted} == wanted


def test_an_override_of_no_setting_is_a_mistake_in_the_program() -> None:
    with pytest.raises(KeyError, match=r"database\.hots"):
        load(None, {}, {"database.hots": "x"})


def test_empty_variables_count_as_unset(toml: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "password").write_text("right\n")
    environment = dict.fromkeys((variable for row in ROWS for variable in row.all_variables()), "")
    environment |= {"PGKEEP_CONFIG": "", "PGKEEP_UNKNOWN": "", "PGHOST": ""}
    assert load(None, environment, {}) == load(None, {}, {})
    loaded = load(None, environment | {"DB_PASSWORD_FILE": str(tmp_path / "password")}, {})
    assert loaded.settings.database.password == Secret("right")


def test_which_file_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "default.toml")
    default, named, given_file = (tmp_path / f"{name}.toml" for name in ("default", "named", "given"))
    for port, file in enumerate((default, named, given_file), start=1):
        file.write_text(f"database.port = {port}")
    environment = {"PGKEEP_CONFIG": str(named)}
    assert load(None, {}, {}).settings.database.port == 1
    assert load(None, environment, {}).settings.database.port == 2
    assert load(given_file, environment, {}).settings.database.port == 3
    assert load(None, {"PGKEEP_CONFIG": "/dev/null"}, {}).settings.database.port is None


@pytest.mark.parametrize("how", ["given", "named"])
def test_a_file_that_is_asked_for_must_exist(how: str, tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    lines = refused(missing) if how == "given" else refused(None, {"PGKEEP_CONFIG": str(missing)})
    assert only(lines) == f"{missing} can't be read: No such file or directory; create it, or name the right file"


# The guide's variables


def test_the_guides_variables_work_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "db_password").write_text(f"{SECRET}\n")
    environment = {
        "DB_HOST": "db",
        "DB_PORT": "5432",
        "DB_NAME": "app_db",
        "DB_USER": "app",
        "DB_PASSWORD_FILE": str(tmp_path / "db_password"),
        "BACKUP_SCHEDULE": "0 */1 * * *",
        "BACKUP_RETENTION_DAYS": "14",
        "BACKUP_RETENTION_HOURLY_DAYS": "3",
        "BACKUP_RETENTION_WEEKLY_DAYS": "35",
        "CHECK_INTERVAL": "300",
        "TZ": "UTC",
        "PATH": "/usr/bin",
        "BACKUP_OF_SOMETHING_ELSE": "ignored",
    }
    loaded = load(None, environment, {})
    database = loaded.settings.database
    assert (database.host, database.port, database.name, database.user) == ("db", 5432, "app_db", "app")
    assert database.password is not None
    assert database.password.reveal() == SECRET
    assert loaded.settings.schedule.hourly == "0 */1 * * *"
    assert loaded.settings.retention == Retention(hourly_days=3, daily_days=14, weekly_days=35)
    assert loaded.settings.extractor.check_interval_seconds == 300
    assert loaded.origins["retention.daily_days"] == "environment BACKUP_RETENTION_DAYS"
    assert loaded.origins["database.password"] == f"environment DB_PASSWORD_FILE: {tmp_path / 'db_password'}"


def test_the_guides_remarks_may_arrive_with_the_value() -> None:
    environment = {
        "BACKUP_SCHEDULE": "0 */1 * * *  # Every hour",
        "CHECK_INTERVAL": "300  # Check every 5 minutes",
        "DB_NAME": "db # one",
        "DB_PASSWORD": "pass # word",
    }
    found = load(None, environment, {}).settings
    assert (found.schedule.hourly, found.extractor.check_interval_seconds) == ("0 */1 * * *", 300)
    assert found.database.name == "db # one"
    assert found.database.password == Secret("pass # word")


def test_daily_days_win_over_the_guides_days() -> None:
    environment = {"BACKUP_RETENTION_DAYS": "14", "BACKUP_RETENTION_DAILY_DAYS": "forever"}
    assert load(None, environment, {}).settings.retention.daily_days is None


# Errors


def test_all_errors_are_reported_at_once(toml: Callable[[str], Path]) -> None:
    file = toml(
        f'databse.host = "{SECRET}"\npassword = "{SECRET}"\n'
        f'[database]\nport = 70000\nhots = "{SECRET}"\npassword = ["{SECRET}"]\n[retention]\nhourly_days = true\n'
    )
    environment = {
        "CHECK_INTERVAL": "soon",
        "BACKUP_SCHEDULE_DAILY": "61 * * * *",
        "PGKEEP_ROTO": SECRET,
        "BACKUP_RETENTION_WEEKLY": SECRET,
        "DB_SSLMODE": "on",
        "BACKUP_TIMEZONE": "Mars/Olympus",
    }
    got = [line.strip() for line in refused(file, environment, {"dump.retries": 11})]
    assert sorted(got) == sorted(
        [
            f"databse (file {file}): unknown table; did you mean database?",
            f"password (file {file}): unknown key; did you mean database.password?",
            f"database.hots (file {file}): unknown key; did you mean database.host?",
            f"database.port (file {file}): 70000 is not allowed; allowed: 1 to 65535",
            f"database.password (file {file}): the value is not allowed (it is not text); allowed: one line of UTF-8",
            f"retention.hourly_days (file {file}): True is not allowed; allowed: 1 to 36500, or `forever`",
            "dump.retries (option --retries): 11 is not allowed; allowed: 0 to 10",
            "extractor.check_interval_seconds (environment CHECK_INTERVAL): 'soon' is not allowed; allowed: 1 to 86400",
            (
                "schedule.daily (environment BACKUP_SCHEDULE_DAILY): '61 * * * *' is not allowed (Bad minute); "
                "allowed: five cron fields: minute hour day month weekday (0 or 7 is Sunday), or `off`"
            ),
            "PGKEEP_ROTO (environment): unknown variable; did you mean PGKEEP_ROOT?",
            "BACKUP_RETENTION_WEEKLY (environment): unknown variable; did you mean BACKUP_RETENTION_WEEKLY_DAYS?",
            (
                "database.sslmode (environment DB_SSLMODE): 'on' is not allowed; "
                "allowed: `disable`, `allow`, `prefer`, `require`, `verify-ca`, `verify-full`"
            ),
            (
                "schedule.timezone (environment BACKUP_TIMEZONE): 'Mars/Olympus' is not allowed "
                "(this system's time zone files (package tzdata) don't have it); "
                "allowed: a name of the time zone database, e.g. `UTC` or `Europe/Berlin`"
            ),
        ]
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f'database = "{SECRET}"', "database (file {}): must be a table: write [database] on a line of its own"),
        (f'"database.host" = "{SECRET}"', '"database.host" (file {}): unknown key; did you mean database.host?'),
        (f'zzzz = "{SECRET}"', "zzzz (file {}): unknown key"),
        (
            f'[database.host]\npassword = "{SECRET}"',
            "database.host (file {}): a table is not allowed (it is not text); allowed: text",
        ),
        (f"a = {SECRET}", "{} is not valid TOML: Invalid value (at line 1, column 5); put text between quotes"),
        ("[schedule]\nhourly = '* * * * * *'", None),
    ],
)
def test_what_a_file_may_not_hold(toml: Callable[[str], Path], text: str, wanted: str | None) -> None:
    file = toml(text)
    line = only(refused(file))
    assert line == wanted.format(file) if wanted else "it needs exactly five fields" in line


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "latin.toml"
    file.write_bytes(b'root = "\xff' + SECRET.encode())
    assert only(refused(file)) == f"{file} is not UTF-8; save it as UTF-8"


def test_endless_nesting_is_an_error_of_the_file(toml: Callable[[str], Path]) -> None:
    assert "is not valid TOML" in only(refused(toml("a = " + "[" * 100_000)))


def test_a_long_value_is_cut() -> None:
    assert len(only(refused(None, {"DB_PORT": "9" * 100_000}))) < 300


@pytest.mark.parametrize(
    "name",
    [
        "PGKEEP_SERVICE_HOST",
        "PGKEEP_CONSOLE_SERVICE_PORT_HTTP",
        "PGKEEP_PORT",
        "PGKEEP_CONSOLE_PORT_8080_TCP_ADDR",
        "PGOPTIONS",
        "BACKUP_RETENTIO_DAYS",
        "MY_PGKEEP_ROOT",
    ],
)
def test_other_programs_variables_are_left_alone(name: str) -> None:
    assert load(None, {name: "x"}, {}).settings == Settings()


@pytest.mark.parametrize("name", ["PGKEEP_ROOT_FILE", "PGKEEP_", "PGKEEP_PROTECTON", "BACKUP_RETENTION_DAYS_FILE"])
def test_an_unknown_variable_of_ours_is_an_error(name: str) -> None:
    assert only(refused(None, {name: SECRET})).startswith(f"{name} (environment): unknown variable")


# Which databases


def test_ways_to_pick_databases_exclude_each_other() -> None:
    environment = {"DB_NAME": "a", "DB_NAMES": "b,c", "DB_ALL_DATABASES": "yes"}
    assert only(refused(None, environment)) == (
        "database.name (environment DB_NAME) and database.names (environment DB_NAMES) and "
        "database.all_databases (environment DB_ALL_DATABASES) exclude each other: keep one"
    )


def test_all_databases_false_picks_nothing() -> None:
    loaded = load(None, {"DB_NAME": "a", "DB_ALL_DATABASES": "false", "PGDATABASE": "b"}, {})
    assert loaded.settings.database.name == "a"
    assert load(None, {"DB_ALL_DATABASES": "false", "PGDATABASE": "b"}, {}).libpq == {"PGDATABASE": "b"}


def test_the_stronger_place_picks_the_databases_alone(toml: Callable[[str], Path]) -> None:
    file = toml("database.all_databases = true")
    loaded = load(file, {"DB_NAMES": "b,c"}, {"database.name": "a"})
    assert loaded.settings.database == config.Database(name="a")
    assert loaded.origins["database.all_databases"] == "default"
    assert load(file, {"DB_NAMES": "b,c"}, {}).settings.database == config.Database(names=("b", "c"))
    assert load(file, {"DB_ALL_DATABASES": "off"}, {}).settings.database == config.Database()


# libpq's own variables


def test_libpqs_variables_in_force_are_named_and_masked() -> None:
    environment = {"PGHOST": "elsewhere", "PGUSER": "me", "PGPASSWORD": SECRET, "PGDATA": "x", "PGSSLKEY": "/k\udcff"}
    assert load(None, environment | {"DB_HOST": "db"}, {}).libpq == {
        "PGUSER": "me",
        "PGPASSWORD": "********",
        "PGSSLKEY": "/k\\udcff",
    }
    assert "PGPASSFILE" not in load(None, {"PGPASSFILE": "/p", "DB_PASSWORD": "x"}, {}).libpq


def test_libpqs_time_limit_counts_where_ours_is_not_given() -> None:
    assert load(None, {"PGCONNECT_TIMEOUT": "3"}, {}).settings.database.connect_timeout_seconds == 3
    both = {"PGCONNECT_TIMEOUT": "3", "DB_CONNECT_TIMEOUT": "0"}
    assert load(None, both, {}).settings.database.connect_timeout_seconds == 0


# Schedule


def test_expressions_leave_out_what_is_off() -> None:
    assert list(Schedule().expressions()) == [Tier.HOURLY, Tier.DAILY, Tier.WEEKLY]
    assert Schedule(hourly=None, yearly="0 0 1 1 *").expressions()[Tier.YEARLY] == "0 0 1 1 *"


# config show


def _show(loaded: Loaded, *options: str, json: bool = False) -> str:
    result = CliRunner().invoke(command, ["show", *options], obj=SimpleNamespace(loaded=loaded, json=json))
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert SECRET not in result.stdout
    return result.stdout


AWKWARD = {
    "DB_NAMES": json.dumps(['a"b', "c\nd\x7f", "gr\u00fc\u00df \U0001f600", "\\"]),
    "DB_PASSWORD": SECRET,
    "BACKUP_JOBS": "auto",
    "BACKUP_SCHEDULE": "off",
    "BACKUP_RETENTION_HOURLY_DAYS": "forever",
    "PGUSER": "odd\nname",
    "PGPASSWORD": SECRET,
}


def test_what_show_prints_is_toml_that_gives_the_same_settings(toml: Callable[[str], Path]) -> None:
    loaded = load(None, AWKWARD, {"root": "/some\npath"})
    printed = _show(loaded)
    again = load(toml(printed), {"DB_PASSWORD": SECRET}, {})
    assert again.settings == loaded.settings
    assert "# database.password = ********  # environment DB_PASSWORD\n" in printed
    assert "# database.host = unset  # default\n" in printed
    assert 'retention.hourly_days = "forever"  # environment BACKUP_RETENTION_HOURLY_DAYS\n' in printed
    assert '# libpq reads PGUSER = "odd\\nname"\n' in printed


@pytest.mark.parametrize(("options", "wanted"), [(("--json",), False), ((), True)])
def test_show_as_json(options: tuple[str, ...], wanted: bool) -> None:
    loaded = load(None, AWKWARD, {})
    found = json.loads(_show(loaded, *options, json=wanted))
    assert list(found["settings"]) == [row.key for row in effective(loaded)]
    assert found["settings"]["database.password"] == {"value": "********", "origin": "environment DB_PASSWORD"}
    assert found["settings"]["retention.hourly_days"]["value"] is None
    assert found["settings"]["database.names"]["value"][1] == "c\nd\x7f"
    assert found["libpq"] == {"PGUSER": "odd\nname"}


def test_effective_rows_follow_the_table() -> None:
    rows = effective(load(None, {"DB_PORT": "1"}, {}))
    assert Effective("database.port", 1, "1", "environment DB_PORT") in rows


# The documentation


def test_the_documentation_names_every_key_variable_default_and_range() -> None:
    lines = {re.sub(r"`", "", line) for line in DOCUMENT.read_text(encoding="utf-8").splitlines()}
    for row in describe():
        cells = (row.key, row.variable, row.default or "unset", row.allowed, row.meaning)
        wanted = f"| {' | '.join(cells)} |".replace("`", "")
        assert wanted in lines, f"docs/configuration.md lacks the row: {wanted}"


def test_the_documented_example_holds_every_key_and_the_defaults(toml: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "db_password").write_text(SECRET)
    found = re.search(r"```toml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    example = found[1].replace("/run/secrets", str(tmp_path))
    loaded = load(toml(example), {}, {})
    keys = {name for row in ROWS for name in row.all_keys()} | {"destinations.x.kind"}
    named = {match.rpartition(" ")[2] for match in re.findall(r"^(?:# )?[a-z_]+(?= = )", example, re.MULTILINE)}
    assert named == {key.rpartition(".")[2] for key in keys}
    assert [each.name for each in loaded.settings.extractor.destinations] == ["external"]
    for field in ("root", "dump", "retention", "storage", "schedule", "extractor"):
        assert getattr(loaded.settings, field) == getattr(Settings(), field)


def test_nothing_heavy_is_imported_for_the_defaults() -> None:
    # In a process of its own: other tests import what they like.
    check = "print({'cronsim', 'zoneinfo'} & {*sys.modules})"
    program = f"import sys; from pgkeep.config import load; load(None, {{}}, {{}}); {check}"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
