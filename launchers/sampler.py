"""A sweep whose points an optimiser chooses: Optuna, as Hydra's own sweeper plugin brings it.

    python -m launchers.pipeline -m hydra/sweeper=optuna 'sft.lr=tag(log,interval(1e-5,1e-3))' \\
        sweep.metric=eval_sft/accuracy hydra.sweeper.n_trials=20 hydra.sweeper.n_jobs=4

A trial is a point: a chain of its own that shares what is the same in others. n_jobs of them run at a time, and what
their evaluations found chooses the next ones. <paths.output_base>/.sweeps/<name>/trials.jsonl says what was tried:
with it the same command goes on, with trials whose chains were left alone first.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from conf.check import ConfigError
from launchers import cli, points, submit
from launchers.compose import CONF, register, search_path, split, translate
from launchers.errors import Full
from launchers.selection import Selection, check_metric
from launchers.submission import Plan, look, make_plan
from launchers.sweep import put
from launchers.table import near
from post_training.run import ledger, manifest, results
from post_training.run.directory import RunDirectory
from post_training.run.history import summarise

POLL_S = 10.0
"""Seconds between looks at running trials: one squeue each."""


def wanted(tokens: Sequence[str]) -> str | None:
    """The sampler that a command line names; None where it names none, or Hydra's own that tries all values."""
    named = [split(token)[2] for token in tokens if split(token)[1] == "hydra/sweeper"]
    return named[-1] if named and named[-1] != "basic" else None


@dataclass(frozen=True)
class Trial:
    """One point that was tried, or is being tried."""

    params: dict[str, str]  # values by the key as Optuna knows it
    folder: str
    state: str  # asked, done or failed
    value: float | None = None
    why: str = ""


def read_trials(path: Path, metric: str) -> list[Trial]:
    """The trials of a study with this metric, each as it was told last. Lines that cannot be read are passed over."""
    found: dict[str, Trial] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            entry = json.loads(line)
            value = entry["value"]
            sound = entry["state"] in ("asked", "failed") or (entry["state"] == "done" and math.isfinite(value))
            if sound and entry["metric"] == metric:
                params = {str(k): str(v) for k, v in entry["params"].items()}
                found[entry["folder"]] = Trial(params, entry["folder"], entry["state"], value, entry["why"])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return list(found.values())


def run(tokens: list[str], select: Callable[[list[str]], Selection]) -> int:
    """Sample, run and judge points until hydra.sweeper.n_trials have been. Returns the exit status.

    tokens: rewritten, without -m. Raises ConfigError and LaunchError.
    """
    name = wanted(tokens)
    if name != "optuna":
        raise ConfigError("hydra/sweeper", name, "is no sampler that is known here", "hydra/sweeper=optuna")
    if find_spec("optuna") is None or find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
        fix = "pip install '.[optuna]' in the project's folder"
        raise ConfigError("hydra/sweeper", name, "its package is not installed", fix)
    study = _study(tokens, select)
    told = {split(token)[1] for token in tokens}
    optuna_sweeper, close = _hydras(tokens)
    try:
        _prepare(optuna_sweeper, study, told)
        if optuna_sweeper.n_trials > 0:
            optuna_sweeper.sweep([token for token in tokens if not split(token)[1].startswith("hydra")])
    except ValueError as error:
        if "No trials are completed" not in str(error):  # Optuna's, where it is asked for the best of none
            raise
    except KeyboardInterrupt:
        print("interrupted: the jobs go on, and the same command goes on with the study", file=sys.stderr)
        return 130
    finally:
        close()
    return study.tell()


def _study(tokens: list[str], select: Callable[[list[str]], Selection]) -> Study:
    from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides

    from launchers.compose import swept

    ours = [token for token in tokens if not split(token)[1].startswith("hydra")]
    distributions = create_params_from_overrides(ours)[0]
    space = {split(key)[1] for key in distributions}
    if not space or not swept(ours):
        raise ConfigError("hydra/sweeper", "optuna", "there is nothing to choose", "'sft.lr=interval(1e-5,1e-3)'")
    fixed = [token for token in ours if split(token)[1] not in space]
    first = select(fixed)
    metric = next((split(token)[2] for token in reversed(fixed) if split(token)[1] == "sweep.metric"), None)
    stage, figure = check_metric(first, metric)
    if first.dry_run:
        raise ConfigError("dry_run", "true", "what a sampler chooses is not known before", "leave hydra/sweeper out")
    _, sweep = cli.name_points([[*fixed, *(f"{key}=0" for key in space)]], space)
    return Study(sweep.name, stage, figure, first.output_base, fixed, distributions, space, select)


@dataclass
class Study:
    """What is sampled, and how its trials are run."""

    name: str
    stage: str  # the evaluation
    figure: str
    output_base: Path
    fixed: list[str]
    distributions: dict[str, Any]  # Optuna's, by its keys
    space: set[str]  # the keys without Hydra's prefixes
    select: Callable[[list[str]], Selection]
    trials: dict[str, Trial] = field(default_factory=dict)  # by folder

    @property
    def path(self) -> Path:
        return points.folder(self.output_base, self.name) / "trials.jsonl"

    @property
    def metric(self) -> str:
        return f"{self.stage}/{self.figure}"

    @property
    def direction(self) -> str:
        return "maximize" if results.metric(self.figure).better > 0 else "minimize"

    def write(self, trial: Trial) -> None:
        self.trials[trial.folder] = trial
        self.path.parent.mkdir(parents=True, exist_ok=True)
        about = {"metric": self.metric, "folder": trial.folder, "params": trial.params, "state": trial.state}
        ledger.append(self.path, "trial", **about, value=trial.value, why=trial.why)

    # -- Hydra's launcher, as a sweeper calls it

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        """Run a batch of trials. Returns Hydra's JobReturns: the figure, or None for a trial that failed."""
        from hydra.core.utils import JobReturn, JobStatus

        given = [list(overrides) for overrides in job_overrides]
        tokens, sweep = cli.name_points(given, self.space, alike=True)
        folders = [next(v for t in point if (v := split(t)[2]) and split(t)[1] == "run_name") for point in tokens]
        folders = [cli.unquoted(folder) for folder in folders]
        asked: dict[str, Selection] = {}
        for folder, point, overrides in zip(folders, tokens, given, strict=True):
            if folder in self.trials and self.trials[folder].state != "asked":
                continue  # a sampler may try the same again
            params = {k: v for k, v in (t.split("=", 1) for t in overrides) if k in self.distributions}
            try:
                asked[folder] = self.select(point)
            except ConfigError as error:
                if not self.trials:
                    raise
                self.write(Trial(params, folder, "failed", why=str(error).splitlines()[0]))
                continue
            self.write(Trial(params, folder, "asked"))
        for folder, found in self._run(sweep, asked).items():
            state = "failed" if isinstance(found, str) else "done"
            value, why = (None, found) if isinstance(found, str) else (found, "")
            self.write(Trial(self.trials[folder].params, folder, state, value, why))
        for i, folder in enumerate(folders, initial_job_idx + 1):
            trial = self.trials[folder]
            shown = results.shown(self.figure, results.Figure(trial.value)) if trial.value is not None else trial.why
            print(f"trial {i}: {folder}: {self.metric} {shown}", flush=True)
        return [
            JobReturn(overrides=list(o), status=JobStatus.COMPLETED, _return_value=self.trials[f].value)
            for o, f in zip(job_overrides, folders, strict=True)
        ]

    def _run(self, sweep: cli.Sweep, asked: dict[str, Selection]) -> dict[str, float | str]:
        """Run these points to their end. By folder: the figure, or why there is none."""
        if not asked:
            return {}
        first = next(iter(asked.values()))
        print(f"{len(asked)} trials: {', '.join(asked)}", flush=True)
        known = cli.Sweep(sweep.name, {folder: sweep.points[folder] for folder in asked})
        if first.config(first.wanted[0]).cluster.scheduler == "local":
            points.record(self.output_base, sweep.name, known.points, self.metric)
            return {folder: self._run_here(selection) for folder, selection in asked.items()}
        return self._run_on_slurm(known, asked)

    def _run_here(self, selection: Selection) -> float | str:
        if submit.launch(selection, table=False) == 130:
            raise KeyboardInterrupt
        plan = make_plan(selection, ask=False)
        return self._result(plan) if self._is_whole(plan) else self._why(plan)

    def _run_on_slurm(self, sweep: cli.Sweep, asked: dict[str, Selection]) -> dict[str, float | str]:
        found: dict[str, float | str] = {}
        plans: dict[str, Plan] = {}
        incomplete, gone = True, dict.fromkeys(asked, 0)
        while len(found) < len(asked):
            if incomplete:  # also: a limit on the number of jobs was reached
                try:
                    taken = put(sweep, list(asked.values()), self.metric)
                    plans, incomplete = {plan.name: plan for plan in taken.plans}, bool(taken.left)
                except Full as error:
                    if not plans:
                        raise
                    print(f"waiting for room: {error.problem}", file=sys.stderr)
            roots = {name: plan.stages[self.stage].run.root for name, plan in plans.items() if name not in found}
            first = next(iter(asked.values()))
            seen = look(roots.values(), first.config(first.wanted[0]).cluster)
            for name, root in roots.items():
                if seen[root].whole:
                    found[name] = self._result(plans[name])
                    continue
                gone[name] = gone[name] + 1 if seen[root].live is False and not incomplete else 0
                if gone[name] > 1:  # the second look: a job may end between its manifest's and squeue's reading
                    found[name] = self._why(plans[name])
            if len(found) < len(asked):
                time.sleep(POLL_S)
        return found

    def _is_whole(self, plan: Plan) -> bool:
        return manifest.problem(plan.stages[self.stage].run.model) is None

    def _result(self, plan: Plan) -> float | str:
        try:
            figure = results.read(plan.stages[self.stage].run).figures.get(self.figure)
        except (OSError, ValueError) as error:
            return str(error)
        return figure.value if figure is not None else f"{self.stage} found no {self.figure}"

    def _why(self, plan: Plan) -> str:
        """Why a chain has no result: the reason of what failed in it."""
        for name, planned in plan.stages.items():
            history = summarise(ledger.read(RunDirectory(planned.run.root).ledger))
            if history.gave_up:
                return f"{name} failed: {history.reason}"
        history = summarise(ledger.read(plan.stages[self.stage].run.ledger))
        return history.reason or f"{self.stage} has no result"

    def tell(self) -> int:
        """Say which trial is the best, and show all of them."""
        from launchers import compare

        sign = results.metric(self.figure).better
        done = [trial for trial in self.trials.values() if trial.value is not None]
        print()
        if points.folder(self.output_base, self.name).joinpath("sweep.json").exists():
            compare.show_sweep(self.output_base, self.name)
        if not done:
            print(f"no trial has {self.metric}", file=sys.stderr)
            return 1
        best = max(done, key=lambda trial: sign * (trial.value or 0.0))
        shown = results.shown(self.figure, results.Figure(best.value or 0.0))
        keys = " ".join(f"{split(key)[1].removeprefix('stages.')}={value}" for key, value in best.params.items())
        where = near(self.output_base / best.folder)
        print(f"best of {len(self.trials)} trials: {self.metric} {shown} with {keys}\n  {where}")
        return 0


def _fitting(params: dict[str, str], distributions: dict[str, Any]) -> dict[str, Any] | None:
    """Sampled values as Optuna had them; None where they are not of this search space."""
    if params.keys() != distributions.keys():
        return None
    found: dict[str, Any] = {}
    for key, text in params.items():
        distribution = distributions[key]
        try:
            if hasattr(distribution, "choices"):
                found[key] = next(choice for choice in distribution.choices if str(choice) == text)
            else:
                found[key] = int(text) if type(distribution).__name__.startswith("Int") else float(text)
            if not distribution._contains(distribution.to_internal_repr(found[key])):
                return None
        except (StopIteration, ValueError):
            return None
    return found


def _hydras(tokens: Sequence[str]) -> tuple[Any, Callable[[], None]]:
    """Hydra's own sweeper plugin, configured by hydra.sweeper.*, and what ends Hydra's work."""
    import tempfile

    from hydra import version
    from hydra._internal.callbacks import Callbacks
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.errors import HydraException
    from hydra.types import HydraContext, RunMode
    from omegaconf.errors import OmegaConfBaseException

    folder = tempfile.TemporaryDirectory(prefix="post_training-sweep-")  # where the plugin writes a file

    def close() -> None:
        GlobalHydra.instance().clear()
        folder.cleanup()

    version.setbase("1.3")
    register()
    try:
        path = create_config_search_path(str(CONF))
        for place in search_path():
            path.prepend("own", place)
        made = Hydra.create_main_hydra2("sweep", path)
        cfg = made.compose_config(
            "hydra", [f"hydra.sweep.dir={folder.name}", *tokens], RunMode.MULTIRUN, with_log_configuration=False
        )
        context = HydraContext(config_loader=made.config_loader, callbacks=Callbacks())
        sweeper = Plugins.instance().instantiate_sweeper(
            config=cfg, hydra_context=context, task_function=lambda _: None
        )
        return sweeper.sweeper, close  # type: ignore[attr-defined]
    except (HydraException, OmegaConfBaseException) as error:
        close()
        raise translate(error, tokens) from error


def _prepare(sweeper: Any, study: Study, told: set[str]) -> None:
    """Give Hydra's sweeper our launcher, and the trials that were made before."""
    import logging
    import warnings

    import optuna

    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("hydra_plugins").setLevel(logging.CRITICAL)  # we say ourselves which trial failed
    if "hydra.sweeper.storage" in told:
        raise ConfigError("hydra.sweeper.storage", "...", "trials are kept below paths.output_base", "leave it out")
    sweeper.launcher, sweeper.direction, sweeper.study_name = study, study.direction, study.name
    if "hydra.sweeper.max_failure_rate" not in told:
        sweeper.max_failure_rate = 1.0  # a trial that failed is one that is not worth trying
    sweeper.storage = optuna.storages.InMemoryStorage()
    made = optuna.create_study(study_name=study.name, storage=sweeper.storage, direction=study.direction)
    states = {"done": optuna.trial.TrialState.COMPLETE, "failed": optuna.trial.TrialState.FAIL}
    before = []
    for trial in read_trials(study.path, study.metric):
        params = _fitting(trial.params, study.distributions)
        if params is None:
            continue  # of another search space
        before.append(trial)
        study.trials[trial.folder] = trial
        if trial.state == "asked":
            made.enqueue_trial(params)
        else:
            made.add_trial(
                optuna.trial.create_trial(
                    state=states[trial.state], params=params, distributions=study.distributions, value=trial.value
                )
            )
    ended = sum(trial.state != "asked" for trial in before)
    if before:
        print(f"{study.name}: {ended} trials before, and {len(before) - ended} to go on", flush=True)
    sweeper.n_trials = max(0, sweeper.n_trials - ended)
    if before and hasattr(sweeper.sampler, "reseed_rng"):
        sweeper.sampler.reseed_rng()  # with the same seed it would choose the same points again
