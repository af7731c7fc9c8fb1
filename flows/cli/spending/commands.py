"""`likeness estimate`, `cost`, `capacity` and `jobs`."""

from typing import Annotated, Literal

import typer

from flows.cli.app import SPENDING, ConfigCommand, app
from flows.cli.arguments import OUTPUT, OutputDir, RunName, Settings
from flows.cli.results.tables import Format

Action = Literal["list", "show", "adopt", "cancel", "discard"]


@app.command("estimate", rich_help_panel=SPENDING, cls=ConfigCommand)
def estimate(settings: Settings = None) -> int:
    """Predict memory, LLM calls and cost before anything is loaded or sent."""
    from flows.cli.spending.estimate import print_estimates

    print_estimates(settings or [])
    return 0


@app.command("cost", rich_help_panel=SPENDING)
def cost(
    run: RunName = "latest",
    as_json: Annotated[bool, typer.Option("--json", help="Print the totals as JSON.")] = False,
    output_dir: OutputDir = OUTPUT,
) -> int:
    """Print LLM calls and cost of a configuration over all its runs."""
    from flows.cli.spending.cost import find_paying_run, print_costs

    print_costs(find_paying_run(output_dir, run), is_json=as_json)
    return 0


@app.command("capacity", rich_help_panel=SPENDING)
def capacity(
    run: RunName = "latest",
    assumptions: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=VALUE", help="Of conf/capacity.yaml, for example gpus=32.", show_default=False),
    ] = None,
    *,
    subjects: Annotated[
        str, typer.Option(metavar="N,N", help="Default: 1,100,1000,10000,100000.", show_default=False)
    ] = "",
    as_format: Annotated[Format, typer.Option("--format", help="Output format.")] = "table",
    output_dir: OutputDir = OUTPUT,
) -> int:
    """Simulate many subjects from a measured run: time, cost, and what runs short first."""
    from flows.cli.spending.capacity import print_capacity

    return print_capacity(output_dir, run, assumptions or [], subjects=subjects, as_format=as_format)


@app.command("jobs", rich_help_panel=SPENDING)
def jobs(  # noqa: PLR0917 - a command's options
    action: Annotated[Action, typer.Argument(metavar="ACTION", help="list, show, adopt, cancel or discard.")] = "list",
    job: Annotated[str, typer.Argument(metavar="JOB", help="The provider's id of a job.", show_default=False)] = "",
    profile: Annotated[
        str, typer.Option(metavar="NAME", help="LLM profile of a job that no run here created.", show_default=False)
    ] = "",
    output_dir: OutputDir = OUTPUT,
) -> int:
    """List, show, adopt, cancel or discard remote batch jobs, with their cost so far."""
    from flows.cli.spending.jobs import run_jobs_command

    return run_jobs_command(output_dir, action, job, profile=profile)
