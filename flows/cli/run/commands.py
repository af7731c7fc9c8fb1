"""`likeness run`, `resume`, `sweep` and `pending`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli.app import RUN, ConfigCommand, app
from flows.cli.arguments import MAX_INTEGER, OUTPUT, OutputDir, RunName, Settings, complete_setting

Sampler = Literal["auto", "tpe", "grid", "random", "nsga2"]
Pruner = Literal["none", "median"]


@app.command("run", rich_help_panel=RUN, cls=ConfigCommand)
def run(
    settings: Settings = None,
    *,
    request: Annotated[
        Path | None,
        typer.Option("--request", metavar="FILE", help="Repeat the run of a request.json; KEY=VALUE overrides it."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration as YAML; compute and write nothing.")
    ] = False,
    multirun: Annotated[
        bool, typer.Option("--multirun", "-m", help="Try all combinations of KEY=V1,V2, as `likeness sweep` does.")
    ] = False,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="NUMBER",
            help="Train with so many seeds, from `seed` on: the mean of each metric with its 95 % interval. "
            "These runs register no model.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Run the whole job; without settings, the demo."""
    if seeds is not None and (multirun or dry_run):
        other, way = ("-m", "`likeness sweep --seeds`") if multirun else ("--dry-run", "--dry-run alone")
        raise typer.BadParameter(f"not with {other}; use {way}", param_hint="'--seeds'")
    if multirun:
        if request is not None or dry_run:
            raise typer.BadParameter("searches KEY=V1,V2 alone, without --request and --dry-run", param_hint="'-m'")
        from flows.cli.run.sweep import sweep_in_terminal

        return sweep_in_terminal(settings or [], {})
    from flows.cli.run.request import load_request

    stored = load_request(settings or [], request)
    if dry_run:
        from flows.cli.run.dry_run import print_configuration

        print_configuration(stored)
        return 0
    if seeds is not None:
        from flows.cli.run.sweep import repeat_in_terminal

        return repeat_in_terminal(stored, seeds)
    from flows.cli.run.job import run_in_terminal

    return run_in_terminal(stored)


@app.command("resume", rich_help_panel=RUN)
def resume(run: RunName = "latest", output_dir: OutputDir = OUTPUT) -> int:
    """Resume a run that failed, was cancelled or killed; training continues from its newest checkpoint.

    RUN is a folder of `likeness runs`, which continues here, or the name of a flow run, which a worker takes again.
    """
    from flows.cli.run.resume import resume as resume_run

    return resume_run(output_dir, run)


SWEEP_HELP = """Search settings with Optuna: KEY=V1,V2 tries values, KEY=LOW..HIGH a range, KEY=VALUE is fixed.

A study is stored in the output folder; the same command resumes it. Trials share every stage that they don't change.

\b
  likeness sweep training.learning_rate=5e-5,1e-4 training.max_train_steps=150,300    # every combination
  likeness sweep training.learning_rate=1e-6..1e-4:log training.lora.rank=4..32:4 --trials 20
  likeness sweep training.learning_rate=1e-6..1e-4:log --hours 8 --usd 2 --objective prompt_following
  likeness sweep training.max_train_steps=100..800:100 --trials 12 --objective dino --objective wall_seconds:min
  likeness sweep training.learning_rate=2e-6,5e-6 --seeds 3 --publish-best            # means with 95 % intervals
  likeness sweep training.max_train_steps=400 --seeds 5                               # one setting, five seeds
  likeness sweep training.prior_loss_weight=0..1:0.25 --parallel 4                    # on the pool of `likeness up`

\b
Ranges: LOW..HIGH of numbers; :log samples on a logarithmic scale, :int integers, :STEP every STEP.
Objectives: any number of a run's summary.json by dotted name, such as metrics.tuned.dino, scores.tuned.image_quality,
cost_usd, wall_seconds, or its last part alone; :min or :max after it. Two of them: a Pareto front.
"""


@app.command("sweep", rich_help_panel=RUN, cls=ConfigCommand, help=SWEEP_HELP)
def sweep(  # noqa: PLR0913 - one parameter per option
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=V1,V2",
            help="Several values or a range are searched, one value is fixed.",
            autocompletion=complete_setting,
            show_default=False,
        ),
    ] = None,
    *,
    trials: Annotated[
        int,
        typer.Option(min=0, max=MAX_INTEGER, help="Finished trials in all; 0: every combination.", metavar="NUMBER"),
    ] = 0,
    hours: Annotated[
        float | None, typer.Option(help="Hours of trials after which none starts.", metavar="NUMBER")
    ] = None,
    usd: Annotated[float | None, typer.Option(help="USD of trials after which none starts.", metavar="NUMBER")] = None,
    sampler: Annotated[
        Sampler, typer.Option(help="auto: grid where it is finite and --trials doesn't limit it, else tpe.")
    ] = "auto",
    objective: Annotated[
        list[str] | None,
        typer.Option(
            help="What is optimized, default dino_x_clip_t; twice: a Pareto front.", metavar="NAME[:min|:max]"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each setting.", metavar="NUMBER")] = 1,
    pruner: Annotated[
        Pruner, typer.Option(help="median: stop trials whose validation is behind the median of earlier ones.")
    ] = "none",
    parallel: Annotated[
        int, typer.Option(min=1, help="Trials at once, on the work pool of a stack.", metavar="NUMBER")
    ] = 1,
    publish_best: Annotated[
        bool, typer.Option("--publish-best", help="Register the best trial's model at the end; trials register none.")
    ] = False,
    study: Annotated[str, typer.Option(metavar="NAME", help="Study to resume.", show_default=False)] = "",
) -> int:
    """Search settings."""
    from flows.cli.run.sweep import sweep_in_terminal

    options = {
        "num_trials": trials, "max_hours": hours, "max_usd": usd, "sampler": sampler, "num_seeds": seeds,
        "pruner": pruner, "num_parallel": parallel, "publish_best": publish_best, "study": study,
    }  # fmt: skip
    return sweep_in_terminal(settings or [], {**options, **({"objectives": objective} if objective else {})})


@app.command("pending", rich_help_panel=RUN)
def pending(output_dir: OutputDir = OUTPUT) -> int:
    """Resume runs that wait for batch jobs (exit code 11: some are still pending)."""
    from flows.cli.run.job import finish_pending

    return finish_pending(output_dir)
