"""A destination that answers nonsense, or loses what it holds: it harms no copy elsewhere, and no memory here."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import hashlib
import http.server
import json
import os
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgkeep.adapters import process
from pgkeep.adapters.destinations.directory import DirectoryDestination
from pgkeep.adapters.destinations.s3 import Options, S3Destination
from pgkeep.adapters.destinations.s3_uploads import Upload, Uploads, age
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.errors import StorageError
from tests import outside
from tests.outside import Outside, Template, spoil

MIB = 1 << 20
_LISTED = "<ListVersionsResult><IsTruncated>false</IsTruncated>{}</ListVersionsResult>"


@dataclasses.dataclass(frozen=True)
class Answer:
    body: bytes = b""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    has_length: bool = True


Say = Callable[[str, dict[str, list[str]]], Answer | None]
NOT_THERE = Answer(b"<Error><Code>NoSuchKey</Code></Error>", 404)


@dataclasses.dataclass
class Server:
    """What says for every path and query whatever a test wants; ``sent_bytes`` is what somebody took."""

    options: Options
    sent_bytes: int = 0


@contextlib.contextmanager
def serving(say: Say) -> Iterator[Server]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            path = url.path.partition("/bucket/")[2]
            answer = say(path, urllib.parse.parse_qs(url.query, keep_blank_values=True)) or NOT_THERE
            self.send_response(answer.status)
            for name, value in answer.headers:
                self.send_header(name, value)
            if answer.has_length:
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            for start in range(0, len(answer.body) if self.command == "GET" else 0, MIB):
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(answer.body[start : start + MIB])
                    made.sent_bytes += len(answer.body[start : start + MIB])

        def do_HEAD(self) -> None:
            self.do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made = Server(
        Options(
            bucket="bucket",
            endpoint=f"http://127.0.0.1:{server.server_port}",
            access_key_id="key",
            secret_access_key="secret",
            path_style=True,
            attempts=1,
            timeout_seconds=10,
        )
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def listing(rows: str) -> Say:
    return lambda _, query: Answer(_LISTED.format(rows).encode()) if "versions" in query else None


def marker(answer: Answer) -> Say:
    return lambda path, _: answer if path.startswith(".pgkeep-destination") else None


NONSENSE: dict[str, Say] = {
    "no length": marker(Answer(b"{}", has_length=False)),
    "a date that is none": marker(Answer(b"{}", headers=(("Last-Modified", "gibberish"),))),
    "a lock without end": marker(
        Answer(
            b"{}",
            headers=(
                ("x-amz-object-lock-mode", "COMPLIANCE"),
                ("x-amz-object-lock-retain-until-date", "9999999999999999"),
            ),
        )
    ),
    "a version without a size": listing("<Version><Key>daily/x</Key></Version>"),
    "a version without a name": listing("<Version><Size>1</Size></Version>"),
    "a size that is none": listing("<Version><Key>daily/x</Key><Size>many</Size></Version>"),
}


@pytest.mark.parametrize("say", NONSENSE.values(), ids=NONSENSE.keys())
def test_an_answer_that_makes_no_sense_is_a_trouble_of_that_destination(say: Say) -> None:
    """Anything else would end the service, and with it the copying to every other destination."""
    with (
        serving(say) as server,
        pytest.raises(StorageError, match="makes no sense"),
        S3Destination(server.options, None).opened(to_read=True) as place,
    ):
        list(place.files(("daily",)))


def test_what_a_server_says_does_not_flood_logs_and_memory() -> None:
    long = Answer(b"<Error><Code>Strange</Code><Message>" + b"A" * MIB + b"</Message></Error>", 400)
    with (
        serving(lambda _path, _query: long) as server,
        pytest.raises(StorageError) as caught,
        S3Destination(server.options, None).opened(to_read=True),
    ):
        raise AssertionError("it was opened")
    assert "Strange" in caught.value.message
    assert len(caught.value.message) < 2000


def test_no_more_is_read_than_was_asked_for() -> None:
    def say(path: str, query: dict[str, list[str]]) -> Answer | None:
        if path != "daily/x":
            return None
        is_part = "x" in seen
        seen.append("x")
        return Answer(bytes(64 * MIB if is_part else 4096), 206 if is_part else 200)

    seen: list[str] = []
    with (
        serving(say) as server,
        S3Destination(server.options, None).opened(to_read=True) as place,
        place.opened_file("daily/x") as file,
    ):
        assert len(file.read(0, 4096)) == 4096
    # What the kernel's buffers took is none of ours.
    assert server.sent_bytes < 32 * MIB


@pytest.mark.parametrize(
    "change", [{"started": "2026-01-01T00:00:00"}, {"more": "NESTED"}], ids=["no time zone", "nested"]
)
def test_a_forged_upload_is_forgotten(tmp_path: Path, change: dict[str, str]) -> None:
    uploads = Uploads(tmp_path)
    upload = Upload(
        label="s3://b",
        endpoint="",
        path="daily/x",
        size_bytes=1,
        sha256="0" * 64,
        part_size_bytes=1,
        upload_id="u",
        started=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    )
    uploads.begin(upload)
    file = tmp_path / f"{hashlib.sha256(b'daily/x').hexdigest()[:32]}.upload"
    text = json.dumps(json.loads(file.read_text()) | change).replace('"NESTED"', "[" * 100_000 + "]" * 100_000)
    file.write_text(text + "\n")
    assert [age(each.upload) for each in uploads.all()] == []
    assert not file.exists()


@pytest.fixture(scope="module")
def template(cluster15: ScratchCluster) -> Iterator[Template]:
    with outside.template(cluster15) as made:
        yield made


RETENTION = """
[destinations.external.retention]
daily_days = 1
hourly_days = 1
manual_days = 365
keep_minimum = 1
"""


def test_an_older_copy_does_not_leave_for_newer_ones_that_are_gone(template: Template, tmp_path: Path) -> None:
    """The newest copies were removed there, and their originals are damaged: the old one is all that is left."""
    made = Outside(template, tmp_path)
    old, newer, newest = made.source("daily"), made.source("hourly"), made.source("manual")
    for path, days in ((old, 30), (newer, 20), (newest, 10)):
        made.sealed(path, dt.timedelta(days=days))
    made.once()
    made.configure(RETENTION)
    for path in (newer, newest):
        made.copy(path).unlink()
        spoil(made.active / path)
    assert old not in made.once(code=7)["expired"]
    assert made.copy(old).exists()


def _record_of(made: Outside, path: str) -> Path:
    (file,) = made.extracted.rglob(f"{path}.json")
    return file


def _change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_a_record_that_says_that_it_is_over_removes_nothing_without_a_policy(
    template: Template, tmp_path: Path
) -> None:
    made = Outside(template, tmp_path)
    made.once()
    _change(_record_of(made, made.source("daily")), expired_at="2026-01-01T00:00:00Z")
    assert made.once()["expired"] == []
    made.assert_whole()


def test_a_record_speaks_of_its_own_backup_only(template: Template, tmp_path: Path) -> None:
    made = Outside(template, tmp_path)
    made.once()
    made.configure(RETENTION)
    daily, manual = (_record_of(made, made.source(tier)) for tier in ("daily", "manual"))
    theirs = json.loads(manual.read_text())
    _change(daily, path=theirs["path"], files=theirs["files"], expired_at="2026-01-01T00:00:00Z")
    shown = made.once()
    assert shown["adopted"] == [made.source("daily")]
    made.assert_whole()


@pytest.mark.parametrize("path", ["../../etc/passwd", "daily/\0", ""])
def test_a_record_of_no_path_fails_nothing_else(template: Template, tmp_path: Path, path: str) -> None:
    made = Outside(template, tmp_path)
    made.once()
    _change(_record_of(made, made.source("daily")), path=path)
    made.expire(made.source("hourly"))
    assert made.once()["adopted"] == [made.source("daily")]


@pytest.mark.parametrize("field", ["checked_at", "copied_at"])
def test_a_time_without_its_zone_is_no_time(template: Template, tmp_path: Path, field: str) -> None:
    made = Outside(template, tmp_path)
    made.once()
    _change(_record_of(made, made.source("daily")), **{field: "2026-01-01T00:00:00"})
    assert made.once()["adopted"] == [made.source("daily")]


def test_a_tree_without_a_floor_costs_nothing(tmp_path: Path) -> None:
    """Deeper than a program may recurse, and than a path may be long."""
    (tmp_path / "vault").mkdir()
    tree = tmp_path / "copies" / "daily"
    tree.mkdir(parents=True)
    directories = [os.open(tree, os.O_DIRECTORY)]
    try:
        for _ in range(3000):
            os.mkdir("d", dir_fd=directories[-1])
            directories.append(os.open("d", os.O_DIRECTORY, dir_fd=directories[-1]))
            if len(directories) > 2:
                os.close(directories.pop(0))
        destination = DirectoryDestination(tmp_path / "copies", 0o444, tmp_path / "vault")
        with destination.opened(to_read=True) as place:
            assert list(place.files(["daily"])) == []
    finally:
        for each in directories:
            os.close(each)
        process.run(["rm", "-rf", tree])
