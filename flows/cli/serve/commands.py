"""`likeness serve`: an index of runs and their reports, in the browser."""

from typing import Annotated

import typer

from flows.cli.app import RESULTS, app
from flows.cli.arguments import OUTPUT, OutputDir


@app.command("serve", rich_help_panel=RESULTS)
def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on loopback; 0: any.")] = 4300,
    is_opened: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    output_dir: OutputDir = OUTPUT,
) -> int:
    """Serve an index of runs and their reports on loopback, read-only, until Ctrl-C."""
    from flows.cli.serve.server import serve_runs

    return serve_runs(output_dir, port, is_opened=is_opened)
