"""What is compared: runs, and the best trials of sweeps, each with all of its training seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.cli.results.runs import find_run
from tasks.errors import ConfigError

DEFAULT_TRIALS = 3
"""Of a sweep that is compared alone; beside others, its best one."""


@dataclass(frozen=True)
class Contender:
    """A run, or a trial with a run for each training seed."""

    name: str
    """A trial's; empty: that of the run."""
    folders: tuple[Path, ...]
    """By training seed."""
    note: str = ""


def find_contenders(output: Path, names: Sequence[str], *, num_trials: int | None) -> list[Contender]:
    """Return what is compared, in the order of the names, a sweep's best trials first.

    Raises:
        ConfigError: there are fewer than two, or a run or sweep is unknown, or a trial has lost a run.

    """
    studies = {name: study for name in names if (study := find_study(output, name)) is not None}
    if num_trials is not None and not studies:
        raise ConfigError("--trials takes the best of a sweep, and none is named; leave it out")
    num = num_trials or (DEFAULT_TRIALS if len(names) == 1 else 1)
    found = list[Contender]()
    for name in names:
        if name in studies:
            found += list_trials(output, studies[name], num=num, is_alone=len(studies) == 1)
        else:
            found.append(Contender("", (find_run(output, name),)))
    if len(found) < 2:
        only = f"; {names[0]} has a single setting to compare" if studies else ""
        raise ConfigError(f"compare takes at least two runs, or a sweep{only}; `likeness runs` lists runs")
    folders = [folder for each in found for folder in each.folders]
    if len(set(folders)) < len(folders):
        raise ConfigError("the same run is named twice; `likeness runs` lists all of them")
    return found


def find_study(output: Path, name: str) -> Path | None:
    """Return the journal of a sweep by its name, the end of its name, or its path; None where there is none."""
    journals = sorted((output / "sweeps").glob("*.journal"))
    path = Path(name).absolute()
    if path.parent == (output / "sweeps").absolute():
        name = path.name
    name = name.removesuffix(".journal")
    exact = [journal for journal in journals if journal.stem == name]
    matches = exact or [journal for journal in journals if journal.stem.endswith(f"-{name}")]
    return matches[0] if len(matches) == 1 else None


def list_trials(output: Path, journal: Path, *, num: int, is_alone: bool) -> list[Contender]:
    """Return the best trials of a sweep. Raises ConfigError where none is complete, or one has lost a run."""
    from flows.sweeps.outcome import rank_trials
    from flows.sweeps.report import describe_values

    trials = rank_trials(journal)
    if not trials:
        raise ConfigError(f"no trial of {journal.stem} is complete; run the same sweep again")
    contenders = []
    for trial in trials[:num]:
        name = f"trial {trial.trial}" if is_alone else f"{journal.stem} trial {trial.trial}"
        folders = tuple(output / run for run in trial.run_ids)
        missing = [folder.name for folder in folders if not folder.is_dir()]
        if missing or not folders:
            lost = missing[0] if missing else "its runs"
            raise ConfigError(f"{name} of {journal.stem} has lost {lost}; name other runs, or run the sweep again")
        settings = ", ".join(f"{key}={value}" for key, value in trial.settings.items())
        seeds = f" over {len(folders)} training seeds" if len(folders) > 1 else ""
        note = f"{name} ({settings or 'one setting'}): {describe_values(trial)}{seeds}; {', '.join(trial.run_ids)}"
        contenders.append(Contender(name, folders, note))
    return contenders
