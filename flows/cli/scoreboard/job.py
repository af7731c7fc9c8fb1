"""`likeness scoreboard`: methods x subjects x seeds by the public commands, as tables and a picture."""

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.compose import compile_request
from flows.cli.results.runs import show_cell
from flows.cli.results.tables import Format
from flows.cli.run.prefect_server import shared_server
from flows.scoreboard.cells import (
    Cell,
    Result,
    draw_subjects,
    find_result,
    list_cells,
    read_subjects,
    run_cell,
)
from flows.scoreboard.external import list_external
from flows.scoreboard.plan import SHIPPED, Plan, read_plan
from tasks.errors import ConfigError
from tasks.stage.files import write_atomic

MAX_PARALLEL = 4
MINI_BYTES = 3 * 2**30
"""Memory of a run of the mini model, all of its processes together; it needs two thirds of it."""


@dataclass(frozen=True)
class ScoreboardOptions:
    """What is run, and where."""

    plan: Path | None = None
    """None: the shipped plan."""
    subjects: Path | None = None
    """None: the drawn ones of the plan."""
    external: Path | None = None
    methods: tuple[str, ...] = ()
    num_seeds: int | None = None
    num_parallel: int | None = None
    """None: as many as this machine takes."""
    out: Path = Path("scoreboard")


def run_scoreboard(options: ScoreboardOptions, *, as_format: Format, is_dry: bool) -> int:
    """Run what is missing, print the tables, and write them beside a picture; return 1 if a cell failed."""
    plan = read_plan(options.plan or SHIPPED).restrict(options.methods, options.num_seeds)
    cells = plan_cells(options, plan, is_dry=is_dry)
    if is_dry:
        for cell in cells:
            print(cell.command)
        return 0
    results = run_cells(cells, options)
    failed = [result for result in results if result.error]
    if len(failed) == len(results):
        raise ConfigError(f"no run of the scoreboard succeeded; the first: {failed[0].error}")
    from flows.cli.scoreboard.tables import show
    from flows.scoreboard.picture import write_picture
    from flows.scoreboard.standings import load_models, rank

    models = load_models(results)
    standings = rank(models, plan)
    print(show(standings, results, reference=plan.reference, as_format=as_format))
    forms: tuple[tuple[str, Format], ...] = (("scoreboard.md", "md"), ("scoreboard.json", "json"))
    for name, form in forms:
        text = show(standings, results, reference=plan.reference, as_format=form)
        write_atomic(options.out / name, f"{text}\n")
    picture = write_picture(models, options.out / "scoreboard.png", reference=plan.reference)
    note(f"\npicture   {picture}")
    return 1 if failed else 0


def plan_cells(options: ScoreboardOptions, plan: Plan, *, is_dry: bool = False) -> list[Cell]:
    """Return all cells, with those of other trainers at the end. Raises ConfigError."""
    if options.subjects is not None:
        subjects = read_subjects(options.subjects)
    else:
        subjects = draw_subjects(plan.drawn, options.out / "subjects", is_dry=is_dry)
    if not subjects:
        raise ConfigError("the plan names no subjects; list `drawn`, or give --subjects DIR")
    cells = list(list_cells(plan, subjects, options.out))
    if options.external is not None:
        cells += list_external(options.external, plan, subjects, output=options.out)
    return cells


def run_cells(cells: Sequence[Cell], options: ScoreboardOptions) -> list[Result]:
    """Return the results of all cells, in their order; finished ones aren't run again."""
    from concurrent.futures import ThreadPoolExecutor

    found = {cell.key: find_result(cell, options.out) for cell in cells}
    missing = [cell for cell in cells if found[cell.key] is None]
    note(f"{len(cells)} models, {len(cells) - len(missing)} of them finished before; logs in {options.out / 'logs'}")
    num_parallel = options.num_parallel or choose_parallel(cells[0])
    threads = max(1, (os.cpu_count() or 1) // num_parallel) if num_parallel > 1 else None
    # A server for each of them would take a tenth of the time.
    server = shared_server(options.out) if len(missing) > 1 else contextlib.nullcontext()
    with server, ThreadPoolExecutor(num_parallel) as pool:
        running = [pool.submit(run_cell, cell, options.out, num_threads=threads) for cell in missing]
        try:
            for number, future in enumerate(running, 1):
                result = future.result()
                found[result.cell.key] = result
                note(f"[{number}/{len(missing)}] {describe(result)}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [done for cell in cells if (done := found[cell.key]) is not None]


def choose_parallel(cell: Cell) -> int:
    """Return how many runs work at once: one for each GPU; on the CPU one for each core with the mini model, else one.

    The mini model's operations are too small for several threads.
    """
    import psutil

    from tasks.diffusion.device import choose_device, count_gpus

    config = compile_request(cell.request)
    if choose_device(config.diffusion).type == "cuda":
        return max(1, count_gpus())
    if not config.is_mini:
        return 1
    memory = int(psutil.virtual_memory().available) // MINI_BYTES
    return max(1, min(os.cpu_count() or 1, memory, MAX_PARALLEL))


def describe(result: Result) -> str:
    """Return one line about a cell's end."""
    cell = result.cell
    head = f"{cell.method}, {cell.subject}, seed {cell.seed}: "
    if result.summary is None:
        return f"{head}failed: {result.error}"
    dino = result.summary.metrics["tuned"]["dino"]
    return f"{head}{result.seconds:.0f} s, DINO {show_cell(dino)}"


def note(text: str) -> None:
    """Print progress, which isn't part of the output."""
    print(text, file=sys.stderr, flush=True)
