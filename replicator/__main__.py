"""`python -m replicator` is `pyrepl`."""

import sys

from replicator.cli import main

if __name__ == "__main__":
    sys.exit(main())
