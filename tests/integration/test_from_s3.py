"""Reading back from object storage with the restorer's credentials alone; and after somebody used the writer's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pgkeep.adapters.destinations.s3 import Options, S3Destination
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.domain import names
from pgkeep.errors import StorageError
from pgkeep.progress import Silent
from pgkeep.restore import copies, download, fetch
from tests import elsewhere
from tests.elsewhere import Source, bare_machine, copy_out, path_of, wire
from tests.integration.keeper import Keeper, bytes_digest, fresh_name
from tests.s3_servers import Hands, SeaweedFS, seaweed, secret_of

__all__ = ["seaweed"]
MIB = 1 << 20


@pytest.fixture(scope="module")
def source(cluster15: ScratchCluster) -> Iterator[Source]:
    with elsewhere.source(cluster15) as made:
        yield made


def copied(source: Source, server: SeaweedFS, **more: Any) -> Options:
    """The options under which all backups lie there, locked."""
    options = server.options("writer", **more)
    copy_out(source, S3Destination(options, None))
    return options


@pytest.fixture(scope="module")
def there(source: Source, seaweed: SeaweedFS) -> Options:
    """Left as it is by every test."""
    return copied(source, seaweed)


@pytest.fixture
def own(source: Source, seaweed: SeaweedFS) -> Options:
    """For a test that changes things there."""
    return copied(source, seaweed)


def restorer(source: Source, directory: Path, options: Options, endpoint: str | None = None) -> Keeper:
    """A machine that has the restorer's credentials, in files, and nothing else."""
    secret = directory / "secret"
    secret.write_text(secret_of("restorer"))
    return bare_machine(
        source,
        directory,
        S3_ENDPOINT=endpoint or options.endpoint or "",
        S3_PATH_STYLE="true",
        S3_ACCESS_KEY_ID="restorer",
        S3_SECRET_ACCESS_KEY_FILE=str(secret),
    )


def test_a_machine_with_nothing_reads_everything_back(source: Source, there: Options, scratch: Path) -> None:
    machine = restorer(source, scratch, there)
    listed = machine.json("list", "--from", there.label)
    assert [each["id"] for each in listed] == [source.first["id"], source.second["id"]]
    assert all(each["version"] for each in listed)
    shallow = machine.json("verify", "--all", "--from", there.label)
    assert (shallow["ok"], len(shallow["backups"])) == (True, 3)
    assert {each["lock"]["mode"] for each in shallow["backups"]} == {"COMPLIANCE"}
    assert machine.json("verify", "--all", "--deep", "--from", there.label)["ok"] is True
    assert "locked until" in machine.run("verify", "latest", "--from", there.label).stderr
    got = machine.json("fetch", "latest", "--from", there.label, "--to", scratch / "to")
    assert bytes_digest(Path(got["path"])) == source.second["sha256"]
    with fresh_name(source.database.cluster) as target:
        machine.json("restore", "latest", "--from", there.label, "--to", target.conninfo, "--create")
        assert target.value("SELECT array_agg(a ORDER BY a)::text FROM small") == "{1,2,3}"
        assert target.value("SELECT count(*) FROM shop.large") == 20000
    assert not machine.root.exists()


def test_one_table_costs_its_bytes_on_the_wire_and_at_most_a_mebibyte(
    source: Source, there: Options, seaweed: SeaweedFS, scratch: Path
) -> None:
    """Counted between client and server: headers, listings and manifests too."""
    with wire(seaweed.port) as counted, fresh_name(source.database.cluster) as target:
        machine = restorer(source, scratch, there, counted.endpoint)
        reference = ("restore", source.second["id"], "--from", there.label, "--to", target.conninfo, "--create")
        answer = machine.json(*reference, "--table", "shop.orders")
        assert target.value("SELECT count(*) FROM shop.orders") == 3000
    table_bytes = source.table_bytes("orders")
    assert table_bytes > MIB // 2
    assert table_bytes <= answer["fetched_bytes"] <= counted.received_bytes <= table_bytes + MIB
    assert source.second["size_bytes"] > 4 * (table_bytes + MIB), "or it would prove nothing"


def test_verify_without_deep_reads_little(source: Source, there: Options, seaweed: SeaweedFS, scratch: Path) -> None:
    with wire(seaweed.port) as counted:
        machine = restorer(source, scratch, there, counted.endpoint)
        assert machine.json("verify", "latest", "--from", there.label)["ok"] is True
    assert counted.received_bytes <= MIB


# ---------------------------------------------------------------- with the writer's credentials


def writers_hands(seaweed: SeaweedFS, options: Options) -> Hands:
    return Hands(seaweed.client("owner"), options.bucket, options.prefix)


def test_what_was_written_over_still_restores(source: Source, own: Options, seaweed: SeaweedFS, scratch: Path) -> None:
    """Dump and manifest overwritten, delete markers on everything: the older versions are what counts."""
    attacker, path = writers_hands(seaweed, own), path_of(source.second)
    honest = json.loads(Path(source.second["path"] + names.MANIFEST_SUFFIX).read_text())
    forged = honest | {"id": "20990101T000000Z-ffffff", "sealed_at": "2099-01-01T00:00:00Z", "sha256": "0" * 64}
    attacker.put(path, b"your data is encrypted, pay here")
    attacker.put(path, bytes(source.second["size_bytes"]))
    attacker.put(path + names.MANIFEST_SUFFIX, json.dumps(forged).encode())
    attacker.put(path + names.MANIFEST_SUFFIX, b"\x00garbage")
    attacker.put(path + names.CHECKSUM_SUFFIX, b"x")
    for suffix in elsewhere.SUFFIXES:
        for each in (source.first, source.second):
            key = f"{own.prefix}/{path_of(each)}{suffix}"
            attacker.client.delete_object(Bucket=own.bucket, Key=key)
    machine = restorer(source, scratch, own)
    answer = machine.run("list", "--from", own.label, "--json")
    assert answer.code == 7
    assert [(each["id"], each["state"]) for each in answer.json()] == [
        (source.first["id"], "whole"), (source.second["id"], "whole"), (forged["id"], "suspect")
    ]  # fmt: skip
    assert "the manifest was written 3 times; the oldest is taken" in answer.stderr
    assert "the dump was written 3 times" in answer.stderr
    found = machine.run("verify", "latest", "--from", own.label, "--json")
    assert found.code == 7
    assert any("version" in each["message"] for each in found.json()["findings"] if each["code"] == "content")
    for reference in ("latest", source.second["id"], f"manual/{Path(path).name}"):
        got = machine.json("fetch", reference, "--from", own.label, "--to", scratch / reference.replace("/", "-"))
        assert bytes_digest(Path(got["path"])) == source.second["sha256"]
        assert machine.json("verify", got["path"])["ok"] is True
    with fresh_name(source.database.cluster) as target:
        machine.json("restore", "latest", "--from", own.label, "--to", target.conninfo, "--create")
        assert target.value("SELECT array_agg(a ORDER BY a)::text FROM small") == "{1,2,3}"


def test_a_forged_version_is_found_only_by_its_own_id(
    source: Source, own: Options, seaweed: SeaweedFS, scratch: Path
) -> None:
    path = path_of(source.second)
    honest = json.loads(Path(source.second["path"] + names.MANIFEST_SUFFIX).read_text())
    forged = honest | {"id": "20990101T000000Z-ffffff", "notes": ["forged"]}
    writers_hands(seaweed, own).put(path + names.MANIFEST_SUFFIX, json.dumps(forged).encode())
    machine = restorer(source, scratch, own)
    assert machine.run("show", "latest", "--from", own.label, "--json").json()["id"] == source.second["id"]
    shown = machine.run("show", forged["id"], "--from", own.label, "--json")
    assert shown.code == 7
    assert shown.json()["manifest"]["notes"] == ["forged"]


def test_where_nothing_is_locked_nothing_claims_a_lock(source: Source, seaweed: SeaweedFS, scratch: Path) -> None:
    options = copied(source, seaweed, bucket="versioned", lock_mode=None)
    machine = restorer(source, scratch, options)
    found = machine.json("verify", "--all", "--from", options.label)
    assert {each["lock"] for each in found["backups"]} == {None}
    assert "not locked" in machine.run("verify", "latest", "--from", options.label).stderr


# ---------------------------------------------------------------- the way there


def test_a_server_that_goes_away_midway_costs_only_what_is_missing(
    source: Source, there: Options, seaweed: SeaweedFS, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (download, fetch):
        monkeypatch.setattr(module, "PIECE_BYTES", MIB)
    size = source.second["size_bytes"]
    with wire(seaweed.port, limit_bytes=size // 2) as cut:
        with opened(seaweed, there, cut.endpoint) as place:
            copy, _ = copies.find(place, "latest", None, Silent())
            with pytest.raises(StorageError):
                fetch.fetch(place, copy, scratch / "to", Silent())
        assert cut.is_cut
    assert not list((scratch / "to").glob("*.sql.gz*")), "nothing half under a name that counts"
    with opened(seaweed, there, seaweed.endpoint) as place:
        copy, _ = copies.find(place, "latest", None, Silent())
        got = fetch.fetch(place, copy, scratch / "to", Silent())
    assert bytes_digest(got.path) == source.second["sha256"]
    assert got.fetched_bytes < size, "what had come was not fetched again"


def test_a_restore_whose_server_goes_away_leaves_nothing(
    source: Source, there: Options, seaweed: SeaweedFS, scratch: Path
) -> None:
    from pgkeep.adapters.postgres import Target
    from pgkeep.restore.recover import Options as Wishes
    from pgkeep.restore.recover import restore

    cluster = source.database.cluster
    with wire(seaweed.port, limit_bytes=source.second["size_bytes"] // 2) as cut, fresh_name(cluster) as target:
        with opened(seaweed, there, cut.endpoint) as place:
            copy, _ = copies.find(place, "latest", None, Silent())
            with fetch.opened(place, copy, scratch, Silent()) as file, pytest.raises(StorageError):
                restore(file, Target.parse(target.conninfo, None), copy.backup.manifest.facts, Wishes(create=True),
                        scratch, Silent())  # fmt: skip
        assert cut.is_cut
        assert target.name not in cluster_databases(source), "the database that was made for it is gone"
    assert list(scratch.glob("restore-*")) == []


def cluster_databases(source: Source) -> list[str]:
    return str(source.database.value("SELECT string_agg(datname, ',') FROM pg_database")).split(",")


def opened(seaweed: SeaweedFS, options: Options, endpoint: str) -> Any:
    chosen = seaweed.options("restorer", prefix=options.prefix, endpoint=endpoint, attempts=1, timeout_seconds=5.0)
    return S3Destination(chosen, None).opened(to_read=True)


def test_wrong_credentials_are_named_as_that(source: Source, there: Options, scratch: Path) -> None:
    machine = restorer(source, scratch, there).of(S3_SECRET_ACCESS_KEY_FILE="", S3_SECRET_ACCESS_KEY="wrong")
    text = machine.fails(6, "list", "--from", there.label)
    assert "secret key" in text
    assert "wrong" not in text.replace("wrong credentials", "")


def test_destination_test_says_what_the_lock_is_worth(source: Source, there: Options, scratch: Path) -> None:
    machine = restorer(source, scratch, there).of(
        S3_ACCESS_KEY_ID="owner", S3_SECRET_ACCESS_KEY=secret_of("owner"), S3_SECRET_ACCESS_KEY_FILE=""
    )
    shown = machine.json("destination", "test", there.label)
    assert (shown["ok"], shown["lock"], shown["kind"]) == (True, "proven", "s3")
    assert "was refused" in shown["meaning"]
    unfit = machine.run("destination", "test", f"s3://versioned/{there.prefix}")
    assert unfit.code == 6
    assert "lock: none" in unfit.stderr
