"""The Optuna study of a sweep: a journal file that survives its process, seeded samplers, trials with their owner.

Optuna is imported late: it takes over a second.
"""

import fcntl
import json
import secrets
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from conf.request import Value
from conf.sweep import SweepRequest, parse_objective
from flows.runs.records import is_alive, own_process
from tasks.errors import ConfigError
from tasks.manifests.run_summary import ProcessOwner
from tasks.stage.digests import digest

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

Category = bool | int | float | str | None
IDENTITY, TOKEN, OWNER, REPEATS, ERROR = "likeness", "token", "owner", "repeats", "error"
"""Names of user attributes, of the study and of its trials."""
MIN_POPULATION, MAX_POPULATION = 4, 50  # of NSGA-II; Optuna's own is 50, more than most sweeps have trials
FINISHED = ("COMPLETE", "PRUNED")


class SweepStudy:
    """A sweep's persistent study."""

    def __init__(self, request: SweepRequest, folder: Path, *, seed: int) -> None:
        """Open the study in `<folder>/<study>.journal`.

        Raises:
            ConfigError: a study of this name belongs to another search.

        """
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.request = request
        self.seed = seed
        self.objectives = tuple(parse_objective(text) for text in request.objectives)
        self.journal = folder / f"{request.study_name}.journal"
        self.lock = folder / f"{request.study_name}.lock"
        self.distributions = make_distributions(request)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to {folder}: {error.strerror}; set output_dir") from error
        with locked(self.lock):
            drop_torn_line(self.journal)
            self.study: Study = optuna.create_study(
                # A journal file, not SQLite: its appends are safe on network file systems.
                storage=JournalStorage(JournalFileBackend(str(self.journal))),
                study_name=request.study_name,
                directions=["minimize" if objective.is_minimized else "maximize" for objective in self.objectives],
                load_if_exists=True,
                pruner=make_pruner(request),
            )
            self.check_identity()
            self.repair()

    def check_identity(self) -> None:
        """Refuse a study that an unlike sweep began: its values would not compare. Raises ConfigError."""
        identity = {
            "base": digest(self.request.base),
            "objectives": self.request.list_objective_names(),
            "num_seeds": self.request.num_seeds,
        }
        found = self.study.user_attrs.get(IDENTITY)
        if found is None:
            self.study.set_user_attr(IDENTITY, identity)
            self.study.set_user_attr(TOKEN, secrets.token_hex(8))
        elif found != identity:
            changed = next(name for name, value in identity.items() if found.get(name) != value)
            names = {"base": "other fixed settings", "objectives": "another objective", "num_seeds": "other seeds"}
            raise ConfigError(f"study {self.study.study_name} has {names[changed]}; choose another --study NAME")
        from optuna.distributions import check_distribution_compatibility

        for trial in self.trials():
            for name, distribution in trial.distributions.items():
                try:
                    if name in self.distributions:
                        check_distribution_compatibility(distribution, self.distributions[name])
                except ValueError as error:
                    reason = f"study {self.study.study_name} searched other values of {name}"
                    raise ConfigError(f"{reason}; choose another --study NAME") from error

    def trials(self, *states: str) -> "list[FrozenTrial]":
        """Return the trials in the given states, all without any."""
        from optuna.trial import TrialState

        wanted = tuple(TrialState[name] for name in states) or None
        return self.study.get_trials(deepcopy=False, states=wanted)

    def repair(self) -> None:
        """Fail trials whose process is gone and queue them again; queue the missing combinations of a grid."""
        from optuna.trial import TrialState

        for trial in self.trials("RUNNING"):
            if not is_held(trial):
                # Without a reason, which marks it as interrupted.
                self.study.tell(trial.number, state=TrialState.FAIL)
        if self.request.is_grid:
            self.queue_grid()
            return
        repeated = {trial.user_attrs.get(REPEATS) for trial in self.trials()}
        for trial in self.trials("FAIL"):
            if is_interrupted(trial) and trial.params and trial.number not in repeated:
                self.study.enqueue_trial(dict(trial.params), user_attrs={REPEATS: trial.number})

    def queue_grid(self) -> None:
        """Queue the combinations that no trial has finished, holds or waits with; failed ones are repeated.

        Optuna's own grid sampler ends the study, which works inside its `optimize` alone.
        """
        taken = [trial.params for trial in self.trials(*FINISHED, "RUNNING")]
        # `enqueue_trial` keeps values here; a waiting trial has no `params` yet.
        taken += [trial.system_attrs.get("fixed_params", {}) for trial in self.trials("WAITING")]
        for values in self.request.combinations():
            encoded = {name: encode(value) for name, value in values.items()}
            if encoded not in taken:
                self.study.enqueue_trial(encoded)
                taken.append(encoded)

    def ask(self) -> "tuple[Trial, dict[str, Value]] | None":
        """Take the next trial and mark it as this process's; None where another process took the last of a grid."""
        with locked(self.lock):
            if self.request.is_grid and not self.trials("WAITING"):
                return None
            # A sampler for every trial, seeded by the number of samples before it: a resumed sweep draws what an
            # uninterrupted one would have drawn.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Optuna marks some samplers as experimental
                self.study.sampler = make_sampler(self.request, seed=mix(self.seed, self.count_samples()))
                trial = self.study.ask()
                values = {name: self.suggest(trial, name) for name in self.distributions}
            trial.set_user_attr(OWNER, own_process().model_dump(mode="json"))
        return trial, values

    def suggest(self, trial: "Trial", name: str) -> Value:
        """Return a trial's value of a setting, sampled where none is queued."""
        if name in self.request.space:
            choices = self.request.space[name]
            found = trial.suggest_categorical(name, [encode(choice) for choice in choices])
            return next(choice for choice in choices if same(encode(choice), found))
        searched = self.request.ranges[name]
        if searched.integer:
            return trial.suggest_int(name, int(searched.low), int(searched.top),
                                     step=int(searched.step or 1), log=searched.log)  # fmt: skip
        value = trial.suggest_float(name, searched.low, searched.top, step=searched.step, log=searched.log)
        # The decimal that is written, not its sum of steps: 0.3 and not 0.30000000000000004.
        return value if searched.step is None else searched.value(round((value - searched.low) / searched.step))

    def count_samples(self) -> int:
        """Return the number of trials that were sampled; a repetition of an interrupted one is none."""
        sampled = [t for t in self.trials() if REPEATS not in t.user_attrs and not (is_interrupted(t) and not t.params)]
        return len(sampled)

    def best(self) -> "list[FrozenTrial]":
        """Return the best trial, or those of the Pareto front; empty while none is complete."""
        if not self.trials("COMPLETE"):
            return []
        return list(self.study.best_trials) if len(self.objectives) > 1 else [self.study.best_trial]

    def give_up(self, trials: "Sequence[Trial]") -> None:
        """Mark trials as interrupted and queue them again."""
        from optuna.trial import TrialState

        with locked(self.lock):
            for trial in trials:
                self.study.tell(trial, state=TrialState.FAIL)
            self.repair()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file: one process at a time repairs a study or takes a trial."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def drop_torn_line(journal: Path) -> None:
    """Remove an unfinished last line of a journal, as a full disk or a power cut leaves: Optuna would append to it."""
    from optuna.storages.journal import JournalFileSymlinkLock

    lock = JournalFileSymlinkLock(str(journal))  # held by whoever appends
    lock.acquire()
    try:
        data = journal.read_bytes() if journal.exists() else b""
        if not data.endswith(b"\n") and data:
            with journal.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)
    finally:
        lock.release()


def make_distributions(request: SweepRequest) -> "dict[str, BaseDistribution]":
    """Return what Optuna samples every setting from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {
        name: CategoricalDistribution([encode(value) for value in values]) for name, values in request.space.items()
    }
    for name, searched in request.ranges.items():
        if searched.integer:
            step = int(searched.step or 1)
            found[name] = IntDistribution(int(searched.low), int(searched.top), log=searched.log, step=step)
        else:
            found[name] = FloatDistribution(searched.low, searched.top, log=searched.log, step=searched.step)
    return found


def make_sampler(request: SweepRequest, *, seed: int) -> "BaseSampler":
    """Return the sampler of one trial."""
    from optuna import samplers

    kind = "tpe" if request.sampler == "auto" else request.sampler
    # Combinations of a grid are queued, so nothing is left to sample.
    if kind in ("random", "grid") or request.is_grid:
        return samplers.RandomSampler(seed=seed)
    if kind == "nsga2":
        population = max(MIN_POPULATION, min(MAX_POPULATION, request.max_trials // 4))
        return samplers.NSGAIISampler(seed=seed, population_size=population)
    return samplers.TPESampler(seed=seed)


def make_pruner(request: SweepRequest) -> "BasePruner":
    """Return the pruner of the request."""
    from optuna import pruners

    # Pruned once so many trials have finished: the median of one or two says little.
    return pruners.MedianPruner(n_startup_trials=3) if request.pruner == "median" else pruners.NopPruner()


def encode(value: Value) -> Category:
    """Return a value as Optuna stores categories: lists as JSON text."""
    return json.dumps(value) if isinstance(value, list) else value


def same(one: Category, other: Category) -> bool:
    """Whether two categories are the same; True is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def mix(seed: int, index: int) -> int:
    """Return the seed of a trial's sampler: 32 bits."""
    import numpy as np

    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def is_held(trial: "FrozenTrial") -> bool:
    """Whether a running trial belongs to another process that is alive."""
    stored = trial.user_attrs.get(OWNER)
    owner = None if stored is None else ProcessOwner.model_validate(stored)
    # A process opens a study before it takes trials, so one that it holds already is of an earlier sweep.
    own = own_process()
    is_own = owner is not None and (owner.host, owner.pid) == (own.host, own.pid)
    return not is_own and is_alive(owner)


def is_interrupted(trial: "FrozenTrial") -> bool:
    """Whether a trial's process ended before the trial: it failed without a reason."""
    return trial.state.name == "FAIL" and ERROR not in trial.user_attrs
