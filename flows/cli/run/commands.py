"""`likeness run`, `resume`, `sweep` and `pending`."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.app import RUN, ConfigCommand, app
from flows.cli.arguments import MAX_INTEGER, OUTPUT, OutputDir, RunName, Settings, complete_setting


@app.command("run", rich_help_panel=RUN, cls=ConfigCommand)
def run(
    settings: Settings = None,
    request: Annotated[
        Path | None,
        typer.Option("--request", metavar="FILE", help="Repeat the run of a request.json; KEY=VALUE overrides it."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration as YAML; compute and write nothing.")
    ] = False,
) -> int:
    """Run the whole job; without settings, the demo."""
    from flows.cli.run.request import load_request

    stored = load_request(settings or [], request)
    if dry_run:
        from flows.cli.run.dry_run import print_configuration

        print_configuration(stored)
        return 0
    from flows.cli.run.job import run_in_terminal

    return run_in_terminal(stored)


@app.command("resume", rich_help_panel=RUN)
def resume(run: RunName = "latest", output_dir: OutputDir = OUTPUT) -> int:
    """Resume a run that failed, was cancelled or killed; training continues from its newest checkpoint."""
    from flows.cli.run.resume import resume as resume_run

    return resume_run(output_dir, run)


@app.command("sweep", rich_help_panel=RUN, cls=ConfigCommand)
def sweep(
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=V1,V2",
            help="Several values are searched, one value is fixed.",
            autocompletion=complete_setting,
        ),
    ],
    trials: Annotated[
        int, typer.Option(min=0, max=MAX_INTEGER, help="Number of trials; 0: every combination.", metavar="NUMBER")
    ] = 0,
    study: Annotated[str, typer.Option(metavar="NAME", help="Study to resume.", show_default=False)] = "",
) -> int:
    """Search settings: each takes several values."""
    from flows.cli.run.job import sweep_in_terminal

    return sweep_in_terminal(settings, num_trials=trials, study=study)


@app.command("pending", rich_help_panel=RUN)
def pending(output_dir: OutputDir = OUTPUT) -> int:
    """Resume runs that wait for batch jobs (exit code 11: some are still pending)."""
    from flows.cli.run.job import finish_pending

    return finish_pending(output_dir)
