"""What goes wrong on the way to a bucket, and there: nothing half counts or happens twice, errors name the cause."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import os
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgkeep.adapters.destinations import Content
from pgkeep.adapters.destinations.s3 import Options, S3Destination
from pgkeep.errors import ConfigurationError, NotFoundError, PgkeepError, StorageError
from pgkeep.progress import Silent
from tests import s3_servers
from tests.s3_proxy import Answer, Proxy, Rule, error, proxy_to
from tests.s3_servers import SeaweedFS, hands, seaweed, store

__all__ = ["seaweed"]

MIB = 1 << 20
PATH = "daily/2026-11-23/2026-11-23_00-00-00.sql.gz"
PART_BYTES = 5 * MIB
AT_ONCE, IN_PARTS = 1000, PART_BYTES + 1000
both_ways = pytest.mark.parametrize("size_bytes", [AT_ONCE, IN_PARTS], ids=["at-once", "in-parts"])


@pytest.fixture
def proxy(seaweed: SeaweedFS) -> Iterator[Proxy]:
    with proxy_to(seaweed.port) as started:
        yield started


def options_through(proxy: Proxy, server: SeaweedFS, name: str = "writer", **more: Any) -> Options:
    return server.options(name, endpoint=proxy.endpoint, part_size_bytes=PART_BYTES, **more)


def content_of(data: bytes) -> Content:
    return Content(len(data), hashlib.sha256(data).hexdigest())


def assert_brought_once(server: SeaweedFS, options: Options, version: str, data: bytes) -> None:
    reach = hands(server, options)
    assert reach.versions() == [version]
    assert reach.get(PATH, version) == data


def upload_of(size_bytes: int) -> str:
    return "put" if size_bytes == AT_ONCE else "part"


def end_of(size_bytes: int) -> str:
    return "put" if size_bytes == AT_ONCE else "complete"


# On the way


@both_ways
@pytest.mark.parametrize("kept_bytes", [0, 700])
def test_a_connection_that_is_cut_is_made_again(
    proxy: Proxy, seaweed: SeaweedFS, size_bytes: int, kept_bytes: int
) -> None:
    proxy.rules.append(Rule(upload_of(size_bytes), path="/daily/", cut_request_at=kept_bytes))
    options, data = options_through(proxy, seaweed), os.urandom(size_bytes)
    version = store(S3Destination(options, None), data, PATH)
    assert proxy.rules[0].times == 0
    assert_brought_once(seaweed, options, version, data)


@both_ways
@pytest.mark.parametrize("code", ["SlowDown", "InternalError", ""])
def test_a_busy_server_is_asked_again(proxy: Proxy, seaweed: SeaweedFS, size_bytes: int, code: str) -> None:
    status = 500 if code == "InternalError" else 503
    proxy.rules += [
        Rule(kind, instead=error(status, code)) for kind in ("head", upload_of(size_bytes), "put retention")
    ]
    options, data = options_through(proxy, seaweed), os.urandom(size_bytes)
    version = store(S3Destination(options, None), data, PATH)
    assert_brought_once(seaweed, options, version, data)


@both_ways
@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (error(503, "SlowDown", "Please reduce your request rate."), "SlowDown, status 503: Please reduce"),
        (error(503, ""), "SlowDown, status 503"),
        (error(500, "InternalError"), "InternalError, status 500"),
        (error(507, "XMinioStorageFull"), "QuotaExceeded, status 507"),
    ],
)
def test_a_server_that_stays_busy_is_an_error_that_says_so(
    proxy: Proxy, seaweed: SeaweedFS, size_bytes: int, answer: Answer, told: str
) -> None:
    """And nothing is lost: the next run continues."""
    proxy.rules.append(Rule(upload_of(size_bytes), times=-1, path="/daily/", instead=answer))
    options, data = options_through(proxy, seaweed), os.urandom(size_bytes)
    destination = S3Destination(options, None)
    with pytest.raises(StorageError, match="upload") as caught:
        store(destination, data, PATH)
    assert told in caught.value.message
    assert options.bucket in caught.value.message
    assert hands(seaweed, options).versions() == []
    proxy.rules.clear()
    assert_brought_once(seaweed, options, store(destination, data, PATH), data)


@both_ways
@pytest.mark.parametrize("name", ["writer", "putter"])
def test_a_lost_answer_brings_no_second_version(proxy: Proxy, seaweed: SeaweedFS, size_bytes: int, name: str) -> None:
    """The server did it; the same request again is refused for its own success."""
    lost = Rule(end_of(size_bytes), path="/daily/", answer=lambda _: None)
    proxy.rules.append(lost)
    options, data = options_through(proxy, seaweed, name), os.urandom(size_bytes)
    version = store(S3Destination(options, None), data, PATH)
    assert lost.times == 0
    assert proxy.kinds().count(end_of(size_bytes)) == 2
    assert_brought_once(seaweed, options, version, data)


def test_a_lost_answer_to_an_unconditional_end_brings_no_second_version(proxy: Proxy, seaweed: SeaweedFS) -> None:
    """Where a damaged copy is replaced: the upload is gone when it is to be completed again, because it was."""
    options, data = options_through(proxy, seaweed), os.urandom(IN_PARTS)
    reach = hands(seaweed, options)
    damaged = reach.put(PATH, b"damaged")
    proxy.rules.append(Rule("complete", answer=lambda _: None))
    version = store(S3Destination(options, None), data, PATH, aside="damaged-1")
    assert reach.versions() == [version, damaged]
    assert reach.get(PATH) == data


@both_ways
def test_every_other_lost_answer_is_asked_for_again(proxy: Proxy, seaweed: SeaweedFS, size_bytes: int) -> None:
    kinds = ("post uploads", "part", "head", "get versioning", "get object-lock", "put retention")
    proxy.rules += [Rule(kind, answer=lambda _: None) for kind in kinds]
    options, data = options_through(proxy, seaweed), os.urandom(size_bytes)
    version = store(S3Destination(options, None), data, PATH)
    assert_brought_once(seaweed, options, version, data)


@both_ways
def test_bytes_that_change_on_the_way_are_refused_by_the_server(
    proxy: Proxy, seaweed: SeaweedFS, size_bytes: int, tmp_path: Path
) -> None:
    changed = Rule(upload_of(size_bytes), path="/daily/", change_body=lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    proxy.rules.append(changed)
    options, data = options_through(proxy, seaweed), os.urandom(size_bytes)
    destination = S3Destination(options, tmp_path)
    with pytest.raises(StorageError, match="not those that were sent"):
        store(destination, data, PATH)
    assert hands(seaweed, options).versions() == []
    assert_brought_once(seaweed, options, store(destination, data, PATH), data)


# Reading


def brought(proxy: Proxy, server: SeaweedFS, data: bytes) -> tuple[Options, str]:
    options = options_through(proxy, server)
    return options, store(S3Destination(options, None), data, PATH)


def test_a_download_that_breaks_goes_on_where_it_was(proxy: Proxy, seaweed: SeaweedFS) -> None:
    data = os.urandom(3 * MIB)
    options, version = brought(proxy, seaweed, data)
    proxy.rules += [Rule("get", path="/daily/", cut_answer_at=MIB + 5), Rule("get", path="/daily/", cut_answer_at=0)]
    with S3Destination(options, None).opened() as place:
        assert place.content(PATH, Silent(), version) == content_of(data)
        proxy.rules.append(Rule("get", path="/daily/", cut_answer_at=10))
        with place.opened_file(PATH, version) as file:
            assert file.read(100, 1000) == data[100:1100]
    assert [rule.times for rule in proxy.rules] == [0, 0, 0]


def test_a_download_that_breaks_again_and_again_is_an_error(proxy: Proxy, seaweed: SeaweedFS) -> None:
    options, version = brought(proxy, seaweed, os.urandom(MIB))
    proxy.rules.append(Rule("get", path="/daily/", times=-1, cut_answer_at=0))
    with S3Destination(options, None).opened() as place:
        with pytest.raises(StorageError, match="reading s3://") as caught:
            place.content(PATH, Silent(), version)
        assert "network" in caught.value.hint
        with place.opened_file(PATH, version) as file, pytest.raises(StorageError, match="reading s3://"):
            file.read(0, 10)


def test_bytes_that_change_on_the_way_back_are_no_whole_copy(proxy: Proxy, seaweed: SeaweedFS) -> None:
    data = os.urandom(1000)
    options, version = brought(proxy, seaweed, data)
    proxy.rules.append(Rule("get", path="/daily/", answer=lambda it: dataclasses.replace(it, body=it.body[::-1])))
    with S3Destination(options, None).opened() as place:
        assert place.content(PATH, Silent(), version) not in (None, content_of(data))
        assert place.content(PATH, Silent(), version) == content_of(data)


def test_a_server_that_ignores_ranges_is_found_out(proxy: Proxy, seaweed: SeaweedFS) -> None:
    options, version = brought(proxy, seaweed, os.urandom(1000))
    proxy.rules.append(Rule("get", path="/daily/", answer=lambda answer: dataclasses.replace(answer, status=200)))
    with (
        S3Destination(options, None).opened() as place,
        place.opened_file(PATH, version) as file,
        pytest.raises(StorageError, match="in parts"),
    ):
        file.read(5, 10)


def test_an_archived_copy_says_how_to_get_at_it(proxy: Proxy, seaweed: SeaweedFS) -> None:
    options, version = brought(proxy, seaweed, b"ours")
    proxy.rules.append(Rule("get", path="/daily/", instead=error(403, "InvalidObjectState")))
    with S3Destination(options, None).opened() as place, pytest.raises(StorageError, match="archive") as caught:
        place.content(PATH, Silent(), version)
    assert "restore-object" in caught.value.hint


# Credentials, clock, address


def assert_names(destination: S3Destination, *words: str, kind: type[PgkeepError] = StorageError) -> None:
    """Opening fails, in both ways; message and hint say all of that, and no secret."""
    for to_read in (False, True):
        with pytest.raises(kind) as caught, destination.opened(to_read=to_read):
            pass
        told = f"{caught.value.message} {caught.value.hint}"
        for word in words:
            assert word in told
        assert "secret-0123456789" not in told


def test_wrong_credentials_are_named(seaweed: SeaweedFS) -> None:
    options = seaweed.options("writer")
    unknown = dataclasses.replace(options, access_key_id="nobody")
    assert_names(S3Destination(unknown, None), "does not know this access key", "rotated", "InvalidAccessKeyId")
    wrong = dataclasses.replace(options, secret_access_key="not-the-secret-0123456789")
    assert_names(S3Destination(wrong, None), "does not belong to this access key", "set access key and secret again")


def test_a_clock_that_is_wrong_is_named(seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    an_hour_ahead = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda *_, **__: an_hour_ahead)
    assert_names(S3Destination(seaweed.options("writer"), None), "clock", "chronyc")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (error(400, "ExpiredToken"), ("session token has expired", "renew")),
        (error(403, "TokenRefreshRequired"), ("session token has expired", "renew")),
        (error(301, "PermanentRedirect").having("x-amz-bucket-region", "eu-1"), ("another region", "endpoint")),
        (error(301, ""), ("redirects every request", "https")),
        (error(400, "AuthorizationHeaderMalformed"), ("region",)),
        (error(418, "ImATeapot", "short and stout"), ("ImATeapot", "418", "short and stout")),
        (error(400, ""), ("status 400",)),
    ],
)
def test_other_answers_are_named(proxy: Proxy, seaweed: SeaweedFS, answer: Answer, words: tuple[str, ...]) -> None:
    proxy.rules.append(Rule(times=-1, instead=answer))
    assert_names(S3Destination(options_through(proxy, seaweed), None), *words)


def test_a_bucket_that_is_missing_is_named(seaweed: SeaweedFS) -> None:
    for name in ("writer", "putter"):
        destination = S3Destination(seaweed.options(name, "no-such-bucket"), None)
        assert_names(destination, "s3://no-such-bucket", "the bucket does not exist", "docs/destinations/s3.md")


def test_a_server_that_is_not_there_is_named(seaweed: SeaweedFS) -> None:
    options = seaweed.options("writer", endpoint="http://127.0.0.1:9")
    assert_names(S3Destination(options, None), "http://127.0.0.1:9", "endpoint")
    nowhere = dataclasses.replace(options, endpoint="http://storage.invalid:9")
    assert_names(S3Destination(nowhere, None), "storage.invalid", "endpoint")


def test_settings_that_can_not_be_are_named(seaweed: SeaweedFS) -> None:
    options = seaweed.options("writer")
    no_url = dataclasses.replace(options, endpoint="storage.example:9000")
    assert_names(S3Destination(no_url, None), "storage.example", kind=ConfigurationError)
    no_profile = dataclasses.replace(options, profile="nobody-s")
    assert_names(S3Destination(no_profile, None), "nobody-s", kind=ConfigurationError)
    assert_names(S3Destination(dataclasses.replace(options, bucket="Not a bucket"), None), "Not a bucket")


def test_credentials_come_from_a_profile_and_may_be_rotated_there(
    seaweed: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    options = seaweed.options(profile="backups", access_key_id=None, secret_access_key=None)
    destination = S3Destination(options, None)
    for key, secret, works in (("writer", "wrong", False), ("writer", s3_servers.secret_of("writer"), True)):
        file.write_text(f"[backups]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
        if works:
            store(destination, b"ours", PATH)
        else:
            assert_names(destination, "does not belong to this access key")
    without = dataclasses.replace(options, profile=None)
    assert_names(S3Destination(without, None), "credentials", "set access key and secret")


def test_a_key_that_is_rotated_while_copies_are_made(proxy: Proxy, seaweed: SeaweedFS, tmp_path: Path) -> None:
    """No copy is taken for missing; the next run, with the new key, continues."""
    options = options_through(proxy, seaweed)
    data, destination = os.urandom(4 * PART_BYTES), S3Destination(options, tmp_path)
    version = store(destination, b"ours", f"{PATH}2")
    with destination.opened() as place:
        place.write_marker(b"marker")

    class Rotated(Silent):
        def step(self, name: str) -> None:
            if name == "store.part-sent":
                proxy.rules.append(Rule(times=-1, instead=error(403, "InvalidAccessKeyId")))

    with destination.opened() as place:
        with pytest.raises(StorageError, match="does not know this access key"), s3_servers.memory_file(data) as source:
            place.store(PATH, source, content_of(data), Rotated())
        for call in (
            lambda: place.sizes({f"{PATH}2": version}),
            lambda: place.content(f"{PATH}2", Silent(), version),
            lambda: place.lock(f"{PATH}2", version),
            place.read_marker,
        ):
            with pytest.raises(StorageError, match="does not know this access key"):
                call()
    proxy.rules.clear()
    proxy.requests.clear()
    new = dataclasses.replace(options, access_key_id="owner", secret_access_key=s3_servers.secret_of("owner"))
    version = store(S3Destination(new, tmp_path), data, PATH)
    assert proxy.kinds().count("part") < 4
    assert hands(seaweed, options).get(PATH, version) == data


# Denied, or not there


def as_amazon(answer: Answer) -> Answer:
    """To who may not list, "not there" is denied."""
    return error(403, "AccessDenied", "Access Denied") if answer.status == 404 else answer


@both_ways
def test_without_listing_denied_may_mean_not_there(proxy: Proxy, seaweed: SeaweedFS, size_bytes: int) -> None:
    proxy.rules += [Rule("head", times=-1, answer=as_amazon), Rule("get", times=-1, answer=as_amazon)]
    options, data = options_through(proxy, seaweed, "putter"), os.urandom(size_bytes)
    destination = S3Destination(options, None)
    with destination.opened() as place:
        assert place.read_marker() is None
        assert place.sizes({PATH: ""}) == {}
        place.write_marker(b"marker")
        assert place.read_marker() == b"marker"
        with pytest.raises(NotFoundError):
            place.read(PATH, 10)
        assert place.content(PATH, Silent()) is None
    version = store(destination, data, PATH)
    with destination.opened() as place:
        files = {PATH: version, "daily/x": "", "daily/y": "0" * 32}
        assert place.sizes(files) == {PATH: size_bytes}
        assert place.content(PATH, Silent(), version) == content_of(data)
        assert place.content("daily/y", Silent(), "0" * 32) is None
    assert destination.probe(Silent()).lock == "asserted"


def test_what_was_there_and_can_not_be_read_any_more_is_not_called_missing(proxy: Proxy, seaweed: SeaweedFS) -> None:
    """The right to read was taken away: an error, and no copies made anew."""
    options = options_through(proxy, seaweed)
    destination = S3Destination(options, None)
    version = store(destination, b"ours", PATH)
    with destination.opened() as place:
        place.write_marker(b"marker")
    denied = error(403, "AccessDenied")
    proxy.rules += [Rule("head", times=-1, instead=denied), Rule("get", times=-1, instead=denied)]
    with S3Destination(dataclasses.replace(options, lock_mode=None), None).opened() as place:
        for call in (
            lambda: place.sizes({PATH: version}),
            lambda: place.content(PATH, Silent(), version),
            lambda: place.read(PATH, 10, version),
        ):
            with pytest.raises(StorageError, match="denies it") as caught:
                call()
            assert "policy" in caught.value.hint
        with pytest.raises(StorageError, match="denies it"):
            place.write_marker(b"other")


# The server


def test_a_server_that_stops_in_the_middle_of_a_part(tmp_path: Path) -> None:
    """It hangs, then it is gone; after its start what is left to do is done."""
    with s3_servers.own_seaweed() as server:
        options = server.options("writer", part_size_bytes=PART_BYTES, timeout_seconds=0.5)
        destination, data = S3Destination(options, tmp_path / "uploads"), os.urandom(4 * PART_BYTES)

        class Stopping(Silent):
            def __init__(self, stop: Callable[[], None]) -> None:
                self.stop = stop

            def step(self, name: str) -> None:
                if name == "store.part-sent":
                    self.stop()

        with pytest.raises(StorageError, match="uploading part") as caught:
            store(destination, data, PATH, Stopping(server.pause))
        assert "network" in caught.value.hint
        server.resume()
        assert hands(server, options).versions() == []
        with pytest.raises(StorageError, match="upload"):
            store(destination, data, PATH, Stopping(server.stop))
        server.stop()  # on a busy machine no part may have been sent at all
        server.start()
        patient = S3Destination(dataclasses.replace(options, timeout_seconds=60.0, attempts=8), tmp_path / "uploads")
        version = store(patient, data, PATH)
        assert_brought_once(server, options, version, data)
        with patient.opened() as place:
            assert place.lock(PATH, version) is not None


def test_an_upload_that_is_forgotten_again_and_again_is_an_error(proxy: Proxy, seaweed: SeaweedFS) -> None:
    proxy.rules.append(Rule("part", times=-1, instead=error(404, "NoSuchUpload")))
    options = options_through(proxy, seaweed)
    with pytest.raises(StorageError, match="forgets uploads") as caught:
        store(S3Destination(options, None), os.urandom(IN_PARTS), PATH)
    assert "lifecycle" in caught.value.hint
    assert proxy.kinds().count("post uploads") == 2


# TLS


@both_ways
def test_an_authority_of_one_s_own_is_given_by_its_file(seaweed: SeaweedFS, tmp_path: Path, size_bytes: int) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-keyout", "key.pem", "-out", "certificate.pem", "-days", "2", "-subj", "/CN=pgkeep-test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    with proxy_to(seaweed.port, tls=context) as proxy:
        options = options_through(proxy, seaweed)
        assert_names(S3Destination(options, None), "SSL", "authority")
        trusting = dataclasses.replace(options, ca_file=tmp_path / "certificate.pem")
        data = os.urandom(size_bytes)
        assert_brought_once(seaweed, options, store(S3Destination(trusting, None), data, PATH), data)
