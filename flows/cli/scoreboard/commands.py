"""`likeness scoreboard`."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.app import RESULTS, app
from flows.cli.results.tables import Format

HELP = """Train and measure methods on subjects with several seeds, and compare them with 95 % intervals.

Each model is one run of `likeness run`; finished ones aren't run again, so the same command resumes. The shipped plan
(conf/scoreboard.yaml: full, lora and token+lora with and without prior preservation, token, and a wrong class noun, on
four drawn subjects) is 32 runs.

\b
  likeness scoreboard                                          # the shipped plan
  likeness scoreboard --methods full,lora --seeds 3            # a part of it, three training seeds each
  likeness scoreboard plan.yaml --subjects subjects            # your plan and photos: subjects/NAME/ with subject.yaml
  likeness scoreboard --external models                        # other trainers' models as rows
  likeness scoreboard --dry-run                                # print the commands

\b
models/METHOD/SUBJECT/ or models/METHOD/SUBJECT/SEED/ holds what `likeness evaluate` takes: a diffusers folder, a LoRA
or an embedding. models/METHOD/method.yaml may say how its prompts call the subject: `token: sks`.
"""


@app.command("scoreboard", rich_help_panel=RESULTS, help=HELP)
def scoreboard(  # noqa: PLR0913 - one parameter per option
    plan: Annotated[
        Path | None, typer.Argument(metavar="PLAN", help="YAML like conf/scoreboard.yaml.", show_default=False)
    ] = None,
    *,
    subjects: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folders of photos with a subject.yaml each.", show_default=False),
    ] = None,
    methods: Annotated[str, typer.Option(metavar="A,B", help="Some of the plan's methods.", show_default=False)] = "",
    seeds: Annotated[
        int | None, typer.Option(min=1, max=100, help="Training seeds; default: the plan's.", metavar="NUMBER")
    ] = None,
    external: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Models of other trainers.", show_default=False)
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            metavar="NUMBER",
            help="Runs at once; default: one for each GPU, or for each core with the mini model.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of runs, tables and picture.")] = Path("scoreboard"),
    as_format: Annotated[Format, typer.Option("--format", help="Output format.")] = "table",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands; run nothing.")] = False,
) -> int:
    """Compare methods over subjects and seeds."""
    from flows.cli.scoreboard.job import ScoreboardOptions, run_scoreboard

    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    options = ScoreboardOptions(plan, subjects, external, names, seeds, parallel, out)
    return run_scoreboard(options, as_format=as_format, is_dry=dry_run)
