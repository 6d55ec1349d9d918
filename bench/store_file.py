"""``store_file.py ENDPOINT BUCKET PREFIX FILE``: the same through pgkeep's adapter; FILE has its checksum beside it."""

from __future__ import annotations

import datetime as dt
import os
import sys
import tempfile
from pathlib import Path

from pgkeep.adapters.destinations import Content
from pgkeep.adapters.destinations.s3 import Options, S3Destination
from pgkeep.domain import names
from pgkeep.progress import Silent

LOCKED_DAYS = 3


def main(endpoint: str, bucket: str, prefix: str, path: str) -> None:
    """With the adapter's own settings: locked, what is sent compared with its digest, and with what arrived."""
    options = Options(bucket=bucket, prefix=prefix, endpoint=endpoint, path_style=True)
    until = dt.datetime.now(dt.UTC) + dt.timedelta(days=LOCKED_DAYS)
    sha256 = Path(path + names.CHECKSUM_SUFFIX).read_text(encoding="utf-8").split()[0]
    with (
        tempfile.TemporaryDirectory() as uploads,
        Path(path).open("rb") as source,
        S3Destination(options, Path(uploads)).opened() as place,
    ):
        content = Content(os.fstat(source.fileno()).st_size, sha256)
        place.store(Path(path).name, source.fileno(), content, Silent(), retain_until=until)


if __name__ == "__main__":
    main(*sys.argv[1:])
