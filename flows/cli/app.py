"""The Typer application: panels of commands and plain help text.

Start-up imports Typer and nothing of pydantic, Hydra, Prefect or torch; commands import what they need.
"""

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from typer._click import Command, Context, HelpFormatter  # Typer's own copy of click

RUN, STACK, RESULTS = "Run", "Local stack", "Results"
SPENDING, MAINTENANCE = "Cost and batch jobs", "Maintenance"
PANELS = (RUN, STACK, RESULTS, SPENDING, MAINTENANCE)
EXAMPLES = (
    ("likeness run", "the demo: five photos of a drawn fish"),
    ("likeness run subject.source=photos subject.class_noun=mug", "your own photos"),
    ("likeness run diffusion=sd15 llm=openai subject.source=photos subject.class_noun=dog", ""),
    ("likeness run training.max_train_steps=400 --dry-run", "print the configuration, compute nothing"),
    ("likeness run --request runs/RUN/request.json seed=7", "repeat a run with another seed"),
    ("likeness sweep training.learning_rate=5e-5,1e-4", "one trial for each value"),
    ("likeness runs", "list runs"),
    ("likeness compare RUN RUN", "which of two models is better, and how sure that is"),
    ("likeness evaluate lora.safetensors --photos photos --class-noun mug", "a model that was trained elsewhere"),
    ('likeness generate latest "a photo of sks fish at night"', ""),
    ("likeness doctor llm=openai", "check keys and models before anything is billed"),
    ("likeness cost", "what the newest run's configuration cost, reruns included"),
    ("likeness gc", "list what can be removed"),
)
VALUES = "key=value sets one value; conf/run.yaml lists all settings with their defaults."


class CommandGroup(TyperGroup):
    """Help with commands by panel, then examples and config groups."""

    def format_commands(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        for panel in PANELS:
            commands = {name: command for name, command in self.commands.items() if find_panel(command) == panel}
            with formatter.section(panel):
                formatter.write_dl([(name, command.get_short_help_str(200)) for name, command in commands.items()])

    def format_epilog(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        with formatter.section("Examples"):
            # Not as a definition list, so that whole lines can be copied.
            for words, note in EXAMPLES:
                formatter.write(f"  {words}{f'  # {note}' if note else ''}\n")
        write_config_groups(formatter)


class ConfigCommand(TyperCommand):
    """A command that takes settings: its help lists the config groups."""

    def format_epilog(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        write_config_groups(formatter)


def find_panel(command: "Command") -> str:
    """Return the panel of a command. Raises KeyError where it names none: it would be missing from the help."""
    panel = getattr(command, "rich_help_panel", None)
    if panel not in PANELS:
        raise KeyError(f"command {command.name} is in no panel of {PANELS}")
    return str(panel)


def write_config_groups(formatter: "HelpFormatter") -> None:
    """Write the config groups with their options, as the files in conf/ and LIKENESS_CONF give them."""
    from conf.groups import GROUPS, list_options, read_default_options

    defaults = read_default_options()
    with formatter.section("Config groups (group=option, * is the default)"):
        rows = {
            group: [f"{option}*" if option == defaults[group] else option for option in list_options(group)]
            for group in GROUPS.values()
        }
        formatter.write_dl([(group, " | ".join(options)) for group, options in rows.items()])
    formatter.write(f"\n{VALUES}\n")


def print_version(is_asked: bool) -> None:
    """Print the installed version and exit."""
    if not is_asked:
        return
    from importlib import metadata

    try:
        version = metadata.version("likeness")
    except metadata.PackageNotFoundError:
        version = "(not installed)"
    typer.echo(f"likeness {version}")
    raise typer.Exit


# Without Rich's markup: boxes and colours would break `likeness --help | grep`.
app = typer.Typer(cls=CommandGroup, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def start(
    ctx: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Turn 3-5 photos of one subject into a tuned, scored, published text-to-image model."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def register_commands() -> None:
    """Import `commands.py` of every folder beside this file; each adds its commands to `app`."""
    here = Path(__file__).parent
    for module in pkgutil.iter_modules([str(here)]):
        if module.ispkg and (here / module.name / "commands.py").is_file():
            importlib.import_module(f"flows.cli.{module.name}.commands")
