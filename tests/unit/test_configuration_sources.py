"""What a setting accepts, and secrets: from files, in messages, in dumps."""

from __future__ import annotations

import copy
import json
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgkeep import config
from pgkeep.config import load
from pgkeep.configuration_sources import InvalidValueError, Rule, Secret
from pgkeep.errors import ConfigurationError

SECRET = "hunter2-hunter2"
RULES: dict[str, Rule] = {row.key: row.rule for row in config.SETTINGS}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.datetimes() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


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


def problem(environment: Mapping[str, str], file: Path | None = None) -> str:
    """The one line of the error; the secret is nowhere in it, its causes included."""
    with pytest.raises(ConfigurationError) as caught:
        load(file, environment, {})
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__cause__ is None
    _, line = caught.value.message.splitlines()
    return line.strip()


# Secrets


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"plain", "plain"),
        (b"line\n", "line"),
        (b"windows\r\n", "windows"),
        (b" spaces stay \n", " spaces stay "),
        ("gr\u00fc\u00df".encode(), "gr\u00fc\u00df"),
    ],
)
def test_a_secret_from_a_file(content: bytes, wanted: str, toml: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(content)
    (tmp_path / "secret").chmod(0o444)
    by_variable = load(None, {"DB_PASSWORD_FILE": str(tmp_path / "secret")}, {})
    by_file = load(toml(f"database.password_file = '{tmp_path / 'secret'}'"), {}, {})
    assert by_variable.settings.database.password == by_file.settings.database.password == Secret(wanted)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "(it is empty)"),
        (b"\n", "(it is empty)"),
        (f"{SECRET}\n\n".encode(), "(it has more than one line)"),
        (f"{SECRET}\0".encode(), "(it is not UTF-8 without NUL)"),
        (b"\xff" + SECRET.encode(), "is not UTF-8; write the secret as one line of UTF-8"),
        (SECRET.encode() * 10_000, "is larger than 65536 bytes"),
    ],
)
def test_a_secret_file_that_holds_none(content: bytes, wanted: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(content)
    line = problem({"DB_PASSWORD_FILE": str(file)})
    assert line.startswith("database.password (environment DB_PASSWORD_FILE")
    assert str(file) in line
    assert wanted in line


def test_value_and_file_of_one_secret_are_too_much(toml: Callable[[str], Path], tmp_path: Path) -> None:
    line = problem({"DB_PASSWORD": SECRET, "DB_PASSWORD_FILE": "/nowhere"})
    assert line == "database.password (environment DB_PASSWORD): DB_PASSWORD_FILE is given too: keep one"
    file = toml(f'[database]\npassword = "{SECRET}"\npassword_file = "/nowhere"')
    line = problem({}, file)
    assert line == f"database.password (file {file}): database.password_file is given too: keep one"


def test_a_missing_secret_file_names_path_and_remedy(tmp_path: Path) -> None:
    line = problem({"DB_PASSWORD_FILE": str(tmp_path / "none")})
    assert line == (
        f"database.password (environment DB_PASSWORD_FILE): {tmp_path / 'none'} can't be read: "
        "No such file or directory; create it, or name the right file"
    )


def test_a_directory_for_a_secret_names_dockers_habit(tmp_path: Path) -> None:
    assert "Docker makes a directory" in problem({"DB_PASSWORD_FILE": str(tmp_path)})


@contextmanager
def _as_ordinary_user() -> Iterator[int]:
    """Root reads everything; so it takes an ordinary user's rights for the while."""
    if os.geteuid() != 0:
        yield os.geteuid()
        return
    os.seteuid(65534)
    try:
        yield 65534
    finally:
        os.seteuid(0)


def test_an_unreadable_secret_file_names_owner_mode_and_user() -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        file = Path(directory, "secret")
        file.write_text(SECRET)
        file.chmod(0)
        with _as_ordinary_user() as user:
            line = problem({"DB_PASSWORD_FILE": str(file)})
        assert f"belongs to uid {os.geteuid()}, gid {os.getegid()}, mode 0000, and pgkeep runs as uid {user}" in line
        assert f"chown {user} {file}" in line


def test_an_unreadable_directory_above_a_secret_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "secret").write_text(SECRET)
    closed.chmod(0)
    try:
        with _as_ordinary_user():
            line = problem({"DB_PASSWORD_FILE": str(closed / "secret")})
    finally:
        closed.chmod(0o700)
    assert "may not pass a directory above it" in line


def test_a_default_file_out_of_reach_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    monkeypatch.setattr(config, "DEFAULT_FILE", closed / "pgkeep.toml")
    closed.chmod(0)
    try:
        with _as_ordinary_user():
            assert "can't be read: Permission denied" in problem({})
    finally:
        closed.chmod(0o700)


DUMPS: list[Callable[[Any], object]] = [
    repr,
    str,
    lambda value: f"{value}",
    lambda value: f"{value!r:>40}",
    pickle.dumps,
    copy.deepcopy,
    msgspec.json.encode,
    msgspec.to_builtins,
    json.dumps,
    lambda value: json.dumps(value, default=str),
    lambda value: json.dumps(value, default=vars),
    lambda value: msgspec.structs.asdict(value.database),
    lambda value: list(traceback.TracebackException.from_exception(ValueError(value)).format()),
]


@pytest.mark.parametrize("dump", DUMPS)
def test_no_dump_of_the_settings_holds_a_secret(dump: Callable[[Any], object]) -> None:
    loaded = load(None, {"DB_PASSWORD": SECRET, "PGPASSWORD": SECRET}, {})
    for value in (loaded.settings, loaded.settings.database.password, loaded):
        try:
            found = dump(value)
        except (TypeError, AttributeError) as error:
            found = error
        assert SECRET not in repr(found)


def test_a_secret_equals_only_a_secret() -> None:
    assert Secret("a") == Secret("a")
    assert len({Secret("a"), Secret("a"), Secret("b")}) == 2
    assert Secret("a") != "a"
    assert Secret("a").reveal() == "a"


# Names


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a", ("a",)),
        ("a, b ,c", ("a", "b", "c")),
        ('["a,b", "c\\n", "]"]', ("a,b", "c\n", "]")),
        (' [ "x" ]', ("x",)),
    ],
)
def test_several_names_in_a_variable(text: str, wanted: tuple[str, ...]) -> None:
    assert load(None, {"DB_NAMES": text}, {}).settings.database.names == wanted


@pytest.mark.parametrize(
    "text", [",", "a,,b", "a,a", "[]", "[1]", '["a"', '[["a"]]', '[""]', '["\\u0000"]', "[" * 9999]
)
def test_names_that_are_none(text: str) -> None:
    assert problem({"DB_NAMES": text}).startswith("database.names (environment DB_NAMES): ")


# Rules, by property


@pytest.mark.parametrize("key", sorted(RULES))
@settings(max_examples=40)
@given(value=ANYTHING)
def test_a_rule_parses_or_refuses_and_never_fails_otherwise(key: str, value: object) -> None:
    reason = ""
    try:
        found = RULES[key].parse(value)
        again = found.reveal() if isinstance(found, Secret) else found
        assert found is None or RULES[key].parse(again) == found
    except InvalidValueError as error:
        reason = str(error)
    assert len(str(value)) < 5 or str(value) not in reason  # shorter ones are words of the reason by chance


@given(value=st.integers(-10, 70_000), blanks=st.text(" \t", max_size=3))
def test_integers_inside_the_range_and_no_others(value: int, blanks: str) -> None:
    environment = {"DB_PORT": f"{blanks}{value}{blanks}"}
    if 1 <= value <= 65535:
        assert load(None, environment, {}).settings.database.port == value
    else:
        assert str(value) in problem(environment)


@given(
    count=st.integers(0, 1000),
    unit=st.sampled_from([("", 1), ("B", 1), ("kB", 10**3), ("MB", 10**6), ("GB", 10**9), ("TB", 10**12)])
    | st.sampled_from([("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30), ("TiB", 2**40)]),
    change=st.sampled_from([str, str.lower, str.upper]),
    blank=st.sampled_from(["", " "]),
)
def test_sizes(count: int, unit: tuple[str, int], change: Callable[[str], str], blank: str) -> None:
    text, factor = unit
    assert RULES["storage.reserve_bytes"].parse(f"{count}{blank}{change(text)}") == count * factor


@pytest.mark.parametrize("text", ["1.5GiB", "5 PB", "512M", "MiB", "-1", "1TiBB", "1025TiB", "1 K\u0131B", "\u0661MB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InvalidValueError):
        RULES["storage.reserve_bytes"].parse(text)


@given(
    value=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), min_size=1, unique=True
    )
)
def test_any_names_survive_as_a_json_array(value: list[str]) -> None:
    assert load(None, {"DB_NAMES": json.dumps(value)}, {}).settings.database.names == tuple(value)


@pytest.mark.parametrize("text", ["true", "YES", "On", "1", "false", "No", "off", "0"])
def test_words_for_yes_and_no(text: str) -> None:
    wanted = text.lower() in {"true", "yes", "on", "1"}
    assert load(None, {"BACKUP_VERIFY": text}, {}).settings.dump.verify_after is wanted


@pytest.mark.parametrize("text", ["0 4 * * 0", "*/5 * * * *", "0 0 L * *", "0 4 * * sun", "0 0 * * 5#2", "off"])
def test_schedules(text: str) -> None:
    wanted = None if text == "off" else text
    assert load(None, {"BACKUP_SCHEDULE": text}, {}).settings.schedule.hourly == wanted


@pytest.mark.parametrize("text", ["@daily", "* * * * * *", "0 0 31 2 *", "60 * * * *", "never", "* * * *", "# * * * *"])
def test_schedules_that_are_none(text: str) -> None:
    assert problem({"BACKUP_SCHEDULE": text}).startswith("schedule.hourly (environment BACKUP_SCHEDULE): ")


@pytest.mark.parametrize("text", ["Africa", "../UTC", "/etc/localtime", "utc\n", "x\udcff", "zone.tab", "Z" * 5000])
def test_time_zones_that_are_none(text: str) -> None:
    wanted = "not UTF-8" if "\udcff" in text else "package tzdata"
    assert wanted in problem({"BACKUP_TIMEZONE": text})


def test_time_zones() -> None:
    environment = {"BACKUP_TIMEZONE": "Europe/Berlin"}
    assert load(None, environment, {}).settings.schedule.timezone == "Europe/Berlin"
