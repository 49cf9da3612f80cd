"""`python -m replicator` is `pyrepl`."""

import sys

from replicator.process import set_up

__all__ = ["main"]


def main() -> int:
    """Run the command in a process of its own, and return its exit code."""
    set_up()
    from replicator.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
