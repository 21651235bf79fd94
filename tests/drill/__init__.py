"""A drill: a pipeline on a real SLURM, struck by faults drawn from a seed, judged against one that was left alone.

    python -m tests.drill --seed N --faults K [--stages base,sft,dpo,ppo,grpo] [--keep] [--json]

    plan.py      pure: which faults, where and when, from the seed
    faults.py    hands: each kind of fault, done from outside to real processes of a dev cluster
    verdict.py   pure: the rules, judged on what was recorded
    __main__.py  the drill: cluster, undisturbed run, disturbed run, evidence, report

The drill knows the project by what everybody sees of it: its commands, its run directories and SLURM.
"""
