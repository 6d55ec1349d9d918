"""Giving rights up: what a process may afterwards, by the kernel's word and by trying."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pgkeep.adapters import privileges
from pgkeep.errors import ConfigurationError
from tests import clusters
from tests.vault_daemon import PROJECT, USER

AS_IN_COMPOSE = ("setpriv", "--bounding-set=-all,+linux_immutable,+setuid,+setgid,+setpcap", "--inh-caps=-all")
WITHOUT_SETPCAP = ("setpriv", "--bounding-set=-all,+linux_immutable,+setuid,+setgid", "--inh-caps=-all")
WITHOUT_IMMUTABLE = ("setpriv", "--bounding-set=-all,+setuid,+setgid,+setpcap", "--inh-caps=-all")
WITHOUT_SETUID = ("setpriv", "--bounding-set=-all,+linux_immutable,+setgid,+setpcap", "--inh-caps=-all")

# Gives rights up as the first argument says, then tells what it has, what its children have, what it can still do.
PROGRAM = """
import dataclasses, json, os, sys
from pathlib import Path
from pgkeep.adapters import fsflags, privileges
from pgkeep.errors import PgkeepError

told = {}
def tell(name, deed):
    try:
        told[name] = deed()
    except (OSError, PgkeepError) as error:
        told[name] = f"{type(error).__name__}: {error}"

call, name, place = sys.argv[1], sys.argv[2], Path(sys.argv[3])
tell("call", lambda: getattr(privileges, call)(*[name][: call != "renounce"]))
tell("standing", lambda: dataclasses.asdict(privileges.standing()))
tell("flag", lambda: fsflags.set_path_flag(place, fsflags.IMMUTABLE, True))
tell("back", lambda: os.setuid(0))
reading, writing = os.pipe()
if os.fork() == 0:
    os.dup2(writing, 1)
    os.execv("/bin/grep", ["grep", "CapEff", "/proc/self/status"])
os.wait()
told["child"] = int(os.read(reading, 100).split()[1], 16)
print(json.dumps(told))
"""


@pytest.fixture
def place() -> Iterator[Path]:
    clusters.need_root("becoming another user")
    with clusters.scratch_directory() as directory:
        path = directory / "file"
        path.touch()
        owner = pwd.getpwnam(USER)
        os.chown(path, owner.pw_uid, owner.pw_gid)
        yield path


def told_after(call: str, place: Path, under: Sequence[str] = AS_IN_COMPOSE, name: str = USER) -> dict[str, Any]:
    done = subprocess.run(
        [*under, sys.executable, "-c", PROGRAM, call, name, place],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": f"{PROJECT}/src"},
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_the_vaults_user_keeps_the_one_right_for_itself_alone(place: Path) -> None:
    told = told_after("become", place)
    owner = pwd.getpwnam(USER)
    assert told["call"] is True
    assert set(told["standing"]["uids"]) == {owner.pw_uid}
    assert told["standing"]["groups"] == sorted(os.getgrouplist(USER, owner.pw_gid))
    only = 1 << privileges.CAP_LINUX_IMMUTABLE
    assert [told["standing"][name] for name in ("permitted", "effective")] == [only, only]
    assert [told["standing"][name] for name in ("inheritable", "ambient", "bounding")] == [0, 0, 0]
    assert told["standing"]["no_new_privileges"] is True
    assert told["flag"] is None
    assert told["child"] == 0
    assert told["back"].startswith("PermissionError")


def test_without_setpcap_the_bounding_set_stays_and_gives_nothing(place: Path) -> None:
    told = told_after("become", place, WITHOUT_SETPCAP)
    assert told["call"] is True
    assert told["standing"]["bounding"] != 0
    assert (told["child"], told["flag"]) == (0, None)


def test_without_the_capability_it_says_so(place: Path) -> None:
    told = told_after("become", place, WITHOUT_IMMUTABLE)
    assert told["call"] is False
    assert told["standing"]["permitted"] == 0
    assert told["flag"].startswith("MissingCapabilityError")


def test_without_setuid_it_fails_and_names_the_remedy(place: Path) -> None:
    told = told_after("become", place, WITHOUT_SETUID)
    assert told["call"].startswith("ProtectionError: this process (uid 0) can't become")


@pytest.mark.parametrize("call", ["step_down", "renounce"])
def test_stepping_down_leaves_nothing(place: Path, call: str) -> None:
    told = told_after(call, place)
    assert told["call"] is None
    uid = pwd.getpwnam(USER).pw_uid if call == "step_down" else privileges.NOBODY
    assert set(told["standing"]["uids"]) == {uid}
    assert told["standing"]["permitted"] == told["child"] == 0
    assert told["flag"].split(":")[0] in {"MissingCapabilityError", "PermissionError"}
    assert told["back"].startswith("PermissionError")


def test_a_user_may_be_named_by_number(place: Path) -> None:
    uid = pwd.getpwnam(USER).pw_uid
    assert set(told_after("become", place, name=str(uid))["standing"]["uids"]) == {uid}


@pytest.mark.parametrize("name", ["no-such-user", "4000000000", "99999999999999999999"])
def test_an_unknown_user_is_a_mistake_in_the_configuration(name: str) -> None:
    with pytest.raises(ConfigurationError, match="there is no user"):
        privileges.find_user(name)
