#!/opt/pgkeep/bin/python -P
"""The deployment guide's name for `pgkeep extractor once`: one pass beside the service, then it returns."""

from __future__ import annotations

import sys

from pgkeep.cli.main import main

USAGE = "usage: extractor.py [once] [OPTION...]\n"


def command(arguments: list[str]) -> list[str]:
    """The arguments of ``pgkeep``. Exits with 2 where there is nothing that the guide knows."""
    options = arguments[1:] if arguments[:1] == ["once"] else arguments
    if all(option.startswith("-") for option in options):
        return ["extractor", "once", *options]
    sys.stderr.write(USAGE)
    sys.exit(2)


if __name__ == "__main__":
    sys.argv[1:] = command(sys.argv[1:])
    main()
