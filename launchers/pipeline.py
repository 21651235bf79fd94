"""Submit a whole pipeline:  python -m launchers.pipeline pipeline=full [key=value ...]"""

from __future__ import annotations

import sys

from launchers import cli

USAGE = """
usage: python -m launchers.pipeline [pipeline=<pipeline>] [<key>=<value> ...] [dry_run=true] [-m]

Submits every stage of a pipeline, chained by its graph: on SLURM as jobs with dependencies, else on this
machine, in the foreground. What is done, queued or running already is left as it is: the same command goes on.

With -m every point of `<key>=<value>,<value>` is a pipeline with a folder of its own; what is the same in several of
them runs once. With hydra/sweeper=optuna and sweep.metric=<eval stage>/<figure> an optimiser chooses the points.

A gate on an eval stage, as in eval_sft.gate.metric=accuracy eval_sft.gate.at_least=0.3, is a bound (at_least, at_most,
or max_drop: not worse than its parent's evaluation by more) on a figure's value, whatever its interval. The stages that
take the judged model wait for the evaluation, and do not start where the bound does not hold.
"""


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    from launchers.selection import Selection, select
    from launchers.submit import launch
    from launchers.sweep import launch as launch_sweep

    # A finished local pipeline shows its across-stages table after `launch`.
    def choose(tokens: list[str]) -> Selection:
        return select(tokens, only_one=False)

    def sample(tokens: list[str]) -> int | None:
        from launchers import sampler

        return sampler.run(tokens, choose) if sampler.wanted(tokens) is not None else None

    return cli.run(choose, launch, USAGE, argv, launch_sweep, sample)


if __name__ == "__main__":
    sys.exit(main())
