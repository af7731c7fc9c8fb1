"""Run a campaign of faults against real servers and print what was hit and how it recovered, as Markdown.

    python -m tests.chaos --seed 0 --runs 20 --workers 2 [--faults 28] [--kinds flow,s3-503] [--places s3,local]

Exit code 1: an invariant is violated. Steps of the clock need a C compiler.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.runs.records import read_summary
from tests.bench.main_job import describe_machine
from tests.chaos.evidence import (
    Submitted,
    find_active,
    find_run_folders,
    list_finished,
    list_orphans,
    list_temporary_files,
    read_account,
    read_active_slots,
    read_flow_run,
    read_history,
    read_weights,
)
from tests.chaos.faults import SLUGS, Injected, inject, plan_faults
from tests.chaos.invariants import Evidence, RunOutcome, check
from tests.chaos.report import RunHistory, make_table
from tests.chaos.site import Site, close, open_site, start_stack

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
CRASH_SECONDS = 90.0
"""After which a crashed run counts as not rescheduled: the server may have dropped the event."""
MAX_RESUMES = 3


@dataclass(frozen=True)
class Options:
    """A campaign's options."""

    seed: int
    runs: int
    workers: int
    faults: int
    variants: int
    """Distinct settings, each of which is run undisturbed once; so many runs share a store."""
    steps: int
    """Of training."""
    kinds: tuple[str, ...]
    places: tuple[str, ...]
    patience: float
    settle: float
    out: Path


def parse(words: Sequence[str] | None = None) -> Options:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--faults", type=int, default=28)
    parser.add_argument("--variants", type=int, default=2, help="distinct settings; so many runs share a store")
    parser.add_argument("--steps", type=int, default=12, help="of each training, with a checkpoint every three")
    parser.add_argument("--kinds", default=",".join(SLUGS), help=f"of {', '.join(SLUGS)}")
    parser.add_argument("--places", default="s3,local", help="kinds of stores, in turn")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds for which a fault waits for what it hits")
    parser.add_argument("--settle", type=float, default=1800.0, help="seconds that runs have to end after the faults")
    parser.add_argument("--out", type=Path, default=Path("build/chaos"))
    found = vars(parser.parse_args(words))
    kinds = tuple(SLUGS[slug] for slug in found.pop("kinds").split(","))
    places = tuple(found.pop("places").split(","))
    out = found.pop("out").absolute()
    return Options(**found, kinds=kinds, places=places, out=out)


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def name_places(options: Options) -> dict[str, str]:
    """Return the places by name with their kinds; each kind has an undisturbed one."""
    count = -(-options.runs // options.variants)
    kinds = [options.places[index % len(options.places)] for index in range(count)]
    undisturbed = {f"undisturbed-{kind}": kind for kind in dict.fromkeys(kinds)}
    return {**undisturbed, **{f"place-{index}": kind for index, kind in enumerate(kinds)}}


def wait_final(site: Site, runs: Sequence[Submitted], *, seconds: float) -> None:
    """Wait until runs have ended; one that crashed and is not rescheduled has."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        states = [read_flow_run(site, run.flow_run_id)["state"] for run in runs]
        now = time.time()
        changes = [read_history(site, run.flow_run_id)[-1].at for run in runs]
        if all(
            state["type"] in FINAL and (state["type"] != "CRASHED" or now - at > CRASH_SECONDS)
            for state, at in zip(states, changes, strict=True)
        ):
            return
        time.sleep(2)


def run_undisturbed(site: Site, options: Options) -> dict[str, list[Submitted]]:
    """Run every variant once in a place of each kind, without faults."""
    found: dict[str, list[Submitted]] = {}
    for place in site.places.values():
        if place.name.startswith("undisturbed"):
            found[place.kind] = [
                Submitted(f"{place.name}/{seed}", place, seed, site.submit(place, seed))
                for seed in range(options.variants)
            ]
    runs = [run for group in found.values() for run in group]
    wait_final(site, runs, seconds=options.settle)
    for run in runs:
        state = read_flow_run(site, run.flow_run_id)["state"]
        if state["type"] != "COMPLETED":
            raise SystemExit(f"the undisturbed run {run.name} ended {state['type']}: {state['message']}")
    return found


def submit_all(site: Site, options: Options) -> list[Submitted]:
    """Submit the runs that faults will hit."""
    places = [place for place in site.places.values() if not place.name.startswith("undisturbed")]
    runs = []
    for index in range(options.runs):
        place, seed = places[index // options.variants], index % options.variants
        runs.append(Submitted(f"{place.name}/{seed}", place, seed, site.submit(place, seed)))
    return runs


def inject_all(site: Site, options: Options, runs: Sequence[Submitted]) -> list[Injected]:
    """Inject the schedule while runs are in progress."""
    injected: list[Injected] = []
    for planned in plan_faults(options.seed, options.faults, options.kinds):
        time.sleep(planned.delay)
        while not (active := find_active(site, runs)):
            if all(read_flow_run(site, run.flow_run_id)["state_type"] in ("COMPLETED", "FAILED") for run in runs):
                note("all runs have ended before the schedule")
                return injected
            time.sleep(1)
        fault = inject(site, planned, active)
        hit = f"{len(fault.flow_run_ids)} runs" if fault else "nothing to hit"
        note(f"{planned.kind} for {planned.seconds:.0f} s: {hit}")
        if fault:
            injected.append(fault)
    return injected


def resume_all(site: Site, runs: Sequence[Submitted]) -> None:
    """Resume by hand what did not complete by itself."""
    for run in runs:
        while read_flow_run(site, run.flow_run_id)["state_type"] != "COMPLETED" and len(run.resume_codes) < MAX_RESUMES:
            folders = find_run_folders(run)
            if not folders or read_summary(folders[-1]).status in ("finished", "resumed"):
                break
            begun = time.time()
            done = site.likeness("resume", folders[-1].name, "--output-dir", str(run.place.folder))
            run.resume_codes.append(done.returncode)
            note(f"likeness resume {run.name}: exit code {done.returncode} {done.stderr.strip()[-300:]}")
            if done.returncode == 0:
                run.resumed_at.append((begun, time.time()))
                break


def collect(
    site: Site, runs: Sequence[Submitted], undisturbed: dict[str, list[Submitted]], faults: Sequence[Injected]
) -> Evidence:
    """Return the evidence; the next start of each place, and the end of the stack, are part of it."""
    outcomes, accounts = [], []
    for place in dict.fromkeys(run.place for run in runs):
        accounts.append(read_account(place, undisturbed[place.kind][0].place))
    for run in runs:
        twin = next(other for other in undisturbed[run.place.kind] if other.seed == run.seed)
        outcomes.append(
            RunOutcome(
                run.name,
                read_flow_run(site, run.flow_run_id)["state_type"],
                tuple(run.resume_codes),
                read_weights(site.open_store(run.place), run),
                read_weights(site.open_store(twin.place), twin),
                list_finished(run),
            )
        )
    # The next start, of runs whose stages are cached; through the pool, so that a leaked slot would show.
    again = [
        Submitted(f"{place.name}/again", place, 0, site.submit(place, 0))
        for place in dict.fromkeys(r.place for r in runs)
    ]
    wait_final(site, again, seconds=600)
    slots = read_active_slots(site)
    accepts = all(read_flow_run(site, run.flow_run_id)["state_type"] == "COMPLETED" for run in again)
    close(site)
    times = tuple(fault.at for fault in faults)
    return Evidence(
        tuple(outcomes), tuple(accounts), times, slots, accepts, list_orphans(site), list_temporary_files(site)
    )


def run_campaign(options: Options) -> int:
    """Run a campaign and return its exit code."""
    with open_site(options.out, options.workers, num_steps=options.steps, patience=options.patience) as site:
        for name, kind in name_places(options).items():
            site.add_place(name, kind)
        note("starting the stack")
        start_stack(site)
        note("undisturbed runs")
        undisturbed = run_undisturbed(site, options)
        note("runs with faults")
        runs = submit_all(site, options)
        faults = inject_all(site, options, runs)
        note("waiting for the runs")
        wait_final(site, runs, seconds=options.settle)
        resume_all(site, runs)
        histories = {
            run.flow_run_id: RunHistory(tuple(read_history(site, run.flow_run_id)), tuple(run.resumed_at))
            for run in runs
        }
        # Not the newest by time: a clock may have been set meanwhile.
        states = [read_flow_run(site, run.flow_run_id)["state_type"] for run in runs]
        violations = check(collect(site, runs, undisturbed, faults))
    alone, by_hand = states.count("COMPLETED"), sum(bool(run.resumed_at) for run in runs)
    print(f"\n{describe_machine()}\n")
    print(f"{len(runs)} runs on {options.workers} workers, {len(faults)} faults (seed {options.seed}): ", end="")
    print(f"{alone} completed by themselves, {by_hand} by `likeness resume`, {len(runs) - alone - by_hand} not.\n")
    print(make_table(faults, histories))
    print(f"\n{len(violations)} violations of invariants" + "".join(f"\n- {text}" for text in violations))
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(run_campaign(parse()))
