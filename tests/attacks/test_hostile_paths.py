"""A path given on the command line may be anything."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pgkeep.adapters.artifact_reader import ArtifactReader, LocalFile
from pgkeep.errors import FormatError
from pgkeep.vault.verify import verify_path
from tests.attacks.hostile import (
    HONEST,
    assert_clean,
    bytes_at,
    directory_at,
    fifo_at,
    link_at,
    not_whole,
    pgkeep,
    socket_at,
    sparse_at,
    with_sidecar,
)

HOSTILE_PATHS: dict[str, tuple[Callable[[Path], Path], int, str]] = {
    "cut": (not_whole, 7, "footer"),
    "empty": (bytes_at(b""), 7, "it is empty"),
    "FIFO": (fifo_at, 6, "not a regular file"),
    "directory": (directory_at, 6, "not a regular file"),
    "socket": (socket_at, 6, "No such device"),
    "endless device": (link_at("/dev/zero"), 6, "not a regular file"),
    "terminal": (link_at("/dev/tty"), 6, "can't read"),
    "link to itself": (lambda path: link_at(path.name)(path), 6, "can't read"),
    "link to nothing": (link_at("nothing"), 10, "does not exist"),
    "checksum FIFO": (with_sidecar(".sha256", fifo_at), 7, "x.sql.gz.sha256 is not a regular file"),
    "checksum directory": (with_sidecar(".sha256", directory_at), 7, "x.sql.gz.sha256 is not a regular file"),
    "checksum link": (with_sidecar(".sha256", link_at("/dev/zero")), 7, "x.sql.gz.sha256 is not a regular file"),
    "checksum of 1 GB": (with_sidecar(".sha256", sparse_at(10**9)), 7, "is larger than 4096 bytes"),
    "checksum of bytes": (with_sidecar(".sha256", bytes_at(b"\xff\0")), 7, "the digest differs"),
    "manifest FIFO": (with_sidecar(".manifest.json", fifo_at), 7, "manifest.json is not a regular file"),
    "manifest link": (with_sidecar(".manifest.json", link_at("/dev/zero")), 7, "is not a regular file"),
    "manifest of 1 GB": (with_sidecar(".manifest.json", sparse_at(10**9)), 7, "manifest.json is larger than"),
    "manifest nested": (with_sidecar(".manifest.json", bytes_at(b"[" * 10**6)), 7, "manifest is malformed"),
}


@pytest.mark.parametrize("name", HOSTILE_PATHS)
def test_verify_names_what_a_path_is_and_does_not_hang(name: str, scratch: Path) -> None:
    make, exit_code, words = HOSTILE_PATHS[name]
    if name == "terminal" and os.path.exists("/dev/tty") and os.isatty(0):
        pytest.skip("needs to run without a terminal: /dev/tty is one here")
    done = pgkeep("verify", make(scratch / "x.sql.gz"), root=scratch / "none")
    assert_clean(done, exit_code, words)


@pytest.mark.parametrize("name", ["FIFO", "directory", "endless device", "cut", "empty"])
def test_restore_names_what_a_path_is_and_does_not_hang(name: str, scratch: Path) -> None:
    make, exit_code, words = HOSTILE_PATHS[name]
    done = pgkeep("restore", make(scratch / "x.sql.gz"), "--to", "host=/nowhere dbname=x", root=scratch / "none")
    assert_clean(done, exit_code, words)


def test_verify_prints_one_document_for_a_hostile_file(scratch: Path) -> None:
    path = scratch / os.fsdecode(b"\xff\x1b[31m.sql.gz")
    path.write_bytes(HONEST[:-1])
    done = pgkeep("verify", path, "--json", root=scratch / "none")
    assert_clean(done, 7)
    assert "\x1b" not in done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is False
    assert "footer" in found["findings"][0]["message"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (gzip.compress(b"--\n-- PostgreSQL database dump\n--\n", mtime=0), "gunzip -c FILE | psql"),
        (b"PGDMP\x01\x0e\0\x04\x08\x01" + b"\0" * 500, "pg_restore -d TARGET FILE"),
        (b"--\n-- PostgreSQL database dump\n--\n" * 20, "psql -v ON_ERROR_STOP=1 -f FILE"),
        (b"(\xb5/\xfd" + b"\0" * 500, "zstd -dc FILE"),
        (b"age-encryption.org/v1\n" * 20, "age -d -i KEY FILE"),
        (b"GIF89a" * 100, "no dump that is known here"),
    ],
)
def test_a_dump_of_another_tool_is_met_with_the_stock_command(data: bytes, words: str, scratch: Path) -> None:
    path = scratch / "other.sql.gz"
    path.write_bytes(data)
    assert words in verify_path(path, "content").findings[0].message
    with LocalFile.open(path) as file, pytest.raises(FormatError) as caught:
        ArtifactReader(file)
    assert words in caught.value.hint
