"""Uploads to buckets: parts, what is continued, what never happens twice, and what it costs in requests and memory."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pgkeep.adapters import clock
from pgkeep.adapters.destinations import Content, s3_upload
from pgkeep.adapters.destinations.s3 import Options, S3Destination
from pgkeep.errors import IntegrityError, RefusedError, StorageError
from pgkeep.progress import Silent
from tests import s3_servers
from tests.contract.filesystems import run_python
from tests.s3_proxy import Answer, Rule, error, proxy_to
from tests.s3_servers import VERSIONED, SeaweedFS, hands, seaweed, store

__all__ = ["seaweed"]

MIB = 1 << 20
PATH = "daily/2026-11-23/2026-11-23_00-00-00.sql.gz"
# The least that servers allow.
PART_BYTES = 5 * MIB
SOON = dt.timedelta(minutes=5)


class Steps(Silent):
    """Those that were reached; stops at the wanted one."""

    def __init__(self, stop_at: str = "", nth: int = 1) -> None:
        self.reached: list[str] = []
        self._stop_at = stop_at
        self._nth = nth

    def step(self, name: str) -> None:
        self.reached.append(name)
        if name == self._stop_at and self.reached.count(name) == self._nth:
            raise SystemExit(143)


def options_of(server: SeaweedFS, name: str = "writer", **more: Any) -> Options:
    return server.options(name, part_size_bytes=PART_BYTES, **more)


# Parts


@pytest.mark.parametrize("size_bytes", [PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES, 3 * PART_BYTES + 1])
def test_parts_make_the_whole_again(seaweed: SeaweedFS, size_bytes: int) -> None:
    options = options_of(seaweed)
    data, steps = os.urandom(size_bytes), Steps()
    version = store(S3Destination(options, None), data, PATH, steps)
    assert hands(seaweed, options).get(PATH, version) == data
    assert steps.reached.count("store.part-sent") == (0 if size_bytes <= PART_BYTES else -(-size_bytes // PART_BYTES))
    head = hands(seaweed, options).head(PATH, version)
    assert head["Metadata"] == {"sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize(
    ("size_bytes", "wanted"),
    [
        (1, 16 * MIB),
        (16 * MIB * 10_000, 16 * MIB),
        (16 * MIB * 10_000 + 1, 17 * MIB),
        (5 * 1024**4, 525 * MIB),
    ],
)
def test_parts_grow_so_that_there_are_never_too_many(size_bytes: int, wanted: int) -> None:
    found = s3_upload.part_size(16 * MIB, size_bytes)
    assert found == wanted
    assert -(-size_bytes // found) <= 10_000


@pytest.mark.parametrize("change", [b"", b"and more"])
def test_a_source_that_is_not_what_it_should_be_leaves_no_parts(seaweed: SeaweedFS, change: bytes) -> None:
    options = options_of(seaweed, "owner")
    data = os.urandom(2 * PART_BYTES)
    content = Content(len(data), hashlib.sha256(data).hexdigest())
    wrong = data + change if change else data[:-1] + bytes([data[-1] ^ 1])
    with (
        s3_servers.memory_file(wrong) as source,
        S3Destination(options, None).opened() as place,
        pytest.raises(IntegrityError, match="not what its manifest says"),
    ):
        place.store(PATH, source, content, Silent())
    assert hands(seaweed, options).versions() == []
    assert hands(seaweed, options).uploads() == []


# Continued


@pytest.mark.parametrize("nth", [1, 3])
def test_an_interrupted_upload_is_continued(seaweed: SeaweedFS, tmp_path: Path, nth: int) -> None:
    with proxy_to(seaweed.port) as proxy:
        options = options_of(seaweed, endpoint=proxy.endpoint)
        destination, data = S3Destination(options, tmp_path / "uploads"), os.urandom(6 * PART_BYTES)
        with pytest.raises(SystemExit):
            store(destination, data, PATH, Steps("store.part-sent", nth))
        assert hands(seaweed, options).names("daily/2026-11-23") == set()
        before = _bodies(proxy.kinds())
        proxy.requests.clear()
        version = store(destination, data, PATH)
        assert hands(seaweed, options).get(PATH, version) == data
        # One part at least was there, and what is done is not done again.
        assert "create" not in " ".join(proxy.kinds()).replace("post uploads", "create")
        assert _bodies(proxy.kinds()) <= 6 - nth
        assert before + _bodies(proxy.kinds()) <= 6 + s3_upload.LANES
    assert list((tmp_path / "uploads").iterdir()) == []
    assert hands(seaweed, options).uploads() == []


def _bodies(kinds: list[str]) -> int:
    return kinds.count("part")


def test_an_upload_that_the_server_forgot_is_begun_anew(seaweed: SeaweedFS, tmp_path: Path) -> None:
    options = options_of(seaweed)
    destination, data = S3Destination(options, tmp_path), os.urandom(3 * PART_BYTES)
    for step in ("store.created", "store.part-sent", "store.sent"):
        with pytest.raises(SystemExit):
            store(destination, data, PATH, Steps(step))
        _forget_uploads(seaweed, options)
    version = store(destination, data, PATH)
    assert hands(seaweed, options).get(PATH, version) == data
    assert len(hands(seaweed, options).versions()) == 1
    assert list(tmp_path.iterdir()) == []


def _forget_uploads(server: SeaweedFS, options: Options) -> None:
    reach = hands(server, options)
    for upload_id in reach.uploads():
        reach.client.abort_multipart_upload(Bucket=options.bucket, Key=f"{options.prefix}/{PATH}", UploadId=upload_id)


def test_an_upload_of_something_else_is_not_continued(seaweed: SeaweedFS, tmp_path: Path) -> None:
    options = options_of(seaweed)
    destination = S3Destination(options, tmp_path)
    with pytest.raises(SystemExit):
        store(destination, os.urandom(3 * PART_BYTES), PATH, Steps("store.part-sent"))
    data = os.urandom(3 * PART_BYTES)
    version = store(destination, data, PATH)
    assert hands(seaweed, options).get(PATH, version) == data
    assert hands(seaweed, options).uploads() == []


@pytest.mark.parametrize("damage", [b"", b"{", b"\x00" * 100, b'{"format":1}\n'])
def test_what_is_remembered_may_be_lost(seaweed: SeaweedFS, tmp_path: Path, damage: bytes) -> None:
    options = options_of(seaweed)
    destination, data = S3Destination(options, tmp_path), os.urandom(2 * PART_BYTES)
    with pytest.raises(SystemExit):
        store(destination, data, PATH, Steps("store.part-sent"))
    for file in tmp_path.iterdir():
        file.write_bytes(damage)
    version = store(destination, data, PATH)
    assert hands(seaweed, options).get(PATH, version) == data
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_was_cut_off_is_a_part_to_send_again(seaweed: SeaweedFS, tmp_path: Path) -> None:
    options = options_of(seaweed)
    destination, data = S3Destination(options, tmp_path), os.urandom(4 * PART_BYTES)
    with pytest.raises(SystemExit):
        store(destination, data, PATH, Steps("store.sent"))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    steps = Steps()
    version = store(destination, data, PATH, steps)
    assert steps.reached.count("store.part-sent") == 1
    assert hands(seaweed, options).get(PATH, version) == data


def test_uploads_that_nobody_continues_are_ended(
    seaweed: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those remembered after a week, those unknown after a day, others' never."""
    options = options_of(seaweed)
    destination, reach = S3Destination(options, tmp_path), hands(seaweed, options)
    with pytest.raises(SystemExit):
        store(destination, os.urandom(2 * PART_BYTES), PATH, Steps("store.part-sent"))
    keys = (f"{options.prefix}/daily/lost", f"{options.prefix}/elsewhere/x", f"{options.prefix}-other/daily/x")
    for key in keys:
        reach.client.create_multipart_upload(Bucket=options.bucket, Key=key)
    real = clock.now
    for days, ended in ((0, []), (2, ["daily/lost"]), (8, [PATH]), (9, [])):
        monkeypatch.setattr(clock, "now", lambda days=days: real() + dt.timedelta(days=days))
        with S3Destination(dataclasses.replace(options, lock_mode=None), tmp_path).opened() as place:
            assert place.sweep(["daily", "weekly"]) == ended
    assert len(reach.uploads()) == 1
    assert list(tmp_path.iterdir()) == []


# Not twice, not over


@pytest.mark.parametrize("step", ["store.completed", "store.compared"])
def test_what_an_interrupted_run_brought_is_taken_over(seaweed: SeaweedFS, tmp_path: Path, step: str) -> None:
    options = options_of(seaweed, at_once_bytes=0)
    destination = S3Destination(options, tmp_path)
    with pytest.raises(SystemExit):
        store(destination, b"ours", PATH, Steps(step))
    brought = hands(seaweed, options).versions()
    assert len(brought) == 1
    assert [store(destination, b"ours", PATH)] == brought
    assert hands(seaweed, options).versions() == brought
    assert list(tmp_path.iterdir()) == []


def test_what_only_claims_to_be_the_same_is_not_taken_over(seaweed: SeaweedFS) -> None:
    """Same size, and our digest in its metadata; other bytes."""
    options = options_of(seaweed)
    data = os.urandom(1000)
    reach = hands(seaweed, options)
    digest = hashlib.sha256(data).hexdigest()
    reach.client.put_object(
        Bucket=options.bucket, Key=f"{options.prefix}/{PATH}", Body=bytes(1000), Metadata={"sha256": digest}
    )
    with pytest.raises(RefusedError, match="never overwritten"):
        store(S3Destination(options, None), data, PATH)
    assert len(reach.versions()) == 1


@pytest.mark.parametrize("in_parts", [False, True], ids=["at-once", "in-parts"])
def test_somebody_else_s_that_came_between_is_not_overwritten(seaweed: SeaweedFS, in_parts: bool) -> None:
    """After the look whether anything stands there: the condition of the request holds then."""
    options = options_of(seaweed, at_once_bytes=0 if in_parts else None)
    reach = hands(seaweed, options)

    class Meanwhile(Silent):
        def step(self, name: str) -> None:
            if name == "store.created":
                reach.put(PATH, b"theirs")

    with pytest.raises(RefusedError, match="never overwritten"):
        store(S3Destination(options, None), b"ours", PATH, Meanwhile())
    assert reach.get(PATH) == b"theirs"
    assert len(reach.versions()) == 1


@pytest.mark.parametrize("in_parts", [False, True], ids=["at-once", "in-parts"])
@pytest.mark.parametrize("code", [501, 412])
def test_a_server_without_conditions_is_asked_before(seaweed: SeaweedFS, in_parts: bool, code: int) -> None:
    """501: it says so. (412 for what is not there at all: it is broken, and told of.)"""
    kind = "complete" if in_parts else "put"
    name = {501: "NotImplemented", 412: "PreconditionFailed"}[code]
    with proxy_to(seaweed.port, [Rule(kind, instead=error(code, name))]) as proxy:
        options = options_of(seaweed, endpoint=proxy.endpoint, at_once_bytes=0 if in_parts else None)
        if code == 412:
            with pytest.raises(RefusedError):
                store(S3Destination(options, None), b"ours", PATH)
            return
        store(S3Destination(options, None), b"ours", PATH)
        with pytest.raises(RefusedError, match="never overwritten"):
            store(S3Destination(options, None), b"other", PATH)
    assert len(hands(seaweed, options).versions()) == 1


# Compared


def without_checksum(answer: Answer) -> Answer:
    return answer.without("x-amz-checksum-sha256", "x-amz-checksum-type")


@pytest.mark.parametrize("in_parts", [False, True], ids=["at-once", "in-parts"])
def test_a_server_without_checksums_is_read_back(seaweed: SeaweedFS, in_parts: bool) -> None:
    rules = [Rule("head", times=-1, answer=without_checksum), Rule("get", path="/daily/", times=0)]
    with proxy_to(seaweed.port, rules) as proxy:
        options = options_of(seaweed, endpoint=proxy.endpoint, at_once_bytes=0 if in_parts else None)
        destination = S3Destination(options, None)
        with s3_servers.memory_file(b"ours") as source, destination.opened() as place:
            place.store(PATH, source, Content(4, hashlib.sha256(b"ours").hexdigest()), Silent())
            assert "read back in full" in " ".join(place.warnings)
        assert proxy.kinds().count("get") == 2  # the marker, and that
        rules[1].times, rules[1].answer = 1, lambda answer: dataclasses.replace(answer, body=b"OURS")
        with pytest.raises(StorageError, match="gave back other bytes"):
            store(destination, b"ours", f"{PATH}2")


@pytest.mark.parametrize("in_parts", [False, True], ids=["at-once", "in-parts"])
@pytest.mark.parametrize(
    "lie",
    [
        lambda answer: answer.having("x-amz-checksum-sha256", "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ="),
        lambda answer: answer.having("x-amz-checksum-sha256", "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ=-1"),
        lambda answer: answer.having("Content-Length", "3"),
    ],
    ids=["checksum", "checksum-of-parts", "size"],
)
def test_a_server_that_holds_something_else_is_found_out(
    seaweed: SeaweedFS, lie: Callable[[Answer], Answer], in_parts: bool
) -> None:
    changed = Rule("head", times=-1, answer=lambda answer: lie(answer) if answer.status == 200 else answer)
    read = Rule("get", path="/daily/", times=-1, answer=lambda answer: dataclasses.replace(answer, body=b"OURS"))
    with proxy_to(seaweed.port, [changed, read]) as proxy:
        options = options_of(seaweed, endpoint=proxy.endpoint, at_once_bytes=0 if in_parts else None)
        with pytest.raises(StorageError, match="gave back other bytes"):
            store(S3Destination(options, None), b"ours", PATH)


# What it costs


def test_many_sizes_cost_one_listing_and_few_cost_a_request_each(seaweed: SeaweedFS) -> None:
    options = seaweed.options("owner", VERSIONED, lock_mode=None)
    reach = hands(seaweed, options)
    files = {f"daily/d{number}": reach.put(f"daily/d{number}", b"x" * number) for number in range(40)}
    wanted = {path: int(path.removeprefix("daily/d")) for path in files}
    # One is overwritten, one hidden, one gone.
    reach.put("daily/d7", b"somebody else's")
    reach.client.delete_object(Bucket=VERSIONED, Key=f"{options.prefix}/daily/d8")
    reach.client.delete_object(Bucket=VERSIONED, Key=f"{options.prefix}/daily/d9", VersionId=files["daily/d9"])
    del wanted["daily/d9"]
    with proxy_to(seaweed.port) as proxy:
        with S3Destination(dataclasses.replace(options, endpoint=proxy.endpoint), None).opened() as place:
            proxy.requests.clear()
            assert place.sizes(files) == wanted
            assert sorted(set(proxy.kinds())) == ["get versions", "head"]
            assert proxy.kinds().count("get versions") == 1
            assert proxy.kinds().count("head") == 1  # of the one that is gone
            proxy.requests.clear()
            assert place.sizes({"daily/d3": files["daily/d3"]}) == {"daily/d3": 3}
            assert proxy.kinds() == []
            # Those without a version: what stands there now.
            assert place.sizes({"daily/d3": "", "daily/d8": "", "daily/d7": ""}) == {"daily/d3": 3, "daily/d7": 15}
        proxy.requests.clear()
        with S3Destination(dataclasses.replace(options, endpoint=proxy.endpoint), None).opened() as place:
            assert place.sizes({"daily/d3": files["daily/d3"]}) == {"daily/d3": 3}
            assert "get versions" not in proxy.kinds()
        proxy.rules.append(Rule("get versions", times=-1, instead=error(501, "NotImplemented")))
        proxy.requests.clear()
        with S3Destination(dataclasses.replace(options, endpoint=proxy.endpoint), None).opened() as place:
            assert place.sizes(files) == wanted


def test_many_versions_are_listed_page_by_page(seaweed: SeaweedFS) -> None:
    options = seaweed.options("owner", VERSIONED, lock_mode=None)
    reach = hands(seaweed, options)
    versions = {path: [reach.put(path, b"x" * n) for n in range(3)] for path in ("daily/a", "daily/b", "weekly/c")}
    with S3Destination(options, None).opened() as place:
        bucket = place._bucket
        original = bucket.client.get_paginator

        def small_pages(name: str) -> object:
            paginator = original(name)  # type: ignore[call-overload]
            paginate = paginator.paginate
            paginator.paginate = lambda **more: paginate(**more, PaginationConfig={"PageSize": 2})
            return paginator

        bucket.client.get_paginator = small_pages  # type: ignore[assignment]
        found = [(each.path, each.version) for each in place.files(["weekly", "daily"])]
    assert found == [(path, version) for path, each in versions.items() for version in each]


MEMORY = """
import hashlib, json, os, re
from pgkeep.adapters.destinations import Content
from pgkeep.adapters.destinations.s3 import Options, S3Destination
from pgkeep.progress import Silent
options, source = Options(**json.loads(sys.argv[1])), os.open(sys.argv[2], os.O_RDONLY)

def peak_mib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024

def digest():
    with open(sys.argv[2], "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

content = Content(os.fstat(source).st_size, digest())
with S3Destination(options, None).opened() as place:
    before = peak_mib()
    version = place.store("daily/large", source, content, Silent())
    assert place.content("daily/large", Silent(), version) == content
print(json.dumps([before, peak_mib()]))
"""


def test_a_large_file_takes_little_memory(seaweed: SeaweedFS, tmp_path: Path) -> None:
    """300 MiB, up and down again."""
    block = os.urandom(MIB)
    with (tmp_path / "large").open("wb") as file:
        for _ in range(300):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())  # what is not on the disk yet can't be let go
    options = seaweed.options("writer", lock_mode=None)
    given = json.dumps({field.name: getattr(options, field.name) for field in dataclasses.fields(options)})
    before_mib, peak_mib = run_python(MEMORY, given, tmp_path / "large")
    assert peak_mib < 150
    assert peak_mib - before_mib < 48
    # It does not stay in the cache either: what the machine needs there is not pushed out.
    shown = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "RES", tmp_path / "large"], capture_output=True, text=True
    )
    assert int(shown.stdout) < 32 * MIB, shown.stderr


WITHOUT_BOTO3 = """
import importlib.abc
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"boto3", "botocore"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from pgkeep.adapters.destinations.s3 import Options, S3Destination
from pgkeep.errors import ToolError
from pgkeep.progress import Silent
destination = S3Destination(Options(bucket="b"), None)
found = []
for call in (lambda: destination.opened().__enter__(), lambda: destination.probe(Silent())):
    try:
        call()
    except ToolError as error:
        found.append(error.hint)
print(json.dumps(found))
"""


def test_without_boto3_it_is_said_how_to_get_it(tmp_path: Path) -> None:
    assert run_python(WITHOUT_BOTO3, tmp_path) == ["`pip install 'pgkeep[s3]'`"] * 2


def test_boto3_is_loaded_only_for_an_open_destination(tmp_path: Path) -> None:
    text = """
from pgkeep.adapters.destinations.s3 import Options, S3Destination
S3Destination(Options(bucket="b"), None).label
print(json.dumps([name for name in sys.modules if name.partition(".")[0] in ("boto3", "botocore")]))
"""
    assert run_python(text, tmp_path) == []


def test_secrets_are_not_shown() -> None:
    options = Options(bucket="b", access_key_id="key-7", secret_access_key="secret-7", session_token="token-7")
    assert "-7" not in repr(options)
    assert S3Destination(dataclasses.replace(options, prefix="a/b/"), None).label == "s3://b/a/b"
