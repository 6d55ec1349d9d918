"""The extractor as a service, as another user, and with destinations that come, go, fill up, or are somebody else's."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgkeep.adapters import clock
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.errors import StorageError
from pgkeep.progress import Silent
from tests import clusters, outside
from tests.faults.machine import wait_for
from tests.outside import Outside, Template, spoil

DAY = dt.timedelta(days=1)
EXTRACTOR_USER, VAULT_GROUP = 10003, 10002
AS_EXTRACTOR = ("setpriv", f"--reuid={EXTRACTOR_USER}", f"--regid={EXTRACTOR_USER}", "--inh-caps=-all")


@pytest.fixture(scope="module")
def made(cluster15: ScratchCluster) -> Iterator[Template]:
    with outside.template(cluster15) as made:
        yield made


@pytest.fixture
def own(made: Template, scratch: Path) -> Outside:
    return Outside(made, scratch)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> dict[str, dt.timedelta]:
    """What this process takes for the time: so much later than it is."""
    ahead = {"by": dt.timedelta(0)}
    real = clock.now
    monkeypatch.setattr(clock, "now", lambda: real() + ahead["by"])
    return ahead


# The destination


@contextlib.contextmanager
def mounted_on(place: Path, what: Path) -> Iterator[None]:
    clusters.need_root("mounting a directory elsewhere")
    subprocess.run(["mount", "--bind", what, place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def test_an_unmounted_destination_is_an_error_and_nothing_is_written_underneath(own: Outside, scratch: Path) -> None:
    for name in ("nas", "other"):
        (scratch / name).mkdir()
    with mounted_on(own.external, scratch / "nas"):
        own.once()
    for _ in range(2):
        assert "is it mounted?" in own.run("once", code=6)
        assert list(own.external.iterdir()) == []
    assert own.events().count("extraction failed") == 1
    with mounted_on(own.external, scratch / "nas"):
        assert own.once()["extracted"] == []
        own.assert_whole()
    with mounted_on(own.external, scratch / "other"):
        own.run("adopt")
        assert sorted(own.once()["extracted"]) == own.sources()
    with mounted_on(own.external, scratch / "nas"):
        assert "another is mounted" in own.run("once", code=6)
        own.run("adopt")
        shown = own.once()
        assert (shown["extracted"], shown["adopted"]) == ([], []), "what was known of it is forgotten"


def test_the_copies_of_another_vault_are_not_taken_for_ours(own: Outside, scratch: Path, made: Template) -> None:
    own.once()
    (scratch / "b").mkdir()
    other = Outside(made, scratch / "b", own.external)
    text = (other.active / "vault.json").read_text()
    identifier = text.partition('"id":"')[2][:32]
    (other.active / "vault.json").unlink()
    (other.active / "vault.json").write_text(text.replace(identifier, "0" * 32))
    assert "another vault" in other.run("once", code=6)
    other.run("adopt")
    assert "another is mounted" in own.run("once", code=6)


@pytest.mark.parametrize(
    "marker", [b"", b"{}", b'{"format":1,"id":"../x","vault":"","made_at":"2026-01-01T00:00:00Z"}']
)
def test_a_spoiled_marker_is_an_error_until_it_is_adopted(own: Outside, marker: bytes) -> None:
    own.once()
    (own.external / ".pgkeep-destination.json").write_bytes(marker)
    assert "marker is malformed" in own.run("once", code=6)
    own.run("adopt")
    assert sorted(own.once()["adopted"]) == own.sources()


def test_a_newer_pgkeep_s_destination_is_refused(own: Outside) -> None:
    own.once()
    marker = own.external / ".pgkeep-destination.json"
    marker.write_text(marker.read_text().replace('"format":1', '"format":2'))
    assert "use a newer pgkeep" in own.run("once", code=11)


def test_a_full_destination_takes_what_fits_and_the_rest_when_there_is_room(
    made: Template, scratch: Path, later: dict[str, dt.timedelta]
) -> None:
    with clusters.mounted_filesystem("tmpfs", 1) as small:
        own = Outside(made, scratch, small)
        large = own.source("manual")
        assert (own.active / large).stat().st_size > 1 << 20, "it would fit"
        for _ in range(3):
            shown = own.once(6)
            assert "bytes free" in shown["troubles"][0]["message"]
        own.assert_whole(*(path for path in own.sources() if path != large))
        assert own.events(large) == ["extraction failed"]
        later["by"] = DAY + dt.timedelta(hours=1)
        own.extractor().run_pass(Silent())
        assert own.events(large) == ["extraction failed"] * 2
        subprocess.run(["mount", "-o", "remount,size=16m", small], check=True)
        later["by"] = dt.timedelta(0)
        assert own.once()["extracted"] == [large]
        own.assert_whole()


def test_a_damaged_copy_stays_where_it_is_while_there_is_no_room_for_another(made: Template, scratch: Path) -> None:
    with clusters.mounted_filesystem("tmpfs", 8) as small:
        own = Outside(made, scratch, small)
        own.once()
        large = own.source("manual")
        own.copy(large).chmod(0o600)
        with own.copy(large).open("ab") as file:
            file.write(b"more")
        with (small / "ballast").open("wb") as ballast:
            left = os.statvfs(small)
            os.posix_fallocate(ballast.fileno(), 0, left.f_bfree * left.f_frsize - 65536)
        for _ in range(2):
            own.once(6)
        assert own.copy(large).exists()
        assert own.events(large) == ["extracted", "copy damaged", "extraction failed"]
        (small / "ballast").unlink()
        assert own.once()["repaired"] == [large]


def test_a_destination_that_takes_nothing_is_not_tried_for_every_backup(own: Outside) -> None:
    """The way to each tier's directory is blocked: after three failures the rest waits, told of once."""
    for number in range(1, 6):
        own.bring_new(own.source("daily"), number * DAY)
    (own.external / "daily").touch()
    shown = own.once(6)
    assert len([trouble for trouble in shown["troubles"] if trouble["path"]]) == 3
    assert "more backups wait" in shown["troubles"][-1]["message"]
    assert own.events().count("extraction failed") == 4
    (own.external / "daily").unlink()
    own.once()
    own.assert_whole()


@pytest.mark.parametrize("kind", ["exfat", "ntfs"])
def test_a_filesystem_without_modes_is_warned_of_once(
    made: Template, scratch: Path, loop_filesystem: clusters.LoopFilesystem, kind: clusters.FilesystemKind
) -> None:
    own = Outside(made, scratch, loop_filesystem(kind, 32))
    stderr = own.run("once")
    assert stderr.count("keeps no modes") == 1
    own.assert_whole()


# Other users


def reaching(own: Outside, *groups: int) -> tuple[str, ...]:
    """As the image's user, who sees what the vault lets its group see; the service's directories are his."""
    clusters.need_root("running as another user")
    for path in (own.extracted, own.log, own.external):
        path.touch() if path == own.log else path.mkdir(exist_ok=True)
        os.chown(path, EXTRACTOR_USER, EXTRACTOR_USER)
    for path in own.active.rglob("*.sql.gz"):
        os.chown(path, VAULT_GROUP, VAULT_GROUP)
        path.chmod(0o440)
    return (*AS_EXTRACTOR, f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups")


def test_it_needs_no_right_but_the_vault_s_group(own: Outside) -> None:
    own.once(under=reaching(own, VAULT_GROUP))
    own.assert_whole()
    assert {path.stat().st_uid for path in own.external.rglob("*")} == {EXTRACTOR_USER}


def test_without_the_group_it_says_so(own: Outside) -> None:
    stderr = own.run("once", code=6, under=reaching(own))
    assert "must be in the vault's group" in stderr
    assert own.files() == set()


def test_a_destination_of_root_s_names_the_chown(own: Outside) -> None:
    under = reaching(own, VAULT_GROUP)
    os.chown(own.external, 0, 0)
    assert f"chown {EXTRACTOR_USER}:{EXTRACTOR_USER}" in own.run("once", code=6, under=under)
    assert own.events() == ["extraction failed"]


def test_a_log_that_can_not_be_written_stops_nothing_silently(own: Outside) -> None:
    under = reaching(own, VAULT_GROUP)
    os.chown(own.log, 0, 0)
    stderr = own.run("once", code=6, under=under)
    assert "extraction_audit.jsonl" in stderr


# The service


def test_the_service_copies_what_comes_and_tells_of_its_health(own: Outside) -> None:
    with own.serving() as service:
        wait_for(lambda: own.files() == own.expected(*own.sources()))
        new = own.bring_new(own.source("daily"), DAY)
        wait_for(lambda: own.copy(new + ".manifest.json").exists())
        wait_for(own.is_well)
        assert (own.word().role, own.word().pid) == ("extractor", service.pid)
        spare = own.external.rename(own.external.with_name("gone"))
        wait_for(lambda: not own.is_well())
        assert "does not exist" in own.word().problems[0]
        spare.rename(own.external)
        wait_for(own.is_well)
        service.terminate()
        stdout, stderr = service.communicate(timeout=5)
    assert stderr == ""
    assert f"copied {new}" in stdout
    assert own.events(new) == ["extracted"]
    assert own.events().count("extraction failed") == 1


def test_the_service_ends_at_once_and_stays_small(own: Outside) -> None:
    with own.serving(300) as service:
        wait_for(lambda: own.files() == own.expected(*own.sources()))
        wait_for(lambda: "pselect" in Path(f"/proc/{service.pid}/wchan").read_text() or _sleeps(service.pid))
        status = Path(f"/proc/{service.pid}/status").read_text()
        resident_kib = int(status.partition("VmRSS:")[2].split()[0])
        assert resident_kib <= 50 * 1024
        before = time.monotonic()
        service.send_signal(signal.SIGTERM)
        assert service.wait(timeout=5) == 0
        assert time.monotonic() - before < 2


def test_the_service_s_records_can_be_json(own: Outside) -> None:
    spoil(own.active / own.source("hourly"))
    own.machine.environment["PGKEEP_LOG_FORMAT"] = "json"
    with own.serving() as service:
        wait_for(lambda: (own.extracted / ".health.json").exists() and bool(own.word().problems))
        service.terminate()
        stdout, _ = service.communicate(timeout=5)
    records = [json.loads(line) for line in stdout.splitlines()]
    assert {record["role"] for record in records} == {"extractor"}
    assert {"info", "error"} <= {record["level"] for record in records}


def _sleeps(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_the_service_waits_for_the_vault(own: Outside) -> None:
    (own.active / "vault.json").rename(own.root / "vault.json")
    with own.serving() as service:
        wait_for(lambda: (own.extracted / ".health.json").exists() and bool(own.word().problems))
        assert "no vault" in own.word().problems[0]
        (own.root / "vault.json").rename(own.active / "vault.json")
        wait_for(lambda: own.files() == own.expected(*own.sources()))
        wait_for(own.is_well)
        assert service.poll() is None
    assert "extraction failed" not in own.events()


def test_a_service_whose_health_can_not_be_written_goes_on(own: Outside) -> None:
    own.extracted.mkdir()
    (own.extracted / ".health.json").mkdir()
    with own.serving() as service:
        wait_for(lambda: own.files() == own.expected(*own.sources()))
        service.terminate()
        stdout, _ = service.communicate(timeout=5)
    assert "the health file could not be written" in stdout


def test_a_pass_that_fails_tells_its_listener(own: Outside) -> None:
    shutil.rmtree(own.external)
    with pytest.raises(StorageError, match="does not exist"):
        own.extractor().run_pass(Silent())
