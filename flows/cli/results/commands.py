"""Commands that read and use finished runs."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.app import RESULTS, ConfigCommand, app
from flows.cli.arguments import OUTPUT, OutputDir, RunName, Settings, complete_compared
from flows.cli.results.images import options
from flows.cli.results.tables import Format
from tasks.errors import ConfigError


@app.command("runs", rich_help_panel=RESULTS)
def runs(
    as_json: Annotated[bool, typer.Option("--json", help="Print every run's summary.json as one list.")] = False,
    output_dir: OutputDir = OUTPUT,
) -> int:
    """List runs, newest first."""
    from flows.cli.results.runs import print_runs
    from flows.runs.records import list_summaries

    summaries = list_summaries(output_dir)
    if as_json:
        print(json.dumps([s.model_dump(mode="json", exclude_unset=True) for s in summaries], indent=1))
    else:
        print_runs(summaries, folder=output_dir)
    return 0


@app.command("report", rich_help_panel=RESULTS)
def report(
    run: RunName = "latest",
    is_opened: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    output_dir: OutputDir = OUTPUT,
) -> int:
    """Print the path of a run's report."""
    from flows.cli.results.runs import explain_no_report, find_run

    folder = find_run(output_dir, run)
    path = folder / "report.html"
    if not path.exists():
        raise ConfigError(explain_no_report(folder))
    print(path)
    if is_opened:
        import webbrowser

        webbrowser.open(path.absolute().as_uri())
    return 0


@app.command("compare", rich_help_panel=RESULTS)
def compare(  # noqa: PLR0913 - a command's options
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN ...",
            help="Runs, or sweeps by their study's name: their best trials; the first is the baseline.",
            autocompletion=complete_compared,
        ),
    ],
    *,
    unpaired: Annotated[
        bool, typer.Option("--unpaired", help="Compare means of other prompts, seeds or photos; wider intervals.")
    ] = False,
    judge: Annotated[
        bool, typer.Option("--judge", help="Let the first run's judge choose between the samples, in both orders.")
    ] = False,
    samples: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Write the samples side by side.", show_default=False)
    ] = None,
    as_format: Annotated[
        Format, typer.Option("--format", help="Output format; html: a page with the samples side by side.")
    ] = "table",
    trials: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=20,
            metavar="NUMBER",
            show_default=False,
            help="Best trials of a sweep; default: 3 of a sweep alone, 1 of each beside others.",
        ),
    ] = None,
    output_dir: OutputDir = OUTPUT,
) -> int:
    """Compare runs, or trials of sweeps, by paired differences with 95 % intervals."""
    from flows.cli.results.compare import Extras, compare_runs

    extras = Extras(samples, is_judged=judge, num_trials=trials)
    print(compare_runs(output_dir, runs, is_paired=not unpaired, as_format=as_format, extras=extras))
    return 0


@app.command("evaluate", rich_help_panel=RESULTS, cls=ConfigCommand)
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Diffusers folder; or LoRA or embedding in safetensors.", show_default=False
        ),
    ],
    settings: Settings = None,
    *,
    photos: Annotated[Path, typer.Option(metavar="DIR", help="Photos of the subject.", show_default=False)],
    class_noun: Annotated[str, typer.Option(metavar="NOUN", help="What the subject is.", show_default=False)],
    token: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="How the model calls it; default sks.", show_default=False)
    ] = None,
) -> int:
    """Measure and judge a model that was trained elsewhere, comparable with runs."""
    from flows.cli.results.evaluate import Subject, evaluate_in_terminal, make_request

    return evaluate_in_terminal(make_request(model, Subject(photos, class_noun, token), settings or []))


@app.command("approve", rich_help_panel=RESULTS)
def approve(  # noqa: PLR0913, PLR0917 - a command's options
    run: RunName = "latest",
    reject: Annotated[
        list[str] | None, typer.Option("--reject", metavar="PHOTO", help="Leave a photo out; may be repeated.")
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Changed captions: photo,surroundings,view.", show_default=False)
    ] = None,
    refuse: Annotated[bool, typer.Option("--refuse", help="Refuse all photos: the run fails.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask no question.")] = False,
    output_dir: OutputDir = OUTPUT,
) -> int:
    """Approve the photos and captions of a run that waits for it (subject.approval=ask), and resume the run."""
    from flows.cli.results.approve import Decision
    from flows.cli.results.approve import approve as approve_run

    return approve_run(output_dir, run, Decision(tuple(reject or ()), captions, is_refused=refuse, is_confirmed=yes))


@app.command("generate", rich_help_panel=RESULTS)
def generate(  # noqa: PLR0913, PLR0917 - a command's options
    model: options.Model,
    prompt: options.Prompt = None,
    num: options.Num = 1,
    seed: options.Seed = None,
    size: options.Size = None,
    sampler: options.Sampler = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative: options.Negative = "",
    lora_scale: options.LoraScale = 1.0,
    prompts_file: options.PromptsFile = None,
    grid: options.HasGrid = False,
    grid_guidance: options.GridGuidance = None,
    grid_steps: options.GridSteps = None,
    out: options.Out = None,
    candidate: options.Candidate = None,
    base: options.Base = None,
    token: options.Token = None,
    is_checked: options.IsChecked = None,
    c2pa_certificate: options.Certificate = None,
    c2pa_key: options.PrivateKey = None,
    is_opened: options.IsOpened = False,
    output_dir: OutputDir = OUTPUT,
) -> int:
    """Generate images with a tuned model. They are marked as generated, in PNG text and XMP."""
    from flows.cli.results.images import generate as images
    from flows.cli.results.images import request as asked
    from flows.cli.results.images.credentials import load_credentials
    from flows.cli.results.images.files import Target
    from flows.cli.results.images.models import ModelChoice, open_source
    from flows.cli.results.images.refusals import log_refusals

    if (prompt is None) == (prompts_file is None):
        raise ConfigError("give a prompt, or --prompts-file")
    if grid and (grid_guidance or grid_steps):
        raise ConfigError("--grid-guidance and --grid-steps draw a grid of their own; leave --grid out")
    request = asked.ImageRequest(
        (prompt,) if prompt is not None else asked.read_prompts(prompts_file or Path()),
        num, seed, steps, guidance, candidate, size, sampler, lora_scale, negative,
        asked.read_values(grid_guidance, "--grid-guidance", asked.GUIDANCE),
        asked.read_steps(grid_steps, "--grid-steps"),
        is_checked,
    )  # fmt: skip
    credentials = load_credentials(c2pa_certificate, c2pa_key)
    with (
        log_refusals(output_dir, model=model),
        open_source(output_dir, ModelChoice(model, base, token), candidate=candidate) as source,
        images.show_steps() as on_step,
    ):
        target = Target(source.folder, out, has_grid=grid, credentials=credentials)
        done = images.generate(source, request, target, on_progress=images.show_progress, on_step=on_step)
    images.print_images(done)
    if is_opened and typer.launch(str(done.grid or done.images[0][0])):
        print("warning: no program to open images is installed (xdg-open)", file=sys.stderr)
    return 0


@app.command("publish", rich_help_panel=RESULTS)
def publish(  # noqa: PLR0913, PLR0917 - a command's options
    context: typer.Context,
    run: RunName,
    to: Annotated[str, typer.Option(metavar="DEST", help="A folder, or s3://BUCKET/PREFIX.", show_default=False)],
    samples: Annotated[bool, typer.Option("--samples", help="Copy the evaluation's samples of the model too.")] = False,
    c2pa_certificate: options.Certificate = None,
    c2pa_key: options.PrivateKey = None,
    output_dir: OutputDir = OUTPUT,
) -> int:
    """Copy a run's model and report elsewhere; each file is verified there, and the manifest comes last."""
    from flows.cli.results.images.credentials import load_credentials
    from flows.cli.results.images.generate import show_progress
    from flows.cli.results.publishing import Destination, publish_run

    # Variables may be set for `likeness generate`; without samples they have nothing to sign.
    source = context.get_parameter_source("c2pa_certificate")
    if not samples and source is not None and source.name == "COMMANDLINE":
        raise ConfigError("--c2pa-certificate signs samples; add --samples")
    credentials = load_credentials(c2pa_certificate, c2pa_key) if samples else None
    target = Destination(to, has_samples=samples, credentials=credentials)
    return publish_run(output_dir, run, target, on_progress=partial(show_progress, name="files"))


@app.command("promote", rich_help_panel=RESULTS)
def promote(
    run: RunName = "latest",
    force: Annotated[bool, typer.Option("--force", help="Skip the gate and the comparison.")] = False,
    output_dir: OutputDir = OUTPUT,
) -> int:
    """Make a run's registered model the champion, if it passes the gate and beats the present one."""
    from flows.cli.results.publishing import promote_run

    return promote_run(output_dir, run, is_forced=force)


@app.command("demote", rich_help_panel=RESULTS)
def demote(run: RunName = "latest", output_dir: OutputDir = OUTPUT) -> int:
    """Remove the alias champion from a run's registered model."""
    from flows.cli.results.publishing import demote_run

    return demote_run(output_dir, run)


@app.command("review", rich_help_panel=RESULTS)
def review(run: RunName = "latest", output_dir: OutputDir = OUTPUT) -> int:
    """Review and edit a run's captions in a chat with an LLM."""
    from flows.cli.results.review import review as review_captions
    from flows.cli.results.runs import find_run

    path = review_captions(find_run(output_dir, run))
    if path is not None:
        print(f"captions: {path}\nto train with them, run again with subject.captions={path}")
    return 0
