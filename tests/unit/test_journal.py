"""The journal: durable before it is acted on, gone after, and never half read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgkeep.errors import FormatError, RefusedError
from pgkeep.vault import journal
from pgkeep.vault.journal import Entry, Place


def entry(number: int = 0, **fields: object) -> Entry:
    known = {"id": f"20260131T23595{number}Z-1f2e3d", "action": "seal", "places": (place(),)}
    return Entry(**{**known, **fields})  # type: ignore[arg-type]


def place(**fields: object) -> Place:
    known = {
        "directory": "daily",
        "filename": "2026-01-31_23-59-59.sql.gz",
        "inodes": {"2026-01-31_23-59-59.sql.gz": 12, "2026-01-31_23-59-59.sql.gz.manifest.json": 13},
    }
    return Place(**{**known, **fields})  # type: ignore[arg-type]


def test_nothing_is_pending_at_first(tmp_path: Path) -> None:
    assert list(journal.pending(tmp_path)) == []


def test_what_was_written_is_pending_until_it_is_closed_the_oldest_first(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        journal.write(tmp_path, entry(number))
    assert list(journal.pending(tmp_path)) == [entry(0), entry(1), entry(2)]
    journal.close(tmp_path, entry(1))
    assert list(journal.pending(tmp_path)) == [entry(0), entry(2)]


def test_the_order_of_the_inodes_is_kept_because_removal_goes_by_it(tmp_path: Path) -> None:
    name = "2026-01-31_23-59-59.sql.gz"
    order = [f"{name}.sha256", f"{name}.manifest.json", name]
    journal.write(tmp_path, entry(places=(place(inodes=dict.fromkeys(order, 1)),)))
    (found,) = journal.pending(tmp_path)
    assert list(found.places[0].inodes) == order


@pytest.mark.parametrize(
    "fields",
    [{"directory": "../outside"}, {"directory": ""}, {"filename": "../x", "inodes": {"../x": 1}}, {"inodes": {"y": 1}}],
)
def test_an_entry_about_anything_but_a_backup_is_refused(tmp_path: Path, fields: dict[str, object]) -> None:
    journal.write(tmp_path, entry(0, places=(place(), place(**fields))))
    with pytest.raises(FormatError, match="no backup's file"):
        list(journal.pending(tmp_path))


def test_closing_twice_is_once(tmp_path: Path) -> None:
    journal.write(tmp_path, entry())
    journal.close(tmp_path, entry())
    journal.close(tmp_path, entry())
    assert list(tmp_path.iterdir()) == []


def test_writing_again_replaces(tmp_path: Path) -> None:
    journal.write(tmp_path, entry())
    journal.write(tmp_path, entry(action="expire"))
    assert [found.action for found in journal.pending(tmp_path)] == ["expire"]


def test_nobody_else_reads_it(tmp_path: Path) -> None:
    journal.write(tmp_path, entry())
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_temporary_file_of_a_killed_writer_is_no_entry(tmp_path: Path) -> None:
    (tmp_path / ".pgkeep-temporary-0011223344556677").write_bytes(b'{"id":')
    assert list(journal.pending(tmp_path)) == []


def test_an_identifier_that_is_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError):
        journal.write(tmp_path, entry(id="../outside"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b'{"id":"x"}', b"\0" * 4096, b'{"id":"\xff"}', b"[" * 100_000,
        b'{"id":"x","action":"erase","directory":"daily","filename":"f","inodes":{}}',
        b'{"id":"x","action":"seal","directory":"daily","filename":"f","inodes":{"f":"12"}}',
    ],
)  # fmt: skip
def test_an_unreadable_entry_stops_everything_by_name(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_bytes(data)
    with pytest.raises(FormatError, match=r"broken\.json is unreadable") as caught:
        list(journal.pending(tmp_path))
    assert "nothing was changed" in caught.value.hint


@given(st.binary(max_size=100))
def test_noise_is_an_error_in_words(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    directory = tmp_path_factory.mktemp("journal")
    (directory / "noise.json").write_bytes(noise)
    with pytest.raises(FormatError):
        list(journal.pending(directory))
