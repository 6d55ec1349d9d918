"""Destinations in the configuration: by variables, by tables of a file, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from click.testing import CliRunner

from pgkeep import config
from pgkeep.cli.config import command
from pgkeep.config import Secret, destinations, effective, load
from pgkeep.errors import ConfigurationError, NotFoundError, UsageError
from pgkeep.settings import DirectoryDestination, Retention, RsyncDestination, S3Destination
from pgkeep.wiring import Services, places

SECRET = "hunter2-hunter2"
S3 = {"S3_BUCKET": "backups", "S3_ACCESS_KEY_ID": "AKIA", "S3_SECRET_ACCESS_KEY": SECRET}
RSYNC = {"RSYNC_TARGET": "me@host:/srv", "RSYNC_KEY_FILE": "/k", "RSYNC_KNOWN_HOSTS_FILE": "/h"}


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


def chosen(file: Path | None = None, environment: Mapping[str, str] | None = None) -> dict[str, object]:
    found = load(file, environment or {}, {}).settings.extractor.destinations
    assert len({each.name for each in found}) == len(found)
    return {each.name: each for each in found}


def refused(file: Path | None = None, environment: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load(file, environment or {}, {})
    assert SECRET not in f"{caught.value}{caught.value.hint}"
    return [line.strip() for line in caught.value.message.splitlines()[1:]]


# What there is


def test_without_a_word_there_is_the_directory() -> None:
    assert chosen() == {"external": DirectoryDestination()}


def test_variables_make_three_of_them() -> None:
    more = {"EXTERNAL_DIRECTORY": "/mnt/nas", "S3_OBJECT_LOCK_MODE": "GOVERNANCE", "RSYNC_PORT": "2222"}
    found = chosen(None, S3 | RSYNC | more)
    assert found == {
        "external": DirectoryDestination(path=Path("/mnt/nas")),
        "s3": S3Destination(
            bucket="backups", access_key_id=Secret("AKIA"), secret_access_key=Secret(SECRET), lock_mode="GOVERNANCE"
        ),
        "rsync": RsyncDestination(target="me@host:/srv", key_file=Path("/k"), known_hosts_file=Path("/h"), port=2222),
    }


def test_every_field_has_a_row_and_every_row_a_field() -> None:
    for name, kind in destinations.KIND_OF.items():
        struct = destinations._STRUCTS[kind]
        fields = {f"destinations.{name}.{field}" for field in struct.__struct_fields__ if field != "name"}
        known = {row.key for row in destinations.rows(name, kind)}
        plain = {key for key in known if ".retention." not in key}
        assert plain == fields - {f"destinations.{name}.retention"}
        policy = {f"destinations.{name}.retention.{field}" for field in Retention.__struct_fields__}
        assert known - plain == (policy if "retention" in struct.__struct_fields__ else set())


@pytest.mark.parametrize(
    ("variable", "value", "field", "wanted"),
    [
        ("EXTERNAL_MODE", "0400", "external.mode", "0400"),
        ("EXTERNAL_REQUIRED", "no", "external.required", False),
        ("EXTERNAL_INTERVAL", "60", "external.interval_seconds", 60),
        ("EXTERNAL_RECHECK_DAYS", "never", "external.recheck_days", None),
        ("S3_PREFIX", "/db/one/", "s3.prefix", "db/one"),
        ("S3_ENDPOINT", "http://127.0.0.1:8333", "s3.endpoint", "http://127.0.0.1:8333"),
        ("S3_REGION", "eu-central-1", "s3.region", "eu-central-1"),
        ("S3_PATH_STYLE", "on", "s3.path_style", True),
        ("S3_CA_FILE", "/ca.pem", "s3.ca_file", Path("/ca.pem")),
        ("S3_OBJECT_LOCK_MODE", "off", "s3.lock_mode", None),
        ("S3_OBJECT_LOCK_DAYS", "30", "s3.lock_days", 30),
        ("S3_OBJECT_LOCK_DAYS_MAXIMUM", "500", "s3.lock_days_maximum", 500),
        ("S3_PROLONG_LOCKS", "true", "s3.prolong_locks", True),
        ("S3_STORAGE_CLASS", "STANDARD_IA", "s3.storage_class", "STANDARD_IA"),
        ("S3_ENCRYPTION", "AES256", "s3.encryption", "AES256"),
        ("S3_ENCRYPTION", "none", "s3.encryption", None),
        ("S3_CHECKSUMS", "when_required", "s3.checksums", "when_required"),
        ("S3_PART_SIZE", "64MiB", "s3.part_size_bytes", 64 * 2**20),
        ("S3_RECHECK_DAYS", "90", "s3.recheck_days", 90),
        ("S3_INTERVAL", "3600", "s3.interval_seconds", 3600),
        ("S3_SESSION_TOKEN", SECRET, "s3.session_token", Secret(SECRET)),
        ("RSYNC_BANDWIDTH_LIMIT", "2000", "rsync.bandwidth_limit_kib", 2000),
        ("RSYNC_REQUIRED", "false", "rsync.required", False),
        ("RSYNC_RECHECK_DAYS", "14", "rsync.recheck_days", 14),
    ],
)
def test_each_variable_sets_its_field(variable: str, value: str, field: str, wanted: object) -> None:
    name, _, attribute = field.partition(".")
    loaded = load(None, S3 | RSYNC | {variable: value}, {})
    (found,) = (each for each in loaded.settings.extractor.destinations if each.name == name)
    assert getattr(found, attribute) == wanted
    assert loaded.origins[f"destinations.{field}"] == f"environment {variable}"


def test_the_directory_can_be_left_out() -> None:
    assert set(chosen(None, S3 | {"EXTERNAL_DIRECTORY": "off"})) == {"s3"}
    assert chosen(None, {"EXTERNAL_DIRECTORY": "off"}) == {}


def test_keys_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "id").write_text("AKIA\n")
    (tmp_path / "key").write_text(f"{SECRET}\n")
    environment = {
        "S3_BUCKET": "b",
        "S3_ACCESS_KEY_ID_FILE": str(tmp_path / "id"),
        "S3_SECRET_ACCESS_KEY_FILE": str(tmp_path / "key"),
    }
    found = chosen(None, environment)["s3"]
    assert isinstance(found, S3Destination)
    assert (found.access_key_id, found.secret_access_key) == (Secret("AKIA"), Secret(SECRET))


def test_a_file_names_any_number_of_them(toml: Callable[[str], Path]) -> None:
    file = toml(
        """
        [destinations.nas-2]
        kind = "directory"
        path = "/mnt/nas2"
        required = false
        [destinations.nas-2.retention]
        daily_days = 90
        keep_minimum = 5
        [destinations.frankfurt]
        kind = "s3"
        bucket = "one"
        [destinations.external]
        path = "/mnt/nas"
        [destinations.s3]
        bucket = "two"
        region = "eu-west-1"
        """
    )
    forever = {f"{tier}_days": None for tier in ("hourly", "weekly", "monthly", "yearly", "manual")}
    assert chosen(file, {"S3_REGION": "eu-north-1"}) == {
        "external": DirectoryDestination(path=Path("/mnt/nas")),
        "s3": S3Destination(bucket="two", region="eu-north-1"),
        "nas-2": DirectoryDestination(
            name="nas-2",
            path=Path("/mnt/nas2"),
            required=False,
            retention=Retention(daily_days=90, keep_minimum=5, **forever),
        ),
        "frankfurt": S3Destination(name="frankfurt", bucket="one"),
    }


def test_variables_are_those_of_the_three_names_only(toml: Callable[[str], Path]) -> None:
    file = toml('[destinations.other]\nkind = "s3"\nbucket = "other"\n')
    found = chosen(file, {"S3_REGION": "eu-west-1"})
    assert found["other"] == S3Destination(name="other", bucket="other")
    assert "s3" not in found


# What may not be


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("destinations = 3", "destinations (file {}): must be a table: write [destinations] on a line of its own"),
        ("[destinations]\nnas = 3", "destinations.nas (file {}): must be a table: write [destinations.nas]"),
        ("[destinations.nas]\npath = '/x'", 'destinations.nas (file {}): has no kind: one of "directory", "s3", "rsy'),
        ("[destinations.nas]\nkind = 'ftp'", "destinations.nas (file {}): its kind is none of"),
        ("[destinations.nas]\nkind = ['s3']", "destinations.nas (file {}): its kind is none of"),
        ("[destinations.s3]\nkind = 'rsync'", 'the name s3 belongs to the kind "s3": choose another'),
        ("[destinations.NAS]\nkind = 's3'", "destinations.NAS (file {}): a destination's name has"),
        ('[destinations."../x"]\nkind = "s3"', "a destination's name has up to 32 small letters"),
        ("[destinations.nas]\nkind = 'directory'", "destinations.nas: destinations.nas.path must be given"),
        (
            "[destinations.nas]\nkind = 'directory'\npath = '/x'\npaht = '/y'",
            "destinations.nas.paht (file {}): unknown key; did you mean destinations.nas.path?",
        ),
        (
            "[destinations.nas]\nkind = 'directory'\npath = '/x'\n[destinations.nas.retention]\ndailydays = 3",
            "destinations.nas.retention.dailydays (file {}): unknown key; did you mean",
        ),
        (
            "[destinations.nas]\nkind = 'directory'\npath = '/x'\nretention = 3",
            "destinations.nas.retention (file {}): unknown key",
        ),
        ("[destinations.s3]\nregion = 'x'", "destinations.s3.bucket (or S3_BUCKET) must be given"),
        (
            "[destinations.rsync]\ntarget = 'h:/x'",
            "destinations.rsync.key_file and destinations.rsync.known_hosts_file (or RSYNC_KEY_FILE, RSYNC_KNOWN_HO",
        ),
        (
            "[destinations.rsync]\nretention = {{ daily_days = 3 }}",
            "destinations.rsync.retention.daily_days (file {}): unknown key",
        ),
        (
            "[destinations.nas]\nkind = 'directory'\npath = '/external'",
            "destinations.external and destinations.nas are the same place: keep one",
        ),
        ("[extractor]\nexternal_directory = '/x'", "extractor.external_directory (file {}): unknown key"),
    ],
)
def test_what_a_file_may_not_say(toml: Callable[[str], Path], text: str, wanted: str) -> None:
    file = toml(text.replace("{{", "{").replace("}}", "}"))
    (line,) = refused(file)
    assert wanted.format(file) in line


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"S3_ACCESS_KEY_ID": "x"}, "access_key_id and secret_access_key go together"),
        (S3 | {"S3_PROFILE": "x"}, "access_key_id and profile exclude each other"),
        ({"S3_OBJECT_LOCK_DAYS": "401"}, "lock_days is more than lock_days_maximum (400)"),
        ({"S3_KMS_KEY": "x"}, 'kms_key counts with encryption = "aws:kms" only'),
        ({"S3_ENDPOINT": f"https://me:{SECRET}@s3.example"}, "no user belongs into endpoint"),
        ({"S3_ENDPOINT": "s3.example"}, "'s3.example' is not allowed"),
        ({"S3_PREFIX": "a/../b"}, "'a/../b' is not allowed"),
        ({"S3_OBJECT_LOCK_MODE": "compliance"}, "allowed: `COMPLIANCE`, `GOVERNANCE`, or `off`"),
        ({"S3_OBJECT_LOCK_DAY": "3"}, "S3_OBJECT_LOCK_DAY (environment): unknown variable; did you mean S3_OBJECT_LO"),
        (RSYNC | {"RSYNC_TARGET": "-oProxyCommand=x:/y"}, "allowed: `[user@]host:/path`"),
        (RSYNC | {"RSYNC_TARGET": "host:relative"}, "allowed: `[user@]host:/path`"),
        ({"RSYNC_TARGET": "h:/x", "RSYNC_KEY_FILE": "/k"}, "destinations.rsync.known_hosts_file (or RSYNC_KNOWN_HOSTS"),
        ({"EXTERNAL_INTERVAL": "86401"}, "'86401' is not allowed; allowed: 1 to 86400"),
    ],
)
def test_what_variables_may_not_say(environment: dict[str, str], wanted: str) -> None:
    if any(name.startswith("S3_") for name in environment):
        environment = {"S3_BUCKET": "b"} | environment
    (line,) = refused(None, environment)
    assert wanted in line


def test_all_that_is_wrong_is_told_at_once(toml: Callable[[str], Path]) -> None:
    file = toml("[destinations.a]\nkind = 'directory'\nmode = '777'\n[destinations.b]\n[destinations.c]\nkind = 'x'\n")
    assert len(refused(file, {"EXTERNAL_MODE": "0666"})) == 4


# config show


def test_what_is_shown_gives_the_same_settings(toml: Callable[[str], Path]) -> None:
    file = toml(
        "[destinations.nas]\nkind = 'directory'\npath = '/nas'\n[destinations.nas.retention]\nmonthly_days = 700\n"
    )
    loaded = load(file, S3 | RSYNC | {"EXTERNAL_DIRECTORY": "off", "S3_OBJECT_LOCK_MODE": "off"}, {})
    result = CliRunner().invoke(command, ["show"], obj=SimpleNamespace(loaded=loaded, json=False))
    assert SECRET not in result.stdout
    assert "# destinations.s3.secret_access_key = ********  # environment S3_SECRET_ACCESS_KEY\n" in result.stdout
    assert 'destinations.external.path = "off"  # environment EXTERNAL_DIRECTORY\n' in result.stdout
    assert 'destinations.nas.retention.daily_days = "forever"  # default\n' in result.stdout
    again = load(toml(result.stdout), {key: S3[key] for key in S3 if key != "S3_BUCKET"}, {})
    assert again.settings == loaded.settings


def test_shown_as_json(toml: Callable[[str], Path]) -> None:
    loaded = load(None, S3, {})
    result = CliRunner().invoke(command, ["show", "--json"], obj=SimpleNamespace(loaded=loaded, json=False))
    found = json.loads(result.stdout)["settings"]
    assert found["destinations.s3.secret_access_key"] == {
        "value": "********",
        "origin": "environment S3_SECRET_ACCESS_KEY",
    }
    assert found["destinations.s3.bucket"] == {"value": "backups", "origin": "environment S3_BUCKET"}
    assert found["destinations.external.path"]["value"] == "/external"
    assert [row.key for row in effective(loaded)] == list(found)


# From a name, or a place, to an adapter


def services(environment: Mapping[str, str]) -> Services:
    return Services(load(None, environment, {}).settings)


def test_a_destination_is_found_by_its_name() -> None:
    found = services(S3 | RSYNC)
    assert [found.destination(name).kind for name in ("external", "s3", "rsync")] == ["directory", "s3", "rsync"]
    assert found.destination("s3").label == "s3://backups"
    assert SECRET not in repr(vars(found.destination("s3")))
    with pytest.raises(NotFoundError, match="no destination is called 'nas'; configured: external, s3, rsync"):
        found.destination("nas")


def test_a_place_is_enough() -> None:
    found = services({"S3_ACCESS_KEY_ID": "a", "S3_SECRET_ACCESS_KEY": "b", **RSYNC, "RSYNC_TARGET": ""})
    assert [each.name for each in found.settings.extractor.destinations] == ["external"]
    assert found.destination("s3://other/a/b/").label == "s3://other/a/b"
    assert found.destination("/mnt/nas").label == "/mnt/nas"
    assert found.destination("ssh://me@host:2222/srv/copies").label == "me@host:/srv/copies"
    assert found.destination("ssh://[::1]/srv").label == "[::1]:/srv"


def test_what_is_typed_takes_the_other_settings_from_the_variables() -> None:
    settings = load(None, S3 | {"S3_REGION": "eu-west-1", "S3_PREFIX": "own"}, {}).settings
    made = places._typed(settings, "s3://other")
    assert made == msgspec.structs.replace(settings.extractor.s3_defaults, bucket="other", prefix="")
    assert isinstance(made, S3Destination)
    assert (made.region, made.secret_access_key) == ("eu-west-1", Secret(SECRET))


def test_what_is_no_place() -> None:
    for reference in ("ftp://x/y", "s3://", "ssh://host", "ssh://-oProxyCommand=x/y"):
        with pytest.raises((UsageError, ConfigurationError)):
            services(RSYNC).destination(reference)
    with pytest.raises(ConfigurationError, match="needs a key"):
        services({}).destination("ssh://host/path")


def test_the_extractors_are_those_of_the_names() -> None:
    found = services(S3 | {"S3_PROLONG_LOCKS": "on", "S3_INTERVAL": "60", "S3_REQUIRED": "no"})
    settings = {each.settings.name: each.settings for each in found.extractors()}
    assert list(settings) == ["external", "s3"]
    assert settings["external"].state == Path("/backups/extracted/external")
    assert (settings["external"].interval_seconds, settings["s3"].interval_seconds) == (300, 60)
    assert (settings["external"].required, settings["s3"].required) == (True, False)
    assert settings["external"].prolong is None
    assert settings["s3"].prolong is not None
    assert settings["s3"].prolong.days == 400
    assert settings["s3"].recheck is None
    assert [each.settings.name for each in found.extractors(["s3"])] == ["s3"]
    with pytest.raises(NotFoundError):
        found.extractors(["s4"])
