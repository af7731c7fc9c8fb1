"""`likeness up`, `down`, `status`: a local stack in one command; `submit`, `cancel`, `logs`: runs on it."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.app import STACK, ConfigCommand, app
from flows.cli.arguments import OUTPUT, OutputDir, Settings


@app.command("up", rich_help_panel=STACK)
def up(  # noqa: PLR0913 - a command's options
    output_dir: OutputDir = OUTPUT,
    *,
    prefect_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of Prefect; 0: any.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of MLflow; 0: any.")] = 5000,
    reports_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of `likeness serve`; 0: any.")] = 4300,
    max_runs: Annotated[
        int | None,
        typer.Option(
            min=1, max=1_000, help="Runs at a time; a GPU trains or samples for one, others wait.", show_default="2"
        ),
    ] = None,
    notify: Annotated[
        str,
        typer.Option(
            metavar="URL",
            envvar="LIKENESS_NOTIFY_URL",
            help="Post a message when a run ends or waits for approval: a webhook, or Slack's.",
            show_default=False,
        ),
    ] = "",
    postgres: Annotated[
        str,
        typer.Option(
            metavar="URL",
            envvar="LIKENESS_DATABASE_URL",
            help="Database of Prefect; default: SQLite.",
            show_default=False,
        ),
    ] = "",
    s3: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="Bucket of objects and MLflow's artifacts, s3://BUCKET/PREFIX; default: the output folder.",
            show_default=False,
        ),
    ] = "",
) -> int:
    """Start Prefect, MLflow, a report server and a worker on loopback; find a running stack."""
    from flows.cli.stack.screen import start_stack
    from flows.cli.stack.stack import StackOptions

    output = Path(output_dir).absolute()
    options = StackOptions(
        output, prefect_port, mlflow_port, reports_port, max_runs=max_runs, notify_url=notify, database_url=postgres,
        s3_url=s3,
    )  # fmt: skip
    return start_stack(options)


@app.command("down", rich_help_panel=STACK)
def down(output_dir: OutputDir = OUTPUT) -> int:
    """Stop what `likeness up` started, and nothing else."""
    from flows.cli.stack.screen import end_stack

    return end_stack(Path(output_dir).absolute())


@app.command("status", rich_help_panel=STACK)
def status(output_dir: OutputDir = OUTPUT) -> int:
    """Show the processes of the stack and their addresses (exit code 4: not all of them run)."""
    from flows.cli.stack.screen import show_status

    return show_status(Path(output_dir).absolute())


FlowRunName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the run in Prefect, as `submit` prints it.")]


@app.command("submit", rich_help_panel=STACK, cls=ConfigCommand)
def submit(
    settings: Settings = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return at once instead of following the run.")] = False,
    output_dir: OutputDir = OUTPUT,
) -> int:
    """Send a run to the worker and follow it; Ctrl-C detaches."""
    from flows.cli.stack.submit import submit as send

    return send(settings or [], Path(output_dir).absolute(), is_detached=detach)


@app.command("cancel", rich_help_panel=STACK)
def cancel(name: FlowRunName, output_dir: OutputDir = OUTPUT) -> int:
    """Cancel a submitted run; training saves a checkpoint, and running it again resumes it."""
    from flows.cli.stack.submit import cancel as cancel_run

    return cancel_run(name, Path(output_dir).absolute())


@app.command("logs", rich_help_panel=STACK)
def logs(name: FlowRunName, output_dir: OutputDir = OUTPUT) -> int:
    """Show the log lines of a submitted run, and follow it to its end."""
    from flows.cli.stack.submit import show_logs

    return show_logs(name, Path(output_dir).absolute())
