"""python -m launchers.requeue: see launchers.steer."""

import sys

from launchers.steer import run_command


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return run_command("requeue", argv)


if __name__ == "__main__":
    sys.exit(main())
