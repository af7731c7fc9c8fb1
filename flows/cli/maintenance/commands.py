"""`likeness doctor` and `gc`."""

from typing import Annotated

import typer

from flows.cli.app import MAINTENANCE, ConfigCommand, app
from flows.cli.arguments import OUTPUT, OutputDir, Settings


@app.command("doctor", rich_help_panel=MAINTENANCE, cls=ConfigCommand)
def doctor(settings: Settings = None) -> int:
    """Check every LLM profile: key, model list, retirement, schema, images, tools, ..."""
    from flows.cli.maintenance.doctor import print_examination

    return print_examination(settings or [])


@app.command("gc", rich_help_panel=MAINTENANCE)
def gc(
    is_deleting: Annotated[
        bool, typer.Option("--delete", help="Remove what is listed; without it nothing is removed.")
    ] = False,
    days: Annotated[float, typer.Option(metavar="NUMBER", help="Minimum age in days.")] = 7.0,
    output_dir: OutputDir = OUTPUT,
) -> int:
    """List what no run refers to and what interrupted runs left; --delete removes it."""
    from flows.cli.maintenance.gc import print_garbage

    print_garbage(output_dir, days=days, is_deleting=is_deleting)
    return 0
