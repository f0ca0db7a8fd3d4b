"""The search behind `hydra/sweeper=optuna`: a study in the sweep directory that the same command continues."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..common.errors import Pruned, UserError, nearest
from ..common.private_api import trial_id

log = logging.getLogger("mmft")
JOURNAL, STUDY = "study.journal", "mmft"
POINT = "point"  # a trial's attribute: the name of its run's directory


def direction(objective: str, directions: Mapping[str, bool]) -> str:
    """minimize for a loss; for a metric as `directions` says (name -> whether higher is better, True if unknown)."""
    return "minimize" if objective.endswith("loss") or not directions.get(objective, True) else "maximize"


class Search:
    """One study: its space from Hydra's overrides, its sampler and pruner from Optuna by name (conf/hydra/sweeper/optuna.yaml)."""

    def __init__(
        self, sweep_dir: Path, objective: str, space: list[Any], n_trials: int = 20, n_jobs: int = 1, seed: int | None = None,
        sampler: str = "TPESampler", sampler_options: dict[str, Any] | None = None,
        directions: Mapping[str, bool] | None = None, pruner: str | None = None, pruner_options: dict[str, Any] | None = None, params: dict[str, str] | None = None,
    ):  # fmt: skip
        """`space`: Hydra's overrides of the searched keys, those of `params` (a preset's) included. Raises UserError."""
        optuna = library()
        self.space = {override.get_key_element(): distribution(override) for override in space}
        if not self.space:
            raise UserError("hydra/sweeper=optuna: nothing to search; give a key several values, e.g. 'lora.r=choice(4,16)' or 'trainer.learning_rate=interval(1e-5,1e-3)'")
        for key, value in (("n_trials", n_trials), ("n_jobs", n_jobs)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"hydra.sweeper.{key}={value}: must be a whole number above 0")
        if sampler in ("GridSampler", "BruteForceSampler"):
            raise UserError(f"hydra.sweeper.sampler={sampler}: every value is tried by the plain sweep; leave hydra/sweeper=optuna out")
        self.n_trials, self.n_jobs, self.objective = n_trials, n_jobs, objective
        self.sampler, self.options = sampler, {"seed": seed, **(sampler_options or {})}
        pruning = (pruner or "NopPruner", dict(pruner_options or {}) if pruner else {})
        build_by_name("pruner", optuna.pruners, *pruning)
        first = self._sampler(0)
        self.journal = sweep_dir / JOURNAL
        sweep_dir.mkdir(parents=True, exist_ok=True)
        self.study = optuna.create_study(
            storage=storage(self.journal), study_name=STUDY, sampler=first, direction=direction(objective, directions or {}), load_if_exists=True
        )
        self._check_same_search({"objective": objective, "space": {key.lstrip("+"): repr(value) for key, value in self.space.items()}})
        self.study.set_user_attr("pruner", list(pruning))  # a point's own process makes the pruner from here

    def _check_same_search(self, asked: dict[str, Any]) -> None:
        """Raises UserError if the study was begun with another space or objective."""
        known = self.study.user_attrs.get("asked")
        if known is not None and known != asked:
            what = next(k for k in asked if known.get(k) != asked[k])
            raise UserError(f"{self.journal.parent}: holds a search with another {what} ({known[what]}); name=WORD gives this one a directory of its own")
        self.study.set_user_attr("asked", asked)

    def run(self, add_point: Callable[[list[str]], Any], train: Callable[[list[Any]], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Ask, train and tell until n_trials points are done; return the outcome of each trial.

        add_point: returns the point of a trial's overrides. train: trains different points and returns their outcomes in the same order.
        """
        from optuna.trial import TrialState

        self._retry()
        outcomes = []
        while (left := self.n_trials - self._done()) > 0:
            trials = [self._ask() for _ in range(min(left, self.n_jobs))]
            points = {trial.number: add_point(words(trial.params)) for trial in trials}
            for trial in trials:
                trial.set_user_attr(POINT, points[trial.number].name)
            different = {p.name: p for p in points.values()}
            by_name = dict(zip(different, train(list(different.values())), strict=True))
            for trial in trials:
                outcome = by_name[points[trial.number].name]
                outcomes.append(outcome)
                if outcome["status"] == "pruned":
                    self.study.tell(trial, state=TrialState.PRUNED)
                elif outcome["status"] == "finished" and outcome["objective"] is not None:
                    self.study.tell(trial, outcome["objective"])
                else:
                    self.study.tell(trial, state=TrialState.FAIL)
        self._log_result()
        return outcomes

    def _sampler(self, number: int) -> Any:
        """The sampler for trial `number`. Its seed includes the number, so that an interrupted search continues with the same samples."""
        options = dict(self.options)
        if options["seed"] is not None and self.sampler != "QMCSampler":  # its sequence is counted in the study
            options["seed"] += number
        return build_by_name("sampler", library().samplers, self.sampler, options)

    def _ask(self) -> Any:
        self.study.sampler = self._sampler(len(self.study.get_trials(deepcopy=False)))
        return self.study.ask(self.space)

    def _retry(self) -> None:
        """Ask again for the points of an earlier command that failed or were killed."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials(states=(TrialState.RUNNING, TrialState.FAIL)):
            if trial.state == TrialState.RUNNING:
                self.study.tell(trial.number, state=TrialState.FAIL)
            if trial.params and not any(t.system_attrs.get("fixed_params") == trial.params and t.number > trial.number for t in self.study.trials):
                self.study.enqueue_trial(trial.params)
        self.before = {t.number for t in self.study.get_trials(states=(TrialState.FAIL,))}

    def _done(self) -> int:
        return sum(t.state.is_finished() and t.number not in self.before for t in self.study.get_trials(deepcopy=False))

    def _log_result(self) -> None:
        from optuna.trial import TrialState

        done = self.study.get_trials(states=(TrialState.COMPLETE,))
        pruned = len(self.study.get_trials(states=(TrialState.PRUNED,)))
        log.info("%-14s %d points finished, %d pruned, in %s", "search", len(done), pruned, self.journal)
        if done:
            best = self.study.best_trial
            found = " ".join(word.lstrip("+") for word in words(best.params))
            log.info("%-14s %s %.6g  %s", "best", self.objective, best.value, found)


def library() -> Any:
    """Optuna, silent. Raises UserError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError("hydra/sweeper=optuna needs Optuna: pip install mmft[sweep]") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def storage(journal: Path) -> Any:
    """A journal file. Processes on several machines may append to it, and no database has to be installed."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    path = str(journal)
    return JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))  # the default lock needs symbolic links, which Windows refuses


def build_by_name(kind: str, module: Any, name: str, options: dict[str, Any]) -> Any:
    """`name(**options)` of optuna.samplers or optuna.pruners. Raises UserError."""
    known = [n for n in module.__all__ if n.lower().endswith(kind) and not n.startswith(("Base", "Partial"))]
    if name not in known:
        raise UserError(f"hydra.sweeper.{kind}={name}: no such {kind}.{nearest(name if name.lower().endswith(kind) else f'{name}{kind.title()}', known)} There are: {', '.join(known)}.")
    try:
        return getattr(module, name)(**options)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"hydra.sweeper.{kind}_options: {' '.join(str(error).split())}") from None


def distribution(override: Any) -> Any:
    """Optuna's distribution for one sweep of Hydra's grammar. Raises UserError."""
    from optuna import distributions as d

    sweep, key = override.value(), override.key_or_group
    tags: set[str] = getattr(sweep, "tags", set())
    try:
        if override.is_interval_sweep():
            whole = isinstance(sweep.start, int) and isinstance(sweep.end, int) or "int" in tags
            kind = d.IntDistribution if whole else d.FloatDistribution
            ends = (int(sweep.start), int(sweep.end)) if whole else (sweep.start, sweep.end)
            return kind(*ends, log="log" in tags)
        if override.is_range_sweep():
            values = list(sweep.range())  # Hydra's range ends before its stop, Optuna's at its last value
            if "log" in tags:
                raise UserError(f"{key}: a range cannot be searched on a log scale; write tag(log,interval({sweep.start},{sweep.stop}))")
            if all(isinstance(v, int) for v in values):
                return d.IntDistribution(values[0], values[-1], step=sweep.step)
            return d.FloatDistribution(values[0], values[-1], step=float(sweep.step))
        return d.CategoricalDistribution(list(override.sweep_string_iterator()))
    except (ValueError, IndexError) as error:
        raise UserError(f"{key}: {' '.join(str(error).split()) or 'an empty range'}") from None


def words(params: dict[str, Any]) -> list[str]:
    """Overrides of a trial's values; numbers have six digits, so that names of runs stay readable."""
    return [f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()]


def is_trial(run: Path) -> bool:
    """Whether a run directory lies in the directory of a search."""
    return (run.parent / JOURNAL).is_file()


class TrialOfPoint:
    """The trial of a point, in whichever process trains it: reports evaluations and asks whether to go on."""

    def __init__(self, run: Path, objective: str):
        optuna = library()
        self.objective = objective
        study = optuna.load_study(study_name=STUDY, storage=storage(run.parent / JOURNAL))
        name, options = study.user_attrs["pruner"]
        study.pruner = build_by_name("pruner", optuna.pruners, name, options)
        running = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
        own = next((t for t in running if t.user_attrs.get(POINT) == run.name), None)  # none if the point is trained again by hand
        self.trial = optuna.trial.Trial(study, trial_id(own)) if own else None

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises Pruned if other points did better up to here."""
        key = self.objective if self.objective in metrics else f"eval_{self.objective}"
        if self.trial is None or key not in metrics:
            return  # text metrics are measured during training only with evaluation.generate=true
        self.trial.report(metrics[key], step)
        if self.trial.should_prune():
            raise Pruned(f"pruned at step {step}: {self.objective} {metrics[key]:.6g} is behind the other points")
