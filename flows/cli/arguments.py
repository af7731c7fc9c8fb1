"""Arguments that several commands share, and their shell completion."""

import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Annotated

import typer

MAX_INTEGER = 2**63 - 1


def complete_run(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return names of runs, newest first."""
    output = Path(ctx.params.get("output_dir") or "runs")
    names = sorted((path.parent.name for path in output.glob("*/request.json")), reverse=True)
    return [name for name in ("latest", *names) if name.startswith(incomplete)]


def complete_compared(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return names of runs, newest first, then of sweeps."""
    journals = sorted(Path(ctx.params.get("output_dir") or "runs").glob("sweeps/*.journal"))
    return [*complete_run(ctx, incomplete), *(path.stem for path in journals if path.stem.startswith(incomplete))]


def complete_setting(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return `group=option` and `setting=`; options alone where the shell splits words at `=`, as bash does."""
    from conf.defaults import list_settings
    from conf.groups import GROUPS, list_options

    words = list(ctx.params.get("settings") or [])
    if words[-1:] == ["="]:
        group = words[-2] if len(words) > 1 else ""
        return [option for option in list_options(group) if group in GROUPS.values() and option.startswith(incomplete)]
    listed = [f"{group}={option}" for group in GROUPS.values() for option in list_options(group)]
    # Only below a section: the list of all settings would bury the groups.
    listed += [f"{name}=" for name in list_settings()] if "." in incomplete else []
    return [word for word in listed if word.startswith(incomplete)]


def open_value(environment: MutableMapping[str, str] = os.environ) -> None:
    """Complete `diffusion=` as an empty value: in bash's words, the `=` itself is the word at the cursor."""
    words, index = environment.get("COMP_WORDS", "").split(), environment.get("COMP_CWORD", "")
    if words[-1:] == ["="] and index == str(len(words) - 1):
        environment["COMP_CWORD"] = str(len(words))


Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings and config groups, for example training.max_train_steps=400.",
        autocompletion=complete_setting,
        show_default=False,
    ),
]
RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="Run folder, its name, the end of its name, or latest.", autocompletion=complete_run
    ),
]
OutputDir = Annotated[Path, typer.Option("--output-dir", metavar="DIR", help="Folder of the runs.")]
OUTPUT = Path("runs")
