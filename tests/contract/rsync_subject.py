"""A destination by rsync for the tests, and the hands that reach behind it."""

from __future__ import annotations

from pathlib import Path

from pgkeep.adapters.destinations import Destination
from tests.contract.destination_contract import Subject


def subject_at(destination: Destination, directory: Path, elsewhere: Path) -> Subject:
    def put(name: str, data: bytes) -> None:
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.write_bytes(data)

    def names(folder: str) -> set[str]:
        below = directory / folder
        return {each.name for each in below.iterdir() if not each.is_dir()} if below.is_dir() else set()

    return Subject(
        kind="rsync",
        destination=destination,
        put=put,
        get=lambda name: (directory / name).read_bytes(),
        names=names,
        source=elsewhere / "source",
        before_it_appears=("store.hashed",),
        sweeps=False,
        removes=False,
        tells_free_bytes=False,
    )
