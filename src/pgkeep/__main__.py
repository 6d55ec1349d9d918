"""``python -m pgkeep``."""

from pgkeep.cli.main import main

main()
