"""Submit a whole pipeline:  python -m launchers.pipeline pipeline=full [key=value ...]"""

from __future__ import annotations

import sys

from launchers import cli

USAGE = """
usage: python -m launchers.pipeline [pipeline=<pipeline>] [<key>=<value> ...] [dry_run=true] [-m]

Submits every stage of a pipeline, chained by its graph: on SLURM as jobs with dependencies, else on this
machine, in the foreground. What is done, queued or running already is left as it is: the same command goes on.

A gate on an eval stage, as in eval_sft.gate.metric=accuracy eval_sft.gate.at_least=0.3, is a bound (at_least, at_most,
or max_drop: not worse than its parent's evaluation by more) on a figure's value, whatever its interval. The stages that
take the judged model wait for the evaluation, and do not start where the bound does not hold.
"""


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    from launchers.selection import select
    from launchers.submit import launch
    from launchers.sweep import launch as launch_sweep

    # A finished local pipeline shows its across-stages table after `launch`.
    return cli.run(lambda tokens: select(tokens, only_one=False), launch, USAGE, argv, launch_sweep)


if __name__ == "__main__":
    sys.exit(main())
