"""`likeness run-many`: one run per subject."""

from typing import Annotated

import typer

from flows.cli.app import RUN, ConfigCommand, app
from flows.cli.arguments import Settings


@app.command("run-many", rich_help_panel=RUN, cls=ConfigCommand)
def run_many(
    subjects: Annotated[
        str,
        typer.Argument(
            metavar="SUBJECTS", help="CSV file, folder of subject folders, store:PREFIX/, or s3://BUCKET/PREFIX/."
        ),
    ],
    settings: Settings = None,
    *,
    wait: Annotated[bool, typer.Option(help="Follow submitted runs to their ends.")] = True,
    retry_failed: Annotated[bool, typer.Option(help="Run subjects again whose last run failed.")] = True,
    settle_seconds: Annotated[
        int, typer.Option(min=0, max=86_400, help="Leave folders for later that were written this recently.")
    ] = 30,
) -> int:
    """Run many subjects; those that are finished and unchanged are left out, so the same command resumes.

    A CSV file has the columns source (a folder of photos) and class_noun, perhaps name, and one column for each setting
    that differs. A subject folder holds photos and a subject.yaml: `class_noun: dog`, perhaps `settings:` and
    `photos:` (names; the folder is complete when all are there).

    Next to a stack (`likeness up`), or with PREFECT_API_URL, the runs go to its work pool; otherwise they run here, in
    turn. Exit code 1: some failed or were refused.
    """
    from flows.cli.subjects.terminal import run_many_in_terminal

    options = {"wait": wait, "retry_failed": retry_failed, "settle_seconds": settle_seconds}
    return run_many_in_terminal(subjects, settings or [], options)
